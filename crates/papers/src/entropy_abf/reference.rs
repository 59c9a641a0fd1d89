//! Attention with changed angles and scaled scores as the formulas say it: one head, causal, f64.

/// What one query row gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// `- sum a ln a` over its weights.
    pub entropy: f64,
    /// `[d]`.
    pub out: Vec<f64>,
}

/// Attention of all rows of `q, k, v: [n, d]`; pair `i` is dimensions `i` and `i + d / 2`, turned by `p * freqs[i]`.
///
/// The scores of the query at `p` are `scale(p) / sqrt(d) * q . k`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn attention(q: &[f64], k: &[f64], v: &[f64], freqs: &[f64], scale: impl Fn(usize) -> f64) -> Vec<Row> {
    let d = 2 * freqs.len();
    assert!(
        q.len() == k.len() && k.len() == v.len() && q.len().is_multiple_of(d),
        "q, k and v are [n, d]"
    );
    // Angles.
    let turn = |x: &[f64], p: usize| -> Vec<f64> {
        let mut out = vec![0.0; d];
        for (i, f) in freqs.iter().enumerate() {
            let (sin, cos) = (p as f64 * f).sin_cos();
            out[i] = x[i] * cos - x[i + d / 2] * sin;
            out[i + d / 2] = x[i + d / 2] * cos + x[i] * sin;
        }
        out
    };
    let keys: Vec<Vec<f64>> = k.chunks_exact(d).enumerate().map(|(p, k)| turn(k, p)).collect();
    let row = |(p, q): (usize, &[f64])| {
        // Scores of the visible keys.
        let q = turn(q, p);
        let factor = scale(p) / (d as f64).sqrt();
        let scores: Vec<f64> = keys[..=p]
            .iter()
            .map(|k| factor * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>())
            .collect();
        // Softmax.
        let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let l: f64 = scores.iter().map(|s| (s - m).exp()).sum();
        let weights: Vec<f64> = scores.iter().map(|s| (s - m).exp() / l).collect();
        let mut out = vec![0.0; d];
        for (a, v) in weights.iter().zip(v.chunks_exact(d)) {
            out.iter_mut().zip(v).for_each(|(o, v)| *o += a * v);
        }
        let entropy = -weights
            .iter()
            .filter(|a| **a > 0.0)
            .map(|a| a * a.ln())
            .sum::<f64>();
        Row { entropy, out }
    };
    q.chunks_exact(d).enumerate().map(row).collect()
}
