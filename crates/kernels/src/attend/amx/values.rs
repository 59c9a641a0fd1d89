//! Values: the tile products of weights and values.

use std::arch::asm;

use super::{HALF, LINE, RowTile, Work};
use crate::attend::StateMut;

impl RowTile<'_> {
    /// Adds the weights of the first `waiting` pages to `l`, and their products with the values to `acc`.
    ///
    /// # Safety
    /// The tiles are configured for `n` rows; the first `waiting` pointers of `work.v` are V parts of pages.
    pub(super) unsafe fn values(&self, waiting: usize, state: &mut StateMut<'_>, work: &mut Work) {
        if waiting == 0 {
            return;
        }
        let (dim, l) = (self.call.dim, &mut state.l[self.first..][..self.n]);
        for (line, &l) in work.l.iter_mut().zip(&*l) {
            line.0.fill(l);
        }
        let acc = state.acc[self.first * dim..][..self.n * dim].as_mut_ptr();
        let mut column = 0;
        // SAFETY: columns are below `dim`, so the tiles of `acc` and of the values lie inside of their rows.
        unsafe {
            while column + 4 * HALF <= dim {
                self.values_at::<4>(column, waiting, acc, work);
                column += 4 * HALF;
            }
            if column < dim {
                self.values_at::<2>(column, waiting, acc, work);
            }
        }
        for (line, l) in work.l.iter().zip(l) {
            *l = line.0[0];
        }
    }

    /// `N` = 4 or 2 tiles of columns from `column` on; the first also adds up the weights.
    ///
    /// # Safety
    /// As [`Self::values`]; `acc` has `n * D` values, `column + 16 N <= D`.
    #[inline]
    unsafe fn values_at<const N: usize>(
        &self,
        column: usize,
        waiting: usize,
        acc: *mut f32,
        work: &mut Work,
    ) {
        let line = LINE;
        // Rows of `acc` and pairs of rows of the values are both `4 D` bytes.
        let stride = 4 * self.call.dim;
        // Bytes of the values before the column: 16 columns of pairs are a line.
        let offset = 4 * column;
        macro_rules! tiles {
            ($($text:expr),*) => {
                asm!(
                    $($text,)*
                    acc = in(reg) acc.add(column),
                    stride = in(reg) stride,
                    line = in(reg) line,
                    p = inout(reg) work.p.as_ptr() => _,
                    table = inout(reg) work.v.as_ptr() => _,
                    offset = in(reg) offset,
                    v = out(reg) _,
                    n = inout(reg) waiting => _,
                    l = in(reg) work.l.as_mut_ptr(),
                    ones = in(reg) work.ones.as_ptr(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        // SAFETY: the caller's promise; `work` has the weights and pointers of `waiting` pages.
        unsafe {
            match (N, column) {
                (4, 0) => tiles!(
                    "tileloadd tmm0, [{acc} + {stride} * 1]",
                    "tileloadd tmm1, [{acc} + {stride} * 1 + 64]",
                    "tileloadd tmm2, [{acc} + {stride} * 1 + 128]",
                    "tileloadd tmm3, [{acc} + {stride} * 1 + 192]",
                    "tileloadd tmm5, [{l} + {line} * 1]",
                    "2:",
                    "mov {v}, [{table}]",
                    "add {v}, {offset}",
                    "tileloadd tmm4, [{p} + {line} * 1]",
                    "tileloadd tmm6, [{v} + {stride} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{v} + {stride} * 1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm6, [{v} + {stride} * 1 + 128]",
                    "tdpbf16ps tmm2, tmm4, tmm6",
                    "tileloadd tmm7, [{v} + {stride} * 1 + 192]",
                    "tdpbf16ps tmm3, tmm4, tmm7",
                    "tileloadd tmm6, [{ones} + {line} * 1]",
                    "tdpbf16ps tmm5, tmm4, tmm6",
                    "add {p}, 1024",
                    "add {table}, 8",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{acc} + {stride} * 1], tmm0",
                    "tilestored [{acc} + {stride} * 1 + 64], tmm1",
                    "tilestored [{acc} + {stride} * 1 + 128], tmm2",
                    "tilestored [{acc} + {stride} * 1 + 192], tmm3",
                    "tilestored [{l} + {line} * 1], tmm5"
                ),
                (4, _) => tiles!(
                    "/* {l} {ones} */",
                    "tileloadd tmm0, [{acc} + {stride} * 1]",
                    "tileloadd tmm1, [{acc} + {stride} * 1 + 64]",
                    "tileloadd tmm2, [{acc} + {stride} * 1 + 128]",
                    "tileloadd tmm3, [{acc} + {stride} * 1 + 192]",
                    "2:",
                    "mov {v}, [{table}]",
                    "add {v}, {offset}",
                    "tileloadd tmm4, [{p} + {line} * 1]",
                    "tileloadd tmm6, [{v} + {stride} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{v} + {stride} * 1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm6, [{v} + {stride} * 1 + 128]",
                    "tdpbf16ps tmm2, tmm4, tmm6",
                    "tileloadd tmm7, [{v} + {stride} * 1 + 192]",
                    "tdpbf16ps tmm3, tmm4, tmm7",
                    "add {p}, 1024",
                    "add {table}, 8",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{acc} + {stride} * 1], tmm0",
                    "tilestored [{acc} + {stride} * 1 + 64], tmm1",
                    "tilestored [{acc} + {stride} * 1 + 128], tmm2",
                    "tilestored [{acc} + {stride} * 1 + 192], tmm3"
                ),
                (_, 0) => tiles!(
                    "tileloadd tmm0, [{acc} + {stride} * 1]",
                    "tileloadd tmm1, [{acc} + {stride} * 1 + 64]",
                    "tileloadd tmm5, [{l} + {line} * 1]",
                    "2:",
                    "mov {v}, [{table}]",
                    "add {v}, {offset}",
                    "tileloadd tmm4, [{p} + {line} * 1]",
                    "tileloadd tmm6, [{v} + {stride} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{v} + {stride} * 1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm6, [{ones} + {line} * 1]",
                    "tdpbf16ps tmm5, tmm4, tmm6",
                    "add {p}, 1024",
                    "add {table}, 8",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{acc} + {stride} * 1], tmm0",
                    "tilestored [{acc} + {stride} * 1 + 64], tmm1",
                    "tilestored [{l} + {line} * 1], tmm5"
                ),
                (_, _) => tiles!(
                    "/* {l} {ones} */",
                    "tileloadd tmm0, [{acc} + {stride} * 1]",
                    "tileloadd tmm1, [{acc} + {stride} * 1 + 64]",
                    "2:",
                    "mov {v}, [{table}]",
                    "add {v}, {offset}",
                    "tileloadd tmm4, [{p} + {line} * 1]",
                    "tileloadd tmm6, [{v} + {stride} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{v} + {stride} * 1 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {p}, 1024",
                    "add {table}, 8",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{acc} + {stride} * 1], tmm0",
                    "tilestored [{acc} + {stride} * 1 + 64], tmm1"
                ),
            }
        }
    }
}
