//! One folder per paper, and the list of them all.
//!
//! `cargo xtask new-paper SLUG` makes a folder and adds its lines here.

use antefix_attention::method::Method;

pub mod heads;

// papers: first
pub mod act;
pub mod jrt;
pub mod kv_baselines;
pub mod retrieval_heads;
// papers: last

/// Everything that a request can choose, in the order of the names. Help texts, `/v1/methods`, the pages under `docs/methods/` and the
/// tests of combinations are made from it.
pub const ALL: &[&dyn Method] = &[
    // methods: first
    &jrt::Jrt,
    &kv_baselines::StreamingLlm,
    // methods: last
];
