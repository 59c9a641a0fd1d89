//! act: weight on hidden sinks is handed on to the other keys.
//!
//! # What it does
//! In chosen heads, keys other than the first that collect much attention from all rows (hidden sinks) keep a part `beta` of their weight;
//! the rest goes to the row's other keys in proportion to their weights. Weights of the model are untouched, sinks are found anew in
//! each text.
//!
//! # When it helps
//! The paper reports gains of tenths of a point to a few points on classification and multiple choice for models of 7B and more, with
//! heads that were chosen on labelled data of the same kind. On a small model expect little, and measure against as many random heads.
//!
//! # Steps
//! 1. (3.1) A key is a sink if its mean weight over the rows that see it is above `alpha / N` (or a fixed threshold); the first token never is.
//! 2. (3.2) A row with weight `s` on sinks: sinks keep `beta` of theirs, the others are multiplied by `(1 - beta s) / (1 - s)`.
//! 3. (3.3) Only in the heads of a profile; the first two and the last layer are never in it.
//! 4. (3.4) A profile: each head alone is calibrated, and the margin of the right answers on labelled examples compared.
//! 5. (3.5) While the answer is written, sinks are found anew every 64 tokens, out of the means so far.
//! 6. (3.6) Fast form: the output is `c (z - z_S) + beta z_S` with the part `z_S` of the output that sinks give; no matrix.
//!
//! # Knobs
//! `mode=causal` decides about a row by the rows before its block of 64: no row depends on later ones or on how a prompt was cut into
//! steps. `mode=two_pass` decides by the whole prompt, as the paper does; only a prompt that is computed in one step can have that, others
//! fall back to `causal`, so its answers depend on the size of the steps. `beta=1` changes nothing; above 1 sinks gain: the control.
//!
//! # Cost
//! One more product of queries and keys in the calibrated heads (two in `two_pass`), and one value row for each sink.
//!
//! # Differences from the paper
//! The official program spares the first sink it finds instead of the first token, divides by zero where a row sees only sinks, and its
//! decoding steps do not keep the sum of a row; here the first token is spared, such rows stay as they are, and rows always sum to 1.
//! Heads are ranked by the margin of the right answer, not by accuracy, which is noise on a few hundred examples.
//!
//! # References
//! Yu et al., Unveiling and Harnessing Hidden Attention Sinks, ICML 2024, arXiv 2406.15765.

pub mod calibrate;
pub mod reference;
pub mod sinks;
#[cfg(test)]
mod tests;
