//! Where chunks begin.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use antefix_attention::method::PlanView;
use antefix_attention::sparse::Windows;

use super::predictor::{Predictor, cosine};

/// Keys of a window: chunks do not cross its borders, and those of one are decided from its own keys alone.
pub(super) const WINDOW: usize = 512;

/// What says where a chunk ends.
#[derive(Debug)]
pub(super) enum Rule {
    /// Every so many keys.
    Fixed,
    /// Where the means of so many keys before and behind differ most in direction.
    Cosine(usize),
    /// Where the predictor's logit is above the number.
    Predictor(Arc<Predictor>, f32),
}

/// How windows are cut.
#[derive(Debug)]
pub(super) struct Cuts {
    pub(super) rule: Rule,
    /// The layer whose keys decide, for all layers.
    pub(super) layer: usize,
    /// Keys of a fixed chunk, and the least mean of others.
    pub(super) length: usize,
    /// Ends of two chunks lie further apart than this.
    pub(super) nms: usize,
}

impl Cuts {
    /// The windows that this cuts, apart from those that others cut.
    pub(super) fn windows(&self) -> Windows {
        let mut rule = DefaultHasher::new();
        match &self.rule {
            Rule::Fixed => (0, 0, 0),
            Rule::Cosine(window) => (1, *window, 0),
            Rule::Predictor(predictor, least) => (2, Arc::as_ptr(predictor) as usize, least.to_bits()),
        }
        .hash(&mut rule);
        (self.layer, self.length, self.nms).hash(&mut rule);
        Windows {
            keys: WINDOW,
            rule: rule.finish(),
        }
    }

    /// First keys of the chunks of window `window`, which is full.
    pub(super) fn of(&self, view: &PlanView<'_>, window: usize) -> Vec<u32> {
        let start = (window * WINDOW) as u32;
        let ends = match &self.rule {
            Rule::Fixed => return (start..start + WINDOW as u32).step_by(self.length).collect(),
            Rule::Cosine(w) => {
                let keys = self.keys(view, window, true);
                let scores = turns(&keys, keys.len() / WINDOW, *w);
                self.choose(&scores, *w, f32::NEG_INFINITY)
            }
            Rule::Predictor(predictor, least) => {
                let w = predictor.window();
                let logits = predictor.logits(&self.keys(view, window, false), w..WINDOW - w);
                self.choose(&logits, w, *least)
            }
        };
        let behind = ends.iter().map(|&end| start + end as u32 + 1);
        std::iter::once(start).chain(behind).collect()
    }

    /// Keys of a window in the layer that decides, all KV heads side by side: `[WINDOW, C]`; `turned_back`: as before RoPE.
    fn keys(&self, view: &PlanView<'_>, window: usize, turned_back: bool) -> Vec<f32> {
        let g = view.rows.geometry;
        let mut keys = vec![0.0; WINDOW * g.kv_heads * g.dim];
        for (row, key) in keys.chunks_exact_mut(g.kv_heads * g.dim).enumerate() {
            let pos = window * WINDOW + row;
            for (head, key) in key.chunks_exact_mut(g.dim).enumerate() {
                view.key(self.layer, head, pos, key);
            }
            if turned_back {
                view.rope.turn(key, g.dim, -(pos as i32));
            }
        }
        keys
    }

    /// Chunks end with the tokens of the largest scores above `least`, ascending; `scores` are those of the tokens from `first` on.
    fn choose(&self, scores: &[f32], first: usize, least: f32) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).filter(|&i| scores[i] > least).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let mut taken: Vec<usize> = Vec::new();
        for i in order {
            if taken.len() + 1 >= WINDOW / self.length {
                break;
            }
            if taken.iter().all(|t| t.abs_diff(i) > self.nms) {
                taken.push(i);
            }
        }
        taken.sort_unstable();
        taken.iter().map(|i| i + first).collect()
    }
}

/// `1 - cos` of the means of the `w` rows of `x: [n, C]` up to token `j` and of those behind it, for `j` from `w` to `n - w - 1`.
fn turns(x: &[f32], channels: usize, w: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = x.chunks_exact(channels).collect();
    let mean = |from: usize| {
        let mut sum = vec![0.0; channels];
        for row in &rows[from..from + w] {
            sum.iter_mut().zip(*row).for_each(|(s, x)| *s += x);
        }
        sum
    };
    let means: Vec<Vec<f32>> = (0..=rows.len() - w).map(mean).collect();
    (w..rows.len() - w)
        .map(|j| 1.0 - cosine(&means[j + 1 - w], &means[j + 1]))
        .collect()
}
