//! AVX2: `vpmaddubsw` with the codes as its unsigned side.
//!
//! A pair of products is at most `code * 127 * 2` in size: 4 bits 3,810, 5 bits 7,874, 6 bits 16,002. So 8, 4 and 2 such pairs add up
//! in an i16 (30,480, 31,496 and 32,004 < 32,767) before one `vpmaddwd` widens them. Signed bytes would not fit: one row takes the
//! sign into the activation (128 * 127 * 2 = 32,512), many rows are widened to i16 once per panel.
//!
//! Where the machine has AVX-VNNI (`VNNI` in the generics), `vpdpbusd` does without pairs in i16, and 8 bits are codes like the others.
//!
//! One row streams records from memory and unpacks them in registers. Several rows unpack a stretch of a panel once, then walk it in
//! tiles of up to 6 rows x 16 columns.

#[allow(clippy::wildcard_imports)] // Dozens of intrinsics.
use std::arch::x86_64::*;

use super::layout::{BLOCK, COLS, Fixed, Kind, with_kind};
use super::{MAX_ROWS, Task};

/// Blocks unpacked at once: 32 records are 16 KB of codes (and up to 8 KB of scales), half of the first cache. As i16, 16 records.
const STRETCH: usize = 32;
/// Most rows of a tile: 6 rows x 2 vectors of sums, 2 of weights and 2 at work are the 16 registers.
const TILE: usize = 6;
/// The same for plain floats.
const FLOAT_TILE: usize = 4;

/// Computes a task.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C, and AVX-VNNI for `VNNI`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn run<const VNNI: bool>(task: &Task<'_>) {
    debug_assert!(task.rows.end <= task.acts.rows() && task.rows.len() <= MAX_ROWS);
    if task.rows.len() == 1 {
        for p in task.panels.clone() {
            with_kind!(task.matrix.kind, K => one_row::<K, VNNI>(task, p), float_rows::<1>(task, p, task.rows.start));
        }
        return;
    }
    // Accumulators of the task's rows for one panel.
    let mut acc = [[0.0f32; COLS]; MAX_ROWS];
    for p in task.panels.clone() {
        with_kind!(task.matrix.kind, K => many_rows::<K, VNNI>(task, p, &mut acc), {
            let mut r = task.rows.start;
            while r < task.rows.end {
                match task.rows.end - r {
                    1 => float_rows::<1>(task, p, r),
                    2 => float_rows::<2>(task, p, r),
                    3 => float_rows::<3>(task, p, r),
                    _ => float_rows::<4>(task, p, r),
                }
                r += FLOAT_TILE;
            }
        });
    }
}

/// 32 codes of group `G`, columns `8 * side ..`, as unsigned bytes. For 8 bits the stored signed bytes.
///
/// # Safety
/// `record` points to the codes of a record of kind `K`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_codes<K: Fixed, const G: usize>(record: *const u8, side: usize) -> __m256i {
    // SAFETY: the largest offset is inside `code_bytes()` for the kind's bits (see `layout`).
    unsafe {
        let load = |at: usize| _mm256_loadu_si256(record.add(at + 32 * side).cast());
        if K::RECORD.bits == 8 {
            return load(64 * G);
        }
        let pair = load(64 * (G / 2));
        let low = if G.is_multiple_of(2) {
            pair
        } else {
            _mm256_srli_epi16::<4>(pair)
        };
        let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
        let high = match K::RECORD.bits {
            5 => {
                let plane = load(256);
                let bit = match G {
                    0 => _mm256_slli_epi16::<4>(plane),
                    1 => _mm256_slli_epi16::<3>(plane),
                    2 => _mm256_slli_epi16::<2>(plane),
                    3 => _mm256_slli_epi16::<1>(plane),
                    4 => plane,
                    5 => _mm256_srli_epi16::<1>(plane),
                    6 => _mm256_srli_epi16::<2>(plane),
                    _ => _mm256_srli_epi16::<3>(plane),
                };
                _mm256_and_si256(bit, _mm256_set1_epi8(16))
            }
            6 => {
                let plane = load(256 + 64 * (G / 4));
                let bits = match G % 4 {
                    0 => _mm256_slli_epi16::<4>(plane),
                    1 => _mm256_slli_epi16::<2>(plane),
                    2 => plane,
                    _ => _mm256_srli_epi16::<2>(plane),
                };
                _mm256_and_si256(bits, _mm256_set1_epi8(48))
            }
            _ => return low,
        };
        _mm256_or_si256(low, high)
    }
}

