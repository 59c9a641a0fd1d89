//! Activations: as they are, quantised to int8 in blocks of 32, and rounded to bf16.

use std::ops::Range;

use super::layout::BLOCK;
use crate::cpu::{Cpu, Path};
use crate::memory::Shared;
use crate::team::Team;

/// Rows of a tile of [`Form::Tiles`].
pub(crate) const TILE: usize = 16;

/// How the quantised values lie in memory. A *slot* is a block of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Form {
    /// Nothing is quantised yet.
    #[default]
    None,
    /// Slots `[rows][blocks]`.
    Rows,
    /// As `Rows`, and the same values as i16 in `q16`.
    Wide,
    /// Slots `[tiles][blocks][16 rows]`, rows past the last zero: the tiles of AMX as they are loaded. No sums.
    Tiles,
}

impl Form {
    /// Slots of `rows` rows.
    fn slots(self, rows: usize, blocks: usize) -> usize {
        match self {
            Form::Tiles => rows.next_multiple_of(TILE) * blocks,
            _ => rows * blocks,
        }
    }

    /// The slot of block `b` of row `r`.
    #[inline(always)]
    fn slot(self, r: usize, b: usize, blocks: usize) -> usize {
        match self {
            Form::Tiles => (r / TILE * blocks + b) * TILE + r % TILE,
            _ => r * blocks + b,
        }
    }

    /// Where the values of the two halves of a block of row `r` are: `[slots][2]`, or `[tiles][blocks][2][16 rows]`.
    #[inline(always)]
    fn halves(self, r: usize, b: usize, blocks: usize) -> [usize; 2] {
        match self {
            Form::Tiles => {
                let first = (r / TILE * blocks + b) * 2 * TILE + r % TILE;
                [first, first + TILE]
            }
            _ => [2 * (r * blocks + b), 2 * (r * blocks + b) + 1],
        }
    }
}

/// A line of the cache, so that blocks do not straddle two.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([i8; 64]);

/// A tile of bf16: 16 rows of 32 values.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [[u16; BLOCK]; TILE]);

/// Reusable activations `[rows, k]`, the left side of every product.
///
/// Quantised on first use after the values came or changed: per row and block of 32, `d = amax / 127`,
/// `q = round_half_even(x * (127 / amax))`. A block with a value that is not finite gets `d = NaN`, so the product shows it; one whose
/// values are all below 1e-36 counts as zeros.
///
/// Rows behind those of [`Acts::set_int8_rows`] are rounded to bf16 instead, on CPUs with bf16 tiles.
#[derive(Debug, Default)]
pub struct Acts {
    rows: usize,
    k: usize,
    x: Vec<f32>,
    /// How many rows are to be quantised: all unless something else was asked for.
    int8_rows: Option<usize>,
    /// The rows behind those, `[tiles][blocks]`, rows past the last zero.
    bf16: Vec<Tile>,
    /// Whether `bf16` holds the values of `x`.
    rounded: bool,
    form: Form,
    /// 32 of each slot.
    q: Vec<Line>,
    /// As `q`, in [`Form::Wide`].
    pub(crate) q16: Vec<i16>,
    /// One of each slot.
    pub(crate) d: Vec<f32>,
    /// Sums of `q`: of 32 by slot, and of 16 as [`Form::halves`] says. Not in [`Form::Tiles`].
    pub(crate) sum: [Vec<i32>; 2],
    /// `d * f32(sum)`, shapes as `sum`, in every form.
    pub(crate) sx: [Vec<f32>; 2],
}

impl Acts {
    /// No rows.
    pub fn new() -> Acts {
        Acts::default()
    }

    /// Copies `x: [rows, k]`, row-major. Quantises nothing yet.
    pub fn load(&mut self, x: &[f32], rows: usize, k: usize) {
        assert_eq!(x.len(), rows * k, "activations: {rows} x {k} values expected");
        self.x.clear();
        self.x.extend_from_slice(x);
        self.changed(rows, k);
    }

    /// Lets `f(row index, row)` write `rows` rows of `k` values, by the team when there are many. Quantises nothing yet.
    pub fn fill(&mut self, team: &Team, rows: usize, k: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        self.x.resize(rows * k, 0.0);
        self.changed(rows, k);
        team.per_row(&mut self.x, k, f);
    }

