//! The seam of prefill: which keys the rows of a prompt read.
//!
//! A planner returns a [`Plan`]; `attend` alone executes it. What a plan depends on must not depend on who else is computed or how a
//! prompt is cut into steps, so planners work on stretches of a prompt that begin and end at fixed positions ([`Planner::grain`]).

use std::fmt::Debug;
use std::num::NonZeroUsize;

pub use antefix_state::plan::{Builder, Cover, Plan, Scope, Unit};

pub use crate::sparse::PlanView;

/// Chooses the keys that the rows of a prompt read. Same view, same plan.
///
/// Layers with a window are never asked: they stay exact, and so do drawn tokens, and rows behind a context that a cache policy or
/// reused documents left.
pub trait Planner: Send + Sync + Debug {
    /// Rows that are planned together. A stretch begins at a multiple of this position or where the one before it ended, and ends at the
    /// next multiple or with the prompt; a step of the engine holds whole stretches only.
    fn grain(&self) -> NonZeroUsize;

    /// The plan of one layer for the rows of one stretch. It is valid ([`Plan::validate`]) and has a cover for each head or group.
    fn plan(&self, view: &PlanView<'_>) -> Plan;
}
