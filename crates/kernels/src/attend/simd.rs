//! The AVX2 and AVX-512 paths: one body over a small set of vector operations.
//!
//! Few rows read the page where it lies and widen it in registers: decoding is bound by memory. Many rows widen the page once
//! and walk it in tiles of up to 6 rows. A tile keeps rows x vectors <= 12 accumulators, which fills the 16 registers of AVX2:
//! few rows take four vectors at a time, because 12 chains of FMAs are what hides their latency.

use std::arch::x86_64::*;

use antefix_state::PAGE_ROWS;

use super::{AttendScratch, Page, StateMut, Tile};

/// Most rows of a register tile: 6 rows x 2 vectors = 12 accumulators.
const TILE: usize = 6;
/// Up to this many rows take 4 vectors at a time.
const FEW: usize = 2;
/// Up to this many rows read bf16 pages in place: widening a page costs as much as two tiles save.
const IN_PLACE: usize = 2 * TILE;

/// Keys whose scores are computed together.
const HALF: usize = PAGE_ROWS / 2;

/// Vector operations on `LANES` f32. Every operation is one IEEE operation a lane, so paths agree to the bit.
trait Simd {
    const LANES: usize;
    type V: Copy;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// The even and odd dimensions of `LANES` keys out of `LANES` bf16 pairs.
    unsafe fn load_pairs(p: *const u16) -> (Self::V, Self::V);
    /// The first (or second) of each of `LANES` bf16 pairs.
    unsafe fn load_first(p: *const u16) -> Self::V;
    unsafe fn load_second(p: *const u16) -> Self::V;
    /// `acc[r][i] += x[r * STRIDE] * v[i]`.
    unsafe fn outer<const R: usize, const W: usize, const STRIDE: usize>(
        x: *const f32,
        v: &[Self::V; W],
        acc: &mut [[Self::V; W]; R],
    );
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `b` where `b > a`, else `a`.
    unsafe fn larger(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn smaller(a: Self::V, b: Self::V) -> Self::V;
    /// `2^n` for integral `n` in the exponent range, as the sum of two halves' powers: `(2^(n >> 1), 2^(n - (n >> 1)))`.
    unsafe fn powers(n: Self::V) -> (Self::V, Self::V);
    /// `v` where `x >= limit` or `x` is NaN, else 0.
    unsafe fn keep_from(x: Self::V, limit: f32, v: Self::V) -> Self::V;
}

struct Avx2;

impl Simd for Avx2 {
    const LANES: usize = 8;
    type V = __m256;
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const u16) -> (__m256, __m256) {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let pairs = _mm256_loadu_si256(p.cast());
            let even = _mm256_slli_epi32::<16>(pairs);
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000u32 as i32));
            (_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd))
        }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const u16) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_second(p: *const u16) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(p.cast()), high))
        }
    }
    /// By hand, because left alone the compiler loads all broadcasts of a step first and spills accumulators for them.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn outer<const R: usize, const W: usize, const STRIDE: usize>(
        x: *const f32,
        v: &[__m256; W],
        acc: &mut [[__m256; W]; R],
    ) {
        macro_rules! row {
            ($r:literal, $packed:literal, $paged:literal) => {
                if $r < R {
                    match STRIDE {
                        1 => row!(at $r, $packed),
                        _ => row!(at $r, $paged),
                    }
                }
            };
            (at $r:literal, $offset:literal) => {
                // SAFETY: the caller has the features; `x` has a value for every row. Only that value is read.
                unsafe {
                    if W == 2 {
                        std::arch::asm!(
                            concat!("vbroadcastss {x}, dword ptr [{p} + ", $offset, "]"),
                            "vfmadd231ps {a}, {x}, {v}",
                            "vfmadd231ps {b}, {x}, {w}",
                            p = in(reg) x,
                            x = out(ymm_reg) _,
                            v = in(ymm_reg) v[0],
                            w = in(ymm_reg) v[1],
                            a = inout(ymm_reg) acc[$r][0],
                            b = inout(ymm_reg) acc[$r][1],
                            options(readonly, nostack, preserves_flags)
                        );
                    } else if W == 4 {
                        std::arch::asm!(
                            concat!("vbroadcastss {x}, dword ptr [{p} + ", $offset, "]"),
                            "vfmadd231ps {a}, {x}, {v}",
                            "vfmadd231ps {b}, {x}, {w}",
                            "vfmadd231ps {c}, {x}, {y}",
                            "vfmadd231ps {d}, {x}, {z}",
                            p = in(reg) x,
                            x = out(ymm_reg) _,
                            v = in(ymm_reg) v[0],
                            w = in(ymm_reg) v[1],
                            y = in(ymm_reg) v[2],
                            z = in(ymm_reg) v[3],
                            a = inout(ymm_reg) acc[$r][0],
                            b = inout(ymm_reg) acc[$r][1],
                            c = inout(ymm_reg) acc[$r][2],
                            d = inout(ymm_reg) acc[$r][3],
                            options(readonly, nostack, preserves_flags)
                        );
                    } else {
                        let x = _mm256_broadcast_ss(&*x.add($r * STRIDE));
                        for i in 0..W {
                            acc[$r][i] = _mm256_fmadd_ps(x, v[i], acc[$r][i]);
                        }
                    }
                }
            };
        }
        const { assert!(R <= TILE && (STRIDE == 1 || STRIDE == PAGE_ROWS)) };
        row!(0, "0", "0");
        row!(1, "4", "128");
        row!(2, "8", "256");
        row!(3, "12", "384");
        row!(4, "16", "512");
        row!(5, "20", "640");
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn larger(a: __m256, b: __m256) -> __m256 {
        // maxps returns its second operand when either is NaN.
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_max_ps(b, a) }
    }
    #[inline(always)]
    unsafe fn smaller(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_min_ps(b, a) }
    }
    #[inline(always)]
    unsafe fn powers(n: __m256) -> (__m256, __m256) {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let rest = _mm256_sub_epi32(n, half);
            let bias = _mm256_set1_epi32(127);
            let power = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, bias)));
            (power(half), power(rest))
        }
    }
    #[inline(always)]
    unsafe fn keep_from(x: __m256, limit: f32, v: __m256) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(limit)), v) }
    }
}

