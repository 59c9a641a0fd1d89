//! hip_attention: each block of queries finds its keys by halving runs of keys and keeping the best halves.
//!
//! # What it does
//! Keys that stand side by side usually get similar scores. So the keys before a block of queries are cut into as many runs as units of
//! keys are to be read. Each run is halved, one unit in the middle of each half is scored, and the better half of all halves stays;
//! again, until the runs are single units. Those, the first keys and the last ones are read. Answers are attended densely, or as
//! `hip_decode` says, the form for drawn tokens.
//!
//! # When it helps
//! Long prompts: what a block reads, and what it costs to find that out, hardly grow with the prompt. It misses keys whose neighbours
//! look different from them: half of a run that was dropped never comes back.
//! A search a head pays from beyond 8,192 tokens (0.9 times as fast as dense attention to the first token of Qwen2.5-Coder there), with `unit=kv_group`
//! from 8,192 (1.2 times; 1.8 at 16,384; docs/results.md).
//!
//! # Steps
//! 1. (Mask estimation) A block searches the keys between the first `sinks` and the last `window` before it. If those are no more than `top_k`, all are
//!    read. Of its queries every `query_stride`-th is looked at.
//! 2. (Mask estimation) The keys, in units of `unit_keys`, are cut into `top_k / unit_keys` runs of equal size.
//! 3. (Mask estimation) Each run is cut into two halves. The score of a half is the largest of any of the queries with any key of the unit in its middle.
//! 4. (Mask estimation) As many halves as there were runs stay, those of the largest scores, of equals the earlier ones. Steps 3 and 4 repeat until all
//!    runs are one unit.
//! 5. (Sparse attention) The block reads its units, the first `sinks` keys, the last `window` keys before it, and its own.
//!
//! # Knobs
//! A `top_k` of at least the prompt changes nothing. The first `dense_layers` layers are dense; those with a window of their own are left
//! alone and counted. `unit=kv_group` searches once for all heads that share keys, with the queries of all of them.
//!
//! # Cost
//! With T keys, `log2(T / top_k)` rounds of at most `2 top_k / key_stride` products with each query that is looked at. With the defaults at 16K: five
//! rounds, with as many products for a block as attention of its 64 rows to 160 keys, and copies of 5,000 keys. Reported as `plan_s`.
//!
//! # Differences from the paper
//! The window begins `window` keys before the block, for all of its rows, and the search ends there; the paper has a window for each row, which
//! moves within the block. `sinks` are rounded up to whole units. Blocks have fixed borders, so that a prompt may be computed in steps.
//! Runs are not rounded to a power of two, as a variant of the published code does. Left out: unions of several randomised searches,
//! the union with what the last queries look at, fewer dimensions in the search, offloading, and all of InfiniteHiP (three stages of pruning,
//! refreshed at their own pace; positions beyond the trained length).
//!
//! # References
//! Lee et al., A training-free sub-quadratic cost transformer model serving framework with hierarchically pruned attention, ICLR 2025,
//! arXiv 2406.09827.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Dial, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Rig,
    RigError, Unit,
};

use crate::sparse_baselines::knobs::{dense_layers, sinks, unit, unit_of};

mod decode;
pub mod reference;
pub mod repro;
mod search;
#[cfg(test)]
mod tests;

pub use decode::HipDecode;
pub use search::Sample;
use search::{KEY_STRIDE, SAMPLE, Search, WINDOW, unit_keys};

/// The paper of both forms.
const PAPER: Paper = Paper {
    title: "A training-free sub-quadratic cost transformer model serving framework with hierarchically pruned attention",
    authors: "Lee et al.",
    year: 2025,
    reference: "ICLR 2025, arXiv 2406.09827",
};

/// The method.
pub struct HipAttention;

