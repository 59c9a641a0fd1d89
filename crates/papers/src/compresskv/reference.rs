//! Selection and budgets as the specification writes them, in f64.

use crate::kv_baselines::reference::{best, mean, votes};

/// Step 2: what a layer keeps, given the weights `[W][n]` of the heads that vote.
pub fn keep(voters: &[Vec<Vec<f64>>], cap: usize, kernel: usize) -> Vec<usize> {
    let (w, n) = (voters[0].len(), voters[0][0].len());
    let scores: Vec<Vec<f64>> = voters
        .iter()
        .map(|weights| votes(weights, kernel, false))
        .collect();
    let mut keep = best(&mean(&scores), cap - w);
    keep.extend(n - w..n);
    keep
}

/// Step 3: rows of each layer for a mean of `budget`, at least `least` and at most `most`. `e` sums to 1.
pub fn budgets(e: &[f64], budget: i64, least: i64, most: i64) -> Vec<i64> {
    let layers = e.len() as i64;
    let total = budget * layers;
    let mut b: Vec<i64> = e
        .iter()
        .map(|e| (least + (e * (total - least * layers) as f64).round() as i64).clamp(least, most))
        .collect();
    let mut order: Vec<usize> = (0..e.len()).collect();
    order.sort_by(|&x, &y| e[y].total_cmp(&e[x]));
    loop {
        let diff = total - b.iter().sum::<i64>();
        if diff == 0 {
            return b;
        }
        let up = diff > 0;
        let mut at: Vec<usize> = order.clone();
        if !up {
            at.reverse();
        }
        at.retain(|&l| if up { b[l] < most } else { b[l] > least });
        for l in at.into_iter().take(diff.unsigned_abs() as usize) {
            b[l] += if up { 1 } else { -1 };
        }
    }
}

/// Eviction error of one row (3.3): how far the layer's output with the cut cache is from the whole one's.
pub fn error(cut: &[f64], whole: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut cut.iter().zip(whole).map(|(a, b)| a - b));
    off / (norm(&mut whole.iter().copied()) + 1e-5)
}