struct Avx512;

impl Simd for Avx512 {
    const LANES: usize = 16;
    type V = __m512;
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const u16) -> (__m512, __m512) {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let pairs = _mm512_loadu_si512(p.cast());
            let even = _mm512_slli_epi32::<16>(pairs);
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32 as i32));
            (_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
        }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const u16) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_second(p: *const u16) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p.cast()), high))
        }
    }
    #[inline(always)]
    unsafe fn outer<const R: usize, const W: usize, const STRIDE: usize>(
        x: *const f32,
        v: &[__m512; W],
        acc: &mut [[__m512; W]; R],
    ) {
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller has the features; `x` has a value for every row.
            let x = unsafe { _mm512_set1_ps(*x.add(r * STRIDE)) };
            for (acc, &v) in acc.iter_mut().zip(v) {
                // SAFETY: the caller has the features.
                *acc = unsafe { _mm512_fmadd_ps(x, v, *acc) };
            }
        }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn larger(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_max_ps(b, a) }
    }
    #[inline(always)]
    unsafe fn smaller(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe { _mm512_min_ps(b, a) }
    }
    #[inline(always)]
    unsafe fn powers(n: __m512) -> (__m512, __m512) {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let n = _mm512_cvtps_epi32(n);
            let half = _mm512_srai_epi32::<1>(n);
            let rest = _mm512_sub_epi32(n, half);
            let bias = _mm512_set1_epi32(127);
            let power = |n| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(n, bias)));
            (power(half), power(rest))
        }
    }
    #[inline(always)]
    unsafe fn keep_from(x: __m512, limit: f32, v: __m512) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_set1_ps(limit));
            _mm512_maskz_mov_ps(!below, v)
        }
    }
}

