//! Models that can be trained.

mod decoder;
mod lora;
mod params;

#[cfg(test)]
mod tests;

pub use self::decoder::{Batch, Decoder, Train};
pub use self::lora::LoraSpec;
pub use self::params::{Init, Params};
