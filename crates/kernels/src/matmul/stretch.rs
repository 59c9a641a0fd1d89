//! Stretches of a panel, unpacked with AVX-512: what the rows of a task share.

#[allow(clippy::wildcard_imports)] // Dozens of intrinsics.
use std::arch::x86_64::*;

use super::layout::{CODES, COLS, Fixed};

/// At most `BLOCKS` blocks of a panel, unpacked.
#[repr(C, align(64))]
pub(super) struct Stretch<const BLOCKS: usize> {
    /// `[blocks][8 groups][16 columns][4]`
    codes: [[u8; CODES]; BLOCKS],
    /// `[blocks][parts][16]`
    scale: [[f32; 2 * COLS]; BLOCKS],
    /// `[blocks][parts][16]`
    min: [[f32; 2 * COLS]; BLOCKS],
}

impl<const BLOCKS: usize> Stretch<BLOCKS> {
    pub(super) fn new() -> Self {
        Self {
            codes: [[0; CODES]; BLOCKS],
            scale: [[0.0; 2 * COLS]; BLOCKS],
            min: [[0.0; 2 * COLS]; BLOCKS],
        }
    }

    /// Codes as bytes, `CODES` of them a block, aligned to a line.
    #[inline]
    pub(super) fn codes(&self) -> *const u8 {
        self.codes.as_ptr().cast()
    }

    /// Scales `[blocks][parts][16]`, aligned to a line.
    #[inline]
    pub(super) fn scale(&self) -> *const f32 {
        self.scale.as_ptr().cast()
    }

    /// Minima, shaped as the scales; meaningless for kinds without.
    #[inline]
    pub(super) fn min(&self) -> *const f32 {
        self.min.as_ptr().cast()
    }

    /// Unpacks whole records, at most `BLOCKS`, with unsigned codes; returns how many.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) fn unpack<K: Fixed>(&mut self, records: &[u8]) -> usize {
        let blocks = records.len() / const { K::RECORD.bytes() };
        assert!(blocks <= BLOCKS);
        let (codes, scale, min) = (&mut self.codes, &mut self.scale, &mut self.min);
        let to = (
            codes.as_mut_ptr().cast(),
            scale.as_mut_ptr().cast(),
            min.as_mut_ptr().cast(),
        );
        // SAFETY: block `b < BLOCKS` of every array exists, with room for two parts, and all of it is aligned.
        unsafe { unpack::<K, false>(records, to) };
        blocks
    }
}

/// Unpacks whole records to codes as unsigned bytes, or, when `SIGNED`, with the offset subtracted.
///
/// # Safety
/// `codes` has room for `CODES` bytes a record, `scale` and (for kinds with one) `min` for 16 floats a part; all lie on lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn unpack<K: Fixed, const SIGNED: bool>(
    records: &[u8],
    (codes, scale, min): (*mut u8, *mut f32, *mut f32),
) {
    let record = const { K::RECORD };
    // As a byte: 128 is -128, and subtracting either flips the top bit.
    let offset = _mm512_set1_epi8(record.offset as u8 as i8);
    for (b, rec) in records.chunks_exact(record.bytes()).enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let rec = rec.as_ptr();
            let codes = codes.add(CODES * b);
            macro_rules! group {
                ($g:literal) => {
                    let unsigned = load_codes::<K, $g>(rec);
                    let code = if SIGNED {
                        _mm512_sub_epi8(unsigned, offset)
                    } else {
                        unsigned
                    };
                    _mm512_store_si512(codes.add(64 * $g).cast(), code);
                };
            }
            groups!(group);
            for part in 0..record.parts() {
                let at = (b * record.parts() + part) * COLS;
                let from = rec.add(record.scale_at(part));
                _mm512_store_ps(scale.add(at), load_f16(from));
                if record.min {
                    _mm512_store_ps(min.add(at), load_f16(from.add(2 * COLS)));
                }
            }
        }
    }
}

/// The 64 codes of group `G` as unsigned bytes.
///
/// # Safety
/// `record` points to the codes of a record of kind `K`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn load_codes<K: Fixed, const G: usize>(record: *const u8) -> __m512i {
    // SAFETY: the largest offset is inside `code_bytes()` for the kind's bits (see `layout`).
    unsafe {
        let load = |at: usize| _mm512_loadu_si512(record.add(at).cast());
        if K::RECORD.bits == 8 {
            return _mm512_xor_si512(load(64 * G), _mm512_set1_epi8(-128));
        }
        let pair = load(64 * (G / 2));
        let low = if G.is_multiple_of(2) {
            pair
        } else {
            _mm512_srli_epi16::<4>(pair)
        };
        let low = _mm512_and_si512(low, _mm512_set1_epi8(15));
        let high = match K::RECORD.bits {
            5 => {
                let plane = load(256);
                let bit = match G {
                    0 => _mm512_slli_epi16::<4>(plane),
                    1 => _mm512_slli_epi16::<3>(plane),
                    2 => _mm512_slli_epi16::<2>(plane),
                    3 => _mm512_slli_epi16::<1>(plane),
                    4 => plane,
                    5 => _mm512_srli_epi16::<1>(plane),
                    6 => _mm512_srli_epi16::<2>(plane),
                    _ => _mm512_srli_epi16::<3>(plane),
                };
                _mm512_and_si512(bit, _mm512_set1_epi8(16))
            }
            6 => {
                let plane = load(256 + 64 * (G / 4));
                let bits = match G % 4 {
                    0 => _mm512_slli_epi16::<4>(plane),
                    1 => _mm512_slli_epi16::<2>(plane),
                    2 => plane,
                    _ => _mm512_srli_epi16::<2>(plane),
                };
                _mm512_and_si512(bits, _mm512_set1_epi8(48))
            }
            _ => return low,
        };
        _mm512_or_si512(low, high)
    }
}

/// Calls `$f!(G)` for the eight groups.
macro_rules! groups {
    ($f:ident) => {
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
pub(super) use groups;

/// 16 f16 as f32.
///
/// # Safety
/// 32 readable bytes at `p`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn load_f16(p: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
}
