//! yarn: NTK by parts with sharper scores.
//!
//! # What it does
//! Interpolates slow pairs and keeps fast ones (ramp over the pair index, as the released code has it), and multiplies all scores by `m^2`.
//!
//! # When it helps
//! The usual choice for models that were fine-tuned with it; also without fine-tuning.
//!
//! # Steps
//! 1. Ramp between the pairs that make 32 turns and 1 turn inside the trained window.
//! 2. (Section 3.3 of the paper) `m = 0.1 ln s + 1` on cosines and sines of queries and keys alike, so `m^2` on the scores.
//!
//! # Knobs
//! `factor=1` leaves the model as it is. Requests inside the trained window are untouched, bit for bit, unless `always` is set.
//!
//! # Cost
//! None per token; the tables of angles are made once for each step of 2, 4, 8 ... windows.
//!
//! # Differences from the paper
//! The factor is folded into the query: keys in the cache stay free of it.
//!
//! # References
//! Peng et al., YaRN: efficient context window extension of large language models, 2023, arXiv 2309.00071.

use antefix_attention::method::{
    Axis, Card, Freq, Knobs, Method, Paper, Rig, RigError, Rotation, ScoreScale,
};

use super::{ALWAYS, FACTOR};

/// The method.
pub struct Yarn;

static CARD: Card = Card {
    name: "yarn",
    title: "YaRN",
    axis: Axis::Geometry,
    exact: false,
    summary: "Interpolates slow rotary pairs and sharpens all scores by a constant.",
    paper: Paper {
        title: "YaRN: efficient context window extension of large language models",
        authors: "Peng et al.",
        year: 2023,
        reference: "arXiv 2309.00071",
    },
    knobs: &[FACTOR, ALWAYS],
    query_dependent: false,
    needs: &[],
    neutral: Some("factor=1,always=false"),
    source: file!(),
};

impl Method for Yarn {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        super::install(knobs, rig, |facts, factor| Rotation {
            freq: Freq::Yarn {
                factor,
                fast: 32.0,
                slow: 1.0,
                original: facts.context as f64,
            },
            scale: ScoreScale::Constant((0.1 * factor.ln() + 1.0).powi(2) as f32),
            ..Rotation::default()
        })
    }
}
