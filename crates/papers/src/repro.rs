//! Reproductions: what a paper claims, measured again at our scale, and judged by a stated rule.
//!
//! A paper's `repro.rs` says what is claimed, which sweep and which baselines answer it, and from which figures on it counts as
//! reproduced. It measures through [`Lab`], which the crate `antefix-lab` implements over the engine: papers never see it.

mod planned;

use std::ops::Range;

use antefix_attention::method::Facts;
use serde::Serialize;
use serde_json::Value;

use crate::heads::HeadTest;

#[cfg(test)]
pub(crate) use planned::made;
pub use planned::{Drawn, Prefill, between, common_recall, prefill, rows, speedup};

/// A paper's claim and how it is looked into.
pub struct Repro {
    /// The claim.
    pub claim: Claim,
    /// Measures and judges.
    pub run: fn(&mut dyn Lab, Scale) -> Result<Outcome, LabError>,
}

/// What a paper says, and how it is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The name people write: the method's, where there is one.
    pub slug: &'static str,
    /// What the paper says, with its figures.
    pub says: &'static str,
    /// Where it says so.
    pub source: &'static str,
    /// From which figures on the claim counts as reproduced, and as partly reproduced.
    pub rule: &'static str,
    /// The smallest of our models on which it says something, by its alias; [`NO_MODEL`] where it needs none.
    pub model: &'static str,
    /// The model of short runs: a smaller one where the other takes minutes for a prompt.
    pub fast_model: &'static str,
}

impl Claim {
    /// The model of a run.
    pub fn model_for(&self, scale: Scale) -> &'static str {
        scale.pick(self.fast_model, self.model)
    }
}

/// How much is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Minutes: short texts, few samples.
    Fast,
    /// What a figure that is quoted needs.
    Full,
}

impl Scale {
    /// One of two settings.
    pub fn pick<T>(self, fast: T, full: T) -> T {
        match self {
            Self::Fast => fast,
            Self::Full => full,
        }
    }
}

/// Whether a claim was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// All of it.
    Reproduced,
    /// A part, or less of it than claimed.
    Partly,
    /// None of it.
    Not,
}

impl Verdict {
    /// All, some or none of the parts of a claim.
    pub fn of(parts: &[bool]) -> Self {
        match parts.iter().filter(|&&p| p).count() {
            0 => Self::Not,
            n if n == parts.len() => Self::Reproduced,
            _ => Self::Partly,
        }
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reproduced => "reproduced",
            Self::Partly => "partly",
            Self::Not => "not",
        }
    }
}

/// A verdict with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// Whether the claim was seen.
    pub verdict: Verdict,
    /// The figures that decided.
    pub why: String,
}

/// What came of a reproduction.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What `measured` and `baseline` are.
    pub unit: &'static str,
    /// The method's figure.
    pub measured: f64,
    /// The same of what it is compared with.
    pub baseline: f64,
    /// What was run: lengths, samples.
    pub scale: String,
    /// Whether the claim was seen.
    pub judgement: Judgement,
    /// All figures, one object a row.
    pub rows: Vec<Value>,
}

/// Why there is no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// The model cannot do what the experiment asks of it: it says nothing about the method.
    #[error("{0}")]
    Model(String),
    /// Something else.
    #[error("{0}")]
    Failed(String),
}

/// Methods of a run, as the command line writes them; none: dense attention.
pub type Way<'a> = &'a [&'a str];

/// Questions of one task about long texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Quiz {
    /// A task's name, as `antefix eval` takes it.
    pub task: &'static str,
    /// Tokens of a prompt.
    pub length: usize,
    /// Where facts stand, 0 to 1.
    pub depths: &'static [f64],
    /// Questions for each depth.
    pub samples: usize,
    /// Digits of hidden numbers.
    pub digits: u32,
    /// Decides the questions.
    pub seed: u64,
    /// A cache policy decides before it has seen the question.
    pub question_after_cut: bool,
    /// A prompt is computed once for all methods that start from it densely: the same answers, but no times to the first token.
    pub reuse_prompts: bool,
}

/// How questions were answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recall {
    /// Questions.
    pub n: usize,
    /// Mean share of the answers that were found.
    pub accuracy: f64,
    /// Mean share of the bytes of keys and values that were kept.
    pub kept: f64,
    /// Median seconds to the first token.
    pub ttft_s: f64,
}

