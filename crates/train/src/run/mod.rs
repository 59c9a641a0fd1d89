//! Runs: recipes, data, the loop, checkpoints, metrics, reports.

mod checkpoint;
mod data;
mod driver;
mod look;
mod metrics;
mod model;
mod recipe;
mod report;
mod served;
mod steps;

#[cfg(test)]
mod tests;

pub use self::checkpoint::Checkpoint;
pub use self::data::{RawIds, Synthetic};
pub use self::driver::{Finish, Progress, Watch, train};
pub use self::model::{Tokens, export, export_gguf};
pub use self::recipe::{
    RawData, RawFormat, RawLora, RawModel, RawObjective, RawReference, RawServed, RawSteps, RawTokenizer,
    Recipe,
};
