//! aaren: attention as a recurrent network: one learned query a head instead of one a token.
//!
//! # What it does
//! Attention of one query over a growing set of tokens is a recurrence with a constant state, `(lse, o)` a head. A Transformer has a new
//! query for every token, so its states serve no later token; here a layer has one learned query token, and the output at token `k` is the
//! attention of that query over tokens `1..k`. Training runs over whole sequences at once; a stream takes every new token in constant
//! time and memory.
//!
//! # When it helps
//! Streams: sensors, events, control, time series, where memory must not grow. It is a layer to train, not a way to make an existing
//! language model faster.
//!
//! # Steps
//! 1. (3.1) Recurrence: with `d = s - lse` a token's share is `p = 1 / (1 + e^-d)`, `o += p (v - o)`, `lse = ln(e^lse + e^s)`: [`Prefix::push`].
//! 2. (3.2) States of disjoint sets of tokens merge, as those of [`antefix_state::State`]: [`Prefix::merge`].
//! 3. (3.3) Blocks of any size from the state before them: [`Prefix::push_block`], [`Model::forward`].
//! 4. (3.4) All prefixes at once: [`Prefix::scan`], and in three phases over chunks [`Prefix::scan_chunked`].
//! 5. (3.6) A layer is a Transformer's with this in place of self-attention: `q_tok` goes through `W_q` once, so that the scores of a loaded
//!    model are one product with `H` columns. Nothing is masked: a prefix knows no later token.
//! 6. (3.7) [`Session`] follows a stream; its state can be saved at any event.
//!
//! # Knobs
//! `mixer`, `norm` (before or behind a sublayer), `decay` (forgetting, not in the paper), and the sizes, in [`Config`].
//!
//! # Cost
//! A token and layer: `2 d^2` for values and outputs, `d H` for scores, `4 d ffn / 2` for the feed-forward part, one `exp` and one logarithm a
//! head, `3 D` operations to move `o`. State: `H (D + 2)` numbers of 4 bytes a layer.
//!
//! # Differences from the paper
//! The paper's triple `(m, u, w)` is kept as `(m + ln u, w / u)`, the first in f64, so that a stream of any length neither overflows nor
//! stops listening. Positions or times are added as sinusoids at the input. Hyper-parameters are ours: those of the paper were not at hand.
//!
//! # References
//! Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori, Attention as an RNN, 2024, arXiv 2405.13956.

pub mod config;
pub mod file;
pub mod mixture;
pub mod model;
pub mod reference;
pub mod scan;
pub mod stream;
#[cfg(test)]
mod tests;
pub mod twin;

use antefix_attention::method::{Axis, Card, Paper};

use crate::repro::{Claim, NO_MODEL};

pub use config::{Config, Mixer, Norm, Scale, Task};
pub use file::{FileError, Tensors};
pub use model::{LayerState, Model, Scratch};
pub use scan::Prefix;
pub use stream::{EventError, Session, State};

/// What it is. It is a layer to train, no method of a request.
pub static CARD: Card = Card {
    name: "aaren",
    title: "Attention as a recurrent network",
    axis: Axis::Training,
    exact: true,
    summary: "A layer whose one learned query a head attends all tokens so far: trained over whole sequences, streamed in constant memory.",
    paper: Paper {
        title: "Attention as an RNN",
        authors: "Feng et al.",
        year: 2024,
        reference: "arXiv 2405.13956",
    },
    knobs: &[],
    query_dependent: false,
    needs: &[],
    neutral: None,
    source: file!(),
};

/// What is measured of it.
pub static CLAIM: Claim = Claim {
    slug: "aaren",
    says: "Aarens come close to Transformers of equal size on 38 datasets of four kinds (reinforcement learning, event forecasting, time series \
           forecasting and classification), while memory of a stream is constant instead of linear and its total time linear instead of quadratic.",
    source: "Feng et al., tables 1 to 4, figure 5.",
    rule: "Tasks made here, three seeds (short run: one): reproduced if every mean figure is at most 5 % worse than the twin's, the state \
           of a stream keeps its size, total time is a line (R^2 at least 0.99) and an event behind 16,384 others is at least 20 times as fast as \
           with the twin and its cache of keys (short run: 2,048, and twice); partly if the stream is so and half of the tasks are.",
    model: NO_MODEL,
    fast_model: NO_MODEL,
};
