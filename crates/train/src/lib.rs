//! Training: operators with handwritten gradients, models, optimisers, checkpoints, recipes, and the papers that are trained.

pub mod aaren;
pub mod error;
pub mod harvest;
pub mod model;
pub mod ops;
pub mod optim;
pub mod prefix_grouper;
pub mod random;
pub mod repro;
pub mod run;
pub mod sae;

pub use self::error::TrainError;
