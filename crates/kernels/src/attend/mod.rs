//! Attention of query rows over pages of keys and values, continuing partial states.
//!
//! A page holds 32 rows of one (layer, KV head). Per page and row: scores, one fma chain over the dimensions each; online
//! softmax; one fma chain over the keys for each output dimension. What a row gets depends on the row and the keys alone, never
//! on the rows beside it, and is the same on every path but one: on AMX, bf16 pages go through tiles, which round in their own
//! way (module `amx`).

#[cfg(target_arch = "x86_64")]
mod amx;
mod gather;
mod page;
mod scalar;
mod scores;
#[cfg(target_arch = "x86_64")]
mod simd;

use antefix_state::PAGE_ROWS;

pub use page::{KeyPages, KvDtype, Page, PageLayout, PageMut, View, bf16_to_f32, f32_to_bf16};
pub use scores::{largest_within, normalise, scores, scores_each, scores_rows};

use crate::cpu::{Cpu, Path};

/// Partial states of `R` rows, see [`antefix_state::State`]: `m: [R]`, `l: [R]`, `acc: [R, D]`.
pub struct StateMut<'a> {
    /// Maxima.
    pub m: &'a mut [f32],
    /// Sums.
    pub l: &'a mut [f32],
    /// Accumulators.
    pub acc: &'a mut [f32],
}

/// The same, to be read.
#[derive(Clone, Copy)]
pub struct StateRef<'a> {
    /// Maxima.
    pub m: &'a [f32],
    /// Sums.
    pub l: &'a [f32],
    /// Accumulators.
    pub acc: &'a [f32],
}

/// Makes every row the identity.
pub fn reset(state: &mut StateMut<'_>) {
    state.m.fill(f32::NEG_INFINITY);
    state.l.fill(0.0);
    state.acc.fill(0.0);
}

/// `into` continues with the keys of `from`. A part without keys changes no bit.
///
/// # Panics
/// When the shapes differ.
pub fn merge(into: &mut StateMut<'_>, from: &StateRef<'_>) {
    assert!(
        into.m.len() == from.m.len() && into.acc.len() == from.acc.len(),
        "only states of the same rows merge"
    );
    let dim = into.acc.len() / into.m.len().max(1);
    for r in 0..into.m.len() {
        if from.m[r] == f32::NEG_INFINITY {
            continue;
        }
        let m = into.m[r].max(from.m[r]);
        // The library's exp: the same function on every path.
        let (a, b) = ((into.m[r] - m).exp(), (from.m[r] - m).exp());
        into.m[r] = m;
        into.l[r] = into.l[r] * a + from.l[r] * b;
        blend(&mut into.acc[r * dim..][..dim], a, &from.acc[r * dim..][..dim], b);
    }
}

/// `x = x a + y b`, each operation rounded: the same bits on every machine.
fn blend(x: &mut [f32], a: f32, y: &[f32], b: f32) {
    #[inline(always)]
    fn body(x: &mut [f32], a: f32, y: &[f32], b: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x = *x * a + y * b;
        }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn wide(x: &mut [f32], a: f32, y: &[f32], b: f32) {
        body(x, a, y, b);
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: just asked.
        return unsafe { wide(x, a, y, b) };
    }
    body(x, a, y, b);
}

/// Multiplies the weight of this part by `e^b`, in every row.
pub fn gain(state: &mut StateMut<'_>, b: f32) {
    for (m, l) in state.m.iter_mut().zip(&*state.l) {
        if *l > 0.0 {
            *m += b;
        }
    }
}

/// Scales the log-sum-exp by `alpha` and leaves the output alone; 1 changes no bit. Once, for a finished group of keys.
pub fn power(state: &mut StateMut<'_>, alpha: f32) {
    if alpha == 1.0 {
        return;
    }
    for (m, l) in state.m.iter_mut().zip(&*state.l) {
        if *l > 0.0 {
            *m = alpha * (*m + l.ln()) - l.ln();
        }
    }
}

/// `out = acc / l`, `[R, D]`; zeros for rows without keys.
///
/// # Panics
/// When the shapes differ.
pub fn finish(state: &StateRef<'_>, out: &mut [f32]) {
    assert_eq!(state.acc.len(), out.len(), "an output for each accumulator");
    let dim = out.len() / state.m.len().max(1);
    for (r, row) in out.chunks_exact_mut(dim.max(1)).enumerate() {
        let l = state.l[r];
        for (o, a) in row.iter_mut().zip(&state.acc[r * dim..]) {
            *o = if l == 0.0 { 0.0 } else { a / l };
        }
    }
}

/// Buffers of a call, reused from call to call.
#[derive(Default)]
pub struct AttendScratch {
    /// A page widened to f32: K `[D][32]`, then V `[32][D]`.
    wide: Vec<f32>,
    /// Queries, packed tile by tile.
    q: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    amx: amx::Scratch,
}

