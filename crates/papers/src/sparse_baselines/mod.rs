//! Planners that others are measured against: rules about which keys the rows of a prompt, or drawn tokens, read.

mod a_shape;
mod block_topk;
pub mod knobs;
mod quest;
mod random;
pub mod reference;
pub mod select;
#[cfg(test)]
mod tests;

pub use a_shape::AShape;
pub use block_topk::BlockTopK;
pub use quest::Quest;
pub use random::RandomBlocks;
