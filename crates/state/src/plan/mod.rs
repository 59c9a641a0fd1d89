//! A plan: which keys each block of queries reads, as data that can be checked, printed and compared.
//!
//! One plan covers one layer. Positions are absolute; query block `b` covers positions `[b * block, (b + 1) * block)`.

mod build;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;

use crate::PAGE_ROWS;
pub use build::Builder;

/// For whom a [`Cover`] stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// One cover per query head, `Hq` in all.
    QueryHead,
    /// One cover per key/value head, `Hk` in all: the query heads of a group read the same keys.
    KvGroup,
}

/// Whether a query may see later keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A query at position `p` sees keys `<= p`.
    Causal,
    /// Every query sees every key.
    Bidirectional,
}

/// The keys of one layer. `units.len()` is `Hq` or `Hk`, as `unit` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// For whom each cover stands.
    pub unit: Unit,
    /// Whether queries see later keys.
    pub scope: Scope,
    /// One cover per unit.
    pub units: Vec<Cover>,
}

/// The keys that one unit reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cover {
    /// All of them.
    Dense,
    /// Those listed, block by block.
    Sparse(Rows),
}

/// Segments per block of query rows, in compressed rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    /// Query rows a block; 1 for decode.
    pub block: u32,
    /// Absolute index of the first planned block.
    pub first_block: u32,
    /// Segments of the `i`-th planned block are `segs[offsets[i]..offsets[i + 1]]`.
    pub offsets: Vec<u32>,
    /// Segments, ascending and disjoint within a block.
    pub segs: Vec<Seg>,
    /// Positions of all gathers.
    pub idx: Vec<u32>,
}

/// How a span ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// Every query of the block sees all of it.
    Full,
    /// It holds the diagonal: a query sees keys up to itself.
    Causal,
}

/// A piece of a block's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seg {
    /// Contiguous keys `[start, end)`.
    Span {
        /// First key.
        start: u32,
        /// One past the last key.
        end: u32,
        /// How it ends.
        edge: Edge,
    },
    /// Keys `idx[at..at + len]`, strictly ascending, wholly before the block's first query.
    Gather {
        /// First entry in [`Rows::idx`].
        at: u32,
        /// Number of keys.
        len: u32,
    },
}

/// Which rule a plan breaks, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanError {
    /// Unit (head or group).
    pub unit: usize,
    /// Planned block, counted from the first.
    pub block: usize,
    /// The rule.
    pub rule: &'static str,
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unit {}, block {}: {}", self.unit, self.block, self.rule)
    }
}

impl std::error::Error for PlanError {}

impl Rows {
    /// Planned blocks.
    pub fn blocks(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Positions of the queries of the `i`-th planned block, of `queries`.
    pub fn queries_of(&self, i: usize, queries: &Range<u32>) -> Range<u32> {
        let start = (self.first_block + i as u32) * self.block;
        start.max(queries.start)..(start + self.block).min(queries.end)
    }

    /// Segments of the `i`-th planned block.
    pub fn segs_of(&self, i: usize) -> &[Seg] {
        &self.segs[self.offsets[i] as usize..self.offsets[i + 1] as usize]
    }

    /// The keys of the `i`-th planned block as runs `[start, end)`, ascending, the diagonal included.
    pub fn runs(&self, i: usize) -> impl Iterator<Item = (u32, u32)> {
        self.segs_of(i).iter().flat_map(|seg| match *seg {
            Seg::Span { start, end, .. } => Keys::Span(Some((start, end))),
            Seg::Gather { at, len } => Keys::Gather(self.idx[at as usize..(at + len) as usize].iter()),
        })
    }

    /// The keys of the `i`-th planned block, ascending, the diagonal included.
    pub fn keys(&self, i: usize) -> Vec<u32> {
        self.runs(i).flat_map(|(start, end)| start..end).collect()
    }

    /// One number a page of [`PAGE_ROWS`] keys, from position 0 to the last key of the `i`-th planned block: a bit for each key that it reads.
    pub fn page_bits(&self, i: usize) -> Vec<u32> {
        let mut bits: Vec<u32> = Vec::new();
        for (start, end) in self.runs(i) {
            bits.resize((end as usize).div_ceil(PAGE_ROWS), 0);
            let (mut at, end) = (start as usize, end as usize);
            while at < end {
                let (page, from) = (at / PAGE_ROWS, at % PAGE_ROWS);
                let n = (PAGE_ROWS - from).min(end - at);
                bits[page] |= (u32::MAX >> (PAGE_ROWS - n)) << from;
                at += n;
            }
        }
        bits
    }

    /// Kept (query, key) pairs, of `queries`.
    pub fn pairs(&self, queries: Range<u32>) -> u64 {
        let one = |i: usize| {
            let at = self.queries_of(i, &queries);
            let rows = u64::from(at.end - at.start);
            let before = self
                .runs(i)
                .map(|(start, end)| u64::from(end.min(at.start).saturating_sub(start)));
            before.sum::<u64>() * rows + rows * (rows + 1) / 2
        };
        (0..self.blocks()).map(one).sum()
    }
}

/// Runs of one segment.
enum Keys<'a> {
    Span(Option<(u32, u32)>),
    Gather(std::slice::Iter<'a, u32>),
}

impl Iterator for Keys<'_> {
    type Item = (u32, u32);

