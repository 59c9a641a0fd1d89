//! The calibration as the paper writes it: on the whole matrix of weights, in f64.

/// Mean of each column of a causal `a: [N][N]` over the rows that see the key (section 3.1).
pub fn column_means(a: &[Vec<f64>]) -> Vec<f64> {
    let n = a.len();
    (0..n)
        .map(|j| (j..n).map(|t| a[t][j]).sum::<f64>() / (n - j) as f64)
        .collect()
}

/// Sinks by `m[j] > alpha / N` without the first token, or, as the official program has it, by a fixed threshold without the first
/// one found.
pub fn sinks(a: &[Vec<f64>], threshold: f64, spare_first_found: bool) -> Vec<usize> {
    let m = column_means(a);
    let found: Vec<usize> = (0..m.len()).filter(|&j| m[j] > threshold).collect();
    match spare_first_found {
        true => found.into_iter().skip(1).collect(),
        false => found.into_iter().filter(|&j| j != 0).collect(),
    }
}

/// Section 3.2: each row keeps `beta` of its weight on sinks and spreads the rest over its other keys.
pub fn redistribute(a: &[Vec<f64>], sinks: &[usize], beta: f64) -> Vec<Vec<f64>> {
    let mut out = a.to_vec();
    for row in &mut out {
        let s: f64 = sinks.iter().map(|&j| row[j]).sum();
        if 1.0 - s <= 1e-6 {
            continue;
        }
        let freed = (1.0 - beta) * s;
        for (j, w) in row.iter_mut().enumerate() {
            if sinks.contains(&j) {
                *w *= beta;
            } else {
                *w += freed * *w / (1.0 - s);
            }
        }
    }
    out
}

/// `A V` with `v: [N][D]`.
pub fn output(a: &[Vec<f64>], v: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let dim = v.first().map_or(0, Vec::len);
    let row = |w: &Vec<f64>| {
        let of = |d: usize| w.iter().zip(v).map(|(w, v)| w * v[d]).sum();
        (0..dim).map(of).collect()
    };
    a.iter().map(row).collect()
}
