//! xattention: each block of queries reads the blocks of keys whose antidiagonals carry a share of the attention.
//!
//! # What it does
//! A square of `stride` queries and `stride` keys is judged by its antidiagonal: as many products as it has rows. A softmax over these sums
//! estimates how much of its attention a block of queries has in each block of keys; it reads the fewest blocks that carry `tau` of it.
//! Answers are attended densely.
//!
//! # When it helps
//! Long prompts. An antidiagonal crosses every column and every diagonal of its square, so that neither is missed as in means of
//! blocks; whole blocks are read for it.
//! To the first token of Qwen2.5-Coder it is 1.1 times as fast as dense attention at 4,096 tokens, 1.4 at 8,192, 2.3 at 32,000
//! with `unit=kv_group` (docs/results.md).
//!
//! # Steps
//! 1. Queries in groups of `stride`, the last of a group first, keys in groups of `stride`, each group as one long vector. The product of
//!    two vectors, divided by `stride`, is the score of the square.
//! 2. Softmax of the scores of each group of queries over the groups of keys up to its own.
//! 3. Sums over the squares of a block of queries and a block of keys. With `unit=kv_group` they are summed over the heads of the group.
//! 4. The first block and the block's own; of the others the largest sums first, while what is kept sums to less than `tau` of all.
//!
//! # Knobs
//! `tau=1` changes nothing. Layers with a window of their own are left alone. What is read does not depend on `chunk`.
//!
//! # Cost
//! `1 / stride` of the products of dense attention, in bf16 where the cache is, and a copy of the keys for each stretch of `chunk` blocks. Reported as `plan_s`.
//!
//! # Differences from the paper
//! The paper's runs have a threshold for each head, fitted to a model; here all heads have the same. A cap on scores is left out. Queries that a
//! group lacks at the end of a prompt count as zeros, as in the published code.
//!
//! # References
//! Xu et al., XAttention: block sparse attention with antidiagonal scoring, ICML 2025, arXiv 2503.16428.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Cover, Dial, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Rig,
    RigError, Unit,
};
use antefix_kernels::attend::{KeyPages, normalise, scores_each};
use antefix_state::PAGE_ROWS;

use super::knobs::{block, block_rows, chunk, unit, unit_of};

/// The method.
pub struct XAttention;

