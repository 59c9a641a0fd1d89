//! compresskv: the few heads of each layer that find answers choose the rows that the whole layer keeps.
//!
//! # What it does
//! SnapKV lets all heads vote, and the many that only look at sinks and neighbours drown the few that know what matters. Here the votes
//! of the best `heads` semantic retrieval heads of each layer, measured once per model, choose one set of rows for all heads of the
//! layer; layers where eviction costs more may keep more.
//!
//! # When it helps
//! Long prompts with the question at their end and one answer, at budgets where SnapKV begins to lose facts. With the question hidden from
//! the window every method of this kind falls: use `razor_attention` there.
//!
//! # Steps
//! 1. (3.1) Semantic retrieval heads: those whose weights rest on the whole answer while they write it. Measured by
//!    `antefix analyse heads --kind semantic`, kept in a profile.
//! 2. (3.2) At the end of the prompt, the weights of the last `window` queries of the chosen heads are summed, smoothed and averaged
//!    over the heads; the best `cap - window` rows and the window stay, the same in every head of the layer.
//! 3. (3.3) `cap` of a layer: 32 rows, and the rest of `budget * L` in proportion to the layer's eviction error, which
//!    `antefix analyse heads --kind eviction` measures, at most three times the budget; uniform if the profile does not hold errors.
//!
//! # Knobs
//! A budget of at least the prompt changes nothing. Layers with a window of their own are left alone.
//!
//! # Cost
//! `heads * window` products of a query with all keys in each layer, once. One set of rows a layer: no ragged heads.
//!
//! # Differences from the paper
//! The published comparison weakens SnapKV by averaging query heads of different KV heads; ours does not, so the gap is smaller here. Errors of
//! layers are measured on the outputs of the heads, before the output matrix, and on needles instead of sixteen benchmarks.
//!
//! # References
//! Lin et al., CompressKV: semantic retrieval heads know what tokens are not important before generation, 2025, arXiv 2508.02401.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, CachePolicy, Card, Kind, Knob, Knobs, LayerEdit, LayerView, Method, Need, Paper, Preset, Rig,
    RigError, Sight,
};

use crate::heads::{self, KIND, profile_knob};
use crate::kv_baselines::snapkv::{BUDGET, KERNEL, SMOOTHING, Votes, window};
use crate::kv_baselines::window;

pub mod budget;
pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

/// The method.
pub struct CompressKv;

/// Rows that every layer keeps at least, the window included (3.3).
const LEAST: usize = 32;

static CARD: Card = Card {
    name: "compresskv",
    title: "CompressKV",
    axis: Axis::Kv,
    exact: false,
    summary: "The semantic retrieval heads of each layer choose the rows that the layer keeps.",
    paper: Paper {
        title: "CompressKV: semantic retrieval heads know what tokens are not important before generation",
        authors: "Lin et al.",
        year: 2025,
        reference: "arXiv 2508.02401",
    },
    knobs: &[
        BUDGET,
        window(8),
        KERNEL,
        SMOOTHING,
        Knob {
            name: "heads",
            kind: Kind::int(1, 1024),
            default: Preset::Int(4),
            unit: "heads a layer",
            help: "How many heads vote; all of them if the model has fewer",
            source: "section 3.2",
        },
        Knob {
            name: "layers",
            kind: Kind::Choice(&["error", "uniform"]),
            default: Preset::Text("error"),
            unit: "",
            help: "Budgets by the profile's eviction errors, where it holds them, or the same for all layers",
            source: "section 3.3",
        },
        profile_knob(
            "Profile of heads with the measurement semantic, from antefix analyse heads --kind semantic",
            "section 3.1",
        ),
    ],
    query_dependent: true,
    needs: &[Need::Profile(KIND)],
    neutral: Some("budget=1048576"),
    source: file!(),
};

impl Method for CompressKv {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let votes = Votes::new(knobs, rig)?;
        let facts = rig.facts();
        let profile = heads::load(knobs, rig, "semantic")?;
        let score = &profile.test("semantic")?.score;
        let (budget, layers) = (knobs.size("budget"), facts.full_layers().collect::<Vec<_>>());
        let errors = match (knobs.text("layers"), profile.find("eviction")) {
            ("error", Some(test)) => layers
                .iter()
                .map(|&l| f64::from(test.score[l][0].max(0.0)))
                .collect(),
            _ => vec![0.0; layers.len()],
        };
        // A budget below the least is uniform: there is nothing to spread.
        let rows = if budget < LEAST {
            vec![budget; layers.len()]
        } else {
            budget::allocate(
                &errors,
                budget,
                LEAST.max(votes.window + 1).min(budget),
                3 * budget,
            )
        };
        let mut caps = vec![usize::MAX; facts.layers.len()];
        layers.iter().zip(rows).for_each(|(&l, rows)| caps[l] = rows);
        rig.set_cache_policy(Arc::new(Compress {
            caps,
            voters: score.iter().map(|row| best(row, knobs.size("heads"))).collect(),
            votes,
        }))
    }
}

/// The `count` heads with the largest scores, best first, ties to the lower head.
pub fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut heads: Vec<usize> = (0..scores.len()).collect();
    heads.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    heads.truncate(count);
    heads
}

#[derive(Debug)]
struct Compress {
    /// Rows of each layer; layers with a window have no limit.
    caps: Vec<usize>,
    /// The heads of each layer that vote, `[L]`.
    voters: Vec<Vec<usize>>,
    votes: Votes,
}

impl CachePolicy for Compress {
    fn sight(&self, tokens: usize) -> Option<Sight> {
        let least = self.caps.iter().min().copied().unwrap_or(usize::MAX);
        (tokens > least).then_some(Sight {
            queries: self.votes.window,
        })
    }

    fn every(&self) -> Option<NonZeroUsize> {
        None
    }

    fn layer(&self, view: &LayerView<'_>) -> LayerEdit {
        let rows = view.rows(0).len();
        let cap = self.caps[view.layer];
        if rows <= cap {
            return LayerEdit::KeepAll;
        }
        // Step 2.
        let group = view.geometry.heads / view.geometry.kv_heads;
        let vote = |&head: &usize| self.votes.scores(view, head / group, &[head]);
        let scores: Vec<Vec<f32>> = self.voters[view.layer].iter().flat_map(vote).collect();
        LayerEdit::Rows(window::keep(&window::mean(&scores), rows, cap))
    }
}