/// Calls `$f!(G)` for the groups of `$part`: all eight, or four per half.
macro_rules! groups {
    (all $f:ident) => {
        $f!(0);
        $f!(1);
        $f!(2);
        $f!(3);
        $f!(4);
        $f!(5);
        $f!(6);
        $f!(7);
    };
}

/// [`load_codes`] with codes of 8 bits as unsigned bytes too.
///
/// # Safety
/// As [`load_codes`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_unsigned<K: Fixed, const G: usize>(record: *const u8, side: usize) -> __m256i {
    // SAFETY: the caller's promise.
    let codes = unsafe { load_codes::<K, G>(record, side) };
    if K::RECORD.bits == 8 {
        _mm256_xor_si256(codes, _mm256_set1_epi8(-128))
    } else {
        codes
    }
}

/// `sums` plus the products of four neighbouring bytes each: `w` unsigned, `x` signed.
///
/// # Safety
/// The CPU has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot4(mut sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // By hand: a function with the feature would not be inlined into the others of this file.
    // SAFETY: the caller's promise; only registers.
    unsafe {
        std::arch::asm!(
            "{{vex}} vpdpbusd {0}, {1}, {2}",
            inout(ymm_reg) sums,
            in(ymm_reg) w,
            in(ymm_reg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// 8 f16 as f32.
///
/// # Safety
/// 16 readable bytes at `p`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_f16(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
}

/// `isum - offset * sum`, the offset a power of two or 0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn centre<K: Fixed>(isum: __m256i, sum: __m256i) -> __m256i {
    match K::RECORD.offset {
        4 => _mm256_sub_epi32(isum, _mm256_slli_epi32::<2>(sum)),
        8 => _mm256_sub_epi32(isum, _mm256_slli_epi32::<3>(sum)),
        16 => _mm256_sub_epi32(isum, _mm256_slli_epi32::<4>(sum)),
        32 => _mm256_sub_epi32(isum, _mm256_slli_epi32::<5>(sum)),
        128 => _mm256_sub_epi32(isum, _mm256_slli_epi32::<7>(sum)),
        _ => isum,
    }
}

/// One row of activations against one panel, straight from memory.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn one_row<K: Fixed, const VNNI: bool>(task: &Task<'_>, p: usize) {
    let record = const { K::RECORD };
    let (acts, r) = (task.acts, task.rows.start);
    let blocks = acts.blocks();
    let panel = task.matrix.panel(p);
    let q = acts.q()[r * blocks * BLOCK..][..blocks * BLOCK].as_ptr();
    let d = acts.d[r * blocks..][..blocks].as_ptr();
    let parts = record.parts();
    let sum = acts.sum[parts - 1][r * blocks * parts..][..blocks * parts].as_ptr();
    let sx = acts.sx[parts - 1][r * blocks * parts..][..blocks * parts].as_ptr();
    assert_eq!(panel.len(), blocks * record.bytes());
    let ones = _mm256_set1_epi16(1);
    let mut acc = [_mm256_setzero_ps(); 2];
    for b in 0..blocks {
        // SAFETY: `b < blocks`, and the slices above hold `blocks` records, blocks of q, scales and sums. The prefetch reads nothing.
        unsafe {
            let rec = panel.as_ptr().add(b * record.bytes());
            let q = q.add(b * BLOCK);
            // About 4 KB ahead: far enough for memory, near enough to stay in the cache.
            for line in 0..record.bytes() / 64 {
                _mm_prefetch::<_MM_HINT_T0>(rec.wrapping_add(4096 + 64 * line).cast());
            }
            // i32 sums of the parts (two halves or one whole) and the i16 sums waiting to be widened.
            let mut isum = [[_mm256_setzero_si256(); 2]; 2];
            let mut pairs = [_mm256_setzero_si256(); 2];
            macro_rules! group {
                ($g:literal) => {
                    let x = _mm256_set1_epi32(q.add(4 * $g).cast::<i32>().read_unaligned());
                    let part = if record.halves { $g / 4 } else { 0 };
                    for side in 0..2 {
                        if VNNI {
                            let w = load_unsigned::<K, $g>(rec, side);
                            isum[part][side] = dot4(isum[part][side], w, x);
                            continue;
                        }
                        let w = load_codes::<K, $g>(rec, side);
                        let pair = if record.bits == 8 {
                            _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                        } else {
                            _mm256_maddubs_epi16(w, x)
                        };
                        pairs[side] = if $g % span(record.bits) == 0 {
                            pair
                        } else {
                            _mm256_add_epi16(pairs[side], pair)
                        };
                        let last =
                            $g % span(record.bits) == span(record.bits) - 1 || (record.halves && $g % 4 == 3);
                        if last {
                            let wide = _mm256_madd_epi16(pairs[side], ones);
                            isum[part][side] = _mm256_add_epi32(isum[part][side], wide);
                            pairs[side] = _mm256_setzero_si256();
                        }
                    }
                };
            }
            groups!(all group);
            let dx = _mm256_set1_ps(*d.add(b));
            for part in 0..parts {
                let sum = _mm256_set1_epi32(*sum.add(b * parts + part));
                for side in 0..2 {
                    let at = rec.add(record.scale_at(part) + 16 * side);
                    let isum = if record.bits == 8 && !VNNI {
                        isum[part][side]
                    } else {
                        centre::<K>(isum[part][side], sum)
                    };
                    let dw = _mm256_mul_ps(load_f16(at), dx);
                    acc[side] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), dw, acc[side]);
                    if record.min {
                        let sx = _mm256_set1_ps(*sx.add(b * parts + part));
                        acc[side] = _mm256_fmadd_ps(load_f16(at.add(2 * COLS)), sx, acc[side]);
                    }
                }
            }
        }
    }
    let post = _mm256_set1_ps(task.matrix.post);
    store(
        task,
        r,
        p,
        [_mm256_mul_ps(acc[0], post), _mm256_mul_ps(acc[1], post)],
    );
}

