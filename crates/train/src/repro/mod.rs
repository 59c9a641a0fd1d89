//! Reproductions of what is trained: the claims of `antefix_papers::TRAINED_CLAIMS`, measured. The others run in `antefix-lab`.

pub mod aaren;
mod attention_sae;
mod grouped;
#[cfg(test)]
mod tests;

use std::path::Path;

use antefix_lab::heads::Subject;
use antefix_papers::repro::{LabError, Outcome, Scale};

pub use grouped::{Trial, Way};

/// What a reproduction may use.
pub struct Ground<'a> {
    /// The model that the claim names, if it names one.
    pub model: Option<&'a Subject>,
    /// Text to learn from.
    pub text: &'a [&'a str],
    /// A folder for what is too large for memory; the reproduction empties it.
    pub folder: &'a Path,
}

impl<'a> Ground<'a> {
    fn subject(&self) -> Result<&'a Subject, LabError> {
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