/// The vector form of [`crate::ops::exp`], operation by operation.
#[inline(always)]
unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller has S's features; no memory is touched.
    unsafe {
        let round = S::splat(12_582_912.0);
        let clamped = S::larger(S::smaller(x, S::splat(88.8)), S::splat(-87.4));
        let n = S::sub(S::fma(clamped, S::splat(std::f32::consts::LOG2_E), round), round);
        let r = S::fma(
            n,
            S::splat(2.121_944_4e-4),
            S::fma(n, S::splat(-0.693_359_4), clamped),
        );
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_5e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let y = S::add(S::fma(S::mul(r, r), p, r), S::splat(1.0));
        let (a, b) = S::powers(n);
        S::keep_from(x, -87.33, S::mul(S::mul(y, a), b))
    }
}

/// See [`super::attend`].
///
/// # Safety
/// The CPU has AVX2 and FMA; the tile's lengths fit.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn page_avx2(tile: &Tile<'_>, state: &mut StateMut<'_>, scratch: &mut AttendScratch) {
    // SAFETY: as promised by the caller.
    unsafe { page::<Avx2>(tile, state, scratch) }
}

/// See [`super::attend`].
///
/// # Safety
/// The CPU has AVX-512F; the tile's lengths fit.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn page_avx512(tile: &Tile<'_>, state: &mut StateMut<'_>, scratch: &mut AttendScratch) {
    // SAFETY: as promised by the caller.
    unsafe { page::<Avx512>(tile, state, scratch) }
}

/// Scores of rows packed by [`pack`], `q.len() / D` of them and at least one, against the 32 keys of a page: `out: [R][32]`.
///
/// # Safety
/// The CPU has AVX2 and FMA; `out` has a row for each, and the page has `D` dimensions.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn scores_avx2(dim: usize, q: &[f32], page: &Page<'_>, out: &mut [[f32; PAGE_ROWS]]) {
    let source = match page {
        Page::F32 { k, v } => Source::F32(k.as_ptr(), v.as_ptr()),
        Page::Bf16 { k, v } => Source::Bf16(k.as_ptr(), v.as_ptr()),
    };
    let per = rows_per_tile(out.len());
    for (q, out) in q.chunks(per * dim).zip(out.chunks_mut(per)) {
        // SAFETY: as promised by the caller; a tile has as many rows of `out` as of `q`, and no more than TILE.
        unsafe {
            match out.len() {
                1 => scores_of::<1>(q, dim, source, out),
                FEW => scores_of::<FEW>(q, dim, source, out),
                3 => scores_of::<3>(q, dim, source, out),
                4 => scores_of::<4>(q, dim, source, out),
                5 => scores_of::<5>(q, dim, source, out),
                _ => scores_of::<TILE>(q, dim, source, out),
            }
        }
    }
}

/// One tile of [`scores_avx2`]: `q: [D][R]`.
#[inline(always)]
unsafe fn scores_of<const R: usize>(q: &[f32], dim: usize, source: Source, out: &mut [[f32; PAGE_ROWS]]) {
    let (q, out) = (q.as_ptr(), out.first_chunk_mut::<R>().expect("R rows"));
    // SAFETY: as promised by the caller of `scores_avx2`.
    unsafe {
        if R <= FEW {
            scores::<Avx2, R, 4>(q, dim, source, None, 0, out);
        } else {
            scores::<Avx2, R, 2>(q, dim, source, None, 0, out);
            scores::<Avx2, R, 2>(q, dim, source, None, HALF, out);
        }
    }
}

/// Where a page's values come from.
#[derive(Clone, Copy)]
enum Source {
    /// bf16, as stored.
    Bf16(*const u16, *const u16),
    /// f32: K `[2][D][16]` as stored or widened, V `[32][D]`.
    F32(*const f32, *const f32),
}

