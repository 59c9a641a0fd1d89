//! {{slug}} as the paper writes it: slow, plain, f32. The referee of the fast version.

/// Attention of `R` query rows over `T` keys; no mask, scores are `q.k` as given.
///
/// `q: [R, D]`, `k: [T, D]`, `v: [T, D]`, row-major; returns `[R, D]`. Without keys the result is 0.
/// Starts as dense attention: change it step by step into the method, and keep the steps' numbers.
///
/// # Panics
/// If a length is no multiple of `dim`, or `k` and `v` differ in length.
pub fn attention(q: &[f32], k: &[f32], v: &[f32], dim: usize) -> Vec<f32> {
    assert!(dim > 0 && q.len().is_multiple_of(dim) && k.len().is_multiple_of(dim) && k.len() == v.len());
    let mut out = vec![0.0; q.len()];
    for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        let scores: Vec<f32> = k
            .chunks_exact(dim)
            .map(|k| q.iter().zip(k).map(|(a, b)| a * b).sum())
            .collect();
        let m = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let l: f32 = scores.iter().map(|s| (s - m).exp()).sum();
        for (s, v) in scores.iter().zip(v.chunks_exact(dim)) {
            for (out, v) in out.iter_mut().zip(v) {
                *out += (s - m).exp() / l * v;
            }
        }
    }
    out
}
