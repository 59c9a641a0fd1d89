//! One folder per paper, and the list of them all.
//!
//! `cargo xtask new-paper SLUG` makes a folder and adds its line here.

// papers: first
// papers: last
