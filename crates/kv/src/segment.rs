//! Segments: runs of rows that never change once they are sealed, shared by reference count.
//!
//! A segment has one run for each (layer, KV head), and runs may differ in length from layer to layer and from head to head.
//! Keys are stored as rotated for their position in the segment's own frame; who reads the segment at another place turns the
//! query instead (see [`crate::SegRef`]).

use std::fmt;
use std::sync::Arc;

use antefix_kernels::attend::Page;
use antefix_state::PAGE_ROWS;

use crate::pool::{KvError, KvShape, PageId, Pool, SeqKv};

/// Positions of a run's rows in its segment's frame, in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Positions {
    /// Row `i` stands at `start + i`.
    Affine(u32),
    /// One a row; equal ones may follow each other. Runs of the same rows share the list.
    List(Arc<[u32]>),
}

impl Positions {
    /// Position of row `row`.
    ///
    /// # Panics
    /// When a list has no such row.
    pub fn at(&self, row: usize) -> u32 {
        match self {
            Positions::Affine(start) => start + row as u32,
            Positions::List(list) => list[row],
        }
    }
}

/// Rows `[from, to)` of a run carry the log-weight `bias`: it is added to their scores, after scale, softcap and temperature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Biased {
    /// First row.
    pub from: u32,
    /// The row behind the last.
    pub to: u32,
    /// Natural logarithm of a weight.
    pub bias: f32,
}

/// The rows of one (layer, KV head).
#[derive(Debug, Clone)]
pub struct HeadRun {
    pages: Vec<PageId>,
    len: usize,
    positions: Positions,
    biased: Vec<Biased>,
}

impl HeadRun {
    /// Rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the rows stand in the segment's frame.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The rows that carry a log-weight: ascending, disjoint spans.
    pub fn biased(&self) -> &[Biased] {
        &self.biased
    }

    /// Log-weight of a row; 0 for ordinary ones.
    pub fn bias(&self, row: usize) -> f32 {
        let span = |b: &&Biased| (b.from..b.to).contains(&(row as u32));
        self.biased.iter().find(span).map_or(0.0, |b| b.bias)
    }

    /// The rows' pages: row `i` is row `i % 32` of page `i / 32`.
    pub fn page_ids(&self) -> &[PageId] {
        &self.pages
    }

    /// Pages `pages`, to be read.
    pub fn pages<'p>(&self, pool: &'p Pool, pages: std::ops::Range<usize>) -> Vec<Page<'p>> {
        self.pages[pages].iter().map(|&id| pool.page(id)).collect()
    }

    /// How many rows stand before position `pos` of the frame.
    pub fn rows_before(&self, pos: i64) -> u32 {
        let rows = match &self.positions {
            Positions::Affine(start) => (pos - i64::from(*start)).clamp(0, self.len as i64) as usize,
            Positions::List(list) => list.partition_point(|&p| i64::from(p) < pos),
        };
        rows as u32
    }
}

/// The name of the policy that made state approximate, with whatever settings it depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Policy(Arc<str>);

impl Policy {
    /// A policy called `name`.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a segment's rows stand for. Only exact ones may enter the tree of prefixes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// What the model computes for these tokens behind the prefix they were computed with.
    Exact,
    /// Rows were dropped, folded or computed behind another prefix.
    Approx(Policy),
    /// Rows that no token stands behind, such as a learned prefix.
    Synthetic(Policy),
}

/// Immutable runs of rows. Held by [`Arc`]; every holder gives its handle back with [`Segment::release`].
#[derive(Debug)]
pub struct Segment {
    kind: Kind,
    tokens: Vec<u32>,
    kv_heads: usize,
    /// `[layer * Hk + head]`.
    runs: Vec<HeadRun>,
}

impl Segment {
    /// Takes over the pages of `seq`; its first row gets position `start` of the frame. Nothing is copied, pages reserved beyond
    /// the written rows are freed.
    pub fn of_tail(pool: &mut Pool, mut seq: SeqKv, start: u32, tokens: Vec<u32>, kind: Kind) -> Arc<Self> {
        let len = seq.len();
        pool.truncate(&mut seq, len);
        let segment = Self::share(pool, &seq, len, start, tokens, kind);
        pool.release(seq);
        segment
    }

