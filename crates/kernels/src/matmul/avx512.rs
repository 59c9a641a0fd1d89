//! AVX-512 VNNI: `vpdpbusd` with the codes as its unsigned side, 16 columns a register.
//!
//! Signed bytes become codes by flipping their top bit (+ 128), so every kind has unsigned codes and an offset; 255 * 127 * 32 is far
//! inside an i32. One row streams records from memory; several rows unpack a stretch of a panel once, then walk it in tiles of 8 rows.

#[allow(clippy::wildcard_imports)] // Dozens of intrinsics.
use std::arch::x86_64::*;
use std::ops::Range;

use super::layout::{BLOCK, CODES, COLS, Fixed, Kind, with_kind};
use super::stretch::{Stretch, groups, load_codes, load_f16};
use super::{MAX_ROWS, Task};

/// Blocks unpacked at once: 16 KB of codes and up to 8 KB of scales.
const STRETCH: usize = 32;
/// Rows of a tile.
const TILE: usize = 8;

/// Computes a task.
///
/// # Safety
/// The CPU has AVX-512 F, BW, DQ, VL, VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn run(task: &Task<'_>) {
    debug_assert!(task.rows.end <= task.acts.rows() && task.rows.len() <= MAX_ROWS);
    let one = task.rows.len() == 1;
    let mut w = Stretch::new();
    for p in task.panels.clone() {
        with_kind!(task.matrix.kind, K => if one { one_row::<K>(task, p) } else { many_rows::<K>(task, p, &mut w) }, {
            let mut r = task.rows.start;
            while r < task.rows.end {
                let rows = (task.rows.end - r).min(TILE);
                match rows {
                    8 => float_rows::<8>(task, p, r),
                    4..8 => {
                        float_rows::<4>(task, p, r);
                        (r + 4..r + rows).for_each(|r| float_rows::<1>(task, p, r));
                    }
                    _ => (r..r + rows).for_each(|r| float_rows::<1>(task, p, r)),
                }
                r += rows;
            }
        });
    }
}

/// `isum - offset * sum`, the offset a power of two or 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn centre<K: Fixed>(isum: __m512i, sum: i32) -> __m512i {
    let sum = _mm512_set1_epi32(sum);
    match K::RECORD.offset {
        4 => _mm512_sub_epi32(isum, _mm512_slli_epi32::<2>(sum)),
        8 => _mm512_sub_epi32(isum, _mm512_slli_epi32::<3>(sum)),
        16 => _mm512_sub_epi32(isum, _mm512_slli_epi32::<4>(sum)),
        32 => _mm512_sub_epi32(isum, _mm512_slli_epi32::<5>(sum)),
        128 => _mm512_sub_epi32(isum, _mm512_slli_epi32::<7>(sum)),
        _ => isum,
    }
}

/// Writes the columns of panel `p` that exist into row `r` of the output.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn store(task: &Task<'_>, r: usize, p: usize, acc: __m512) {
    let (at, cols) = task.place(r, p);
    // SAFETY: `cols <= 16` floats from `at` are this task's to write.
    unsafe {
        if cols == COLS {
            _mm512_storeu_ps(at, acc);
        } else {
            _mm512_mask_storeu_ps(at, (1 << cols) - 1, acc);
        }
    }
}

