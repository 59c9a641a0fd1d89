//! anchor_attention: groups of rows read the keys whose score comes near the largest one at the beginning and close by.
//!
//! # What it does
//! The largest score of a row nearly always lies among the first keys or close to the row itself. Those keys are read anyway; their largest score
//! is the row's anchor. Of all other keys a group of neighbouring query blocks reads those that come within `theta` of the anchor for
//! one of its blocks: single keys ("stripes"), no top-k, no sorting. Answers are attended densely.
//!
//! # When it helps
//! Long prompts, from a few groups on. Keys that matter to neighbouring rows alike are found one by one, so that less is read than in whole
//! blocks. Diagonals are not modelled: a distance that matters to every row is only found where it falls into the group.
//! With `theta=8` it pays from beyond 8,192 tokens: to the first token of Qwen2.5-Coder it is 0.8 times as fast as dense attention at 4,096, as fast at
//! 8,192, 1.5 times at 16,384 (docs/results.md).
//!
//! # Steps
//! 1. (Phase 1) Anchor of a row: its largest score over the first `init` keys and those from the start of its group up to itself.
//! 2. (Phase 2) Mean query and mean anchor of each block of queries. A key between is listed for the group if the score of the mean query
//!    plus `theta` reaches the mean anchor, for one block of the group and, with `unit=kv_group`, one of its heads.
//! 3. (Phase 3) The rows of the group read the first keys, the listed ones, and their group up to themselves. Pages of which few keys are
//!    listed are packed.
//!
//! # Knobs
//! `theta` is in units of the score: exp(-12) is 6e-6 of the anchor's weight. A very large one changes nothing. Layers with a window of their
//! own are left alone.
//!
//! # Cost
//! Anchors: `group + init` products a row. Lists: one product a key and block of queries, `1 / block` of those of dense attention, in f32.
//! Keys in a row's group are read densely, half a group a row on average. Reported as `plan_s`.
//!
//! # Differences from the paper
//! Groups of 256 rows instead of 2,048, which would be dense at most lengths here; their borders are fixed positions, so that a prompt may be
//! computed in steps. Candidates and anchor region are disjoint, as the text has it; the published code counts some keys twice and
//! drops others. Anchors are computed for the plan and again when it is executed. Heads of a group share one list by default.
//! A cap on scores is left out of the comparison.
//!
//! # References
//! Zhang et al., AnchorAttention: difference-aware sparse attention with stripe granularity, EMNLP 2025, arXiv 2505.23520.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Cover, Dial, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Rig,
    RigError, Unit,
};
use antefix_state::PAGE_ROWS;

use crate::sparse_baselines::knobs::{block, block_rows, unit, unit_of};

pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

/// The method.
pub struct AnchorAttention;

