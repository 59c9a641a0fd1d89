//! From the rows of a file to panels.

use std::sync::atomic::{AtomicU32, Ordering};

use super::layout::{BLOCK, CODES, COLS, Kind, Record};
use super::{Matrix, Precision};
use crate::memory::{Buffer, Shared};
use crate::quant::{self, Decoded, Format, QuantError};
use crate::team::Team;

/// The body of [`Matrix::pack`].
pub(crate) fn pack(
    team: &Team,
    format: Format,
    bytes: &[u8],
    n: usize,
    k: usize,
    precision: Precision,
) -> Result<Matrix, QuantError> {
    if n == 0 || k == 0 {
        return Err(QuantError::Empty { n, k });
    }
    let row_bytes = format.check(bytes.len(), n, k)?;
    let kind = match (precision, Kind::of(format)) {
        (Precision::F32, kind) if kind.record().is_some() => Kind::F32,
        (_, kind) => kind,
    };
    let panels = n.div_ceil(COLS);
    let len = kind.panel_bytes(k).and_then(|p| p.checked_mul(panels));
    let (Some(panel_bytes), Some(len)) = (kind.panel_bytes(k), len) else {
        return Err(QuantError::Memory { bytes: usize::MAX });
    };
    let mut buffer = Buffer::uninit(len).ok_or(QuantError::Memory { bytes: len })?;
    let source = Source {
        format,
        bytes,
        row_bytes,
        n,
        k,
    };
    let shift = if kind.record().is_some() {
        source.shift(team, panels)
    } else {
        0
    };
    let base = Shared::new(buffer.ptr_mut());
    team.run(panels, &|p| {
        // SAFETY: panel `p` is bytes `p * panel_bytes ..` of the buffer, and each task has its own `p`. Zeroed before it becomes a
        // slice: the first touch of the memory is by the thread that packs it, and columns past `n` stay zero.
        let panel = unsafe {
            let start = base.get().add(p * panel_bytes);
            start.write_bytes(0, panel_bytes);
            std::slice::from_raw_parts_mut(start, panel_bytes)
        };
        match kind.record() {
            Some(record) => source.pack_codes(p, record, exp2(shift), panel),
            None => source.pack_floats(p, kind, panel),
        }
    });
    Ok(Matrix {
        n,
        k,
        kind,
        panel_bytes,
        len,
        post: exp2(-shift),
        buffer,
    })
}

/// `2^e` for `-126 <= e <= 127`.
fn exp2(e: i32) -> f32 {
    f32::from_bits(((127 + e) as u32) << 23)
}

struct Source<'a> {
    format: Format,
    bytes: &'a [u8],
    row_bytes: usize,
    n: usize,
    k: usize,
}

