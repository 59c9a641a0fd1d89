//! Scores and weights, for those who want to see what attention read, or to choose what it reads.
//!
//! [`scores`] is one fma chain over the dimensions each: bit for bit what [`super::attend`] computes, except that on AMX it takes bf16
//! pages through tiles, whose scores agree to 2^-17 of `|q| |k|`. [`scores_each`] takes them through the same tiles.

use antefix_state::PAGE_ROWS;

use super::Page;
#[cfg(target_arch = "x86_64")]
use super::{amx, simd};
use crate::cpu::{Cpu, Path};
use crate::ops::exp;

/// Keys side by side in a page.
const LANES: usize = PAGE_ROWS / 2;

/// Scores of one query row `q: [D]`, already scaled, against the 32 keys of `page`; rows that hold no key get anything.
///
/// # Panics
/// When `q` and the page differ in their dimension.
pub fn scores(cpu: Cpu, q: &[f32], softcap: Option<f32>, page: &Page<'_>, out: &mut [f32; PAGE_ROWS]) {
    scores_rows(cpu, q.len(), q, softcap, page, std::slice::from_mut(out));
}

/// Scores of the rows of `q: [R, D]`, already scaled and at least one, against `pages`: calls `f` with the index of each page, ascending, and its
/// `[R][32]` scores; rows of a page that hold no key get anything. A row gets the bits that it gets alone.
///
/// # Panics
/// When `q` and a page differ in their dimension.
pub fn scores_each<'a>(
    cpu: Cpu,
    dim: usize,
    q: &[f32],
    pages: impl Iterator<Item = Page<'a>>,
    mut f: impl FnMut(usize, &[[f32; PAGE_ROWS]]),
) {
    assert!(!q.is_empty() && q.len().is_multiple_of(dim), "q is [R, D]");
    let pages = pages.inspect(|page| page.check(dim));
    let mut pages = pages.peekable();
    #[cfg(target_arch = "x86_64")]
    if cpu.path() == Path::Amx && dim.is_multiple_of(32) && matches!(pages.peek(), Some(Page::Bf16 { .. })) {
        let keys = pages.map(|page| match page {
            Page::Bf16 { k, .. } => k,
            Page::F32 { .. } => unreachable!("pages of one pool have one layout"),
        });
        // SAFETY: `cpu` proves AVX-512 with BF16 and tiles; pages were checked.
        return unsafe { amx::scores_each(dim, q, keys, f) };
    }
    let mut out = vec![[0.0; PAGE_ROWS]; q.len() / dim];
    #[cfg(target_arch = "x86_64")]
    if cpu.path() == Path::Avx2 {
        let mut packed = Vec::new();
        simd::pack(q, out.len(), dim, &mut packed);
        for (i, page) in pages.enumerate() {
            // SAFETY: `cpu` proves AVX2 and FMA; `packed` has a row for each of `out`, and the page was checked.
            unsafe { simd::scores_avx2(dim, &packed, &page, &mut out) };
            f(i, &out);
        }
        return;
    }
    for (i, page) in pages.enumerate() {
        scores_rows(cpu, dim, q, None, &page, &mut out);
        f(i, &out);
    }
}

