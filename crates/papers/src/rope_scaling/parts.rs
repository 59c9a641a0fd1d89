//! ntk_by_parts: slow pairs are interpolated, fast ones kept.
//!
//! # What it does
//! Pairs that turn often inside the trained window keep their frequency, pairs that never complete a turn are divided by the factor, with a ramp between.
//!
//! # When it helps
//! Without fine-tuning or with little of it: local order is kept.
//!
//! # Steps
//! 1. (Section 3.2 of the paper) turns `r_i = L0 f_i / 2 pi`; weight `(r_i - 1) / (32 - 1)`, clamped to 0..1.
//! 2. `f_i <- w f_i + (1 - w) f_i / s`.
//!
//! # Knobs
//! `factor=1` leaves the model as it is. Requests inside the trained window are untouched, bit for bit, unless `always` is set.
//!
//! # Cost
//! None per token; the tables of angles are made once for each step of 2, 4, 8 ... windows.
//!
//! # Differences from the paper
//! None known.
//!
//! # References
//! Peng et al., YaRN: efficient context window extension of large language models, 2023, arXiv 2309.00071.

use antefix_attention::method::{Axis, Card, Freq, Knobs, Method, Paper, Rig, RigError, Rotation};

use super::{ALWAYS, FACTOR};

/// The method.
pub struct NtkByParts;

static CARD: Card = Card {
    name: "ntk_by_parts",
    title: "NTK by parts",
    axis: Axis::Geometry,
    exact: false,
    summary: "Divides only the slow rotary pairs by the factor, with a ramp over their turns.",
    paper: Paper {
        title: "YaRN: efficient context window extension of large language models",
        authors: "Peng et al.",
        year: 2023,
        reference: "arXiv 2309.00071, section 3.2",
    },
    knobs: &[FACTOR, ALWAYS],
    query_dependent: false,
    needs: &[],
    neutral: Some("factor=1,always=false"),
    source: file!(),
};

impl Method for NtkByParts {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        super::install(knobs, rig, |facts, factor| Rotation {
            freq: Freq::ByParts {
                factor,
                low: 1.0,
                high: 32.0,
                original: facts.context as f64,
            },
            ..Rotation::default()
        })
    }
}
