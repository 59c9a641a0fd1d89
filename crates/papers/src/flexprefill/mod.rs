//! flexprefill: each head of a prompt reads as many columns, diagonals or blocks as carry a share of its attention.
//!
//! # What it does
//! The last rows of every stretch of a prompt are attended in full first. From their weights each head decides which keys the whole stretch
//! reads: usually columns (keys that all rows look at) and diagonals (distances that all rows look at), as many as carry the share
//! `gamma` of the weights; where an estimate from block means matches the true weights well, blocks chosen by that estimate for every
//! block of queries. Answers are attended densely.
//!
//! # When it helps
//! Long prompts, from a few thousand tokens on: below twice `min_budget` there is little to leave out. One knob for quality, no calibration.
//! It fails where the last rows of a stretch look elsewhere than the others.
//! To the first token of Qwen2.5-Coder it is 1.1 times as fast as dense attention at 4,096 tokens, 1.4 at 8,192 and 2.0 at 16,384; below 4,000
//! nothing is gained (docs/results.md).
//!
//! # Steps
//! 1. (3.1) Weights of the last `rows` queries of the stretch over all keys; their means by key, and by distance.
//! 2. (3.2) The fewest keys, and the fewest distances, that carry `gamma` of the mass; divided by the block size that is the budget in
//!    blocks, at least `min_budget` keys.
//! 3. (3.3) Jensen-Shannon distance between the true mass of key blocks and an estimate from means. Below `tau` the head is
//!    query-aware, and its budgets are the least.
//! 4. (3.4) The blocks with the largest mass of columns and of diagonals, the first block and the diagonal always.
//! 5. (3.5) Query-aware heads add, over all query blocks of the stretch, the largest estimated block weights that sum to `gamma`.
//!
//! # Knobs
//! A `min_budget` of at least the prompt changes nothing. `unit=kv_group` joins the heads of a group in one plan. Layers with a window of
//! their own are left alone. A larger `chunk` plans less often and keeps other requests waiting for longer.
//!
//! # Cost
//! `rows / (block * chunk)` of the products of dense attention, in f32 where dense attention may run on bf16 tiles, and two passes over
//! as many weights as there are keys. Reported as `plan_s`.
//!
//! # Differences from the paper
//! The paper plans once a prompt, from its last 128 rows. Here each stretch of `chunk` blocks is planned from its own last rows, so that a prompt
//! can be computed in steps, cached and continued. Budgets in keys become blocks by the block size (the published code divides by 128
//! whatever the block is). A distance of 0 log 0 is 0; the published code makes such heads vertical-slash.
//!
//! # References
//! Lai et al., FlexPrefill: a context-aware sparse attention mechanism for efficient long-sequence inference, ICLR 2025, arXiv 2502.20766.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Cover, Dial, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Rig,
    RigError, Summary, Unit,
};

use crate::sparse_baselines::Projection;
use crate::sparse_baselines::knobs::{block, block_rows, chunk, last_rows, unit, unit_of};
use crate::sparse_baselines::select::{best, prefix};

pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

/// The method.
pub struct FlexPrefill;

static CARD: Card = Card {
    name: "flexprefill",
    title: "FlexPrefill",
    axis: Axis::Prefill,
    exact: false,
    summary: "Each head of a prompt reads as many columns, diagonals or blocks as carry a share of its attention.",
    paper: Paper {
        title: "FlexPrefill: a context-aware sparse attention mechanism for efficient long-sequence inference",
        authors: "Lai et al.",
        year: 2025,
        reference: "ICLR 2025, arXiv 2502.20766",
    },
    knobs: &[
        Knob {
            name: "gamma",
            kind: Kind::above(0.0, 1.0),
            default: Preset::Float(0.95),
            unit: "",
            help: "Share of the attention of the last rows that is kept",
            source: "the paper's runs on Llama-3.1-8B",
        },
        Knob {
            name: "tau",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.1),
            unit: "",
            help: "Distance below which the estimate from block means is trusted; 0: never",
            source: "the paper's runs",
        },
        Knob {
            name: "min_budget",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(512),
            unit: "keys",
            help: "Least budget of columns, and of diagonals",
            source: "the published example; the paper's runs have 1024, which keeps half of 4K tokens",
        },
        block("64", "ours; the paper has 128 and finds 64 alike"),
        last_rows("ours; the paper has 128"),
        chunk(16),
        unit(
            "query_head",
            "One plan a query head, or one for all that share keys",
            "the published code",
        ),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("min_budget=1048576"),
    source: file!(),
};

impl Method for FlexPrefill {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_planner(Arc::new(Flex {
            gamma: knobs.float("gamma"),
            tau: knobs.float("tau"),
            min_budget: knobs.size("min_budget"),
            block: block_rows(knobs),
            rows: knobs.size("rows"),
            chunk: knobs.size("chunk"),
            unit: unit_of(knobs),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        &[
            Dial {
                knob: "gamma",
                from: 0.5,
                to: 0.99,
            },
            Dial {
                knob: "min_budget",
                from: 64.0,
                to: 2048.0,
            },
        ]
    }
}

#[derive(Debug)]
struct Flex {
    gamma: f64,
    tau: f64,
    min_budget: usize,
    block: usize,
    rows: usize,
    chunk: usize,
    unit: Unit,
}

impl Planner for Flex {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block * self.chunk).unwrap_or(NonZeroUsize::MIN)
    }

