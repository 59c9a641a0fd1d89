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
        view.weights(head, rows, |_, weights| {
            for (sum, w) in self.vertical.iter_mut().zip(weights) {
                *sum += share * w;
            }
            // The last row's own key is the last entry, and so is every other row's.
            for (sum, w) in self.slash[n - weights.len()..].iter_mut().zip(weights) {
                *sum += share * w;
            }
        });
    }
}
