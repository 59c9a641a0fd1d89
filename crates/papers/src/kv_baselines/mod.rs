//! Policies that others are measured against: rules about which rows of the cache stay.

pub mod h2o;
pub mod pyramidkv;
pub mod random;
pub mod reference;
pub mod snapkv;
mod streaming_llm;
#[cfg(test)]
mod tests;
pub mod window;

pub use streaming_llm::StreamingLlm;
