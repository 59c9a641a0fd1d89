//! How papers drive a real model: through a [`Host`], which never shows them the engine.

use std::sync::Arc;
use std::time::Duration;

use super::facts::Facts;
use super::program::Program;
use super::prompt::Prompt;

/// What a host computes.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    /// The prompt.
    pub prompt: Prompt,
    /// What follows it.
    pub answer: Answer,
    /// The methods; `None`: dense attention.
    pub program: Option<Arc<Program>>,
    /// Hand out the logits that every token of the answer was drawn from.
    pub logits: bool,
    /// Compute everything, whatever the cache of prefixes holds.
    pub fresh: bool,
    /// A cache policy decides before it has seen what stands behind the last document.
    pub question_after_cut: bool,
}

/// What follows a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The most likely tokens, at most so many; ends at the model's end token.
    Greedy(usize),
    /// These tokens, whatever the model thinks of them.
    Given(Vec<u32>),
}

impl Default for Answer {
    fn default() -> Self {
        Self::Greedy(1)
    }
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// Tokens of the answer.
    pub tokens: Vec<u32>,
    /// The logits that each was drawn from, `[vocab]` each, if they were asked for.
    pub logits: Vec<Vec<f32>>,
    /// Tokens of the prompt as computed: methods may have rewritten it.
    pub prompt_tokens: usize,
    /// Of those, found in the cache of prefixes.
    pub cached_tokens: usize,
    /// Bytes of keys and values held at the end, over those of dense attention, in whole pages; 1 without methods.
    pub kept: f64,
    /// From the request to its first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub rest: Duration,
}

/// Why a host could not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HostError(pub String);

/// A model that runs.
pub trait Host {
    /// What it is.
    fn facts(&self) -> &Facts;

    /// Tokens of `text`; special tokens in it are text.
    fn encode(&self, text: &str) -> Vec<u32>;

    /// Text of `tokens`.
    fn decode(&self, tokens: &[u32]) -> String;

    /// Methods as the command line writes them, one text each, installed on the model.
    ///
    /// # Errors
    /// When one is unknown, or they do not go together.
    fn install(&self, methods: &[&str]) -> Result<Arc<Program>, HostError>;

    /// Runs one request to its end.
    ///
    /// # Errors
    /// When it is refused or the model fails.
    fn ask(&mut self, ask: &Ask) -> Result<Told, HostError>;
}
