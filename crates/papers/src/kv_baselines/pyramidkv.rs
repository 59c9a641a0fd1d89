//! pyramidkv: lower layers keep more rows than upper ones, chosen as in SnapKV.
//!
//! # What it does
//! Attention of lower layers is spread over the whole text, that of upper layers rests on few tokens. The budget falls from the first layer to the last along a
//! line, with the same sum as a uniform one.
//!
//! # When it helps
//! As `snapkv`, at small budgets.
//!
//! # Steps
//! 1. (Section 3.2 of the paper; numbers as in the released code) With `c = budget - window` rows before the window: the last layer gets
//!    `c / beta` of them, the first `2 c` less that; if the first would get more than there are, both move.
//! 2. The layers between lie on the line, rounded down.
//! 3. Rows are chosen as in `snapkv`. Prompts shorter than `2 c` are cut uniformly, prompts that fit the budget not at all.
//!
//! # Knobs
//! A budget of at least the prompt changes nothing. Layers with a window of their own are left alone and do not count.
//!
//! # Cost
//! As `snapkv`.
//!
//! # Differences from the paper
//! Rows are chosen per KV head, as in our `snapkv`.
//!
//! # References
//! Cai et al., PyramidKV: dynamic KV cache compression based on pyramidal information funneling, 2024, arXiv 2406.02069.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, CachePolicy, Card, Kind, Knob, Knobs, LayerEdit, LayerView, Method, Paper, Preset, Rig, RigError,
    Sight,
};

use super::snapkv::{BUDGET, KERNEL, SMOOTHING, Votes, window};

/// The method.
pub struct PyramidKv;

static CARD: Card = Card {
    name: "pyramidkv",
    title: "PyramidKV",
    axis: Axis::Kv,
    exact: false,
    summary: "SnapKV with budgets that fall from the first layer to the last.",
    paper: Paper {
        title: "PyramidKV: dynamic KV cache compression based on pyramidal information funneling",
        authors: "Cai et al.",
        year: 2024,
        reference: "arXiv 2406.02069",
    },
    knobs: &[
        BUDGET,
        window(8),
        KERNEL,
        SMOOTHING,
        Knob {
            name: "beta",
            kind: Kind::int(1, 1000),
            default: Preset::Int(20),
            unit: "",
            help: "The last layer keeps the beta-th part of the mean",
            source: "the released code",
        },
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("budget=1048576"),
    source: file!(),
};

impl Method for PyramidKv {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let votes = Votes::new(knobs, rig)?;
        let policy = Pyramid {
            budget: knobs.size("budget"),
            beta: knobs.size("beta"),
            layers: rig.facts().full_layers().collect(),
            votes,
        };
        rig.set_cache_policy(Arc::new(policy))
    }
}

#[derive(Debug)]
struct Pyramid {
    budget: usize,
    beta: usize,
    /// Layers without a window, ascending.
    layers: Vec<usize>,
    votes: Votes,
}

/// Rows before the window that the `at`-th of `layers` layers keeps, of `past` rows there are: steps 1 and 2.
fn share(mean: usize, beta: usize, past: usize, at: usize, layers: usize) -> usize {
    if past < 2 * mean {
        return mean;
    }
    let mut least = mean / beta;
    let mut most = 2 * mean - least;
    if most >= past {
        most = past;
        least = 2 * mean - most;
    }
    most - at * ((most - least) / layers.saturating_sub(1).max(1))
}

impl CachePolicy for Pyramid {
    fn sight(&self, tokens: usize) -> Option<Sight> {
        (tokens > self.budget).then_some(Sight {
            queries: self.votes.window,
        })
    }

    fn every(&self) -> Option<NonZeroUsize> {
        None
    }

    fn layer(&self, view: &LayerView<'_>) -> LayerEdit {
        let rows = view.rows(0).len();
        let Ok(at) = self.layers.binary_search(&view.layer) else {
            return LayerEdit::KeepAll;
        };
        if rows <= self.budget {
            return LayerEdit::KeepAll;
        }
        let window = view.seen();
        let past = share(
            self.budget - self.votes.window,
            self.beta,
            rows - window,
            at,
            self.layers.len(),
        );
        // Step 3.
        self.votes.per_head(view, past + window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_conforms() {
        antefix_conformance::method::check(&PyramidKv);
    }

    #[test]
    fn budgets_fall_along_a_line_with_the_sum_of_a_uniform_one() {
        // c = 248, beta = 20: 484 down to 12 over 32 layers, step 15.
        let shares: Vec<usize> = (0..32).map(|l| share(248, 20, 8000, l, 32)).collect();
        assert_eq!((shares[0], shares[1], shares[31]), (484, 469, 484 - 31 * 15));
        let sum: usize = shares.iter().sum();
        assert!((sum as i64 - 248 * 32).unsigned_abs() < 32 * 16, "{sum}");
        // The first layer cannot keep more than there is.
        assert_eq!(share(100, 20, 200, 0, 5), 195);
        assert_eq!(share(100, 1, 205, 0, 5), 100);
        assert_eq!(share(100, 20, 199, 3, 5), 100, "short prompts are cut uniformly");
        assert_eq!(share(100, 20, 1000, 0, 1), 195, "one layer is the first");
    }
}