#[inline(always)]
unsafe fn page<S: Simd>(tile: &Tile<'_>, state: &mut StateMut<'_>, scratch: &mut AttendScratch) {
    let (rows, dim) = (tile.call.visible.len(), tile.call.dim);
    // SAFETY: `Page::check` has seen 32 * dim values in each part; `wide` is sized here.
    unsafe {
        let source = match tile.page {
            Page::F32 { k, v } => Source::F32(k.as_ptr(), v.as_ptr()),
            Page::Bf16 { k, v } if tile.seen.len() <= IN_PLACE => Source::Bf16(k.as_ptr(), v.as_ptr()),
            Page::Bf16 { k, v } => {
                let part = PAGE_ROWS * dim;
                if scratch.wide.len() < 2 * part {
                    scratch.wide.resize(2 * part, f32::NAN);
                }
                let (wk, wv) = scratch.wide.split_at_mut(part);
                widen::<S>(k, v, tile.valid, dim, wk, wv);
                Source::F32(wk.as_ptr(), wv.as_ptr())
            }
        };
        // Tiles lie where `pack` has put them, whatever part of the rows sees this page.
        let per = rows_per_tile(rows);
        for first in (tile.seen.start / per * per..tile.seen.end).step_by(per) {
            let q = scratch.q.as_ptr().add(first * dim);
            match per.min(rows - first) {
                1 => rows_of::<S, 1, 4>(tile, source, q, first, state),
                FEW => rows_of::<S, FEW, 4>(tile, source, q, first, state),
                3 => rows_of::<S, 3, 2>(tile, source, q, first, state),
                4 => rows_of::<S, 4, 2>(tile, source, q, first, state),
                5 => rows_of::<S, 5, 2>(tile, source, q, first, state),
                _ => rows_of::<S, TILE, 2>(tile, source, q, first, state),
            }
        }
    }
}

/// Rows of every tile but the last, so that tiles are of nearly equal height.
fn rows_per_tile(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(TILE))
}

/// Packs `q: [R, D]` tile by tile as `[D][rows of the tile]`.
pub(super) fn pack(q: &[f32], rows: usize, dim: usize, out: &mut Vec<f32>) {
    out.resize(rows * dim, 0.0);
    let per = rows_per_tile(rows) * dim;
    for (q, out) in q.chunks(per).zip(out.chunks_mut(per)) {
        let rows = q.len() / dim;
        for (r, q) in q.chunks_exact(dim).enumerate() {
            for (d, &x) in q.iter().enumerate() {
                out[d * rows + r] = x;
            }
        }
    }
}

/// Widens a bf16 page: keys to `[2][D][16]`, the valid values to `[32][D]`.
#[inline(always)]
unsafe fn widen<S: Simd>(k: &[u16], v: &[u16], valid: usize, dim: usize, wk: &mut [f32], wv: &mut [f32]) {
    // SAFETY: pairs p of 16 keys lie at k[p * 32..], their dimensions go to wk[2 p * 16..] and wk[(2 p + 1) * 16..].
    unsafe {
        for p in 0..dim {
            let mut lane = 0;
            while lane < HALF {
                let (even, odd) = S::load_pairs(k.as_ptr().add(p * 2 * HALF + lane * 2));
                S::store(wk.as_mut_ptr().add(2 * p * HALF + lane), even);
                S::store(wk.as_mut_ptr().add((2 * p + 1) * HALF + lane), odd);
                lane += S::LANES;
            }
        }
        for j in 0..valid.div_ceil(2) {
            for d in (0..dim).step_by(S::LANES) {
                let (first, second) = S::load_pairs(v.as_ptr().add((j * dim + d) * 2));
                S::store(wv.as_mut_ptr().add(2 * j * dim + d), first);
                S::store(wv.as_mut_ptr().add((2 * j + 1) * dim + d), second);
            }
        }
    }
}

