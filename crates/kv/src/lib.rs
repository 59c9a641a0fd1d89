//! The KV cache: pages, sequences' page tables, the radix tree of cached prefixes, the tiers below it, and the accountant.
//!
//! Keys and values are stored per (layer, KV head) in pages of 32 rows. Full pages are immutable and shared by reference count;
//! only the last, partly filled page of a sequence is written, and only while nobody else holds it.
//!
//! A [`SeqState`] is a whole sequence: a private tail, and a [`Context`] of references to immutable [`Segment`]s, which may be
//! compressed, moved, partly hidden or attended under a temperature.

mod chunks;
mod context;
pub mod disk;
mod key;
mod pool;
mod radix;
mod segment;
mod seq_state;
pub mod tiers;

pub use antefix_kernels::attend::KvDtype;
pub use chunks::{ChunkError, ChunkKey, ChunkStats, ChunkStore, ChunkText};
pub use context::{Context, Group, Hidden, Rule, SegRef};
pub use key::{BlockName, BlockTokens, Fingerprint, Identity, Key};
pub use pool::{KvError, KvShape, PageId, Pool, SeqKv, Stats};
pub use radix::{Keep, Radix, RecomputeCost, Run};
pub use segment::{Biased, HeadRun, Kind, Policy, Positions, Segment, SegmentBuilder};
pub use seq_state::{Compacted, Edit, EditError, Fold, HeadEdit, LayerEdit, OwnRow, SeqState};
