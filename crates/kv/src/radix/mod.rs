//! The tree of cached prefixes: one node per full block of 32 tokens.
//!
//! A child is found by its tokens themselves, not by a hash of them, so a hit is never a collision. Salts separate tenants.
//! Time is that of a monotonic clock: nobody's setting of the wall clock makes an entry older or younger.

mod evict;
mod keep;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use antefix_state::PAGE_ROWS;

use crate::key::{BlockName, BlockTokens, Fingerprint, Key};
use crate::pool::{PageId, Pool, SeqKv};

pub use evict::RecomputeCost;
pub use keep::Keep;

struct Node {
    /// The pages of the block, `[layer * kv_heads + head]`; the tree is one of their owners.
    pages: Vec<PageId>,
    children: HashMap<BlockTokens, usize>,
    /// Parent node, or nothing under the salt's root, and the block under which this node hangs there.
    parent: Option<usize>,
    salt: u64,
    block: BlockTokens,
    /// Position of its first token.
    start: usize,
    name: Key,
    /// What was wished for it; never less than for its children.
    keep: keep::Kept,
    pins: u32,
    /// Unique among all nodes there ever were, for `fresh`.
    serial: u64,
    last_use: u64,
    touched: Instant,
}

/// A stretch of cached blocks without a branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Its number, unique in a listing.
    pub id: usize,
    /// The run that it continues.
    pub parent: Option<usize>,
    /// Its own tokens.
    pub tokens: Vec<u32>,
    /// Bytes of its pages.
    pub bytes: usize,
    /// Since it was last used.
    pub idle: Duration,
    /// Of its first blocks, how many are pinned.
    pub pinned: usize,
}

/// Cached prefixes of one pool.
#[derive(Default)]
pub struct Radix {
    nodes: Vec<Option<Node>>,
    free: Vec<usize>,
    roots: HashMap<u64, HashMap<BlockTokens, usize>>,
    fingerprint: Fingerprint,
    cost: RecomputeCost,
    /// Ticks: one for each lookup and insertion.
    clock: u64,
    /// What tests have added to the clock.
    ahead: Duration,
    serials: u64,
    pinned: usize,
    /// Nodes that no tier has been given yet, if somebody wants to know.
    fresh: Option<VecDeque<(usize, u64)>>,
}

impl Radix {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty tree whose blocks have names that tiers know, and that weighs what to evict by `cost`.
    pub fn named(fingerprint: Fingerprint, cost: RecomputeCost) -> Self {
        Self {
            fingerprint,
            cost,
            ..Self::default()
        }
    }

    /// From now on, remembers which blocks came anew; see [`Radix::offer`].
    pub fn track(&mut self) {
        self.fresh.get_or_insert_default();
    }