/// What a model thinks of the right answer to one question.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Belief {
    /// Mean log-probability of the answer's tokens, nats.
    pub log_p: f64,
    /// Mean KL divergence from dense attention at these tokens, nats.
    pub kl: f64,
    /// Share of these tokens with the same most likely token as under dense attention.
    pub top1: f64,
    /// Share of the bytes of keys and values that were kept.
    pub kept: f64,
}

/// Likelihood of a stretch of positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stretch {
    /// Positions.
    pub positions: Range<usize>,
    /// Tokens scored.
    pub n: usize,
    /// Mean negative log-likelihood, nats.
    pub nll: f64,
}

/// Prompts of documents that were computed before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Library {
    /// Documents of a prompt.
    pub documents: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Tokens of the question.
    pub question: usize,
    /// Tokens of the answer.
    pub answer: usize,
    /// Prompts, each with its documents in an order of its own.
    pub prompts: usize,
    /// Decides texts and orders.
    pub seed: u64,
}

/// What reusing documents cost and lost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reuse {
    /// `full`, `prefix`, or the method.
    pub way: String,
    /// Tokens of a prompt.
    pub tokens: usize,
    /// Median seconds to the logits of the first token.
    pub ttft_s: f64,
    /// Times faster than full prefill: median of pairs that ran one after the other.
    pub speedup: f64,
    /// Median seconds to the last token of the answer.
    pub end_s: f64,
    /// Times faster than full prefill and the same answer, likewise.
    pub end_speedup: f64,
    /// Mean KL divergence from full prefill over the last tokens of the prompts, nats.
    pub kl: f64,
    /// Share of these tokens with the same most likely token.
    pub top1: f64,
}

#[cfg(test)]
impl Reuse {
    /// For tests of rules: only these figures count.
    pub(crate) fn made_up(tokens: usize, speedup: f64, kl: f64) -> Self {
        Self {
            way: String::new(),
            tokens,
            ttft_s: 1.0 / speedup,
            speedup,
            end_s: 2.0 / speedup,
            end_speedup: speedup,
            kl,
            top1: 1.0,
        }
    }
}

/// A measurement of heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadSearch {
    /// `retrieval`, `semantic`, `induction`, `echo`, `act`.
    pub kind: &'static str,
    /// Needle runs, repeated texts, or labelled examples.
    pub runs: usize,
    /// Tokens of each.
    pub lengths: &'static [usize],
    /// Decides the data.
    pub seed: u64,
}

/// Recall with heads switched off.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Masked {
    /// The best heads (`top`) or others (`random`).
    pub which: &'static str,
    /// Heads switched off.
    pub heads: usize,
    /// Mean recall over the prompts, and over the draws.
    pub recall: f64,
}

/// One step of many sequences behind one prompt, with its keys shared and with a copy for each.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Together {
    /// Tokens of the prompt.
    pub prefix: usize,
    /// Sequences.
    pub batch: usize,
    /// Tokens a second of all sequences, shared: median over the steps.
    pub shared_tok_s: f64,
    /// The same without sharing.
    pub unshared_tok_s: f64,
    /// Median ratio of the times of steps that ran one after the other, unshared over shared.
    pub ratio: f64,
    /// Whether both wrote the same tokens.
    pub same_tokens: bool,
}

/// Instruments on one real model.
///
/// Everything is decided by the seeds; a way's profile of heads is called [`PROFILE`] and holds what [`Lab::heads`] has measured.
pub trait Lab {
    /// What the model is.
    fn facts(&self) -> &Facts;

