//! dhsa: keys are judged in chunks that follow the text, and each block of queries reads the best tokens that its budget has room for.
//!
//! # What it does
//! Keys are cut into chunks of varying length. The mean key of a chunk, made longer by the square root of its length, is compared with the mean query
//! of a block of queries; every token inherits the score of its chunk, and the block reads the tokens of the best chunks, a fixed share of
//! what stands before. Answers are attended densely.
//!
//! # When it helps
//! Long prompts, where a fixed and known number of keys a row is worth more than a promise of quality. What is kept are short runs of keys. It is as good as
//! the mean of a chunk is: a single telling token among others is missed.
//! To the first token of Qwen2.5-Coder it is 1.2 times as fast as dense attention at 4,096 tokens, 1.5 at 8,192 (docs/results.md).
//!
//! # Steps
//! 1. (Boundaries) Keys of the first layer that sees all keys decide for all layers, in windows of 512. `cosine`, the preset, needs no
//!    training: chunks end where the mean keys of `window` tokens before and behind differ most in direction. `fixed`: every `length`
//!    keys. `predictor`: a trained network says where, out of a file. Ends lie more than `nms` tokens apart, and there are at most
//!    `512 / length` chunks a window.
//! 2. (Chunks) Mean of the keys of a chunk times the square root of its length; with `norm=mean` the mean alone.
//! 3. (Scores) Mean query of the block times that, for the heads of a group together, for each head, or with `unit=layer` for the means of all
//!    heads, which then read the same.
//! 4. (Tokens) The first `sinks` keys, the last `local` before the block and the block's own; then chunks by score, ties to the earlier one, until
//!    the budget is full. The last one is cut: its first tokens are read.
//!
//! With `rule=vs`, as in the second version of the paper:
//! 1. Weights of the last `block` rows of a stretch, summed by key and by distance; as many lines as the budget has tokens, half of them the
//!    keys of the largest sums, the others distances.
//! 2. A block of 32 keys is worth what its chosen keys have, and the sum of every chosen distance that touches it from the block of
//!    queries. The first block, the block's own and the best others are read.
//!
//! # Knobs
//! The budget is the larger of `least` keys and the share `share` of the keys up to the block's end, everything above counted. A `least` of at least
//! the prompt changes nothing. A block reads sinks, local keys and its own even if the budget is smaller. `predictor` names a profile of the kind
//! `dhsa` (`$ANTEFIX_HOME/profiles/dhsa/NAME.safetensors`) or, on the command line, a file; there is no published one, and nothing here
//! trains one yet. `chunk` is for `rule=vs`; what concerns boundaries, sinks and local keys is for `rule=chunks`. Layers with a window of their own are left alone.
//!
//! # Cost
//! Means of the chunks of a window are computed once a layer, boundaries once a prompt: with a predictor that is some ten products of the size of
//! its channels squared a token. One product a chunk and block of queries, `1 / (length * block)` of those of dense attention. Reported as `plan_s`. Means are kept
//! beside the cache in f32, `4 D` bytes a chunk, layer and KV head, and counted with it. With `rule=vs`: `1 / chunk` of the products of dense attention.
//!
//! # Differences from the paper
//! The preset is the first version of the paper, `rule=vs` the rule of most results of its second version, which has no boundaries; another of
//! its rules is `block_topk`. The paper decides on boundaries from the whole prompt and lets chunks reach behind the block that reads them; here a block uses the boundaries
//! of windows that ended before it, and chunks of `length` keys in the window that it stands in, so that a prompt can be computed in
//! steps, cached and continued. Sinks take their place in the budget instead of overwriting what was chosen. The paper always has a
//! trained predictor; `cosine` and `fixed` are ours. Its threshold 1.1 stands for a logit, `theta` is a probability. `cosine` takes keys before
//! RoPE, turned back by the model's own angles. All heads of a layer share one selection in the first version: `unit=layer`,
//! each has its own in the second: `unit=query_head`. With `rule=vs` all of a block's own keys are read, not only the last 32, and each stretch
//! of `chunk` blocks is planned from its own last rows, which are not dense themselves.
//!
//! # References
//! Xiong et al., Long-context modeling with dynamic hierarchical sparse attention for on-device LLMs, NeurIPS 2025 workshop; second version
//! ICML 2026; arXiv 2510.24606.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Cover, Dial, Kind, Knob, Knobs, Method, Paper, Plan, PlanView, Planner, Preset, Rig,
    RigError, Summary, Unit,
};

