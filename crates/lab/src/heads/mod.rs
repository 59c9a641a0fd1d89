//! What the heads of a model do: measured on real runs, kept as a profile that methods choose heads by.

mod calibration;
mod eviction;
mod mask;
mod needles;
mod patterns;

use std::sync::Arc;

use antefix_engine::EngineError;
use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::heads::{FORMAT, HeadProfile};
use antefix_papers::retrieval_heads::score::NoRuns;

use crate::plot::{self, HeatMap, PlotError};

pub use calibration::{Search, calibration};
pub use eviction::{Cut, eviction};
pub use mask::{MaskCurve, MaskPoint, mask_plot, masking};
pub use needles::{NeedleRun, NeedleRuns, retrieval};
pub use patterns::{Pattern, pattern};

#[cfg(test)]
mod tests;

/// A model under examination.
#[derive(Clone)]
pub struct Subject {
    /// The model.
    pub model: Arc<Model>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its name, for reports.
    pub name: String,
    /// SHA-256 of its file.
    pub sha256: String,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeadsError {
    /// The model could not run.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Nothing to score.
    #[error(transparent)]
    NoRuns(#[from] NoRuns),
    /// Hooks that do not fit: our mistake.
    #[error(transparent)]
    Hooks(#[from] antefix_attention::hooks::HookError),
    /// Rows that do not belong to what was asked.
    #[error("row {run} is of another run than the settings make\nhint: another --rows file")]
    OtherRuns {
        /// Number of the run.
        run: usize,
    },
    /// A prompt of that length cannot hold the needle, or does not fit the model.
    #[error("prompts of {length} tokens are not possible: from 128 to the model's {context} less 64")]
    Length {
        /// What was asked.
        length: usize,
        /// The model's context.
        context: usize,
    },
}

/// A picture of a table `[L][Hq]`, layers downwards; SVG.
///
/// # Errors
/// When there is nothing to draw.
pub fn heat_map(title: &str, score: &[Vec<f32>]) -> Result<String, PlotError> {
    let names = |n: usize| -> Vec<String> { (0..n).map(|i| i.to_string()).collect() };
    let values: Vec<f64> = score.iter().flatten().map(|&x| f64::from(x)).collect();
    let largest = values.iter().copied().fold(1e-6, f64::max);
    plot::heat_map(&HeatMap {
        title,
        axes: ("head", "layer"),
        columns: &names(score.first().map_or(0, Vec::len)),
        rows: &names(score.len()),
        values: &values,
        range: (0.0, largest),
    })
}

impl Subject {
    /// A profile without measurements.
    pub fn profile(&self) -> HeadProfile {
        let spec = self.model.spec();
        let local = |l: &usize| spec.layer_kinds[*l].window.is_some();
        HeadProfile {
            format: FORMAT.into(),
            model: self.name.clone(),
            sha256: self.sha256.clone(),
            engine: format!(
                "antefix {} {:?} {:?}",
                env!("CARGO_PKG_VERSION"),
                self.model.cpu().path(),
                self.model.precision()
            ),
            layers: spec.layers,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            local_layers: (0..spec.layers).filter(local).collect(),
            tests: Vec::new(),
        }
    }

    fn check_length(&self, length: usize) -> Result<(), HeadsError> {
        let context = self.model.spec().context;
        if length < 128 || length + 64 > context {
            return Err(HeadsError::Length { length, context });
        }
        Ok(())
    }
}
