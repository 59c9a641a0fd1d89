//! llama3_rope: long wavelengths are divided, short ones kept, a ramp between.
//!
//! # What it does
//! Pairs whose wavelength is longer than the trained window are divided by the factor, pairs shorter than a quarter of it are kept, those between are blended.
//!
//! # When it helps
//! Models of the Llama 3.1 family have it in their files; here it is for models without.
//!
//! # Steps
//! 1. `L0 / wavelength` up to 1 is slow, from 4 on fast; weight `(L0 / wavelength - 1) / 3`, clamped to 0..1.
//! 2. `f_i <- w f_i + (1 - w) f_i / s`.
//!
//! # Knobs
//! `factor=1` leaves the model as it is. Requests inside the trained window are untouched, bit for bit, unless `always` is set.
//!
//! # Cost
//! None per token; the tables of angles are made once for each step of 2, 4, 8 ... windows.
//!
//! # Differences from the paper
//! The factor follows the length of the request.
//!
//! # References
//! Grattafiori et al., The Llama 3 herd of models, 2024, arXiv 2407.21783; the formula is in the released code.

use antefix_attention::method::{Axis, Card, Freq, Knobs, Method, Paper, Rig, RigError, Rotation};

use super::{ALWAYS, FACTOR};

/// The method.
pub struct Llama3;

static CARD: Card = Card {
    name: "llama3_rope",
    title: "Llama 3 RoPE scaling",
    axis: Axis::Geometry,
    exact: false,
    summary: "Divides rotary pairs of long wavelength by the factor.",
    paper: Paper {
        title: "The Llama 3 herd of models",
        authors: "Grattafiori et al.",
        year: 2024,
        reference: "arXiv 2407.21783",
    },
    knobs: &[FACTOR, ALWAYS],
    query_dependent: false,
    needs: &[],
    neutral: Some("factor=1,always=false"),
    source: file!(),
};

impl Method for Llama3 {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        super::install(knobs, rig, |facts, factor| Rotation {
            freq: Freq::Llama3 {
                factor,
                low: 1.0,
                high: 4.0,
                original: facts.context as f64,
            },
            ..Rotation::default()
        })
    }
}
