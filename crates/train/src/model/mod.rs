//! Models that can be trained.

mod decoder;
mod gpt;
mod layer;
mod lora;
mod params;
mod recompute;

#[cfg(test)]
mod tests;

pub use self::decoder::{Batch, Decoder, Train};
pub use self::gpt::{Gpt, INITIALIZER_RANGE, MakeMixer, Mixer, RawGpt, SelfAttention};
pub use self::lora::LoraSpec;
pub use self::params::{Init, Params};
pub use self::recompute::{Aside, Recompute};
