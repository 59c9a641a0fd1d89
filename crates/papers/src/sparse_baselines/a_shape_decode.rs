//! a_shape_decode: drawn tokens read the first keys and the last ones.
//!
//! # What it does
//! A drawn token reads `sinks` first keys and as many of the last ones as its budget leaves. The cache keeps everything: the next turn
//! computes its prompt with all keys.
//!
//! # When it helps
//! Hardly ever: what stands between sinks and window cannot be found. It is the baseline that every planner of answers has to beat at the
//! same number of keys, and nothing is cheaper.
//!
//! # Steps
//! 1. (StreamingLLM, 3.2) Keys `[0, sinks)`, and the last ones up to the token's own, in all as many as the budget.
//!
//! # Knobs
//! The budget is the larger of `least` keys and the share `share` of what stands before. A `least` of at least the whole text changes
//! nothing. Layers with a window of their own are left alone.
//!
//! # Cost
//! Planning costs nothing. A token reads its budget.
//!
//! # Differences from the paper
//! Positions stay as they are, and nothing is dropped: the form that frees memory and numbers positions anew is the cache policy
//! `streaming_llm`. The paper has 4 sinks, and no layers that read everything.
//!
//! # References
//! Xiao et al., Efficient streaming language models with attention sinks, ICLR 2024, arXiv 2309.17453.

use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Cover, DecodePlanner, DecodeSteps, Dial, Knobs, Method, Paper, Plan, PlanView, Rig,
    RigError, Unit,
};

use super::knobs::{Budget, SHARES, dense_layers, drawn_share, least, sinks};

/// The method.
pub struct AShapeDecode;

static CARD: Card = Card {
    name: "a_shape_decode",
    title: "A-shape for answers",
    axis: Axis::Decode,
    exact: false,
    summary: "Drawn tokens read the first keys and the last ones.",
    paper: Paper {
        title: "Efficient streaming language models with attention sinks",
        authors: "Xiao et al.",
        year: 2024,
        reference: "arXiv 2309.17453",
    },
    knobs: &[
        drawn_share("ours, as `quest`"),
        least(512, "ours, as `quest`"),
        sinks(16, "ours; the paper has 4"),
        dense_layers(2, "ours, as `quest`"),
    ],
    query_dependent: false,
    needs: &[],
    neutral: Some("least=1048576"),
    source: file!(),
};

impl Method for AShapeDecode {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_decode_planner(Arc::new(Ends {
            budget: Budget::of(knobs),
            sinks: knobs.size("sinks"),
            dense_layers: knobs.size("dense_layers"),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        SHARES
    }
}

#[derive(Debug, Clone)]
struct Ends {
    budget: Budget,
    sinks: usize,
    dense_layers: usize,
}

impl DecodePlanner for Ends {
    fn start(&self) -> Box<dyn DecodeSteps> {
        Box::new(self.clone())
    }
}

impl DecodeSteps for Ends {
    fn plan(&mut self, view: &PlanView<'_>) -> Plan {
        if view.rows.layer < self.dense_layers {
            return view.dense();
        }
        view.plan(Unit::KvGroup, |_| self.cover(view))
    }
}

impl Ends {
    fn cover(&self, view: &PlanView<'_>) -> Cover {
        let mut builder = Builder::new(1, view.queries());
        for pos in view.queries() {
            let keys = pos as usize + 1;
            // All that the budget leaves are last ones, the token's own among them.
            let (sinks, last) = match self.budget.keys(keys) {
                None => (0, keys),
                Some(budget) => (self.sinks.min(budget), budget - self.sinks.min(budget)),
            };
            builder.push([(0, sinks as u32), ((keys - last) as u32, pos)]);
        }
        builder.finish()
    }
}
