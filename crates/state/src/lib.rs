//! The algebra of partial attention: states that merge, lanes, plans, ids. No dependencies.
//!
//! Attention of a query row over a set of keys is a partial state `(m, l, acc)`. States over disjoint sets of keys merge into
//! the state over their union. Shared prefixes, split keys, chunked prefill, sparse plans, learned prefixes and sinks are all
//! "which parts, in which order" (paper `hydragen`, section 3; FlashInfer's cascade is the same operator).

mod ids;
pub mod lanes;
pub mod plan;
mod state;

pub use ids::{KvHead, LayerIdx, PAGE_ROWS, PARTITION, Pos};
pub use state::State;