    /// Shares the pages of the first `rows` rows of `seq`, which stays usable: it copies the last page before it writes on.
    ///
    /// # Panics
    /// When `seq` is shorter.
    pub fn share(
        pool: &mut Pool,
        seq: &SeqKv,
        rows: usize,
        start: u32,
        tokens: Vec<u32>,
        kind: Kind,
    ) -> Arc<Self> {
        assert!(rows <= seq.len(), "only written rows are shared");
        let KvShape { layers, kv_heads, .. } = pool.shape();
        let runs: Vec<HeadRun> = (0..layers * kv_heads)
            .map(|at| HeadRun {
                pages: seq.pages(at / kv_heads, at % kv_heads)[..rows.div_ceil(PAGE_ROWS)].to_vec(),
                len: rows,
                positions: Positions::Affine(start),
                biased: Vec::new(),
            })
            .collect();
        for &page in runs.iter().flat_map(|r| &r.pages) {
            pool.add_ref(page);
        }
        Arc::new(Self {
            kind,
            tokens,
            kv_heads,
            runs,
        })
    }

    /// One segment out of several that have rows in different layers; nothing is copied. The handles are used up. `None` without parts.
    ///
    /// Where two parts have rows in the same run, the first one's count.
    pub fn stack(pool: &mut Pool, parts: Vec<Arc<Self>>, kind: Kind) -> Option<Arc<Self>> {
        let first = parts.first()?;
        let runs: Vec<HeadRun> = (0..first.runs.len())
            .map(|at| {
                let filled = parts.iter().find(|p| !p.runs[at].is_empty());
                filled.unwrap_or(first).runs[at].clone()
            })
            .collect();
        for &page in runs.iter().flat_map(|r| &r.pages) {
            pool.add_ref(page);
        }
        let kv_heads = first.kv_heads;
        parts.into_iter().for_each(|p| p.release(pool));
        Some(Arc::new(Self {
            kind,
            tokens: Vec::new(),
            kv_heads,
            runs,
        }))
    }

    /// What its rows stand for.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The tokens that it was computed from; none for synthetic rows.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The rows of one (layer, head).
    pub fn run(&self, layer: usize, head: usize) -> &HeadRun {
        &self.runs[layer * self.kv_heads + head]
    }

    /// Most rows of a run.
    pub fn rows(&self) -> usize {
        self.runs.iter().map(HeadRun::len).max().unwrap_or(0)
    }

    /// The position behind its last row, in its frame.
    pub fn end(&self) -> u32 {
        let end = |r: &HeadRun| r.len.checked_sub(1).map_or(0, |last| r.positions.at(last) + 1);
        self.runs.iter().map(end).max().unwrap_or(0)
    }

    /// Pages that it holds, shared ones included.
    pub fn page_count(&self) -> usize {
        self.runs.iter().map(|r| r.pages.len()).sum()
    }

    /// Gives a handle back; the last one frees the pages.
    pub fn release(self: Arc<Self>, pool: &mut Pool) {
        if let Some(last) = Arc::into_inner(self) {
            free(pool, &last.runs);
        }
    }
}

fn free(pool: &mut Pool, runs: &[HeadRun]) {
    for &page in runs.iter().flat_map(|r| &r.pages) {
        pool.drop_ref(page);
    }
}

/// Writes a new segment row by row, in pages of its own.
///
/// It ends with [`SegmentBuilder::seal`] or [`SegmentBuilder::abandon`]; dropping it leaves its pages counted as used.
#[derive(Debug)]
#[must_use = "pages are only freed by abandon, or by the sealed segment"]
pub struct SegmentBuilder {
    kv_heads: usize,
    runs: Vec<Draft>,
    key: Vec<f32>,
    value: Vec<f32>,
}

