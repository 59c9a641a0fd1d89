//! random_blocks: each block of queries reads the first block, its own, and others drawn by lot.
//!
//! # What it does
//! Of the blocks of keys before a block of queries, the first one is kept and others are drawn without regard to anything, `keep` in all
//! with the block's own.
//!
//! # When it helps
//! Never: it is the lower bound that every planner has to clear at the same density.
//!
//! # Steps
//! 1. The first block and the block's own are kept.
//! 2. Of the others as many as `keep` leaves are drawn, for each layer, head and block anew, decided by `seed`.
//!
//! # Knobs
//! A `keep` of at least the blocks of the prompt changes nothing. Layers with a window of their own are left alone.
//!
//! # Cost
//! Planning costs nothing worth mentioning.
//!
//! # Differences from the paper
//! There is no paper.
//!
//! # References
//! Random blocks are a baseline in most papers on sparse attention.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Dial, Knobs, Method, Paper, Plan, PlanView, Planner, Rig, RigError, Unit,
};

use super::knobs::{KEEP, KEPT_BLOCKS, block, block_rows};
use crate::kv_baselines::random::SEED;

/// The method.
pub struct RandomBlocks;

static CARD: Card = Card {
    name: "random_blocks",
    title: "Random blocks",
    axis: Axis::Prefill,
    exact: false,
    summary: "Each block of queries reads the first block, its own, and others drawn by lot: the lower bound for every planner.",
    paper: Paper {
        title: "A common baseline",
        authors: "no one",
        year: 2024,
        reference: "no publication of its own",
    },
    knobs: &[block("64", "ours"), KEEP, SEED],
    query_dependent: false,
    needs: &[],
    neutral: Some("keep=1048576"),
    source: file!(),
};

impl Method for RandomBlocks {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_planner(Arc::new(Lots {
            block: block_rows(knobs),
            keep: knobs.size("keep"),
            seed: knobs.int("seed") as u64,
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        KEPT_BLOCKS
    }
}

#[derive(Debug)]
struct Lots {
    block: usize,
    keep: usize,
    seed: u64,
}

impl Planner for Lots {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block).unwrap_or(NonZeroUsize::MIN)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        let layer = view.rows.layer as u64;
        view.plan(Unit::KvGroup, |head| {
            let mut builder = Builder::new(self.block as u32, view.queries());
            while let Some(at) = builder.block() {
                let block = self.block as u32;
                let own = at.start / block;
                let stream = layer << 48 | (head as u64) << 32 | u64::from(own);
                let mut lots =
                    fastrand::Rng::with_seed(self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ stream);
                // Step 2.
                let mut blocks = lots.choose_multiple(1..own.max(1), self.keep - 2);
                // Step 1. The block's own comes with the plan.
                blocks.push(0);
                blocks.sort_unstable();
                builder.push_blocks(block, &blocks);
            }
            builder.finish()
        })
    }
}
