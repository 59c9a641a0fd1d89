//! Block formats of GGUF files and their values as f32.
//!
//! A format cuts each row of a weight matrix, `k` values long, into blocks of [`Format::block_len`] values. Every quantised
//! format has the same shape underneath: an unsigned code per value, an integer offset per format, and a scale (and, in some, a
//! minimum) per 16 or 32 values: `value = scale * (code - offset) [+ minimum]`. `decode` brings a block into that shape; both
//! [`dequantise`] and the packing of [`crate::matmul::Matrix`] start from it.

mod decode;
mod encode;
#[cfg(test)]
mod tests;

pub(crate) use decode::{Decoded, bound, decode};
pub use encode::quantise;

/// Why bytes could not become a matrix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A row is not a whole number of blocks.
    #[error(
        "a row of {k} values is not a whole number of {name} blocks\nhint: {name} blocks hold {block} values; the file's shape and type disagree"
    )]
    RowLength {
        /// Values in a row.
        k: usize,
        /// Format's name.
        name: &'static str,
        /// Values in a block.
        block: usize,
    },
    /// The byte count does not match the shape.
    #[error(
        "{got} bytes cannot hold {n} x {k} values of {name}, which need {}\nhint: the file may be truncated",
        .want.map_or_else(|| String::from("more than a machine word can count"), |w| format!("{w}"))
    )]
    Bytes {
        /// Bytes given.
        got: usize,
        /// Bytes needed, `None` when the count overflows.
        want: Option<usize>,
        /// Rows.
        n: usize,
        /// Values in a row.
        k: usize,
        /// Format's name.
        name: &'static str,
    },
    /// A matrix without rows or columns.
    #[error("a weight matrix of {n} x {k} has no values\nhint: the file's shape is damaged")]
    Empty {
        /// Rows.
        n: usize,
        /// Values in a row.
        k: usize,
    },
    /// No memory for the packed copy.
    #[error(
        "no memory for {bytes} bytes of packed weights\nhint: use a smaller or more strongly quantised model"
    )]
    Memory {
        /// Bytes asked for.
        bytes: usize,
    },
}

/// A block format of GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Format {
    /// Plain f32.
    F32,
    /// Plain IEEE half.
    F16,
    /// Plain bfloat16.
    BF16,
    /// 32 values of 4 bits, offset 8, one f16 scale.
    Q4_0,
    /// 32 values of 4 bits, f16 scale and minimum.
    Q4_1,
    /// 32 values of 5 bits, offset 16, one f16 scale.
    Q5_0,
    /// 32 values of 5 bits, f16 scale and minimum.
    Q5_1,
    /// 32 values of 8 bits, one f16 scale.
    Q8_0,
    /// 256 values of 2 bits, 4-bit scale and minimum per 16.
    Q2_K,
    /// 256 values of 3 bits, offset 4, 6-bit scale per 16.
    Q3_K,
    /// 256 values of 4 bits, 6-bit scale and minimum per 32.
    Q4_K,
    /// 256 values of 5 bits, 6-bit scale and minimum per 32.
    Q5_K,
    /// 256 values of 6 bits, offset 32, 8-bit scale per 16.
    Q6_K,
}

impl Format {
    /// All formats, in the order of their GGUF numbers.
    pub const ALL: [Format; 13] = [
        Format::F32,
        Format::F16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2_K,
        Format::Q3_K,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
        Format::BF16,
    ];

    /// The format with this number in a GGUF file (`ggml_type`), if we know it.
    pub fn from_ggml_type(number: u32) -> Option<Format> {
        Some(match number {
            0 => Format::F32,
            1 => Format::F16,
            2 => Format::Q4_0,
            3 => Format::Q4_1,
            6 => Format::Q5_0,
            7 => Format::Q5_1,
            8 => Format::Q8_0,
            10 => Format::Q2_K,
            11 => Format::Q3_K,
            12 => Format::Q4_K,
            13 => Format::Q5_K,
            14 => Format::Q6_K,
            30 => Format::BF16,
            _ => return None,
        })
    }

    /// The number of the format in a GGUF file.
    pub fn ggml_type(self) -> u32 {
        (0..=30)
            .find(|&n| Self::from_ggml_type(n) == Some(self))
            .unwrap_or(0)
    }

    /// Values in a block.
    pub fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K => 256,
        }
    }

    /// Bytes in a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q5_0 => 22,
            Format::Q5_1 => 24,
            Format::Q8_0 => 34,
            Format::Q2_K => 84,
            Format::Q3_K => 110,
            Format::Q4_K => 144,
            Format::Q5_K => 176,
            Format::Q6_K => 210,
        }
    }

    /// Bytes of a row of `k` values; `None` when `k` is not a whole number of blocks or the count overflows.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_len()) {
            return None;
        }
        (k / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The name people use, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::BF16 => "BF16",
            Format::Q4_0 => "Q4_0",
            Format::Q4_1 => "Q4_1",
            Format::Q5_0 => "Q5_0",
            Format::Q5_1 => "Q5_1",
            Format::Q8_0 => "Q8_0",
            Format::Q2_K => "Q2_K",
            Format::Q3_K => "Q3_K",
            Format::Q4_K => "Q4_K",
            Format::Q5_K => "Q5_K",
            Format::Q6_K => "Q6_K",
        }
    }

    /// Checks that `bytes` bytes hold exactly `n` rows of `k` values; returns the bytes of one row.
    pub(crate) fn check(self, bytes: usize, n: usize, k: usize) -> Result<usize, QuantError> {
        let name = self.name();
        if !k.is_multiple_of(self.block_len()) {
            return Err(QuantError::RowLength {
                k,
                name,
                block: self.block_len(),
            });
        }
        let row = self.row_bytes(k);
        let want = row.and_then(|r| r.checked_mul(n));
        match (row, want) {
            (Some(row), Some(want)) if want == bytes => Ok(row),
            _ => Err(QuantError::Bytes {
                got: bytes,
                want,
                n,
                k,
                name,
            }),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The values of `bytes` as f32: `out: [out.len()]`, one row or any whole number of blocks.
///
/// f32 arithmetic, multiply then add, each rounded once.
///
/// # Errors
/// When `out.len()` is not a whole number of blocks or `bytes` has another length than `out` needs.
pub fn dequantise(format: Format, bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    format.check(bytes.len(), 1, out.len())?;
    match format {
        Format::F32 => {
            for (y, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *y = f32::from_le_bytes(*b);
            }
        }
        Format::F16 => {
            for (y, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *y = half::f16::from_le_bytes(*b).to_f32();
            }
        }
        Format::BF16 => {
            for (y, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *y = half::bf16::from_le_bytes(*b).to_f32();
            }
        }
        _ => {
            let mut block = Decoded::default();
            let offset = decode::offset(format);
            let has_min = decode::has_min(format);
            let blocks = bytes.chunks_exact(format.block_bytes());
            for (y, b) in out.chunks_exact_mut(format.block_len()).zip(blocks) {
                decode(format, b, &mut block);
                for (i, (y, code)) in y.iter_mut().zip(block.codes).enumerate() {
                    let scaled = block.scale[i / 16] * (i32::from(code) - offset) as f32;
                    *y = if has_min {
                        scaled + block.min[i / 16]
                    } else {
                        scaled
                    };
                }
            }
        }
    }
    Ok(())
}
