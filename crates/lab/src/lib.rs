//! Measurements: bench runner, perplexity, logits. Every figure that the documentation quotes comes out of here.

pub mod attention;
pub mod bench;
pub mod bench_method;
mod crowd;
pub mod eval;
pub mod heads;
pub mod host;
pub mod likelihood;
pub mod load;
pub mod logits;
mod panel;
pub mod parallel;
pub mod perplexity;
pub mod plans;
pub mod plot;
pub mod replay;
pub mod repro;
pub mod reuse;
pub mod sparse;
pub mod sparse_decode;
pub mod sparsity;
pub mod tasks;
#[cfg(test)]
mod testing;
pub mod together;
pub mod tune;

/// Resident memory of this process now and at its peak, MiB, where the system tells.
pub fn resident_mb() -> [Option<f64>; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ["VmRSS:", "VmHWM:"].map(|key| {
        let line = status.lines().find(|l| l.starts_with(key))?;
        let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib / 1024.0)
    })
}

/// Median of the values; 0 for none.
pub fn median(values: &[f64]) -> f64 {
    let mut v = values.to_vec();
    v.sort_by(f64::total_cmp);
    match v.len() {
        0 => 0.0,
        n if n % 2 == 1 => v[n / 2],
        n => f64::midpoint(v[n / 2 - 1], v[n / 2]),
    }
}