/// How many pair sums fit an i16; see the module's doc.
const fn span(bits: u8) -> usize {
    match bits {
        4 => 8,
        5 => 4,
        6 => 2,
        _ => 1,
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(task: &Task<'_>, r: usize, p: usize, acc: [__m256; 2]) {
    let mut out = [0.0f32; COLS];
    // SAFETY: `out` has 16 elements.
    unsafe {
        _mm256_storeu_ps(out.as_mut_ptr(), acc[0]);
        _mm256_storeu_ps(out.as_mut_ptr().add(8), acc[1]);
    }
    task.store(r, p, &out);
}

/// A stretch of a panel, unpacked.
#[repr(C, align(64))]
struct Stretch {
    /// Codes as bytes `[blocks][8 groups][64]`, or, for 8 bits without VNNI, i16 `[blocks][16 pairs along K][16 columns][2]`.
    codes: [u8; 512 * STRETCH],
    /// `[blocks][parts][16]`
    scale: [f32; 2 * COLS * STRETCH],
    /// `[blocks][parts][16]`
    min: [f32; 2 * COLS * STRETCH],
}

/// Whether codes are unpacked to i16.
const fn wide<K: Fixed, const VNNI: bool>() -> bool {
    K::RECORD.bits == 8 && !VNNI
}

/// Blocks of kind `K` in a stretch.
const fn stretch<K: Fixed, const VNNI: bool>() -> usize {
    if wide::<K, VNNI>() { STRETCH / 2 } else { STRETCH }
}

/// Rows of a tile of kind `K`. 6-bit codes widen after every second step: six rows would spill.
const fn highest<K: Fixed, const VNNI: bool>() -> usize {
    if K::RECORD.bits == 6 && !VNNI { 4 } else { TILE }
}

/// Unpacks `blocks` records.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<K: Fixed, const VNNI: bool>(records: &[u8], out: &mut Stretch) {
    let record = const { K::RECORD };
    let blocks = records.len() / record.bytes();
    assert!(blocks <= stretch::<K, VNNI>());
    for b in 0..blocks {
        // SAFETY: record `b` is inside `records`; its unpacked codes take 512 bytes (1,024 as i16) of the 16 KB, its scales
        // `parts * 16` floats of the `2 * 16 * STRETCH`.
        unsafe {
            let rec = records.as_ptr().add(b * record.bytes());
            macro_rules! group {
                ($g:literal) => {
                    for side in 0..2 {
                        if wide::<K, VNNI>() {
                            let w = load_codes::<K, $g>(rec, side);
                            // Bytes 0, 1 of every column as one pair of i16, bytes 2, 3 as the next: into the high halves, then
                            // an arithmetic shift.
                            let out = out.codes.as_mut_ptr().add(1024 * b + 128 * $g + 32 * side);
                            let first = _mm256_slli_epi16::<8>(_mm256_shuffle_epi8(w, spread(0)));
                            let second = _mm256_slli_epi16::<8>(_mm256_shuffle_epi8(w, spread(2)));
                            _mm256_store_si256(out.cast(), _mm256_srai_epi16::<8>(first));
                            _mm256_store_si256(out.add(64).cast(), _mm256_srai_epi16::<8>(second));
                        } else {
                            let out = out.codes.as_mut_ptr().add(512 * b + 64 * $g + 32 * side);
                            _mm256_store_si256(out.cast(), load_unsigned::<K, $g>(rec, side));
                        }
                    }
                };
            }
            groups!(all group);
            for part in 0..record.parts() {
                let to = (b * record.parts() + part) * COLS;
                for side in 0..2 {
                    let from = rec.add(record.scale_at(part) + 16 * side);
                    _mm256_store_ps(out.scale.as_mut_ptr().add(to + 8 * side), load_f16(from));
                    if record.min {
                        _mm256_store_ps(
                            out.min.as_mut_ptr().add(to + 8 * side),
                            load_f16(from.add(2 * COLS)),
                        );
                    }
                }
            }
        }
    }
}

/// Byte indices that put bytes `at`, `at + 1` of each 32-bit lane at its bytes 0 and 2.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn spread(at: i32) -> __m256i {
    let lane = |i: i32| (4 * i + at) | (0x80 << 8) | ((4 * i + at + 1) << 16) | (0x80 << 24);
    _mm256_setr_epi32(
        lane(0),
        lane(1),
        lane(2),
        lane(3),
        lane(0),
        lane(1),
        lane(2),
        lane(3),
    )
}

