//! h2o: each head keeps the rows that have drawn most attention so far, and the most recent ones.
//!
//! # What it does
//! A few rows, the heavy hitters, draw most of the attention of all later queries. Once the prompt is computed, the weights that its last
//! `queries` queries give to every row are added up, and each KV head keeps its heaviest rows and the most recent
//! ones, `budget` in all.
//!
//! # When it helps
//! Where what mattered so far goes on to matter. It is the oldest policy that looks at weights, and a baseline in most papers since;
//! unlike `snapkv` it does not smooth, and it can look at more than the question.
//!
//! # Steps
//! 1. (Section 4 of the paper) The weights of each query over all rows, softmax per query head, are added up per row.
//! 2. The sums of the query heads of a KV head are added; `score=mean` divides each by the number of queries that see the row, so that
//!    late rows are not at a disadvantage.
//! 3. The last rows stay, `recent` of the budget, and of the others those with the largest scores.
//!
//! # Knobs
//! `queries` of at least the prompt looks at all of it, as in the paper. A budget of at least the prompt changes nothing. Layers with a
//! window of their own are left alone.
//!
//! # Cost
//! `queries` products of a query with all keys in each layer, once. Memory and the reads of a decode step fall to `budget / n`.
//!
//! # Differences from the paper
//! An approximation where the prompt is longer than `queries`: the paper adds up the weights of every query, which a kernel that never
//! forms the matrix does not have; the last queries are asked again instead. Rows are chosen once, at the end of the prompt, as in
//! kvpress' `ObservedAttention`; the paper chooses anew with every token of the answer, with sums that go on. Rows are chosen per KV
//! head, not per query head.
//!
//! # References
//! Zhang et al., H2O: heavy-hitter oracle for efficient generative inference of large language models, NeurIPS 2023, arXiv 2306.14048.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, CachePolicy, Card, Fold, HeadEdit, Kind, Knob, Knobs, LayerEdit, LayerView, Method, Paper, Preset,
    Rig, RigError, Sight,
};

use super::snapkv::BUDGET;
use super::window;

/// The method.
pub struct H2o;

static CARD: Card = Card {
    name: "h2o",
    title: "H2O",
    axis: Axis::Kv,
    exact: false,
    summary: "Each head keeps the rows that drew most attention so far, and the most recent ones.",
    paper: Paper {
        title: "H2O: heavy-hitter oracle for efficient generative inference of large language models",
        authors: "Zhang et al.",
        year: 2023,
        reference: "arXiv 2306.14048",
    },
    knobs: &[
        BUDGET,
        Knob {
            name: "recent",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.5),
            unit: "of the budget",
            help: "Share of the budget that the last rows have; the rest goes to heavy hitters",
            source: "section 5: half",
        },
        Knob {
            name: "queries",
            kind: Kind::int(1, 1024),
            default: Preset::Int(128),
            unit: "tokens",
            help: "Last queries of the prompt whose weights are added up",
            source: "ours; all in the paper",
        },
        Knob {
            name: "score",
            kind: Kind::Choice(&["sum", "mean"]),
            default: Preset::Text("sum"),
            unit: "",
            help: "The sum of a row's weights, or their mean over the queries that see it",
            source: "sum: section 4; mean: kvpress",
        },
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("budget=1048576"),
    source: file!(),
};

impl Method for H2o {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let budget = knobs.size("budget");
        rig.set_cache_policy(Arc::new(Heavy {
            budget,
            recent: (budget as f64 * knobs.float("recent")).round() as usize,
            queries: knobs.size("queries"),
            per_query: knobs.text("score") == "mean",
        }))
    }
}

#[derive(Debug)]
pub(super) struct Heavy {
    pub(super) budget: usize,
    pub(super) recent: usize,
    pub(super) queries: usize,
    /// Means over the queries that see a row, not sums.
    pub(super) per_query: bool,
}

/// Queries whose weights are in memory at once.
const BLOCK: usize = 32;

impl Heavy {
    /// Scores of the rows of a KV head: steps 1 and 2.
    fn scores(&self, view: &LayerView<'_>, kv_head: usize) -> Vec<f32> {
        let geometry = view.geometry;
        let group = geometry.heads / geometry.kv_heads;
        let rows = view.rows(kv_head);
        let keys = view.keys(&rows);
        let (seen, width) = (view.seen(), geometry.heads * geometry.dim);
        let mut sums = vec![0.0; rows.len()];
        for (block, queries) in view.queries.chunks(BLOCK * width).enumerate() {
            let done = (block * BLOCK + queries.len() / width) as u32;
            let view = LayerView {
                next: view.next - (seen as u32 - done),
                queries,
                ..*view
            };
            for head in kv_head * group..(kv_head + 1) * group {
                for row in view.weights(head, &rows, &keys).chunks_exact(rows.len().max(1)) {
                    sums.iter_mut().zip(row).for_each(|(s, w)| *s += w);
                }
            }
        }
        if self.per_query {
            let first = view.next as usize - seen;
            for (sum, row) in sums.iter_mut().zip(&rows) {
                *sum /= (seen - (row.position as usize).saturating_sub(first)) as f32;
            }
        }
        sums
    }
}

impl CachePolicy for Heavy {
    fn sight(&self, tokens: usize) -> Option<Sight> {
        (tokens > self.budget).then_some(Sight {
            queries: self.queries,
        })
    }

    fn every(&self) -> Option<NonZeroUsize> {
        None
    }

    fn layer(&self, view: &LayerView<'_>) -> LayerEdit {
        let rows = view.rows(0).len();
        if view.geometry.window.is_some() || rows <= self.budget {
            return LayerEdit::KeepAll;
        }
        // Step 3.
        let one = |kv_head: usize| HeadEdit {
            keep: window::keep(
                &self.scores(view, kv_head)[..rows - self.recent],
                rows,
                self.budget,
            ),
            fold: Fold::Drop,
        };
        LayerEdit::Heads((0..view.geometry.kv_heads).map(one).collect())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_conforms() {
        antefix_conformance::method::check(&super::H2o);
    }
}