    /// Takes `x: [rows, k]` itself instead of a copy, and leaves the memory of the former values in its place.
    pub fn swap(&mut self, x: &mut Vec<f32>, rows: usize, k: usize) {
        assert_eq!(x.len(), rows * k, "activations: {rows} x {k} values expected");
        std::mem::swap(&mut self.x, x);
        self.changed(rows, k);
    }

    /// Rows of which the first `int8_rows` are still to be filled ([`Acts::front`]). Of the others there are no values, just the tiles that
    /// this returns, `[tiles][blocks]`, for the caller to write whole.
    pub(super) fn room(&mut self, rows: usize, k: usize, int8_rows: usize) -> Shared<Tile> {
        self.expect(rows, k, int8_rows);
        self.rounded = true;
        let tiles = (rows - int8_rows).div_ceil(TILE);
        self.bf16.resize(tiles * self.blocks(), Tile([[0; BLOCK]; TILE]));
        Shared::new(self.bf16.as_mut_ptr())
    }

    /// `[rows, k]` values of the first `rows` rows for the caller to write, whatever they were: after [`Acts::room`], or of all rows.
    pub(super) fn front(&mut self, rows: usize, k: usize) -> Shared<f32> {
        self.x.resize(rows * k, 0.0);
        Shared::new(self.x.as_mut_ptr())
    }

    /// Announces `rows` rows of `k` values, all in [`Acts::front`], of which the first `int8_rows` are to be quantised.
    pub(super) fn expect(&mut self, rows: usize, k: usize, int8_rows: usize) {
        self.int8_rows = Some(int8_rows);
        self.changed(rows, k);
    }

    /// The values as loaded, to be changed.
    pub fn x_mut(&mut self) -> &mut [f32] {
        assert_eq!(
            self.x.len(),
            self.rows * self.k,
            "only bf16 is kept of these activations"
        );
        self.changed(self.rows, self.k);
        &mut self.x
    }

    /// Of the rows loaded from now on, only the first `rows` are quantised to int8; all others meet quantised weights in bf16, on CPUs with
    /// bf16 tiles. That is faster and closer to f32 for many rows, and slower for few. `None`: all are quantised.
    ///
    /// The bits of a product depend on which of the two its row was, so the choice must follow from what the row *is*.
    pub fn set_int8_rows(&mut self, rows: Option<usize>) {
        self.int8_rows = rows;
        self.changed(self.rows, self.k);
    }

    fn changed(&mut self, rows: usize, k: usize) {
        (self.rows, self.k) = (rows, k);
        (self.form, self.rounded) = (Form::None, false);
    }

    /// How many rows are quantised: those behind them are rounded to bf16.
    pub(crate) fn int8_rows(&self, cpu: Cpu) -> usize {
        match (self.int8_rows, cpu.path()) {
            (Some(rows), Path::Amx) => rows.min(self.rows),
            _ => self.rows,
        }
    }

    /// Rows loaded.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The values as loaded, `[rows, k]`; of what [`gated`](super::gated) wrote in bf16 there are none.
    pub fn x(&self) -> &[f32] {
        &self.x
    }

    /// Blocks of 32 per row.
    pub(crate) fn blocks(&self) -> usize {
        self.k / BLOCK
    }

    /// The quantised values, 32 of each slot.
    pub(crate) fn q(&self) -> &[i8] {
        // SAFETY: lines are 64 bytes each, without padding.
        unsafe { std::slice::from_raw_parts(self.q.as_ptr().cast(), 64 * self.q.len()) }
    }

    /// Makes the quantised form unless it is there. `k` is a multiple of 32.
    pub(crate) fn quantise(&mut self, cpu: Cpu, team: &Team, form: Form) {
        if self.form == form || (self.form == Form::Wide && form == Form::Rows) {
            return;
        }
        let job = self.quantiser(cpu, form);
        in_groups(team, job.slots() / job.blocks, self.k, &|rows| {
            job.run(cpu, rows, 0..job.blocks);
        });
        self.has_quantised(&job);
    }