/// One row of activations against one panel, straight from memory.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one_row<K: Fixed>(task: &Task<'_>, p: usize) {
    let record = const { K::RECORD };
    let (acts, r) = (task.acts, task.rows.start);
    let (blocks, parts) = (acts.blocks(), record.parts());
    let panel = task.matrix.panel(p);
    let q = acts.q()[r * blocks * BLOCK..][..blocks * BLOCK].as_ptr();
    let d = &acts.d[r * blocks..][..blocks];
    let sum = &acts.sum[parts - 1][r * blocks * parts..][..blocks * parts];
    let sx = &acts.sx[parts - 1][r * blocks * parts..][..blocks * parts];
    assert_eq!(panel.len(), blocks * record.bytes());
    let mut acc = _mm512_setzero_ps();
    for b in 0..blocks {
        // SAFETY: `b < blocks`; the panel holds `blocks` records and the row `blocks` blocks of q. The prefetch reads nothing.
        unsafe {
            let rec = panel.as_ptr().add(b * record.bytes());
            let q = q.add(b * BLOCK);
            for line in 0..record.bytes() / 64 {
                _mm_prefetch::<_MM_HINT_T0>(rec.wrapping_add(4096 + 64 * line).cast());
            }
            let mut isum = [_mm512_setzero_si512(); 2];
            macro_rules! group {
                ($g:literal) => {
                    let x = _mm512_set1_epi32(q.add(4 * $g).cast::<i32>().read_unaligned());
                    let part = if record.halves { $g / 4 } else { 0 };
                    isum[part] = _mm512_dpbusd_epi32(isum[part], load_codes::<K, $g>(rec), x);
                };
            }
            groups!(group);
            for part in 0..parts {
                let at = rec.add(record.scale_at(part));
                let whole = centre::<K>(isum[part], sum[b * parts + part]);
                let dw = _mm512_mul_ps(load_f16(at), _mm512_set1_ps(d[b]));
                acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), dw, acc);
                if record.min {
                    acc = _mm512_fmadd_ps(
                        load_f16(at.add(2 * COLS)),
                        _mm512_set1_ps(sx[b * parts + part]),
                        acc,
                    );
                }
            }
        }
    }
    store(task, r, p, _mm512_mul_ps(acc, _mm512_set1_ps(task.matrix.post)));
}

/// All rows of the task against one panel.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn many_rows<K: Fixed>(task: &Task<'_>, p: usize, w: &mut Stretch<STRETCH>) {
    let mut acc = [[0.0f32; COLS]; MAX_ROWS];
    let records = task.matrix.panel(p).chunks(STRETCH * K::RECORD.bytes());
    for (s, records) in records.enumerate() {
        let blocks = s * STRETCH..s * STRETCH + w.unpack::<K>(records);
        for (t, acc) in acc[..task.rows.len()].chunks_mut(TILE).enumerate() {
            let r = task.rows.start + t * TILE;
            match acc.len() {
                1 => tile::<K, 1>(task, r, blocks.clone(), w, acc),
                2 => tile::<K, 2>(task, r, blocks.clone(), w, acc),
                3 => tile::<K, 3>(task, r, blocks.clone(), w, acc),
                4 => tile::<K, 4>(task, r, blocks.clone(), w, acc),
                5 => tile::<K, 5>(task, r, blocks.clone(), w, acc),
                6 => tile::<K, 6>(task, r, blocks.clone(), w, acc),
                7 => tile::<K, 7>(task, r, blocks.clone(), w, acc),
                _ => tile::<K, 8>(task, r, blocks.clone(), w, acc),
            }
        }
    }
    for (r, acc) in task.rows.clone().zip(&acc) {
        // SAFETY: 16 floats.
        let acc = unsafe { _mm512_loadu_ps(acc.as_ptr()) };
        store(task, r, p, _mm512_mul_ps(acc, _mm512_set1_ps(task.matrix.post)));
    }
}

