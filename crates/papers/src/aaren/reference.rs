//! The plain twin: masked softmax with a constant query, in f64, from the definition.

/// Outputs of every prefix, `[N, D]`, of one head: scores `s: [N]` (-inf: no token), values `v: [N, D]`. Token `i` weighs
/// `exp(s_i - decay (k - i))` in the output of prefix `k`. Prefixes without a token give zeros.
pub fn prefixes(s: &[f64], v: &[f64], decay: f64) -> Vec<f64> {
    let dim = v.len() / s.len().max(1);
    let mut out = vec![0.0; v.len()];
    for k in 0..s.len() {
        let logit = |i: usize| s[i] - decay * (k - i) as f64;
        let m = (0..=k).map(logit).fold(f64::NEG_INFINITY, f64::max);
        if m == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = (0..=k).map(|i| (logit(i) - m).exp()).sum();
        for i in 0..=k {
            let p = (logit(i) - m).exp() / sum;
            for d in 0..dim {
                out[k * dim + d] += p * v[i * dim + d];
            }
        }
    }
    out
}