    fn next(&mut self) -> Option<(u32, u32)> {
        match self {
            Self::Span(span) => span.take(),
            Self::Gather(keys) => keys.next().map(|&k| (k, k + 1)),
        }
    }
}

/// Pairs of a causal plan that keeps everything, one unit.
pub fn causal_pairs(queries: Range<u32>) -> u64 {
    let upto = |n: u32| u64::from(n) * (u64::from(n) + 1) / 2;
    upto(queries.end) - upto(queries.start)
}

impl Plan {
    /// Every key, for `units` units.
    pub fn dense(unit: Unit, units: usize) -> Self {
        Self {
            unit,
            scope: Scope::Causal,
            units: vec![Cover::Dense; units],
        }
    }

    /// Whether every unit reads every key.
    pub fn is_dense(&self) -> bool {
        self.units.iter().all(|unit| *unit == Cover::Dense)
    }

    /// Kept (query, key) pairs of `queries`, all units together, and how many a dense plan has.
    pub fn pairs(&self, queries: Range<u32>) -> (u64, u64) {
        let all = causal_pairs(queries.clone());
        let kept = self.units.iter().map(|unit| match unit {
            Cover::Dense => all,
            Cover::Sparse(rows) => rows.pairs(queries.clone()),
        });
        (kept.sum(), all * self.units.len() as u64)
    }

    /// Kept pairs over causal pairs, all units together; 1 for a dense plan.
    pub fn density(&self, queries: Range<u32>) -> f64 {
        match self.pairs(queries) {
            (_, 0) => 1.0,
            (kept, all) => kept as f64 / all as f64,
        }
    }

    /// Checks that there is one cover for each of `heads` query heads or `kv_heads` key/value heads.
    ///
    /// # Errors
    /// When there are more or fewer.
    pub fn fits(&self, heads: usize, kv_heads: usize) -> Result<(), PlanError> {
        let want = match self.unit {
            Unit::QueryHead => heads,
            Unit::KvGroup => kv_heads,
        };
        match self.units.len() == want {
            true => Ok(()),
            false => Err(PlanError {
                unit: self.units.len(),
                block: 0,
                rule: "there is one cover for each head",
            }),
        }
    }

    /// Checks every rule of a causal plan for the queries `[p0, p0 + n)`.
    ///
    /// # Errors
    /// The first broken rule, with unit and block.
    pub fn validate(&self, queries: Range<u32>) -> Result<(), PlanError> {
        for (unit, cover) in self.units.iter().enumerate() {
            if let Cover::Sparse(rows) = cover {
                rows.check(&queries)
                    .map_err(|(block, rule)| PlanError { unit, block, rule })?;
            }
        }
        Ok(())
    }
}

impl Rows {
    fn check(&self, queries: &Range<u32>) -> Result<(), (usize, &'static str)> {
        if self.block == 0 || self.first_block != queries.start / self.block {
            return Err((0, "the first block must hold the first query"));
        }
        let want = queries.end.div_ceil(self.block) - self.first_block;
        if self.blocks() != want as usize {
            return Err((self.blocks(), "every block of queries needs a row"));
        }
        let ends = self.offsets.last().copied().unwrap_or(0) as usize == self.segs.len();
        if self.offsets.first() != Some(&0) || !ends || self.offsets.windows(2).any(|w| w[0] > w[1]) {
            return Err((0, "offsets must rise from 0 to the number of segments"));
        }
        for i in 0..self.blocks() {
            let Range { start, end } = self.queries_of(i, queries);
            let mut seen = None;
            let mut diagonal = false;
            for seg in self.segs_of(i) {
                let (lo, hi) = match *seg {
                    Seg::Span {
                        start: s,
                        end: e,
                        edge,
                    } => {
                        if s >= e {
                            return Err((i, "a span is never empty"));
                        }
                        match edge {
                            Edge::Causal if s > start || e != end => {
                                return Err((i, "the causal span holds the whole diagonal"));
                            }
                            Edge::Full if e > start => {
                                return Err((i, "a full span ends before the block's queries"));
                            }
                            Edge::Causal => diagonal = true,
                            Edge::Full => {}
                        }
                        (s, e - 1)
                    }
                    Seg::Gather { at, len } => {
                        let keys = (at as usize)
                            .checked_add(len as usize)
                            .and_then(|e| self.idx.get(at as usize..e));
                        let Some(keys) = keys.filter(|k| !k.is_empty()) else {
                            return Err((i, "a gather lies inside the index list and is never empty"));
                        };
                        if keys.windows(2).any(|w| w[0] >= w[1]) {
                            return Err((i, "a gather is strictly ascending"));
                        }
                        if keys[keys.len() - 1] >= start {
                            return Err((i, "a gather ends before the block's queries"));
                        }
                        (keys[0], keys[keys.len() - 1])
                    }
                };
                if seen.is_some_and(|s| s >= lo) {
                    return Err((i, "segments ascend and are disjoint"));
                }
                seen = Some(hi);
            }
            if !diagonal {
                return Err((i, "every query keeps at least its own key"));
            }
        }
        Ok(())
    }
}
