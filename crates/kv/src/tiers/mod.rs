//! What is below the memory: places that keep blocks, slower and larger, and the thread that talks to them.
//!
//! A tier finds a block by its [`BlockName`] and hands back the very bytes that it was given, or nothing: damage, strangers' files
//! and lost connections are misses. [`Tiers`] never makes its caller wait.

mod disk;
pub mod object;
mod thread;

use crate::disk::Directory;
use crate::key::BlockName;

pub use thread::{Fetched, Tiers, TiersStats};

/// Why a tier does not take blocks. Reading has no errors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TierError(pub String);

/// Figures of a tier. Counts are since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TierStats {
    /// What it is called: `disk`, or the service of a remote one.
    pub name: String,
    /// Blocks of this model that can be found, if it is known.
    pub blocks: Option<usize>,
    /// Bytes that they and everything else there take, if it is known.
    pub bytes: Option<u64>,
    /// Bytes that they may take, if there is a limit.
    pub capacity: Option<u64>,
    /// Blocks read.
    pub hits: u64,
    /// Blocks asked for and not there, or damaged.
    pub misses: u64,
    /// Blocks that were damaged.
    pub bad: u64,
    /// Evictions: segments of a disk, objects elsewhere.
    pub evicted: u64,
    /// Bytes stored.
    pub bytes_written: u64,
    /// Bytes of blocks read.
    pub bytes_read: u64,
    /// Why nothing is stored any more, if so.
    pub off: Option<String>,
}

/// A place that keeps blocks. It is used by one thread, which may wait.
pub trait Tier: Send {
    /// Stores a block, unless it is there already. It may wait in memory until [`Tier::flush`].
    ///
    /// # Errors
    /// When it was not stored; the tier goes on serving what it has.
    fn put(&mut self, block: &BlockName, payload: &[u8]) -> Result<(), TierError>;

    /// Reads a block into `payload`: the bytes that were stored, or `false`.
    fn get(&mut self, block: &BlockName, payload: &mut Vec<u8>) -> bool;

    /// Makes what was stored outlive a crash.
    ///
    /// # Errors
    /// When it may not.
    fn flush(&mut self) -> Result<(), TierError>;

    /// Forgets every block, those of other models as well.
    ///
    /// # Errors
    /// When some may be left.
    fn clear(&mut self) -> Result<(), TierError>;

    /// Figures for reports.
    fn stats(&self) -> TierStats;

    /// Which blocks it has, if it knows without asking anybody.
    fn directory(&self) -> Option<Directory>;
}
