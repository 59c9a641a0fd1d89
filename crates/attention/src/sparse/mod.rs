//! Sparse attention: plans are made layer by layer while a sequence runs, and executed over its pages.
//!
//! A [`Planning`] follows one sequence: its planners, what they have summed up of the keys, and the figures that are reported.
//! [`reference()`] is the execution as the definition writes it; [`attend`](crate::attend()) executes plans with the kernels.

mod copies;
mod execute;
pub mod json;
mod listed;
mod picture;
mod planning;
mod reference;
#[cfg(test)]
mod tests;
mod view;

pub(crate) use execute::{Scratch, pieces};
pub use listed::all_cost_less;
pub use picture::{Grid, grid, picture};
pub use planning::{Planned, Planning, recall};
pub(crate) use planning::{Stretch, stretches};
pub use reference::reference;
pub use view::{PlanView, Summary, Windows};
