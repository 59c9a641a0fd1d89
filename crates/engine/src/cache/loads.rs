//! Prompts on their way from a tier back into memory.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use antefix_kv::tiers::Fetched;
use antefix_kv::{BlockName, Keep, KvError, Pool, SeqKv};
use antefix_state::PAGE_ROWS;

use super::{Asking, Cache};
use crate::schedule::SeqId;

/// Prompts that are read at the same time; the others wait their turn.
const LOADS: usize = 4;

/// Bytes of blocks that are asked for at a time, if that is 1 to 16 blocks: so many wait in memory at most.
const BATCH_BYTES: usize = 8 << 20;

/// Bytes that are copied into the pool a step.
const LOAD_BYTES: usize = 32 << 20;

/// A tier that brings nothing for as long is given up, and the rest of the prompt computed.
const PATIENCE: Duration = Duration::from_secs(2);

/// A tier that takes longer for a block, [`PATIENCE`] aside, is slower than computing it.
const BLOCK_PATIENCE: Duration = Duration::from_millis(50);

/// One prompt. It holds its pages, so that nobody evicts them before it starts.
pub(super) struct Load {
    id: SeqId,
    salt: u64,
    tokens: Vec<u32>,
    keep: Keep,
    /// What was in memory, and what has come so far.
    kv: SeqKv,
    from_ram: usize,
    /// Blocks that are wanted behind those of `kv`, in order.
    wanted: VecDeque<BlockName>,
    inbox: Receiver<Fetched>,
    /// Taken out of the inbox while somebody waited for it.
    early: Option<Fetched>,
    progress: Instant,
    began: Instant,
    over: bool,
}

impl Load {
    fn next(&mut self) -> Result<Fetched, TryRecvError> {
        match self.early.take() {
            Some(fetched) => Ok(fetched),
            None => self.inbox.try_recv(),
        }
    }

    /// Whether its blocks come, but too slowly to be worth waiting for the rest.
    fn is_slow(&self) -> bool {
        let blocks = (self.kv.len() - self.from_ram) / PAGE_ROWS;
        self.began.elapsed() > PATIENCE + BLOCK_PATIENCE * blocks as u32
    }

    /// The next blocks to ask for.
    fn batch(&self, pool: &Pool) -> Vec<BlockName> {
        let most = (BATCH_BYTES / pool.shape().block_bytes()).clamp(1, 16);
        self.wanted.iter().take(most).cloned().collect()
    }
}

/// What a load has brought for its request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Tokens that were in memory.
    pub(crate) from: usize,
    /// Tokens up to which a tier has brought them.
    pub(crate) to: usize,
}

impl Cache {
    /// Decides whether a request that has come into line must wait for a tier: `true` once it has been decided. A prompt that another
    /// request is having read waits for that one.
    pub(crate) fn look_below(&mut self, pool: &mut Pool, asking: &Asking<'_>) -> bool {
        let Some(tiers) = self.tiers().cloned() else {
            return true;
        };
        let (ram, mut name) = self.radix.matched_to(asking.tokens, asking.salt);
        let rest = asking.tokens[ram..].as_chunks::<PAGE_ROWS>().0;
        let Some(next) = rest.first().map(|block| name.child(block)) else {
            return true;
        };
        if !tiers.may_have(&next) {
            return true;
        }
        let comes = |load: &Load| load.wanted.iter().any(|block| block.key() == next);
        if self.loads.len() >= LOADS || self.loads.iter().any(comes) {
            return false;
        }
        let mut wanted = VecDeque::new();
        for block in rest {
            let block = BlockName {
                parent: name,
                salt: asking.salt,
                tokens: *block,
            };
            name = block.key();
            if !tiers.may_have(&name) {
                break;
            }
            wanted.push_back(block);
        }
        let kv = self.radix.lookup(pool, &asking.tokens[..ram], asking.salt);
        let whole = ram + wanted.len() * PAGE_ROWS;
        let mut load = Load {
            id: asking.id,
            salt: asking.salt,
            tokens: asking.tokens[..whole].to_vec(),
            keep: self.wish(asking.keep),
            kv,
            from_ram: ram,
            wanted,
            inbox: std::sync::mpsc::channel().1,
            early: None,
            progress: Instant::now(),
            began: Instant::now(),
            over: false,
        };
        load.inbox = tiers.fetch(load.batch(pool));
        self.loads.push(load);
        true
    }

    /// Whether a tier is still bringing the prompt of `id`.
    pub(crate) fn is_loading(&self, id: SeqId) -> bool {
        self.loads.iter().any(|load| load.id == id && !load.over)
    }

    /// What came for `id`; asked once, when it starts.
    pub(crate) fn take_loaded(&mut self, pool: &mut Pool, id: SeqId) -> Loaded {
        let Some(at) = self.loads.iter().position(|load| load.id == id) else {
            return Loaded::default();
        };
        let load = self.loads.swap_remove(at);
        let loaded = Loaded {
            from: load.from_ram,
            to: load.kv.len(),
        };
        pool.release(load.kv);
        loaded
    }

    /// Gives the memory of all loads back; what has come stays cached as long as it can.
    pub(crate) fn give_loads_up(&mut self, pool: &mut Pool) -> bool {
        let any = !self.loads.is_empty();
        for load in self.loads.drain(..) {
            pool.release(load.kv);
        }
        any
    }

    /// Waits a moment for a block, when there is nothing else to do.
    pub(crate) fn wait_for_block(&mut self) {
        let Some(load) = self.loads.iter_mut().find(|l| !l.over && l.early.is_none()) else {
            return;
        };
        load.early = load.inbox.recv_timeout(Duration::from_millis(5)).ok();
    }

    /// Moves what has come into the pool and the tree.
    pub(super) fn take_loaded_blocks(&mut self, pool: &mut Pool) {
        let mut left = LOAD_BYTES;
        let mut loads = std::mem::take(&mut self.loads);
        for load in loads.iter_mut().filter(|load| !load.over) {
            let before = load.kv.len();
            while left > 0 && !load.over {
                match load.next() {
                    Ok(Fetched::Block { payload, tier }) => {
                        left = left.saturating_sub(payload.len());
                        load.progress = Instant::now();
                        load.over = self.import(pool, load, &payload).is_err();
                        if !load.over {
                            load.wanted.pop_front();
                            self.loaded.resize(self.loaded.len().max(tier + 1), 0);
                            self.loaded[tier] += 1;
                        }
                    }
                    Ok(Fetched::End { complete: true }) if !load.wanted.is_empty() => match self.tiers() {
                        Some(tiers) => load.inbox = tiers.fetch(load.batch(pool)),
                        None => load.over = true,
                    },
                    Ok(Fetched::End { .. }) | Err(TryRecvError::Disconnected) => load.over = true,
                    Err(TryRecvError::Empty) => {
                        load.over = load.progress.elapsed() > PATIENCE || load.is_slow();
                        break;
                    }
                }
            }
            let now = load.kv.len();
            if now > before {
                let tokens = &load.tokens[..now];
                self.radix
                    .insert_stored(pool, tokens, load.salt, &load.kv, load.keep);
            }
        }
        self.loads = loads;
    }

    fn import(&mut self, pool: &mut Pool, load: &mut Load, payload: &[u8]) -> Result<(), KvError> {
        match pool.import_block(&mut load.kv, payload) {
            Err(KvError::OutOfMemory { asked, .. }) => {
                self.evict(pool, asked);
                pool.import_block(&mut load.kv, payload)
            }
            done => done,
        }
    }
}