impl Source<'_> {
    fn row(&self, col: usize) -> &[u8] {
        &self.bytes[col * self.row_bytes..][..self.row_bytes]
    }

    /// Columns of panel `p` that exist.
    fn cols(&self, p: usize) -> usize {
        (self.n - p * COLS).min(COLS)
    }

    /// The power of two by which the products of two-level scales are multiplied before they are rounded to f16, so that the
    /// largest lies in `2^14 .. 2^15` and nothing that matters becomes subnormal. 0 where the file has f16 scales itself.
    fn shift(&self, team: &Team, panels: usize) -> i32 {
        if self.format.block_len() != 256 {
            return 0;
        }
        let most = AtomicU32::new(0);
        team.run(panels, &|p| {
            let mut here = 0.0f32;
            for c in 0..self.cols(p) {
                for b in self.row(p * COLS + c).chunks_exact(self.format.block_bytes()) {
                    let bound = quant::bound(self.format, b);
                    if bound.is_finite() {
                        here = here.max(bound);
                    }
                }
            }
            // Bit patterns of non-negative floats order as the floats do.
            most.fetch_max(here.to_bits(), Ordering::Relaxed);
        });
        match f32::from_bits(most.into_inner()) {
            0.0 => 0,
            most => 14 - ((most.to_bits() >> 23) as i32 - 127),
        }
    }

    fn pack_codes(&self, p: usize, record: Record, factor: f32, panel: &mut [u8]) {
        let parts = self.format.block_len() / BLOCK;
        let mut block = Decoded::default();
        // Unpacked codes and scales of one block of the file in all columns: at most 8 records.
        let mut codes = [0u8; 8 * CODES];
        let mut scale = [[0.0f32; COLS]; 16];
        let mut min = [[0.0f32; COLS]; 16];
        for (i, records) in panel.chunks_exact_mut(record.bytes() * parts).enumerate() {
            for c in 0..self.cols(p) {
                let at = i * self.format.block_bytes();
                quant::decode(
                    self.format,
                    &self.row(p * COLS + c)[at..at + self.format.block_bytes()],
                    &mut block,
                );
                for (group, four) in block.codes[..parts * BLOCK].as_chunks::<4>().0.iter().enumerate() {
                    codes[group * 64 + c * 4..][..4].copy_from_slice(four);
                }
                for j in 0..2 * parts {
                    scale[j][c] = block.scale[j] * factor;
                    min[j][c] = block.min[j] * factor;
                }
            }
            for (j, out) in records.chunks_exact_mut(record.bytes()).enumerate() {
                pack_record(record, &codes[j * CODES..][..CODES], out);
                for part in 0..record.parts() {
                    let at = record.scale_at(part);
                    write_f16(&scale[2 * j + part], &mut out[at..]);
                    if record.min {
                        write_f16(&min[2 * j + part], &mut out[at + 2 * COLS..]);
                    }
                }
            }
        }
    }

    fn pack_floats(&self, p: usize, kind: Kind, panel: &mut [u8]) {
        let dequantised = Kind::of(self.format) != kind;
        let mut values = [0.0f32; 256];
        for c in 0..self.cols(p) {
            let row = self.row(p * COLS + c);
            if dequantised {
                let len = self.format.block_len();
                for (i, b) in row.chunks_exact(self.format.block_bytes()).enumerate() {
                    quant::dequantise(self.format, b, &mut values[..len]).expect("one block and its length");
                    for (j, v) in values[..len].iter().enumerate() {
                        panel[((i * len + j) * COLS + c) * 4..][..4].copy_from_slice(&v.to_le_bytes());
                    }
                }
            } else if kind == Kind::F32 {
                for (i, v) in row.as_chunks::<4>().0.iter().enumerate() {
                    panel[(i * COLS + c) * 4..][..4].copy_from_slice(v);
                }
            } else {
                for (i, v) in row.as_chunks::<2>().0.iter().enumerate() {
                    panel[(i * COLS + c) * 2..][..2].copy_from_slice(v);
                }
            }
        }
        debug_assert!(self.k * COLS <= panel.len());
    }
}

fn write_f16(values: &[f32; COLS], out: &mut [u8]) {
    for (o, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *o = half::f16::from_f32(*v).to_le_bytes();
    }
}

/// Codes of one record, a byte each (`[8 groups][64]`), to their packed form.
fn pack_record(record: Record, codes: &[u8], out: &mut [u8]) {
    if record.bits == 8 {
        for (o, code) in out.iter_mut().zip(codes) {
            *o = code ^ 0x80;
        }
        return;
    }
    for (c, pair) in codes.chunks_exact(128).enumerate() {
        for i in 0..64 {
            out[c * 64 + i] = (pair[i] & 15) | (pair[64 + i] << 4);
        }
    }
    for i in 0..64 {
        match record.bits {
            5 => out[256 + i] = (0..8).map(|g| ((codes[g * 64 + i] >> 4) & 1) << g).sum(),
            6 => {
                for plane in 0..2 {
                    out[256 + 64 * plane + i] = (0..4)
                        .map(|g| ((codes[(4 * plane + g) * 64 + i] >> 4) & 3) << (2 * g))
                        .sum();
                }
            }
            _ => {}
        }
    }
}

/// The inverse of `pack_record`: codes as unsigned bytes.
pub(crate) fn unpack_record(record: Record, packed: &[u8], codes: &mut [u8; CODES]) {
    if record.bits == 8 {
        for (code, p) in codes.iter_mut().zip(packed) {
            *code = p ^ 0x80;
        }
        return;
    }
    for g in 0..8 {
        for i in 0..64 {
            let low = (packed[g / 2 * 64 + i] >> (4 * (g % 2))) & 15;
            let high = match record.bits {
                5 => (packed[256 + i] >> g) & 1,
                6 => (packed[256 + 64 * (g / 4) + i] >> (2 * (g % 4))) & 3,
                _ => 0,
            };
            codes[g * 64 + i] = low | (high << 4);
        }
    }
}
