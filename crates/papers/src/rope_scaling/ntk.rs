//! ntk_aware: a larger base, chosen so that the slowest pair is stretched by the factor.
//!
//! # What it does
//! Raises the base of the rotary embedding to `b s^(d / (d - 2))`: the fastest pair keeps its angles, the slowest is interpolated by exactly the factor.
//!
//! # When it helps
//! Without fine-tuning, for a few windows. Taking the factor by the length of the request, as here, is what is called dynamic NTK.
//!
//! # Steps
//! 1. `b <- b s^(d / (d - 2))`; all frequencies follow.
//!
//! # Knobs
//! `factor=1` leaves the model as it is. Requests inside the trained window are untouched, bit for bit, unless `always` is set.
//!
//! # Cost
//! None per token; the tables of angles are made once for each step of 2, 4, 8 ... windows.
//!
//! # Differences from the paper
//! The published form is a forum post; transformers recomputes the factor while a sequence grows, which spoils cached keys: here it is chosen once a request.
//!
//! # References
//! bloc97, NTK-aware scaled RoPE, 2023; described in Peng et al., arXiv 2309.00071, section 3.1.

use antefix_attention::method::{Axis, Card, Freq, Knobs, Method, Paper, Rig, RigError, Rotation};

use super::{ALWAYS, FACTOR};

/// The method.
pub struct NtkAware;

static CARD: Card = Card {
    name: "ntk_aware",
    title: "NTK-aware scaling (dynamic by length)",
    axis: Axis::Geometry,
    exact: false,
    summary: "Raises the rotary base so that the slowest pair is stretched by the factor.",
    paper: Paper {
        title: "NTK-aware scaled RoPE",
        authors: "bloc97",
        year: 2023,
        reference: "described in arXiv 2309.00071, section 3.1",
    },
    knobs: &[FACTOR, ALWAYS],
    query_dependent: false,
    needs: &[],
    neutral: Some("factor=1,always=false"),
    source: file!(),
};

impl Method for NtkAware {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        super::install(knobs, rig, |_, factor| Rotation {
            freq: Freq::Ntk { factor },
            ..Rotation::default()
        })
    }
}
