//! Chunks: stretches of text whose keys and values were computed once, each alone behind a prefix, and are found by what they say
//! rather than by what came before them (papers `cacheblend` 3.1 and `ape` 3.1).
//!
//! The store stands beside the tree of prefixes and never inside it: a chunk read behind other chunks is not what the model would
//! have computed there. Its pages count in the pool's accountant like all others.

mod file;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::key::Fingerprint;
use crate::pool::Pool;
use crate::segment::Segment;

pub use file::ChunkError;

/// A prefix and a text as tokens: what the rows of a chunk depend on, besides the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkText<'a> {
    /// What it was computed behind; its rows are not part of the chunk.
    pub prefix: &'a [u32],
    /// The chunk itself.
    pub tokens: &'a [u32],
}

/// Name of a chunk: a hash of model, policy, tenant, prefix and tokens. Only finds it; the tokens themselves are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkKey([u8; 32]);

struct Entry {
    prefix: Vec<u32>,
    segment: Arc<Segment>,
    last_use: u64,
}

/// Figures for reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChunkStats {
    /// Chunks in memory.
    pub chunks: usize,
    /// Bytes of their pages.
    pub bytes: usize,
    /// Found in memory since the start.
    pub hits: u64,
    /// Read from disk since the start.
    pub loaded: u64,
    /// Found nowhere since the start.
    pub misses: u64,
}

/// Chunks in memory and, if it has a folder, on disk.
pub struct ChunkStore {
    fingerprint: Fingerprint,
    dir: Option<PathBuf>,
    entries: HashMap<ChunkKey, Entry>,
    /// Not in the folder yet.
    unsaved: Vec<ChunkKey>,
    clock: u64,
    hits: u64,
    loaded: u64,
    misses: u64,
}

impl ChunkStore {
    /// An empty store for what `fingerprint` names. With a folder, chunks are looked for there as well.
    pub fn new(fingerprint: Fingerprint, dir: Option<PathBuf>) -> Self {
        Self {
            fingerprint,
            dir,
            entries: HashMap::new(),
            unsaved: Vec::new(),
            clock: 0,
            hits: 0,
            loaded: 0,
            misses: 0,
        }
    }

    /// The name of a chunk of one tenant (`salt`), made by `policy`.
    pub fn key(&self, policy: &str, salt: u64, text: ChunkText<'_>) -> ChunkKey {
        let mut hash = blake3::Hasher::new_derive_key("antefix chunk store, version 1");
        hash.update(&self.fingerprint.0);
        hash.update(&salt.to_le_bytes());
        hash.update(&(policy.len() as u64).to_le_bytes());
        hash.update(policy.as_bytes());
        for list in [text.prefix, text.tokens] {
            hash.update(&(list.len() as u64).to_le_bytes());
            for token in list {
                hash.update(&token.to_le_bytes());
            }
        }
        ChunkKey(*hash.finalize().as_bytes())
    }

    /// The chunk, from memory or from disk; a handle that the caller gives back. What does not hold the wanted tokens, or is damaged,
    /// is a miss.
    pub fn get(&mut self, pool: &mut Pool, key: ChunkKey, text: ChunkText<'_>) -> Option<Arc<Segment>> {
        self.clock += 1;
        if let Some(entry) = self.entries.get_mut(&key)
            && entry.prefix == text.prefix
            && entry.segment.tokens() == text.tokens
        {
            entry.last_use = self.clock;
            self.hits += 1;
            return Some(entry.segment.clone());
        }
        let dir = self.dir.as_deref();
        let Some(segment) = dir.and_then(|dir| file::load(dir, self.fingerprint, pool, key, text)) else {
            self.misses += 1;
            return None;
        };
        self.loaded += 1;
        self.hold(pool, key, text.prefix, segment.clone());
        Some(segment)
    }

    /// Whether a chunk is in memory. Changes nothing.
    pub fn contains(&self, key: ChunkKey) -> bool {
        self.entries.contains_key(&key)
    }

    /// Takes a chunk in; the store holds `segment` from now on. It is written to the folder by the next [`ChunkStore::flush`].
    pub fn insert(&mut self, pool: &mut Pool, key: ChunkKey, prefix: &[u32], segment: Arc<Segment>) {
        if self.dir.is_some() {
            self.unsaved.push(key);
        }
        self.hold(pool, key, prefix, segment);
    }

    fn hold(&mut self, pool: &mut Pool, key: ChunkKey, prefix: &[u32], segment: Arc<Segment>) {
        self.clock += 1;
        let entry = Entry {
            prefix: prefix.to_vec(),
            segment,
            last_use: self.clock,
        };
        if let Some(old) = self.entries.insert(key, entry) {
            old.segment.release(pool);
        }
    }

    /// Writes the chunks that are not in the folder yet; those that were forgotten meanwhile are computed again when they are wanted.
    ///
    /// # Errors
    /// When a file cannot be written; nothing half-written stays, and it is not tried again.
    pub fn flush(&mut self, pool: &Pool) -> Result<(), ChunkError> {
        let mut result = Ok(());
        for key in std::mem::take(&mut self.unsaved) {
            if let (Some(dir), Some(e)) = (&self.dir, self.entries.get(&key)) {
                let saved = file::save(dir, self.fingerprint, pool, key, &e.prefix, &e.segment);
                result = result.and(saved);
            }
        }
        result
    }

    /// Forgets chunks that nobody reads, least recently used first, until `bytes` are free. Whether they are.
    pub fn evict(&mut self, pool: &mut Pool, bytes: usize) -> bool {
        let mut idle: Vec<(u64, ChunkKey)> = self
            .entries
            .iter()
            .filter(|(_, e)| Arc::strong_count(&e.segment) == 1)
            .map(|(key, e)| (e.last_use, *key))
            .collect();
        idle.sort_unstable_by_key(|&(used, _)| used);
        for (_, key) in idle {
            if pool.free_bytes() >= bytes {
                break;
            }
            self.remove(pool, key);
        }
        pool.free_bytes() >= bytes
    }

    /// Forgets every chunk in memory. Who reads one keeps it until it is done.
    pub fn clear(&mut self, pool: &mut Pool) {
        for (_, entry) in self.entries.drain() {
            entry.segment.release(pool);
        }
    }

    fn remove(&mut self, pool: &mut Pool, key: ChunkKey) {
        if let Some(entry) = self.entries.remove(&key) {
            entry.segment.release(pool);
        }
    }

    /// Figures for reports.
    pub fn stats(&self, pool: &Pool) -> ChunkStats {
        let pages: usize = self.entries.values().map(|e| e.segment.page_count()).sum();
        ChunkStats {
            chunks: self.entries.len(),
            bytes: pages * pool.shape().page_bytes(),
            hits: self.hits,
            loaded: self.loaded,
            misses: self.misses,
        }
    }
}

#[cfg(test)]
mod tests;
