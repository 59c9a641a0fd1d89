//! Speed of attention over pages, one thread: `cargo run --release -p antefix-kernels --example attend_bench`.
//!
//! Many rows: f32 operations a second (4 D per row and key), the ceiling is what `antefix doctor` measures. Few rows: bytes of keys
//! and values a second, over more pages than the last cache holds. CPU time, best of several runs.
#![allow(clippy::print_stdout, clippy::unwrap_used, unsafe_code, missing_docs)]

use antefix_kernels::attend::{
    AttendScratch, KvDtype, Page, PageLayout, StateMut, View, attend, f32_to_bf16, reset,
};
use antefix_kernels::cpu::Cpu;

/// Seconds of CPU time of this thread.
fn now() -> f64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is writable and the clock exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

fn main() {
    let cpu = Cpu::from_env().unwrap();
    println!("path {}", cpu.path());
    println!(
        "{:>5} {:>5} {:>7} {:>10} {:>8}",
        "dim", "rows", "keys", "GFLOP/s", "GB/s"
    );
    for (dim, rows, keys) in [
        (64, 1, 1 << 17),
        (64, 2, 1 << 17),
        (64, 3, 1 << 17),
        (64, 7, 1 << 17),
        (256, 4, 1 << 15),
        (64, 96, 4096),
        (64, 189, 1024),
        (256, 192, 1024),
    ] {
        let layout = PageLayout {
            dim,
            dtype: KvDtype::Bf16,
        };
        let value = |i: usize| f32_to_bf16(((i as f32) * 0.618).sin());
        let pages = keys / 32;
        let k: Vec<u16> = (0..layout.part_len() * pages).map(value).collect();
        let v: Vec<u16> = (0..layout.part_len() * pages).map(|i| value(i + 7)).collect();
        let pages: Vec<View<'_>> = k
            .chunks(layout.part_len())
            .zip(v.chunks(layout.part_len()))
            .map(|(k, v)| Page::Bf16 { k, v }.into())
            .collect();
        let q: Vec<f32> = (0..rows * dim).map(|i| (i as f32 * 0.37).sin() * 0.2).collect();
        let visible = vec![(0, keys as u32); rows];
        let (mut m, mut l, mut acc) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows * dim]);
        let mut scratch = AttendScratch::default();
        let seconds = (0..20)
            .map(|_| {
                let mut state = StateMut {
                    m: &mut m,
                    l: &mut l,
                    acc: &mut acc,
                };
                reset(&mut state);
                let t = now();
                attend(
                    cpu,
                    dim,
                    &q,
                    &visible,
                    None,
                    &pages,
                    0,
                    keys as u32,
                    &mut state,
                    &mut scratch,
                );
                now() - t
            })
            .fold(f64::INFINITY, f64::min);
        let flops = (4 * dim * rows * keys) as f64;
        let bytes = (4 * dim * keys) as f64;
        println!(
            "{dim:>5} {rows:>5} {keys:>7} {:>10.1} {:>8.2}",
            flops / seconds * 1e-9,
            bytes / seconds * 1e-9
        );
    }
}
