//! block_topk: each block of queries reads the blocks of keys whose mean resembles its own.
//!
//! # What it does
//! Queries and keys are averaged in blocks. A block of queries reads the `keep` blocks of keys with the largest product of means, among
//! them always the first one and its own.
//!
//! # When it helps
//! It is the plain baseline that every paper on sparse prefill compares with ("block sparse"). It finds text about the same subject; a
//! single telling token drowns in the mean of its block.
//! With `keep=32` it is 1.1 times as fast as dense attention to the first token of Qwen2.5-Coder at 4,096 tokens, 1.4 at 8,192
//! (docs/results.md).
//!
//! # Steps
//! 1. Means of the queries of each head over blocks of `block`, and of the keys.
//! 2. Score of a key block for a query block: the largest product of means among the heads of its group.
//! 3. The first block and the block's own are kept, and of the others those of the largest scores; ties to the earlier block.
//!
//! # Knobs
//! `keep` counts the first block and the block's own. A number of at least the blocks of the prompt changes nothing. Layers with a window of
//! their own are left alone.
//!
//! # Cost
//! Means of keys are computed once a page; one product a pair of blocks, `1 / block^2` of the pairs of dense attention.
//!
//! # Differences from the paper
//! MoBA gates every query alone, trains the model with it, and needs blocks of 4,096 keys; without training, small blocks and averaged
//! queries are its cheap form. Grouped heads share one list, so that keys are read once for all of them.
//!
//! # References
//! Lu et al., MoBA: mixture of block attention for long-context LLMs, 2025, arXiv 2502.13189.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Dial, Knobs, Method, Paper, Plan, PlanView, Planner, Rig, RigError, Summary, Unit,
};

use super::knobs::{KEEP, KEPT_BLOCKS, block, block_rows};
use super::select::best;

/// The method.
pub struct BlockTopK;

static CARD: Card = Card {
    name: "block_topk",
    title: "Block top-k",
    axis: Axis::Prefill,
    exact: false,
    summary: "Each block of queries reads the blocks of keys whose mean resembles its own.",
    paper: Paper {
        title: "MoBA: mixture of block attention for long-context LLMs",
        authors: "Lu et al.",
        year: 2025,
        reference: "arXiv 2502.13189",
    },
    knobs: &[block("64", "ours: 64 to 128 without training"), KEEP],
    query_dependent: true,
    needs: &[],
    neutral: Some("keep=1048576"),
    source: file!(),
};

impl Method for BlockTopK {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_planner(Arc::new(Means {
            block: block_rows(knobs),
            keep: knobs.size("keep"),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        KEPT_BLOCKS
    }
}

#[derive(Debug)]
struct Means {
    block: usize,
    keep: usize,
}

impl Planner for Means {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block).unwrap_or(NonZeroUsize::MIN)
    }

    fn summaries(&self) -> Vec<Summary> {
        vec![Summary::Mean]
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        let (n, pos0) = (view.queries().end as usize, view.queries().start as usize);
        if n.div_ceil(self.block) <= self.keep {
            return view.dense();
        }
        let dim = view.rows.geometry.dim;
        view.plan(Unit::KvGroup, |kv_head| {
            // Step 1.
            let keys = view.mean_keys(kv_head, self.block);
            let mut builder = Builder::new(self.block as u32, view.queries());
            while let Some(at) = builder.block() {
                let own = at.start as usize / self.block;
                let rows = at.start as usize - pos0..at.end as usize - pos0;
                let means: Vec<Vec<f32>> = view
                    .heads(Unit::KvGroup, kv_head)
                    .map(|head| view.mean_query(rows.clone(), head))
                    .collect();
                // Step 2.
                let score = |b: usize| {
                    let dot = |q: &Vec<f32>| q.iter().zip(&keys[b * dim..]).map(|(q, k)| q * k).sum::<f32>();
                    means.iter().map(dot).fold(f32::NEG_INFINITY, f32::max)
                };
                // Step 3. The block's own comes with the plan.
                let scores: Vec<f32> = (1..own.max(1)).map(score).collect();
                let mut blocks: Vec<u32> = best(&scores, self.keep - 2).iter().map(|b| b + 1).collect();
                blocks.push(0);
                blocks.sort_unstable();
                builder.push_blocks(self.block as u32, &blocks);
            }
            builder.finish()
        })
    }
}
