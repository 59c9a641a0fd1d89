//! Attention under a plan as the definition writes it, in f64.

use antefix_state::PAGE_ROWS;
use antefix_state::plan::{Cover, Plan, Unit};

use crate::readout::AttentionView;

/// Softmax attention of the rows of `view` over the keys that `plan` keeps for them: `[rows, Hq, D]`.
///
/// # Panics
/// When the plan is not one of these rows.
pub fn reference(plan: &Plan, view: &AttentionView<'_>) -> Vec<f32> {
    let g = view.geometry;
    let group = g.heads / g.kv_heads;
    let queries = view.pos0..view.pos0 + view.rows() as u32;
    let mut out = Vec::with_capacity(view.q.len());
    for (row, pos) in queries.clone().enumerate() {
        for head in 0..g.heads {
            let kv_head = head / group;
            let cover = match plan.unit {
                Unit::QueryHead => &plan.units[head],
                Unit::KvGroup => &plan.units[kv_head],
            };
            let keys: Vec<u32> = match cover {
                Cover::Dense => (0..=pos).collect(),
                Cover::Sparse(rows) => {
                    let all = rows.keys((pos / rows.block - rows.first_block) as usize);
                    all.into_iter().filter(|&k| k <= pos).collect()
                }
            };
            let pages = view.kv.pages(view.layer, kv_head);
            let page = |t: u32| view.pool.page(pages[t as usize / PAGE_ROWS]);
            let q = &view.q[(row * g.heads + head) * g.dim..][..g.dim];
            let score = |&t: &u32| {
                let key = |d: usize| f64::from(page(t).key(g.dim, t as usize % PAGE_ROWS, d));
                let dot: f64 = q.iter().enumerate().map(|(d, &x)| f64::from(x) * key(d)).sum();
                let s = dot * f64::from(g.scale);
                g.softcap
                    .map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
            };
            let scores: Vec<f64> = keys.iter().map(score).collect();
            let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - m).exp()).collect();
            let l: f64 = weights.iter().sum();
            out.extend((0..g.dim).map(|d| {
                let value = |t: u32| f64::from(page(t).value(g.dim, t as usize % PAGE_ROWS, d));
                let sum: f64 = keys.iter().zip(&weights).map(|(&t, w)| w * value(t)).sum();
                (sum / l) as f32
            }));
        }
    }
    out
}