/// All rows of the task against one panel.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn many_rows<K: Fixed, const VNNI: bool>(task: &Task<'_>, p: usize, acc: &mut [[f32; COLS]; MAX_ROWS]) {
    let rows = task.rows.len();
    let mut stretch_of = Stretch {
        codes: [0; 512 * STRETCH],
        scale: [0.0; 2 * COLS * STRETCH],
        min: [0.0; 2 * COLS * STRETCH],
    };
    acc[..rows].fill([0.0; COLS]);
    for (s, records) in task
        .matrix
        .panel(p)
        .chunks(stretch::<K, VNNI>() * K::RECORD.bytes())
        .enumerate()
    {
        unpack::<K, VNNI>(records, &mut stretch_of);
        let first = s * stretch::<K, VNNI>();
        let blocks = first..first + records.len() / K::RECORD.bytes();
        // Tiles of equal height, or one row less: a low tile at the end would waste half its work.
        let tiles = rows.div_ceil(const { highest::<K, VNNI>() });
        let mut done = 0;
        for t in 0..tiles {
            let height = rows / tiles + usize::from(t < rows % tiles);
            let r = task.rows.start + done;
            let acc = &mut acc[done..done + height];
            done += height;
            match height {
                1 => tile::<K, VNNI, 1>(task, r, blocks.clone(), &stretch_of, acc),
                2 => tile::<K, VNNI, 2>(task, r, blocks.clone(), &stretch_of, acc),
                3 => tile::<K, VNNI, 3>(task, r, blocks.clone(), &stretch_of, acc),
                4 => tile::<K, VNNI, 4>(task, r, blocks.clone(), &stretch_of, acc),
                5 => tile::<K, VNNI, 5>(task, r, blocks.clone(), &stretch_of, acc),
                _ => tile::<K, VNNI, TILE>(task, r, blocks.clone(), &stretch_of, acc),
            }
        }
    }
    let post = _mm256_set1_ps(task.matrix.post);
    for (r, acc) in task.rows.clone().zip(acc.iter()) {
        // SAFETY: 16 floats.
        let acc = unsafe {
            [
                _mm256_loadu_ps(acc.as_ptr()),
                _mm256_loadu_ps(acc.as_ptr().add(8)),
            ]
        };
        store(
            task,
            r,
            p,
            [_mm256_mul_ps(acc[0], post), _mm256_mul_ps(acc[1], post)],
        );
    }
}

