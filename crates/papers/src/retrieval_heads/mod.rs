//! retrieval_heads: the few heads that copy from the context into the answer.
//!
//! # What it does
//! Finds the heads whose largest weight stands on the very token of a hidden fact that is written next, while the fact is being written,
//! and ranks all heads by how much of the fact they copied. The same runs give the score of semantic retrieval heads, which `compresskv`
//! chooses by: the mass on the whole fact.
//!
//! # When it helps
//! Before a cache is compressed head by head (`razor_attention`, `compresskv`), and to find out whether an answer came from the context.
//! A model that does not answer from its context has no accepted run, and then there is no table.
//!
//! # Steps
//! 1. (2.1) A needle is hidden in prose and asked for; the place of its answer clause is known as tokens.
//! 2. (2.2) All of the prompt but its last token is computed as usual. Then at most 50 tokens are drawn greedily, and of every row of the
//!    step that produces a token `y` each head's largest key `j` is read: if `j` lies in the answer and holds `y`, the head gains
//!    1 / (length of the answer).
//! 3. (2.2) Runs count whose output has more than half of the answer's words; a head's score is its mean over them.
//! 4. (2.4) Heads are switched off while the answer is written, the best against as many others: what the best are good for.
//!
//! # Knobs
//! As a method of a request it does step 4. `mask=uniform` sets a head's query to zero, so that it reads all keys evenly (the paper's
//! program), `mask=zero` its output. Steps 1 to 3 are `antefix analyse heads --kind retrieval`, which writes the profile.
//!
//! # Cost
//! One more product of queries and keys in each step that draws a token; the prompt costs nothing extra.
//!
//! # Differences from the paper
//! The needle's place is kept in tokens, not searched for in the text; no special tokens stand inside the text; needles, prose and
//! question are our own; words are not stemmed; the random heads really leave out the best ones (a tenth of all heads).
//!
//! # References
//! Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, ICLR 2025, arXiv 2404.15574.

use antefix_attention::method::{Axis, Card, Kind, Knob, Knobs, Method, Need, Paper, Preset, Rig, RigError};

use crate::heads::{HEADS, KIND, choose, profile_knob};
use mask::{Mask, mask};

pub mod mask;
pub mod reference;
pub mod repro;
pub mod score;
#[cfg(test)]
mod tests;

/// The method: what is left of an answer without the heads that retrieve.
pub struct RetrievalHeads;

static CARD: Card = Card {
    name: "retrieval_heads",
    title: "Retrieval heads, switched off",
    axis: Axis::Hooks,
    exact: false,
    summary: "Switches the best retrieval heads of a profile off while the answer is written: what they are good for.",
    paper: Paper {
        title: "Retrieval Head Mechanistically Explains Long-Context Factuality",
        authors: "Wu et al.",
        year: 2025,
        reference: "arXiv 2404.15574",
    },
    knobs: &[
        Knob {
            name: "top",
            kind: Kind::int(0, 4096),
            default: Preset::Int(8),
            unit: "heads",
            help: "How many of the best heads are switched off",
            source: "section 4; 30 and more in models of 1,024 heads",
        },
        Knob {
            name: "score",
            kind: Kind::Choice(&["retrieval", "semantic"]),
            default: Preset::Text("retrieval"),
            unit: "",
            help: "Which measurement of the profile ranks them",
            source: "section 2; semantic: compresskv, section 3.1",
        },
        Knob {
            name: "mask",
            kind: Kind::Choice(&["uniform", "zero"]),
            default: Preset::Text("uniform"),
            unit: "",
            help: "Even attention over all keys, or no output",
            source: "uniform: the paper's program",
        },
        profile_knob("Profile of heads, from antefix analyse heads", "ours"),
        HEADS,
    ],
    query_dependent: false,
    needs: &[Need::Profile(KIND)],
    neutral: Some("top=0"),
    source: file!(),
};

impl Method for RetrievalHeads {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let test = match knobs.text("score") {
            "semantic" => "semantic",
            _ => "retrieval",
        };
        let heads = choose(knobs, rig, test, knobs.size("top"))?;
        let mode = match knobs.text("mask") {
            "zero" => Mask::Zero,
            _ => Mask::Uniform,
        };
        rig.set_hooks(&mask(&heads, mode))
    }
}