/// `R` rows from `first` on, `W` vectors at a time: scores, softmax step, values. `q: [D][R]`.
#[inline(always)]
unsafe fn rows_of<S: Simd, const R: usize, const W: usize>(
    tile: &Tile<'_>,
    source: Source,
    q: *const f32,
    first: usize,
    state: &mut StateMut<'_>,
) {
    let dim = tile.call.dim;
    let mut s = [[f32::NEG_INFINITY; PAGE_ROWS]; R];
    // SAFETY: rows first..first + R exist; pointers of `source` cover the page.
    unsafe {
        let both = tile.valid > HALF;
        // The first tile alone asks for the values, and then for the keys of the next page.
        let ahead = first <= tile.seen.start;
        let (next, next_k) = match (source, tile.next) {
            (Source::Bf16(_, v), Some(Page::Bf16 { k, .. })) if ahead => (Some(v), Some(k.as_ptr())),
            _ => (None, None),
        };
        match (S::LANES, W) {
            (8, 4) if both => scores::<S, R, 4>(q, dim, source, next, 0, &mut s),
            (8, _) => {
                scores::<S, R, 2>(q, dim, source, next, 0, &mut s);
                if both {
                    scores::<S, R, 2>(q, dim, source, next, HALF, &mut s);
                }
            }
            _ if both => scores::<S, R, 2>(q, dim, source, next, 0, &mut s),
            _ => scores::<S, R, 1>(q, dim, source, next, 0, &mut s),
        }
        for (i, s) in s.iter_mut().enumerate() {
            if let Some(cap) = tile.call.softcap {
                s.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
            }
            let (lo, hi) = tile.span(first + i);
            if lo > 0 {
                s[..lo].fill(f32::NEG_INFINITY);
            }
            if hi < PAGE_ROWS {
                s[hi.max(lo)..].fill(f32::NEG_INFINITY);
            }
            if tile.has_holes() {
                (0..PAGE_ROWS)
                    .filter(|&j| !tile.is_open(j))
                    .for_each(|j| s[j] = f32::NEG_INFINITY);
            }
        }
        let rows = first..first + R;
        let factors = softmax_step::<S, R>(&mut s, &mut state.m[rows.clone()], &mut state.l[rows]);
        // A row that sees nothing keeps its state to the bit: its accumulators are not touched.
        let acc = state.acc.as_mut_ptr().add(first * dim);
        if factors.iter().all(Option::is_some) {
            let factors = factors.map(|f| f.unwrap_or(1.0));
            values::<S, R, W>(&s, factors, source, next_k, tile.open, dim, acc);
        } else {
            for (i, factor) in factors.into_iter().enumerate() {
                if let Some(factor) = factor {
                    values::<S, 1, 4>(&[s[i]], [factor], source, None, tile.open, dim, acc.add(i * dim));
                }
            }
        }
    }
}
/// Scores of `R` rows against `W` vectors of keys from key `from` on.
#[inline(always)]
unsafe fn scores<S: Simd, const R: usize, const W: usize>(
    q: *const f32,
    dim: usize,
    source: Source,
    next: Option<*const u16>,
    from: usize,
    s: &mut [[f32; PAGE_ROWS]; R],
) {
    // SAFETY: q has dim * R values, the page's K part 32 * dim, a row of s 32.
    unsafe {
        let mut acc = [[S::splat(0.0); W]; R];
        // Loops, not closures: those would be compiled without the CPU's features.
        let (mut v, mut odd) = ([S::splat(0.0); W], [S::splat(0.0); W]);
        match source {
            Source::F32(k, _) => {
                for d in 0..dim {
                    for (i, v) in v.iter_mut().enumerate() {
                        let key = from + i * S::LANES;
                        *v = S::load(k.add((key / HALF * dim + d) * HALF + key % HALF));
                    }
                    S::outer::<R, W, 1>(q.add(d * R), &v, &mut acc);
                }
            }
            Source::Bf16(k, _) => {
                for d in 0..dim / 2 {
                    if let Some(v) = next {
                        for i in 0..W * S::LANES / HALF {
                            _mm_prefetch::<_MM_HINT_T0>(
                                v.wrapping_add(from * dim + (d * W * S::LANES / HALF + i) * 32)
                                    .cast(),
                            );
                        }
                    }
                    for (i, (v, odd)) in v.iter_mut().zip(&mut odd).enumerate() {
                        let key = from + i * S::LANES;
                        let at = (key / HALF * dim / 2 + d) * HALF + key % HALF;
                        (*v, *odd) = S::load_pairs(k.add(at * 2));
                    }
                    S::outer::<R, W, 1>(q.add(2 * d * R), &v, &mut acc);
                    S::outer::<R, W, 1>(q.add((2 * d + 1) * R), &odd, &mut acc);
                }
            }
        }
        for (s, acc) in s.iter_mut().zip(acc) {
            for (i, acc) in acc.into_iter().enumerate() {
                S::store(s.as_mut_ptr().add(from + i * S::LANES), acc);
            }
        }
    }
}

