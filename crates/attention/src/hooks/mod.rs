//! Hooks: which named activations of a forward pass are read or changed, as data.
//!
//! A [`HookSpec`] says it in JSON; [`HookPlan::compile`] checks it against a model's sizes; an [`Observer`] carries it through one
//! sequence and keeps what it captured. The decoder asks one bit per layer and site, and touches only rows of sequences that
//! are observed. Methods that need code rather than data implement [`Hook`].

mod captured;
mod error;
mod observer;
mod plan;
mod site;
mod spec;

pub use captured::{Captured, Values};
pub use error::HookError;
pub use observer::{At, Hook, Observer, Told, Watch};
pub use plan::{HookPlan, HookShape, Sources, fingerprint};
pub use site::{Per, Site, SiteName, UnknownSite};
pub use spec::{
    Action, Add, Capture, Cells, Dtype, Edit, FromRun, HookSpec, OnHit, Positions, Probe, Set, Vector,
};

#[cfg(test)]
mod tests;
