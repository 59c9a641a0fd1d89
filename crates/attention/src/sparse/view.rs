//! What a planner sees.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use antefix_kernels::attend::{Page, normalise, scores_each};
use antefix_kernels::ops::{Rope, max};
use antefix_state::PAGE_ROWS;
use antefix_state::plan::{Cover, Plan, Scope, Unit};

use crate::attend::lock;
use crate::readout::AttentionView;

/// What one layer and KV head says of its full pages, or windows: a vector of `D` values each, or several.
type Pages = Arc<Mutex<Vec<Vec<f32>>>>;

/// Windows of keys that are cut into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Windows {
    /// Keys of a window.
    pub keys: usize,
    /// Tells rules apart that cut in other places: several planners may look at one sequence.
    pub rule: u64,
}

/// What is kept, in f32, of each full page of a layer and KV head, or of each full window of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Summary {
    /// Mean of a page's keys, `[D]`.
    Mean,
    /// Least and largest value of each dimension in a page, `[2, D]`.
    Bounds,
    /// Means of the chunks of a window, `[chunks, D]`, and, once for all layers and heads, where they begin.
    Chunks {
        /// What is cut.
        windows: Windows,
        /// Chunks of a window at most.
        most: usize,
    },
}

impl Summary {
    /// Keys that one is about.
    fn keys(self) -> usize {
        match self {
            Self::Mean | Self::Bounds => PAGE_ROWS,
            Self::Chunks { windows, .. } => windows.keys,
        }
    }

    /// Bytes of its values at most, for the first `tokens` keys of a sequence: in `runs` pairs of layer and KV head, heads of `dim` values.
    pub fn bytes(self, tokens: usize, runs: usize, dim: usize) -> usize {
        let values = match self {
            Self::Mean => runs * dim,
            Self::Bounds => 2 * runs * dim,
            Self::Chunks { most, .. } => most * (runs * dim + 1),
        };
        tokens / self.keys() * values * size_of::<f32>()
    }
}

