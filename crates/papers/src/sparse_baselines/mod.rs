//! Planners that others are measured against: rules about which keys the rows of a prompt read.

mod a_shape;
mod block_topk;
pub mod knobs;
mod random;
pub mod reference;
pub mod select;
#[cfg(test)]
mod tests;

pub use a_shape::AShape;
pub use block_topk::BlockTopK;
pub use random::RandomBlocks;