    /// What quantises the rows, part by part, to where [`Acts`] has them. When all parts are done: [`Acts::has_quantised`].
    pub(super) fn quantiser(&mut self, cpu: Cpu, form: Form) -> Quantiser {
        let (rows, k, blocks) = (self.int8_rows(cpu), self.k, self.blocks());
        debug_assert!(k.is_multiple_of(BLOCK) && self.x.len() >= rows * k);
        let slots = form.slots(rows, blocks);
        self.q.resize((slots * BLOCK).div_ceil(64), Line([0; 64]));
        self.q16
            .resize(if form == Form::Wide { slots * BLOCK } else { 0 }, 0);
        self.d.resize(slots, 0.0);
        let [sum1, sum2] = &mut self.sum;
        let [sx1, sx2] = &mut self.sx;
        if form != Form::Tiles {
            sum1.resize(slots, 0);
            sum2.resize(2 * slots, 0);
        }
        sx1.resize(slots, 0.0);
        sx2.resize(2 * slots, 0.0);
        Quantiser {
            x: Shared::new(self.x.as_mut_ptr()),
            rows,
            blocks,
            form,
            q: Shared::new(self.q.as_mut_ptr().cast()),
            q16: Shared::new(self.q16.as_mut_ptr()),
            d: Shared::new(self.d.as_mut_ptr()),
            sum: [Shared::new(sum1.as_mut_ptr()), Shared::new(sum2.as_mut_ptr())],
            sx: [Shared::new(sx1.as_mut_ptr()), Shared::new(sx2.as_mut_ptr())],
        }
    }

    /// The [`Quantiser`] has been everywhere.
    pub(super) fn has_quantised(&mut self, quantiser: &Quantiser) {
        self.form = quantiser.form;
    }

    /// The tiles of the rows that are not quantised, and which row is the first of them.
    pub(crate) fn bf16(&self, cpu: Cpu) -> (&[Tile], usize) {
        (&self.bf16, self.int8_rows(cpu))
    }

    /// Rounds the rows that are not quantised unless that is done.
    pub(crate) fn round(&mut self, cpu: Cpu, team: &Team) {
        if std::mem::replace(&mut self.rounded, true) {
            return;
        }
        assert_eq!(
            self.x.len(),
            self.rows * self.k,
            "only bf16 is kept of these activations"
        );
        let (first, k, blocks) = (self.int8_rows(cpu), self.k, self.blocks());
        let tiles = (self.rows - first).div_ceil(TILE);
        self.bf16.resize(tiles * blocks, Tile([[0; BLOCK]; TILE]));
        let (x, to) = (&self.x[first * k..], Shared::new(self.bf16.as_mut_ptr()));
        in_groups(team, tiles * TILE, k, &|rows| {
            for r in rows {
                // SAFETY: the row's tiles are inside the vector, and this call alone writes row `r % TILE` of them.
                let line = |b: usize| unsafe { &mut (*to.get().add(r / TILE * blocks + b)).0[r % TILE] };
                match x.get(r * k..(r + 1) * k) {
                    Some(x) => round_row(cpu, x, line),
                    None => (0..blocks).for_each(|b| *line(b) = [0; BLOCK]),
                }
            }
        });
    }
}

/// Calls `f` with ranges of `rows` rows of `k` values: whole tiles, about 8 Ki values each, so that one is worth handing out.
fn in_groups(team: &Team, rows: usize, k: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    if rows * k < 1 << 14 {
        return f(0..rows);
    }
    let group = (1usize << 13).div_ceil(k).next_multiple_of(TILE);
    team.run(rows.div_ceil(group), &|t| f(t * group..rows.min((t + 1) * group)));
}

/// Rounds a row to bf16, block by block to where `line` says: nearest, halves to even; denormals become zero.
fn round_row<'a>(cpu: Cpu, x: &[f32], line: impl Fn(usize) -> &'a mut [u16; BLOCK]) {
    for (b, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
        match cpu.path() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `cpu` proves AVX-512 with BF16.
            Path::Amx => unsafe { fast::bf16(x, line(b)) },
            _ => *line(b) = x.map(to_bf16),
        }
    }
}

/// `x` as bf16, as `vcvtne2ps2bf16` rounds it.
pub(crate) fn to_bf16(x: f32) -> u16 {
    let flushed = if x.is_subnormal() { 0.0f32.copysign(x) } else { x };
    half::bf16::from_f32(flushed).to_bits()
}

