//! Data of the four kinds of task: files in the UEA archive's format, and generators whose truth is known.

mod control;
mod points;
mod series;
mod ts;

pub use control::{Episode, Pendulum, Quality, expert, random_action};
pub use points::{Hawkes, Points, SinProcess};
pub use series::{column, multi_sine};
pub use ts::{Series, TsError, TsFile};
