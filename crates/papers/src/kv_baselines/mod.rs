//! Policies that others are measured against: simple rules about which rows of the cache stay.

mod streaming_llm;

pub use streaming_llm::StreamingLlm;