thread_local! {
    /// Weights of some rows: fresh memory of that size would cost a page fault every 4 KiB.
    static BUFFER: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Summaries of full pages and windows, made once: they do not change once they are full.
#[derive(Debug, Default)]
pub(super) struct Summaries {
    /// Those that the planners have said they need: no others are made.
    kinds: Vec<Summary>,
    pages: Mutex<HashMap<(Summary, usize, usize), Pages>>,
    /// The first keys of the chunks of each window.
    cuts: Mutex<HashMap<Windows, Vec<Vec<u32>>>>,
}

impl Summaries {
    pub(super) fn of_kinds(named: impl IntoIterator<Item = Summary>) -> Self {
        let mut kinds = Vec::new();
        for kind in named {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        Self {
            kinds,
            ..Self::default()
        }
    }

    /// Bytes of their values at most; see [`Summary::bytes`].
    pub(super) fn bytes_for(&self, tokens: usize, runs: usize, dim: usize) -> usize {
        let each = self.kinds.iter().map(|kind| kind.bytes(tokens, runs, dim));
        each.sum()
    }

    /// Bytes of the values that are there.
    pub(super) fn bytes(&self) -> usize {
        let pages = |pages: &Pages| lock(pages).iter().map(Vec::len).sum::<usize>();
        let values: usize = lock(&self.pages).values().map(pages).sum();
        let cuts: usize = lock(&self.cuts).values().flatten().map(Vec::len).sum();
        (values + cuts) * size_of::<f32>()
    }

    /// Forgets everything but what the planners need.
    pub(super) fn clear(&mut self) {
        *self = Self::of_kinds(std::mem::take(&mut self.kinds));
    }

    /// The chunks of such windows.
    fn chunks(&self, windows: Windows) -> (Summary, usize) {
        let found = self.kinds.iter().find_map(|&kind| match kind {
            Summary::Chunks { windows: own, most } if own == windows => Some((kind, most)),
            _ => None,
        });
        found.expect("planners name the summaries that they ask for")
    }

    pub(super) fn truncate(&self, len: usize) {
        for ((what, _, _), pages) in lock(&self.pages).iter() {
            lock(pages).truncate(len / what.keys());
        }
        for (windows, cuts) in lock(&self.cuts).iter_mut() {
            cuts.truncate(len / windows.keys);
        }
    }

    fn of(&self, what: Summary, layer: usize, kv_head: usize) -> Pages {
        assert!(
            self.kinds.contains(&what),
            "planners name the summaries that they ask for"
        );
        Arc::clone(lock(&self.pages).entry((what, layer, kv_head)).or_default())
    }
}

/// The queries of a stretch of a prompt in one layer, and all keys up to its last row.
#[derive(Clone, Copy)]
pub struct PlanView<'a> {
    /// Queries and pages.
    pub rows: AttentionView<'a>,
    /// The model's own angles in this layer.
    pub rope: &'a Rope,
    pub(super) summaries: &'a Summaries,
}

impl PlanView<'_> {
    /// Positions of the rows.
    pub fn queries(&self) -> Range<u32> {
        self.rows.pos0..self.rows.pos0 + self.rows.rows() as u32
    }

    /// Query heads of a KV head.
    pub fn group(&self) -> usize {
        self.rows.geometry.heads / self.rows.geometry.kv_heads
    }

    /// How many units a plan has.
    pub fn units(&self, unit: Unit) -> usize {
        match unit {
            Unit::QueryHead => self.rows.geometry.heads,
            Unit::KvGroup => self.rows.geometry.kv_heads,
        }
    }

    /// Query heads of unit `i`: all that share a KV head, or one.
    pub fn heads(&self, unit: Unit, i: usize) -> Range<usize> {
        match unit {
            Unit::QueryHead => i..i + 1,
            Unit::KvGroup => i * self.group()..(i + 1) * self.group(),
        }
    }

    /// A plan that reads everything.
    pub fn dense(&self) -> Plan {
        Plan::dense(Unit::KvGroup, self.rows.geometry.kv_heads)
    }

    /// A causal plan out of one cover a KV head, or a query head, made in parallel.
    pub fn plan(&self, unit: Unit, cover: impl Fn(usize) -> Cover + Sync) -> Plan {
        Plan {
            unit,
            scope: Scope::Causal,
            units: self.each(self.units(unit), cover),
        }
    }

    /// `f(0), .., f(n - 1)`, by the team.
    pub fn each<T: Send>(&self, n: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
        self.rows.run.1.map(n, f)
    }

    /// Query `row` of `head`, times the scale: `[D]`.
    pub fn query(&self, row: usize, head: usize) -> impl Iterator<Item = f32> {
        let g = self.rows.geometry;
        self.rows.q[(row * g.heads + head) * g.dim..][..g.dim]
            .iter()
            .map(move |x| x * g.scale)
    }

    /// Mean of the queries `rows` of `head`, times the scale: `[D]`.
    pub fn mean_query(&self, rows: Range<usize>, head: usize) -> Vec<f32> {
        let n = rows.len() as f32;
        let mut mean = vec![0.0; self.rows.geometry.dim];
        for row in rows {
            mean.iter_mut()
                .zip(self.query(row, head))
                .for_each(|(m, q)| *m += q);
        }
        mean.iter_mut().for_each(|m| *m /= n);
        mean
    }

    /// The page of KV head `kv_head` that holds positions from `32 page` on.
    pub fn page(&self, kv_head: usize, page: usize) -> Page<'_> {
        let pages = self.rows.kv.pages(self.rows.layer, kv_head);
        self.rows.pool.page(pages[page])
    }

    /// Writes the key at position `pos` in KV head `kv_head` of a layer that was computed already, or this one: `out: [D]`.
    pub fn key(&self, layer: usize, kv_head: usize, pos: usize, out: &mut [f32]) {
        let pages = self.rows.kv.pages(layer, kv_head);
        let page = self.rows.pool.page(pages[pos / PAGE_ROWS]);
        let dim = out.len();
        out.iter_mut()
            .enumerate()
            .for_each(|(d, x)| *x = page.key(dim, pos % PAGE_ROWS, d));
    }

    /// Scores of the vectors `q: [R, D]`, already scaled, against keys: calls `f` with a page's index and its `[R][32]` scores, for each of
    /// `pages` of `kv_head`. Rows of the last page that hold no key yet get anything. The cap on scores is left out: it changes no order
    /// within a row.
    pub fn scores(
        &self,
        kv_head: usize,
        q: &[f32],
        pages: Range<usize>,
        mut f: impl FnMut(usize, &[[f32; PAGE_ROWS]]),
    ) {
        let first = pages.start;
        let keys = pages.map(|page| self.page(kv_head, page));
        scores_each(self.rows.run.0, self.rows.geometry.dim, q, keys, |i, scores| {
            f(first + i, scores);
        });
    }

    /// Attention weights of the rows `rows` of query head `head`: calls `f` with each row and its weights over all keys up to itself.
    pub fn weights(&self, head: usize, rows: Range<usize>, mut f: impl FnMut(usize, &[f32])) {
        let (n, pos0) = (self.queries().end as usize, self.rows.pos0 as usize);
        // Rows that are scored together, and whose weights stay in L2.
        const TOGETHER: usize = 8;
        let mut weights = BUFFER.take();
        weights.resize(weights.len().max(TOGETHER * n), 0.0);
        for from in rows.clone().step_by(TOGETHER) {
            let some = from..(from + TOGETHER).min(rows.end);
            let q: Vec<f32> = some.clone().flat_map(|row| self.query(row, head)).collect();
            self.scores_of_keys(head / self.group(), &q, &mut weights[..some.len() * n]);
            for (row, weights) in some.zip(weights.chunks_exact_mut(n)) {
                let seen = &mut weights[..pos0 + row + 1];
                normalise(self.rows.run.0, seen);
                f(row, seen);
            }
        }
        BUFFER.set(weights);
    }

    /// Mean share of the weights of dense attention that `plan` keeps, over all heads and `count` rows in equal
    /// distances: the first rows of a stretch may read less than the last.
    pub(super) fn recall(&self, plan: &Plan, count: usize) -> f64 {
        let rows = self.rows.rows();
        let count = count.clamp(1, rows);
        let sample: Vec<usize> = (0..count).map(|i| (2 * i + 1) * rows / (2 * count)).collect();
        let kept = |head: usize| -> f64 {
            let cover = match plan.unit {
                Unit::QueryHead => &plan.units[head],
                Unit::KvGroup => &plan.units[head / self.group()],
            };
            let Cover::Sparse(planned) = cover else {
                return count as f64;
            };
            let mut sum = 0.0;
            for &row in &sample {
                self.weights(head, row..row + 1, |_, weights| {
                    let pos = self.queries().start + row as u32;
                    let block = (pos / planned.block - planned.first_block) as usize;
                    for (start, end) in planned.runs(block) {
                        let run = start as usize..(end as usize).min(weights.len());
                        let kept = weights.get(run).into_iter().flatten();
                        sum += kept.map(|&w| f64::from(w)).sum::<f64>();
                    }
                });
            }
            sum
        };
        let heads = self.rows.geometry.heads;
        let kept = self.each(heads, kept);
        kept.iter().sum::<f64>() / (heads * count) as f64
    }

    /// Logarithm of the largest attention weight that row `row` of any of `heads`, which share a KV head, has on each `unit` keys side by
    /// side, up to itself: `[keys / unit]`, rounded up.
    pub fn largest_log_weights(&self, heads: Range<usize>, row: usize, unit: usize) -> Vec<f32> {
        let n = self.rows.pos0 as usize + row + 1;
        let q: Vec<f32> = heads.clone().flat_map(|head| self.query(row, head)).collect();
        let mut buffer = BUFFER.take();
        buffer.resize(buffer.len().max(heads.len() * n), 0.0);
        let scores = &mut buffer[..heads.len() * n];
        self.scores_of_keys(heads.start / self.group(), &q, scores);
        let mut largest = vec![f32::NEG_INFINITY; n.div_ceil(unit)];
        for scores in scores.chunks_exact_mut(n) {
            let tops: Vec<f32> = scores.chunks(unit).map(max).collect();
            let (lse, _) = normalise(self.rows.run.0, scores);
            let each = largest.iter_mut().zip(tops);
            each.for_each(|(most, top)| *most = most.max(top - lse));
        }
        BUFFER.set(buffer);
        largest
    }

    /// Scores of the vectors `q: [R, D]`, already scaled, against the first `n` keys of `kv_head`, as attention has them: `out: [R, n]`.
    fn scores_of_keys(&self, kv_head: usize, q: &[f32], out: &mut [f32]) {
        let n = out.len() * self.rows.geometry.dim / q.len();
        self.scores(kv_head, q, 0..n.div_ceil(PAGE_ROWS), |page, scores| {
            let at = page * PAGE_ROWS;
            let end = (at + PAGE_ROWS).min(n);
            for (to, from) in out.chunks_exact_mut(n).zip(scores) {
                to[at..end].copy_from_slice(&from[..end - at]);
            }
        });
        if let Some(cap) = self.rows.geometry.softcap {
            antefix_kernels::ops::softcap(out, cap);
        }
    }

    /// Means of the keys of `kv_head` in blocks of `block` keys, a multiple of 32, up to the last row: `[blocks, D]`. The last block
    /// has the keys that are there.
    ///
    /// # Panics
    /// When `block` is no multiple of 32, or the planner has not named [`Summary::Mean`].
    pub fn mean_keys(&self, kv_head: usize, block: usize) -> Vec<f32> {
        assert!(
            block > 0 && block.is_multiple_of(PAGE_ROWS),
            "blocks of whole pages"
        );
        let (n, dim) = (self.queries().end as usize, self.rows.geometry.dim);
        let full = n / PAGE_ROWS;
        let pages = self.summaries.of(Summary::Mean, self.rows.layer, kv_head);
        let mut pages = lock(&pages);
        for page in pages.len()..full {
            pages.push(mean(&self.page(kv_head, page), dim, PAGE_ROWS));
        }
        let blocks = n.div_ceil(block);
        let mut means = vec![0.0; blocks * dim];
        for (b, out) in means.chunks_exact_mut(dim).enumerate() {
            let whole = b * block / PAGE_ROWS..full.min((b + 1) * block / PAGE_ROWS);
            let mut add = |mean: &[f32], rows: usize| {
                out.iter_mut().zip(mean).for_each(|(o, m)| *o += m * rows as f32);
            };
            for page in whole {
                add(&pages[page], PAGE_ROWS);
            }
            if b + 1 == blocks && n % PAGE_ROWS > 0 {
                add(
                    &mean(&self.page(kv_head, full), dim, n % PAGE_ROWS),
                    n % PAGE_ROWS,
                );
            }
            let rows = (n - b * block).min(block) as f32;
            out.iter_mut().for_each(|o| *o /= rows);
        }
        means
    }

    /// Where chunks of keys begin in the first `count` of `windows`, which are full: `cut(i)` gives the first keys of the chunks of
    /// window `i`, ascending, the window's own first key among them. It is asked once a sequence and window, whatever the layer.
    ///
    /// # Panics
    /// When the planner has not named [`Summary::Chunks`] of such windows, or there are more chunks.
    pub fn cuts(
        &self,
        windows: Windows,
        count: usize,
        cut: impl Fn(usize) -> Vec<u32> + Sync,
    ) -> Vec<Vec<u32>> {
        let (_, most) = self.summaries.chunks(windows);
        let mut cuts = lock(&self.summaries.cuts);
        let known = cuts.entry(windows).or_default();
        let from = known.len();
        known.extend(self.each(count.saturating_sub(from), |i| cut(from + i)));
        assert!(
            known.iter().all(|c| c.len() <= most),
            "as many chunks as were named"
        );
        known[..count].to_vec()
    }

    /// Means of the keys of `kv_head` in chunks, up to the first query: `[chunks, D]`. `cuts` has the first keys of the chunks of each full
    /// window, as [`PlanView::cuts`] gives them, and last those of what stands behind, perhaps none. Means of full
    /// windows are made once.
    ///
    /// # Panics
    /// When the planner has not named [`Summary::Chunks`] of such windows.
    pub fn mean_chunks(&self, kv_head: usize, windows: Windows, cuts: &[Vec<u32>]) -> Vec<f32> {
        let Some((open, full)) = cuts.split_last() else {
            return Vec::new();
        };
        let (chunks, _) = self.summaries.chunks(windows);
        let known = self.summaries.of(chunks, self.rows.layer, kv_head);
        let mut known = lock(&known);
        for window in known.len()..full.len() {
            let end = ((window + 1) * windows.keys) as u32;
            known.push(self.means_between(kv_head, &full[window], end));
        }
        let mut means = known[..full.len()].concat();
        means.extend(self.means_between(kv_head, open, self.queries().start));
        means
    }

    /// Means of the keys from each of `starts` to the next, and to `end`.
    fn means_between(&self, kv_head: usize, starts: &[u32], end: u32) -> Vec<f32> {
        let dim = self.rows.geometry.dim;
        let (mut means, mut key) = (vec![0.0; starts.len() * dim], vec![0.0; dim]);
        for (i, mean) in means.chunks_exact_mut(dim).enumerate() {
            let chunk = starts[i]..starts.get(i + 1).copied().unwrap_or(end);
            let rows = chunk.len() as f32;
            for pos in chunk {
                self.key(self.rows.layer, kv_head, pos as usize, &mut key);
                mean.iter_mut().zip(&key).for_each(|(m, k)| *m += k);
            }
            mean.iter_mut().for_each(|m| *m /= rows);
        }
        means
    }

    /// Calls `f` with each of the first `pages` pages of `kv_head`, which are full, and the least and the largest value of each dimension
    /// of its keys: `[2, D]`.
    ///
    /// # Panics
    /// When the planner has not named [`Summary::Bounds`].
    pub fn bounds(&self, kv_head: usize, pages: usize, mut f: impl FnMut(usize, &[f32])) {
        let dim = self.rows.geometry.dim;
        let known = self.summaries.of(Summary::Bounds, self.rows.layer, kv_head);
        let mut known = lock(&known);
        for page in known.len()..pages {
            let page = self.page(kv_head, page);
            let ends = |pick: fn(f32, f32) -> f32| {
                let one = move |d: usize| {
                    (1..PAGE_ROWS).fold(page.key(dim, 0, d), |x, row| pick(x, page.key(dim, row, d)))
                };
                (0..dim).map(one)
            };
            known.push(ends(f32::min).chain(ends(f32::max)).collect());
        }
        known[..pages]
            .iter()
            .enumerate()
            .for_each(|(page, bounds)| f(page, bounds));
    }
}

/// Mean of the first `rows` keys of a page.
fn mean(page: &Page<'_>, dim: usize, rows: usize) -> Vec<f32> {
    let one = |d: usize| (0..rows).map(|row| page.key(dim, row, d)).sum::<f32>() / rows as f32;
    (0..dim).map(one).collect()
}