/// `R` rows against a stretch: continues `acc: [R, 16]` over `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<K: Fixed, const VNNI: bool, const R: usize>(
    task: &Task<'_>,
    r: usize,
    blocks: std::ops::Range<usize>,
    w: &Stretch,
    acc: &mut [[f32; COLS]],
) {
    let record = const { K::RECORD };
    let (acts, all) = (task.acts, task.acts.blocks());
    let parts = record.parts();
    assert!(
        acc.len() == R && r + R <= acts.rows() && blocks.end <= all && blocks.len() <= stretch::<K, VNNI>()
    );
    let ones = _mm256_set1_epi16(1);
    // SAFETY: rows `r .. r + R` and blocks `blocks` are inside the activations, whose vectors hold `rows * all` blocks (times `parts`
    // for sums); a stretch holds `blocks.len()` blocks. `q16` is filled when an 8-bit matrix meets more than one row.
    unsafe {
        let q = acts.q().as_ptr().add((r * all + blocks.start) * BLOCK);
        let q16 = acts.q16.as_ptr().wrapping_add((r * all + blocks.start) * BLOCK);
        let d = acts.d.as_ptr().add(r * all + blocks.start);
        let sum = acts.sum[parts - 1].as_ptr().add((r * all + blocks.start) * parts);
        let sx = acts.sx[parts - 1].as_ptr().add((r * all + blocks.start) * parts);
        let acc = acc.as_mut_ptr().cast::<f32>();
        for b in 0..blocks.len() {
            for part in 0..parts {
                let mut isum = [[_mm256_setzero_si256(); 2]; R];
                if VNNI {
                    let at = 8 / parts * part;
                    let (w, q) = (
                        w.codes.as_ptr().add(512 * b + 64 * at),
                        q.add(b * BLOCK + 4 * at).cast(),
                    );
                    isum = match parts {
                        1 => vnni_dots::<R, 8>(w, q, all * BLOCK),
                        _ => vnni_dots::<R, 4>(w, q, all * BLOCK),
                    };
                } else if record.bits == 8 {
                    isum = dots::<R, 16>(
                        w.codes.as_ptr().add(1024 * b),
                        q16.add(b * BLOCK).cast(),
                        2 * all * BLOCK,
                    );
                } else {
                    let span = const {
                        if K::RECORD.halves && K::RECORD.bits == 4 {
                            4
                        } else {
                            span(K::RECORD.bits)
                        }
                    };
                    let groups = 8 / parts;
                    for s in 0..groups / span {
                        let g = part * groups + s * span;
                        let w = w.codes.as_ptr().add(512 * b + 64 * g);
                        let q = q.add(b * BLOCK + 4 * g).cast();
                        let pairs = match span {
                            8 => dots::<R, 8>(w, q, all * BLOCK),
                            4 => dots::<R, 4>(w, q, all * BLOCK),
                            _ => dots::<R, 2>(w, q, all * BLOCK),
                        };
                        for (isum, pairs) in isum.iter_mut().zip(pairs) {
                            for side in 0..2 {
                                let wide = _mm256_madd_epi16(pairs[side], ones);
                                isum[side] = if s == 0 {
                                    wide
                                } else {
                                    _mm256_add_epi32(isum[side], wide)
                                };
                            }
                        }
                    }
                }
                let at = (b * parts + part) * COLS;
                let scale = [
                    _mm256_load_ps(w.scale.as_ptr().add(at)),
                    _mm256_load_ps(w.scale.as_ptr().add(at + 8)),
                ];
                let min = [
                    _mm256_load_ps(w.min.as_ptr().add(at)),
                    _mm256_load_ps(w.min.as_ptr().add(at + 8)),
                ];
                for i in 0..R {
                    let dx = _mm256_set1_ps(*d.add(i * all + b));
                    let sum = _mm256_set1_epi32(*sum.add((i * all + b) * parts + part));
                    let sx = _mm256_set1_ps(*sx.add((i * all + b) * parts + part));
                    for side in 0..2 {
                        let isum = if wide::<K, VNNI>() {
                            isum[i][side]
                        } else {
                            centre::<K>(isum[i][side], sum)
                        };
                        let dw = _mm256_mul_ps(scale[side], dx);
                        let at = acc.add(i * COLS + 8 * side);
                        let mut f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), dw, _mm256_loadu_ps(at));
                        if record.min {
                            f = _mm256_fmadd_ps(min[side], sx, f);
                        }
                        _mm256_storeu_ps(at, f);
                    }
                }
            }
        }
    }
}

