//! What attention read, on demand: rows, top keys, mass on groups of keys, entropy, distances and column sums of chosen heads
//! and query rows, out of queries and the keys in the pages. Never a matrix: one row of weights a thread is all there is.

use antefix_kernels::attend::{normalise, scores};
use antefix_kernels::{cpu::Cpu, team::Team};
use antefix_kv::{Pool, SeqKv};
use antefix_state::PAGE_ROWS;
use serde::{Deserialize, Serialize};

use crate::attend::Geometry;

/// Queries of one sequence in one layer, and the keys that they see.
#[derive(Clone, Copy)]
pub struct AttentionView<'a> {
    /// Kernels and threads.
    pub run: (Cpu, &'a Team),
    /// The pages.
    pub pool: &'a Pool,
    /// The sequence's page tables. Keys up to the last row's are written.
    pub kv: &'a SeqKv,
    /// Position of the first key in the pages.
    pub base: u32,
    /// The layer.
    pub layer: usize,
    /// Its shapes and rules.
    pub geometry: Geometry,
    /// Queries after RoPE, unscaled, `[rows, Hq, D]`.
    pub q: &'a [f32],
    /// Position of the first row; the others follow.
    pub pos0: u32,
    /// Whether the pages hold every key that these rows attend to. If not, weights are over the keys that they hold.
    pub exact: bool,
}

/// The weights of one head's row.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// Position of the query.
    pub pos: u32,
    /// Position of the first key.
    pub first: u32,
    /// Weights of the keys from there on; they sum to 1.
    pub p: &'a [f32],
    /// `ln sum exp(s)`.
    pub lse: f32,
    /// `-sum p ln p`, nats.
    pub entropy: f32,
}

/// What to read of each chosen row; `lse` and entropy come with all of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reads {
    /// The weights themselves.
    pub weights: bool,
    /// That many keys of the largest weights.
    pub top: usize,
    /// Mass on groups of keys.
    pub mass: Vec<Group>,
    /// The mean distance to a key, each distance capped at this.
    pub distance: Option<u32>,
    /// Sums over the rows, for every key.
    pub columns: bool,
}

impl Reads {
    /// Of how many rows, each of `keys` keys at most, the readings of one head take no more than `room` bytes.
    pub(crate) fn rows_within(&self, room: usize, keys: usize) -> usize {
        let (columns, weights) = (12 * keys, 4 * keys);
        let room = room.saturating_sub(if self.columns { columns } else { 0 });
        let row = size_of::<RowReading>() + 8 * self.top.min(keys) + 4 * self.mass.len();
        room / (row + if self.weights { weights } else { 0 })
    }
}

/// A group of keys of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Positions from the first to before the second.
    Keys(u32, u32),
    /// The first so many positions.
    Sinks(u32),
    /// The last so many positions up to the query itself.
    Window(u32),
}

impl Group {
    /// Positions `[from, to)` for a query at `pos`.
    fn span(self, pos: u32) -> (u32, u32) {
        match self {
            Group::Keys(from, to) => (from, to),
            Group::Sinks(n) => (0, n),
            Group::Window(n) => ((pos + 1).saturating_sub(n), pos + 1),
        }
    }
}

/// What one row of one head read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RowReading {
    /// Position of the query.
    pub pos: u32,
    /// `ln sum exp(s)`.
    pub lse: f32,
    /// `-sum p ln p`, nats.
    pub entropy: f32,
    /// (position, weight), largest first, ties to the lower position.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<(u32, f32)>,
    /// Mass on the groups, in their order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mass: Vec<f32>,
    /// Mean capped distance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance: Option<f32>,
    /// Position of the first key, and the weights from there on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<(u32, Vec<f32>)>,
}

/// What the chosen rows of one head read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadReading {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Whether every key that the rows attend to was there to be read.
    pub exact: bool,
    /// By ascending position.
    pub rows: Vec<RowReading>,
    /// If asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
}

/// Sums of attention weights over query rows, for each key.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Columns {
    /// Sum of the weights on each position.
    pub sums: Vec<f64>,
    /// How many of the rows see each position.
    pub seen: Vec<u32>,
}

impl Columns {
    /// Takes one row in.
    pub fn add(&mut self, row: &Weights<'_>) {
        let end = row.first as usize + row.p.len();
        if self.sums.len() < end {
            self.sums.resize(end, 0.0);
            self.seen.resize(end, 0);
        }
        let from = row.first as usize;
        for ((sum, seen), p) in self.sums[from..end]
            .iter_mut()
            .zip(&mut self.seen[from..end])
            .zip(row.p)
        {
            *sum += f64::from(*p);
            *seen += 1;
        }
    }

