//! Numbers that must not be confused with each other, and the two borders that fix the order of additions.

/// Rows of a KV page. Keys are folded page by page, in ascending absolute position.
pub const PAGE_ROWS: usize = 32;

/// Keys of a partition: states of partitions are merged in ascending order, whoever computed them. A multiple of [`PAGE_ROWS`].
pub const PARTITION: usize = 1024;

/// Position of a token in its sequence. Not an index into the cache: evicted keys keep their position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pos(pub u32);

/// Index of a key/value head, `0..Hk`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KvHead(pub u32);

/// Index of a decoder layer, `0..L`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerIdx(pub u32);
