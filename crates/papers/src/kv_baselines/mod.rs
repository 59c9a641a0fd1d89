//! Policies that others are measured against: rules about which rows of the cache stay.

pub mod pyramidkv;
pub mod random;
pub mod snapkv;
mod streaming_llm;
pub mod window;

pub use streaming_llm::StreamingLlm;