/// See the scalar twin. Every row gets its factor, or nothing.
#[inline(always)]
unsafe fn softmax_step<S: Simd, const R: usize>(
    s: &mut [[f32; PAGE_ROWS]; R],
    m: &mut [f32],
    l: &mut [f32],
) -> [Option<f32>; R] {
    // SAFETY: 32 values are a whole number of vectors; R <= 8 differences fill at most one vector.
    unsafe {
        let mut steps = [0.0f32; 16];
        let mut new = [f32::NEG_INFINITY; R];
        let mut any = [true; R];
        for r in 0..R {
            let top = tree::<true>(&s[r]);
            any[r] = top != f32::NEG_INFINITY;
            if any[r] {
                new[r] = if top > m[r] { top } else { m[r] };
                steps[r] = m[r] - new[r];
            }
        }
        S::store(steps.as_mut_ptr(), exp::<S>(S::load(steps.as_ptr())));
        let mut factors = [None; R];
        for r in 0..R {
            if any[r] {
                let (p, shift) = (s[r].as_mut_ptr(), S::splat(new[r]));
                let mut i = 0;
                while i < PAGE_ROWS {
                    S::store(p.add(i), exp::<S>(S::sub(S::load(p.add(i)), shift)));
                    i += S::LANES;
                }
                l[r] = l[r].mul_add(steps[r], tree::<false>(&s[r]));
                m[r] = new[r];
                factors[r] = Some(steps[r]);
            }
        }
        factors
    }
}

