//! streaming_llm: the cache keeps the first few rows and the most recent ones.
//!
//! # What it does
//! Once the prompt is computed, every layer keeps the rows of its first `sinks` tokens, on which attention rests whatever they say, and
//! the most recent rows, `budget` in all. It decides again as the answer grows, so that memory stays bounded however long it gets.
//!
//! # When it helps
//! Endless streams, and answers that only need what was said last. What stood in the middle of a long prompt is gone: nothing that asks
//! for it can be answered. It is the cheapest policy that keeps a model fluent, so every other one is measured against it.
//!
//! # Steps
//! 1. (Section 3.2 of the paper) The first `sinks` rows are kept: without them the softmax has nowhere to put its surplus mass and the
//!    model breaks down.
//! 2. The last `budget - sinks` rows are kept, a rolling cache; all others go.
//! 3. After every `every` tokens of the answer, steps 1 and 2 again. In between the cache holds up to `budget + every` rows.
//!
//! # Knobs
//! Layers with a window of their own are left alone: they forget by themselves.
//!
//! # Cost
//! No score is computed. The rows that stay are copied once. Memory and the reads of a decode step fall to `budget / n`.
//!
//! # Differences from the paper
//! Rows keep their positions in the text; the paper numbers them anew by their place in the cache, which lets a stream run beyond the
//! trained window. Here a sequence still ends with the model's context. The whole prompt is computed densely before rows go.
//!
//! # References
//! Xiao et al., Efficient streaming language models with attention sinks, 2024, arXiv 2309.17453.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, CachePolicy, Card, Kind, Knob, Knobs, LayerEdit, LayerView, Method, Paper, Preset, Rig, RigError,
    Sight,
};

/// The method.
pub struct StreamingLlm;

static CARD: Card = Card {
    name: "streaming_llm",
    title: "StreamingLLM",
    axis: Axis::Kv,
    exact: false,
    summary: "Keeps the first few and the most recent rows of the cache.",
    paper: Paper {
        title: "Efficient streaming language models with attention sinks",
        authors: "Xiao et al.",
        year: 2024,
        reference: "arXiv 2309.17453",
    },
    knobs: &[
        Knob {
            name: "budget",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(512),
            unit: "rows a layer",
            help: "Rows that stay, sinks included",
            source: "ours",
        },
        Knob {
            name: "sinks",
            kind: Kind::int(0, 1 << 20),
            default: Preset::Int(4),
            unit: "rows",
            help: "First rows that always stay; fewer than the budget",
            source: "section 3.2",
        },
        Knob {
            name: "every",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(64),
            unit: "tokens",
            help: "Tokens of the answer after which rows go again",
            source: "ours; 1 in the paper",
        },
    ],
    query_dependent: false,
    needs: &[],
    neutral: Some("budget=1048576"),
    source: file!(),
};

impl Method for StreamingLlm {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let (budget, sinks) = (knobs.size("budget"), knobs.size("sinks"));
        if sinks >= budget {
            return Err(rig.senseless(format!("{sinks} sinks leave nothing of a budget of {budget}")));
        }
        rig.set_cache_policy(Arc::new(SinksAndRecent {
            budget,
            sinks,
            every: NonZeroUsize::new(knobs.size("every")),
        }))
    }
}

/// The policy.
#[derive(Debug)]
struct SinksAndRecent {
    budget: usize,
    sinks: usize,
    every: Option<NonZeroUsize>,
}

impl CachePolicy for SinksAndRecent {
    fn sight(&self, _tokens: usize) -> Option<Sight> {
        Some(Sight { queries: 0 })
    }

    fn every(&self) -> Option<NonZeroUsize> {
        self.every
    }

    fn layer(&self, view: &LayerView<'_>) -> LayerEdit {
        // Rows are the same in every head, so one head says how many there are.
        let rows = view.rows(0).len();
        if rows <= self.budget || view.geometry.window.is_some() {
            return LayerEdit::KeepAll;
        }
        // Steps 1 and 2.
        let recent = rows - (self.budget - self.sinks);
        LayerEdit::Rows(
            (0..self.sinks)
                .chain(recent..rows)
                .map(|row| row as u32)
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_conforms() {
        antefix_conformance::method::check(&StreamingLlm);
    }
}