static CARD: Card = Card {
    name: "anchor_attention",
    title: "AnchorAttention",
    axis: Axis::Prefill,
    exact: false,
    summary: "Groups of rows read the keys whose score comes near the largest one at the beginning and close by.",
    paper: Paper {
        title: "AnchorAttention: difference-aware sparse attention with stripe granularity",
        authors: "Zhang et al.",
        year: 2025,
        reference: "EMNLP 2025, arXiv 2505.23520",
    },
    knobs: &[
        Knob {
            name: "theta",
            kind: Kind::float(-1e9, 1e9),
            default: Preset::Float(12.0),
            unit: "",
            help: "How far below its anchor a key's score may lie, natural logarithm",
            source: "the published code; its scripts sweep 9 to 17",
        },
        block("64", "ours; the paper has 128"),
        Knob {
            name: "step",
            kind: Kind::int(1, 64),
            default: Preset::Int(4),
            unit: "blocks",
            help: "Query blocks of a group, which share one list; a step computes whole groups of a prompt",
            source: "ours; the paper has 16 of 128",
        },
        Knob {
            name: "init",
            kind: Kind::int(1, 64),
            default: Preset::Int(1),
            unit: "blocks",
            help: "First blocks of keys that every row reads",
            source: "the paper's description",
        },
        Knob {
            name: "dense_tail",
            kind: Kind::Bool,
            default: Preset::Bool(true),
            unit: "",
            help: "A last group that is not full reads everything: usually it holds the question",
            source: "the published code",
        },
        unit(
            "kv_group",
            "One list for all heads that share keys, or one a query head",
            "ours; the paper has one a head",
        ),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("theta=1000000000"),
    source: file!(),
};

impl Method for AnchorAttention {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let block = block_rows(knobs);
        rig.set_planner(Arc::new(Anchors {
            theta: knobs.float("theta") as f32,
            block,
            group: block * knobs.size("step"),
            init: block * knobs.size("init"),
            dense_tail: knobs.bool("dense_tail"),
            unit: unit_of(knobs),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        &[Dial {
            knob: "theta",
            from: 4.0,
            to: 20.0,
        }]
    }
}

#[derive(Debug)]
struct Anchors {
    theta: f32,
    /// Rows of a block.
    block: usize,
    /// Rows of a group.
    group: usize,
    /// First keys.
    init: usize,
    dense_tail: bool,
    unit: Unit,
}

impl Planner for Anchors {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.group).unwrap_or(NonZeroUsize::MIN)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        let queries = view.queries();
        let (start, end) = (queries.start as usize, queries.end as usize);
        // Candidates are whole pages: a group that does not begin at a border is a rest behind a decision of a cache policy.
        let rest = !end.is_multiple_of(self.group) && self.dense_tail || !start.is_multiple_of(self.group);
        if start <= self.init || rest {
            return view.dense();
        }
        view.plan(self.unit, |unit| self.cover(view, view.heads(self.unit, unit)))
    }
}

impl Anchors {
    fn cover(&self, view: &PlanView<'_>, heads: Range<usize>) -> Cover {
        let start = view.queries().start;
        let runs = self.list(view, heads);
        let mut builder = Builder::new(self.block as u32, view.queries());
        while builder.block().is_some() {
            // Phase 3. The block's own keys come with the plan, those of later blocks are dropped.
            let init = [(0, self.init as u32)];
            let group = [(start, start + self.group as u32)];
            builder.push(init.into_iter().chain(runs.iter().copied()).chain(group));
        }
        builder.finish()
    }

    /// Runs of listed keys, ascending.
    fn list(&self, view: &PlanView<'_>, heads: Range<usize>) -> Vec<(u32, u32)> {
        let (start, rows) = (view.queries().start as usize, view.rows.rows());
        let kv_head = heads.start / view.group();
        let blocks = rows.div_ceil(self.block);
        let span = |i: usize| i * self.block..((i + 1) * self.block).min(rows);
        let (mut means, mut least) = (Vec::new(), Vec::new());
        for head in heads {
            let anchors = self.anchors(view, head);
            for i in 0..blocks {
                // Phase 2.
                means.extend(view.mean_query(span(i), head));
                let mean = anchors[span(i)].iter().sum::<f32>() / span(i).len() as f32;
                least.push(mean - self.theta);
            }
        }
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let pages = self.init / PAGE_ROWS..start / PAGE_ROWS;
        view.scores(kv_head, &means, pages, |page, scores| {
            for row in 0..PAGE_ROWS {
                if scores.iter().zip(&least).any(|(s, least)| s[row] >= *least) {
                    let key = (page * PAGE_ROWS + row) as u32;
                    match runs.last_mut() {
                        Some(run) if run.1 == key => run.1 += 1,
                        _ => runs.push((key, key + 1)),
                    }
                }
            }
        });
        runs
    }

    /// Phase 1: the largest score of each row over the first keys and its group up to itself.
    fn anchors(&self, view: &PlanView<'_>, head: usize) -> Vec<f32> {
        let (queries, rows) = (view.queries(), view.rows.rows());
        let (start, end) = (queries.start as usize, queries.end as usize);
        let q: Vec<f32> = (0..rows).flat_map(|row| view.query(row, head)).collect();
        let mut anchors = vec![f32::NEG_INFINITY; rows];
        let kv_head = head / view.group();
        let pages = (0..self.init / PAGE_ROWS).chain(start / PAGE_ROWS..end.div_ceil(PAGE_ROWS));
        for page in pages {
            let at = page * PAGE_ROWS;
            // Rows before the page do not see it.
            let first = at.saturating_sub(start);
            let dim = view.rows.geometry.dim;
            view.scores(kv_head, &q[first * dim..], page..page + 1, |_, scores| {
                for (row, scores) in (first..).zip(scores) {
                    let seen = (start + row + 1 - at).min(PAGE_ROWS);
                    let largest = scores[..seen].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    anchors[row] = anchors[row].max(largest);
                }
            });
        }
        anchors
    }
}
