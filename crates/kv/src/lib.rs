//! The KV cache: pages, sequences' page tables, the radix tree of cached prefixes, and the accountant.
//!
//! Keys and values are stored per (layer, KV head) in pages of 32 rows. Full pages are immutable and shared by reference count;
//! only the last, partly filled page of a sequence is written, and only while nobody else holds it.

pub mod disk;
mod pool;
mod radix;
mod ragged;

pub use antefix_kernels::attend::KvDtype;
pub use pool::{KvError, KvShape, PageId, Pool, SeqKv, Stats};
pub use radix::{Radix, Run};
pub use ragged::HeadRun;
