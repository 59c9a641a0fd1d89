//! How long blocks stay: times to live and pins.

use std::time::{Duration, Instant};

use super::{Node, Radix};
use crate::pool::Pool;

/// What a request wishes for the blocks that it leaves behind. Of several wishes for a block the most counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keep {
    /// They are forgotten when nobody has used them for as long. `None`: when their memory is needed.
    pub ttl: Option<Duration>,
    /// How many of its first tokens the request has said to be worth keeping: those are evicted later.
    pub marked: usize,
    /// Not to be written to the tiers below the memory.
    pub ram_only: bool,
}

/// What holds for one block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    ttl: Option<Duration>,
    pub(super) marked: bool,
    pub(super) ram_only: bool,
}

impl Kept {
    /// For the block whose first token is at `start`.
    pub(super) fn new(keep: Keep, start: usize) -> Self {
        Self {
            ttl: keep.ttl,
            marked: start < keep.marked,
            ram_only: keep.ram_only,
        }
    }

    pub(super) fn join(&mut self, keep: Keep, start: usize) {
        let other = Self::new(keep, start);
        self.ttl = match (self.ttl, other.ttl) {
            (Some(a), Some(b)) => Some(a.max(b)),
            _ => None,
        };
        self.marked |= other.marked;
        self.ram_only &= other.ram_only;
    }
}

impl Node {
    pub(super) fn is_expired(&self, now: Instant) -> bool {
        let idle = now.saturating_duration_since(self.touched);
        self.pins == 0 && self.keep.ttl.is_some_and(|ttl| idle >= ttl)
    }
}

impl Radix {
    /// Keeps what is cached of `tokens` until [`Radix::unpin`], whoever needs the memory, and returns how many tokens that are.
    /// Pins count: a block stays until all of its pins are gone.
    pub fn pin(&mut self, tokens: &[u32], salt: u64) -> usize {
        let path = self.path(tokens, salt);
        for &at in &path {
            if let Some(node) = &mut self.nodes[at] {
                self.pinned += usize::from(node.pins == 0);
                node.pins += 1;
            }
        }
        path.len() * antefix_state::PAGE_ROWS
    }

    /// Blocks that [`Radix::pin`] would pin and that are not pinned yet.
    pub fn unpinned(&self, tokens: &[u32], salt: u64) -> usize {
        let path = self.path(tokens, salt);
        let loose = |at: &usize| self.nodes[*at].as_ref().is_some_and(|n| n.pins == 0);
        path.into_iter().filter(loose).count()
    }

    /// Takes one pin off every block of `tokens`, and returns how many tokens had one.
    pub fn unpin(&mut self, tokens: &[u32], salt: u64) -> usize {
        let path = self.path(tokens, salt);
        let mut count = 0;
        for at in path {
            if let Some(node) = &mut self.nodes[at].as_mut().filter(|n| n.pins > 0) {
                node.pins -= 1;
                self.pinned -= usize::from(node.pins == 0);
                count += antefix_state::PAGE_ROWS;
            }
        }
        count
    }

    /// Forgets what has expired.
    pub fn expire(&mut self, pool: &mut Pool) {
        let now = self.now();
        for at in 0..self.nodes.len() {
            // No child outlives its parent: who uses or keeps a block does so for all before it.
            if self.nodes[at].as_ref().is_some_and(|n| n.is_expired(now)) {
                self.remove_below(pool, at);
            }
        }
    }
}