#[derive(Debug, Default, Clone)]
struct Draft {
    pages: Vec<PageId>,
    positions: Vec<u32>,
    biased: Vec<Biased>,
    /// Set for a run that is shared rather than written.
    shared: Option<HeadRun>,
}

impl SegmentBuilder {
    /// Nothing yet, in any layer.
    pub fn new(shape: KvShape) -> Self {
        Self {
            kv_heads: shape.kv_heads,
            runs: vec![Draft::default(); shape.runs()],
            key: Vec::new(),
            value: Vec::new(),
        }
    }

    /// Makes room for `rows` more rows of every head of `layer`.
    ///
    /// # Errors
    /// When the accountant refuses; then nothing has changed.
    pub fn reserve(&mut self, pool: &mut Pool, layer: usize, rows: usize) -> Result<(), KvError> {
        self.reserve_heads(pool, layer, &vec![rows; self.kv_heads])
    }

    /// As [`SegmentBuilder::reserve`], with a number for each head.
    ///
    /// # Errors
    /// When the accountant refuses; then nothing has changed.
    pub fn reserve_heads(&mut self, pool: &mut Pool, layer: usize, rows: &[usize]) -> Result<(), KvError> {
        let drafts = &mut self.runs[layer * self.kv_heads..][..self.kv_heads];
        let more: Vec<usize> = drafts
            .iter()
            .zip(rows)
            .map(|(d, rows)| {
                (d.positions.len() + rows)
                    .div_ceil(PAGE_ROWS)
                    .saturating_sub(d.pages.len())
            })
            .collect();
        pool.admit(more.iter().sum())?;
        for (draft, more) in drafts.iter_mut().zip(more) {
            draft.pages.extend((0..more).map(|_| pool.take()));
        }
        Ok(())
    }

    /// Appends a row. Positions must ascend within a run.
    ///
    /// # Panics
    /// When no room was reserved or the position does not ascend.
    pub fn push(
        &mut self,
        pool: &mut Pool,
        (layer, head): (usize, usize),
        (position, bias): (u32, f32),
        key: &[f32],
        value: &[f32],
    ) {
        let draft = &mut self.runs[layer * self.kv_heads + head];
        let row = draft.positions.len();
        assert!(
            draft.positions.last().is_none_or(|&p| p <= position),
            "positions ascend"
        );
        pool.page_mut(draft.pages[row / PAGE_ROWS])
            .write_row(row % PAGE_ROWS, key, value);
        draft.positions.push(position);
        if bias != 0.0 {
            let at = row as u32;
            match draft.biased.last_mut() {
                Some(span) if span.to == at && span.bias == bias => span.to += 1,
                _ => draft.biased.push(Biased {
                    from: at,
                    to: at + 1,
                    bias,
                }),
            }
        }
    }

    /// Appends rows `[n, Hk, D]` of one layer at the given positions.
    ///
    /// # Panics
    /// As [`SegmentBuilder::push`].
    pub fn push_rows(&mut self, pool: &mut Pool, layer: usize, positions: &[u32], k: &[f32], v: &[f32]) {
        let KvShape { kv_heads, dim, .. } = pool.shape();
        let width = kv_heads * dim;
        for (&position, (k, v)) in positions
            .iter()
            .zip(k.chunks_exact(width).zip(v.chunks_exact(width)))
        {
            for head in 0..kv_heads {
                let span = head * dim..(head + 1) * dim;
                self.push(pool, (layer, head), (position, 0.0), &k[span.clone()], &v[span]);
            }
        }
    }

    /// Appends a copy of row `row` of page `from`, bit for bit.
    ///
    /// # Panics
    /// As [`SegmentBuilder::push`].
    pub fn copy(
        &mut self,
        pool: &mut Pool,
        place: (usize, usize),
        what: (u32, f32),
        (from, row): (PageId, usize),
    ) {
        let (mut key, mut value) = (std::mem::take(&mut self.key), std::mem::take(&mut self.value));
        read_row(pool, from, row, &mut key, &mut value);
        self.push(pool, place, what, &key, &value);
        (self.key, self.value) = (key, value);
    }