/// Integer dots of `R` rows of activations, `stride` bytes apart, with 16 columns over `STEPS` steps of 4 bytes of a row and 64 of
/// the weights: i16 sums of pairs of bytes, or, for 16 steps, i32 sums of i16.
///
/// By hand, because a compiler that unrolls this gathers the loads at the start and spills most of the registers.
///
/// # Safety
/// `64 * STEPS` bytes at `w`, aligned to 32; `4 * STEPS` bytes of each row at `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots<const R: usize, const STEPS: usize>(
    w: *const u8,
    x: *const u8,
    stride: usize,
) -> [[__m256i; 2]; R] {
    let mut acc = [[_mm256_setzero_si256(); 2]; R];
    // A step: two vectors of weights, then every row. The first step moves, the others add.
    macro_rules! row {
        ($mul:literal, -, $at:literal, $row:literal, $a:literal, $b:literal) => {
            concat!(
                "vpbroadcastd {x}, dword ptr [{p}",
                $row,
                " + 4*",
                $at,
                "]\n",
                $mul,
                " {",
                $a,
                "}, {v}, {x}\n",
                $mul,
                " {",
                $b,
                "}, {w}, {x}\n",
            )
        };
        ($mul:literal, $add:literal, $at:literal, $row:literal, $a:literal, $b:literal) => {
            concat!(
                "vpbroadcastd {x}, dword ptr [{p}",
                $row,
                " + 4*",
                $at,
                "]\n",
                $mul,
                " {t}, {v}, {x}\n",
                $add,
                " {",
                $a,
                "}, {",
                $a,
                "}, {t}\n",
                $mul,
                " {x}, {w}, {x}\n",
                $add,
                " {",
                $b,
                "}, {",
                $b,
                "}, {x}\n",
            )
        };
    }
    macro_rules! step {
        ($mul:literal, $add:tt, $at:literal, [$($row:literal $a:literal $b:literal),*]) => {
            concat!(
                "vmovdqa {v}, ymmword ptr [{c} + 64*", $at, "]\n",
                "vmovdqa {w}, ymmword ptr [{c} + 64*", $at, " + 32]\n",
                $(row!($mul, $add, $at, $row, $a, $b)),*
            )
        };
    }
    macro_rules! block {
        ($mul:literal, $add:literal, [$($at:literal),*], $rows:tt, $($r:literal $a:ident $b:ident),*) => {
            // SAFETY: reads just what the caller promises.
            unsafe {
                std::arch::asm!(
                    "/* {s} {s3} {s5} {t} */",
                    step!($mul, -, "0", $rows),
                    $(step!($mul, $add, $at, $rows),)*
                    c = in(reg) w,
                    p = in(reg) x,
                    s = in(reg) stride,
                    s3 = in(reg) 3 * stride,
                    s5 = in(reg) 5 * stride,
                    v = out(ymm_reg) _,
                    w = out(ymm_reg) _,
                    x = out(ymm_reg) _,
                    t = out(ymm_reg) _,
                    $($a = out(ymm_reg) acc[$r][0], $b = out(ymm_reg) acc[$r][1],)*
                    options(readonly, nostack, preserves_flags)
                )
            }
        };
    }
    macro_rules! height {
        ($rows:tt, $($r:literal $a:ident $b:ident),*) => {
            match STEPS {
                2 => block!("vpmaddubsw", "vpaddw", ["1"], $rows, $($r $a $b),*),
                4 => block!("vpmaddubsw", "vpaddw", ["1", "2", "3"], $rows, $($r $a $b),*),
                8 => block!(
                    "vpmaddubsw", "vpaddw", ["1", "2", "3", "4", "5", "6", "7"], $rows, $($r $a $b),*
                ),
                _ => block!(
                    "vpmaddwd", "vpaddd",
                    ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15"],
                    $rows, $($r $a $b),*
                ),
            }
        };
    }
    const { assert!(R >= 1 && R <= TILE && matches!(STEPS, 2 | 4 | 8 | 16)) };
    match R {
        1 => height!(["" "a" "b"], 0 a b),
        2 => height!(["" "a" "b", " + {s}" "d" "e"], 0 a b, 1 d e),
        3 => height!(["" "a" "b", " + {s}" "d" "e", " + 2*{s}" "f" "g"], 0 a b, 1 d e, 2 f g),
        4 => height!(
            ["" "a" "b", " + {s}" "d" "e", " + 2*{s}" "f" "g", " + {s3}" "h" "i"],
            0 a b, 1 d e, 2 f g, 3 h i
        ),
        5 => height!(
            ["" "a" "b", " + {s}" "d" "e", " + 2*{s}" "f" "g", " + {s3}" "h" "i", " + 4*{s}" "j" "k"],
            0 a b, 1 d e, 2 f g, 3 h i, 4 j k
        ),
        _ => height!(
            ["" "a" "b", " + {s}" "d" "e", " + 2*{s}" "f" "g", " + {s3}" "h" "i", " + 4*{s}" "j" "k", " + {s5}" "l" "m"],
            0 a b, 1 d e, 2 f g, 3 h i, 4 j k, 5 l m
        ),
    }
    acc
}

