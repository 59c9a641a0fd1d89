//! The AMX path: scores and values of bf16 pages as tile products, up to 16 query rows at a time.
//!
//! An element of a tile product depends on its own row and column alone, so one row in a tile gets the bits that it gets among
//! sixteen. Pages of keys are right tiles as they lie, `[16 pairs of dimensions][16 keys][2]`, and so are values, `[16 pairs of
//! rows][16 dimensions][2]`.
//!
//! How this path rounds, beside the scalar twin: a query is the sum of two bf16 (its product with a key is exact to 2^-17); a
//! weight is one bf16, and `l` adds up the rounded weights, so that the weights still sum to 1; tile products treat denormals as
//! zeros. `m` is not the running maximum but a reference that no score exceeds by more than [`LIMIT`] (in powers of two): it moves
//! when a page brings a larger score, which is rare, so that accumulators are rarely scaled. All of it is decided per row and page.

mod keys;
mod scores;
mod values;
mod weights;

#[allow(clippy::wildcard_imports)] // Dozens of intrinsics.
use std::arch::x86_64::*;
use std::ops::Range;

use antefix_state::PAGE_ROWS;
use keys::Pair;

pub(super) use scores::scores_each;

use super::{Call, Page, StateMut};
use crate::amx::{TileShape, configure, release};
use crate::ops::exp;

/// Most rows of a tile.
const ROWS: usize = 16;
/// Keys of half a page, columns of a tile of scores.
const HALF: usize = PAGE_ROWS / 2;
/// Dimensions that one tile product sums.
const CHUNK: usize = 32;
/// Most pages whose weights wait for their values. Sums are read and written once for all of them.
const BATCH: usize = 8;
/// Bytes of keys and values of a batch that stay in L1 while the tiles of rows pass, beside 12 KiB of scores and weights.
const NEAR: usize = 32 << 10;
/// A score above the reference by more than this moves it; the base is 2, so weights are at most 2^12.
const LIMIT: f32 = 12.0;
/// Bytes of a line of a tile.
const LINE: usize = 64;

/// 32 bf16: a row of a left tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u16; CHUNK]);

/// 16 f32: a row of a tile of sums.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([f32; HALF]);

/// Scores of two pages: `[2 pages][2 halves][rows]`.
type Scores = [[[Sums; ROWS]; 2]; 2];

/// What lies between the tile products of one tile of rows.
struct Work {
    /// Scores of the pair of pages at hand, and of the next.
    s: [Scores; 2],
    /// Weights: `[page of the batch][row]`.
    p: [[Line; ROWS]; BATCH],
    /// Values that belong to each of them.
    v: [*const u16; BATCH],
    /// `l`, in every column.
    l: [Sums; ROWS],
    /// Right tile of ones, which makes a tile product a sum of weights.
    ones: [Line; HALF],
    /// References of the rows times log2 e.
    shift: [f32; ROWS],
    /// Keys that each row sees of a page.
    bits: [u32; ROWS],
}

/// Buffers of the path.
#[derive(Default)]
pub(super) struct Scratch {
    /// Queries, `[tile][D / 32][high, low][row]`.
    q: Vec<Line>,
    reach: Vec<Reach>,
    /// Pages of the call that some row may see something of.
    open: Vec<usize>,
    /// Copies of values with zeros for what no row may see.
    clean: Vec<Line>,
    work: Option<Box<Work>>,
}

// SAFETY: the pointers of `Work` are only followed inside the call that wrote them.
unsafe impl Send for Scratch {}
// SAFETY: as above; shared access reads nothing through them.
unsafe impl Sync for Scratch {}

/// What the rows of a tile see, all together.
#[derive(Clone, Copy)]
struct Reach {
    /// Smallest and largest `lo`.
    lo: (u32, u32),
    /// Smallest and largest `hi`.
    hi: (u32, u32),
}

/// A page of a batch.
#[derive(Clone, Copy)]
struct Operand {
    /// Its place among the open pages of the call.
    index: usize,
    pos: u32,
    valid: usize,
    open: u32,
    k: *const u16,
    v: *const u16,
}