/// Rows to quantise. The vectors behind the pointers have room for all slots of `form`.
pub(super) struct Quantiser {
    /// `[rows, blocks, 32]`
    x: Shared<f32>,
    rows: usize,
    blocks: usize,
    form: Form,
    q: Shared<i8>,
    q16: Shared<i16>,
    d: Shared<f32>,
    sum: [Shared<i32>; 2],
    sx: [Shared<f32>; 2],
}

impl Quantiser {
    fn slots(&self) -> usize {
        self.form.slots(self.rows, self.blocks)
    }

    /// `rows`, and behind the last one those that fill its tile.
    pub(super) fn whole_tiles(&self, rows: Range<usize>) -> Range<usize> {
        match rows.end == self.rows {
            true => rows.start..self.slots() / self.blocks,
            false => rows,
        }
    }

    /// Quantises some blocks of some rows; rows past the last one (in a tile) become zeros.
    ///
    /// The activations must not have moved, no two calls at a time may have a block of a row in common, and nobody may write the values.
    pub(super) fn run(&self, cpu: Cpu, rows: Range<usize>, blocks: Range<usize>) {
        match cpu.path() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `cpu` proves AVX-512 F, BW, DQ, VL.
            Path::Avx512 | Path::Amx => unsafe { fast::avx512(self, rows, blocks) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `cpu` proves AVX2.
            Path::Avx2 => unsafe { fast::avx2(self, rows, blocks) },
            _ => self.body(rows, blocks),
        }
    }

    #[inline(always)]
    fn body(&self, rows: Range<usize>, blocks: Range<usize>) {
        assert!(blocks.end <= self.blocks && rows.end * self.blocks <= self.slots());
        // Loops, not closures: those would be compiled without the features of the caller.
        for r in rows {
            match self.form {
                Form::Tiles => self.row(r, blocks.clone(), Form::Tiles),
                Form::Wide => self.row(r, blocks.clone(), Form::Wide),
                _ => self.row(r, blocks.clone(), Form::Rows),
            }
        }
    }

