//! How a matrix lies in memory once packed.
//!
//! A *panel* holds 16 output columns (16 rows of the file). Along K it is a sequence of *records*, one per 32 values:
//! codes, then scales as f16 `[halves][16 columns]`, then, for kinds with a minimum, minima of the same shape (interleaved by
//! half: scale 0, min 0, scale 1, min 1). Unpacked, the codes of a record are 8 *groups* of 64 bytes, `[16 columns][4 along K]`.
//!
//! | bits | bytes of codes in a record |
//! |---|---|
//! | 4 | 4 x 64: low nibbles are group `2c`, high nibbles group `2c + 1` |
//! | 5 | the 4-bit part, then 64 bytes whose bit `g` is bit 4 of group `g` |
//! | 6 | the 4-bit part, then 2 x 64 bytes: bits `2i, 2i + 1` of byte plane `p` are bits 4 and 5 of group `4p + i` |
//! | 8 | 8 x 64: signed values, code - 128 |
//!
//! Float panels are `[K][16 columns]` of f32, f16 or bf16.

use crate::quant::Format;

/// Output columns in a panel.
pub(crate) const COLS: usize = 16;
/// Values along K in a block.
pub(crate) const BLOCK: usize = 32;
/// Bytes of a record's codes, unpacked to a byte each.
pub(crate) const CODES: usize = COLS * BLOCK;
/// Bytes of one row of 16 f16.
const F16S: usize = 2 * COLS;

/// The shape of a quantised record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    /// Bits of a code: 4, 5, 6 or 8.
    pub(crate) bits: u8,
    /// Scales (and minima) per 16 instead of per 32.
    pub(crate) halves: bool,
    /// Whether a minimum follows each scale.
    pub(crate) min: bool,
    /// Subtracted from every code; a power of two or 0.
    pub(crate) offset: i32,
}

impl Record {
    /// Bytes of the packed codes.
    pub(crate) const fn code_bytes(self) -> usize {
        CODES * self.bits as usize / 8
    }

    /// Scales per column in a record.
    pub(crate) const fn parts(self) -> usize {
        if self.halves { 2 } else { 1 }
    }

    /// Rows of 16 f16 per part.
    pub(crate) const fn rows_per_part(self) -> usize {
        if self.min { 2 } else { 1 }
    }

    /// Where the scale of `part` starts; its minimum follows.
    pub(crate) const fn scale_at(self, part: usize) -> usize {
        self.code_bytes() + part * self.rows_per_part() * F16S
    }

    /// Bytes of a record; a multiple of 32.
    pub(crate) const fn bytes(self) -> usize {
        self.scale_at(self.parts())
    }
}

/// A record whose shape the compiler knows.
pub(crate) trait Fixed {
    const RECORD: Record;
}

macro_rules! kinds {
    ($($name:ident: $bits:literal, $halves:literal, $min:literal, $offset:literal;)*) => {
        $(
            pub(crate) struct $name;
            impl Fixed for $name {
                const RECORD: Record = Record { bits: $bits, halves: $halves, min: $min, offset: $offset };
            }
        )*

        /// What a matrix is packed as.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Kind { $($name,)* F32, F16, BF16 }

        impl Kind {
            /// The record of a quantised kind.
            pub(crate) const fn record(self) -> Option<Record> {
                match self { $(Kind::$name => Some($name::RECORD),)* _ => None }
            }

            /// The name shown to people.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Kind::$name => stringify!($name),)*
                    Kind::F32 => "F32",
                    Kind::F16 => "F16",
                    Kind::BF16 => "BF16",
                }
            }
        }
    };
}

kinds! {
    U4Offset: 4, false, false, 8;
    U4Min: 4, false, true, 0;
    U4Halves: 4, true, false, 4;
    U4HalvesMin: 4, true, true, 0;
    U5Offset: 5, false, false, 16;
    U5Min: 5, false, true, 0;
    U6Halves: 6, true, false, 32;
    I8: 8, false, false, 128;
}

/// Runs `$call` with `$k` standing for the type of a quantised kind; float kinds run `$other`.
macro_rules! with_kind {
    ($kind:expr, $k:ident => $call:expr, $other:expr) => {{
        use crate::matmul::layout::{self, Kind};
        match $kind {
            Kind::U4Offset => {
                type $k = layout::U4Offset;
                $call
            }
            Kind::U4Min => {
                type $k = layout::U4Min;
                $call
            }
            Kind::U4Halves => {
                type $k = layout::U4Halves;
                $call
            }
            Kind::U4HalvesMin => {
                type $k = layout::U4HalvesMin;
                $call
            }
            Kind::U5Offset => {
                type $k = layout::U5Offset;
                $call
            }
            Kind::U5Min => {
                type $k = layout::U5Min;
                $call
            }
            Kind::U6Halves => {
                type $k = layout::U6Halves;
                $call
            }
            Kind::I8 => {
                type $k = layout::I8;
                $call
            }
            _ => $other,
        }
    }};
}
pub(crate) use with_kind;

impl Kind {
    /// What a format is packed as when it keeps its quantisation.
    pub(crate) fn of(format: Format) -> Kind {
        match format {
            Format::F32 => Kind::F32,
            Format::F16 => Kind::F16,
            Format::BF16 => Kind::BF16,
            Format::Q4_0 => Kind::U4Offset,
            Format::Q4_1 | Format::Q4_K => Kind::U4Min,
            Format::Q5_0 => Kind::U5Offset,
            Format::Q5_1 | Format::Q5_K => Kind::U5Min,
            Format::Q8_0 => Kind::I8,
            Format::Q2_K => Kind::U4HalvesMin,
            Format::Q3_K => Kind::U4Halves,
            Format::Q6_K => Kind::U6Halves,
        }
    }

    /// Bytes of a panel of `k` values per column; `None` when the count overflows.
    pub(crate) fn panel_bytes(self, k: usize) -> Option<usize> {
        match self {
            Kind::F32 => k.checked_mul(4 * COLS),
            Kind::F16 | Kind::BF16 => k.checked_mul(2 * COLS),
            _ => (k / BLOCK).checked_mul(self.record()?.bytes()),
        }
    }
}
