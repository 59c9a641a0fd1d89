//! The AVX2 and AVX-512 paths: one body over a small set of vector operations.
//!
//! Few rows read the page where it lies and widen it in registers: decoding is bound by memory. Many rows widen the page once
//! and walk it in tiles of 6 rows, which fills the 16 registers of AVX2 with accumulators.

use std::arch::x86_64::*;

use antefix_state::PAGE_ROWS;

use super::{AttendScratch, Page, StateMut, Tile};

/// Rows of a register tile: 6 rows x 2 vectors = 12 accumulators.
const TILE: usize = 6;

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
    unsafe fn load_bf16(p: *const u16) -> Self::V;
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
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
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
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        // SAFETY: the caller has the features, and a pointer covers one vector.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
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
    let (rows, dim) = (tile.visible.len(), tile.dim);
    // SAFETY: `Page::check` has seen 32 * dim values in each part; `wide` is sized here.
    unsafe {
        let source = match tile.page {
            Page::F32 { k, v } => Source::F32(k.as_ptr(), v.as_ptr()),
            Page::Bf16 { k, v } if rows <= TILE => Source::Bf16(k.as_ptr(), v.as_ptr()),
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
        let mut r = 0;
        while r < rows {
            match rows - r {
                1 => rows_of::<S, 1>(tile, source, r, state),
                2 => rows_of::<S, 2>(tile, source, r, state),
                3 => rows_of::<S, 3>(tile, source, r, state),
                4 => rows_of::<S, 4>(tile, source, r, state),
                5 => rows_of::<S, 5>(tile, source, r, state),
                _ => rows_of::<S, TILE>(tile, source, r, state),
            }
            r += TILE;
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
        let mut i = 0;
        while i < valid * dim {
            S::store(wv.as_mut_ptr().add(i), S::load_bf16(v.as_ptr().add(i)));
            i += S::LANES;
        }
    }
}

/// `R` rows from `first` on: scores, softmax step, values.
#[inline(always)]
unsafe fn rows_of<S: Simd, const R: usize>(
    tile: &Tile<'_>,
    source: Source,
    first: usize,
    state: &mut StateMut<'_>,
) {
    let dim = tile.dim;
    let mut s = [[f32::NEG_INFINITY; PAGE_ROWS]; R];
    // SAFETY: rows first..first + R exist; pointers of `source` cover the page.
    unsafe {
        let q = tile.q.as_ptr().add(first * dim);
        for half in 0..2 {
            if half * HALF < tile.valid {
                match source {
                    Source::F32(k, _) => scores::<S, R>(q, dim, k.add(half * dim * HALF), half, &mut s),
                    Source::Bf16(k, _) => scores_bf16::<S, R>(q, dim, k.add(half * dim * HALF), half, &mut s),
                }
            }
        }
        let mut factors = [None; R];
        for (i, s) in s.iter_mut().enumerate() {
            let r = first + i;
            if let Some(cap) = tile.softcap {
                s.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
            }
            let (lo, hi) = tile.span(r);
            s[..lo].fill(f32::NEG_INFINITY);
            s[hi.max(lo)..].fill(f32::NEG_INFINITY);
            factors[i] = softmax_step::<S>(s, &mut state.m[r], &mut state.l[r]);
        }
        // A row that sees nothing keeps its state to the bit: its accumulators are not touched.
        let acc = state.acc.as_mut_ptr().add(first * dim);
        if factors.iter().all(Option::is_some) {
            let factors = factors.map(|f| f.unwrap_or(1.0));
            values::<S, R>(&s, factors, source, tile.valid, dim, acc);
        } else {
            for (i, factor) in factors.into_iter().enumerate() {
                if let Some(factor) = factor {
                    values::<S, 1>(&[s[i]], [factor], source, tile.valid, dim, acc.add(i * dim));
                }
            }
        }
    }
}

/// Scores of `R` rows against 16 keys, `k: [D][16]`.
#[inline(always)]
unsafe fn scores<S: Simd, const R: usize>(
    q: *const f32,
    dim: usize,
    k: *const f32,
    half: usize,
    s: &mut [[f32; PAGE_ROWS]; R],
) {
    // SAFETY: q has R * dim values, k has dim * 16, a row of s has 32.
    unsafe {
        let parts = HALF / S::LANES; // 2 on AVX2, 1 on AVX-512
        let mut acc = [[S::splat(0.0); 2]; R];
        for d in 0..dim {
            let k0 = S::load(k.add(d * HALF));
            let k1 = if parts == 2 {
                S::load(k.add(d * HALF + S::LANES))
            } else {
                k0
            };
            for r in 0..R {
                let x = S::splat(*q.add(r * dim + d));
                acc[r][0] = S::fma(x, k0, acc[r][0]);
                if parts == 2 {
                    acc[r][1] = S::fma(x, k1, acc[r][1]);
                }
            }
        }
        for r in 0..R {
            for p in 0..parts {
                S::store(s[r].as_mut_ptr().add(half * HALF + p * S::LANES), acc[r][p]);
            }
        }
    }
}

/// The same against 16 bf16 keys in pairs, `k: [D/2][16][2]`.
#[inline(always)]
unsafe fn scores_bf16<S: Simd, const R: usize>(
    q: *const f32,
    dim: usize,
    k: *const u16,
    half: usize,
    s: &mut [[f32; PAGE_ROWS]; R],
) {
    // SAFETY: q has R * dim values, k has dim * 16, a row of s has 32.
    unsafe {
        let parts = HALF / S::LANES;
        let mut acc = [[S::splat(0.0); 2]; R];
        for d in 0..dim / 2 {
            for p in 0..parts {
                let (even, odd) = S::load_pairs(k.add((d * HALF + p * S::LANES) * 2));
                for r in 0..R {
                    let row = q.add(r * dim + 2 * d);
                    acc[r][p] = S::fma(S::splat(*row), even, acc[r][p]);
                    acc[r][p] = S::fma(S::splat(*row.add(1)), odd, acc[r][p]);
                }
            }
        }
        for r in 0..R {
            for p in 0..parts {
                S::store(s[r].as_mut_ptr().add(half * HALF + p * S::LANES), acc[r][p]);
            }
        }
    }
}

/// See the scalar twin.
#[inline(always)]
unsafe fn softmax_step<S: Simd>(s: &mut [f32; PAGE_ROWS], m: &mut f32, l: &mut f32) -> Option<f32> {
    // SAFETY: 32 values are a whole number of vectors.
    unsafe {
        let mut best = S::load(s.as_ptr());
        let mut i = S::LANES;
        while i < PAGE_ROWS {
            best = S::larger(best, S::load(s.as_ptr().add(i)));
            i += S::LANES;
        }
        let mut lanes = [f32::NEG_INFINITY; 16];
        S::store(lanes.as_mut_ptr(), best);
        let top = lanes
            .iter()
            .fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        if top == f32::NEG_INFINITY {
            return None;
        }
        let new = if top > *m { top } else { *m };
        let shift = S::splat(new);
        let mut sum = [0.0f32; PAGE_ROWS];
        let mut i = 0;
        while i < PAGE_ROWS {
            let p = exp::<S>(S::sub(S::load(s.as_ptr().add(i)), shift));
            S::store(s.as_mut_ptr().add(i), p);
            S::store(sum.as_mut_ptr().add(i), p);
            i += S::LANES;
        }
        let mut half = PAGE_ROWS / 2;
        while half > 0 {
            for i in 0..half {
                sum[i] += sum[i + half];
            }
            half /= 2;
        }
        S::store(lanes.as_mut_ptr(), exp::<S>(S::splat(*m - new)));
        let factor = lanes[0];
        *l = l.mul_add(factor, sum[0]);
        *m = new;
        Some(factor)
    }
}

/// `acc[r] = acc[r] * factor[r] + sum_j p[r][j] v[j]`, keys ascending, two vectors of dimensions at a time.
#[inline(always)]
unsafe fn values<S: Simd, const R: usize>(
    p: &[[f32; PAGE_ROWS]; R],
    factors: [f32; R],
    source: Source,
    valid: usize,
    dim: usize,
    acc: *mut f32,
) {
    // SAFETY: acc has R * dim values, V has valid rows of dim; dim is a multiple of 16, so with 16 lanes the second vector of
    // the last pair may not exist and is skipped.
    unsafe {
        let mut d = 0;
        while d < dim {
            let two = d + S::LANES < dim;
            let mut sum = [[S::splat(0.0); 2]; R];
            for r in 0..R {
                let factor = S::splat(factors[r]);
                sum[r][0] = S::mul(S::load(acc.add(r * dim + d)), factor);
                if two {
                    sum[r][1] = S::mul(S::load(acc.add(r * dim + d + S::LANES)), factor);
                }
            }
            for j in 0..valid {
                let at = j * dim + d;
                let (v0, v1) = match source {
                    Source::F32(_, v) => {
                        let v0 = S::load(v.add(at));
                        (v0, if two { S::load(v.add(at + S::LANES)) } else { v0 })
                    }
                    Source::Bf16(_, v) => {
                        let v0 = S::load_bf16(v.add(at));
                        (
                            v0,
                            if two {
                                S::load_bf16(v.add(at + S::LANES))
                            } else {
                                v0
                            },
                        )
                    }
                };
                for r in 0..R {
                    let w = S::splat(p[r][j]);
                    sum[r][0] = S::fma(w, v0, sum[r][0]);
                    sum[r][1] = S::fma(w, v1, sum[r][1]);
                }
            }
            for r in 0..R {
                S::store(acc.add(r * dim + d), sum[r][0]);
                if two {
                    S::store(acc.add(r * dim + d + S::LANES), sum[r][1]);
                }
            }
            d += 2 * S::LANES;
        }
    }
}
