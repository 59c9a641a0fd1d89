//! The one function through which every layer attends, and the seams that methods hang on.

mod angles;
mod attend;
mod chunk_use;
mod context;
mod extra;
pub mod hooks;
pub mod method;
pub mod readout;
mod sharing;
pub mod sparse;

pub use angles::Angles;
pub use attend::{AttendError, Geometry, Scratch, attend};
pub use chunk_use::{ChunkLayout, ChunkUse, Deviation, Mend};
pub use context::{Reader, attend_context};
pub use extra::Extra;
pub use sharing::{SeqRows, Sharing};

#[cfg(test)]
mod tests;
