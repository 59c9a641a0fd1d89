//! ape as the paper writes it: slow, plain, f64. The referee of the fast version.

/// Rows that are attended together: `k, v: [T, D]`.
#[derive(Debug, Clone, Default)]
pub struct Rows {
    /// Keys.
    pub k: Vec<Vec<f64>>,
    /// Values.
    pub v: Vec<Vec<f64>>,
}

/// Output and log-sum-exp of `q: [D]` (scaled) over `rows`, scores divided by `temperature`.
fn part(q: &[f64], rows: &Rows, temperature: f64) -> (Vec<f64>, f64) {
    let scores: Vec<f64> = rows
        .k
        .iter()
        .map(|k| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / temperature)
        .collect();
    let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let l: f64 = scores.iter().map(|s| (s - m).exp()).sum();
    let out = (0..q.len())
        .map(|d| {
            scores
                .iter()
                .zip(&rows.v)
                .map(|(s, v)| (s - m).exp() / l * v[d])
                .sum()
        })
        .collect();
    (out, m + l.ln())
}

/// Section 3.2 of the specification: all rows of all contexts together under temperature `t`, their log-sum-exp times `s * t`, and the
/// other rows as they are, weighed by a softmax of the two. Without contexts the others alone; there must be others.
pub fn attention(q: &[f64], contexts: &Rows, others: &Rows, t: f64, s: f64) -> Vec<f64> {
    let (other, other_lse) = part(q, others, 1.0);
    if contexts.k.is_empty() {
        return other;
    }
    let (context, lse) = part(q, contexts, t);
    let lse = s * t * lse;
    let m = lse.max(other_lse);
    let (a, b) = ((lse - m).exp(), (other_lse - m).exp());
    context
        .iter()
        .zip(&other)
        .map(|(c, o)| (a * c + b * o) / (a + b))
        .collect()
}