    fn summaries(&self) -> Vec<Summary> {
        vec![Summary::Mean]
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        let n = view.queries().end as usize;
        let least = self.min_budget.div_ceil(self.block);
        if n <= (2 * self.block).max(least * self.block) {
            return view.dense();
        }
        view.plan(self.unit, |unit| {
            self.cover(view, view.heads(self.unit, unit), least)
        })
    }
}

impl Flex {
    /// The cover of `heads`, which share keys.
    fn cover(&self, view: &PlanView<'_>, heads: std::ops::Range<usize>, least: usize) -> Cover {
        let (n, block) = (view.queries().end as usize, self.block);
        let blocks = n.div_ceil(block);
        let kv_head = heads.start / view.group();
        let keys = view.mean_keys(kv_head, block);
        let stretch = view.rows.rows();
        let last = stretch - self.rows.min(stretch)..stretch;
        // Step 1. Sums over the heads keep their proportions.
        let mut seen = Projection::zero(n);
        let mut estimate = vec![0.0; blocks];
        for head in heads.clone() {
            seen.add(view, head, last.clone());
            let weights = estimated(&view.mean_query(last.clone(), head), &keys);
            estimate.iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
        }
        let mass = heads.len() as f64;
        // Step 2.
        let budget = |values: &[f32]| {
            let count = 1 + prefix(values, self.gamma * mass);
            (count / block + 1).max(least).min(blocks)
        };
        let (mut columns, mut diagonals) = (budget(&seen.vertical), budget(&seen.slash));
        // Step 3.
        let by_block =
            |values: &[f32]| -> Vec<f32> { values.chunks(block).map(|b| b.iter().sum()).collect() };
        let vertical = by_block(&seen.vertical);
        let aware = distance(&vertical, &estimate, mass) < self.tau;
        if aware {
            (columns, diagonals) = (least.min(blocks), least.min(blocks));
        }
        // Step 4.
        let (mut vertical, mut slash) = (vertical, by_block(&seen.slash));
        vertical[0] = f32::INFINITY;
        slash[blocks - 1] = f32::INFINITY;
        let columns = best(&vertical, columns);
        let back: Vec<usize> = best(&slash, diagonals)
            .into_iter()
            .map(|c| blocks - 1 - c as usize)
            .collect();
        // Step 5.
        let first = view.queries().start as usize / block;
        let mut own: Vec<Vec<u32>> = vec![Vec::new(); blocks - first];
        if aware {
            self.aware(view, heads, &keys, &mut own);
        }
        let mut builder = Builder::new(block as u32, view.queries());
        for (i, mut list) in own.into_iter().enumerate() {
            let i = first + i;
            list.extend(columns.iter().filter(|&&b| b as usize <= i));
            list.extend(back.iter().filter(|&&r| r <= i).map(|r| (i - r) as u32));
            list.sort_unstable();
            list.dedup();
            builder.push_blocks(block as u32, &list);
        }
        builder.finish()
    }

    /// Key blocks of each query block by the estimate.
    fn aware(&self, view: &PlanView<'_>, heads: std::ops::Range<usize>, keys: &[f32], own: &mut [Vec<u32>]) {
        let (queries, dim) = (view.queries(), view.rows.geometry.dim);
        let first = queries.start as usize / self.block;
        let mut at = Vec::new();
        let mut weights: Vec<f32> = Vec::new();
        for i in 0..own.len() {
            let from = ((first + i) * self.block).max(queries.start as usize) - queries.start as usize;
            let to = ((first + i + 1) * self.block).min(queries.end as usize) - queries.start as usize;
            let start = weights.len();
            at.extend((0..=first + i).map(|b| (i, b as u32)));
            weights.resize(at.len(), 0.0);
            for head in heads.clone() {
                let row = estimated(&view.mean_query(from..to, head), &keys[..(first + i + 1) * dim]);
                weights[start..]
                    .iter_mut()
                    .zip(row)
                    .for_each(|(sum, w)| *sum += w);
            }
        }
        let count = prefix(&weights, self.gamma * (own.len() * heads.len()) as f64);
        for index in best(&weights, count) {
            let (i, b) = at[index as usize];
            own[i].push(b);
        }
    }
}

/// Softmax of the products of `q: [D]` with `keys: [blocks, D]`.
fn estimated(q: &[f32], keys: &[f32]) -> Vec<f32> {
    let dot = |k: &[f32]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
    let mut weights: Vec<f32> = keys.chunks_exact(q.len()).map(dot).collect();
    let m = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    weights.iter_mut().for_each(|w| *w = (*w - m).exp());
    let l: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= l);
    weights
}

/// Square root of the Jensen-Shannon divergence of two distributions, both times `mass`.
fn distance(a: &[f32], b: &[f32], mass: f64) -> f64 {
    let part = |x: f64, m: f64| if x > 0.0 { 0.5 * x * (x / m).ln() } else { 0.0 };
    let sum: f64 = a
        .iter()
        .zip(b)
        .map(|(&a, &b)| {
            let (a, b) = (f64::from(a) / mass, f64::from(b) / mass);
            let m = 0.5 * (a + b);
            part(a, m) + part(b, m)
        })
        .sum();
    sum.max(0.0).sqrt()
}
