//! quest: drawn tokens read the pages whose bounds promise the largest scores.
//!
//! # What it does
//! Of every full page of keys the least and the largest value of each dimension are kept. They bound the score of any key in the page. A
//! drawn token reads the pages of the largest bounds, and the page that is still open.
//!
//! # When it helps
//! Answers to long prompts. Every layer chooses for itself, so that nothing is missed that only one layer looks at; the bound is loose where heads are
//! narrow, and then pages that matter lose against others.
//! Tokens of Qwen2.5-Coder come 1.8 times as fast as densely behind 16,320 tokens, 2.2 behind 32,000, 3.1 there with eight
//! sequences (AVX2; docs/results.md).
//!
//! # Steps
//! 1. Bound of a page for a query: over the dimensions, the sum of the larger of `q min` and `q max`.
//! 2. A group of heads takes, for each page, the largest of its heads' bounds, each less that head's largest bound.
//! 3. As many pages as make up the budget, the open one counted; ties to the earlier one. The first `dense_layers` layers are dense.
//!
//! # Knobs
//! The budget is the larger of `least` keys and the share `share` of what stands before. A `least` of at least the whole text changes
//! nothing. Layers with a window of their own are left alone.
//!
//! # Cost
//! Two vectors a page are read instead of its 32 keys and values: 1/32 of the bytes, and they are kept beside the cache, in f32: `8 D` bytes
//! a page, layer and KV head, counted with it.
//!
//! # Differences from the paper
//! Pages of 32 keys instead of 16. Heads that share keys share pages, by step 2.
//!
//! # References
//! Tang et al., Quest: query-aware sparsity for efficient long-context LLM inference, ICML 2024, arXiv 2406.10774.

use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Cover, DecodePlanner, DecodeSteps, Dial, Knobs, Method, Paper, Plan, PlanView, Rig,
    RigError, Summary, Unit,
};
use antefix_kernels::attend::largest_within;
use antefix_state::PAGE_ROWS;

use super::knobs::{Budget, SHARES, dense_layers, drawn_share, least};
use super::select::best;

/// The method.
pub struct Quest;

static CARD: Card = Card {
    name: "quest",
    title: "Quest",
    axis: Axis::Decode,
    exact: false,
    summary: "Drawn tokens read the pages whose bounds promise the largest scores.",
    paper: Paper {
        title: "Quest: query-aware sparsity for efficient long-context LLM inference",
        authors: "Tang et al.",
        year: 2024,
        reference: "ICML 2024, arXiv 2406.10774",
    },
    knobs: &[
        drawn_share("ours; the paper has 256 to 4096 keys"),
        least(512, "ours"),
        dense_layers(2, "the published code"),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("least=1048576"),
    source: file!(),
};

impl Method for Quest {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_decode_planner(Arc::new(Bounds {
            budget: Budget::of(knobs),
            dense_layers: knobs.size("dense_layers"),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        SHARES
    }
}

#[derive(Debug, Clone)]
struct Bounds {
    budget: Budget,
    dense_layers: usize,
}

impl DecodePlanner for Bounds {
    fn start(&self) -> Box<dyn DecodeSteps> {
        Box::new(self.clone())
    }

    fn summaries(&self) -> Vec<Summary> {
        vec![Summary::Bounds]
    }
}

impl DecodeSteps for Bounds {
    fn plan(&mut self, view: &PlanView<'_>) -> Plan {
        if view.rows.layer < self.dense_layers {
            return view.dense();
        }
        view.plan(Unit::KvGroup, |kv_head| self.cover(view, kv_head))
    }
}

impl Bounds {
    fn cover(&self, view: &PlanView<'_>, kv_head: usize) -> Cover {
        let mut builder = Builder::new(1, view.queries());
        for (row, pos) in view.queries().enumerate() {
            let Some(budget) = self.budget.keys(pos as usize + 1) else {
                builder.push([(0, pos)]);
                continue;
            };
            // Full pages before the one that holds the row's own key.
            let full = pos as usize / PAGE_ROWS;
            let scores = scores(view, kv_head, row, full);
            // Step 3.
            let mut pages = best(&scores, (budget / PAGE_ROWS).saturating_sub(1));
            pages.push(full as u32);
            pages.sort_unstable();
            builder.push_blocks(PAGE_ROWS as u32, &pages);
        }
        builder.finish()
    }
}

/// Scores of the first `pages` pages for the heads of `kv_head`.
fn scores(view: &PlanView<'_>, kv_head: usize, row: usize, pages: usize) -> Vec<f32> {
    let heads = view.heads(Unit::KvGroup, kv_head);
    let q: Vec<f32> = heads.clone().flat_map(|head| view.query(row, head)).collect();
    // Step 1. By page, within it by head.
    let mut bounds = vec![0.0; pages * heads.len()];
    let mut to = bounds.chunks_exact_mut(heads.len());
    view.bounds(kv_head, pages, |_, ends| {
        let (least, most) = ends.split_at(ends.len() / 2);
        if let Some(to) = to.next() {
            largest_within(view.rows.run.0, &q, least, most, to);
        }
    });
    // Step 2.
    let mut top = vec![f32::NEG_INFINITY; heads.len()];
    for bounds in bounds.chunks_exact(heads.len()) {
        top.iter_mut().zip(bounds).for_each(|(t, b)| *t = t.max(*b));
    }
    let score = |bounds: &[f32]| {
        let each = bounds.iter().zip(&top).map(|(b, top)| b - top);
        each.fold(f32::NEG_INFINITY, f32::max)
    };
    bounds.chunks_exact(heads.len()).map(score).collect()
}
