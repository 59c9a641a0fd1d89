//! A plan: which keys each block of queries reads, as data that can be checked, printed and compared.
//!
//! One plan covers one layer. Positions are absolute; query block `b` covers positions `[b * block, (b + 1) * block)`.

use std::fmt;

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

/// Consecutive keys from which a gather becomes a span: below it, one more segment costs more than it saves.
const SPAN_FROM: usize = 8;

impl Rows {
    /// Builds the normal form from the set of keys that each block may read (beside causality).
    ///
    /// `sets[i]` belongs to block `first_block + i`. Keys after the block's last query are dropped; keys inside the block are
    /// always kept as one causal span, because every query must see at least itself. `queries` is `[p0, p0 + n)`.
    pub fn from_sets(block: u32, queries: std::ops::Range<u32>, sets: &[Vec<u32>]) -> Self {
        let first_block = queries.start / block;
        let mut rows = Self {
            block,
            first_block,
            offsets: vec![0],
            segs: Vec::new(),
            idx: Vec::new(),
        };
        for (i, set) in sets.iter().enumerate() {
            let start = ((first_block + i as u32) * block).max(queries.start);
            let end = ((first_block + i as u32 + 1) * block).min(queries.end);
            let mut keys: Vec<u32> = set.iter().copied().filter(|&k| k < start).collect();
            keys.sort_unstable();
            keys.dedup();
            rows.push_block(&keys, start, end);
        }
        rows
    }

    /// Appends a block whose past keys are `keys` (ascending, all before `start`) and whose diagonal is `[start, end)`.
    fn push_block(&mut self, keys: &[u32], start: u32, end: u32) {
        // The run that touches the diagonal joins its span.
        let mut tail = keys.len();
        let mut diagonal = start;
        while tail > 0 && keys[tail - 1] + 1 == diagonal {
            tail -= 1;
            diagonal = keys[tail];
        }
        let mut at = 0;
        let mut loose: Vec<u32> = Vec::new();
        while at < tail {
            let mut next = at + 1;
            while next < tail && keys[next] == keys[next - 1] + 1 {
                next += 1;
            }
            if next - at >= SPAN_FROM {
                self.flush_gather(&mut loose);
                self.segs.push(Seg::Span {
                    start: keys[at],
                    end: keys[next - 1] + 1,
                    edge: Edge::Full,
                });
            } else {
                loose.extend_from_slice(&keys[at..next]);
            }
            at = next;
        }
        self.flush_gather(&mut loose);
        self.segs.push(Seg::Span {
            start: diagonal,
            end,
            edge: Edge::Causal,
        });
        self.offsets.push(self.segs.len() as u32);
    }

    fn flush_gather(&mut self, loose: &mut Vec<u32>) {
        if !loose.is_empty() {
            self.segs.push(Seg::Gather {
                at: self.idx.len() as u32,
                len: loose.len() as u32,
            });
            self.idx.append(loose);
        }
    }

    /// Sinks `[0, sink)` and a window of `window` keys before each block (StreamingLLM's A-shape).
    pub fn a_shape(block: u32, queries: std::ops::Range<u32>, sink: u32, window: u32) -> Self {
        let first = queries.start / block;
        let blocks = queries.end.div_ceil(block) - first;
        let sets: Vec<Vec<u32>> = (0..blocks)
            .map(|i| {
                let start = ((first + i) * block).max(queries.start);
                (0..sink.min(start))
                    .chain(start.saturating_sub(window)..start)
                    .collect()
            })
            .collect();
        Self::from_sets(block, queries, &sets)
    }

