//! entropy_abf: a larger rotary base, and scores that grow sharper with the number of visible keys.
//!
//! # What it does
//! A rotary model fails beyond its trained window for two reasons: angles it has never met, and attention that spreads over more keys.
//! A larger base turns all pairs more slowly, so that far positions fall back into the trained range of angles; a factor on the scores
//! of each query row, the logarithm of its number of visible keys, undoes the spreading.
//!
//! # When it helps
//! Requests longer than the model's window, without changing a weight. Shorter requests are untouched, bit for bit.
//!
//! # Steps
//! 1. The smallest `s` of 2, 4, 8 ... windows that holds prompt and answer is chosen, once for the request.
//! 2. (Section 4 of the paper) The base becomes `base`, or without one `b s^(d / 2 i_c)`, where `i_c` is the first pair that does not
//!    complete a turn inside the trained window: the smallest base with which no slow pair leaves the range of its trained angles.
//! 3. The scores of the query at position `p` are multiplied by `max(1, ln(p + 1) / ln(from))`, in all layers but the first
//!    `skip_layers`, whose attention is broad by nature.
//!
//! # Knobs
//! `factor=1` leaves the model as it is. `from=0` and `base=0` stand for the trained window and the base of step 2. `base_only` leaves
//! step 3 out (ABF alone); `scale_only` leaves step 2 out.
//!
//! # Cost
//! One product a query row; tables of angles are made once for each `s`. Keys computed under different bases cannot be shared: each
//! geometry has its own prefixes in the cache.
//!
//! # Differences from the paper
//! The paper sets the base to 500,000 (50 times Llama 2's) and fine-tunes on 100 long conversations; without that the smallest sufficient
//! base disturbs local attention least, so step 2 is ours and 50 times is what `base` is for. The released code means to leave the first two layers
//! unscaled and does not (the attribute is set where nobody reads it): `skip_layers=0` is the code, 2 the paper. It also rounds the factor to
//! bf16; here it is f32.
//!
//! # References
//! Zhang et al., Extending LLMs' context window with 100 samples, 2024, arXiv 2401.07004.

use antefix_attention::method::{
    Axis, Card, Facts, Freq, Kind, Knob, Knobs, Method, Paper, Preset, Rig, RigError, Rotation, ScoreScale,
};

use crate::rope_scaling::{self, ALWAYS, FACTOR};

pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

/// The method.
pub struct EntropyAbf;

static CARD: Card = Card {
    name: "entropy_abf",
    title: "Entropy-aware ABF",
    axis: Axis::Geometry,
    exact: false,
    summary: "Raises the rotary base and sharpens scores by the logarithm of the visible keys, for requests beyond the trained window.",
    paper: Paper {
        title: "Extending LLMs' context window with 100 samples",
        authors: "Zhang et al.",
        year: 2024,
        reference: "arXiv 2401.07004",
    },
    knobs: &[
        FACTOR,
        Knob {
            name: "base",
            kind: Kind::float(0.0, 1e9),
            default: Preset::Float(0.0),
            unit: "",
            help: "The rotary base; 0: the smallest that keeps slow pairs in their trained range",
            source: "ours; 500,000 in the paper",
        },
        Knob {
            name: "from",
            kind: Kind::int(0, 1 << 20),
            default: Preset::Int(0),
            unit: "keys",
            help: "Visible keys from which scores are scaled; 0: the trained window",
            source: "section 4; 4,096 for Llama 2",
        },
        Knob {
            name: "skip_layers",
            kind: Kind::int(0, 1000),
            default: Preset::Int(2),
            unit: "layers",
            help: "First layers whose scores are not scaled",
            source: "section 4; 0 in the released code",
        },
        Knob {
            name: "parts",
            kind: Kind::Choice(&["both", "base_only", "scale_only"]),
            default: Preset::Text("both"),
            unit: "",
            help: "Which of the two changes are made",
            source: "ours, for ablations",
        },
        ALWAYS,
    ],
    query_dependent: false,
    needs: &[],
    neutral: Some("factor=1,always=false"),
    source: file!(),
};

impl Method for EntropyAbf {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let (base, from) = (knobs.float("base"), knobs.int("from"));
        if base > 0.0 && base < 2.0 {
            return Err(rig.senseless(format!("a base of {base} turns every pair at once")));
        }
        if from == 1 {
            return Err(rig.senseless("`from` is 0 or at least 2: the logarithm of 1 is 0"));
        }
        let parts = knobs.text("parts");
        let skip_layers = knobs.size("skip_layers");
        rope_scaling::install(knobs, rig, |facts, s| Rotation {
            // Step 2.
            freq: match parts {
                "scale_only" => Freq::Model,
                _ if base > 0.0 => Freq::Base { base },
                _ => Freq::Base {
                    base: smallest_base(facts, s),
                },
            },
            // Step 3.
            scale: match parts {
                "base_only" => ScoreScale::One,
                _ => ScoreScale::LogN {
                    from: if from > 0 {
                        from as u32
                    } else {
                        facts.context.max(2) as u32
                    },
                },
            },
            skip_layers,
        })
    }
}

/// The smallest base with which no pair that did not complete a turn inside the trained window leaves the range of its trained angles
/// on `s` windows (step 2).
pub fn smallest_base(facts: &Facts, s: f64) -> f64 {
    let (base, dims) = (rope_scaling::base(facts), rope_scaling::dims(facts));
    base * s.powf(dims / (2.0 * critical_pair(base, dims, facts.context as f64)))
}

/// The first pair that does not complete a turn in `window` positions, from 1 to the last pair.
fn critical_pair(base: f64, dims: f64, window: f64) -> f64 {
    let pair = dims / 2.0 * (window / std::f64::consts::TAU).ln() / base.ln();
    pair.ceil().clamp(1.0, (dims / 2.0 - 1.0).max(1.0))
}
