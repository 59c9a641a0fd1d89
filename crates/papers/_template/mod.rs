//! {{slug}}: one sentence that says what the method changes.
//!
//! # What it does
//! Two or three sentences in the vocabulary of ARCHITECTURE.md.
//!
//! # When it helps
//! Which models, which lengths, which loads; and when it does not.
//!
//! # Steps
//! 1. Numbered as in the paper, with the number of its section or equation. The code carries the same numbers.
//!
//! # Knobs
//! What the table of knobs cannot say; the table itself is made from the card.
//!
//! # Cost
//! Bytes read and products per step, against dense attention.
//!
//! # Differences from the paper
//! What we do otherwise, and why.
//!
//! # References
//! Authors, title, year, where it appeared.

use antefix_attention::method::{Axis, Card, Knobs, Method, Paper, Rig, RigError};

pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

/// The method.
pub struct {{Type}};

static CARD: Card = Card {
    name: "{{slug}}",
    title: "",
    axis: Axis::Prefill,
    exact: false,
    summary: "",
    paper: Paper {
        title: "",
        authors: "",
        year: 0,
        reference: "",
    },
    knobs: &[],
    query_dependent: false,
    needs: &[],
    neutral: None,
    source: file!(),
};

impl Method for {{Type}} {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, _knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        Err(rig.misfit("it is not written yet"))
    }
}