    /// Makes the run of (layer, head) the first `rows` rows of `pages`, shared and not copied, at positions from `start`.
    ///
    /// # Panics
    /// When rows were written there.
    pub(crate) fn share(
        &mut self,
        pool: &mut Pool,
        (layer, head): (usize, usize),
        pages: &[PageId],
        rows: usize,
        start: u32,
    ) {
        let draft = &mut self.runs[layer * self.kv_heads + head];
        assert!(draft.pages.is_empty(), "a run is written or shared");
        let pages = pages[..rows.div_ceil(PAGE_ROWS)].to_vec();
        pages.iter().for_each(|&p| pool.add_ref(p));
        draft.shared = Some(HeadRun {
            pages,
            len: rows,
            positions: Positions::Affine(start),
            biased: Vec::new(),
        });
    }

    /// The finished segment. Pages reserved and not written are freed.
    pub fn seal(self, pool: &mut Pool, tokens: Vec<u32>, kind: Kind) -> Arc<Segment> {
        let mut runs: Vec<HeadRun> = Vec::with_capacity(self.runs.len());
        for mut draft in self.runs {
            let len = draft.positions.len();
            for page in draft.pages.drain(len.div_ceil(PAGE_ROWS)..) {
                pool.drop_ref(page);
            }
            runs.push(draft.shared.unwrap_or(HeadRun {
                pages: draft.pages,
                len,
                positions: shared_list(&runs, self.kv_heads, draft.positions),
                biased: draft.biased,
            }));
        }
        Arc::new(Segment {
            kind,
            tokens,
            kv_heads: self.kv_heads,
            runs,
        })
    }

    /// Gives everything back.
    pub fn abandon(self, pool: &mut Pool) {
        for draft in self.runs {
            let shared = draft.shared.map(|r| r.pages).unwrap_or_default();
            for page in draft.pages.into_iter().chain(shared) {
                pool.drop_ref(page);
            }
        }
    }
}

/// `positions` in the shortest form: affine, or the list of one of the last `kv_heads` runs if it is the same.
fn shared_list(runs: &[HeadRun], kv_heads: usize, positions: Vec<u32>) -> Positions {
    let start = positions.first().copied().unwrap_or(0);
    if positions.iter().zip(start..).all(|(&p, want)| p == want) {
        return Positions::Affine(start);
    }
    let same = runs.iter().rev().take(kv_heads).find_map(|r| match &r.positions {
        Positions::List(list) if **list == *positions => Some(list.clone()),
        _ => None,
    });
    Positions::List(same.unwrap_or_else(|| positions.into()))
}