use crate::sparse_baselines::knobs::{BUDGETS, Budget, block, block_rows, chunk, least, share, sinks};

mod cuts;
pub mod predictor;
pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;
mod vs;

use cuts::{Cuts, Rule, WINDOW};
use predictor::{LONGEST, Predictor};

/// The kind of profile that a predictor is, as its folder is called.
pub const KIND: &str = "dhsa";

/// The method.
pub struct Dhsa;

static CARD: Card = Card {
    name: "dhsa",
    title: "DHSA",
    axis: Axis::Prefill,
    exact: false,
    summary: "Keys are judged in chunks that follow the text; each block of queries reads the tokens of the best ones.",
    paper: Paper {
        title: "Long-context modeling with dynamic hierarchical sparse attention for on-device LLMs",
        authors: "Xiong et al.",
        year: 2025,
        reference: "arXiv 2510.24606",
    },
    knobs: &[
        Knob {
            name: "rule",
            kind: Kind::Choice(&["chunks", "vs"]),
            default: Preset::Text("chunks"),
            unit: "",
            help: "How keys are judged: in chunks, or in blocks by the columns and distances of the last rows",
            source: "the paper's first version; its second has vs",
        },
        Knob {
            name: "boundaries",
            kind: Kind::Choice(&["cosine", "fixed", "predictor"]),
            default: Preset::Text("cosine"),
            unit: "",
            help: "What says where a chunk ends: the angle between keys, a fixed length, or a trained predictor",
            source: "ours; the paper has a predictor",
        },
        Knob {
            name: "predictor",
            kind: Kind::Profile,
            default: Preset::Text("default"),
            unit: "",
            help: "The trained predictor, if boundaries=predictor",
            source: "ours",
        },
        block("64", "ours; the paper has 128 and 256"),
        share(
            0.125,
            "Share of the keys up to its end that a block of queries reads",
            "ours; the paper has 1024 or 2048 keys",
        ),
        least(512, "ours"),
        sinks(16, "ours; the paper has 128"),
        Knob {
            name: "local",
            kind: Kind::int(0, 1 << 20),
            default: Preset::Int(128),
            unit: "keys",
            help: "Keys before its block that every row reads",
            source: "the published code",
        },
        Knob {
            name: "length",
            kind: Kind::Choice(&["8", "16", "32", "64"]),
            default: Preset::Text("16"),
            unit: "keys",
            help: "Keys of a fixed chunk; others are at least as long in the mean",
            source: "the published code, for the mean",
        },
        Knob {
            name: "window",
            kind: Kind::int(1, predictor::SIDE as i64),
            default: Preset::Int(4),
            unit: "tokens",
            help: "Tokens on each side of a gap that boundaries=cosine compares",
            source: "the published code, of its predictor",
        },
        Knob {
            name: "nms",
            kind: Kind::int(0, 512),
            default: Preset::Int(8),
            unit: "tokens",
            help: "Ends of two chunks lie further apart than this",
            source: "the published code",
        },
        Knob {
            name: "theta",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.5),
            unit: "",
            help: "Probability from which the predictor is believed",
            source: "ours; the published code has 0.75",
        },
        Knob {
            name: "norm",
            kind: Kind::Choice(&["sqrt_len", "mean"]),
            default: Preset::Text("sqrt_len"),
            unit: "",
            help: "Whether the mean of a chunk grows with the square root of its length",
            source: "the paper",
        },
        chunk(16),
        Knob {
            name: "unit",
            kind: Kind::Choice(&["kv_group", "query_head", "layer"]),
            default: Preset::Text("kv_group"),
            unit: "",
            help: "Heads that read the same keys: those that share them, each alone, or all of a layer",
            source: "ours; the paper has one a layer",
        },
        Knob {
            name: "dense_tail",
            kind: Kind::Bool,
            default: Preset::Bool(true),
            unit: "",
            help: "A last block that is not full reads everything: usually it holds the question",
            source: "the published code, for the last 64 rows",
        },
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("least=1048576"),
    source: file!(),
};