/// [`dots`] of bytes, with i32 sums.
///
/// # Safety
/// As [`dots`]; the CPU has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn vnni_dots<const R: usize, const STEPS: usize>(
    w: *const u8,
    x: *const u8,
    stride: usize,
) -> [[__m256i; 2]; R] {
    let mut acc = [[_mm256_setzero_si256(); 2]; R];
    macro_rules! step {
        ($at:literal, [$($row:literal $a:literal $b:literal),*]) => {
            concat!(
                "vmovdqa {v}, ymmword ptr [{c} + 64*", $at, "]\n",
                "vmovdqa {w}, ymmword ptr [{c} + 64*", $at, " + 32]\n",
                $(
                    "vpbroadcastd {x}, dword ptr [{p}", $row, " + 4*", $at, "]\n",
                    "{{vex}} vpdpbusd {", $a, "}, {v}, {x}\n",
                    "{{vex}} vpdpbusd {", $b, "}, {w}, {x}\n",
                )*
            )
        };
    }
    macro_rules! block {
        ([$($at:literal),*], $rows:tt, $($r:literal $a:ident $b:ident),*) => {
            // SAFETY: reads just what the caller promises.
            unsafe {
                std::arch::asm!(
                    "/* {s} {s3} {s5} */",
                    $(step!($at, $rows),)*
                    c = in(reg) w,
                    p = in(reg) x,
                    s = in(reg) stride,
                    s3 = in(reg) 3 * stride,
                    s5 = in(reg) 5 * stride,
                    v = out(ymm_reg) _,
                    w = out(ymm_reg) _,
                    x = out(ymm_reg) _,
                    $($a = inout(ymm_reg) acc[$r][0], $b = inout(ymm_reg) acc[$r][1],)*
                    options(readonly, nostack, preserves_flags)
                )
            }
        };
    }
    macro_rules! height {
        ($rows:tt, $($r:literal $a:ident $b:ident),*) => {
            match STEPS {
                4 => block!(["0", "1", "2", "3"], $rows, $($r $a $b),*),
                _ => block!(["0", "1", "2", "3", "4", "5", "6", "7"], $rows, $($r $a $b),*),
            }
        };
    }
    const { assert!(R >= 1 && R <= TILE && matches!(STEPS, 4 | 8)) };
    match R {
        1 => height!(["" "a" "b"], 0 a b),
        2 => height!(["" "a" "b", " + {s}" "d" "e"], 0 a b, 1 d e),
        3 => height!(["" "a" "b", " + {s}" "d" "e", " + 2*{s}" "f" "g"], 0 a b, 1 d e, 2 f g),
        4 => height!(
            ["" "a" "b", " + {s}" "d" "e", " + 2*{s}" "f" "g", " + {s3}" "h" "i"],
            0 a b, 1 d e, 2 f g, 3 h i
        ),
        5 => height!(
            ["" "a" "b", " + {s}" "d" "e", " + 2*{s}" "f" "g", " + {s3}" "h" "i", " + 4*{s}" "j" "k"],
            0 a b, 1 d e, 2 f g, 3 h i, 4 j k
        ),
        _ => height!(
            ["" "a" "b", " + {s}" "d" "e", " + 2*{s}" "f" "g", " + {s3}" "h" "i", " + 4*{s}" "j" "k", " + {s5}" "l" "m"],
            0 a b, 1 d e, 2 f g, 3 h i, 4 j k, 5 l m
        ),
    }
    acc
}

