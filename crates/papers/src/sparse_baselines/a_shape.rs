//! a_shape: the rows of a prompt read the first keys and the last ones before them.
//!
//! # What it does
//! While a prompt is computed, each block of queries reads `sinks` first keys, `window` keys before the block, and its own. Answers are
//! attended densely. The picture of what is read has the shape of an A.
//!
//! # When it helps
//! Hardly ever: what stands between sinks and window cannot be found. It is the baseline that every planner has to beat at the same density,
//! and it is cheap.
//!
//! # Steps
//! 1. (StreamingLLM, 3.2; the A-shape of MInference) Keys `[0, sinks)`, the last `window` keys before the block's first query, and the
//!    keys of the block itself.
//!
//! # Knobs
//! A window of at least the prompt changes nothing. Layers with a window of their own are left alone.
//!
//! # Cost
//! Planning costs nothing. A row reads `sinks + window` keys and at most `block` of its own.
//!
//! # Differences from the paper
//! Positions stay as they are; the form that numbers them anew is the cache policy `streaming_llm`. MInference's A-shape has 128 sinks and a
//! window of 3,968: it is made for 128K tokens, and at 4K everything is kept.
//!
//! # References
//! Xiao et al., Efficient streaming language models with attention sinks, ICLR 2024, arXiv 2309.17453.
//! Jiang et al., MInference 1.0, NeurIPS 2024, arXiv 2407.02490.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Card, Cover, Dial, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Rig,
    RigError, Unit,
};

use super::knobs::{block, block_rows, sinks};

/// The method.
pub struct AShape;

static CARD: Card = Card {
    name: "a_shape",
    title: "A-shape",
    axis: Axis::Prefill,
    exact: false,
    summary: "The rows of a prompt read the first keys and the last ones before them.",
    paper: Paper {
        title: "Efficient streaming language models with attention sinks",
        authors: "Xiao et al.",
        year: 2024,
        reference: "arXiv 2309.17453",
    },
    knobs: &[
        block("64", "ours"),
        sinks(16, "ours; the paper has 4, MInference 128"),
        Knob {
            name: "window",
            kind: Kind::int(0, 1 << 20),
            default: Preset::Int(1024),
            unit: "keys",
            help: "Keys before its block that every row reads",
            source: "ours; MInference has 3968",
        },
    ],
    query_dependent: false,
    needs: &[],
    neutral: Some("window=1048576"),
    source: file!(),
};

impl Method for AShape {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_planner(Arc::new(Ends {
            block: block_rows(knobs),
            sinks: knobs.int("sinks") as u32,
            window: knobs.int("window") as u32,
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        &[Dial {
            knob: "window",
            from: 64.0,
            to: 16384.0,
        }]
    }
}

#[derive(Debug)]
struct Ends {
    block: usize,
    sinks: u32,
    window: u32,
}

impl Planner for Ends {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block).unwrap_or(NonZeroUsize::MIN)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        view.plan(Unit::KvGroup, |_| {
            Cover::a_shape(self.block as u32, view.queries(), self.sinks, self.window)
        })
    }
}
