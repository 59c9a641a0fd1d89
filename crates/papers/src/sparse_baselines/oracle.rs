//! oracle_topk: each block of queries reads the keys that carry most of its attention, known from all of its attention.
//!
//! # What it does
//! Attention is computed densely to decide what to read, and then again under the plan. No planner that reads as many keys in each block
//! of queries finds more of the attention.
//!
//! # When it helps
//! Never: it costs more than dense attention. It is the upper bound that says how much of the attention a number of keys can hold at all, and so
//! whether a planner is poor or the budget too small.
//!
//! # Steps
//! 1. Weights of all rows of a block of queries over all keys, summed by key; with `unit=kv_group` over the heads of the group, too.
//! 2. The keys, or with `of=blocks` the blocks of keys, of the largest sums, as many as the budget has room for beside the block's own keys;
//!    ties to the earlier one. With `gamma` above 0 instead the fewest that carry this share of the weights.
//!
//! # Knobs
//! The budget is the larger of `least` keys and the share `share` of the keys up to the block's end, the block's own among them. A `least` of
//! at least the prompt changes nothing, unless `gamma` is set. Layers with a window of their own are left alone.
//!
//! # Cost
//! More than dense attention: all products in f32 and all weights, and then those that are kept. Not a method to be fast with: times under it
//! say nothing.
//!
//! # Differences from the paper
//! There is no paper. The bound is one for plans with equally many keys a block: who spends more keys on blocks that look far can find
//! more at the same total. It is a bound of the attention that is found, not of the quality of answers.
//!
//! # References
//! The exact choice of the largest weights is an upper bound in most papers on sparse attention.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Dial, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Rig,
    RigError, Unit,
};

use super::knobs::{BUDGETS, Budget, block, block_rows, least, share, unit, unit_of};
use super::select::{best, prefix};

/// The method.
pub struct OracleTopK;

static CARD: Card = Card {
    name: "oracle_topk",
    title: "Oracle top-k",
    axis: Axis::Prefill,
    exact: false,
    summary: "Each block of queries reads the keys that carry most of its attention, known from dense attention: an upper bound, not a speed method.",
    paper: Paper {
        title: "A common upper bound",
        authors: "no one",
        year: 2024,
        reference: "no publication of its own",
    },
    knobs: &[
        block("64", "ours"),
        Knob {
            name: "of",
            kind: Kind::Choice(&["keys", "blocks"]),
            default: Preset::Text("keys"),
            unit: "",
            help: "What is chosen: single keys, or blocks of them",
            source: "ours",
        },
        share(
            0.125,
            "Share of the keys up to its end that a block of queries reads",
            "ours",
        ),
        least(512, "ours"),
        Knob {
            name: "gamma",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.0),
            unit: "",
            help: "The fewest keys that carry this share of a block's attention instead; 0: as many as the budget says",
            source: "ours",
        },
        unit(
            "query_head",
            "One plan a query head, or one for all that share keys",
            "ours: the upper bound of either",
        ),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("least=1048576"),
    source: file!(),
};

impl Method for OracleTopK {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let block = block_rows(knobs);
        rig.set_planner(Arc::new(Oracle {
            block,
            size: if knobs.text("of") == "keys" { 1 } else { block },
            budget: Budget::of(knobs),
            gamma: knobs.float("gamma"),
            unit: unit_of(knobs),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        BUDGETS
    }
}

#[derive(Debug)]
struct Oracle {
    block: usize,
    /// Keys that are chosen together.
    size: usize,
    budget: Budget,
    gamma: f64,
    unit: Unit,
}

impl Planner for Oracle {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block).unwrap_or(NonZeroUsize::MIN)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        if self.gamma == 0.0 && self.budget.keys(view.queries().end as usize).is_none() {
            return view.dense();
        }
        view.plan(self.unit, |unit| {
            let mut builder = Builder::new(self.block as u32, view.queries());
            while let Some(at) = builder.block() {
                // Step 1.
                let before = at.start as usize;
                let rows =
                    before - view.queries().start as usize..at.end as usize - view.queries().start as usize;
                let heads = view.heads(self.unit, unit);
                let total = (rows.len() * heads.len()) as f64;
                let own = rows.len();
                let mut mass = vec![0.0f32; before];
                for head in heads {
                    view.weights(head, rows.clone(), |_, weights| {
                        mass.iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
                    });
                }
                // Step 2.
                let mass: Vec<f32> = mass.chunks(self.size).map(|m| m.iter().sum()).collect();
                let count = match self.gamma {
                    0.0 => {
                        let keys = self.budget.keys(at.end as usize).unwrap_or(at.end as usize);
                        keys.saturating_sub(own).div_ceil(self.size)
                    }
                    gamma => {
                        let all: f64 = mass.iter().map(|&m| f64::from(m)).sum();
                        let missing = gamma * total - (total - all);
                        if missing > 0.0 {
                            prefix(&mass, missing) + 1
                        } else {
                            0
                        }
                    }
                };
                let mut chosen = best(&mass, count);
                chosen.sort_unstable();
                builder.push_blocks(self.size as u32, &chosen);
            }
            builder.finish()
        })
    }
}
