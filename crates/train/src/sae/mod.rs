//! Training of sparse dictionaries of activations (paper `attention_sae`, sections 3.1 to 3.3 and 3.8): handwritten gradients that touch
//! only active features, over dense products for the encoder.
//!
//! [`SaeConfig`] is what is trained and how; [`Trainer`] takes rows step by step, and [`Trainer::export`] gives the dictionary that the
//! engine and SAELens read.

pub mod baselines;
pub mod checkpoint;
pub mod config;
pub mod features;
pub mod gradient;
#[cfg(test)]
mod on_models;
pub mod page;
pub mod params;
pub mod splice;
#[cfg(test)]
mod tests;
pub mod trainer;

pub use checkpoint::CheckpointError;
pub use config::{Bias, ConfigError, Init, Loss, RawSae, SaeConfig};
pub use gradient::{Outcome, gradients};
pub use params::Params;
pub use trainer::{Report, Trainer};