/// Maximum or sum of 32 values: element `i` takes in element `i + half` for `half` = 16, 8, 4, 2, 1.
#[inline(always)]
unsafe fn tree<const MAX: bool>(s: &[f32; PAGE_ROWS]) -> f32 {
    // SAFETY: the caller has AVX2, at least.
    unsafe {
        macro_rules! step {
            ($max:ident, $add:ident, $a:expr, $b:expr) => {
                if MAX { $max($b, $a) } else { $add($a, $b) }
            };
        }
        let s = s.as_ptr();
        let low = step!(
            _mm256_max_ps,
            _mm256_add_ps,
            _mm256_loadu_ps(s),
            _mm256_loadu_ps(s.add(16))
        );
        let high = step!(
            _mm256_max_ps,
            _mm256_add_ps,
            _mm256_loadu_ps(s.add(8)),
            _mm256_loadu_ps(s.add(24))
        );
        let all = step!(_mm256_max_ps, _mm256_add_ps, low, high);
        let upper = _mm256_extractf128_ps::<1>(all);
        let four = step!(_mm_max_ps, _mm_add_ps, _mm256_castps256_ps128(all), upper);
        let two = step!(_mm_max_ps, _mm_add_ps, four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(step!(_mm_max_ps, _mm_add_ps, two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// The positions of the bits that are set, ascending.
#[inline(always)]
fn rows_in(mut bits: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let j = bits.trailing_zeros();
        bits &= bits.wrapping_sub(1);
        (j < u32::BITS).then_some(j as usize)
    })
}

/// `acc[r] = acc[r] * factor[r] + sum_j p[r][j] v[j]` over the open keys, ascending, `W` vectors of dimensions at a time.
#[inline(always)]
unsafe fn values<S: Simd, const R: usize, const W: usize>(
    p: &[[f32; PAGE_ROWS]; R],
    factors: [f32; R],
    source: Source,
    next: Option<*const u16>,
    open: u32,
    dim: usize,
    acc: *mut f32,
) {
    // SAFETY: acc has R * dim values, V has 32 rows of dim; dim is a multiple of 16.
    unsafe {
        let mut d = 0;
        while d + W * S::LANES <= dim {
            values_at::<S, R, W>(p, factors, source, next, open, dim, d, acc);
            d += W * S::LANES;
        }
        if W > 2 && d + 2 * S::LANES <= dim {
            values_at::<S, R, 2>(p, factors, source, next, open, dim, d, acc);
            d += 2 * S::LANES;
        }
        if d < dim {
            values_at::<S, R, 1>(p, factors, source, next, open, dim, d, acc);
        }
    }
}

/// See [`values`]: dimensions from `d` on.
#[inline(always)]
unsafe fn values_at<S: Simd, const R: usize, const W: usize>(
    p: &[[f32; PAGE_ROWS]; R],
    factors: [f32; R],
    source: Source,
    next: Option<*const u16>,
    open: u32,
    dim: usize,
    d: usize,
    acc: *mut f32,
) {
    // SAFETY: the caller's: W vectors from d on are inside rows of dim.
    unsafe {
        let mut v = [S::splat(0.0); W];
        let mut sum = [[S::splat(0.0); W]; R];
        for (r, sum) in sum.iter_mut().enumerate() {
            let factor = S::splat(factors[r]);
            for (i, sum) in sum.iter_mut().enumerate() {
                *sum = S::mul(S::load(acc.add(r * dim + d + i * S::LANES)), factor);
            }
        }
        let p = p.as_ptr().cast::<f32>();
        match source {
            Source::F32(_, values) => {
                for j in rows_in(open) {
                    for (i, v) in v.iter_mut().enumerate() {
                        *v = S::load(values.add(j * dim + d + i * S::LANES));
                    }
                    S::outer::<R, W, PAGE_ROWS>(p.add(j), &v, &mut sum);
                }
            }
            Source::Bf16(_, values) => {
                let mut pair = 0;
                while 2 * pair < PAGE_ROWS && open >> (2 * pair) != 0 {
                    if let Some(k) = next
                        && 2 * pair < W * S::LANES
                    {
                        _mm_prefetch::<_MM_HINT_T0>(k.wrapping_add((d + 2 * pair) * 32).cast());
                        _mm_prefetch::<_MM_HINT_T0>(k.wrapping_add((d + 2 * pair + 1) * 32).cast());
                    }
                    let both = values.add((pair * dim + d) * 2);
                    if open >> (2 * pair) & 1 == 1 {
                        for (i, v) in v.iter_mut().enumerate() {
                            *v = S::load_first(both.add(2 * i * S::LANES));
                        }
                        S::outer::<R, W, PAGE_ROWS>(p.add(2 * pair), &v, &mut sum);
                    }
                    if open >> (2 * pair + 1) & 1 == 1 {
                        for (i, v) in v.iter_mut().enumerate() {
                            *v = S::load_second(both.add(2 * i * S::LANES));
                        }
                        S::outer::<R, W, PAGE_ROWS>(p.add(2 * pair + 1), &v, &mut sum);
                    }
                    pair += 1;
                }
            }
        }
        for (r, sum) in sum.into_iter().enumerate() {
            for (i, sum) in sum.into_iter().enumerate() {
                S::store(acc.add(r * dim + d + i * S::LANES), sum);
            }
        }
    }
}
