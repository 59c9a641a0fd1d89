//! Scores alone, of many pages: for those who choose keys by them.

use std::arch::asm;

use antefix_state::PAGE_ROWS;

use super::{CHUNK, HALF, LINE, Line, ROWS, pack, shapes};
use crate::amx::{configure, release};

/// See [`crate::attend::scores_each`]: the scores of a few pages, whose keys are `keys`, into `out: [pages][R][32]`. `q` are `rows` packed
/// rows in tiles of `per`.
///
/// # Safety
/// The CPU has AMX-BF16 and the process may use the tiles; each of `keys` has `32 D` values, `dim` is a multiple of 32.
unsafe fn pages(
    dim: usize,
    (q, rows, per): (&[Line], usize, usize),
    keys: &[&[u16]],
    out: &mut [[f32; PAGE_ROWS]],
) {
    assert_eq!(out.len(), keys.len() * rows, "scores for each page and row");
    let lines = dim / CHUNK * 2;
    for first in (0..rows).step_by(per) {
        let n = per.min(rows - first);
        // SAFETY: the caller's promise; shapes are within the palette.
        unsafe { configure(&shapes(n)) };
        for (keys, out) in keys.iter().zip(out.chunks_exact_mut(rows)) {
            // SAFETY: a tile of queries has `n` lines a part, `dim / 32` chunks of two parts; a half page `16 D` keys; `n` rows of 32 scores
            // are stored from row `first` on.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    "tileloadd tmm4, [{q} + {line} * 1]",
                    "tileloadd tmm6, [{low} + {line} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{high} + {line} * 1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {q}, {part}",
                    "tileloadd tmm4, [{q} + {line} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {q}, {part}",
                    "add {low}, 1024",
                    "add {high}, 1024",
                    "dec {chunks}",
                    "jnz 2b",
                    "tilestored [{out} + {row} * 1], tmm0",
                    "tilestored [{out} + {row} * 1 + 64], tmm1",
                    q = inout(reg) q[first * lines..].as_ptr() => _,
                    part = in(reg) n * LINE,
                    low = inout(reg) keys.as_ptr() => _,
                    high = inout(reg) keys[HALF * dim..].as_ptr() => _,
                    chunks = inout(reg) dim / CHUNK => _,
                    out = in(reg) out[first..].as_mut_ptr(),
                    line = in(reg) LINE,
                    row = in(reg) 2 * LINE,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }
    // SAFETY: the tiles are not used after this.
    unsafe { release() };
}

/// See [`crate::attend::scores_each`], of bf16 pages.
///
/// # Safety
/// As the features say, and the process may use the tiles; each of `keys` has `32 D` values, `dim` is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(in crate::attend) unsafe fn scores_each<'a>(
    dim: usize,
    q: &[f32],
    mut keys: impl Iterator<Item = &'a [u16]>,
    mut f: impl FnMut(usize, &[[f32; PAGE_ROWS]]),
) {
    /// Pages between two calls of `f`, which may use the tiles for itself.
    const PAGES: usize = 16;
    let rows = q.len() / dim;
    let per = rows.div_ceil(rows.div_ceil(ROWS));
    let mut packed = Vec::new();
    pack(dim, q, per, &mut packed);
    let mut out = vec![[0.0; PAGE_ROWS]; PAGES * rows];
    let mut done = 0;
    loop {
        let some: Vec<&[u16]> = keys.by_ref().take(PAGES).collect();
        if some.is_empty() {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe { pages(dim, (&packed, rows, per), &some, &mut out[..some.len() * rows]) };
        for (i, scores) in out.chunks_exact(rows).take(some.len()).enumerate() {
            f(done + i, scores);
        }
        done += some.len();
    }
}