impl Method for Dhsa {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let heads = match knobs.text("unit") {
            "layer" => Heads::Layer,
            "query_head" => Heads::Each,
            _ => Heads::Group,
        };
        if knobs.text("rule") == "vs" {
            return rig.set_planner(Arc::new(vs::Lines {
                block: block_rows(knobs),
                chunk: knobs.size("chunk"),
                budget: Budget::of(knobs),
                heads,
                dense_tail: knobs.bool("dense_tail"),
            }));
        }
        let rule = match knobs.text("boundaries") {
            "fixed" => Rule::Fixed,
            "predictor" => trained(knobs, rig)?,
            _ => Rule::Cosine(knobs.size("window")),
        };
        // A model without such a layer is never planned.
        let layer = rig.facts().full_layers().next().unwrap_or(0);
        rig.set_planner(Arc::new(Chunks {
            cuts: Cuts {
                rule,
                layer,
                length: knobs
                    .text("length")
                    .parse()
                    .expect("one of the choices is a number"),
                nms: knobs.size("nms"),
            },
            block: block_rows(knobs),
            budget: Budget::of(knobs),
            sinks: knobs.int("sinks") as u32,
            local: knobs.int("local") as u32,
            sqrt_len: knobs.text("norm") == "sqrt_len",
            heads,
            dense_tail: knobs.bool("dense_tail"),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        BUDGETS
    }
}

/// The predictor that the knob names, which fits the model.
fn trained(knobs: &Knobs, rig: &mut Rig<'_>) -> Result<Rule, RigError> {
    const HINT: &str = "predictor=FILE names a trained predictor; boundaries=cosine needs none";
    let bytes = rig.profile_bytes(KIND, knobs.text("predictor"), LONGEST, HINT)?;
    let predictor = Predictor::read(&bytes).map_err(|e| rig.unusable(KIND, e.to_string(), HINT))?;
    let facts = rig.facts();
    let channels = facts.kv_heads * facts.dim;
    if predictor.channels() != channels {
        let why = format!(
            "it is made for keys of {} values, the model's have {channels}",
            predictor.channels()
        );
        return Err(rig.unusable(KIND, why, HINT));
    }
    rig.depends_on(&bytes);
    let theta = knobs.float("theta");
    Ok(Rule::Predictor(
        Arc::new(predictor),
        (theta / (1.0 - theta)).ln() as f32,
    ))
}

/// Whose keys and queries are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heads {
    Group,
    Each,
    Layer,
}

impl Heads {
    /// For whom plans are made.
    fn unit(self) -> Unit {
        match self {
            Self::Each => Unit::QueryHead,
            Self::Group | Self::Layer => Unit::KvGroup,
        }
    }
}

#[derive(Debug)]
struct Chunks {
    cuts: Cuts,
    block: usize,
    budget: Budget,
    sinks: u32,
    local: u32,
    sqrt_len: bool,
    heads: Heads,
    dense_tail: bool,
}

impl Planner for Chunks {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.block).unwrap_or(NonZeroUsize::MIN)
    }

    fn summaries(&self) -> Vec<Summary> {
        vec![Summary::Chunks {
            windows: self.cuts.windows(),
            most: WINDOW / self.cuts.length,
        }]
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        let Range { start, end } = view.queries();
        let tail = self.dense_tail && !(end as usize).is_multiple_of(self.block);
        if tail || self.budget.keys(end as usize).is_none() {
            return view.dense();
        }
        // Step 1. A stretch is a block at most, and lies in one window.
        let full = start as usize / WINDOW;
        let windows = self.cuts.windows();
        let mut cuts = view.cuts(windows, full, |window| self.cuts.of(view, window));
        let open = ((full * WINDOW) as u32..start).step_by(self.cuts.length);
        cuts.push(open.collect());
        let chunks = chunks(&cuts, start);
        // Step 2.
        let means = view.each(view.units(Unit::KvGroup), |head| {
            view.mean_chunks(head, windows, &cuts)
        });
        let unit = self.heads.unit();
        match self.heads {
            Heads::Group | Heads::Each => view.plan(unit, |i| {
                let heads = view.heads(unit, i);
                let means = &means[heads.start / view.group()];
                self.cover(view, &chunks, &self.scores(view, heads, means, &chunks))
            }),
            Heads::Layer => {
                let mut mean = vec![0.0; means[0].len()];
                for some in &means {
                    mean.iter_mut().zip(some).for_each(|(m, x)| *m += x);
                }
                let scores = self.scores(view, 0..view.units(Unit::QueryHead), &mean, &chunks);
                view.plan(unit, |_| self.cover(view, &chunks, &scores))
            }
        }
    }
}

