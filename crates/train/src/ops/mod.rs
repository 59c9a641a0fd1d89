//! Differentiable operators with handwritten forward and backward, as nodes of candle's tape.
//!
//! Every operator is one body for f32 and f64: f32 trains, f64 lets its gradient be checked against finite differences (`tests.rs`). Work is cut
//! into pieces that follow from the sizes alone and summed in index order, so the bits do not depend on the number of threads.
//! Operators of `candle_nn` are not used: several of them stop gradients without an error.

mod attend;
mod embed;
mod linear;
mod mlp;
pub(crate) mod node;
mod norm;
mod packing;
mod token_loss;

#[cfg(test)]
pub(crate) mod tests;

pub use self::attend::{Attention, attend};
pub use self::embed::embed;
pub use self::linear::{linear, lora};
pub use self::mlp::{gated_act, glu, mlp};
pub use self::node::Scalar;
pub use self::norm::{layer_norm, rms_norm};
pub use self::packing::{Angles, Group, Job, Mask, Packing, PackingError};
pub use self::token_loss::{Judged, RowLoss, judge, log_probs, token_loss};