    /// Asks the same questions under every way.
    ///
    /// # Errors
    /// When a task does not fit its length, a way does not fit the model, or the model fails.
    fn recall(&mut self, quiz: &Quiz, ways: &[Way<'_>]) -> Result<Vec<Recall>, LabError>;

    /// What the model thinks of the right answers under every way, one belief a question.
    ///
    /// # Errors
    /// As [`Lab::recall`].
    fn beliefs(&mut self, quiz: &Quiz, ways: &[Way<'_>]) -> Result<Vec<Vec<Belief>>, LabError>;

    /// Likelihood of `texts` texts of `length` tokens under every way, by position in stretches of `step`.
    ///
    /// # Errors
    /// When a way works on prompts and answers only, does not fit the model, or the model fails.
    fn likelihood(&mut self, text: &Passages, ways: &[Way<'_>]) -> Result<Vec<Vec<Stretch>>, LabError>;

    /// Times prompts of documents: in full, behind the cached prefix, and under every method that reuses documents.
    ///
    /// # Errors
    /// When a method does not reuse documents, or the model fails.
    fn reuse(&mut self, library: &Library, methods: &[&str]) -> Result<Vec<Reuse>, LabError>;

    /// Measures heads and puts the measurement into the profile.
    ///
    /// # Errors
    /// When the model does not answer the questions that this needs, or fails.
    fn heads(&mut self, search: &HeadSearch) -> Result<HeadTest, LabError>;

    /// Recall with so many of the best heads of `test` switched off, and as many others in `draws` draws.
    ///
    /// # Errors
    /// When the model fails.
    fn mask(
        &mut self,
        test: &HeadTest,
        search: &HeadSearch,
        counts: &[usize],
        draws: usize,
    ) -> Result<Vec<Masked>, LabError>;

    /// Decodes `steps` tokens of `batch` sequences behind one prompt of `prefix` tokens, step by step in turns with and without sharing.
    ///
    /// # Errors
    /// When it does not fit the model's context, or the model fails.
    fn together(&mut self, prefix: usize, batch: usize, steps: usize) -> Result<Together, LabError>;

    /// Computes one prompt of `length` tokens of real text densely and under every way, dense first; recall is measured on `rows` rows of a
    /// stretch that is planned.
    ///
    /// # Errors
    /// When the prompt does not fit the model's context, a way plans no prompts, or the model fails.
    fn prefill(&mut self, length: usize, rows: usize, ways: &[Way<'_>]) -> Result<Vec<Prefill>, LabError>;

    /// Draws `steps` tokens of real text behind a prompt of `length`, densely and under every way, dense first; again for every number of
    /// sequences in `batches`.
    ///
    /// # Errors
    /// When it does not fit the model's context, a way plans no drawn tokens, or the model fails.
    fn drawn(
        &mut self,
        length: usize,
        steps: usize,
        batches: &[usize],
        ways: &[Way<'_>],
    ) -> Result<Vec<Drawn>, LabError>;
}

/// Texts whose likelihood is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passages {
    /// Texts.
    pub texts: usize,
    /// Tokens of each.
    pub length: usize,
    /// Positions of a stretch.
    pub step: usize,
    /// Decides the texts.
    pub seed: u64,
}

/// Aliases of the models that reproductions run on.
pub const SMOLLM2: &str = "smollm2";
/// See [`SMOLLM2`].
pub const QWEN: &str = "qwen2.5-coder-0.5b";
/// What a claim says that needs no model.
pub const NO_MODEL: &str = "none";

/// Name of the profile of heads in which [`Lab::heads`] puts its measurements.
pub const PROFILE: &str = "repro";

/// The claim of this name.
///
/// # Errors
/// In words, with all names, when there is none.
pub fn find(claims: &[Claim], slug: &str) -> Result<Claim, String> {
    claims.iter().copied().find(|c| c.slug == slug).ok_or_else(|| {
        let names: Vec<&str> = claims.iter().map(|c| c.slug).collect();
        format!(
            "there is no reproduction `{slug}`\nhint: one of {}",
            names.join(", ")
        )
    })
}

/// Each method of `names` alone, as [`Option::as_slice`] makes a [`Way`] of it; `dense` is none.
pub fn alone(names: &[String]) -> Vec<Option<&str>> {
    names
        .iter()
        .map(|name| (name != "dense").then_some(name.as_str()))
        .collect()
}

/// A model that finds less than this without any method has nothing to lose.
const LEAST_RECALL: f64 = 0.5;

/// Whether `recall` of the dense model is worth comparing with; `what` names it in the error.
///
/// # Errors
/// When it is not.
pub fn enough(what: &str, recall: f64) -> Result<(), LabError> {
    match recall < LEAST_RECALL {
        true => Err(LabError::Model(format!(
            "{what} is {recall:.2}, below {LEAST_RECALL}"
        ))),
        false => Ok(()),
    }
}

/// Mean; 0 of nothing.
pub fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, n) = values
        .into_iter()
        .fold((0.0, 0usize), |(sum, n), x| (sum + x, n + 1));
    sum / n.max(1) as f64
}

/// Mean and its standard error; 0 and 0 of nothing.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let middle = mean(values.iter().copied());
    let variance =
        values.iter().map(|x| (x - middle).powi(2)).sum::<f64>() / (values.len().max(2) - 1) as f64;
    (middle, (variance / values.len().max(1) as f64).sqrt())
}

/// A row of `rows`: what was measured, with names beside it.
pub fn row(names: Value, measured: &impl Serialize) -> Value {
    let mut row = names;
    if let (Some(row), Ok(Value::Object(more))) = (row.as_object_mut(), serde_json::to_value(measured)) {
        row.extend(more);
    }
    row
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;
    use crate::{ALL, ALWAYS, REPROS, TRAINED, TRAINED_CLAIMS, WITHOUT_REPRO, claims};

    #[test]
    fn every_method_is_reproduced_or_says_why_not() {
        let reproduced: BTreeSet<&str> = claims().iter().map(|c| c.slug).collect();
        let excused: BTreeSet<&str> = WITHOUT_REPRO.iter().map(|w| w.0).collect();
        for method in ALL {
            let name = method.card().name;
            assert!(
                reproduced.contains(name) != excused.contains(name),
                "`{name}` is either in REPROS or in WITHOUT_REPRO"
            );
        }
        assert!(TRAINED.iter().all(|card| reproduced.contains(card.name)));
        let cards = || ALL.iter().map(|m| m.card()).chain(ALWAYS.iter().copied());
        let known = |name: &&str| cards().any(|card| card.name == *name);
        assert!(excused.iter().all(known), "{excused:?}");
        assert!(WITHOUT_REPRO.iter().all(|w| w.1.ends_with('.')));
    }

    #[test]
    fn reproductions_are_described_and_named_once() {
        for names in [
            REPROS.iter().map(|r| r.claim.slug).collect::<Vec<_>>(),
            TRAINED_CLAIMS.iter().map(|c| c.slug).collect(),
            claims().iter().map(|c| c.slug).collect(),
        ] {
            let sorted: BTreeSet<&str> = names.iter().copied().collect();
            assert_eq!(
                names,
                sorted.into_iter().collect::<Vec<_>>(),
                "ascending, each once"
            );
        }
        for c in claims() {
            let texts = [c.says, c.source, c.rule];
            assert!(texts.iter().all(|t| t.ends_with('.')), "{}: {texts:?}", c.slug);
        }
    }

    #[test]
    fn a_wrong_name_gets_all_names() {
        let all = claims();
        let error = find(&all, "nothing").err().unwrap();
        assert!(error.contains("`nothing`"));
        assert!(all.iter().all(|c| error.contains(c.slug)), "{error}");
        assert_eq!(find(&all, "cacheblend").unwrap().slug, "cacheblend");
    }

    #[test]
    fn all_some_or_none_of_a_claim() {
        assert_eq!(Verdict::of(&[true, true]), Verdict::Reproduced);
        assert_eq!(Verdict::of(&[false, true]), Verdict::Partly);
        assert_eq!(Verdict::of(&[false]), Verdict::Not);
    }

    #[test]
    fn the_error_is_that_of_the_mean() {
        let (middle, error) = mean_and_error(&[1.0, 2.0, 3.0, 4.0]);
        assert!((middle - 2.5).abs() < 1e-12);
        assert!((error - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
        assert_eq!(
            (mean_and_error(&[]), mean_and_error(&[7.0])),
            ((0.0, 0.0), (7.0, 0.0))
        );
    }

    #[test]
    fn a_row_has_names_and_figures() {
        let masked = Masked {
            which: "top",
            heads: 3,
            recall: 0.5,
        };
        let row = row(json!({"task": "needle"}), &masked);
        assert_eq!(
            row,
            json!({"task": "needle", "which": "top", "heads": 3, "recall": 0.5})
        );
    }
}