    /// Cached blocks.
    pub fn blocks(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    /// Blocks that are pinned.
    pub fn pinned(&self) -> usize {
        self.pinned
    }

    /// As if `by` had passed: for tests of what expires.
    pub fn advance(&mut self, by: Duration) {
        self.ahead += by;
    }

    fn now(&self) -> Instant {
        Instant::now() + self.ahead
    }

    fn child(&self, parent: Option<usize>, salt: u64, block: &BlockTokens) -> Option<usize> {
        let children = match parent {
            Some(at) => self.nodes[at].as_ref().map(|n| &n.children),
            None => self.roots.get(&salt),
        };
        children?.get(block).copied()
    }

    /// Nodes along `tokens`, as far as they are cached and nothing has expired.
    fn path(&self, tokens: &[u32], salt: u64) -> Vec<usize> {
        let now = self.now();
        let mut path = Vec::new();
        for block in tokens.as_chunks::<PAGE_ROWS>().0 {
            let Some(at) = self.child(path.last().copied(), salt, block) else {
                break;
            };
            if self.nodes[at].as_ref().is_none_or(|n| n.is_expired(now)) {
                break;
            }
            path.push(at);
        }
        path
    }

    /// How many of `tokens` are cached under `salt`; a multiple of 32.
    pub fn matched(&self, tokens: &[u32], salt: u64) -> usize {
        self.path(tokens, salt).len() * PAGE_ROWS
    }

    /// How many of `tokens` are cached under `salt`, and the name of the last block of them: the parent of what comes next.
    pub fn matched_to(&self, tokens: &[u32], salt: u64) -> (usize, Key) {
        let path = self.path(tokens, salt);
        let last = path.last().and_then(|&at| self.nodes[at].as_ref());
        let name = last.map_or_else(|| self.fingerprint.root(salt), |n| n.name);
        (path.len() * PAGE_ROWS, name)
    }

    /// What is cached under `salt`, parents before their children, at most `limit` runs.
    pub fn runs(&self, pool: &Pool, salt: u64, limit: usize) -> Vec<Run> {
        let now = self.now();
        let mut out: Vec<Run> = Vec::new();
        let sorted = |children: &HashMap<BlockTokens, usize>| {
            let mut ids: Vec<usize> = children.values().copied().collect();
            ids.sort_unstable();
            ids
        };
        let mut stack: Vec<(Option<usize>, usize)> = match self.roots.get(&salt) {
            Some(children) => sorted(children).into_iter().map(|at| (None, at)).collect(),
            None => Vec::new(),
        };
        while let Some((parent, mut at)) = stack.pop() {
            if out.len() == limit {
                break;
            }
            let mut run = Run {
                id: at,
                parent,
                tokens: Vec::new(),
                bytes: 0,
                idle: Duration::MAX,
                pinned: 0,
            };
            while let Some(node) = &self.nodes[at] {
                run.tokens.extend_from_slice(&node.block);
                run.bytes += pool.shape().block_bytes();
                run.idle = run.idle.min(now.saturating_duration_since(node.touched));
                run.pinned += usize::from(node.pins > 0);
                let children = sorted(&node.children);
                match children[..] {
                    [only] => at = only,
                    _ => {
                        stack.extend(children.into_iter().map(|c| (Some(run.id), c)));
                        break;
                    }
                }
            }
            out.push(run);
        }
        out
    }

    /// The longest cached prefix of `tokens`, as a sequence that shares its pages. Empty if nothing is cached.
    pub fn lookup(&mut self, pool: &mut Pool, tokens: &[u32], salt: u64) -> SeqKv {
        let mut seq = SeqKv::new(pool.shape());
        let path = self.path(tokens, salt);
        self.touch(&path);
        for node in path.into_iter().filter_map(|at| self.nodes[at].as_ref()) {
            node.pages.iter().for_each(|&page| pool.add_ref(page));
            seq.push_block(&node.pages);
        }
        seq
    }

    /// Caches the full blocks of `tokens`, whose keys and values are in `seq`. Blocks already there are kept.
    ///
    /// # Panics
    /// When `seq` has fewer tokens written than `tokens` has full blocks.
    pub fn insert(&mut self, pool: &mut Pool, tokens: &[u32], salt: u64, seq: &SeqKv) {
        self.insert_kept(pool, tokens, salt, seq, Keep::default());
    }

    /// The same with a wish for how long they are kept, which also goes for those that are there already.
    ///
    /// # Panics
    /// As [`Radix::insert`].
    pub fn insert_kept(&mut self, pool: &mut Pool, tokens: &[u32], salt: u64, seq: &SeqKv, keep: Keep) {
        let blocks = tokens.as_chunks::<PAGE_ROWS>().0;
        assert!(
            seq.len() >= blocks.len() * PAGE_ROWS,
            "only written tokens are cached"
        );
        let path = self.path(tokens, salt);
        self.touch(&path);
        for (i, &at) in path.iter().enumerate() {
            if let Some(node) = &mut self.nodes[at] {
                node.keep.join(keep, i * PAGE_ROWS);
            }
        }
        let mut parent = path.last().copied();
        for (i, block) in blocks.iter().enumerate().skip(path.len()) {
            // What stands there has expired.
            if let Some(old) = self.child(parent, salt, block) {
                self.remove_below(pool, old);
            }
            let pages = seq.block(i);
            pages.iter().for_each(|&page| pool.add_ref(page));
            parent = Some(self.add(parent, salt, *block, i * PAGE_ROWS, pages, keep));
        }
    }

    /// The same for blocks that came from a tier: they are not offered to it again.
    ///
    /// # Panics
    /// As [`Radix::insert`].
    pub fn insert_stored(&mut self, pool: &mut Pool, tokens: &[u32], salt: u64, seq: &SeqKv, keep: Keep) {
        let fresh = self.fresh.take();
        self.insert_kept(pool, tokens, salt, seq, keep);
        self.fresh = fresh;
    }

    fn add(
        &mut self,
        parent: Option<usize>,
        salt: u64,
        block: BlockTokens,
        start: usize,
        pages: Vec<PageId>,
        keep: Keep,
    ) -> usize {
        let above = parent.and_then(|p| self.nodes[p].as_ref()).map(|n| n.name);
        let name = above.unwrap_or_else(|| self.fingerprint.root(salt)).child(&block);
        self.serials += 1;
        let node = Node {
            pages,
            children: HashMap::new(),
            parent,
            salt,
            block,
            start,
            name,
            keep: keep::Kept::new(keep, start),
            pins: 0,
            serial: self.serials,
            last_use: self.clock,
            touched: self.now(),
        };
        let at = if let Some(at) = self.free.pop() {
            self.nodes[at] = Some(node);
            at
        } else {
            self.nodes.push(Some(node));
            self.nodes.len() - 1
        };
        match parent.and_then(|p| self.nodes[p].as_mut()) {
            Some(node) => drop(node.children.insert(block, at)),
            None => drop(self.roots.entry(salt).or_default().insert(block, at)),
        }
        if let Some(fresh) = &mut self.fresh {
            fresh.push_back((at, self.serials));
        }
        at
    }

    fn touch(&mut self, path: &[usize]) {
        self.clock += 1;
        let (tick, now) = (self.clock, self.now());
        for &at in path {
            if let Some(node) = &mut self.nodes[at] {
                node.last_use = tick;
                node.touched = now;
            }
        }
    }

    /// Offers the blocks that came anew and may leave the memory, oldest first, until `take` refuses one; that one and those
    /// behind it are offered again.
    pub fn offer(&mut self, mut take: impl FnMut(&BlockName, &[PageId]) -> bool) {
        while let Some(&(at, serial)) = self.fresh.as_ref().and_then(VecDeque::front) {
            let node = self.nodes[at].as_ref().filter(|n| n.serial == serial);
            if let Some(node) = node.filter(|n| !n.keep.ram_only)
                && !take(&self.block_name(node), &node.pages)
            {
                return;
            }
            self.fresh.as_mut().map(VecDeque::pop_front);
        }
    }

    /// Blocks that wait to be offered; some may be gone by then.
    pub fn unoffered(&self) -> usize {
        self.fresh.as_ref().map_or(0, VecDeque::len)
    }

    fn block_name(&self, node: &Node) -> BlockName {
        let above = node.parent.and_then(|p| self.nodes[p].as_ref());
        BlockName {
            parent: above.map_or_else(|| self.fingerprint.root(node.salt), |n| n.name),
            salt: node.salt,
            tokens: node.block,
        }
    }

    /// Takes a leaf out.
    fn remove(&mut self, pool: &mut Pool, at: usize) {
        let Some(node) = self.nodes[at].take() else { return };
        self.free.push(at);
        self.pinned -= usize::from(node.pins > 0);
        node.pages.iter().for_each(|&page| pool.drop_ref(page));
        match node.parent.and_then(|p| self.nodes[p].as_mut()) {
            Some(parent) => drop(parent.children.remove(&node.block)),
            None => {
                if let Some(root) = self.roots.get_mut(&node.salt) {
                    root.remove(&node.block);
                    if root.is_empty() {
                        self.roots.remove(&node.salt);
                    }
                }
            }
        }
    }

    /// Takes a node and everything below it out.
    fn remove_below(&mut self, pool: &mut Pool, at: usize) {
        let mut order = vec![at];
        let mut next = 0;
        while let Some(&at) = order.get(next) {
            if let Some(node) = &self.nodes[at] {
                order.extend(node.children.values());
            }
            next += 1;
        }
        for at in order.into_iter().rev() {
            self.remove(pool, at);
        }
    }

    /// Forgets everything, what is pinned as well.
    pub fn clear(&mut self, pool: &mut Pool) {
        for node in self.nodes.drain(..).flatten() {
            node.pages.iter().for_each(|&page| pool.drop_ref(page));
        }
        self.free.clear();
        self.roots.clear();
        self.pinned = 0;
        if let Some(fresh) = &mut self.fresh {
            fresh.clear();
        }
    }
}

#[cfg(test)]
mod tests;