static CARD: Card = Card {
    name: "hip_attention",
    title: "HiP attention",
    axis: Axis::Prefill,
    exact: false,
    summary: "Each block of queries finds its keys by halving runs of keys and keeping the best halves.",
    paper: PAPER,
    knobs: &[
        Knob {
            name: "top_k",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(512),
            unit: "keys",
            help: "Keys that a block reads beside the first, the last and its own",
            source: "the paper",
        },
        Knob {
            name: "block",
            kind: Kind::Choice(&["16", "32", "64", "128", "256"]),
            default: Preset::Text("64"),
            unit: "rows",
            help: "Queries that search together and read the same keys",
            source: "the published code; the paper has 32",
        },
        Knob {
            name: "query_stride",
            kind: Kind::int(1, 256),
            default: Preset::Int(32),
            unit: "rows",
            help: "Of the queries of a block the last of every so many is looked at",
            source: "ours: finds no less than the 2 of the published code",
        },
        unit_keys(2, "the paper"),
        KEY_STRIDE,
        SAMPLE,
        sinks(16, "the published code"),
        WINDOW,
        dense_layers(3, "the paper, for 7B"),
        unit(
            "query_head",
            "One search a query head, or one for all that share keys",
            "the paper",
        ),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("top_k=1048576"),
    source: file!(),
};

impl Method for HipAttention {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let block = knobs.text("block").parse();
        rig.set_planner(Arc::new(Hip {
            top_k: knobs.size("top_k"),
            block: block.expect("one of the choices is a number"),
            query_stride: knobs.size("query_stride"),
            sinks: knobs.size("sinks"),
            window: knobs.size("window"),
            dense_layers: knobs.size("dense_layers"),
            unit: unit_of(knobs),
            search: Search::of(knobs),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        &[Dial {
            knob: "top_k",
            from: 64.0,
            to: 8192.0,
        }]
    }
}

#[derive(Debug)]
struct Hip {
    top_k: usize,
    /// Rows of a block.
    block: usize,
    query_stride: usize,
    sinks: usize,
    window: usize,
    dense_layers: usize,
    unit: Unit,
    search: Search,
}

/// Rows that are planned at once, where blocks are smaller: as many searches as keep all threads busy.
const STRETCH: usize = 256;

impl Planner for Hip {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block.max(STRETCH)).unwrap_or(NonZeroUsize::MIN)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        if view.rows.layer < self.dense_layers {
            return view.dense();
        }
        let queries = view.queries();
        let (first, block) = (queries.start as usize / self.block, self.block as u32);
        let blocks = (queries.end as usize).div_ceil(self.block) - first;
        let lists = view.each(view.units(self.unit) * blocks, |i| {
            let from = ((first + i % blocks) * self.block) as u32;
            let at = from.max(queries.start)..(from + block).min(queries.end);
            self.list(view, view.heads(self.unit, i / blocks), at)
        });
        let sinks = self.search.behind(self.sinks) as u32;
        view.plan(self.unit, |unit| {
            let mut builder = Builder::new(block, queries.clone());
            for list in &lists[unit * blocks..(unit + 1) * blocks] {
                // Step 5. The block's own keys come with the plan.
                let start = builder.block().expect("one list a block").start;
                let window = (start.saturating_sub(self.window as u32), start);
                builder.push(
                    [(0, sinks)]
                        .into_iter()
                        .chain(list.iter().copied())
                        .chain([window]),
                );
            }
            builder.finish()
        })
    }
}

impl Hip {
    /// The keys that the rows at positions `at`, a block, find for `heads`, which share keys: runs, ascending.
    fn list(&self, view: &PlanView<'_>, heads: Range<usize>, at: Range<u32>) -> Vec<(u32, u32)> {
        // Step 1.
        let end = (at.start as usize).saturating_sub(self.window);
        let keys = self.search.behind(self.sinks).min(end)..end;
        let (rows, pos0) = (at.len(), view.queries().start);
        let first = (at.start - pos0) as usize;
        let kv_head = heads.start / view.group();
        let looked_at = (0..rows.div_ceil(self.query_stride))
            .map(|i| first + ((i + 1) * self.query_stride).min(rows) - 1);
        let q: Vec<f32> = heads
            .flat_map(|head| looked_at.clone().flat_map(move |row| view.query(row, head)))
            .collect();
        self.search.run(view, kv_head, &q, keys, self.top_k)
    }
}
