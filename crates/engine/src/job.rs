//! A request, checked: having a [`Job`] proves that it can run on the model it was made for.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use antefix_attention::hooks::Observer;
use antefix_attention::method::Program;
use antefix_kv::Keep;

use crate::constraint::BoxedConstraint;
use crate::sampler::{RawSampling, Sampling, SamplingError};
use crate::tail::Tail;

/// Alternatives that a request may ask for beside each token.
pub const MAX_TOP_LOGPROBS: usize = 64;

/// How the vectors of a prompt's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The last token's: it has seen all others.
    Last,
    /// Their mean.
    Mean,
}

/// What a caller asks for; nothing is trusted.
#[derive(Debug, Clone, Default)]
pub struct RawJob {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Tokens to generate at most; `None` = up to the model's context.
    pub max_tokens: Option<usize>,
    /// How to choose them.
    pub sampling: RawSampling,
    /// Texts at which to end.
    pub stop: Vec<String>,
    /// Go on after the model's end token.
    pub ignore_eos: bool,
    /// Requests share cached prefixes only under the same salt.
    pub salt: u64,
    /// Neither read nor fill the prefix cache.
    pub no_cache: bool,
    /// How long what it leaves in the prefix cache is kept.
    pub keep: Keep,
    /// Report every drawn token's log-probability.
    pub want_logprobs: bool,
    /// Report the log-probabilities of this many most likely tokens beside each drawn one; at most [`MAX_TOP_LOGPROBS`].
    pub top_logprobs: usize,
    /// Report the log-probability of every prompt token but the first. The whole prompt is then computed, cached or not.
    pub prompt_logprobs: bool,
    /// Who asks: waiting requests of different tenants take turns by the rows they have used.
    pub tenant: u64,
    /// Lower runs first; requests of equal priority take turns.
    pub priority: i32,
    /// When it ends, whatever it has by then.
    pub deadline: Option<Instant>,
    /// Hand out the raw logits of every drawn token.
    pub want_logits: bool,
    /// What the answer must follow.
    pub constraint: Option<BoxedConstraint>,
    /// Reads or changes activations; one for each request. Its owner takes out what it captured.
    pub hooks: Option<Arc<Observer>>,
    /// Where documents lie in the prompt: ascending, disjoint, not empty.
    pub documents: Vec<Range<usize>>,
    /// The methods that it runs under; none = dense attention. A report of methods comes with its end where there is a program, even if
    /// that is dense.
    pub program: Option<Arc<Program>>,
    /// The cache policy decides behind the last document, and the question is computed on what it left; otherwise it decides behind
    /// the whole prompt, and knows the question.
    pub question_after_cut: bool,
    /// Instead of an answer, one vector of the prompt: what the output matrix would be applied to, pooled. The mean needs every
    /// token's: the whole prompt is then computed, cached or not.
    pub pooling: Option<Pooling>,
}

/// Why a request cannot run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// No token to start from.
    #[error(
        "the prompt is empty\nhint: give at least one token; most models start with a begin-of-text token"
    )]
    Empty,
    /// The prompt alone fills the context.
    #[error(
        "the prompt has {prompt} tokens, the context holds {context}\nhint: shorten it or raise the context"
    )]
    TooLong {
        /// Its length.
        prompt: usize,
        /// The limit.
        context: usize,
    },
    /// A token that the model does not have.
    #[error("token {token} is not in the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Nothing to do.
    #[error("`max_tokens` is 0\nhint: ask for at least 1 token")]
    NoTokens,
    /// It needs more memory than there is, whatever else runs.
    #[error(
        "the request needs {need} bytes of KV cache, the capacity is {capacity}\nhint: lower max_tokens or raise the KV capacity"
    )]
    Memory {
        /// Bytes of pages.
        need: usize,
        /// Bytes of the pool.
        capacity: usize,
    },
    /// Too many alternatives.
    #[error("{asked} log-probabilities a token were asked for, at most {MAX_TOP_LOGPROBS} are given")]
    TopLogprobs {
        /// What was asked.
        asked: usize,
    },
    /// Documents that do not lie in the prompt one after the other.
    #[error("the documents do not lie in the prompt one after the other")]
    Documents,
    /// A method that works on documents, and none are there.
    #[error("`{method}` needs documents beside the question\nhint: {hint}")]
    NoDocuments {
        /// The method.
        method: &'static str,
        /// How to give some.
        hint: &'static str,
    },
    /// Hooks of one's own beside a method that has some.
    #[error("`{method}` has hooks itself\nhint: ask for the method or for hooks of your own")]
    HooksTwice {
        /// The methods.
        method: String,
    },
    /// Rows of reused documents are not computed, so nothing can be told of them.
    #[error("`{method}` does not compute the documents again, so that {what} cannot be told")]
    NotComputed {
        /// The methods.
        method: String,
        /// What was asked for.
        what: &'static str,
    },
    /// Documents that cannot be reused in this prompt.
    #[error(
        "`{method}` needs something in front of the documents and a question behind them\nhint: use a chat template or a system message"
    )]
    Bare {
        /// The methods.
        method: String,
    },
    /// Hooks that do not fit the model.
    #[error("{0}")]
    Hooks(String),
    /// A sampling setting.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

