//! The choice as the specification writes it, in f64.

use crate::sparse_baselines::reference::{dot, ranked};

/// `ln p` of a query over keys.
pub fn log_weights(q: &[f64], k: &[Vec<f64>], scale: f64) -> Vec<f64> {
    let scores: Vec<f64> = k.iter().map(|k| scale * dot(q, k)).collect();
    let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = m + scores.iter().map(|s| (s - m).exp()).sum::<f64>().ln();
    scores.iter().map(|s| s - lse).collect()
}

/// The keys, ascending, of the `count` best units of `unit` keys; `heads`: log weights of the heads that choose together.
pub fn choose(heads: &[Vec<f64>], unit: usize, count: usize) -> Vec<usize> {
    let n = heads[0].len();
    let key = |j: usize| heads.iter().map(|h| h[j]).fold(f64::NEG_INFINITY, f64::max);
    let scores: Vec<f64> = (0..n)
        .step_by(unit)
        .map(|from| {
            (from..(from + unit).min(n))
                .map(key)
                .fold(f64::NEG_INFINITY, f64::max)
        })
        .collect();
    let mut keys: Vec<usize> = ranked(&scores)
        .into_iter()
        .take(count)
        .flat_map(|u| u * unit..((u + 1) * unit).min(n))
        .collect();
    keys.sort_unstable();
    keys
}
