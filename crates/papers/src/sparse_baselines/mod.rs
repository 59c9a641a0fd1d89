//! Planners that others are measured against: rules about which keys the rows of a prompt, or drawn tokens, read.

mod a_shape;
mod a_shape_decode;
mod block_topk;
pub mod knobs;
mod minference;
mod oracle;
mod projection;
mod quest;
mod random;
pub mod reference;
pub mod select;
#[cfg(test)]
mod tests;
mod xattention;

pub use a_shape::AShape;
pub use a_shape_decode::AShapeDecode;
pub use block_topk::BlockTopK;
pub use minference::MInference;
pub use oracle::OracleTopK;
pub(crate) use projection::Projection;
pub use quest::Quest;
pub use random::RandomBlocks;
pub use xattention::XAttention;
