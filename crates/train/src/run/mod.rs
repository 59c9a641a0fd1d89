//! Runs: recipes, data, the loop, checkpoints, metrics, reports.

mod checkpoint;
mod data;
mod driver;
mod metrics;
mod model;
mod recipe;
mod report;

#[cfg(test)]
mod tests;

pub use self::checkpoint::Checkpoint;
pub use self::driver::{Finish, Progress, Watch, train};
pub use self::model::{Tokens, export, export_gguf};
pub use self::recipe::{RawData, RawLora, RawModel, RawObjective, RawSteps, RawTokenizer, Recipe};
