//! One block of any quantised format as codes, scales and minima.

use super::Format;

/// A block: `value[i] = scale[i / 16] * (codes[i] - offset) [+ min[i / 16]]`. Formats with blocks of 32 use the first two of
/// `scale` and `min` and the first 32 of `codes`; formats that scale 32 values at once repeat the scale.
pub(crate) struct Decoded {
    pub(crate) codes: [u8; 256],
    pub(crate) scale: [f32; 16],
    pub(crate) min: [f32; 16],
}

impl Default for Decoded {
    fn default() -> Self {
        Decoded {
            codes: [0; 256],
            scale: [0.0; 16],
            min: [0.0; 16],
        }
    }
}

/// What is subtracted from a code; a power of two or 0. Q8_0's signed bytes become codes by adding 128.
pub(crate) fn offset(format: Format) -> i32 {
    match format {
        Format::Q3_K => 4,
        Format::Q4_0 => 8,
        Format::Q5_0 => 16,
        Format::Q6_K => 32,
        Format::Q8_0 => 128,
        _ => 0,
    }
}

/// Whether the format adds a minimum.
pub(crate) fn has_min(format: Format) -> bool {
    matches!(
        format,
        Format::Q4_1 | Format::Q5_1 | Format::Q2_K | Format::Q4_K | Format::Q5_K
    )
}

/// An upper bound of |scale| and |min| in a 256-value block, from its header alone; the other formats keep their f16 as it is.
pub(crate) fn bound(format: Format, b: &[u8]) -> f32 {
    match format {
        Format::Q2_K => 15.0 * f16(b, 80).abs().max(f16(b, 82).abs()),
        Format::Q3_K => 32.0 * f16(b, 108).abs(),
        Format::Q4_K | Format::Q5_K => 63.0 * f16(b, 0).abs().max(f16(b, 2).abs()),
        Format::Q6_K => 128.0 * f16(b, 208).abs(),
        _ => 0.0,
    }
}

fn f16(b: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Brings one block (`b` has `format.block_bytes()` bytes) into the common shape. Not for F32, F16, BF16.
#[inline]
pub(crate) fn decode(format: Format, b: &[u8], out: &mut Decoded) {
    debug_assert_eq!(b.len(), format.block_bytes());
    match format {
        Format::F32 | Format::F16 | Format::BF16 => unreachable!("plain floats have no blocks"),
        Format::Q4_0 => {
            out.scale[..2].fill(f16(b, 0));
            nibbles(&b[2..18], &mut out.codes[..32]);
        }
        Format::Q4_1 => {
            out.scale[..2].fill(f16(b, 0));
            out.min[..2].fill(f16(b, 2));
            nibbles(&b[4..20], &mut out.codes[..32]);
        }
        Format::Q5_0 => {
            out.scale[..2].fill(f16(b, 0));
            nibbles(&b[6..22], &mut out.codes[..32]);
            fifth_bits(&b[2..6], &mut out.codes[..32]);
        }
        Format::Q5_1 => {
            out.scale[..2].fill(f16(b, 0));
            out.min[..2].fill(f16(b, 2));
            nibbles(&b[8..24], &mut out.codes[..32]);
            fifth_bits(&b[4..8], &mut out.codes[..32]);
        }
        Format::Q8_0 => {
            out.scale[..2].fill(f16(b, 0));
            for (code, w) in out.codes[..32].iter_mut().zip(&b[2..34]) {
                *code = w ^ 0x80;
            }
        }
        Format::Q2_K => q2_k(b, out),
        Format::Q3_K => q3_k(b, out),
        Format::Q4_K => {
            scales_k(b, out);
            for (codes, q) in out.codes.chunks_exact_mut(64).zip(b[16..144].chunks_exact(32)) {
                nibbles(q, codes);
            }
        }
        Format::Q5_K => {
            scales_k(b, out);
            let high = &b[16..48];
            for (pair, (codes, q)) in out
                .codes
                .chunks_exact_mut(64)
                .zip(b[48..176].chunks_exact(32))
                .enumerate()
            {
                nibbles(q, codes);
                let (first, second) = codes.split_at_mut(32);
                for i in 0..32 {
                    first[i] |= ((high[i] >> (2 * pair)) & 1) << 4;
                    second[i] |= ((high[i] >> (2 * pair + 1)) & 1) << 4;
                }
            }
        }
        Format::Q6_K => q6_k(b, out),
    }
}

/// Low nibbles of `q` first, then the high ones.
fn nibbles(q: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(q.len());
    for ((l, h), q) in low.iter_mut().zip(high).zip(q) {
        *l = q & 15;
        *h = q >> 4;
    }
}

/// Bit `i` of the little-endian word is bit 4 of code `i`.
fn fifth_bits(word: &[u8], codes: &mut [u8]) {
    let bits = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (((bits >> i) & 1) as u8) << 4;
    }
}