/// Chunks `[start, end)` before `end` that begin at these keys.
fn chunks(cuts: &[Vec<u32>], end: u32) -> Vec<(u32, u32)> {
    let starts: Vec<u32> = cuts.iter().flatten().copied().collect();
    let ends = starts.iter().skip(1).copied().chain([end]);
    starts.iter().copied().zip(ends).collect()
}

impl Chunks {
    /// Step 3: scores of the chunks for the mean query of `heads`; `means: [chunks, D]`.
    fn scores(
        &self,
        view: &PlanView<'_>,
        heads: Range<usize>,
        means: &[f32],
        chunks: &[(u32, u32)],
    ) -> Vec<f32> {
        let dim = view.rows.geometry.dim;
        let mut query = vec![0.0; dim];
        for head in heads {
            let mean = view.mean_query(0..view.rows.rows(), head);
            query.iter_mut().zip(mean).for_each(|(q, m)| *q += m);
        }
        let score = |(mean, &(start, end)): (&[f32], &(u32, u32))| {
            let dot = query.iter().zip(mean).map(|(q, k)| q * k).sum::<f32>();
            match self.sqrt_len {
                true => dot * ((end - start) as f32).sqrt(),
                false => dot,
            }
        };
        means.chunks_exact(dim).zip(chunks).map(score).collect()
    }

    /// Step 4.
    fn cover(&self, view: &PlanView<'_>, chunks: &[(u32, u32)], scores: &[f32]) -> Cover {
        let Range { start, end } = view.queries();
        let budget = self.budget.keys(end as usize).unwrap_or(end as usize) as u32;
        let sinks = self.sinks.min(start);
        let local = start.saturating_sub(self.local).max(sinks);
        let mut left = budget.saturating_sub(sinks + end - local);
        let mut runs = vec![(0, sinks), (local, start)];
        let mut order: Vec<usize> = (0..chunks.len()).collect();
        order.sort_unstable_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        for c in order {
            let (from, to) = (chunks[c].0.max(sinks), chunks[c].1.min(local));
            if left == 0 {
                break;
            }
            if from < to {
                let taken = left.min(to - from);
                runs.push((from, from + taken));
                left -= taken;
            }
        }
        runs.sort_unstable();
        let mut builder = Builder::new(self.block as u32, view.queries());
        builder.push(runs);
        builder.finish()
    }
}
