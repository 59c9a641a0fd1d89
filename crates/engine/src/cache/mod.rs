//! Cached prefixes: in memory the radix tree, below it the tiers, and the blocks that move between them.
//!
//! Nothing here waits for a disk or a network: blocks leave through a bounded line and come back a few a step, while their request
//! stands in line. What is lost on the way is computed again.

mod identity;
mod loads;

use std::sync::Arc;
use std::time::{Duration, Instant};

use antefix_kv::tiers::{Tiers, TiersStats};
use antefix_kv::{BlockName, Fingerprint, Keep, PageId, Pool, Radix, RecomputeCost, SeqKv};
use antefix_models::spec::ModelSpec;
use antefix_state::PAGE_ROWS;

use crate::schedule::SeqId;
use loads::Load;

pub use identity::{IdentityError, identity};

/// How an engine caches.
#[derive(Clone, Default)]
pub struct CacheOptions {
    /// Bytes of pages that cached prefixes may hold; `None` = whatever running requests leave.
    pub bytes: Option<usize>,
    /// What a request that wishes nothing gets; `None` = kept until the memory is needed.
    pub ttl: Option<Duration>,
    /// What is below the memory, and the fingerprint of the [`identity`] that it was opened for.
    pub below: Option<(Fingerprint, Arc<Tiers>)>,
}

/// Blocks that are to be forgotten sooner than this never leave the memory: a copy elsewhere would outlive them.
const LEAST_TTL_BELOW: Duration = Duration::from_hours(24);

/// Bytes of blocks that are copied out a step, so that nobody who decodes waits for it.
const STORE_BYTES: usize = 4 << 20;

/// Expired blocks are looked for no more often than this; before that, they only are not found.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);

/// Figures of the cache.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Blocks in memory.
    pub blocks: usize,
    /// Of those, pinned.
    pub pinned: usize,
    /// Blocks that came back from a tier, since the start; one count for each tier.
    pub loaded: Vec<u64>,
    /// Prompts that are being read from a tier.
    pub loading: usize,
    /// Blocks that are still to be handed to the tiers.
    pub to_store: usize,
    /// The tiers, if there are any.
    pub below: Option<TiersStats>,
}

/// Where a prompt would be found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Whereabouts {
    /// Tokens in memory, from the first on.
    pub ram: usize,
    /// Tokens behind them that a tier has.
    pub below: usize,
}

/// Why a prefix cannot be pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{asked} more bytes would be pinned, {free} may be: a request as long as the context must still fit\nhint: unpin something or raise the KV capacity"
)]
pub struct PinError {
    /// Bytes of blocks that are not pinned yet.
    pub asked: usize,
    /// Bytes that may still be pinned.
    pub free: usize,
}

/// The cache of one engine; the pool is the engine's.
pub(crate) struct Cache {
    radix: Radix,
    options: CacheOptions,
    loads: Vec<Load>,
    loaded: Vec<u64>,
    expired_at: Instant,
}

impl Cache {
    pub(crate) fn new(spec: &ModelSpec, options: CacheOptions) -> Self {
        let fingerprint = options.below.as_ref().map_or(Fingerprint::default(), |b| b.0);
        let mut radix = Radix::named(fingerprint, recompute_cost(spec));
        if options.below.is_some() {
            radix.track();
        }
        Self {
            radix,
            options,
            loads: Vec::new(),
            loaded: Vec::new(),
            expired_at: Instant::now(),
        }
    }

    pub(crate) fn radix(&self) -> &Radix {
        &self.radix
    }

    pub(crate) fn radix_mut(&mut self) -> &mut Radix {
        &mut self.radix
    }

    fn tiers(&self) -> Option<&Arc<Tiers>> {
        self.options.below.as_ref().map(|b| &b.1)
    }

    pub(crate) fn matched(&self, tokens: &[u32], salt: u64) -> usize {
        self.radix.matched(tokens, salt)
    }

    /// Looks without touching anything, and without asking a tier that would have to ask somebody.
    pub(crate) fn whereabouts(&self, tokens: &[u32], salt: u64) -> Whereabouts {
        let (ram, mut name) = self.radix.matched_to(tokens, salt);
        let Some(tiers) = self.tiers() else {
            return Whereabouts { ram, below: 0 };
        };
        let blocks = tokens[ram..].as_chunks::<PAGE_ROWS>().0.iter();
        let known = blocks.take_while(|block| {
            name = name.child(block);
            tiers.knows(&name)
        });
        Whereabouts {
            ram,
            below: known.count() * PAGE_ROWS,
        }
    }

    pub(crate) fn lookup(&mut self, pool: &mut Pool, tokens: &[u32], salt: u64) -> SeqKv {
        self.radix.lookup(pool, tokens, salt)
    }

    pub(crate) fn insert(&mut self, pool: &mut Pool, tokens: &[u32], salt: u64, kv: &SeqKv, keep: Keep) {
        self.radix.insert_kept(pool, tokens, salt, kv, self.wish(keep));
    }

    fn wish(&self, keep: Keep) -> Keep {
        Keep {
            ttl: keep.ttl.or(self.options.ttl),
            ram_only: keep.ram_only || keep.ttl.is_some_and(|ttl| ttl < LEAST_TTL_BELOW),
            ..keep
        }
    }

    /// Makes room for `bytes` bytes, as far as nobody holds the blocks. What was not stored below yet is now, if there is room.
    pub(crate) fn evict(&mut self, pool: &mut Pool, bytes: usize) {
        self.evict_to(pool, |pool, _| pool.free_bytes() >= bytes);
    }

