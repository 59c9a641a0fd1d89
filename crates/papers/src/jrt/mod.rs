//! jrt: the documents of a prompt are read twice.
//!
//! # What it does
//! Rewrites the prompt so that the model meets its documents a second time, and on request the question in front of them. When it
//! comes to the second copy the model has seen everything once and knows what matters. Weights, cache and attention are untouched: the
//! rewritten prompt is computed exactly.
//!
//! # When it helps
//! Where what a later token can see is bounded: sliding-window layers, or a cache that a policy cuts to a budget, so that the second
//! reading is compressed by a model that knows the question. A model with full attention has little to gain.
//!
//! # Steps
//! 1. (Section 3.1 of the paper) The prompt is cut into what stands before the documents, the documents, and the question behind them.
//! 2. The documents are written `times` times, a line break between the copies.
//! 3. With `question_first`, the question stands in front of the documents, too. The published prompts all do that, so that their gain
//!    mixes repetition with the question's place; here the two are separate switches.
//!
//! # Knobs
//! `times=1,question_first=false` gives the prompt back, token for token.
//!
//! # Cost
//! The prompt grows to `times` copies of the documents: that much more prefill and cache. The second copy shares nothing with the first,
//! because its positions and what stands before it differ; the first is an ordinary prefix that the next request finds cached, unless
//! `question_first` puts the question before it.
//!
//! # Differences from the paper
//! Only the prompt form is here, not the trained recurrent layers. The paper cuts a document to 950 tokens around the answer before it
//! doubles it; nothing is cut here.
//!
//! # References
//! Arora et al., Just read twice: closing the recall gap for recurrent language models, 2024, arXiv 2407.05483.

use std::sync::Arc;

use antefix_attention::method::{
    Axis, Card, Kind, Knob, Knobs, Method, Need, Paper, Preset, Prompt, PromptPass, Rig, RigError, Words,
};

pub mod repro;
#[cfg(test)]
mod tests;

/// The method.
pub struct Jrt;

static CARD: Card = Card {
    name: "jrt",
    title: "Just read twice (prompt form)",
    axis: Axis::Context,
    exact: true,
    summary: "Writes the documents of a prompt twice, so that they are read again by a model that has seen them.",
    paper: Paper {
        title: "Just read twice: closing the recall gap for recurrent language models",
        authors: "Arora et al.",
        year: 2024,
        reference: "arXiv 2407.05483",
    },
    knobs: &[
        Knob {
            name: "times",
            kind: Kind::int(1, 4),
            default: Preset::Int(2),
            unit: "copies",
            help: "How often the documents are written",
            source: "section 3.1",
        },
        Knob {
            name: "question_first",
            kind: Kind::Bool,
            default: Preset::Bool(false),
            unit: "",
            help: "Write the question in front of the documents, too",
            source: "ours; true in the paper's prompts",
        },
    ],
    query_dependent: false,
    needs: &[Need::Documents],
    neutral: Some("times=1,question_first=false"),
    source: file!(),
};

impl Method for Jrt {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.add_prompt_pass(Arc::new(Twice {
            times: knobs.size("times"),
            question_first: knobs.bool("question_first"),
        }));
        Ok(())
    }
}

/// The pass over the prompt.
#[derive(Debug)]
struct Twice {
    times: usize,
    question_first: bool,
}

impl PromptPass for Twice {
    fn rewrite(&self, prompt: Prompt, words: &dyn Words) -> Prompt {
        // Step 1: a prompt without documents has nothing to repeat.
        let (Some(first), Some(last)) = (prompt.documents.first(), prompt.documents.last()) else {
            return prompt;
        };
        let (from, to) = (first.start, last.end);
        let (before, question) = (&prompt.tokens[..from], &prompt.tokens[to..]);
        let line_break = words.encode("\n");
        let mut tokens = before.to_vec();
        // Step 3.
        if self.question_first {
            tokens.extend_from_slice(question);
            tokens.extend_from_slice(&line_break);
        }
        // Step 2.
        let mut documents = Vec::with_capacity(prompt.documents.len() * self.times);
        for copy in 0..self.times {
            if copy > 0 {
                tokens.extend_from_slice(&line_break);
            }
            let at = tokens.len();
            tokens.extend_from_slice(&prompt.tokens[from..to]);
            documents.extend(
                prompt
                    .documents
                    .iter()
                    .map(|d| d.start - from + at..d.end - from + at),
            );
        }
        tokens.extend_from_slice(question);
        Prompt { tokens, documents }
    }
}