    /// Mean weight on each position over the rows that see it; 0 where none does.
    pub fn means(&self) -> Vec<f64> {
        let mean = |(sum, &seen): (&f64, &u32)| if seen == 0 { 0.0 } else { sum / f64::from(seen) };
        self.sums.iter().zip(&self.seen).map(mean).collect()
    }

    fn merge(&mut self, other: &Columns) {
        if self.sums.len() < other.sums.len() {
            self.sums.resize(other.sums.len(), 0.0);
            self.seen.resize(other.seen.len(), 0);
        }
        self.sums.iter_mut().zip(&other.sums).for_each(|(a, b)| *a += b);
        self.seen.iter_mut().zip(&other.seen).for_each(|(a, b)| *a += b);
    }
}

impl HeadReading {
    /// Continues with later rows of the same head. Rows that are known already replace the old ones; their columns count once
    /// more, so whoever wants columns reads each row once.
    pub fn merge(&mut self, other: HeadReading) {
        self.exact &= other.exact;
        for row in other.rows {
            match self.rows.binary_search_by_key(&row.pos, |r| r.pos) {
                Ok(at) => self.rows[at] = row,
                Err(at) => self.rows.insert(at, row),
            }
        }
        match (&mut self.columns, other.columns) {
            (Some(mine), Some(theirs)) => mine.merge(&theirs),
            (mine @ None, theirs) => *mine = theirs,
            (Some(_), None) => {}
        }
    }

    /// Bytes that it holds, about.
    pub fn bytes(&self) -> usize {
        let row = |r: &RowReading| {
            let weights = r.weights.as_ref().map_or(0, |w| w.1.len());
            size_of::<RowReading>() + 8 * r.top.len() + 4 * r.mass.len() + 4 * weights
        };
        let columns = self.columns.as_ref().map_or(0, |c| 12 * c.sums.len());
        self.rows.iter().map(row).sum::<usize>() + columns
    }
}

impl AttentionView<'_> {
    /// Number of query rows.
    pub fn rows(&self) -> usize {
        self.q.len() / (self.geometry.heads * self.geometry.dim)
    }

    /// Calls `f` with the weights of each of `rows` of `head`, in order.
    ///
    /// # Panics
    /// When a row or the head does not exist.
    pub fn each_row(&self, head: usize, rows: &[usize], f: &mut dyn FnMut(usize, Weights<'_>)) {
        let Geometry {
            heads,
            kv_heads,
            dim,
            scale,
            softcap,
            ..
        } = self.geometry;
        assert!(head < heads, "a query head");
        let pages = self.kv.pages(self.layer, head / (heads / kv_heads));
        let (mut q, mut p) = (vec![0.0; dim], Vec::new());
        let mut page_scores = [0.0; PAGE_ROWS];
        for &row in rows {
            let from = &self.q[(row * heads + head) * dim..][..dim];
            q.iter_mut().zip(from).for_each(|(to, from)| *to = from * scale);
            let pos = self.pos0 + row as u32;
            let (lo, hi) = self.geometry.visible(pos);
            let (lo, hi) = (lo.saturating_sub(self.base), hi.saturating_sub(self.base));
            let (lo, hi) = (lo as usize, hi as usize);
            p.clear();
            for (block, page) in pages
                .iter()
                .enumerate()
                .take(hi.div_ceil(PAGE_ROWS))
                .skip(lo / PAGE_ROWS)
            {
                let at = block * PAGE_ROWS;
                scores(self.run.0, &q, softcap, &self.pool.page(*page), &mut page_scores);
                let span = lo.saturating_sub(at)..(hi - at).min(PAGE_ROWS);
                p.extend_from_slice(&page_scores[span]);
            }
            let (lse, entropy) = normalise(self.run.0, &mut p);
            let first = self.base + lo as u32;
            let weights = Weights {
                pos,
                first,
                p: &p,
                lse,
                entropy,
            };
            f(row, weights);
        }
    }

    /// Reads `reads` off `rows` of `heads`, the heads in parallel.
    ///
    /// # Panics
    /// When a row or a head does not exist.
    pub fn read(&self, heads: &[usize], rows: &[usize], reads: &Reads) -> Vec<HeadReading> {
        self.run.1.map(heads.len(), |i| {
            let mut reading = HeadReading {
                layer: self.layer,
                head: heads[i],
                exact: self.exact,
                rows: Vec::with_capacity(rows.len()),
                columns: reads.columns.then(Columns::default),
            };
            self.each_row(heads[i], rows, &mut |_, weights| {
                reading.rows.push(weights.reading(reads));
                if let Some(columns) = &mut reading.columns {
                    columns.add(&weights);
                }
            });
            reading
        })
    }
}