/// Whether the tiles can do it: whole chunks of dimensions, bf16 pages.
pub(super) fn fits(call: &Call<'_>) -> bool {
    call.dim.is_multiple_of(CHUNK)
        && call
            .pages
            .iter()
            .all(|view| matches!(view.page, Page::Bf16 { .. }))
}

/// See [`super::attend`].
///
/// # Safety
/// The CPU has AVX-512 with BF16 and AMX-BF16, the process may use the tiles, the lengths fit, and [`fits`] says yes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn attend(call: &Call<'_>, state: &mut StateMut<'_>, scratch: &mut Scratch) {
    let rows = call.visible.len();
    let per = rows.div_ceil(rows.div_ceil(ROWS));
    let Scratch {
        q,
        reach,
        open,
        clean,
        work,
    } = scratch;
    pack(call.dim, call.q, per, q);
    open.clear();
    open.extend((0..call.len()).filter(|&i| call.page(i).2 != 0));
    reach.clear();
    reach.extend(call.visible.chunks(per).map(Reach::of));
    let work = work.get_or_insert_with(Work::new);
    let lines = call.dim / CHUNK * 2;
    // Four pages at `D` = 64. Larger heads do not fit whatever the number, and gain from fewer visits to their sums.
    let page_bytes = 4 * PAGE_ROWS * call.dim;
    let pages = if page_bytes * 4 <= NEAR {
        NEAR / page_bytes
    } else {
        BATCH
    }
    .min(BATCH);
    let mut shape = 0;
    for from in (0..open.len()).step_by(pages) {
        let mut batch = [None; BATCH];
        let end = open.len().min(from + pages);
        for (slot, index) in (from..end).enumerate() {
            batch[slot] = Some(operand(call, (index, open[index]), slot, clean));
        }
        let tiles = reach.len();
        let later = end..open.len().min(end + pages);
        for (t, reach) in reach.iter().enumerate() {
            let first = t * per;
            let n = per.min(rows - first);
            if shape != n {
                // SAFETY: the CPU has tiles and this process may use them; shapes are within the palette.
                unsafe { configure(&shapes(n)) };
                shape = n;
            }
            let tile = RowTile {
                call,
                open,
                q: &q[first * lines..(first + n) * lines],
                first,
                n,
                reach: *reach,
                share: later.start + t * later.len() / tiles..later.start + (t + 1) * later.len() / tiles,
            };
            tile.fold(&batch[..end - from], state, work);
        }
    }
    // SAFETY: the tiles are not used after this.
    unsafe { release() };
}

/// Shapes of the tiles for `n` rows: 0..=4 left tiles and sums, 5 sums, 6 and 7 right tiles.
fn shapes(n: usize) -> [TileShape; 8] {
    let sums = TileShape {
        rows: n as u8,
        bytes: LINE as u16,
    };
    let right = TileShape {
        rows: HALF as u8,
        bytes: LINE as u16,
    };
    [sums, sums, sums, sums, sums, sums, right, right]
}

/// Page `i` of the call, number `index` of the open ones, as the tiles read it. Values that no row may see could be anything, and 0
/// times anything is not 0: such a page's values are read from the copy `slot` of `clean`.
fn operand(call: &Call<'_>, (index, i): (usize, usize), slot: usize, clean: &mut Vec<Line>) -> Operand {
    let (pos, valid, open) = call.page(i);
    let Page::Bf16 { k, v } = call.pages[i].page else {
        unreachable!("`fits` has looked")
    };
    let mut from = v.as_ptr();
    if open != u32::MAX {
        let lines = PAGE_ROWS * call.dim / CHUNK;
        if clean.len() < BATCH * lines {
            clean.resize(BATCH * lines, Line([0; CHUNK]));
        }
        let copy = &mut clean[slot * lines..(slot + 1) * lines];
        // Lines of a pair of rows follow each other.
        for (at, (line, v)) in copy.iter_mut().zip(v.chunks_exact(CHUNK)).enumerate() {
            let pair = at * CHUNK / (2 * call.dim);
            for (x, &v) in line.0.iter_mut().zip(v).step_by(2) {
                *x = if open >> (2 * pair) & 1 == 1 { v } else { 0 };
            }
            for (x, &v) in line.0.iter_mut().zip(v).skip(1).step_by(2) {
                *x = if open >> (2 * pair + 1) & 1 == 1 { v } else { 0 };
            }
        }
        from = copy.as_ptr().cast();
    }
    Operand {
        index,
        pos,
        valid,
        open,
        k: k.as_ptr(),
        v: from,
    }
}

