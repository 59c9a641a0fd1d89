//! Scores of keys that stand here and there: what planners look at who do not look at every key.

use std::ops::Range;

use antefix_kernels::attend::{KeyPages, scores_each};
use antefix_state::PAGE_ROWS;

use super::view::PlanView;

/// Whether scoring all of `keys` keys where they lie costs less than copying `listed` of them side by side and scoring those, for `rows`
/// queries. To copy a key costs about as much as a page costs 6.4 queries: its dimensions lie as far apart as the page has lines.
pub fn all_cost_less(rows: usize, listed: usize, keys: usize) -> bool {
    const COPY: usize = 205; // 6.4 pages, in keys
    listed * (COPY + rows) > keys * rows
}

impl PlanView<'_> {
    /// The largest score that any of the vectors `q: [R, D]`, already scaled, has with each of `keys` of `kv_head`, which ascend:
    /// `[keys]`. Where it costs less, single keys of a page are copied side by side first. The cap on scores is left out, as in
    /// [`PlanView::scores`].
    pub fn largest_scores(&self, kv_head: usize, q: &[f32], keys: &[u32]) -> Vec<f32> {
        let (cpu, dim) = (self.rows.run.0, self.rows.geometry.dim);
        let mut largest = vec![f32::NEG_INFINITY; keys.len()];
        // Single keys are copied into pages; `places`: where the score of each goes.
        let mut packed = KeyPages::new(dim, self.rows.pool.shape().dtype);
        let (mut whole, mut places) = (Vec::new(), Vec::new());
        let mut at = 0;
        for run in keys.chunk_by(|a, b| *a as usize / PAGE_ROWS == *b as usize / PAGE_ROWS) {
            let page = self.page(kv_head, run[0] as usize / PAGE_ROWS);
            if all_cost_less(q.len() / dim, run.len(), PAGE_ROWS) {
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

    /// [`PlanView::largest_scores`] of all keys in a range, bit for bit.
    pub fn largest_scores_between(&self, kv_head: usize, q: &[f32], keys: Range<usize>) -> Vec<f32> {
        let mut largest = Vec::with_capacity(keys.len());
        let pages = keys.start / PAGE_ROWS..keys.end.div_ceil(PAGE_ROWS);
        self.scores(kv_head, q, pages, |page, scores| {
            let first = page * PAGE_ROWS;
            let within = keys.start.max(first) - first..keys.end.min(first + PAGE_ROWS) - first;
            largest.extend_from_slice(&most(scores)[within]);
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
