//! Speed of the matrix products: `cargo run --release -p antefix-kernels --example matmul_bench [threads] [format]`.
//!
//! Weights are random bytes. Many rows: 10^9 multiply-adds a second. One row: packed bytes a second, cycling through copies that
//! together exceed the last cache. Best of several runs, because other work may share the machine.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::time::Instant;

use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::{Acts, Matrix, Precision, matmul};
use antefix_kernels::quant::Format;
use antefix_kernels::team::Team;

fn best(runs: usize, mut f: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let t = Instant::now();
            f();
            t.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    let mut args = std::env::args().skip(1);
    let threads = args.next().map_or(2, |a| a.parse().unwrap());
    let only = args.next();
    let team = Team::new(threads);
    let cpu = Cpu::from_env().unwrap();
    println!("path {}, {threads} threads", cpu.path());
    println!(
        "{:>6} {:>12} {:>10} {:>10} {:>10}",
        "format", "n x k", "GMAC/s", "GB/s", "pack GB/s"
    );
    let formats = [
        Format::Q4_1,
        Format::Q5_0,
        Format::Q8_0,
        Format::Q4_K,
        Format::Q6_K,
        Format::BF16,
    ];
    for format in formats
        .into_iter()
        .filter(|f| only.as_ref().is_none_or(|o| *o == f.name()))
    {
        for (n, k) in [(576, 1536), (1536, 576), (896, 4864), (49152, 576)] {
            if k % format.block_len() != 0 {
                continue;
            }
            let bytes: Vec<u8> = (0..n * format.row_bytes(k).unwrap())
                .map(|i| (i * 2_654_435_761 >> 7) as u8 & 0x3f)
                .collect();
            let pack = || Matrix::pack(cpu, &team, format, &bytes, n, k, Precision::Fast).unwrap();
            let packing = best(3, || drop(pack()));
            let w = pack();
            let rows = 512;
            let x: Vec<f32> = (0..rows * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut y = vec![0.0; rows * n];
            let mut acts = Acts::new();
            let many = best(if n > 10_000 { 3 } else { 20 }, || {
                acts.load(&x, rows, k);
                matmul(cpu, &team, &mut acts, &w, &mut y);
            });
            let copies: Vec<Matrix> = (0..(128 << 20) / w.bytes() + 1).map(|_| pack()).collect();
            let one = best(5, || {
                acts.load(&x[..k], 1, k);
                for w in &copies {
                    matmul(cpu, &team, &mut acts, w, &mut y[..n]);
                }
            });
            println!(
                "{:>6} {:>12} {:>10.1} {:>10.1} {:>10.2}",
                format.name(),
                format!("{n} x {k}"),
                (rows * n * k) as f64 / many / 1e9,
                (copies.len() * w.bytes()) as f64 / one / 1e9,
                bytes.len() as f64 / packing / 1e9,
            );
        }
    }
}
