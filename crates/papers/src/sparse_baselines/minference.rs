//! minference: each head of a prompt reads fixed numbers of columns and of diagonals, those that its last rows look at most.
//!
//! # What it does
//! The last rows of every stretch of a prompt are attended in full first. Their weights, summed by key and by distance, say which keys
//! ("vertical lines") and which distances ("slash lines") the head reads in the whole stretch. How many of each is fixed beforehand.
//! Answers are attended densely.
//!
//! # When it helps
//! Long prompts whose rows look at the same keys, or at the same distances. Unlike flexprefill it gives every head the same budget,
//! whether its attention is broad or narrow: it is the baseline for budgets that adapt.
//! To the first token of Qwen2.5-Coder it is 0.9 times as fast as dense attention at 4,096 tokens, 1.1 at 8,192, 1.4 at 16,384
//! (docs/results.md).
//!
//! # Steps
//! 1. Weights of the last `rows` queries of the stretch over all keys, summed by key, and by distance.
//! 2. The keys and the distances of the largest sums; the first 30 keys and the 100 shortest distances come first.
//! 3. A distance gives a block of queries one run of `block` keys, on no grid; runs less than a block apart become one, in steps of
//!    a block. Keys outside of runs are read one by one.
//!
//! # Knobs
//! `vertical` and `slash` are the numbers for a long prompt: both are made smaller in proportion where they are more than the share `share`
//! of the keys. Both very large, with `share=0`, change nothing. `unit=kv_group` joins the heads of a group in one plan. Layers with a
//! window of their own are left alone.
//!
//! # Cost
//! `rows / (block * chunk)` of the products of dense attention, in f32. Reported as `plan_s`. A distance costs up to `block` keys a block
//! of queries: what is kept is more than `share`.
//!
//! # Differences from the paper
//! The paper searches offline for the form and the numbers of each head. In its published files nearly all heads are of the form here, with
//! numbers that suit 128K tokens; here all heads have it, with the published fallback scaled down. The paper plans once a prompt, from
//! its last 64 rows; here each stretch of `chunk` blocks is planned from its own last rows, so that a prompt can be computed in steps,
//! cached and continued.
//!
//! # References
//! Jiang et al., MInference 1.0: accelerating pre-filling for long-context LLMs via dynamic sparse attention, NeurIPS 2024, arXiv 2407.02490.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Cover, Dial, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Rig,
    RigError, Unit,
};

use super::Projection;
use super::knobs::{block, block_rows, chunk, last_rows, unit, unit_of};
use super::select::best;

/// First keys that come before all others, and the least number of keys.
const FIRST: usize = 30;
/// Shortest distances that come before all others.
const NEAR: usize = 100;
/// Least number of distances.
const SLASHES: usize = 50;

/// The method.
pub struct MInference;

static CARD: Card = Card {
    name: "minference",
    title: "MInference (vertical-slash)",
    axis: Axis::Prefill,
    exact: false,
    summary: "Each head of a prompt reads fixed numbers of columns and of diagonals, those that its last rows look at most.",
    paper: Paper {
        title: "MInference 1.0: accelerating pre-filling for long-context LLMs via dynamic sparse attention",
        authors: "Jiang et al.",
        year: 2024,
        reference: "NeurIPS 2024, arXiv 2407.02490",
    },
    knobs: &[
        Knob {
            name: "vertical",
            kind: Kind::int(0, 1 << 20),
            default: Preset::Int(1000),
            unit: "keys",
            help: "Keys that all rows of a stretch read",
            source: "the published code, for heads without a search",
        },
        Knob {
            name: "slash",
            kind: Kind::int(0, 1 << 20),
            default: Preset::Int(6096),
            unit: "distances",
            help: "Distances at which all rows of a stretch read",
            source: "the published code, for heads without a search",
        },
        Knob {
            name: "share",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.125),
            unit: "",
            help: "Both together are at most this share of the keys; 0: as they are",
            source: "ours; the published numbers keep nearly all of 8K tokens",
        },
        block("64", "the paper"),
        last_rows("the paper"),
        chunk(16),
        unit(
            "query_head",
            "One plan a query head, or one for all that share keys",
            "the paper",
        ),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("vertical=1048576,slash=1048576,share=0"),
    source: file!(),
};

impl Method for MInference {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_planner(Arc::new(Lines {
            vertical: knobs.size("vertical"),
            slash: knobs.size("slash"),
            share: knobs.float("share"),
            block: block_rows(knobs),
            rows: knobs.size("rows"),
            chunk: knobs.size("chunk"),
            unit: unit_of(knobs),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        &[Dial {
            knob: "share",
            from: 0.02,
            to: 0.6,
        }]
    }
}

#[derive(Debug)]
pub(super) struct Lines {
    pub(super) vertical: usize,
    pub(super) slash: usize,
    pub(super) share: f64,
    pub(super) block: usize,
    pub(super) rows: usize,
    pub(super) chunk: usize,
    pub(super) unit: Unit,
}

impl Planner for Lines {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block * self.chunk).unwrap_or(NonZeroUsize::MIN)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        let n = view.queries().end as usize;
        let (vertical, slash) = self.lines(n);
        if vertical == n || slash == n {
            return view.dense();
        }
        view.plan(self.unit, |unit| {
            self.cover(view, view.heads(self.unit, unit), (vertical, slash))
        })
    }
}

impl Lines {
    /// How many of `n` keys and distances are read.
    pub(super) fn lines(&self, n: usize) -> (usize, usize) {
        let both = (self.vertical + self.slash) as f64;
        let factor = if self.share > 0.0 {
            (self.share * n as f64 / both).min(1.0)
        } else {
            1.0
        };
        let of = |count: usize, least: usize| ((factor * count as f64) as usize).max(least).min(n);
        (of(self.vertical, FIRST), of(self.slash, SLASHES))
    }

    /// The cover of `heads`, which share keys.
    fn cover(&self, view: &PlanView<'_>, heads: Range<usize>, (vertical, slash): (usize, usize)) -> Cover {
        let n = view.queries().end as usize;
        let stretch = view.rows.rows();
        // Step 1. Means instead of sums: their order is the same.
        let mut seen = Projection::zero(n);
        for head in heads {
            seen.add(view, head, stretch - self.rows.min(stretch)..stretch);
        }
        // Step 2.
        let mut by_distance: Vec<f32> = seen.slash.into_iter().rev().collect();
        seen.vertical[..FIRST.min(n)].fill(f32::INFINITY);
        by_distance[..NEAR.min(n)].fill(f32::INFINITY);
        let mut columns = best(&seen.vertical, vertical);
        let mut distances = best(&by_distance, slash);
        columns.sort_unstable();
        distances.sort_unstable_by(|a, b| b.cmp(a));
        // Step 3.
        let block = self.block as u32;
        let mut builder = Builder::new(block, view.queries());
        while let Some(at) = builder.block() {
            let mut runs = slash_runs(&distances, at.start / block * block, block);
            runs.extend(columns.iter().map(|&c| (c, c + 1)));
            runs.sort_unstable();
            builder.push(runs);
        }
        builder.finish()
    }
}

/// Runs of the keys that the rows `[start, start + block)` see at these distances, which descend.
fn slash_runs(distances: &[u32], start: u32, block: u32) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for distance in distances.iter().filter(|&&d| d < start + block) {
        let end = (start + block - distance).max(block);
        match runs.last_mut() {
            Some(run) if end <= run.1 => {}
            Some(run) if end <= run.1 + block => run.1 += block,
            _ => runs.push((end - block, end)),
        }
    }
    runs
}
