//! Building plans: blocks of queries one after the other, always in normal form.
//!
//! Normal form: touching runs are one span, short runs stand in gathers, the run that touches the diagonal belongs to its span, and a
//! unit that keeps everything is [`Cover::Dense`].

use std::ops::Range;

use super::{Cover, Edge, Rows, Seg};

/// Consecutive keys from which a gather becomes a span: below it, one more segment costs more than it saves.
const SPAN_FROM: u32 = 8;

/// Builds the cover of one unit, block by block.
///
/// ```
/// use antefix_state::plan::{Builder, Cover};
/// let mut builder = Builder::new(16, 32..64);
/// while let Some(block) = builder.block() {
///     // The first four keys, and 8 before the block; its own are always kept.
///     builder.push([(0, 4), (block.start - 8, block.start)]);
/// }
/// let Cover::Sparse(rows) = builder.finish() else { panic!() };
/// assert_eq!(rows.keys(1), (0..4).chain(40..64).collect::<Vec<_>>());
/// ```
#[derive(Debug, Clone)]
pub struct Builder {
    rows: Rows,
    queries: Range<u32>,
    loose: Vec<u32>,
}

impl Builder {
    /// A cover of the queries at positions `queries` in blocks of `block` rows, whose borders are multiples of `block`.
    ///
    /// # Panics
    /// When `block` is 0.
    pub fn new(block: u32, queries: Range<u32>) -> Self {
        assert!(block > 0, "a block has rows");
        Self {
            rows: Rows {
                block,
                first_block: queries.start / block,
                offsets: vec![0],
                segs: Vec::new(),
                idx: Vec::new(),
            },
            queries,
            loose: Vec::new(),
        }
    }

    /// Positions of the queries of the block that comes next; `None` when all are there.
    pub fn block(&self) -> Option<Range<u32>> {
        let at = self.rows.queries_of(self.rows.blocks(), &self.queries);
        (!at.is_empty()).then_some(at)
    }

    /// Appends the next block. Before its first query it reads the keys of `runs`, `[start, end)` by ascending start; they may touch
    /// and overlap, and what they hold of later keys is dropped. Of its own keys it reads all that causality allows.
    ///
    /// # Panics
    /// When all blocks are there.
    pub fn push(&mut self, runs: impl IntoIterator<Item = (u32, u32)>) {
        let at = self.block().expect("a block that is missing");
        let mut open: Option<(u32, u32)> = None;
        for (start, end) in runs {
            let end = end.min(at.start);
            if start >= end {
                continue;
            }
            match &mut open {
                Some(run) if start <= run.1 => {
                    debug_assert!(run.0 <= start, "runs ascend");
                    run.1 = run.1.max(end);
                }
                _ => self.close(open.replace((start, end))),
            }
        }
        let diagonal = match open {
            Some((start, end)) if end == at.start => start,
            _ => {
                self.close(open);
                at.start
            }
        };
        self.flush();
        self.rows.segs.push(Seg::Span {
            start: diagonal,
            end: at.end,
            edge: Edge::Causal,
        });
        self.rows.offsets.push(self.rows.segs.len() as u32);
    }

    /// As [`Builder::push`], of the blocks of `size` keys with these ascending indices.
    ///
    /// # Panics
    /// When all blocks are there.
    pub fn push_blocks(&mut self, size: u32, indices: &[u32]) {
        self.push(indices.iter().map(|&b| (b * size, (b + 1) * size)));
    }

    /// The cover.
    ///
    /// # Panics
    /// When blocks are missing.
    pub fn finish(self) -> Cover {
        assert!(self.block().is_none(), "all blocks are there");
        let all = |i: usize| matches!(self.rows.segs_of(i), [Seg::Span { start: 0, .. }]);
        match (0..self.rows.blocks()).all(all) {
            true => Cover::Dense,
            false => Cover::Sparse(self.rows),
        }
    }

    fn close(&mut self, run: Option<(u32, u32)>) {
        match run {
            None => {}
            Some((start, end)) if end - start >= SPAN_FROM => {
                self.flush();
                self.rows.segs.push(Seg::Span {
                    start,
                    end,
                    edge: Edge::Full,
                });
            }
            Some((start, end)) => self.loose.extend(start..end),
        }
    }

    fn flush(&mut self) {
        if !self.loose.is_empty() {
            self.rows.segs.push(Seg::Gather {
                at: self.rows.idx.len() as u32,
                len: self.loose.len() as u32,
            });
            self.rows.idx.append(&mut self.loose);
        }
    }
}

impl Cover {
    /// Blocks of `block` queries, each with the set of keys that it may read beside its own; `sets[i]` in any order. Keys at or behind
    /// a block's first query are dropped.
    ///
    /// # Panics
    /// When there is not one set a block.
    pub fn from_sets(block: u32, queries: Range<u32>, sets: &[Vec<u32>]) -> Self {
        let mut builder = Builder::new(block, queries);
        for set in sets {
            let mut keys = set.clone();
            keys.sort_unstable();
            builder.push(keys.into_iter().map(|k| (k, k + 1)));
        }
        builder.finish()
    }

    /// The same from ascending indices of blocks of `keys` keys.
    ///
    /// # Panics
    /// When there is not one list a block of queries.
    pub fn from_blocks(block: u32, queries: Range<u32>, keys: u32, lists: &[Vec<u32>]) -> Self {
        let mut builder = Builder::new(block, queries);
        for list in lists {
            builder.push_blocks(keys, list);
        }
        builder.finish()
    }

    /// Sinks `[0, sinks)` and a window of `window` keys before each block (StreamingLLM's A-shape).
    pub fn a_shape(block: u32, queries: Range<u32>, sinks: u32, window: u32) -> Self {
        let mut builder = Builder::new(block, queries);
        while let Some(at) = builder.block() {
            builder.push([(0, sinks), (at.start.saturating_sub(window), at.start)]);
        }
        builder.finish()
    }

    /// The keys of both, which plan the same queries in the same blocks.
    ///
    /// # Panics
    /// When the blocks differ.
    #[must_use]
    pub fn union(&self, other: &Self, queries: Range<u32>) -> Self {
        let (Self::Sparse(a), Self::Sparse(b)) = (self, other) else {
            return Self::Dense;
        };
        assert_eq!(a.block, b.block, "covers of the same blocks");
        let mut builder = Builder::new(a.block, queries);
        for i in 0..a.blocks() {
            let mut runs: Vec<(u32, u32)> = a.runs(i).chain(b.runs(i)).collect();
            runs.sort_unstable();
            builder.push(runs);
        }
        builder.finish()
    }

    /// The same pairs in normal form: idempotent.
    #[must_use]
    pub fn coalesce(&self, queries: Range<u32>) -> Self {
        self.union(self, queries)
    }
}
