//! prefix_grouper: train on many responses to a prompt and compute the prompt once, forward and backward.
//!
//! # What it does
//! In GRPO and its kin, in SFT and DPO on one prompt, a prompt of `L` tokens comes with `G` responses of `l` tokens. Repeated, it is computed `G`
//! times. Here prompt and responses stand in one packed row; every response attends the prompt and itself. Losses and gradients are those of the
//! repeated form, the gradient into the prompt included, at `(L + G l) / (G (L + l))` of the rows.
//!
//! # When it helps
//! Long prompts, short answers, large groups. With `L = l` it saves less than a half; with one response nothing.
//!
//! # Steps
//! 1. (2) Layout: `[P, R_1, .., R_G]`, several prompts one after the other. Positions of every response go on behind the prompt.
//! 2. (3.3) Attention of a response row is its state over the prompt merged with its state over its own tokens; the prompt's rows never see a response.
//!    Backward, the gradients of prompt keys and values are summed over all responses from the merged log-sum-exp, without a copy of a key.
//! 3. (3.4) The first token of every response is predicted by the last row of the prompt: that row enters the loss `G` times.
//! 4. (4) Policies: `grpo`, `dapo`, `dr_grpo`, `gspo`; responses are drawn by our own engine behind the shared prefix.
//!
//! The code is `crates/train/src/prefix_grouper` and `crates/train/src/ops/attend.rs`; recipes are in `docs/training.md`.
//!
//! # Knobs
//! `grouped = false` in a recipe repeats the prompts: the form that it is compared with.
//!
//! # Cost
//! Linear layers run over `L + G l` rows instead of `G (L + l)`; attention of the prompt runs once. Memory of activations falls by the same ratio. There
//! is no padding and no mask of the whole packed row.
//!
//! # Differences from the paper
//! The official code concatenates prompt keys and each response's keys, which copies the prompt `G` times in attention, and pads responses to one length.
//! Here prompt keys are read in place and responses keep their lengths. The paper names no wall-clock times; the rule's figures are those of its formula
//! for a small model on a CPU.
//!
//! # References
//! Liu et al., Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward, 2025, arXiv 2506.05433.

use antefix_attention::method::{Axis, Card, Paper};

use crate::repro::{Claim, SMOLLM2};

/// What it is. It is trained with, no method of a request.
pub static CARD: Card = Card {
    name: "prefix_grouper",
    title: "Prefix Grouper",
    axis: Axis::Training,
    exact: true,
    summary: "Many responses to a prompt train at the price of one prompt: losses and gradients are those of the prompt repeated.",
    paper: Paper {
        title: "Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward",
        authors: "Liu et al.",
        year: 2025,
        reference: "arXiv 2506.05433",
    },
    knobs: &[],
    query_dependent: false,
    needs: &[],
    neutral: None,
    source: file!(),
};

/// What is measured of it.
pub static CLAIM: Claim = Claim {
    slug: "prefix_grouper",
    says: "Forward and backward are those of repeated prompts, and a training step costs less by up to 1/G: less computation and less memory at every \
           group size and every ratio of prompt to response.",
    source: "Liu et al., equivalence in section 3, figures of FLOPs and memory.",
    rule: "Reproduced if the gradients of all adapters differ by at most 1e-4 of their norm, and a step (forward, backward, update) is at least 3.5 \
           times as fast at G = 8, L = 1024, l = 128 and 1.4 times at L = l = 256 (short run: 0.6 of the ratio of the rows at smaller sizes); partly \
           if the gradients agree and every step is faster.",
    model: SMOLLM2,
    fast_model: SMOLLM2,
};
