//! Reproductions of what is trained: the claims of `antefix_papers::TRAINED_CLAIMS`, measured. The others run in `antefix-lab`.

mod aaren;
mod attention_sae;
mod grouped;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::repro::{LabError, Outcome, Scale};

pub use grouped::{Trial, Way};

/// What a reproduction may use.
pub struct Ground<'a> {
    /// The model that the claim names, if it names one.
    pub model: Option<Subject<'a>>,
    /// Text to learn from.
    pub text: &'a [&'a str],
    /// A folder for what is too large for memory; the reproduction empties it.
    pub folder: &'a Path,
}

/// A model that runs.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The model.
    pub model: &'a Arc<Model>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its name.
    pub name: &'a str,
}

impl<'a> Ground<'a> {
    fn subject(&self) -> Result<Subject<'a>, LabError> {
        let none = || LabError::Failed("it needs a model".into());
        self.model.ok_or_else(none)
    }
}

/// Measures and judges.
pub type Run = fn(&Ground<'_>, Scale) -> Result<Outcome, LabError>;

/// How each claim of what is trained is measured, by its name.
pub const RUNS: &[(&str, Run)] = &[
    ("aaren", aaren::run),
    ("attention_sae", attention_sae::run),
    ("prefix_grouper", grouped::run),
];

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::Failed(error.to_string())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
