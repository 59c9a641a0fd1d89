//! Training: operators with handwritten gradients, models, optimisers, checkpoints, recipes, and the papers that are trained.

pub mod ops;
