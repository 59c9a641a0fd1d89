//! The tree of cached prefixes: one node per full block of 32 tokens.
//!
//! A child is found by its tokens themselves, not by a hash of them, so a hit is never a collision. Salts separate tenants.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use antefix_state::PAGE_ROWS;

use crate::pool::{PageId, Pool, SeqKv};

type Block = [u32; PAGE_ROWS];

struct Node {
    /// The pages of the block, `[layer * kv_heads + head]`; the tree is one of their owners.
    pages: Vec<PageId>,
    children: HashMap<Block, usize>,
    /// Parent node (or the salt's root) and the block under which this node hangs there.
    parent: Parent,
    block: Block,
    last_use: u64,
    touched: Instant,
}

#[derive(Clone, Copy)]
enum Parent {
    Root(u64),
    Node(usize),
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
}

/// Cached prefixes of one pool.
#[derive(Default)]
pub struct Radix {
    nodes: Vec<Option<Node>>,
    free: Vec<usize>,
    roots: HashMap<u64, HashMap<Block, usize>>,
    clock: u64,
}

impl Radix {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cached blocks.
    pub fn blocks(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    /// Nodes along `tokens`, as far as they are cached.
    fn path(&self, tokens: &[u32], salt: u64) -> Vec<usize> {
        let mut path = Vec::new();
        let mut children = self.roots.get(&salt);
        for block in tokens.as_chunks::<PAGE_ROWS>().0 {
            let Some(&at) = children.and_then(|c| c.get(block)) else {
                break;
            };
            path.push(at);
            children = self.nodes[at].as_ref().map(|n| &n.children);
        }
        path
    }

    /// How many of `tokens` are cached under `salt`; a multiple of 32.
    pub fn matched(&self, tokens: &[u32], salt: u64) -> usize {
        self.path(tokens, salt).len() * PAGE_ROWS
    }

    /// What is cached under `salt`, parents before their children, at most `limit` runs.
    pub fn runs(&self, pool: &Pool, salt: u64, limit: usize) -> Vec<Run> {
        let mut out: Vec<Run> = Vec::new();
        let sorted = |children: &HashMap<Block, usize>| {
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
            };
            while let Some(node) = &self.nodes[at] {
                run.tokens.extend_from_slice(&node.block);
                run.bytes += pool.shape().block_bytes();
                run.idle = run.idle.min(node.touched.elapsed());
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
        self.clock += 1;
        for at in self.path(tokens, salt) {
            if let Some(node) = &mut self.nodes[at] {
                node.last_use = self.clock;
                node.touched = Instant::now();
                for &page in &node.pages {
                    pool.add_ref(page);
                }
                seq.push_block(&node.pages);
            }
        }
        seq
    }

    /// Caches the full blocks of `tokens`, whose keys and values are in `seq`. Blocks already there are kept.
    ///
    /// # Panics
    /// When `seq` has fewer tokens written than `tokens` has full blocks.
    pub fn insert(&mut self, pool: &mut Pool, tokens: &[u32], salt: u64, seq: &SeqKv) {
        let blocks = tokens.as_chunks::<PAGE_ROWS>().0;
        assert!(
            seq.len() >= blocks.len() * PAGE_ROWS,
            "only written tokens are cached"
        );
        let path = self.path(tokens, salt);
        self.clock += 1;
        for &at in &path {
            if let Some(node) = &mut self.nodes[at] {
                node.last_use = self.clock;
                node.touched = Instant::now();
            }
        }
        let mut parent = path.last().map_or(Parent::Root(salt), |&at| Parent::Node(at));
        for (i, block) in blocks.iter().enumerate().skip(path.len()) {
            let pages = seq.block(i);
            pages.iter().for_each(|&page| pool.add_ref(page));
            let node = Node {
                pages,
                children: HashMap::new(),
                parent,
                block: *block,
                last_use: self.clock,
                touched: Instant::now(),
            };
            let at = if let Some(at) = self.free.pop() {
                self.nodes[at] = Some(node);
                at
            } else {
                self.nodes.push(Some(node));
                self.nodes.len() - 1
            };
            match parent {
                Parent::Root(salt) => {
                    self.roots.entry(salt).or_default().insert(*block, at);
                }
                Parent::Node(p) => {
                    if let Some(p) = &mut self.nodes[p] {
                        p.children.insert(*block, at);
                    }
                }
            }
            parent = Parent::Node(at);
        }
    }

    /// Drops least recently used leaves that no sequence holds until `pool` has `bytes` free or nothing can be dropped.
    pub fn evict(&mut self, pool: &mut Pool, bytes: usize) {
        while pool.free_bytes() < bytes {
            // A leaf older than its siblings goes first; its parent becomes a leaf for the next round.
            let mut leaves: Vec<(u64, usize)> = self
                .nodes
                .iter()
                .enumerate()
                .filter_map(|(at, node)| {
                    let node = node.as_ref()?;
                    let alone = node.children.is_empty() && node.pages.iter().all(|&p| pool.owners(p) == 1);
                    alone.then_some((node.last_use, at))
                })
                .collect();
            if leaves.is_empty() {
                return;
            }
            leaves.sort_unstable();
            for (_, at) in leaves {
                if pool.free_bytes() >= bytes {
                    return;
                }
                self.remove(pool, at);
            }
        }
    }

    fn remove(&mut self, pool: &mut Pool, at: usize) {
        let Some(node) = self.nodes[at].take() else { return };
        self.free.push(at);
        node.pages.iter().for_each(|&page| pool.drop_ref(page));
        match node.parent {
            Parent::Root(salt) => {
                if let Some(root) = self.roots.get_mut(&salt) {
                    root.remove(&node.block);
                    if root.is_empty() {
                        self.roots.remove(&salt);
                    }
                }
            }
            Parent::Node(p) => {
                if let Some(p) = &mut self.nodes[p] {
                    p.children.remove(&node.block);
                }
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self, pool: &mut Pool) {
        for node in self.nodes.drain(..).flatten() {
            node.pages.iter().for_each(|&page| pool.drop_ref(page));
        }
        self.free.clear();
        self.roots.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvDtype, KvShape};

    const SHAPE: KvShape = KvShape {
        layers: 1,
        kv_heads: 1,
        dim: 16,
        dtype: KvDtype::Bf16,
    };

    fn cached(pool: &mut Pool, radix: &mut Radix, tokens: &[u32]) {
        let mut seq = SeqKv::new(SHAPE);
        pool.reserve(&mut seq, tokens.len()).unwrap();
        seq.commit(tokens.len());
        radix.insert(pool, tokens, 0, &seq);
        pool.release(seq);
    }

    #[test]
    fn only_whole_blocks_with_equal_tokens_match() {
        let (mut pool, mut radix) = (Pool::new(SHAPE, 1 << 20), Radix::new());
        let tokens: Vec<u32> = (0..100).collect();
        cached(&mut pool, &mut radix, &tokens);
        assert_eq!(radix.matched(&tokens, 0), 96);
        assert_eq!(radix.matched(&tokens[..95], 0), 64);
        let mut other = tokens.clone();
        other[40] = 999;
        assert_eq!(radix.matched(&other, 0), 32);
        assert_eq!(radix.matched(&tokens, 1), 0);
    }

    #[test]
    fn runs_are_the_stretches_between_branches() {
        let (mut pool, mut radix) = (Pool::new(SHAPE, 1 << 20), Radix::new());
        let base: Vec<u32> = (0..96).collect();
        let branch = |x: u32| -> Vec<u32> { base[..64].iter().copied().chain([x; 32]).collect() };
        cached(&mut pool, &mut radix, &branch(7));
        cached(&mut pool, &mut radix, &branch(8));
        let runs = radix.runs(&pool, 0, 100);
        let shape: Vec<_> = runs
            .iter()
            .map(|r| (r.parent.is_some(), r.tokens.len(), r.bytes / SHAPE.page_bytes()))
            .collect();
        assert_eq!(shape, [(false, 64, 2), (true, 32, 1), (true, 32, 1)]);
        assert!(runs[1..].iter().all(|r| r.parent == Some(runs[0].id)));
        assert_eq!(radix.runs(&pool, 0, 1).len(), 1);
        assert!(radix.runs(&pool, 1, 100).is_empty());
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first_and_held_ones_stay() {
        let (mut pool, mut radix) = (Pool::new(SHAPE, 4 * SHAPE.page_bytes()), Radix::new());
        let (a, b): (Vec<u32>, Vec<u32>) = ((0..64).collect(), (100..164).collect());
        cached(&mut pool, &mut radix, &a);
        cached(&mut pool, &mut radix, &b);
        assert_eq!(pool.free_bytes(), 0);
        let held = radix.lookup(&mut pool, &a, 0);
        radix.evict(&mut pool, 1);
        assert_eq!((radix.matched(&a, 0), radix.matched(&b, 0)), (64, 32));
        radix.evict(&mut pool, usize::MAX);
        assert_eq!((radix.matched(&a, 0), radix.matched(&b, 0)), (64, 0));
        pool.release(held);
        radix.evict(&mut pool, usize::MAX);
        assert_eq!((radix.blocks(), pool.stats().bytes_used), (0, 0));
    }
}
