//! ape: documents are computed once, all at the same positions, and attended side by side.
//!
//! # What it does
//! Every document is computed alone behind one shared prefix and kept. A prompt reads any number of them in place, without computing a
//! row of them again. To look more like one document after the other, attention over all document rows together is sharpened by
//! a temperature and its total weight is damped by a power.
//!
//! # When it helps
//! Many independent passages or examples, more of them than fit into the model's window: positions are used again, so that only the
//! longest document counts. No document sees another: questions that need two of them are for `cacheblend`.
//!
//! # Steps
//! 1. (Section 4.1 of the paper) The prefix is computed as usual, `P` tokens.
//! 2. Document `i` is computed behind the prefix alone, at positions from `P`.
//! 3. The question begins at `P` plus the length of the longest document.
//! 4. (4.2) Scores of document rows are divided by `T`.
//! 5. (4.3) The log-sum-exp of all document rows together is multiplied by `S T` before it is merged with that of the prefix, the
//!    question and the answer. Once for all of them: per document it would be something else.
//!
//! # Knobs
//! `T=1,S=1` is plain parallel encoding. With one document it is then ordinary prefill up to rounding. Best values differ from model to
//! model and fall with the number of documents; the paper searches them from 0.1 to 1 on a validation set.
//!
//! # Cost
//! No document row is computed once it is stored. Decoding reads as many rows as it would of the same documents in line. Prefix, documents
//! and question end in pages of their own, so that a prompt holds up to one page a document more than dense attention would: the reported share
//! `kept` is a little above 1.
//!
//! # Differences from the paper
//! - The official code for Gemma applies `T` and `S` to the wrong part; here all models follow section 4.
//! - Log-sum-exps stay in f32: in bf16, as there, weights are off by up to 3 %.
//! - A soft cap comes before the temperature, so that `T=1` leaves the model as it is.
//! - In layers with a window, a document row is seen if its position, used again as it is, lies in the window.
//! - A prompt without anything in front of its documents is refused: each document would have a sink of its own.
//!
//! # References
//! Yang et al., APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding, ICLR 2025, arXiv 2502.05431.

pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use antefix_attention::method::{Axis, Card, Kind, Knob, Knobs, Method, Need, Paper, Preset, Rig, RigError};
use antefix_attention::{ChunkLayout, ChunkUse, Mend};

/// The method.
pub struct Ape;

static CARD: Card = Card {
    name: "ape",
    title: "APE",
    axis: Axis::Context,
    exact: false,
    summary: "Attends documents side by side, each computed once, at shared positions and with adjusted weight.",
    paper: Paper {
        title: "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding",
        authors: "Yang et al.",
        year: 2025,
        reference: "ICLR 2025, arXiv 2502.05431",
    },
    knobs: &[
        Knob {
            name: "T",
            kind: Kind::float(0.1, 2.0),
            default: Preset::Float(0.9),
            unit: "",
            help: "Temperature of the scores of document rows",
            source: "the official demo",
        },
        Knob {
            name: "S",
            kind: Kind::float(0.1, 2.0),
            default: Preset::Float(0.9),
            unit: "",
            help: "Scale of the documents' log-sum-exp; with the temperature it makes the power S T",
            source: "the official demo",
        },
    ],
    query_dependent: false,
    needs: &[Need::Documents],
    neutral: None,
    source: file!(),
};

impl Method for Ape {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_chunk_use(Arc::new(Parallel {
            temperature: knobs.float("T") as f32,
            scale: knobs.float("S") as f32,
        }))
    }
}

/// Documents side by side.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parallel {
    /// `T`.
    pub temperature: f32,
    /// `S`.
    pub scale: f32,
}

impl ChunkUse for Parallel {
    /// Steps 2 to 5.
    fn layout(&self, prefix: usize, chunks: &[usize]) -> ChunkLayout {
        ChunkLayout::side_by_side(prefix, chunks, self.temperature, self.scale * self.temperature)
    }

    fn mend(&self, _layers: usize, _rows: usize) -> Option<Mend> {
        None
    }
}
