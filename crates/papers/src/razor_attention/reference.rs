//! Detection, compression and compensated attention as the paper writes them, in f64.

use std::ops::Range;

/// Echo and induction score of a head (3.1): `a: [n][n]` are its weights on `[BOS]` and `repeats` times the same `segment` tokens.
pub fn scores(a: &[Vec<f64>], segment: usize, repeats: usize) -> (f64, f64) {
    let (mut echo, mut induction, mut rows) = (0.0, 0.0, 0.0);
    // Without the row and the column of the first token.
    let a = |i: usize, j: usize| a[i + 1][j + 1];
    for i in segment..segment * repeats {
        for m in 1..=i / segment {
            echo += a(i, i - m * segment);
            induction += a(i, i - m * segment + 1);
        }
        rows += 1.0;
    }
    (echo / rows, induction / rows)
}

/// Rows that a head which does not retrieve drops of `n` (3.2).
pub fn dropped(n: usize, sinks: usize, buffer: usize, fraction: f64) -> Range<usize> {
    let recent = buffer.max((n as f64 * fraction) as usize);
    match n <= sinks + recent + 1 {
        true => n..n,
        false => sinks..n - recent,
    }
}

/// Attention of a query with a compensation row for `drop` (3.2): `None` is attention over all rows.
pub fn attention(q: &[f64], k: &[Vec<f64>], v: &[Vec<f64>], scale: f64, drop: Range<usize>) -> Vec<f64> {
    let dot = |k: &[f64]| scale * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
    let count = drop.len() as f64;
    let mean = |x: &[Vec<f64>]| -> Vec<f64> {
        (0..q.len())
            .map(|d| x[drop.clone()].iter().map(|row| row[d]).sum::<f64>() / count)
            .collect()
    };
    let mut terms: Vec<(f64, Vec<f64>)> = (0..k.len())
        .filter(|j| !drop.contains(j))
        .map(|j| (dot(&k[j]).exp(), v[j].clone()))
        .collect();
    if !drop.is_empty() {
        terms.push((count * dot(&mean(k)).exp(), mean(v)));
    }
    let l: f64 = terms.iter().map(|t| t.0).sum();
    (0..q.len())
        .map(|d| terms.iter().map(|(w, v)| w * v[d]).sum::<f64>() / l)
        .collect()
}

/// Windows of the heads of a model with linear biases instead of rotation (3.3): a head of slope `m` sees `(alpha + ln theta) / m` rows back,
/// behind which its weights fall below `theta`; `alpha` stands for the bound on its scores. Slopes are `2^(-8 (h + 1) / heads)`, and for a
/// number of heads that is no power of two those of the next smaller one followed by every second of the doubled series.
///
/// None of the models that we run has such biases; it is the paper's other half.
pub fn linear_bias_windows(heads: usize, theta: f64, alpha: f64) -> Vec<usize> {
    let series = |n: usize| (1..=n).map(move |h| (-8.0 * h as f64 / n as f64).exp2());
    let whole = if heads == 0 { 0 } else { 1 << heads.ilog2() };
    let slopes = series(whole).chain(series(2 * whole).step_by(2));
    slopes
        .take(heads)
        .map(|m| ((alpha + theta.ln()) / m) as usize)
        .collect()
}
