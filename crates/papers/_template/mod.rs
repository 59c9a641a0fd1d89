//! {{slug}}: one sentence that says what the method changes.
//!
//! # What it does
//! Two or three sentences in the vocabulary of ARCHITECTURE.md.
//!
//! # When it helps
//! Which models, which lengths, which loads; and when it does not.
//!
//! # Steps
//! 1. Numbered as in the paper, with the number of its section or equation. The code carries the same numbers.
//!
//! # Knobs
//! Name, range, default, and the value at which the method becomes dense attention.
//!
//! # Cost
//! Bytes read and products per step, against dense attention.
//!
//! # Differences from the paper
//! What we do otherwise, and why.
//!
//! # References
//! Authors, title, year, where it appeared.

pub mod reference;
#[cfg(test)]
mod repro;
#[cfg(test)]
mod tests;
