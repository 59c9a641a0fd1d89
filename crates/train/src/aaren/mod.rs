//! aaren, trained: the scan as an operator, the network, data and heads of four kinds of task, and a Transformer twin of each.
//!
//! Algebra, inference, files and streams are in [`antefix_papers::aaren`]; a trained network is written with [`Net::export`].

pub mod data;
pub mod loss;
mod net;
mod scan;
pub mod tasks;
#[cfg(test)]
mod tests;
mod train;

pub use net::Net;
pub use scan::scan;
pub use train::{Plan, Problem, Report, train};