    /// Planned blocks.
    pub fn blocks(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// The keys of the `i`-th planned block, ascending, the diagonal included.
    pub fn keys(&self, i: usize) -> Vec<u32> {
        let segs = &self.segs[self.offsets[i] as usize..self.offsets[i + 1] as usize];
        let mut keys = Vec::new();
        for seg in segs {
            match *seg {
                Seg::Span { start, end, .. } => keys.extend(start..end),
                Seg::Gather { at, len } => {
                    keys.extend_from_slice(&self.idx[at as usize..(at + len) as usize]);
                }
            }
        }
        keys
    }

    /// The same pairs in normal form: idempotent.
    #[must_use]
    pub fn coalesce(&self, queries: std::ops::Range<u32>) -> Self {
        let sets: Vec<Vec<u32>> = (0..self.blocks()).map(|i| self.keys(i)).collect();
        Self::from_sets(self.block, queries, &sets)
    }

    /// Kept (query, key) pairs, of `queries`.
    pub fn pairs(&self, queries: std::ops::Range<u32>) -> u64 {
        (0..self.blocks())
            .map(|i| {
                let start = ((self.first_block + i as u32) * self.block).max(queries.start);
                let end = ((self.first_block + i as u32 + 1) * self.block).min(queries.end);
                let keys = self.keys(i);
                (start..end)
                    .map(|q| keys.iter().filter(|&&k| k <= q).count() as u64)
                    .sum::<u64>()
            })
            .sum()
    }
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

    /// Kept pairs over causal pairs, all units together; 1 for a dense plan.
    pub fn density(&self, queries: std::ops::Range<u32>) -> f64 {
        let all: u64 = queries.clone().map(|q| u64::from(q) + 1).sum();
        if all == 0 || self.units.is_empty() {
            return 1.0;
        }
        let kept: u64 = self
            .units
            .iter()
            .map(|u| match u {
                Cover::Dense => all,
                Cover::Sparse(rows) => rows.pairs(queries.clone()),
            })
            .sum();
        kept as f64 / (all * self.units.len() as u64) as f64
    }

    /// Checks every rule of a causal plan for the queries `[p0, p0 + n)`.
    ///
    /// # Errors
    /// The first broken rule, with unit and block.
    pub fn validate(&self, queries: std::ops::Range<u32>) -> Result<(), PlanError> {
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
    fn check(&self, queries: &std::ops::Range<u32>) -> Result<(), (usize, &'static str)> {
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
            let start = ((self.first_block + i as u32) * self.block).max(queries.start);
            let end = ((self.first_block + i as u32 + 1) * self.block).min(queries.end);
            let mut seen = None;
            let mut diagonal = false;
            for seg in &self.segs[self.offsets[i] as usize..self.offsets[i + 1] as usize] {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sparse(rows: Rows) -> Plan {
        Plan {
            unit: Unit::KvGroup,
            scope: Scope::Causal,
            units: vec![Cover::Sparse(rows)],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn plans_from_sets_are_valid_and_keep_exactly_the_sets(
            p0 in 0u32..70, n in 1u32..90, seed in prop::collection::vec(prop::collection::vec(0u32..200, 0..60), 12)
        ) {
            let queries = p0..p0 + n;
            let first = p0 / 16;
            let blocks = (p0 + n).div_ceil(16) - first;
            let sets: Vec<_> = (0..blocks).map(|i| seed[i as usize % 12].clone()).collect();
            let rows = Rows::from_sets(16, queries.clone(), &sets);
            sparse(rows.clone()).validate(queries.clone()).unwrap();
            for i in 0..rows.blocks() {
                let start = ((first + i as u32) * 16).max(p0);
                let end = ((first + i as u32 + 1) * 16).min(p0 + n);
                let mut want: Vec<u32> = sets[i].iter().copied().filter(|&k| k < start).chain(start..end).collect();
                want.sort_unstable();
                want.dedup();
                prop_assert_eq!(rows.keys(i), want);
            }
            prop_assert_eq!(rows.coalesce(queries), rows);
        }
    }

    #[test]
    fn all_keys_have_density_one() {
        let all: Vec<Vec<u32>> = vec![(0..64).collect(); 4];
        let plan = sparse(Rows::from_sets(16, 0..64, &all));
        assert!((plan.density(0..64) - 1.0).abs() < 1e-12);
        assert!((Plan::dense(Unit::KvGroup, 3).density(0..64) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_a_shape_keeps_sinks_window_and_diagonal() {
        let rows = Rows::a_shape(16, 64..80, 4, 8);
        assert_eq!(rows.keys(0), (0..4).chain(56..80).collect::<Vec<_>>());
        assert!(matches!(
            rows.segs[..],
            [
                Seg::Gather { len: 4, .. },
                Seg::Span {
                    start: 56,
                    end: 80,
                    edge: Edge::Causal
                }
            ]
        ));
    }

    #[test]
    fn each_broken_rule_is_named() {
        let good = Rows::a_shape(16, 64..80, 4, 8);
        let mut bad = good.clone();
        bad.idx[1] = 0;
        let e = sparse(bad).validate(64..80).unwrap_err();
        assert!(e.to_string().contains("strictly ascending"), "{e}");
        let mut bad = good.clone();
        bad.segs[1] = Seg::Span {
            start: 70,
            end: 80,
            edge: Edge::Causal,
        };
        assert!(
            sparse(bad)
                .validate(64..80)
                .unwrap_err()
                .rule
                .contains("whole diagonal")
        );
        let mut bad = good.clone();
        bad.segs.pop();
        bad.offsets[1] = 1;
        assert!(
            sparse(bad)
                .validate(64..80)
                .unwrap_err()
                .rule
                .contains("its own key")
        );
        let mut bad = good;
        bad.segs[0] = Seg::Gather { at: u32::MAX, len: 2 };
        assert!(
            sparse(bad)
                .validate(64..80)
                .unwrap_err()
                .rule
                .contains("inside the index list")
        );
    }
}