/// Q4_K and Q5_K: d, dmin, then eight 6-bit scales and eight 6-bit minima in 12 bytes.
fn scales_k(b: &[u8], out: &mut Decoded) {
    let (d, dmin) = (f16(b, 0), f16(b, 2));
    let s = &b[4..16];
    for j in 0..8 {
        let (scale, min) = if j < 4 {
            (s[j] & 63, s[j + 4] & 63)
        } else {
            (
                (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4),
                (s[j + 4] >> 4) | ((s[j] >> 6) << 4),
            )
        };
        out.scale[2 * j..2 * j + 2].fill(d * f32::from(scale));
        out.min[2 * j..2 * j + 2].fill(-(dmin * f32::from(min)));
    }
}

fn q2_k(b: &[u8], out: &mut Decoded) {
    let (d, dmin) = (f16(b, 80), f16(b, 82));
    for (j, s) in b[..16].iter().enumerate() {
        out.scale[j] = d * f32::from(s & 15);
        out.min[j] = -(dmin * f32::from(s >> 4));
    }
    for (i, code) in out.codes.iter_mut().enumerate() {
        let (part, shift, at) = (i / 128, (i % 128) / 32 * 2, i % 32);
        *code = (b[16 + 32 * part + at] >> shift) & 3;
    }
}

fn q3_k(b: &[u8], out: &mut Decoded) {
    let d = f16(b, 108);
    let s = &b[96..108];
    for j in 0..16 {
        // Low four bits: bytes 0..8, low nibbles first; high two bits: bytes 8..12, two bits each.
        let low = (s[j % 8] >> (4 * (j / 8))) & 15;
        let high = (s[8 + j % 4] >> (2 * (j / 4))) & 3;
        out.scale[j] = d * (i32::from(low | (high << 4)) - 32) as f32;
    }
    for (i, code) in out.codes.iter_mut().enumerate() {
        let (part, group, at) = (i / 128, (i % 128) / 32, i % 32);
        let low = (b[32 + 32 * part + at] >> (2 * group)) & 3;
        let high = (b[at] >> (4 * part + group)) & 1;
        *code = low | (high << 2);
    }
}

fn q6_k(b: &[u8], out: &mut Decoded) {
    let d = f16(b, 208);
    for (scale, s) in out.scale.iter_mut().zip(&b[192..208]) {
        *scale = d * f32::from(*s as i8);
    }
    for part in 0..2 {
        let low = &b[64 * part..64 * part + 64];
        let high = &b[128 + 32 * part..160 + 32 * part];
        let codes = &mut out.codes[128 * part..128 * part + 128];
        for i in 0..32 {
            codes[i] = (low[i] & 15) | ((high[i] & 3) << 4);
            codes[i + 32] = (low[i + 32] & 15) | (((high[i] >> 2) & 3) << 4);
            codes[i + 64] = (low[i] >> 4) | (((high[i] >> 4) & 3) << 4);
            codes[i + 96] = (low[i + 32] >> 4) | (((high[i] >> 6) & 3) << 4);
        }
    }
}
