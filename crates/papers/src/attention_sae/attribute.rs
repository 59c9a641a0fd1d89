//! Whose a feature is: head shares of its decoder row (section 3.6), and what each head and each source token gives to its
//! pre-activation (direct feature attribution, section 3.7).

use antefix_attention::readout::AttentionView;
use antefix_state::PAGE_ROWS;
use serde::Serialize;

use super::sae::{Norm, Sae};

/// Shares of the heads in the decoder row of a feature, `[heads]`, summing to 1; all 0 for a row of zeros.
///
/// # Panics
/// When there is no such feature, or rows are not made of `heads` heads.
pub fn shares(sae: &Sae, feature: usize, heads: usize) -> Vec<f32> {
    assert!(sae.d_in().is_multiple_of(heads), "rows are made of heads");
    let norm = |part: &[f32]| part.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let row = sae.direction(feature);
    let norms: Vec<f64> = row.chunks_exact(sae.d_in() / heads).map(norm).collect();
    let sum: f64 = norms.iter().sum();
    let share = |n: &f64| if sum > 0.0 { (n / sum) as f32 } else { 0.0 };
    norms.iter().map(share).collect()
}

/// What makes up the pre-activation of one feature at one token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Attribution {
    /// The feature.
    pub feature: usize,
    /// Position of the token.
    pub pos: u32,
    /// `f_pre`, computed from `z`.
    pub pre: f32,
    /// What does not depend on the text: `b_enc - b_dec . W_enc`.
    pub constant: f32,
    /// What each head gives, out of `z`, `[heads]`.
    pub heads: Vec<f32>,
    /// What each source token gives through each head, out of weights and values, `[heads][S]`.
    pub sources: Vec<Vec<f32>>,
    /// `f_pre` less the constant less the sum over heads: rounding.
    pub rest_heads: f32,
    /// The same less the sum over sources: rounding of the cache on top.
    pub rest_sources: f32,
}

impl Attribution {
    /// What each source token gives through all heads, `[S]`.
    pub fn by_source(&self) -> Vec<f32> {
        let mut sums = vec![0.0; self.sources.first().map_or(0, Vec::len)];
        for head in &self.sources {
            sums.iter_mut().zip(head).for_each(|(sum, x)| *sum += x);
        }
        sums
    }
}

/// Attributes features at row `row` of `view`, whose head outputs are `z: [d_in]`. Rows that are normalised are attributed with their
/// scale frozen. Sources are read off the pages: a head's row of weights at a time.
///
/// # Panics
/// When a feature or the row does not exist, or `z` has another size than the heads.
pub fn attribute(
    sae: &Sae,
    features: &[usize],
    view: &AttentionView<'_>,
    row: usize,
    z: &[f32],
) -> Vec<Attribution> {
    let g = view.geometry;
    assert_eq!(z.len(), g.heads * g.dim, "head outputs of one row");
    assert_eq!(z.len(), sae.d_in(), "the dictionary is of this site");
    let p = sae.parts();
    let mut input = vec![0.0; z.len()];
    let frame = sae.input(z, &mut input);
    let columns: Vec<Vec<f32>> = features
        .iter()
        .map(|&j| (0..p.d_in).map(|i| p.w_enc[i * p.features + j]).collect())
        .collect();
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    let mut out: Vec<Attribution> = features
        .iter()
        .zip(&columns)
        .map(|(&feature, w)| {
            let b_dec = if p.apply_b_dec { dot(&p.b_dec, w) } else { 0.0 };
            let shift = f64::from(frame.shift / frame.scale) * w.iter().map(|x| f64::from(*x)).sum::<f64>();
            Attribution {
                feature,
                pos: view.pos0 + row as u32,
                pre: (dot(&input, w) + f64::from(p.b_enc[feature])) as f32,
                constant: (f64::from(p.b_enc[feature]) - b_dec - shift) as f32,
                heads: z
                    .chunks_exact(g.dim)
                    .zip(w.chunks_exact(g.dim))
                    .map(|(z, w)| (dot(z, w) / f64::from(frame.scale)) as f32)
                    .collect(),
                sources: Vec::new(),
                rest_heads: 0.0,
                rest_sources: 0.0,
            }
        })
        .collect();
    let keys = (view.pos0 - view.base) as usize + row + 1;
    let mut value = vec![0.0; g.dim];
    for head in 0..g.heads {
        let pages = view.kv.pages(view.layer, head / (g.heads / g.kv_heads));
        view.each_row(head, &[row], &mut |_, weights| {
            let mut each = vec![vec![0.0; keys]; features.len()];
            for (pos, &a) in (weights.first - view.base..).zip(weights.p) {
                let s = pos as usize;
                let page = view.pool.page(pages[s / PAGE_ROWS]);
                for (d, v) in value.iter_mut().enumerate() {
                    *v = page.value(g.dim, s % PAGE_ROWS, d);
                }
                for (to, w) in each.iter_mut().zip(&columns) {
                    let w = &w[head * g.dim..][..g.dim];
                    to[s] = (f64::from(a) * dot(&value, w) / f64::from(frame.scale)) as f32;
                }
            }
            out.iter_mut()
                .zip(each)
                .for_each(|(a, each)| a.sources.push(each));
        });
    }
    for a in &mut out {
        let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>();
        let varying = f64::from(a.pre) - f64::from(a.constant);
        a.rest_heads = (varying - sum(&a.heads)) as f32;
        a.rest_sources = (varying - a.sources.iter().map(|s| sum(s)).sum::<f64>()) as f32;
    }
    out
}

/// Whether sums over heads are the pre-activation as the dictionary computes it: rows are not normalised, so that nothing is frozen.
pub fn is_linear(sae: &Sae) -> bool {
    sae.parts().norm == Norm::None
}
