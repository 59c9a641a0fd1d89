//! random: the cache keeps sinks, the most recent rows, and others drawn by lot.
//!
//! # What it does
//! Once the prompt is computed, every head keeps its first 4 rows, its last `window` rows and rows drawn without regard to anything,
//! `budget` in all.
//!
//! # When it helps
//! Never: it is the lower bound that every policy has to clear at the same budget.
//!
//! # Steps
//! 1. The first 4 rows and the last `window` stay.
//! 2. Of the others, as many as the budget leaves are drawn, for each layer and head anew, decided by `seed`.
//!
//! # Knobs
//! A budget of at least the prompt changes nothing. Layers with a window of their own are left alone.
//!
//! # Cost
//! None but the copy of the rows that stay.
//!
//! # Differences from the paper
//! There is no paper.
//!
//! # References
//! Random eviction is a baseline in most papers on cache compression.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, CachePolicy, Card, Fold, HeadEdit, Kind, Knob, Knobs, LayerEdit, LayerView, Method, Paper, Preset,
    Rig, RigError, Sight,
};

use super::snapkv::BUDGET;

/// The method.
pub struct Random;

const SINKS: usize = 4;

/// What decides a lot.
pub(crate) const SEED: Knob = Knob {
    name: "seed",
    kind: Kind::int(0, 1 << 30),
    default: Preset::Int(0),
    unit: "",
    help: "Decides which",
    source: "ours",
};

static CARD: Card = Card {
    name: "random_kv",
    title: "Random rows",
    axis: Axis::Kv,
    exact: false,
    summary: "Keeps rows of the cache drawn by lot: the lower bound for every policy.",
    paper: Paper {
        title: "A common baseline",
        authors: "no one",
        year: 2023,
        reference: "no publication of its own",
    },
    knobs: &[
        BUDGET,
        Knob {
            name: "window",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(32),
            unit: "rows",
            help: "Last rows that always stay",
            source: "ours",
        },
        SEED,
    ],
    query_dependent: false,
    needs: &[],
    neutral: Some("budget=1048576"),
    source: file!(),
};

impl Method for Random {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let (budget, window) = (knobs.size("budget"), knobs.size("window"));
        if window + SINKS >= budget {
            return Err(rig.senseless(format!(
                "{SINKS} sinks and a window of {window} leave nothing of a budget of {budget}"
            )));
        }
        rig.set_cache_policy(Arc::new(Lots {
            budget,
            window,
            seed: knobs.int("seed") as u64,
        }))
    }
}

#[derive(Debug)]
struct Lots {
    budget: usize,
    window: usize,
    seed: u64,
}

impl CachePolicy for Lots {
    fn sight(&self, tokens: usize) -> Option<Sight> {
        (tokens > self.budget).then_some(Sight::default())
    }

    fn every(&self) -> Option<NonZeroUsize> {
        None
    }

    fn layer(&self, view: &LayerView<'_>) -> LayerEdit {
        let rows = view.rows(0).len();
        if view.geometry.window.is_some() || rows <= self.budget {
            return LayerEdit::KeepAll;
        }
        let one = |head: usize| {
            let stream = (view.layer as u64) << 32 | head as u64;
            let mut lots = fastrand::Rng::with_seed(self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ stream);
            // Step 2.
            let mut keep = lots.choose_multiple(
                SINKS as u32..(rows - self.window) as u32,
                self.budget - self.window - SINKS,
            );
            // Step 1.
            keep.extend(0..SINKS as u32);
            keep.extend((rows - self.window) as u32..rows as u32);
            keep.sort_unstable();
            HeadEdit {
                keep,
                fold: Fold::Drop,
            }
        };
        LayerEdit::Heads((0..view.geometry.kv_heads).map(one).collect())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_conforms() {
        antefix_conformance::method::check(&super::Random);
    }
}