/// Key and value of a stored row, `[D]` each.
pub(crate) fn read_row(pool: &Pool, page: PageId, row: usize, key: &mut Vec<f32>, value: &mut Vec<f32>) {
    let (dim, page) = (pool.shape().dim, pool.page(page));
    key.clear();
    value.clear();
    key.extend((0..dim).map(|d| page.key(dim, row, d)));
    value.extend((0..dim).map(|d| page.value(dim, row, d)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvDtype;

    const SHAPE: KvShape = KvShape {
        layers: 2,
        kv_heads: 2,
        dim: 16,
        dtype: KvDtype::F32,
    };

    fn written(pool: &mut Pool, rows: usize) -> SeqKv {
        let mut seq = SeqKv::new(SHAPE);
        pool.reserve(&mut seq, rows).unwrap();
        for layer in 0..SHAPE.layers {
            let k: Vec<f32> = (0..rows * 32).map(|i| (i + 1000 * layer) as f32).collect();
            pool.write(&seq, layer, 0, &k, &k);
        }
        seq.commit(rows);
        seq
    }

    #[test]
    fn a_tail_becomes_a_segment_without_a_copy_and_the_last_handle_frees_it() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut seq = written(&mut pool, 40);
        pool.reserve(&mut seq, 100).unwrap();
        let first = seq.pages(1, 1)[0];
        let segment = Segment::of_tail(&mut pool, seq, 7, vec![1; 40], Kind::Exact);
        assert_eq!(
            pool.stats().bytes_used,
            pool.bytes_for(40),
            "reserved pages are freed"
        );
        assert_eq!(segment.run(1, 1).page_ids()[0], first);
        assert_eq!((segment.rows(), segment.end()), (40, 47));
        let twin = segment.clone();
        segment.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, pool.bytes_for(40));
        twin.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn a_sequence_goes_on_after_its_rows_were_shared_and_the_segment_does_not_change() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut seq = written(&mut pool, 40);
        let segment = Segment::share(&mut pool, &seq, 40, 0, Vec::new(), Kind::Exact);
        pool.reserve(&mut seq, 1).unwrap();
        let row = vec![-1.0; 32];
        pool.write(&seq, 0, 40, &row, &row);
        let (mut key, mut value) = (Vec::new(), Vec::new());
        read_row(&pool, segment.run(0, 0).page_ids()[1], 8, &mut key, &mut value);
        assert_ne!(key[0], -1.0, "row 40 is written into a copy of the page");
        segment.release(&mut pool);
        pool.release(seq);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn runs_may_be_ragged_and_carry_biases() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let mut builder = SegmentBuilder::new(SHAPE);
        builder.reserve_heads(&mut pool, 0, &[40, 3]).unwrap();
        for i in 0..40u32 {
            builder.push(&mut pool, (0, 0), (i * 2, 0.0), &[i as f32; 16], &[0.5; 16]);
        }
        for (position, bias) in [(3, 0.0), (5, 2.0), (5, 2.0)] {
            builder.push(&mut pool, (0, 1), (position, bias), &[1.0; 16], &[2.0; 16]);
        }
        let segment = builder.seal(&mut pool, Vec::new(), Kind::Approx(Policy::new("test")));
        assert_eq!(pool.stats().bytes_used, 3 * SHAPE.page_bytes(), "2 pages and 1");
        assert_eq!(segment.run(0, 0).rows_before(6), 3);
        assert_eq!(segment.run(0, 0).rows_before(-1), 0);
        let ragged = segment.run(0, 1);
        assert_eq!((ragged.len(), ragged.bias(0), ragged.bias(2)), (3, 0.0, 2.0));
        assert_eq!(ragged.biased().len(), 1, "equal biases make one span");
        assert!(segment.run(1, 0).is_empty());
        segment.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
    }

    #[test]
    fn segments_of_single_layers_stack_into_one() {
        let mut pool = Pool::new(SHAPE, 1 << 20);
        let parts: Vec<Arc<Segment>> = (0..2)
            .map(|layer| {
                let mut builder = SegmentBuilder::new(SHAPE);
                builder.reserve(&mut pool, layer, 3 - layer).unwrap();
                let rows = vec![layer as f32; 32 * (3 - layer)];
                let positions: Vec<u32> = (5..8 - layer as u32).collect();
                builder.push_rows(&mut pool, layer, &positions, &rows, &rows);
                builder.seal(&mut pool, Vec::new(), Kind::Exact)
            })
            .collect();
        let used = pool.stats().bytes_used;
        let whole = Segment::stack(&mut pool, parts, Kind::Exact).unwrap();
        assert_eq!(pool.stats().bytes_used, used);
        assert_eq!(
            (whole.run(0, 1).len(), whole.run(1, 1).len(), whole.end()),
            (3, 2, 8)
        );
        whole.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
        assert!(Segment::stack(&mut pool, Vec::new(), Kind::Exact).is_none());
    }

    #[test]
    fn no_room_changes_nothing() {
        let mut pool = Pool::new(SHAPE, 3 * SHAPE.page_bytes());
        let mut builder = SegmentBuilder::new(SHAPE);
        builder.reserve(&mut pool, 0, 32).unwrap();
        let refused = builder.reserve(&mut pool, 1, 32);
        assert!(matches!(refused, Err(KvError::OutOfMemory { .. })), "{refused:?}");
        assert_eq!(pool.stats().bytes_used, 2 * SHAPE.page_bytes());
        builder.abandon(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0);
    }
}
