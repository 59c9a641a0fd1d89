//! Scores of keys that stand here and there: what planners look at who do not look at every key.

use antefix_kernels::attend::{KeyPages, scores_each};
use antefix_state::PAGE_ROWS;

use super::execute::PACKED;
use super::view::PlanView;

impl PlanView<'_> {
    /// The largest score that any of the vectors `q: [R, D]`, already scaled, has with each of `keys` of `kv_head`, which ascend:
    /// `[keys]`. Single keys of a page are copied side by side first, so that the cost follows the number of keys. The cap on scores is
    /// left out, as in [`PlanView::scores`].
    pub fn largest_scores(&self, kv_head: usize, q: &[f32], keys: &[u32]) -> Vec<f32> {
        let (cpu, dim) = (self.rows.run.0, self.rows.geometry.dim);
        let mut largest = vec![f32::NEG_INFINITY; keys.len()];
        // Single keys are copied into pages; `places`: where the score of each goes.
        let mut packed = KeyPages::new(dim, self.rows.pool.shape().dtype);
        let (mut whole, mut places) = (Vec::new(), Vec::new());
        let mut at = 0;
        for run in keys.chunk_by(|a, b| *a as usize / PAGE_ROWS == *b as usize / PAGE_ROWS) {
            let page = self.page(kv_head, run[0] as usize / PAGE_ROWS);
            if run.len() > PACKED as usize {
                whole.push((page, at, run));
            } else {
                for side_by_side in run.chunk_by(|a, b| a + 1 == *b) {
                    let row = side_by_side[0] as usize % PAGE_ROWS;
                    packed.copy(&page, row..row + side_by_side.len());
                }
                places.extend(at..at + run.len());
            }
            at += run.len();
        }
        let pages = whole.iter().map(|w| w.0);
        scores_each(cpu, dim, q, pages, |page, scores| {
            let (most, (_, at, run)) = (most(scores), &whole[page]);
            for (to, key) in largest[*at..].iter_mut().zip(*run) {
                *to = most[*key as usize % PAGE_ROWS];
            }
        });
        scores_each(cpu, dim, q, packed.pages(), |page, scores| {
            let places = places[page * PAGE_ROWS..].iter();
            places
                .zip(most(scores))
                .for_each(|(&place, most)| largest[place] = most);
        });
        largest
    }
}

/// The largest score of each key of a page.
fn most(scores: &[[f32; PAGE_ROWS]]) -> [f32; PAGE_ROWS] {
    let mut most = [f32::NEG_INFINITY; PAGE_ROWS];
    for row in scores {
        most.iter_mut().zip(row).for_each(|(m, s)| *m = m.max(*s));
    }
    most
}
