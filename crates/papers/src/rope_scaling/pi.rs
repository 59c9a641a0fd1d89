//! position_interpolation: positions are squeezed into the trained range.
//!
//! # What it does
//! Divides every frequency of the rotary embedding by the factor, so that position `p` gets the angles that `p / factor` had in training.
//!
//! # When it helps
//! After fine-tuning. Without it neighbouring tokens come closer than ever seen in training, and text inside the old window suffers, too.
//!
//! # Steps
//! 1. (Section 2 of the paper) `f_i <- f_i / s` for all pairs.
//!
//! # Knobs
//! `factor=1` leaves the model as it is. Requests inside the trained window are untouched, bit for bit, unless `always` is set.
//!
//! # Cost
//! None per token; the tables of angles are made once for each step of 2, 4, 8 ... windows.
//!
//! # Differences from the paper
//! Without the fine-tuning that the paper does.
//!
//! # References
//! Chen et al., Extending context window of large language models via positional interpolation, 2023, arXiv 2306.15595.

use antefix_attention::method::{Axis, Card, Freq, Knobs, Method, Paper, Rig, RigError, Rotation};

use super::{ALWAYS, FACTOR};

/// The method.
pub struct PositionInterpolation;

static CARD: Card = Card {
    name: "position_interpolation",
    title: "Position interpolation",
    axis: Axis::Geometry,
    exact: false,
    summary: "Divides all rotary frequencies by the factor.",
    paper: Paper {
        title: "Extending context window of large language models via positional interpolation",
        authors: "Chen et al.",
        year: 2023,
        reference: "arXiv 2306.15595",
    },
    knobs: &[FACTOR, ALWAYS],
    query_dependent: false,
    needs: &[],
    neutral: Some("factor=1,always=false"),
    source: file!(),
};

impl Method for PositionInterpolation {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        super::install(knobs, rig, |_, factor| Rotation {
            freq: Freq::Linear { factor },
            ..Rotation::default()
        })
    }
}