/// `R` rows from row `r` against a panel of plain floats.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn float_rows<const R: usize>(task: &Task<'_>, p: usize, r: usize) {
    match task.matrix.kind {
        Kind::F16 => float_tile::<R, 16>(task, p, r),
        Kind::BF16 => float_tile::<R, 1>(task, p, r),
        _ => float_tile::<R, 32>(task, p, r),
    }
}

/// `TYPE`: 32 is f32, 16 is f16, 1 is bf16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn float_tile<const R: usize, const TYPE: usize>(task: &Task<'_>, p: usize, r: usize) {
    let k = task.matrix.k;
    let panel = task.matrix.panel(p);
    let size = if TYPE == 32 { 4 } else { 2 };
    let x = &task.acts.x()[r * k..(r + R) * k];
    assert_eq!(panel.len(), k * COLS * size);
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for i in 0..k {
        // SAFETY: `i < k`; the panel has `k` rows of 16 values of `size` bytes, `x` has `R` rows of `k`.
        unsafe {
            let at = panel.as_ptr().add(i * COLS * size);
            let w: [__m256; 2] = std::array::from_fn(|side| match TYPE {
                32 => _mm256_loadu_ps(at.add(32 * side).cast()),
                16 => load_f16(at.add(16 * side)),
                _ => {
                    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(16 * side).cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                }
            });
            for (row, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*x.as_ptr().add(row * k + i));
                acc[0] = _mm256_fmadd_ps(w[0], x, acc[0]);
                acc[1] = _mm256_fmadd_ps(w[1], x, acc[1]);
            }
        }
    }
    for (row, acc) in acc.into_iter().enumerate() {
        store(task, r + row, p, acc);
    }
}