impl Weights<'_> {
    /// The weight on position `pos`; 0 if the row does not see it.
    pub fn at(&self, pos: u32) -> f32 {
        pos.checked_sub(self.first)
            .and_then(|i| self.p.get(i as usize))
            .copied()
            .unwrap_or(0.0)
    }

    /// Mass on positions `[from, to)`.
    pub fn mass(&self, from: u32, to: u32) -> f32 {
        let local = |x: u32| (x.saturating_sub(self.first) as usize).min(self.p.len());
        self.p.get(local(from)..local(to)).map_or(0.0, |p| p.iter().sum())
    }

    /// The `k` keys of the largest weights: (position, weight), largest first, ties to the lower position.
    pub fn top(&self, k: usize) -> Vec<(u32, f32)> {
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
        for (pos, &w) in (self.first..).zip(self.p) {
            if best.len() == k && best.last().is_none_or(|b| w <= b.1) {
                continue;
            }
            let at = best.partition_point(|b| b.1 >= w);
            best.insert(at, (pos, w));
            best.truncate(k);
        }
        best
    }

    /// `sum p min(distance, cap)`.
    pub fn distance(&self, cap: u32) -> f32 {
        let far = |(pos, w): (u32, &f32)| w * (self.pos - pos).min(cap) as f32;
        (self.first..).zip(self.p).map(far).sum()
    }

    fn reading(&self, reads: &Reads) -> RowReading {
        let mass = |g: &Group| {
            let (from, to) = g.span(self.pos);
            self.mass(from, to)
        };
        RowReading {
            pos: self.pos,
            lse: self.lse,
            entropy: self.entropy,
            top: self.top(reads.top),
            mass: reads.mass.iter().map(mass).collect(),
            distance: reads.distance.map(|cap| self.distance(cap)),
            weights: reads.weights.then(|| (self.first, self.p.to_vec())),
        }
    }
}

#[cfg(test)]
mod tests {
    use antefix_kv::{KvDtype, KvShape};

    use super::*;

    fn value(i: usize) -> f32 {
        (((i * 7919 + 13) ^ (i >> 3)) % 1000) as f32 / 400.0 - 1.25
    }

    struct Case {
        pool: Pool,
        kv: SeqKv,
        team: Team,
        q: Vec<f32>,
        geometry: Geometry,
    }

    const KEYS: usize = 75;
    const ROWS: usize = 9;

    fn case(dtype: KvDtype, window: Option<u32>, softcap: Option<f32>) -> Case {
        let shape = KvShape {
            layers: 2,
            kv_heads: 2,
            dim: 16,
            dtype,
        };
        let mut pool = Pool::new(shape, 1 << 20);
        let mut kv = SeqKv::new(shape);
        pool.reserve(&mut kv, KEYS).expect("room");
        let k: Vec<f32> = (0..KEYS * 32).map(value).collect();
        let v: Vec<f32> = (0..KEYS * 32).map(|i| value(i + 31)).collect();
        pool.write(&kv, 1, 0, &k, &v);
        kv.commit(KEYS);
        Case {
            pool,
            kv,
            team: Team::new(2),
            q: (0..ROWS * 4 * 16).map(|i| 2.0 * value(i + 7)).collect(),
            geometry: Geometry {
                heads: 4,
                kv_heads: 2,
                dim: 16,
                scale: 0.25,
                softcap,
                window,
            },
        }
    }

    impl Case {
        fn view(&self) -> AttentionView<'_> {
            AttentionView {
                run: (Cpu::best(), &self.team),
                pool: &self.pool,
                kv: &self.kv,
                base: 0,
                layer: 1,
                geometry: self.geometry,
                q: &self.q,
                pos0: (KEYS - ROWS) as u32,
                exact: true,
            }
        }

