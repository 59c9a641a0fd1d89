//! The KV cache: pages, sequences' page tables, the radix tree of cached prefixes, the tiers below it, and the accountant.
//!
//! Keys and values are stored per (layer, KV head) in pages of 32 rows. Full pages are immutable and shared by reference count;
//! only the last, partly filled page of a sequence is written, and only while nobody else holds it.

pub mod disk;
mod key;
mod pool;
mod radix;
mod ragged;
pub mod tiers;

pub use antefix_kernels::attend::KvDtype;
pub use key::{BlockName, BlockTokens, Fingerprint, Identity, Key};
pub use pool::{KvError, KvShape, PageId, Pool, SeqKv, Stats};
pub use radix::{Keep, Radix, RecomputeCost, Run};
pub use ragged::HeadRun;
