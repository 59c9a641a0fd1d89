//! hydragen: rows that share a prefix attend to it together.
//!
//! # What it does
//! Attention of a row splits exactly into attention over a shared prefix and attention over what is the row's own, put together by their
//! log-sum-exps. The prefix part of all rows that share it is then one matrix product that reads the prefix's keys and values once, not
//! once a row. It holds for any tree of shared segments: each vertex serves all rows below it. Results are those of ordinary attention.
//!
//! # When it helps
//! Many answers to one prompt (`n`, `best_of`), many users behind one system prompt, many questions about one document. Not a single
//! sequence, not a short prefix, not the prefill of the prefix itself.
//!
//! # Steps
//! 1. (3.1) `o = sum_i e^(L_i) o_i / sum_i e^(L_i)` over the parts of a row, in any order, with the largest `L_i` taken out.
//! 2. (3.2) The rows of all sequences that share a segment are the rows of one product; all of them stand behind the segment, so that it
//!    needs no mask.
//! 3. (3.3) In a tree every vertex takes the rows of all its descendants, and a row's parts are its path from the root.
//!
//! Nothing is asked of the user: `antefix_attention::Sharing` finds the tree in the pages that the sequences of a step hold, at any depth
//! and with any fan-out, and every step of the engine runs along it.
//!
//! # Knobs
//! There is nothing to choose: it always runs, and no request can name it.
//!
//! # Cost
//! One log-sum-exp and one merge for each row and 1,024 positions. A layer of `B` rows behind `P` tokens reads `P` keys instead of `B P`
//! and computes as much as before: at best it takes the larger of bytes by bandwidth and operations by arithmetic ceiling, which
//! `cargo run --release -p antefix-attention --example shared_prefix` prints beside its times.
//!
//! # Differences from the paper
//! The official program takes levels of equal groups, declared by the caller; here the tree is found, and groups may differ. It divides
//! every part by its sum and rounds it to 16 bits before parts meet; here parts meet as `(m, l, acc)` in f32 and are divided once. Parts
//! are cut at every 1,024th position whoever owns them and merged in ascending order, so that a row gets the same bits with and without
//! company. Sliding windows bound each row from below, and what no row sees is skipped.
//!
//! # References
//! Juravsky et al., Hydragen: High-Throughput LLM Inference with Shared Prefixes, ICML 2024, arXiv 2402.05099.

use antefix_attention::method::{Axis, Card, Paper};

pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

/// What it is. It is no method of a request: see [`crate::ALWAYS`].
pub static CARD: Card = Card {
    name: "hydragen",
    title: "Hydragen",
    axis: Axis::Execution,
    exact: true,
    summary: "Rows that share a prefix attend to it together: its keys and values are read once, not once a row.",
    paper: Paper {
        title: "Hydragen: High-Throughput LLM Inference with Shared Prefixes",
        authors: "Juravsky et al.",
        year: 2024,
        reference: "arXiv 2402.05099",
    },
    knobs: &[],
    query_dependent: false,
    needs: &[],
    neutral: None,
    source: file!(),
};
