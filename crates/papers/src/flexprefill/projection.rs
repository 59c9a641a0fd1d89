//! Where the last rows of a stretch look: by key, and by distance.

use std::ops::Range;

use antefix_attention::method::PlanView;

/// Mean attention weights of some rows, summed over heads.
pub(crate) struct Projection {
    /// By key, `[n]`.
    pub(crate) vertical: Vec<f32>,
    /// By distance from the query, the largest first, `[n]`: the last is a query's own key.
    pub(crate) slash: Vec<f32>,
}

impl Projection {
    /// Of no head; `n` keys.
    pub(crate) fn zero(n: usize) -> Self {
        Self {
            vertical: vec![0.0; n],
            slash: vec![0.0; n],
        }
    }

    /// Adds the rows `rows`, the last of which sees all keys, of query head `head`.
    pub(crate) fn add(&mut self, view: &PlanView<'_>, head: usize, rows: Range<usize>) {
        let (n, share) = (self.vertical.len(), 1.0 / rows.len() as f32);
        for (i, weights) in view.weights(head, rows.clone()).iter().enumerate() {
            // Row `i` of `R` sees the keys before `n - (R - 1 - i)`.
            let behind = rows.len() - 1 - i;
            let seen = &weights[..n - behind];
            for (sum, w) in self.vertical.iter_mut().zip(seen) {
                *sum += share * w;
            }
            for (sum, w) in self.slash[behind..].iter_mut().zip(seen) {
                *sum += share * w;
            }
        }
    }
}
