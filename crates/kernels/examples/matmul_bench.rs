//! Speed of the matrix products: `cargo run --release -p antefix-kernels --example matmul_bench [threads] [format] [n] [k] [rows]`.
//!
//! Weights are random bytes, floats between 1 and 2. Many rows, quantised and in bf16: 10^9 multiply-adds a second. One row: packed bytes a second, cycling through copies that
//! together exceed the last cache. Best of several runs, because other work may share the machine; with one thread, time is that
//! thread's CPU time for the same reason.
#![allow(clippy::print_stdout, clippy::unwrap_used, unsafe_code, missing_docs)]

use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::{Acts, Matrix, Precision, matmul};
use antefix_kernels::quant::Format;
use antefix_kernels::team::Team;

/// Seconds: CPU time of this thread, or of the clock on the wall.
fn now(threads: usize) -> f64 {
    let clock = if threads == 1 {
        libc::CLOCK_THREAD_CPUTIME_ID
    } else {
        libc::CLOCK_MONOTONIC
    };
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is writable and both clocks exist on Linux.
    unsafe { libc::clock_gettime(clock, &raw mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

fn best(threads: usize, runs: usize, mut f: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let t = now(threads);
            f();
            now(threads) - t
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    let mut args = std::env::args().skip(1);
    let threads = args.next().map_or(2, |a| a.parse().unwrap());
    let only = args.next();
    let mut number = |default: usize| args.next().map_or(default, |a| a.parse().unwrap());
    let (one_n, one_k, rows) = (number(0), number(0), number(512));
    let team = Team::new(threads);
    let cpu = Cpu::from_env().unwrap();
    println!("path {}, {threads} threads", cpu.path());
    println!(
        "{:>6} {:>12} {:>10} {:>10} {:>10} {:>10}",
        "format", "n x k", "int8", "bf16", "GB/s", "pack GB/s"
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
        let shapes = [(576, 1536), (1536, 576), (896, 4864), (49152, 576)];
        let shapes = if one_n > 0 {
            vec![(one_n, one_k)]
        } else {
            shapes.to_vec()
        };
        for (n, k) in shapes {
            if k % format.block_len() != 0 {
                continue;
            }
            let mut bytes: Vec<u8> = (0..n * format.row_bytes(k).unwrap())
                .map(|i| ((i * 2_654_435_761) >> 7) as u8 & 0x3f)
                .collect();
            if format == Format::BF16 {
                bytes.chunks_exact_mut(2).for_each(|v| {
                    v[0] |= 0x80;
                    v[1] = 0x3f;
                });
            }
            let pack = || Matrix::pack(cpu, &team, format, &bytes, n, k, Precision::Fast).unwrap();
            let packing = best(threads, 3, || drop(pack()));
            let w = pack();
            let x: Vec<f32> = (0..rows * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut y = vec![0.0; rows * n];
            let mut acts = Acts::new();
            let [int8, bf16] = [
                if std::env::var("ONLY").is_ok() {
                    Some(0)
                } else {
                    None
                },
                Some(0),
            ]
            .map(|int8_rows| {
                acts.set_int8_rows(int8_rows);
                best(
                    threads,
                    if n > 10_000 {
                        3
                    } else {
                        std::env::var("RUNS").map_or(20, |v| v.parse().unwrap())
                    },
                    || {
                        acts.load(&x, rows, k);
                        matmul(cpu, &team, &mut acts, &w, &mut y);
                    },
                )
            });
            acts.set_int8_rows(None);
            let copies: Vec<Matrix> = (0..=(128 << 20) / w.bytes()).map(|_| pack()).collect();
            let one = best(threads, 5, || {
                acts.load(&x[..k], 1, k);
                for w in &copies {
                    matmul(cpu, &team, &mut acts, w, &mut y[..n]);
                }
            });
            println!(
                "{:>6} {:>12} {:>10.1} {:>10.1} {:>10.1} {:>10.2}",
                format.name(),
                format!("{n} x {k}"),
                (rows * n * k) as f64 / int8 / 1e9,
                (rows * n * k) as f64 / bf16 / 1e9,
                (copies.len() * w.bytes()) as f64 / one / 1e9,
                bytes.len() as f64 / packing / 1e9,
            );
        }
    }
}
