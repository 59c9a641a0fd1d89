//! Documents in a prompt: their tokens are those of their text alone, whatever stands around them, so that they can be found again.

use std::ops::Range;

use crate::tokenizer::{Specials, Tokenizer};

/// Tokens of a prompt with the places of its documents.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WithDocuments {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Where each document that is not empty lies, with the empty line behind it.
    pub documents: Vec<Range<usize>>,
}

impl From<Vec<u32>> for WithDocuments {
    fn from(tokens: Vec<u32>) -> Self {
        Self {
            tokens,
            documents: Vec::new(),
        }
    }
}

/// What stands for the documents in a text that is rendered before they are put in: no template writes it.
pub const MARK: &str = "\u{f8ff}antefix documents\u{f8ff}";

/// Tokens of `text`, in which [`MARK`] stands for `documents`, each followed by an empty line.
///
/// Special tokens count in `text`, not in documents. Without the mark the documents stand at the start of `text`.
pub fn encode(tokenizer: &Tokenizer, text: &str, documents: &[String]) -> WithDocuments {
    let (before, after) = text.split_once(MARK).unwrap_or(("", text));
    let mut out = WithDocuments {
        tokens: tokenizer.encode_prompt(before),
        documents: Vec::new(),
    };
    for document in documents {
        let from = out.tokens.len();
        out.tokens.extend(tokenizer.encode(document, Specials::Plain));
        let empty = out.tokens.len() == from;
        out.tokens.extend(tokenizer.encode("\n\n", Specials::Plain));
        // The line belongs to the document: it has the same tokens wherever it stands.
        if !empty {
            out.documents.push(from..out.tokens.len());
        }
    }
    out.tokens.extend(tokenizer.encode(after, Specials::Parse));
    out
}
