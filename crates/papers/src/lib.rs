//! One folder per paper, and the list of them all.
//!
//! `cargo xtask new-paper SLUG` makes a folder and adds its lines here.

use antefix_attention::method::Method;

// papers: first
pub mod jrt;
// papers: last

/// Everything that a request can choose, in the order of the names. Help texts, `/v1/methods`, the pages under `docs/methods/` and the
/// tests of combinations are made from it.
pub const ALL: &[&dyn Method] = &[
    // methods: first
    &jrt::Jrt,
    // methods: last
];
