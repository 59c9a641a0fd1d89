//! Weights: the exponentials of the scores.

#[allow(clippy::wildcard_imports)] // Dozens of intrinsics.
use std::arch::x86_64::*;

use super::keys::Products;
use super::{HALF, LIMIT, RowTile, Work};

impl RowTile<'_> {
    /// Turns the scores of page `i` of the pair into weights, at `slot` of those that wait. True when a score is too far above
    /// its row's reference: then the weights mean nothing. `products` take steps between the rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn weights(
        &self,
        full: bool,
        scores: (usize, usize),
        slot: usize,
        work: &mut Work,
        products: Option<&mut Products>,
    ) -> bool {
        match (full, products) {
            (true, Some(products)) => self.weights_of::<true>(scores, slot, work, || products.pace()),
            (true, None) => self.weights_of::<true>(scores, slot, work, || ()),
            (false, Some(products)) => self.weights_of::<false>(scores, slot, work, || products.pace()),
            (false, None) => self.weights_of::<false>(scores, slot, work, || ()),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn weights_of<const FULL: bool>(
        &self,
        (now, i): (usize, usize),
        slot: usize,
        work: &mut Work,
        mut between: impl FnMut(),
    ) -> bool {
        let Work {
            s, p, shift, bits, ..
        } = work;
        let ([low, high], p) = (&s[now][i], &mut p[slot]);
        let log2_e = _mm512_set1_ps(std::f32::consts::LOG2_E);
        let nothing = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut top = nothing;
        for r in 0..self.n {
            let shift = _mm512_set1_ps(shift[r]);
            let (a, b) = (bits[r] as u16, (bits[r] >> HALF) as u16);
            // SAFETY: lines hold 16 f32 and are aligned.
            let (s0, s1) = unsafe {
                (
                    _mm512_load_ps(low[r].0.as_ptr()),
                    _mm512_load_ps(high[r].0.as_ptr()),
                )
            };
            let mut t0 = _mm512_fmsub_ps(s0, log2_e, shift);
            let mut t1 = _mm512_fmsub_ps(s1, log2_e, shift);
            if !FULL {
                t0 = _mm512_mask_mov_ps(nothing, a, t0);
                t1 = _mm512_mask_mov_ps(nothing, b, t1);
            }
            top = _mm512_max_ps(top, _mm512_max_ps(t0, t1));
            let (mut p0, mut p1) = (exp2(t0), exp2(t1));
            if !FULL {
                p0 = _mm512_maskz_mov_ps(a, p0);
                p1 = _mm512_maskz_mov_ps(b, p1);
            }
            // SAFETY: a line takes 32 bf16 and is aligned; both types are 64 bytes of plain bits.
            unsafe {
                let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(p1, p0));
                _mm512_store_si512(p[r].0.as_mut_ptr().cast(), pairs);
            }
            between();
        }
        _mm512_cmp_ps_mask::<_CMP_GT_OQ>(top, _mm512_set1_ps(LIMIT)) != 0
    }
}

/// `2^t` within 3e-6 of itself for `-126 <= t`, smaller `t` count as -126; infinite where `t` is.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp2(t: __m512) -> __m512 {
    // Results below the normal numbers would cost a hundred cycles each.
    let t = _mm512_max_ps(_mm512_set1_ps(-126.0), t);
    /// `t - floor(t)`.
    const FRACTION: i32 = 1;
    let f = _mm512_reduce_ps::<FRACTION>(t);
    let mut p = _mm512_set1_ps(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*c));
    }
    _mm512_scalef_ps(p, t)
}

/// `2^f` for `0 <= f < 1`, highest power first: the polynomial of degree 4 of least relative error.
const COEFFICIENTS: [f32; 5] = [
    0.013_534_168,
    0.052_011_46,
    0.241_442_75,
    0.693_003_83,
    1.000_002_6,
];
