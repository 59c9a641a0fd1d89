//! Why training could not start, or stopped.

use std::path::PathBuf;

/// Errors of the trainer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A tensor operation failed: sizes that do not fit together.
    #[error("tensors: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A packing that means nothing.
    #[error(transparent)]
    Packing(#[from] crate::ops::PackingError),
    /// The base model cannot be loaded.
    #[error(transparent)]
    Load(#[from] antefix_models::error::LoadError),
    /// What the trainer cannot do with this model.
    #[error("this model cannot be trained: {0}")]
    Unsupported(String),
    /// A file cannot be read or written.
    #[error("{}: {source}", .file.display())]
    Io {
        /// Which file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint, adapter or data file has other contents than it should.
    #[error("{}: {what}", .file.display())]
    File {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A recipe that cannot be run.
    #[error("{0}")]
    Recipe(String),
    /// The loss is not a number, infinite or above its bound.
    #[error("diverged at step {step}: the loss is {loss}")]
    Diverged {
        /// Steps done before.
        step: u64,
        /// What the loss was.
        loss: f64,
    },
}

impl TrainError {
    /// An I/O error of `file`.
    pub fn io(file: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let file = file.into();
        move |source| Self::Io { file, source }
    }

    /// Wrong contents of `file`.
    pub fn file(file: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Self::File {
            file: file.into(),
            what: what.into(),
        }
    }
}