    fn evict_to(&mut self, pool: &mut Pool, enough: impl Fn(&Pool, usize) -> bool) {
        let tiers = self.options.below.as_ref().map(|b| &b.1);
        self.radix.evict_to(pool, enough, |pool, name, pages| {
            if let Some(tiers) = tiers
                && !tiers.knows(&name.key())
            {
                store(tiers, pool, name, pages);
            }
        });
    }

    /// What is done beside every step: blocks out, blocks in, and what has expired or is too much away.
    pub(crate) fn work(&mut self, pool: &mut Pool) {
        self.store_some(pool, STORE_BYTES);
        self.take_loaded_blocks(pool);
        if let Some(most) = self.options.bytes {
            let block = pool.shape().block_bytes();
            self.evict_to(pool, |_, blocks| blocks * block <= most);
        }
        if self.expired_at.elapsed() >= EXPIRE_EVERY {
            self.expired_at = Instant::now();
            self.radix.expire(pool);
        }
    }

    /// After how long [`Cache::work`] may have something to do.
    pub(crate) fn next_work(&self) -> Duration {
        match (self.radix.unoffered(), self.tiers()) {
            (0, _) | (_, None) => EXPIRE_EVERY,
            // Any size: an empty line takes every block.
            (_, Some(tiers)) if tiers.has_room(1) => Duration::ZERO,
            (_, Some(_)) => Duration::from_millis(10),
        }
    }

    /// Hands fresh blocks to the tiers, at least one and about `bytes` bytes, as far as the line takes them.
    fn store_some(&mut self, pool: &Pool, bytes: usize) {
        let Some((_, tiers)) = &self.options.below else {
            return;
        };
        let mut left = bytes;
        self.radix.offer(|name, pages| {
            if tiers.knows(&name.key()) {
                return true;
            }
            if left == 0 || !tiers.has_room(pool.shape().block_bytes()) {
                return false;
            }
            left = left.saturating_sub(pool.shape().block_bytes());
            store(tiers, pool, name, pages)
        });
    }

    /// Hands all fresh blocks to the tiers and waits until they are stored, at most for `patience`; `false` if it took longer.
    pub(crate) fn store_all(&mut self, pool: &Pool, patience: Duration) -> bool {
        let Some(tiers) = self.tiers().cloned() else {
            return true;
        };
        let until = Instant::now() + patience;
        while self.radix.unoffered() > 0 {
            self.store_some(pool, usize::MAX);
            if Instant::now() > until || !tiers.stats().alive {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        while tiers.stats().queued > 0 && tiers.stats().alive && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        let flushed = tiers.ask(|tiers| tiers.iter_mut().all(|t| t.flush().is_ok()));
        flushed
            .recv_timeout(until.saturating_duration_since(Instant::now()))
            .unwrap_or(false)
    }

    pub(crate) fn close(&mut self) {
        if let Some(tiers) = self.tiers() {
            tiers.close();
        }
    }

    /// Pins what is cached of `tokens`; all requests together leave room for one of `context` tokens.
    pub(crate) fn pin(
        &mut self,
        pool: &Pool,
        tokens: &[u32],
        salt: u64,
        context: usize,
    ) -> Result<usize, PinError> {
        let block = pool.shape().block_bytes();
        let most = pool
            .capacity()
            .saturating_sub(pool.bytes_for(context + PAGE_ROWS));
        let free = most.saturating_sub(self.radix.pinned() * block);
        let asked = self.radix.unpinned(tokens, salt) * block;
        match asked <= free {
            true => Ok(self.radix.pin(tokens, salt)),
            false => Err(PinError { asked, free }),
        }
    }

    pub(crate) fn unpin(&mut self, tokens: &[u32], salt: u64) -> usize {
        self.radix.unpin(tokens, salt)
    }

    pub(crate) fn clear(&mut self, pool: &mut Pool) {
        self.give_loads_up(pool);
        self.radix.clear(pool);
    }

    pub(crate) fn stats(&self) -> CacheStats {
        CacheStats {
            blocks: self.radix.blocks(),
            pinned: self.radix.pinned(),
            loaded: self.loaded.clone(),
            loading: self.loads.len(),
            to_store: self.radix.unoffered(),
            below: self.tiers().map(|t| t.stats()),
        }
    }
}

/// Copies a block out of the pool and hands it over.
fn store(tiers: &Tiers, pool: &Pool, name: &BlockName, pages: &[PageId]) -> bool {
    let bytes = pool.shape().block_bytes();
    if !tiers.has_room(bytes) {
        return false;
    }
    let mut payload = Vec::with_capacity(bytes);
    pool.export_pages(pages, &mut payload);
    tiers.put(name.clone(), payload)
}

/// Multiplications of a prompt's token: those with the weights, and two for every key and dimension of every query head.
fn recompute_cost(spec: &ModelSpec) -> RecomputeCost {
    let projections = spec.d_model * (2 * spec.q_dim() + 2 * spec.kv_dim());
    let layer = projections + 3 * spec.d_model * spec.d_ff;
    RecomputeCost {
        token: (spec.layers * layer) as f64,
        key: (spec.layers * 2 * spec.q_dim()) as f64,
    }
}

/// What admission needs to know of a waiting request.
pub(crate) struct Asking<'a> {
    pub(crate) id: SeqId,
    pub(crate) tokens: &'a [u32],
    pub(crate) salt: u64,
    pub(crate) keep: Keep,
}