static CARD: Card = Card {
    name: "xattention",
    title: "XAttention",
    axis: Axis::Prefill,
    exact: false,
    summary: "Each block of queries reads the blocks of keys whose antidiagonals carry a share of the attention.",
    paper: Paper {
        title: "XAttention: block sparse attention with antidiagonal scoring",
        authors: "Xu et al.",
        year: 2025,
        reference: "ICML 2025, arXiv 2503.16428",
    },
    knobs: &[
        Knob {
            name: "tau",
            kind: Kind::above(0.0, 1.0),
            default: Preset::Float(0.9),
            unit: "",
            help: "Share of the estimated attention of a block of queries that is kept",
            source: "the published code",
        },
        Knob {
            name: "stride",
            kind: Kind::Choice(&["4", "8", "16", "32"]),
            default: Preset::Text("16"),
            unit: "rows",
            help: "Side of a square that is judged by its antidiagonal",
            source: "the paper; it has 8, too",
        },
        block("128", "the paper"),
        chunk(8),
        unit(
            "query_head",
            "One plan a query head, or one for all that share keys",
            "the paper",
        ),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("tau=1"),
    source: file!(),
};

impl Method for XAttention {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_planner(Arc::new(Antidiagonals {
            tau: knobs.float("tau"),
            stride: knobs
                .text("stride")
                .parse()
                .expect("one of the choices is a number"),
            block: block_rows(knobs),
            chunk: knobs.size("chunk"),
            unit: unit_of(knobs),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        &[Dial {
            knob: "tau",
            from: 0.5,
            to: 0.99,
        }]
    }
}

#[derive(Debug)]
struct Antidiagonals {
    tau: f64,
    stride: usize,
    /// Rows of a block, a multiple of the stride.
    block: usize,
    chunk: usize,
    unit: Unit,
}

impl Planner for Antidiagonals {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block * self.chunk).unwrap_or(NonZeroUsize::MIN)
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        if self.tau >= 1.0 || view.queries().end as usize <= 2 * self.block {
            return view.dense();
        }
        let keys = view.each(view.units(Unit::KvGroup), |head| groups(view, head, self.stride));
        view.plan(self.unit, |unit| {
            let heads = view.heads(self.unit, unit);
            let keys = &keys[heads.start / view.group()];
            self.cover(view, heads, keys)
        })
    }
}

impl Antidiagonals {
    fn cover(&self, view: &PlanView<'_>, heads: Range<usize>, keys: &KeyPages) -> Cover {
        let first = view.queries().start as usize / self.block;
        let blocks = (view.queries().end as usize).div_ceil(self.block);
        let mut sums = vec![vec![0.0; blocks]; blocks - first];
        for head in heads {
            self.add(view, head, keys, &mut sums);
        }
        let mut builder = Builder::new(self.block as u32, view.queries());
        for (i, sums) in (first..).zip(&sums) {
            builder.push_blocks(self.block as u32, &self.choose(&sums[..=i]));
        }
        builder.finish()
    }

    /// Steps 1 to 3: adds the estimates of one head to the sums of each block of queries.
    fn add(&self, view: &PlanView<'_>, head: usize, keys: &KeyPages, sums: &mut [Vec<f64>]) {
        let (queries, stride) = (view.queries(), self.stride);
        let (start, end) = (queries.start as usize, queries.end as usize);
        let groups = start / stride..end.div_ceil(stride);
        let dim = view.rows.geometry.dim;
        let mut q = vec![0.0; groups.len() * stride * dim];
        for pos in start..end {
            let (group, back) = (pos / stride - groups.start, stride - 1 - pos % stride);
            let to = &mut q[(group * stride + back) * dim..][..dim];
            to.iter_mut()
                .zip(view.query(pos - start, head))
                .for_each(|(to, q)| *to = q / stride as f32);
        }
        let mut weights = vec![0.0; groups.len() * groups.end];
        scores(view, (&q, stride * dim), keys, &mut weights);
        let (first, per_block) = (start / self.block, self.block / stride);
        for (group, weights) in groups.clone().zip(weights.chunks_exact_mut(groups.end)) {
            let seen = &mut weights[..=group];
            normalise(view.rows.run.0, seen);
            let sums = &mut sums[group / per_block - first];
            for (sum, some) in sums.iter_mut().zip(seen.chunks(per_block)) {
                *sum += some.iter().map(|&w| f64::from(w)).sum::<f64>();
            }
        }
    }

    /// Step 4: the blocks of keys of a block of queries, out of the sums up to its own.
    fn choose(&self, sums: &[f64]) -> Vec<u32> {
        let own = sums.len() - 1;
        let all: f64 = sums.iter().sum();
        let mut kept = if own == 0 { sums[0] } else { sums[0] + sums[own] };
        let mut others: Vec<usize> = (1..own.max(1)).collect();
        others.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]).then(a.cmp(&b)));
        let mut blocks = vec![0, own as u32];
        for b in others {
            if kept >= self.tau * all {
                break;
            }
            kept += sums[b];
            blocks.push(b as u32);
        }
        blocks.sort_unstable();
        blocks
    }
}

/// Keys of a head up to the last row, `stride` of them as one vector of `stride * D` values. What is missing of the last one is 0.
fn groups(view: &PlanView<'_>, kv_head: usize, stride: usize) -> KeyPages {
    let (n, dim) = (view.queries().end as usize, view.rows.geometry.dim);
    let mut groups = KeyPages::new(stride * dim, view.rows.pool.shape().dtype);
    let mut group = vec![0.0; stride * dim];
    for first in (0..n).step_by(stride) {
        group.fill(0.0);
        for (pos, key) in (first..n).zip(group.chunks_exact_mut(dim)) {
            view.key(view.rows.layer, kv_head, pos, key);
        }
        groups.push(&group);
    }
    groups
}

/// Products of the vectors `q: [R, width]` with all of `keys`: `out: [R, keys]`.
fn scores(view: &PlanView<'_>, (q, width): (&[f32], usize), keys: &KeyPages, out: &mut [f32]) {
    let count = out.len() * width / q.len();
    scores_each(view.rows.run.0, width, q, keys.pages(), |page, some| {
        let at = page * PAGE_ROWS;
        let end = (at + PAGE_ROWS).min(count);
        for (to, from) in out.chunks_exact_mut(count).zip(some) {
            to[at..end].copy_from_slice(&from[..end - at]);
        }
    });
}