/// Splits `q: [R, D]` into bf16 parts, tile by tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack(dim: usize, q: &[f32], per: usize, out: &mut Vec<Line>) {
    let lines = dim / CHUNK * 2;
    out.resize(q.len() / dim * lines, Line([0; CHUNK]));
    for (q, out) in q.chunks(per * dim).zip(out.chunks_mut(per * lines)) {
        let n = q.len() / dim;
        for (r, q) in q.chunks_exact(dim).enumerate() {
            for (c, q) in q.chunks_exact(CHUNK).enumerate() {
                // SAFETY: a chunk has 32 values, a line takes 32 bf16.
                unsafe {
                    let (a, b) = (_mm512_loadu_ps(q.as_ptr()), _mm512_loadu_ps(q.as_ptr().add(HALF)));
                    let high: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(b, a));
                    let part =
                        |half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
                    let a = _mm512_sub_ps(a, part(_mm512_castsi512_si256(high)));
                    let b = _mm512_sub_ps(b, part(_mm512_extracti64x4_epi64::<1>(high)));
                    let low: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(b, a));
                    _mm512_store_si512((&raw mut out[2 * c * n + r]).cast(), high);
                    _mm512_store_si512((&raw mut out[(2 * c + 1) * n + r]).cast(), low);
                }
            }
        }
    }
}

impl Work {
    fn new() -> Box<Self> {
        const ONE: u16 = 0x3f80;
        Box::new(Self {
            s: [[[[Sums([f32::NAN; HALF]); ROWS]; 2]; 2]; 2],
            p: [[Line([0; CHUNK]); ROWS]; BATCH],
            v: [std::ptr::null(); BATCH],
            l: [Sums([0.0; HALF]); ROWS],
            ones: [Line([ONE; CHUNK]); HALF],
            shift: [0.0; ROWS],
            bits: [0; ROWS],
        })
    }
}

impl Reach {
    fn of(visible: &[(u32, u32)]) -> Self {
        let none = Self {
            lo: (u32::MAX, 0),
            hi: (u32::MAX, 0),
        };
        visible.iter().fold(none, |all, &(lo, hi)| Self {
            lo: (all.lo.0.min(lo), all.lo.1.max(lo)),
            hi: (all.hi.0.min(hi), all.hi.1.max(hi)),
        })
    }
}

/// Up to 16 rows of a call.
struct RowTile<'a> {
    call: &'a Call<'a>,
    open: &'a [usize],
    q: &'a [Line],
    /// Row of the call that is row 0 of the tile.
    first: usize,
    /// Rows.
    n: usize,
    reach: Reach,
    /// Open pages of the next batch that this tile asks for: each tile some, so that they come evenly.
    share: Range<usize>,
}

