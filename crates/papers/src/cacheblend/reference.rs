//! cacheblend's steps as the paper writes them: slow, plain, f64. The referee of the fast version.

/// Step 1, placement (section 3.2 of the specification): a key stored as rotated for its old position, moved by `delta` positions.
/// `key: [D]`, dimension `i` turns with `i + D / 2` by `frequencies[i]` a position.
///
/// # Panics
/// When there are not half as many frequencies as dimensions.
pub fn place(key: &[f64], delta: i64, frequencies: &[f64]) -> Vec<f64> {
    let half = frequencies.len();
    assert_eq!(key.len(), 2 * half, "a frequency for each pair of dimensions");
    let mut out = key.to_vec();
    for (i, f) in frequencies.iter().enumerate() {
        let (sin, cos) = (delta as f64 * f).sin_cos();
        (out[i], out[i + half]) = (
            key[i] * cos - key[i + half] * sin,
            key[i + half] * cos + key[i] * sin,
        );
    }
    out
}

/// Step 2, deviation: squared distance between a fresh and a stored row, summed over KV heads and dimensions.
pub fn deviation(fresh: &[f64], stored: &[f64]) -> f64 {
    fresh.iter().zip(stored).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// Step 3, selection: the `k` rows of the largest deviation, ascending; of equal ones the earlier.
pub fn select(deviations: &[f64], k: usize) -> Vec<usize> {
    let mut chosen: Vec<usize> = Vec::new();
    for _ in 0..k.min(deviations.len()) {
        let mut best: Option<usize> = None;
        for (row, d) in deviations.iter().enumerate() {
            if !chosen.contains(&row) && best.is_none_or(|b| *d > deviations[b]) {
                best = Some(row);
            }
        }
        chosen.extend(best);
    }
    chosen.sort_unstable();
    chosen
}

/// Attention of one query at position `at` over rows at `positions`: it sees those up to its own, and no others. The official code masks
/// the gathered queries by their order instead, which lets them see the future.
/// `q: [D]` scaled, `k, v: [T, D]`.
pub fn attend(q: &[f64], at: u32, positions: &[u32], k: &[Vec<f64>], v: &[Vec<f64>]) -> Vec<f64> {
    let seen: Vec<usize> = (0..positions.len()).filter(|&t| positions[t] <= at).collect();
    let score = |t: usize| q.iter().zip(&k[t]).map(|(a, b)| a * b).sum::<f64>();
    let m = seen.iter().map(|&t| score(t)).fold(f64::NEG_INFINITY, f64::max);
    let l: f64 = seen.iter().map(|&t| (score(t) - m).exp()).sum();
    (0..q.len())
        .map(|d| seen.iter().map(|&t| (score(t) - m).exp() / l * v[t][d]).sum())
        .collect()
}