/// [`scores`] of the rows of `q: [R, D]`, bit for bit and several rows at a time: `out: [R][32]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn scores_rows(
    cpu: Cpu,
    dim: usize,
    q: &[f32],
    softcap: Option<f32>,
    page: &Page<'_>,
    out: &mut [[f32; PAGE_ROWS]],
) {
    page.check(dim);
    assert_eq!(q.len(), out.len() * dim, "q is [R, D]");
    match cpu.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX-512F and FMA.
        Path::Avx512 | Path::Amx => unsafe { scores_avx512(dim, q, page, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX2 and FMA.
        Path::Avx2 => unsafe { scores_avx2(dim, q, page, out) },
        _ => scores_body(dim, q, page, out),
    }
    if let Some(cap) = softcap {
        crate::ops::softcap(out.as_flattened_mut(), cap);
    }
}

/// Turns the scores of a row into weights that sum to 1. Returns `(lse, entropy)`; no scores at all: `(-inf, 0)`.
///
/// Sums run over 16 lanes and then over those, whatever the path.
pub fn normalise(cpu: Cpu, row: &mut [f32]) -> (f32, f32) {
    match cpu.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX-512F and FMA.
        Path::Avx512 | Path::Amx => unsafe { normalise_avx512(row) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX2 and FMA.
        Path::Avx2 => unsafe { normalise_avx2(row) },
        _ => normalise_body(row),
    }
}

/// The largest score that each row of `q: [R, D]` can have with a key whose values lie between `least: [D]` and `most: [D]`: `out: [R]`.
///
/// Sums run over 16 lanes and then over those, whatever the path.
///
/// # Panics
/// When the lengths do not fit, or `D` is no multiple of 16.
pub fn largest_within(cpu: Cpu, q: &[f32], least: &[f32], most: &[f32], out: &mut [f32]) {
    let dim = least.len();
    assert!(
        dim.is_multiple_of(LANES) && dim == most.len(),
        "two bounds of D values"
    );
    assert_eq!(q.len(), out.len() * dim, "q is [R, D]");
    match cpu.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX-512F and FMA.
        Path::Avx512 | Path::Amx => unsafe { largest_within_avx512(q, least, most, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX2 and FMA.
        Path::Avx2 => unsafe { largest_within_avx2(q, least, most, out) },
        _ => largest_within_body(q, least, most, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn largest_within_avx512(q: &[f32], least: &[f32], most: &[f32], out: &mut [f32]) {
    largest_within_body(q, least, most, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn largest_within_avx2(q: &[f32], least: &[f32], most: &[f32], out: &mut [f32]) {
    largest_within_body(q, least, most, out);
}

#[inline(always)]
fn largest_within_body(q: &[f32], least: &[f32], most: &[f32], out: &mut [f32]) {
    let (least, most) = (least.as_chunks::<LANES>().0, most.as_chunks::<LANES>().0);
    for (q, out) in q.chunks_exact(least.len() * LANES).zip(out) {
        let mut sums = [0.0f32; LANES];
        for ((q, lo), hi) in q.as_chunks::<LANES>().0.iter().zip(least).zip(most) {
            for (((sum, q), lo), hi) in sums.iter_mut().zip(q).zip(lo).zip(hi) {
                let (a, b) = (q * lo, q * hi);
                *sum += if b > a { b } else { a };
            }
        }
        *out = sums.iter().sum();
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn scores_avx512(dim: usize, q: &[f32], page: &Page<'_>, out: &mut [[f32; PAGE_ROWS]]) {
    let (mut q, mut out) = (q, out);
    // Eight rows are sixteen chains with both halves: enough to keep the multipliers busy, and they fit the registers.
    while out.len() >= 8 {
        abreast_avx512::<8>(dim, &q[..8 * dim], page, &mut out[..8]);
        (q, out) = (&q[8 * dim..], &mut out[8..]);
    }
    match out.len() {
        0 => {}
        1 => abreast_avx512::<1>(dim, q, page, out),
        2 => abreast_avx512::<2>(dim, q, page, out),
        3 => abreast_avx512::<3>(dim, q, page, out),
        4 => abreast_avx512::<4>(dim, q, page, out),
        5 => abreast_avx512::<5>(dim, q, page, out),
        6 => abreast_avx512::<6>(dim, q, page, out),
        _ => abreast_avx512::<7>(dim, q, page, out),
    }
}

/// `N` rows against both halves of a page.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn abreast_avx512<const N: usize>(dim: usize, q: &[f32], page: &Page<'_>, out: &mut [[f32; PAGE_ROWS]]) {
    use std::arch::x86_64::{
        _mm512_and_si512, _mm512_castsi512_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };
    assert!(
        q.len() == N * dim && out.len() == N && dim.is_multiple_of(2),
        "N rows"
    );
    page.check(dim);
    let mut acc = [[_mm512_setzero_ps(); 2]; N];
    match page {
        Page::F32 { k, .. } => {
            for d in 0..dim {
                for half in 0..2 {
                    // SAFETY: the page has `[2][D][16]` keys, as checked above.
                    let keys = unsafe { _mm512_loadu_ps(k.as_ptr().add((half * dim + d) * LANES)) };
                    for (r, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: `q` has `N * D` values.
                        let q = unsafe { *q.get_unchecked(r * dim + d) };
                        acc[half] = _mm512_fmadd_ps(_mm512_set1_ps(q), keys, acc[half]);
                    }
                }
            }
        }
        Page::Bf16 { k, .. } => {
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            for pair in 0..dim / 2 {
                for half in 0..2 {
                    // SAFETY: the page has `[2][D/2][16][2]` keys, as checked above.
                    let both = unsafe {
                        _mm512_loadu_si512(k.as_ptr().add((half * dim / 2 + pair) * 2 * LANES).cast())
                    };
                    let keys = [
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)),
                        _mm512_castsi512_ps(_mm512_and_si512(both, high)),
                    ];
                    for (d, keys) in keys.into_iter().enumerate() {
                        for (r, acc) in acc.iter_mut().enumerate() {
                            // SAFETY: `q` has `N * D` values.
                            let q = unsafe { *q.get_unchecked(r * dim + 2 * pair + d) };
                            acc[half] = _mm512_fmadd_ps(_mm512_set1_ps(q), keys, acc[half]);
                        }
                    }
                }
            }
        }
    }
    for (out, acc) in out.iter_mut().zip(acc) {
        for (half, acc) in acc.into_iter().enumerate() {
            // SAFETY: a row has two halves of 16 scores.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(half * LANES), acc) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn scores_avx2(dim: usize, q: &[f32], page: &Page<'_>, out: &mut [[f32; PAGE_ROWS]]) {
    scores_body(dim, q, page, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn normalise_avx512(row: &mut [f32]) -> (f32, f32) {
    normalise_body(row)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn normalise_avx2(row: &mut [f32]) -> (f32, f32) {
    normalise_body(row)
}

/// Rows whose chains run side by side: one chain alone waits for each of its fmas.
const ABREAST: usize = 4;

#[inline(always)]
fn scores_body(dim: usize, q: &[f32], page: &Page<'_>, out: &mut [[f32; PAGE_ROWS]]) {
    let (fours, rest) = out.as_chunks_mut::<ABREAST>();
    let (these, those) = q.split_at(fours.len() * ABREAST * dim);
    for (q, out) in these.chunks_exact(ABREAST * dim).zip(fours) {
        abreast(dim, q, page, out);
    }
    for (q, out) in those.chunks_exact(dim).zip(rest.as_chunks_mut::<1>().0) {
        abreast(dim, q, page, out);
    }
}

#[inline(always)]
fn abreast<const N: usize>(dim: usize, q: &[f32], page: &Page<'_>, out: &mut [[f32; PAGE_ROWS]; N]) {
    let q: [&[f32]; N] = std::array::from_fn(|r| &q[r * dim..][..dim]);
    for half in 0..2 {
        let mut acc = [[0.0f32; LANES]; N];
        let span = half * dim * LANES..(half + 1) * dim * LANES;
        match page {
            Page::F32 { k, .. } => {
                for (d, keys) in k[span].as_chunks::<LANES>().0.iter().enumerate() {
                    for (acc, q) in acc.iter_mut().zip(&q) {
                        for (a, &k) in acc.iter_mut().zip(keys) {
                            *a = q[d].mul_add(k, *a);
                        }
                    }
                }
            }
            Page::Bf16 { k, .. } => {
                for (pair, keys) in k[span].as_chunks::<{ 2 * LANES }>().0.iter().enumerate() {
                    let mut wide = [[0.0f32; LANES]; 2];
                    for (i, both) in keys.as_chunks::<2>().0.iter().enumerate() {
                        let both = u32::from(both[0]) | u32::from(both[1]) << 16;
                        wide[0][i] = f32::from_bits(both << 16);
                        wide[1][i] = f32::from_bits(both & 0xffff_0000);
                    }
                    for (d, keys) in wide.iter().enumerate() {
                        for (acc, q) in acc.iter_mut().zip(&q) {
                            let q = q[2 * pair + d];
                            for (a, &k) in acc.iter_mut().zip(keys) {
                                *a = q.mul_add(k, *a);
                            }
                        }
                    }
                }
            }
        }
        for (out, acc) in out.iter_mut().zip(&acc) {
            out[half * LANES..][..LANES].copy_from_slice(acc);
        }
    }
}

#[inline(always)]
fn normalise_body(row: &mut [f32]) -> (f32, f32) {
    let m = crate::ops::max(row);
    if m == f32::NEG_INFINITY {
        return (m, 0.0);
    }
    // sum exp(s - m) and sum exp(s - m) (s - m).
    let (mut l, mut ls) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for ((s, l), ls) in chunk.iter_mut().zip(&mut l).zip(&mut ls) {
            let x = *s - m;
            *s = exp(x);
            *l += *s;
            // A weight of 0 at a score of -inf adds nothing.
            *ls += if *s == 0.0 { 0.0 } else { *s * x };
        }
    }
    for ((s, l), ls) in rest.iter_mut().zip(&mut l).zip(&mut ls) {
        let x = *s - m;
        *s = exp(x);
        *l += *s;
        *ls += if *s == 0.0 { 0.0 } else { *s * x };
    }
    let (l, ls): (f32, f32) = (l.iter().sum(), ls.iter().sum());
    let factor = 1.0 / l;
    row.iter_mut().for_each(|s| *s *= factor);
    (m + l.ln(), l.ln() - ls * factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::{KvDtype, PageLayout, PageMut, f32_to_bf16};

    fn value(i: usize) -> f32 {
        ((i * 7919 + 13) % 1000) as f32 / 500.0 - 1.0
    }

    #[test]
    fn scores_are_one_fma_chain_a_key_on_every_path() {
        for dim in [16, 64, 80] {
            let layout = PageLayout {
                dim,
                dtype: KvDtype::Bf16,
            };
            let (mut k16, mut v16) = (vec![0; layout.part_len()], vec![0; layout.part_len()]);
            let (mut k32, mut v32) = (vec![0.0; layout.part_len()], vec![0.0; layout.part_len()]);
            let key = |row: usize| -> Vec<f32> { (0..dim).map(|d| value(row * dim + d)).collect() };
            for row in 0..PAGE_ROWS {
                PageMut::Bf16 {
                    k: &mut k16,
                    v: &mut v16,
                }
                .write_row(row, &key(row), &key(row));
                PageMut::F32 {
                    k: &mut k32,
                    v: &mut v32,
                }
                .write_row(row, &key(row), &key(row));
            }
            let q: Vec<f32> = (0..dim).map(|d| value(d + 5)).collect();
            for page in [Page::Bf16 { k: &k16, v: &v16 }, Page::F32 { k: &k32, v: &v32 }] {
                for cpu in Cpu::available() {
                    for cap in [None, Some(0.5)] {
                        let mut got = [f32::NAN; PAGE_ROWS];
                        scores(cpu, &q, cap, &page, &mut got);
                        let many: Vec<f32> = (0..13).flat_map(|_| q.iter().copied()).collect();
                        let mut rows = [[f32::NAN; PAGE_ROWS]; 13];
                        scores_rows(cpu, dim, &many, cap, &page, &mut rows);
                        assert!(rows.iter().all(|row| *row == got), "{:?}", cpu.path());
                        for (row, got) in got.iter().enumerate() {
                            let chain =
                                |sum: f32, (d, q): (usize, &f32)| q.mul_add(page.key(dim, row, d), sum);
                            let want = q.iter().enumerate().fold(0.0, chain);
                            let want = cap.map_or(want, |c| c * (want / c).tanh());
                            assert_eq!(got.to_bits(), want.to_bits(), "{:?} key {row}", cpu.path());
                        }
                    }
                }
            }
        }
        assert_ne!(f32_to_bf16(value(3)), 0);
    }

    /// Pages of random keys, of which each has its own.
    fn pages(dim: usize, dtype: KvDtype, n: usize) -> Vec<(Vec<u16>, Vec<f32>)> {
        let layout = PageLayout { dim, dtype };
        let one = |page: usize| {
            let (mut k16, mut v16) = (vec![0; layout.part_len()], vec![0; layout.part_len()]);
            let (mut k32, mut v32) = (vec![0.0; layout.part_len()], vec![0.0; layout.part_len()]);
            for row in 0..PAGE_ROWS {
                let key: Vec<f32> = (0..dim)
                    .map(|d| value((page * PAGE_ROWS + row) * dim + d))
                    .collect();
                let mut to = match dtype {
                    KvDtype::Bf16 => PageMut::Bf16 {
                        k: &mut k16,
                        v: &mut v16,
                    },
                    KvDtype::F32 => PageMut::F32 {
                        k: &mut k32,
                        v: &mut v32,
                    },
                };
                to.write_row(row, &key, &key);
            }
            (k16, k32)
        };
        (0..n).map(one).collect()
    }

    #[test]
    fn many_rows_against_many_pages_are_scored_as_one_against_one() {
        for (dim, dtype) in [
            (48, KvDtype::Bf16),
            (64, KvDtype::Bf16),
            (256, KvDtype::Bf16),
            (64, KvDtype::F32),
        ] {
            let pages = pages(dim, dtype, 35);
            let views = || {
                pages.iter().map(|(k16, k32)| match dtype {
                    KvDtype::Bf16 => Page::Bf16 { k: k16, v: k16 },
                    KvDtype::F32 => Page::F32 { k: k32, v: k32 },
                })
            };
            for cpu in Cpu::available() {
                for rows in [1, 2, 3, 7, 15, 16, 17, 33, 64] {
                    let q: Vec<f32> = (0..rows * dim).map(|i| value(3 * i + 1)).collect();
                    let mut seen = 0;
                    scores_each(cpu, dim, &q, views(), |page, scores| {
                        assert_eq!((page, scores.len()), (seen, rows));
                        seen += 1;
                        for (r, got) in scores.iter().enumerate().step_by(5) {
                            let q = &q[r * dim..][..dim];
                            let view = views().nth(page).unwrap();
                            let mut want = [0.0; PAGE_ROWS];
                            self::scores(cpu, q, None, &view, &mut want);
                            // |q| |k| of `dim` values below 1.
                            let near = dim as f32 / 131_072.0;
                            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= near;
                            assert!(got.iter().zip(&want).all(close), "{:?} row {r}", cpu.path());
                            if page % 7 == 0 {
                                scores_each(cpu, dim, q, std::iter::once(view), |_, alone| {
                                    assert_eq!(alone[0], *got);
                                });
                            }
                        }
                    });
                    assert_eq!(seen, pages.len());
                }
            }
        }
    }

    #[test]
    fn bounds_are_the_sums_of_the_larger_products_on_every_path() {
        for dim in [16, 64, 96] {
            let least: Vec<f32> = (0..dim).map(value).collect();
            let most: Vec<f32> = least.iter().zip(0..).map(|(x, i)| x + value(i).abs()).collect();
            let q: Vec<f32> = (0..7 * dim).map(|i| value(5 * i + 2)).collect();
            let mut first = None;
            for cpu in Cpu::available() {
                let mut got = [f32::NAN; 7];
                largest_within(cpu, &q, &least, &most, &mut got);
                for (q, got) in q.chunks_exact(dim).zip(got) {
                    let each = q.iter().zip(&least).zip(&most);
                    let want: f64 = each.map(|((q, lo), hi)| f64::from((q * lo).max(q * hi))).sum();
                    assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
                }
                assert_eq!(*first.get_or_insert(got), got, "{:?}", cpu.path());
            }
        }
    }

    #[test]
    fn weights_sum_to_one_and_entropy_is_that_of_the_weights() {
        for n in [1, 15, 16, 17, 100] {
            for cpu in Cpu::available() {
                let scores: Vec<f32> = (0..n).map(|i| 6.0 * value(i)).collect();
                let mut row = scores.clone();
                let (lse, entropy) = normalise(cpu, &mut row);
                let want = scores.iter().map(|&s| f64::from(s).exp()).sum::<f64>().ln();
                assert!((f64::from(lse) - want).abs() < 1e-5);
                let p: Vec<f64> = scores.iter().map(|&s| (f64::from(s) - want).exp()).collect();
                for (got, want) in row.iter().zip(&p) {
                    assert!((f64::from(*got) - want).abs() < 1e-6);
                }
                let want: f64 = p.iter().map(|p| -p * p.ln()).sum();
                assert!((f64::from(entropy) - want).abs() < 1e-4, "{entropy} {want}");
            }
        }
        assert_eq!(normalise(Cpu::best(), &mut []), (f32::NEG_INFINITY, 0.0));
    }
}
