//! The seam in front of the model: a prompt is rewritten before it is computed.

use std::fmt::Debug;
use std::ops::Range;

/// A prompt, with the places of the documents in it if the request names any.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Where documents lie in `tokens`: ascending, disjoint, never empty.
    pub documents: Vec<Range<usize>>,
}

impl Prompt {
    /// A prompt without documents.
    pub fn plain(tokens: Vec<u32>) -> Self {
        Self {
            tokens,
            documents: Vec::new(),
        }
    }

    /// Whether the documents are ascending, disjoint, not empty and inside.
    pub fn is_sound(&self) -> bool {
        let mut at = 0;
        self.documents.iter().all(|d| {
            let sound = d.start >= at && d.start < d.end && d.end <= self.tokens.len();
            at = d.end;
            sound
        })
    }
}

/// Text of one's own becomes tokens through this.
pub trait Words {
    /// Tokens of `text`, without special ones.
    fn encode(&self, text: &str) -> Vec<u32>;
}

/// Rewrites a prompt before it is computed. Same prompt, same result.
pub trait PromptPass: Send + Sync + Debug {
    /// What is computed instead of `prompt`.
    fn rewrite(&self, prompt: Prompt, words: &dyn Words) -> Prompt;
}