    #[inline(always)]
    fn row(&self, r: usize, range: Range<usize>, form: Form) {
        let blocks = self.blocks;
        for b in range {
            let (slot, halves) = (form.slot(r, b, blocks), form.halves(r, b, blocks));
            // SAFETY: the slot and its halves are inside the vectors (`Acts::quantiser`), only this row's and block's; `x` has the row.
            unsafe {
                let q: &mut [i8; BLOCK] = &mut *self.q.get().add(slot * BLOCK).cast();
                let (scale, sums) = if r < self.rows {
                    quantise_block(&*self.x.get().add((r * blocks + b) * BLOCK).cast(), q)
                } else {
                    *q = [0; BLOCK];
                    (0.0, [0, 0])
                };
                if form == Form::Wide {
                    *self.q16.get().add(slot * BLOCK).cast::<[i16; BLOCK]>() = q.map(i16::from);
                }
                self.d.get().add(slot).write(scale);
                self.sx[0]
                    .get()
                    .add(slot)
                    .write(scale * (sums[0] + sums[1]) as f32);
                if form != Form::Tiles {
                    self.sum[0].get().add(slot).write(sums[0] + sums[1]);
                }
                for (at, sum) in halves.into_iter().zip(sums) {
                    self.sx[1].get().add(at).write(scale * sum as f32);
                    if form != Form::Tiles {
                        self.sum[1].get().add(at).write(sum);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod fast {
    use std::arch::x86_64::{_mm512_cvtne2ps_pbh, _mm512_loadu_ps};

    use super::{BLOCK, Quantiser, Range};

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16(x: &[f32; BLOCK], to: &mut [u16; BLOCK]) {
        // SAFETY: 32 floats are there; both types are 64 bytes of plain bits.
        *to = unsafe {
            let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
            std::mem::transmute::<std::arch::x86_64::__m512bh, [u16; BLOCK]>(_mm512_cvtne2ps_pbh(high, low))
        };
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(job: &Quantiser, rows: Range<usize>, blocks: Range<usize>) {
        job.body(rows, blocks);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn avx512(job: &Quantiser, rows: Range<usize>, blocks: Range<usize>) {
        job.body(rows, blocks);
    }
}

/// 1.5 * 2^23: adding it rounds to an integer, half to even, and leaves that integer in the low bits.
const ROUND: f32 = 12_582_912.0;

/// Quantises a block; returns its scale and the sums of its halves.
#[inline(always)]
fn quantise_block(x: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    // As bit patterns, so that NaN counts as larger than everything.
    let mut most = [0u32; 16];
    for half in x.as_chunks::<16>().0 {
        for (m, v) in most.iter_mut().zip(half) {
            *m = (*m).max(v.to_bits() & 0x7fff_ffff);
        }
    }
    let amax = f32::from_bits(most.into_iter().fold(0, u32::max));
    let (scale, inverse) = if !amax.is_finite() {
        (f32::NAN, 0.0)
    } else if amax < 1e-36 {
        (0.0, 0.0)
    } else {
        (amax / 127.0, 127.0 / amax)
    };
    let mut sums = [0i32; 2];
    if inverse == 0.0 {
        *q = [0; BLOCK];
        return (scale, sums);
    }
    let halves = x.as_chunks::<16>().0.iter().zip(q.as_chunks_mut::<16>().0);
    for ((x, q), sum) in halves.zip(&mut sums) {
        let whole = x.map(|v| ((v * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32));
        *sum = whole.iter().sum();
        *q = whole.map(|v| v as i8);
    }
    (scale, sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_half_to_even_and_keeps_sums() {
        let team = Team::new(1);
        let mut x = vec![0.0f32; 64];
        x[..6].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]);
        x[16] = -3.0;
        x[40] = f32::INFINITY;
        for cpu in Cpu::available() {
            let mut acts = Acts::new();
            acts.load(&x, 1, 64);
            acts.quantise(cpu, &team, Form::Wide);
            assert_eq!(&acts.q()[..6], &[127, 0, 2, 2, 0, -2]);
            assert_eq!(
                acts.q16[..64].iter().map(|&v| v as i8).collect::<Vec<_>>(),
                acts.q()[..64]
            );
            assert_eq!((acts.sum[0][0], &acts.sum[1][..2]), (126, &[129, -3][..]));
            assert_eq!((acts.d[0], acts.sx[0][0]), (1.0, 126.0));
            assert!(acts.d[1].is_nan() && acts.q()[32..64].iter().all(|&q| q == 0));
        }
    }

    #[test]
    fn tiles_hold_the_values_of_rows_and_zeros_below_them() {
        let (rows, k) = (19, 96);
        let (team, blocks) = (Team::new(2), k / BLOCK);
        let noise = |n: usize| (n as f32 * 0.7).sin() * (1 + n % 5) as f32;
        let mut want = Acts::new();
        want.load(&(0..rows * k).map(noise).collect::<Vec<_>>(), rows, k);
        let mut got = Acts::new();
        // What an earlier load leaves behind must not show.
        got.load(&vec![3.0; 40 * k], 40, k);
        got.quantise(Cpu::best(), &team, Form::Tiles);
        got.fill(&team, rows, k, &|r, row| {
            row.iter_mut()
                .enumerate()
                .for_each(|(i, v)| *v = noise(r * k + i));
        });
        want.quantise(Cpu::best(), &team, Form::Rows);
        got.quantise(Cpu::best(), &team, Form::Tiles);
        assert_eq!(want.x(), got.x());
        for r in 0..32 {
            for b in 0..blocks {
                let tile = Form::Tiles.slot(r, b, blocks);
                let tile_halves = Form::Tiles.halves(r, b, blocks).map(|at| got.sx[1][at]);
                let q = &got.q()[tile * BLOCK..][..BLOCK];
                if r < rows {
                    let slot = Form::Rows.slot(r, b, blocks);
                    assert_eq!(q, &want.q()[slot * BLOCK..][..BLOCK]);
                    assert_eq!((got.d[tile], got.sx[0][tile]), (want.d[slot], want.sx[0][slot]));
                    assert_eq!(tile_halves, [want.sx[1][2 * slot], want.sx[1][2 * slot + 1]]);
                } else {
                    assert!(q.iter().all(|&q| q == 0));
                    assert_eq!((got.d[tile], got.sx[0][tile], tile_halves), (0.0, 0.0, [0.0; 2]));
                }
            }
        }
    }
}
