//! snapkv: each head keeps the rows that the last queries of the prompt look at.
//!
//! # What it does
//! Once the prompt is computed, its last `window` queries vote: the weights they give to earlier rows are summed and smoothed, and each
//! KV head keeps its best rows and the window itself, `budget` in all. Heads keep different rows; memory is really freed.
//!
//! # When it helps
//! Long prompts with the question at their end, and one answer. What the question did not ask for is gone: a second question about the same
//! text may find nothing.
//!
//! # Steps
//! 1. (Section 4.1 of the paper) Weights of the last `window` queries over all rows, softmax per query head.
//! 2. Their sum over the window for every row before it, smoothed over `kernel` neighbours.
//! 3. The mean over the query heads of a KV head; the best `budget - window` rows and the window stay.
//!
//! # Knobs
//! A budget of at least the prompt changes nothing. Layers with a window of their own are left alone.
//!
//! # Cost
//! `window` more products of a query with all keys, once. Memory and the reads of a decode step fall to `budget / n`.
//!
//! # Differences from the paper
//! The official code repeats keys for every query head and evicts per query head, which makes the cache of grouped models larger; rows
//! are chosen per KV head here, as later users of the method do. Its published comparisons use other widths and max pooling: both are knobs.
//!
//! # References
//! Li et al., SnapKV: LLM knows what you are looking for before generation, 2024, arXiv 2404.14469.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, CachePolicy, Card, Fold, HeadEdit, Kind, Knob, Knobs, LayerEdit, LayerView, Method, Paper, Preset,
    Rig, RigError, Sight,
};

use super::window::{self, Smoothing};

/// The method.
pub struct SnapKv;

/// Rows that stay.
pub(crate) const BUDGET: Knob = Knob {
    name: "budget",
    kind: Kind::int(2, 1 << 20),
    default: Preset::Int(512),
    unit: "rows a layer",
    help: "Rows that stay in each layer and head, the window included",
    source: "ours; 1,024 to 4,096 in the papers",
};

/// Neighbours over which scores are smoothed.
pub(crate) const KERNEL: Knob = Knob {
    name: "kernel",
    kind: Kind::int(1, 63),
    default: Preset::Int(5),
    unit: "rows",
    help: "Neighbours over which scores are smoothed; odd",
    source: "the official code; 7 with max in the paper's runs",
};

/// How they are smoothed.
pub(crate) const SMOOTHING: Knob = Knob {
    name: "smoothing",
    kind: Kind::Choice(Smoothing::WORDS),
    default: Preset::Text("mean"),
    unit: "",
    help: "Mean or largest of the neighbours",
    source: "the official code",
};

/// Queries that vote.
pub(crate) const fn window(default: i64) -> Knob {
    Knob {
        name: "window",
        kind: Kind::int(1, 512),
        default: Preset::Int(default),
        unit: "tokens",
        help: "Last queries of the prompt that vote, and stay",
        source: "the official code",
    }
}

static CARD: Card = Card {
    name: "snapkv",
    title: "SnapKV",
    axis: Axis::Kv,
    exact: false,
    summary: "Each head keeps the rows that the last queries of the prompt look at.",
    paper: Paper {
        title: "SnapKV: LLM knows what you are looking for before generation",
        authors: "Li et al.",
        year: 2024,
        reference: "arXiv 2404.14469",
    },
    knobs: &[BUDGET, window(32), KERNEL, SMOOTHING],
    query_dependent: true,
    needs: &[],
    neutral: Some("budget=1048576"),
    source: file!(),
};

impl Method for SnapKv {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let votes = Votes::new(knobs, rig)?;
        rig.set_cache_policy(Arc::new(Snap {
            budget: knobs.size("budget"),
            votes,
        }))
    }
}

/// How the last queries vote: what the policies of this family have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Votes {
    /// Queries that vote.
    pub(crate) window: usize,
    kernel: usize,
    smoothing: Smoothing,
}

impl Votes {
    /// Reads `window`, `kernel` and `smoothing` and checks them against `budget`.
    pub(crate) fn new(knobs: &Knobs, rig: &Rig<'_>) -> Result<Self, RigError> {
        let (budget, window, kernel) = (knobs.size("budget"), knobs.size("window"), knobs.size("kernel"));
        if window >= budget {
            return Err(rig.senseless(format!(
                "a window of {window} leaves nothing of a budget of {budget}"
            )));
        }
        if kernel.is_multiple_of(2) {
            return Err(rig.senseless(format!(
                "`kernel` is {kernel}, but a row has as many neighbours on both sides: it is odd"
            )));
        }
        Ok(Self {
            window,
            kernel,
            smoothing: Smoothing::named(knobs.text("smoothing")),
        })
    }

    /// Scores of the rows of `kv_head` before the window, one vector for each of its `heads`.
    pub(crate) fn scores(&self, view: &LayerView<'_>, kv_head: usize, heads: &[usize]) -> Vec<Vec<f32>> {
        window::scores(view, kv_head, heads, self.smoothing, self.kernel)
    }

    /// Every KV head keeps its own best rows: steps 1 to 3.
    pub(crate) fn per_head(&self, view: &LayerView<'_>, budget: usize) -> LayerEdit {
        let geometry = view.geometry;
        let group = geometry.heads / geometry.kv_heads;
        let one = |kv_head: usize| {
            let heads: Vec<usize> = (kv_head * group..(kv_head + 1) * group).collect();
            let scores = window::mean(&self.scores(view, kv_head, &heads));
            HeadEdit {
                keep: window::keep(&scores, view.rows(kv_head).len(), budget),
                fold: Fold::Drop,
            }
        };
        LayerEdit::Heads((0..geometry.kv_heads).map(one).collect())
    }
}

#[derive(Debug)]
struct Snap {
    budget: usize,
    votes: Votes,
}

impl CachePolicy for Snap {
    fn sight(&self, tokens: usize) -> Option<Sight> {
        (tokens > self.budget).then_some(Sight {
            queries: self.votes.window,
        })
    }

    fn every(&self) -> Option<NonZeroUsize> {
        None
    }

    fn layer(&self, view: &LayerView<'_>) -> LayerEdit {
        if view.geometry.window.is_some() || view.rows(0).len() <= self.budget {
            return LayerEdit::KeepAll;
        }
        self.votes.per_head(view, self.budget)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_conforms() {
        antefix_conformance::method::check(&super::SnapKv);
    }
}
