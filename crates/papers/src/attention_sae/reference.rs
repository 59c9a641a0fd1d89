//! The equations of sections 3.1, 3.6, 3.7 and 3.8 in f64, one number after the other.

use super::sae::{Architecture, Norm, Parts};

/// Mean 0 and deviation 1, or a fixed norm: the row, and how it is undone.
fn normalised(p: &Parts, x: &[f64]) -> (Vec<f64>, f64, f64) {
    let n = x.len() as f64;
    let (scale, shift) = match p.norm {
        Norm::None => (1.0, 0.0),
        Norm::ConstantRescale => (x.iter().map(|x| x * x).sum::<f64>().sqrt() / n.sqrt(), 0.0),
        Norm::LayerNorm => {
            let mean = x.iter().sum::<f64>() / n;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
            (variance.sqrt() + 1e-5, mean)
        }
    };
    (x.iter().map(|x| (x - shift) / scale).collect(), scale, shift)
}

/// `f: [F]` and `x^: [d_in]` of one row.
pub fn run(p: &Parts, x: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    let (mut input, scale, shift) = normalised(p, &x);
    if p.apply_b_dec {
        input
            .iter_mut()
            .zip(&p.b_dec)
            .for_each(|(x, b)| *x -= f64::from(*b));
    }
    let h = |j: usize| -> f64 {
        (0..p.d_in)
            .map(|i| input[i] * f64::from(p.w_enc[i * p.features + j]))
            .sum()
    };
    let norm = |j: usize| -> f64 {
        let row = &p.w_dec[j * p.d_in..][..p.d_in];
        row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
    };
    let pre: Vec<f64> = (0..p.features).map(|j| h(j) + f64::from(p.b_enc[j])).collect();
    let mut worth = vec![1.0; p.features];
    let f: Vec<f64> = match &p.architecture {
        Architecture::Standard => pre.iter().map(|x| x.max(0.0)).collect(),
        Architecture::JumpRelu { threshold } => {
            let each = pre.iter().zip(threshold);
            each.map(|(x, t)| if *x > f64::from(*t) { x.max(0.0) } else { 0.0 })
                .collect()
        }
        Architecture::Gated { r_mag, b_mag } => (0..p.features)
            .map(|j| {
                let size = h(j) * f64::from(r_mag[j]).exp() + f64::from(b_mag[j]);
                if pre[j] > 0.0 { size.max(0.0) } else { 0.0 }
            })
            .collect(),
        Architecture::TopK { k, rescale } => {
            if *rescale {
                worth = (0..p.features).map(|j| 1.0 / norm(j)).collect();
            }
            let scaled: Vec<f64> = pre.iter().zip(&worth).map(|(x, w)| x / w).collect();
            let mut order: Vec<usize> = (0..p.features).collect();
            order.sort_by(|&a, &b| scaled[b].total_cmp(&scaled[a]));
            let mut f = vec![0.0; p.features];
            for &j in &order[..*k] {
                f[j] = scaled[j].max(0.0);
            }
            f
        }
    };
    let out = (0..p.d_in)
        .map(|i| {
            let sum: f64 = (0..p.features)
                .map(|j| f[j] * worth[j] * f64::from(p.w_dec[j * p.d_in + i]))
                .sum();
            (sum + f64::from(p.b_dec[i])) * scale + shift
        })
        .collect();
    (f, out)
}

/// Share of each head in the decoder row of feature `j` (section 3.6), `[heads]`.
pub fn shares(p: &Parts, j: usize, heads: usize) -> Vec<f64> {
    let dim = p.d_in / heads;
    let norm = |h: usize| -> f64 {
        let part = &p.w_dec[j * p.d_in + h * dim..][..dim];
        part.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
    };
    let sum: f64 = (0..heads).map(norm).sum();
    (0..heads).map(|h| norm(h) / sum).collect()
}

/// Contributions to `f_pre` of feature `j` by head and source (section 3.7), `[heads][S]`, out of weights `a: [heads][S]` and values
/// `v: [S][kv_heads][D]`.
pub fn attribution(p: &Parts, j: usize, a: &[Vec<f64>], v: &[Vec<Vec<f64>>]) -> Vec<Vec<f64>> {
    let heads = a.len();
    let dim = p.d_in / heads;
    let group = |kv_heads: usize| heads / kv_heads;
    (0..heads)
        .map(|h| {
            let each = v.iter().enumerate();
            each.map(|(s, at)| {
                let value = &at[h / group(at.len())];
                let dot: f64 = (0..dim)
                    .map(|d| value[d] * f64::from(p.w_enc[(h * dim + d) * p.features + j]))
                    .sum();
                a[h][s] * dot
            })
            .collect()
        })
        .collect()
}