        /// The dense row in f64, `[KEYS]`, zeros where nothing is seen, and its lse.
        fn naive(&self, head: usize, row: usize) -> (Vec<f64>, f64) {
            let pos = KEYS - ROWS + row;
            let s: Vec<f64> = (0..KEYS)
                .map(|t| {
                    if t > pos || self.geometry.window.is_some_and(|w| pos - t >= w as usize) {
                        return f64::NEG_INFINITY;
                    }
                    let page = self.pool.page(self.kv.pages(1, head / 2)[t / PAGE_ROWS]);
                    let q = &self.q[(row * 4 + head) * 16..][..16];
                    let dot: f64 = (0..16)
                        .map(|d| f64::from(q[d]) * f64::from(page.key(16, t % PAGE_ROWS, d)))
                        .sum();
                    let s = dot * 0.25;
                    self.geometry
                        .softcap
                        .map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
                })
                .collect();
            let lse = s.iter().map(|s| s.exp()).sum::<f64>().ln();
            (s.iter().map(|s| (s - lse).exp()).collect(), lse)
        }
    }

    #[test]
    fn every_reading_is_that_of_the_dense_matrix() {
        for dtype in [KvDtype::Bf16, KvDtype::F32] {
            for window in [None, Some(33), Some(1)] {
                for softcap in [None, Some(2.0)] {
                    let case = case(dtype, window, softcap);
                    let reads = Reads {
                        weights: true,
                        top: 3,
                        mass: vec![Group::Sinks(2), Group::Window(20), Group::Keys(40, 50)],
                        distance: Some(30),
                        columns: true,
                    };
                    let rows = [0, 3, 8];
                    let got = case.view().read(&[0, 1, 3], &rows, &reads);
                    assert_eq!(got.len(), 3);
                    for reading in &got {
                        check_head(&case, reading, &rows);
                    }
                }
            }
        }
    }

    fn check_head(case: &Case, got: &HeadReading, rows: &[usize]) {
        let near = |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 1e-5, "{a} {b}");
        let mut sums = vec![0.0; KEYS];
        let mut seen = vec![0u32; KEYS];
        for (reading, &row) in got.rows.iter().zip(rows) {
            let (p, lse) = case.naive(got.head, row);
            let pos = KEYS - ROWS + row;
            assert_eq!(reading.pos as usize, pos);
            near(reading.lse, lse);
            near(
                reading.entropy,
                p.iter().map(|&p| if p > 0.0 { -p * p.ln() } else { 0.0 }).sum(),
            );
            let (first, weights) = reading.weights.as_ref().unwrap();
            for (t, &want) in p.iter().enumerate() {
                let got = t.checked_sub(*first as usize).and_then(|i| weights.get(i));
                near(got.copied().unwrap_or(0.0), want);
                sums[t] += want;
                let lo = case
                    .geometry
                    .window
                    .map_or(0, |w| (pos + 1).saturating_sub(w as usize));
                seen[t] += u32::from((lo..=pos).contains(&t));
            }
            near(reading.mass[0], p[..2].iter().sum());
            near(reading.mass[1], p[pos - 19..=pos].iter().sum());
            near(reading.mass[2], p[40..50].iter().sum());
            let far: f64 = p
                .iter()
                .take(pos + 1)
                .enumerate()
                .map(|(t, p)| p * (pos - t).min(30) as f64)
                .sum();
            assert!((f64::from(reading.distance.unwrap()) - far).abs() < 1e-3);
            let mut order: Vec<usize> = (0..KEYS).filter(|&t| p[t] > 0.0).collect();
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
            assert_eq!(reading.top.len(), order.len().min(3));
            for (top, want) in reading.top.iter().zip(order) {
                near(top.1, p[want]);
            }
        }
        let columns = got.columns.as_ref().unwrap();
        for (t, want) in sums.iter().enumerate().take(columns.sums.len()) {
            assert!((columns.sums[t] - want).abs() < 1e-5);
            assert_eq!(columns.seen[t], seen[t]);
            let mean = if seen[t] == 0 {
                0.0
            } else {
                want / f64::from(seen[t])
            };
            assert!((columns.means()[t] - mean).abs() < 1e-5);
        }
    }

    #[test]
    fn readings_of_parts_merge_to_that_of_the_whole() {
        let case = case(KvDtype::F32, None, None);
        let reads = Reads {
            top: 2,
            columns: true,
            ..Reads::default()
        };
        let whole = case.view().read(&[2], &[0, 1, 2, 3], &reads).remove(0);
        let mut parts = case.view().read(&[2], &[2, 3], &reads).remove(0);
        parts.merge(case.view().read(&[2], &[0, 1], &reads).remove(0));
        assert_eq!(whole.rows, parts.rows);
        let (a, b) = (whole.columns.unwrap(), parts.columns.unwrap());
        assert_eq!(a.seen, b.seen);
        assert!(a.sums.iter().zip(&b.sums).all(|(a, b)| (a - b).abs() < 1e-12));
    }

    #[test]
    fn ties_go_to_the_lower_position() {
        let weights = Weights {
            pos: 13,
            first: 10,
            p: &[0.1, 0.4, 0.4, 0.1],
            lse: 0.0,
            entropy: 0.0,
        };
        assert_eq!(weights.top(1), [(11, 0.4)]);
        assert_eq!(weights.top(3), [(11, 0.4), (12, 0.4), (10, 0.1)]);
        assert_eq!(weights.at(12), 0.4);
        assert_eq!((weights.at(9), weights.at(14)), (0.0, 0.0));
        assert!((weights.mass(0, 12) - 0.5).abs() < 1e-6);
        assert_eq!(weights.mass(12, 12), 0.0);
        assert!((weights.distance(2) - (0.1 * 2.0 + 0.4 * 2.0 + 0.4)).abs() < 1e-6);
    }
}