impl RowTile<'_> {
    fn sees(&self, page: &Operand) -> bool {
        self.reach.lo.0 < page.pos + page.valid as u32 && self.reach.hi.1 > page.pos
    }

    fn sees_all(&self, page: &Operand) -> bool {
        page.open == u32::MAX
            && self.reach.lo.1 <= page.pos
            && self.reach.hi.0 as usize >= page.pos as usize + PAGE_ROWS
    }

    /// Continues the rows' states over a batch of pages.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn fold(&self, batch: &[Option<Operand>], state: &mut StateMut<'_>, work: &mut Work) {
        for r in 0..self.n {
            work.shift[r] = state.m[self.first + r] * std::f32::consts::LOG2_E;
        }
        // The pages in pairs; the tile products of a pair run beside the exponentials of the pair before it.
        let mut seen = batch.iter().flatten().filter(|page| self.sees(page));
        let mut pair = Pair::take(&mut seen);
        let mut share = self.share.clone();
        let (mut waiting, mut now) = (0, 0);
        if let Some(pair) = &pair {
            self.products(pair, &mut share).finish(&mut work.s[now]);
        }
        while let Some(this) = pair {
            let next = Pair::take(&mut seen);
            let mut products = next
                .as_ref()
                .map(|next| self.products(next, &mut share).over(this.len() * self.n));
            for (i, page) in this.pages().enumerate() {
                self.cap(&mut work.s[now][i]);
                let full = self.sees_all(page);
                if !full {
                    for r in 0..self.n {
                        work.bits[r] = self.bits(page, r);
                    }
                }
                // A row without a reference needs one first.
                let fresh = work.shift[..self.n].contains(&f32::NEG_INFINITY);
                if fresh || self.weights(full, (now, i), waiting, work, products.as_mut()) {
                    if waiting > 0 {
                        // The tiles are needed for the values.
                        if let Some(products) = &mut products {
                            products.finish(&mut work.s[1 - now]);
                        }
                        // SAFETY: `attend` has configured the tiles for `n` rows; `v` are the waiting pages' V parts.
                        unsafe { self.values(waiting, state, work) };
                        waiting = 0;
                    }
                    if full {
                        work.bits.fill(u32::MAX);
                    }
                    self.raise((now, i), state, work);
                    self.weights(full, (now, i), waiting, work, products.as_mut());
                }
                work.v[waiting] = page.v;
                waiting += 1;
            }
            if let Some(products) = &mut products {
                products.finish(&mut work.s[1 - now]);
            }
            now = 1 - now;
            pair = next;
        }
        // SAFETY: as above.
        unsafe { self.values(waiting, state, work) };
    }

    /// `cap * tanh(s / cap)` on the scores of a page, if the call asks for it.
    fn cap(&self, s: &mut [[Sums; ROWS]; 2]) {
        if let Some(cap) = self.call.softcap {
            for s in s.iter_mut().flat_map(|half| &mut half[..self.n]) {
                s.0.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
            }
        }
    }

    /// A bit for each key of the page that row `r` of the tile sees.
    fn bits(&self, page: &Operand, r: usize) -> u32 {
        let (lo, hi) = self.call.visible[self.first + r];
        let below = |x: u32| {
            let x = x.saturating_sub(page.pos);
            if x >= PAGE_ROWS as u32 {
                u32::MAX
            } else {
                (1 << x) - 1
            }
        };
        page.open & below(hi) & !below(lo)
    }

    /// Moves the references of the rows whose scores of page `i` of the pair are too far above them.
    #[cold]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn raise(&self, (now, i): (usize, usize), state: &mut StateMut<'_>, work: &mut Work) {
        let nothing = _mm512_set1_ps(f32::NEG_INFINITY);
        for r in 0..self.n {
            // SAFETY: lines hold 16 f32 and are aligned.
            let (s0, s1) = unsafe {
                (
                    _mm512_load_ps(work.s[now][i][0][r].0.as_ptr()),
                    _mm512_load_ps(work.s[now][i][1][r].0.as_ptr()),
                )
            };
            let s0 = _mm512_mask_mov_ps(nothing, work.bits[r] as u16, s0);
            let s1 = _mm512_mask_mov_ps(nothing, (work.bits[r] >> HALF) as u16, s1);
            let top = _mm512_reduce_max_ps(_mm512_max_ps(s0, s1));
            if top.mul_add(std::f32::consts::LOG2_E, -work.shift[r]) > LIMIT {
                let (at, dim) = (self.first + r, self.call.dim);
                let old = std::mem::replace(&mut state.m[at], top);
                work.shift[r] = top * std::f32::consts::LOG2_E;
                if old > f32::NEG_INFINITY {
                    let factor = exp(old - top);
                    state.l[at] *= factor;
                    state.acc[at * dim..][..dim].iter_mut().for_each(|x| *x *= factor);
                }
            }
        }
    }
}
