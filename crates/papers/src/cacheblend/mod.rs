//! cacheblend: documents computed once are reused anywhere in a prompt, and the rows that this makes most wrong are computed again.
//!
//! # What it does
//! Every document is computed alone behind what stands in front of the documents, and kept. In a prompt it is moved to its place by
//! rotation and read where it lies. Then the prompt is mended layer by layer: layer 0 runs for all rows, layer 1 compares fresh
//! values with the stored ones, and only the share `ratio` of document rows that differ most goes on, together with the question.
//!
//! # When it helps
//! Retrieval prompts whose documents come back in other orders and combinations, where a cache of prefixes finds nothing. It keeps what
//! one document says about another, which reuse alone and `ape` lose. It does not help with documents that are seen once: computing
//! them alone costs as much as a prompt.
//!
//! # Steps
//! 1. (Section 4.1 of the paper) Chunks stand one after the other. A chunk computed at one place is read at another by turning the query
//!    by the distance, so that no key is copied or rotated.
//! 2. (4.2) Layer 1 computes keys and values of all rows, and measures how far the values are from the stored ones.
//! 3. (4.3) The rows that differ most go on; with `schedule=gradual` every layer selects again, out of the rows of the layer before.
//! 4. Fresh rows hide the stored ones for this request alone: the chunk itself never changes.
//! 5. The question's rows are computed in every layer. Every row sees the keys at positions up to its own.
//!
//! # Knobs
//! `ratio=0` reuses chunks as they are, `ratio=1` is ordinary prefill up to rounding.
//!
//! # Cost
//! Of the matrix products of full prefill `(1 + a + ratio (L - 1)) / L` are left, with `a` the share of a layer that projects to queries,
//! keys and values: 0.19 at `ratio=0.15` for 24 layers. The fresh rows take memory of their own: one layer's worth of all document
//! rows, and `ratio` of the other layers', beside the stored rows that they hide: the reported share `kept` is above 1.
//!
//! # Differences from the paper
//! - The official code masks the gathered queries by their order, so that they see hundreds of later keys. Here each sees exactly what
//!   it would see in the whole prompt.
//! - It forces only the last token of the question into the selection; here all of it is computed.
//! - It stores keys before rotation and rotates them in place; here they are stored rotated and the query moves.
//! - Chunks are computed behind the tokens that stand in front of the documents rather than behind the first token alone.
//! - The paper gives no numbers for gradual filtering; the share falls linearly by 30 % around its mean.
//! - Loading is not overlapped with computing layer by layer: reading a chunk from disk is far faster than mending it here.
//!
//! # References
//! Yao et al., CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion, EuroSys 2025, arXiv 2405.16444.

mod plan;
pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use antefix_attention::Deviation;
use antefix_attention::method::{Axis, Card, Kind, Knob, Knobs, Method, Need, Paper, Preset, Rig, RigError};

pub use plan::{Blending, Schedule};

/// The method.
pub struct CacheBlend;

static CARD: Card = Card {
    name: "cacheblend",
    title: "CacheBlend",
    axis: Axis::Context,
    exact: false,
    summary: "Reuses documents anywhere in a prompt and computes again the rows that differ most from full prefill.",
    paper: Paper {
        title: "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion",
        authors: "Yao et al.",
        year: 2025,
        reference: "EuroSys 2025, arXiv 2405.16444",
    },
    knobs: &[
        Knob {
            name: "ratio",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.15),
            unit: "of the document rows",
            help: "Share of document rows that are computed again, the mean over the layers",
            source: "section 4.2: the floor at which quality holds",
        },
        Knob {
            name: "schedule",
            kind: Kind::Choice(&["gradual", "single"]),
            default: Preset::Text("gradual"),
            unit: "",
            help: "Select again at every layer, or once at layer 1",
            source: "section 4.3; `single` is the official code",
        },
        Knob {
            name: "deviation",
            kind: Kind::Choice(&["v_l2", "k_l2", "kv_l2", "random", "first"]),
            default: Preset::Text("v_l2"),
            unit: "",
            help: "What rows are chosen by: distance of values, keys or both; the last two are baselines",
            source: "the official code; `k_l2` is LMCache's",
        },
    ],
    query_dependent: true,
    needs: &[Need::Documents],
    neutral: None,
    source: file!(),
};

impl Method for CacheBlend {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_chunk_use(Arc::new(Blending {
            ratio: knobs.float("ratio"),
            schedule: match knobs.text("schedule") {
                "single" => Schedule::Single,
                _ => Schedule::Gradual,
            },
            deviation: match knobs.text("deviation") {
                "k_l2" => Deviation::Keys,
                "kv_l2" => Deviation::Both,
                "random" => Deviation::Random(0),
                "first" => Deviation::First,
                _ => Deviation::Values,
            },
        }))
    }
}
