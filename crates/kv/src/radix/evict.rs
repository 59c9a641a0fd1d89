//! What goes when memory is needed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{Node, Radix};
use crate::key::BlockName;
use crate::pool::{PageId, Pool};

/// What computing a token again costs, in any unit: `token + position * key`.
///
/// Blocks all have the same bytes, so this alone weighs one against another: those far behind cost more attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RecomputeCost {
    /// The weights' share, the same for every token.
    pub token: f64,
    /// Attention to one key.
    pub key: f64,
}

impl Default for RecomputeCost {
    /// Every token costs the same, so that only the order of use counts.
    fn default() -> Self {
        Self { token: 1.0, key: 0.0 }
    }
}

/// A block that a client has marked counts as if it had been used this many times more recently.
const MARK: f64 = 4.0;

/// Worth of a block, for a heap: totally ordered.
#[derive(PartialEq)]
struct Worth(f64);

impl Eq for Worth {}

impl PartialOrd for Worth {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Worth {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl Radix {
    /// What is lost with a block over the time since it was used, in ticks.
    fn worth(&self, node: &Node) -> Worth {
        let age = (self.clock - node.last_use + 1) as f64;
        let cost = self.cost.token + self.cost.key * node.start as f64;
        Worth(cost * if node.keep.marked { MARK } else { 1.0 } / age)
    }

    /// Whether nobody but the tree holds the node's pages.
    fn is_alone(pool: &Pool, node: &Node) -> bool {
        node.pages.iter().all(|&page| pool.owners(page) == 1)
    }

    /// The node, if nothing hangs below it and it is not pinned.
    fn leaf(&self, at: usize) -> Option<&Node> {
        let node = self.nodes[at].as_ref()?;
        (node.pins == 0 && node.children.is_empty()).then_some(node)
    }

    /// Whether pages that nobody but the tree holds could go if `node` went.
    fn is_in_the_way(&self, pool: &Pool, node: &Node) -> bool {
        let above = |n: &Node| n.parent.and_then(|p| self.nodes[p].as_ref());
        let mut chain = std::iter::successors(Some(node), |n| above(n));
        chain.any(|n| n.pins == 0 && Self::is_alone(pool, n))
    }

    /// Drops leaves that no sequence holds, those of the least worth first, until `pool` has `bytes` free or nothing can be
    /// dropped. What has expired goes before anything else; leaves that a sequence holds go last, and only if something above them
    /// can go then: the sequence had computed again what was cached.
    pub fn evict(&mut self, pool: &mut Pool, bytes: usize) {
        self.evict_to(pool, |pool, _| pool.free_bytes() >= bytes, |_, _, _| {});
    }

    /// The same until `enough` says so of the pool and the number of cached blocks; `leaving` sees each block that goes and may
    /// leave the memory.
    pub fn evict_to(
        &mut self,
        pool: &mut Pool,
        enough: impl Fn(&Pool, usize) -> bool,
        mut leaving: impl FnMut(&Pool, &BlockName, &[PageId]),
    ) {
        if enough(pool, self.blocks()) {
            return;
        }
        self.expire(pool);
        let alone = |_: &Self, pool: &Pool, node: &Node| Self::is_alone(pool, node);
        self.evict_leaves(pool, &enough, &mut leaving, alone);
        self.evict_leaves(pool, &enough, &mut leaving, Self::is_in_the_way);
    }

    /// Drops leaves that `may_go`, and their parents when they have become leaves, until there is `enough`.
    fn evict_leaves(
        &mut self,
        pool: &mut Pool,
        enough: impl Fn(&Pool, usize) -> bool,
        mut leaving: impl FnMut(&Pool, &BlockName, &[PageId]),
        may_go: impl Fn(&Self, &Pool, &Node) -> bool,
    ) {
        let worth = |radix: &Self, pool: &Pool, at: usize| {
            let node = radix.leaf(at).filter(|n| may_go(radix, pool, n))?;
            Some(Reverse((radix.worth(node), at)))
        };
        if enough(pool, self.blocks()) {
            return;
        }
        let leaves = (0..self.nodes.len()).filter_map(|at| worth(self, pool, at));
        let mut heap: BinaryHeap<Reverse<(Worth, usize)>> = leaves.collect();
        while !enough(pool, self.blocks())
            && let Some(Reverse((_, at))) = heap.pop()
        {
            let Some(node) = &self.nodes[at] else { continue };
            let parent = node.parent;
            if !node.keep.ram_only {
                leaving(pool, &self.block_name(node), &node.pages);
            }
            self.remove(pool, at);
            heap.extend(parent.and_then(|at| worth(self, pool, at)));
        }
    }
}
