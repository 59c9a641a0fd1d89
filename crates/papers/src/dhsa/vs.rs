//! The rule of the paper's second version: blocks of keys, judged by the columns and the distances that the last rows look at.

use std::num::NonZeroUsize;
use std::ops::Range;

use antefix_attention::method::{Builder, Cover, Plan, PlanView, Planner};
use antefix_state::PAGE_ROWS;

use super::Heads;
use crate::sparse_baselines::Projection;
use crate::sparse_baselines::knobs::Budget;
use crate::sparse_baselines::select::best;

/// Keys of a block of keys.
const KEYS: usize = PAGE_ROWS;

#[derive(Debug)]
pub(super) struct Lines {
    pub(super) block: usize,
    /// Blocks of queries that are planned together.
    pub(super) chunk: usize,
    pub(super) budget: Budget,
    pub(super) heads: Heads,
    pub(super) dense_tail: bool,
}

impl Planner for Lines {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block * self.chunk).unwrap_or(NonZeroUsize::MIN)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        let end = view.queries().end as usize;
        let Some(budget) = self.budget.keys(end) else {
            return view.dense();
        };
        let unit = self.heads.unit();
        let lines = |heads| Found::of(view, heads, self.block, (budget / KEYS).max(1));
        match self.heads {
            Heads::Layer => {
                let found = lines(0..view.rows.geometry.heads);
                view.plan(unit, |_| self.cover(view, &found))
            }
            _ => view.plan(unit, |i| self.cover(view, &lines(view.heads(unit, i)))),
        }
    }
}

impl Lines {
    fn cover(&self, view: &PlanView<'_>, found: &Found) -> Cover {
        let mut builder = Builder::new(self.block as u32, view.queries());
        while let Some(at) = builder.block() {
            if self.dense_tail && !(at.end as usize).is_multiple_of(self.block) {
                builder.push([(0, at.start)]);
                continue;
            }
            // The first block of keys and the block's own are read, and count.
            let own = at.start as usize / KEYS;
            let forced = (at.end as usize).div_ceil(KEYS) - own + 1;
            let scores = found.scores(at.start as usize / self.block * self.block, self.block, own);
            let mut blocks = match own {
                0 => Vec::new(),
                _ => best(&scores[1..], found.count.saturating_sub(forced)),
            };
            blocks.iter_mut().for_each(|b| *b += 1);
            blocks.extend([0, own as u32]);
            blocks.sort_unstable();
            builder.push_blocks(KEYS as u32, &blocks);
        }
        builder.finish()
    }
}

/// The lines of heads that read the same keys.
struct Found {
    /// Sums of the weights of the chosen columns in each block of keys.
    columns: Vec<f32>,
    /// Chosen distances and the sums of their weights.
    distances: Vec<(usize, f32)>,
    /// Blocks of keys that a block of queries reads.
    count: usize,
}

impl Found {
    /// From the last `rows` rows of the stretch.
    fn of(view: &PlanView<'_>, heads: Range<usize>, rows: usize, count: usize) -> Self {
        let n = view.queries().end as usize;
        let stretch = view.rows.rows();
        let mut seen = Projection::zero(n);
        for head in heads {
            seen.add(view, head, stretch - rows.min(stretch)..stretch);
        }
        seen.slash.reverse();
        let vertical = (count * KEYS / 2).min(n);
        let mut columns = vec![0.0; n.div_ceil(KEYS)];
        let mut chosen = best(&seen.vertical, vertical);
        chosen.sort_unstable();
        for column in chosen {
            columns[column as usize / KEYS] += seen.vertical[column as usize];
        }
        let mut distances = best(&seen.slash, count * KEYS - vertical);
        distances.sort_unstable();
        let distances = distances
            .into_iter()
            .map(|d| (d as usize, seen.slash[d as usize]));
        Self {
            columns,
            distances: distances.collect(),
            count,
        }
    }

    /// Scores of the first `blocks` blocks of keys for the `rows` queries from `start` on: a distance adds to every block that it touches.
    fn scores(&self, start: usize, rows: usize, blocks: usize) -> Vec<f32> {
        let mut scores = self.columns[..blocks].to_vec();
        for &(distance, mass) in self.distances.iter().filter(|(d, _)| *d < start + rows) {
            let touched = start.saturating_sub(distance) / KEYS..=(start + rows - 1 - distance) / KEYS;
            for b in touched.take_while(|&b| b < blocks) {
                scores[b] += mass;
            }
        }
        scores
    }
}
