//! The seams of prefill and decoding: which keys the rows of a prompt read, and which drawn tokens do.
//!
//! A planner returns a [`Plan`]; `attend` alone executes it. What a plan depends on must not depend on who else is computed or how a
//! prompt is cut into steps, so planners work on stretches of a prompt that begin and end at fixed positions ([`Planner::grain`]).

use std::fmt::Debug;
use std::num::NonZeroUsize;

pub use antefix_state::plan::{Builder, Cover, Plan, Scope, Unit};

pub use crate::sparse::{PlanView, Summary};

/// Chooses the keys that the rows of a prompt read. Same view, same plan.
///
/// Layers with a window are never asked: they stay exact, and so do rows behind a context that a cache policy or reused documents left.
pub trait Planner: Send + Sync + Debug {
    /// Rows that are planned together. A stretch begins at a multiple of this position or where the one before it ended, and ends at the
    /// next multiple or with the prompt; a step of the engine holds whole stretches only.
    fn grain(&self) -> NonZeroUsize;

    /// What it asks the view to sum up of keys: memory is set aside for these, and the view gives no others.
    fn summaries(&self) -> Vec<Summary> {
        Vec::new()
    }

    /// The plan of one layer for the rows of one stretch. It is valid ([`Plan::validate`]) and has a cover for each head or group.
    fn plan(&self, view: &PlanView<'_>) -> Plan;
}

/// Chooses the keys that drawn tokens read, under the same exceptions.
pub trait DecodePlanner: Send + Sync + Debug {
    /// What follows one sequence, from its first drawn token on.
    fn start(&self) -> Box<dyn DecodeSteps>;

    /// As [`Planner::summaries`].
    fn summaries(&self) -> Vec<Summary> {
        Vec::new()
    }

    /// How many keys of a layer and KV head one drawn token after the other reads, at most, in a sequence of `tokens`: of those that stand
    /// alone in their pages copies are kept from token to token, and memory is set aside for that. 0: every token chooses anew.
    fn repeated(&self, tokens: usize) -> usize {
        let _ = tokens;
        0
    }
}

/// A [`DecodePlanner`] at work on one sequence.
pub trait DecodeSteps: Send + Debug {
    /// The plan of one layer for the rows of a step, all drawn; in blocks of one row where it is sparse. Layers come in ascending order,
    /// those with a window left out.
    ///
    /// A step has several rows when tokens are computed again, or forced: what one of them reads must be what it would read alone.
    fn plan(&mut self, view: &PlanView<'_>) -> Plan;
}