/// `R` rows against a stretch: continues `acc: [R, 16]` over `blocks`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<K: Fixed, const R: usize>(
    task: &Task<'_>,
    r: usize,
    blocks: Range<usize>,
    w: &Stretch<STRETCH>,
    acc: &mut [[f32; COLS]],
) {
    let acts = task.acts;
    let (all, parts) = (acts.blocks(), const { K::RECORD.parts() });
    assert!(
        acc.len() == R && r + R <= acts.int8_rows(task.cpu) && blocks.end <= all && blocks.len() <= STRETCH
    );
    let mut f = [_mm512_setzero_ps(); R];
    // SAFETY: rows `r .. r + R` and blocks `blocks` are inside the activations, whose vectors hold `rows * all` blocks; the stretch holds
    // `blocks.len()` blocks; `acc` has `R` rows.
    unsafe {
        let q = acts.q().as_ptr().add((r * all + blocks.start) * BLOCK);
        for (f, acc) in f.iter_mut().zip(acc.iter()) {
            *f = _mm512_loadu_ps(acc.as_ptr());
        }
        for b in 0..blocks.len() {
            for part in 0..parts {
                let mut isum = [_mm512_setzero_si512(); R];
                for g in part * 8 / parts..(part + 1) * 8 / parts {
                    let codes = _mm512_load_si512(w.codes().add(CODES * b + 64 * g).cast());
                    for (i, isum) in isum.iter_mut().enumerate() {
                        let x = q
                            .add((i * all + b) * BLOCK + 4 * g)
                            .cast::<i32>()
                            .read_unaligned();
                        *isum = _mm512_dpbusd_epi32(*isum, codes, _mm512_set1_epi32(x));
                    }
                }
                for (i, (f, isum)) in f.iter_mut().zip(isum).enumerate() {
                    *f = update::<K>(task, w, r + i, blocks.start + b, b, part, isum, *f);
                }
            }
        }
        for (acc, f) in acc.iter_mut().zip(f) {
            _mm512_storeu_ps(acc.as_mut_ptr(), f);
        }
    }
}

/// The float step of one part of block `b` (`at` of the stretch) for row `r`, from the sum of code products.
///
/// # Safety
/// The row, the block and its place in the stretch exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn update<K: Fixed>(
    task: &Task<'_>,
    w: &Stretch<STRETCH>,
    r: usize,
    b: usize,
    at: usize,
    part: usize,
    isum: __m512i,
    acc: __m512,
) -> __m512 {
    let (acts, parts) = (task.acts, const { K::RECORD.parts() });
    let (block, at) = (r * acts.blocks() + b, (at * parts + part) * COLS);
    // SAFETY: the caller's promise.
    unsafe {
        let whole = centre::<K>(isum, *acts.sum[parts - 1].get_unchecked(block * parts + part));
        let dx = _mm512_set1_ps(*acts.d.get_unchecked(block));
        let dw = _mm512_mul_ps(_mm512_load_ps(w.scale().add(at)), dx);
        let acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), dw, acc);
        if K::RECORD.min {
            let sx = _mm512_set1_ps(*acts.sx[parts - 1].get_unchecked(block * parts + part));
            _mm512_fmadd_ps(_mm512_load_ps(w.min().add(at)), sx, acc)
        } else {
            acc
        }
    }
}

/// `R` rows from row `r` against a panel of plain floats.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn float_rows<const R: usize>(task: &Task<'_>, p: usize, r: usize) {
    match task.matrix.kind {
        Kind::F16 => float_tile::<R, 16>(task, p, r),
        Kind::BF16 => float_tile::<R, 1>(task, p, r),
        _ => float_tile::<R, 32>(task, p, r),
    }
}

/// `TYPE`: 32 is f32, 16 is f16, 1 is bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn float_tile<const R: usize, const TYPE: usize>(task: &Task<'_>, p: usize, r: usize) {
    let k = task.matrix.k;
    let panel = task.matrix.panel(p);
    let size = if TYPE == 32 { 4 } else { 2 };
    let x = &task.acts.x()[r * k..(r + R) * k];
    assert_eq!(panel.len(), k * COLS * size);
    let mut acc = [_mm512_setzero_ps(); R];
    for i in 0..k {
        // SAFETY: `i < k`; the panel has `k` rows of 16 values of `size` bytes, `x` has `R` rows of `k`.
        unsafe {
            let at = panel.as_ptr().add(i * COLS * size);
            let w = match TYPE {
                32 => _mm512_loadu_ps(at.cast()),
                16 => load_f16(at),
                _ => {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                }
            };
            for (row, acc) in acc.iter_mut().enumerate() {
                *acc = _mm512_fmadd_ps(w, _mm512_set1_ps(*x.as_ptr().add(row * k + i)), *acc);
            }
        }
    }
    for (row, acc) in acc.into_iter().enumerate() {
        store(task, r + row, p, acc);
    }
}
