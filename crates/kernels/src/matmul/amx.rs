//! AMX int8: one tile product is a block of 32 (or half of one) for 16 rows and 16 columns.
//!
//! Activations are the signed left tile, codes the unsigned right one (`tdpbsud`); an unpacked record is a right tile as it lies. The i32
//! tile goes through memory to the same float steps as on the VNNI path, so bits do not change between the two.

use std::arch::asm;
#[allow(clippy::wildcard_imports)] // Dozens of intrinsics.
use std::arch::x86_64::*;

use super::Task;
use super::avx512;
use super::layout::{BLOCK, CODES, COLS, Fixed, with_kind};

/// Fewer rows than this leave most of a tile empty; VNNI does them.
const LEAST_ROWS: usize = 8;
/// Rows of a tile.
const TILE: usize = 16;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes per row of tiles 0..8.
    row_bytes: [u16; 16],
    /// Rows of tiles 0..8.
    rows: [u8; 16],
}

/// `tmm0`: sums `[rows, 16]` i32. `tmm1`: activations `[rows, depth]` i8. `tmm2`: codes `[depth / 4][16 columns][4]`.
///
/// # Safety
/// The CPU has AMX-INT8 and the process may use it; `1 <= rows <= 16`, `depth` is 16 or 32.
unsafe fn configure(rows: usize, depth: usize) {
    let mut config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    config.row_bytes[..3].copy_from_slice(&[64, depth as u16, 64]);
    config.rows[..3].copy_from_slice(&[rows as u8, rows as u8, (depth / 4) as u8]);
    // SAFETY: the instruction reads the 64 bytes of `config` (the block may read memory: no `nomem`) and clears the tiles.
    unsafe {
        asm!(
            "ldtilecfg [{0}]",
            in(reg) &raw const config,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// `sums = x * codes`, shapes as configured.
///
/// # Safety
/// [`configure`] ran on this thread and [`release`] did not since; the pointers have the configured shapes, rows of `x` are `stride` bytes
/// apart.
#[inline]
unsafe fn product(x: *const i8, stride: usize, codes: *const u8, sums: &mut [[i32; COLS]; TILE]) {
    // SAFETY: the caller's promise; `sums` has 16 rows of 64 bytes.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm1, [{x} + {stride} * 1]",
            "tileloadd tmm2, [{codes} + {line} * 1]",
            "tdpbsud tmm0, tmm1, tmm2",
            "tilestored [{sums} + {line} * 1], tmm0",
            x = in(reg) x,
            stride = in(reg) stride,
            codes = in(reg) codes,
            line = in(reg) 64usize,
            sums = in(reg) sums.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _,
            options(nostack, preserves_flags),
        );
    }
}

/// Gives the tile registers back, so that the kernel need not save them.
///
/// # Safety
/// As [`configure`].
unsafe fn release() {
    // SAFETY: touches only the tiles.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, nomem),
        );
    }
}

/// Computes a task.
///
/// # Safety
/// The CPU has AVX-512 with VNNI and AMX-INT8, and the process may use the tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn run(task: &Task<'_>) {
    if task.rows.len() < LEAST_ROWS || task.matrix.kind.record().is_none() {
        // SAFETY: a part of the caller's promise.
        return unsafe { avx512::run(task) };
    }
    for p in task.panels.clone() {
        with_kind!(task.matrix.kind, K => panel::<K>(task, p), unreachable!("floats went to AVX-512"));
    }
    // SAFETY: the caller's promise.
    unsafe { release() };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn panel<K: Fixed>(task: &Task<'_>, p: usize) {
    let (acts, parts) = (task.acts, const { K::RECORD.parts() });
    let (all, depth) = (acts.blocks(), BLOCK / parts);
    avx512::stretches::<K>(task, p, |w, blocks, acc| {
        let mut sums = [[0i32; COLS]; TILE];
        let mut configured = 0;
        for (t, acc) in acc.chunks_mut(TILE).enumerate() {
            let r = task.rows.start + t * TILE;
            assert!(r + acc.len() <= acts.rows() && blocks.end <= all);
            if configured != acc.len() {
                // SAFETY: only `run` calls this, on a CPU with tiles; 1 to 16 rows, 16 or 32 deep.
                unsafe { configure(acc.len(), depth) };
                configured = acc.len();
            }
            for b in 0..blocks.len() {
                for part in 0..parts {
                    // SAFETY: rows `r .. r + acc.len()` of `q` are `all * 32` bytes apart and hold this block; the stretch holds the
                    // block's codes, 64 bytes per 4 along K; `sums` and `acc` have at least `acc.len()` rows.
                    unsafe {
                        let x = acts
                            .q
                            .as_ptr()
                            .add((r * all + blocks.start + b) * BLOCK + part * depth);
                        let codes = w.codes.as_ptr().add(CODES * b + part * depth * COLS);
                        product(x, all * BLOCK, codes, &mut sums);
                        for (i, acc) in acc.iter_mut().enumerate() {
                            let isum = _mm512_loadu_si512(sums[i].as_ptr().cast());
                            let old = _mm512_loadu_ps(acc.as_ptr());
                            let new =
                                avx512::update::<K>(task, w, r + i, blocks.start + b, b, part, isum, old);
                            _mm512_storeu_ps(acc.as_mut_ptr(), new);
                        }
                    }
                }
            }
        }
    });
}