/// A request that can run.
#[derive(Debug, Clone)]
pub struct Job {
    pub(crate) tokens: Vec<u32>,
    pub(crate) max_tokens: usize,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    pub(crate) salt: u64,
    pub(crate) no_cache: bool,
    pub(crate) keep: Keep,
    pub(crate) want_logprobs: bool,
    pub(crate) top_logprobs: usize,
    pub(crate) prompt_logprobs: bool,
    pub(crate) tenant: u64,
    pub(crate) priority: i32,
    pub(crate) deadline: Option<Instant>,
    pub(crate) want_logits: bool,
    pub(crate) constraint: Option<BoxedConstraint>,
    pub(crate) hooks: Option<Arc<Observer>>,
    pub(crate) program: Arc<Program>,
    /// Whether the request named a program.
    pub(crate) reported: bool,
    /// Tokens of the prompt before methods rewrote it.
    pub(crate) prompt_before: usize,
    /// Tokens of the prompt behind which its cache policy decides first.
    pub(crate) decide_at: usize,
    /// The queries that its cache policy sees.
    pub(crate) tail: Option<Arc<Tail>>,
    pub(crate) pooling: Option<Pooling>,
    /// Where documents lie in the prompt, if they are reused.
    pub(crate) documents: Vec<Range<usize>>,
}

impl Job {
    /// Whether its whole prompt is computed, cached or not.
    pub(crate) fn recompute(&self) -> bool {
        self.prompt_logprobs
            || self.program.sees_all()
            || self.pooling == Some(Pooling::Mean)
            || self.hooks.as_ref().is_some_and(|h| h.plan().recompute())
    }

    /// Checks `raw` against a model's vocabulary and context. Its prompt is computed as it is: [`crate::Engine::job`] is for
    /// requests whose methods rewrite it.
    ///
    /// # Errors
    /// See [`JobError`].
    pub fn new(raw: RawJob, vocab: usize, context: usize) -> Result<Self, JobError> {
        let prompt = raw.tokens.len();
        if prompt == 0 {
            return Err(JobError::Empty);
        }
        if prompt >= context {
            return Err(JobError::TooLong { prompt, context });
        }
        if let Some(&token) = raw.tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(JobError::Token { token, vocab });
        }
        let asked = match raw.pooling {
            Some(_) => 1, // a place that stays empty
            None => raw.max_tokens.unwrap_or(usize::MAX),
        };
        let max_tokens = asked.min(context - prompt);
        if max_tokens == 0 {
            return Err(JobError::NoTokens);
        }
        if raw.top_logprobs > MAX_TOP_LOGPROBS {
            return Err(JobError::TopLogprobs {
                asked: raw.top_logprobs,
            });
        }
        Ok(Self {
            max_tokens,
            sampling: Sampling::try_from(raw.sampling)?,
            tokens: raw.tokens,
            stop: raw.stop,
            ignore_eos: raw.ignore_eos,
            // Pages that edits have marked are shared only with requests that make the same edits.
            salt: raw.hooks.as_ref().map_or(raw.salt, |h| h.salted(raw.salt)),
            no_cache: raw.no_cache,
            keep: raw.keep,
            want_logprobs: raw.want_logprobs,
            top_logprobs: raw.top_logprobs,
            prompt_logprobs: raw.prompt_logprobs,
            tenant: raw.tenant,
            priority: raw.priority,
            deadline: raw.deadline,
            want_logits: raw.want_logits,
            constraint: raw.constraint,
            hooks: raw.hooks,
            reported: raw.program.is_some(),
            program: raw.program.unwrap_or_default(),
            prompt_before: prompt,
            decide_at: prompt,
            tail: None,
            pooling: raw.pooling,
            documents: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(raw: RawJob) -> Result<Job, JobError> {
        Job::new(raw, 10, 8)
    }

    #[test]
    fn each_senseless_request_is_named() {
        assert_eq!(job(RawJob::default()).unwrap_err(), JobError::Empty);
        let e = job(RawJob {
            tokens: vec![1; 8],
            ..RawJob::default()
        })
        .unwrap_err();
        assert_eq!(
            e,
            JobError::TooLong {
                prompt: 8,
                context: 8
            }
        );
        let e = job(RawJob {
            tokens: vec![1, 10],
            ..RawJob::default()
        })
        .unwrap_err();
        assert_eq!(e, JobError::Token { token: 10, vocab: 10 });
        let e = job(RawJob {
            tokens: vec![1],
            max_tokens: Some(0),
            ..RawJob::default()
        })
        .unwrap_err();
        assert_eq!(e, JobError::NoTokens);
    }

    #[test]
    fn the_answer_ends_with_the_context() {
        assert_eq!(
            job(RawJob {
                tokens: vec![1; 5],
                max_tokens: Some(99),
                ..RawJob::default()
            })
            .unwrap()
            .max_tokens,
            3
        );
    }
}