/// Continues the states of `R` rows over the keys of `pages`.
///
/// `q: [R, D]`, already multiplied by the scale; `visible[r] = (lo, hi)`: row `r` sees the absolute positions `[lo, hi)`.
/// `pages[0]` starts at position `first`, a multiple of 32; `keys` rows in all are valid, holes ([`View::rows`]) counted; the
/// rest may hold anything, and so may holes.
///
/// # Panics
/// When the shapes do not fit: always a mistake of the caller.
pub fn attend(
    cpu: Cpu,
    dim: usize,
    q: &[f32],
    visible: &[(u32, u32)],
    softcap: Option<f32>,
    pages: &[View<'_>],
    first: u32,
    keys: u32,
    state: &mut StateMut<'_>,
    scratch: &mut AttendScratch,
) {
    let rows = visible.len();
    assert!(
        dim > 0 && dim.is_multiple_of(16),
        "head dimensions are multiples of 16"
    );
    assert!(
        q.len() == rows * dim && state.acc.len() == rows * dim,
        "q and acc are [R, D]"
    );
    assert!(state.m.len() == rows && state.l.len() == rows, "m and l are [R]");
    assert!(
        (first as usize).is_multiple_of(PAGE_ROWS),
        "pages start at multiples of 32"
    );
    assert!(
        keys as usize <= pages.len() * PAGE_ROWS,
        "no more keys than pages hold"
    );
    pages.iter().for_each(|view| view.page.check(dim));
    if rows == 0 {
        return;
    }
    let call = Call {
        dim,
        q,
        visible,
        softcap,
        pages,
        first,
        keys,
    };
    match cpu.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX-512 and tiles; lengths were checked above.
        Path::Amx if amx::fits(&call) => unsafe { amx::attend(&call, state, &mut scratch.amx) },
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 | Path::Avx512 | Path::Amx => {
            simd::pack(q, rows, dim, &mut scratch.q);
            for tile in call.tiles() {
                match cpu.path() {
                    // SAFETY: `cpu` proves AVX2 and FMA; lengths were checked above.
                    Path::Avx2 => unsafe { simd::page_avx2(&tile, state, scratch) },
                    // SAFETY: `cpu` proves AVX-512F; lengths were checked above.
                    _ => unsafe { simd::page_avx512(&tile, state, scratch) },
                }
            }
        }
        _ => call.tiles().for_each(|tile| scalar::page(&tile, state)),
    }
}

/// What [`attend`] was asked, with lengths that fit; at least one row.
struct Call<'a> {
    dim: usize,
    q: &'a [f32],
    visible: &'a [(u32, u32)],
    softcap: Option<f32>,
    pages: &'a [View<'a>],
    first: u32,
    keys: u32,
}

impl<'a> Call<'a> {
    /// Page `i` of those that hold valid keys: its position, valid rows, and the bits of the open ones.
    fn page(&self, i: usize) -> (u32, usize, u32) {
        let start = i * PAGE_ROWS;
        let valid = PAGE_ROWS.min(self.keys as usize - start);
        let open = self.pages[i].rows & (u32::MAX >> (PAGE_ROWS - valid));
        (self.first + start as u32, valid, open)
    }

    /// Pages that hold valid keys.
    fn len(&self) -> usize {
        (self.keys as usize).div_ceil(PAGE_ROWS)
    }

    /// The pages that some row sees, ascending.
    fn tiles(&'a self) -> impl Iterator<Item = Tile<'a>> {
        (0..self.len()).filter_map(move |i| {
            let (pos, valid, open) = self.page(i);
            let sees = |v: &(u32, u32)| v.0 < pos + valid as u32 && v.1 > pos;
            let from = self.visible.iter().position(sees)?;
            let to = self.visible.iter().rposition(sees).map_or(from, |r| r + 1);
            (open != 0).then_some(Tile {
                call: self,
                seen: from..to,
                page: self.pages[i].page,
                next: self.pages.get(i + 1).map(|view| view.page),
                pos,
                valid,
                open,
            })
        })
    }
}

/// All rows of a call, and one page.
struct Tile<'a> {
    call: &'a Call<'a>,
    /// From the first to the last row that sees something of the page.
    seen: std::ops::Range<usize>,
    page: Page<'a>,
    /// The page that comes after it.
    next: Option<Page<'a>>,
    /// Position of the page's first row.
    pos: u32,
    /// Its valid rows, 1..=32.
    valid: usize,
    /// The valid rows that are no holes, a bit each; not 0.
    open: u32,
}

impl Tile<'_> {
    /// Keys `[lo, hi)` of the page that row `r` sees; empty if `lo >= hi`.
    fn span(&self, r: usize) -> (usize, usize) {
        let (lo, hi) = self.call.visible[r];
        let local = |x: u32| (x.saturating_sub(self.pos) as usize).min(self.valid);
        (local(lo), local(hi))
    }

    /// Whether a valid row is a hole.
    fn has_holes(&self) -> bool {
        self.open.count_ones() as usize != self.valid
    }

    /// Whether row `j` of the page is valid and no hole.
    fn is_open(&self, j: usize) -> bool {
        self.open >> j & 1 == 1
    }
}

#[cfg(test)]
mod tests;
