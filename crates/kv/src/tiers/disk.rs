//! [`DiskTier`] as a tier.

use super::{Tier, TierError, TierStats};
use crate::disk::{Directory, DiskError, DiskTier};
use crate::key::BlockName;

/// An error with its causes in one line; the hint of the first stays last.
fn told(error: &DiskError) -> TierError {
    TierError(error.to_string())
}

impl Tier for DiskTier {
    fn put(&mut self, block: &BlockName, payload: &[u8]) -> Result<(), TierError> {
        let done = DiskTier::put(self, block.parent, block.salt, &block.tokens, payload);
        done.map(drop).map_err(|e| told(&e))
    }

    fn get(&mut self, block: &BlockName, payload: &mut Vec<u8>) -> bool {
        DiskTier::get(self, block.parent, block.salt, &block.tokens, payload).is_some()
    }

    fn flush(&mut self) -> Result<(), TierError> {
        DiskTier::flush(self).map_err(|e| told(&e))
    }

    fn clear(&mut self) -> Result<(), TierError> {
        DiskTier::clear(self).map_err(|e| told(&e))
    }

    fn stats(&self) -> TierStats {
        let stats = DiskTier::stats(self);
        TierStats {
            name: "disk".into(),
            blocks: Some(stats.blocks),
            bytes: Some(stats.bytes),
            capacity: Some(stats.capacity),
            hits: stats.hits,
            misses: stats.misses,
            bad: stats.bad,
            evicted: stats.evicted,
            bytes_written: stats.bytes_written,
            bytes_read: stats.bytes_read,
            off: self.writing().err().map(|e| e.to_string()),
        }
    }

    fn directory(&self) -> Option<Directory> {
        Some(DiskTier::directory(self))
    }
}
