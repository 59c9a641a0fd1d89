//! AMX bf16: quantised weights become bf16 once per group of panels, sums stay in the tiles over the whole of K.
//!
//! The arithmetic contract of these rows: weights are `(code - offset) * dw` or `fma(code, dw, mw)` in f32, rounded to bf16 (nearest, even);
//! activations are rounded to bf16; per block of 32 along K, the even and the odd products are summed apart, ascending, and
//! `acc += even + odd`. Denormals count as zeros. `scalar::bf16` is the same in plain Rust.

use std::arch::asm;
#[allow(clippy::wildcard_imports)] // Dozens of intrinsics.
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::acts::TILE;
use super::gated::Part;
use super::layout::{BLOCK, COLS, Fixed, with_kind};
use super::stretch::{groups, load_codes, load_f16};
use super::{Acts, Matrix, Task};
use crate::amx::{TileShape, configure, release};
use crate::cpu::Cpu;

/// Bytes of bf16 that are unpacked together: they stay in the second cache beside the rows that meet them. Rows are read from further away
/// once a group, so groups are as large as that allows.
const GROUP_BYTES: usize = 1 << 20;
/// Bytes of a tile of 16 rows, and of a row of it.
const TILE_BYTES: usize = 1024;
const LINE: usize = 64;
/// How far ahead of what is unpacked the weights are asked for, bytes.
const AHEAD: usize = 2048;

/// A tile of sums.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; COLS]; TILE]);

/// A line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

thread_local! {
    /// Panels as bf16, `[panels][blocks][16 pairs along K][16 columns][2]`, kept from task to task.
    static UNPACKED: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Computes a task of rows that [`Acts`](super::Acts) holds as bf16 tiles.
///
/// # Safety
/// The CPU has AVX-512 with BF16 and AMX-BF16, and the process may use the tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn run(task: &Task<'_>) {
    // SAFETY: the caller's promise, twice: of this function, and of `group`, which gets what was just unpacked.
    unsafe {
        in_groups(
            &[task.matrix],
            task.panels.clone(),
            task.rows.len(),
            |panels, base| {
                group(task, panels, base);
            },
        );
    }
}

/// Computes a part of a gated product: what would be the gate's and the other's outputs become tiles of the next activations.
///
/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn gated(part: &Part<'_>) {
    let matrices = [part.gated.gate, part.gated.up];
    // SAFETY: as in `run`.
    unsafe {
        in_groups(&matrices, part.panels.clone(), part.rows.len(), |panels, base| {
            gated_group(part, panels, base);
        });
    }
}

/// Unpacks panels of all `matrices`, as many as stay near, and calls `f` with those panels and where they lie: all of one
/// panel's tiles `[blocks]`, matrix after matrix, then the next panel.
///
/// # Safety
/// As [`run`]; the matrices have the same shape and hold quantised weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn in_groups(
    matrices: &[&Matrix],
    panels: Range<usize>,
    rows: usize,
    mut f: impl FnMut(Range<usize>, *const u8),
) {
    let bytes = matrices[0].k / BLOCK * TILE_BYTES;
    // Rows that are all read at once need no large groups: two panels stay nearer.
    let together = match rows <= 2 * TILE {
        true => 2,
        false => (GROUP_BYTES / bytes).clamp(2, 16) & !1,
    } / matrices.len();
    UNPACKED.with_borrow_mut(|unpacked| {
        for first in panels.clone().step_by(together) {
            let panels = first..panels.end.min(first + together);
            let lines = panels.len() * matrices.len() * bytes / LINE;
            if unpacked.len() < lines {
                unpacked.resize(lines, Line([0; LINE]));
            }
            let base: *mut u8 = unpacked.as_mut_ptr().cast();
            for (i, p) in panels.clone().enumerate() {
                for (m, matrix) in matrices.iter().enumerate() {
                    // SAFETY: the panel has a record for each block, its place in the buffer a tile.
                    unsafe {
                        let to = base.add((i * matrices.len() + m) * bytes);
                        with_kind!(
                            matrix.kind,
                            K => unpack::<K>(matrix.panel(p), matrix.post, to),
                            unreachable!("floats are not multiplied in bf16")
                        );
                    }
                }
            }
            f(panels, base);
        }
    });
    // SAFETY: the caller's promise.
    unsafe { release() };
}

/// Unpacks whole records to bf16 tiles.
///
/// # Safety
/// `to` lies on a line and has room for a tile a record.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn unpack<K: Fixed>(records: &[u8], post: f32, to: *mut u8) {
    let record = const { K::RECORD };
    let post = _mm512_set1_ps(post);
    let offset = _mm512_set1_epi32(record.offset);
    let byte = _mm512_set1_epi32(0xff);
    // Columns of the first source, then of the second, to pairs.
    let pairs: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: 64 bytes are there.
    let pairs = unsafe { _mm512_loadu_si512(pairs.as_ptr().cast()) };
    for (b, rec) in records.chunks_exact(record.bytes()).enumerate() {
        // SAFETY: the record has its codes and scales; the caller's promise.
        unsafe {
            let rec = rec.as_ptr();
            let tile = to.add(b * TILE_BYTES);
            for line in (0..record.bytes()).step_by(LINE) {
                _mm_prefetch::<_MM_HINT_T0>(rec.wrapping_add(AHEAD + line).cast());
            }
            let part = |part: usize| {
                let at = rec.add(record.scale_at(part));
                let scale = _mm512_mul_ps(load_f16(at), post);
                let min = if record.min {
                    _mm512_mul_ps(load_f16(at.add(2 * COLS)), post)
                } else {
                    _mm512_setzero_ps()
                };
                (scale, min)
            };
            let scales = [part(0), if record.halves { part(1) } else { part(0) }];
            macro_rules! group {
                ($g:literal) => {
                    let codes = load_codes::<K, $g>(rec);
                    let (scale, min) = scales[$g / 4];
                    let value = |code: __m512i| {
                        if record.min {
                            _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, min)
                        } else {
                            let code = _mm512_sub_epi32(code, offset);
                            _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale)
                        }
                    };
                    let values = [
                        value(_mm512_and_si512(codes, byte)),
                        value(_mm512_and_si512(_mm512_srli_epi32::<8>(codes), byte)),
                        value(_mm512_and_si512(_mm512_srli_epi32::<16>(codes), byte)),
                        value(_mm512_srli_epi32::<24>(codes)),
                    ];
                    for (i, pair) in values.as_chunks::<2>().0.iter().enumerate() {
                        let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(pair[1], pair[0]));
                        let line = tile.add((2 * $g + i) * LINE);
                        _mm512_store_si512(line.cast(), _mm512_permutexvar_epi16(pairs, both));
                    }
                };
            }
            groups!(group);
        }
    }
}

/// The first tile of `rows` in `acts`, and which tiles of all rows in bf16 they are.
fn tiles_of(cpu: Cpu, acts: &Acts, rows: &Range<usize>) -> (*const u8, Range<usize>) {
    let blocks = acts.blocks();
    let (x, first) = acts.bf16(cpu);
    assert!(rows.start >= first && (rows.start - first).is_multiple_of(TILE) && blocks > 0);
    let from = (rows.start - first) / TILE;
    let tiles = from..from + rows.len().div_ceil(TILE);
    (x[tiles.start * blocks..tiles.end * blocks].as_ptr().cast(), tiles)
}

/// All rows of the task against unpacked panels: two tiles of rows and two panels at a time, so that every loaded tile is used twice.
///
/// # Safety
/// As [`run`]; `base` has the tiles of all panels.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn group(task: &Task<'_>, panels: Range<usize>, base: *const u8) {
    let blocks = task.acts.blocks();
    let (x, tiles) = tiles_of(task.cpu, task.acts, &task.rows);
    let tiles = tiles.len();
    let rows = task.rows.len().min(TILE);
    // SAFETY: the caller's promise; a tile is at most 16 rows of 64 bytes.
    unsafe { configure(&shapes(rows)) };
    let mut sums = [Sums([[0.0; COLS]; TILE]); 4];
    for tile in (0..tiles).step_by(2) {
        for panel in (0..panels.len()).step_by(2) {
            let (t, p) = ((tiles - tile).min(2), (panels.len() - panel).min(2));
            let place = |i: usize| {
                (
                    task.rows.start + (tile + i / 2) * TILE,
                    panels.start + panel + i % 2,
                )
            };
            // SAFETY: tiles `tile .. tile + t` and panels `panel .. panel + p` are there, with `blocks` tiles each.
            unsafe {
                let a = x.add(tile * blocks * TILE_BYTES);
                let b = base.add(panel * blocks * TILE_BYTES);
                let step = blocks * TILE_BYTES;
                // A panel without a second one stands for both: its sums are computed twice and stored once.
                let next = if p == 2 { step } else { 0 };
                match t {
                    2 => {
                        let (y, _) = task.place(task.rows.start + tile * TILE, panels.start + panel);
                        products_2x2(
                            (a, a.add(step)),
                            (b, b.add(next)),
                            blocks,
                            (y.cast(), 4 * task.matrix.n),
                        );
                    }
                    _ => products_1x2(a, (b, b.add(next)), blocks),
                }
                for i in [0, 1, 2, 3] {
                    if i / 2 >= t || i % 2 >= p {
                        continue;
                    }
                    let (r, p) = place(i);
                    let (at, cols) = task.place(r, p);
                    if cols == COLS && r + rows <= task.rows.end {
                        store(i, at.cast(), 4 * task.matrix.n);
                        continue;
                    }
                    store(i, sums[i].0.as_mut_ptr().cast(), LINE);
                    for (r, sums) in (r..task.rows.end).zip(&sums[i].0) {
                        task.store(r, p, sums);
                    }
                }
            }
        }
    }
}

/// All rows of the part against unpacked panels of the gate and of the other matrix, two tiles of rows at a time. The sums go no further than
/// the first cache: what leaves it is bf16.
///
/// # Safety
/// As [`gated`]; `base` has the tiles of all panels, gate and other in turn.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn gated_group(part: &Part<'_>, panels: Range<usize>, base: *const u8) {
    let blocks = part.acts.blocks();
    let step = blocks * TILE_BYTES;
    let (x, tiles) = tiles_of(part.cpu, part.acts, &part.rows);
    let (first, tiles) = (tiles.start, tiles.len());
    let out_blocks = part.gated.gate.n / BLOCK;
    let rows = part.rows.len().min(TILE);
    // SAFETY: the caller's promise; a tile is at most 16 rows of 64 bytes.
    unsafe { configure(&shapes(rows)) };
    let zeros = Sums([[0.0; COLS]; TILE]);
    let (mut gate, mut up) = ([zeros; 2], [zeros; 2]);
    for tile in (0..tiles).step_by(2) {
        for (i, panel) in panels.clone().enumerate() {
            let pair = (tiles - tile).min(2);
            // SAFETY: tiles `tile .. tile + pair` and both panels are there, with `blocks` tiles each; the output has a tile of each of the
            // row tiles for two panels, and this part alone writes its half of it.
            unsafe {
                let a = x.add(tile * step);
                let b = base.add(2 * i * step);
                let b = (b, b.add(step));
                match pair {
                    2 => products_2x2((a, a.add(step)), b, blocks, (gate.as_mut_ptr().cast(), 0)),
                    _ => products_1x2(a, b, blocks),
                }
                for t in 0..pair {
                    store(2 * t, gate[t].0.as_mut_ptr().cast(), LINE);
                    store(2 * t + 1, up[t].0.as_mut_ptr().cast(), LINE);
                }
                for (t, (gate, up)) in gate.iter_mut().zip(&up).take(pair).enumerate() {
                    let (gate, up) = (&mut gate.0[..rows], &up.0[..rows]);
                    (part.gated.f)(part.cpu, gate.as_flattened_mut(), up.as_flattened());
                    let to = part.out.get().add((first + tile + t) * out_blocks + panel / 2);
                    let to: *mut u8 = to.cast::<u8>().add(panel % 2 * LINE / 2);
                    for (r, row) in gate.iter().enumerate() {
                        let values: __m256i =
                            std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(row.as_ptr())));
                        _mm256_storeu_si256(to.add(r * LINE).cast(), values);
                    }
                }
            }
        }
    }
}

/// `tmm0 .. tmm3`: sums, `[rows, 16]` f32, of the row tiles and panels 00, 01, 10, 11. `tmm4`, `tmm5`: activations. `tmm6`, `tmm7`: weights.
fn shapes(rows: usize) -> [TileShape; 8] {
    let of = |rows: usize| TileShape {
        rows: rows as u8,
        bytes: LINE as u16,
    };
    let (some, full) = (of(rows), of(TILE));
    [some, some, some, some, some, some, full, full]
}

/// Stores the sums of `tmm{i}`, `stride` bytes between rows.
///
/// # Safety
/// Tiles are configured as [`shapes`] says; 64 writable bytes for each row.
#[inline]
unsafe fn store(i: usize, to: *mut u8, stride: usize) {
    macro_rules! store {
        ($sums:tt) => {
            asm!(
                concat!("tilestored [{to} + {stride} * 1], ", $sums),
                to = in(reg) to,
                stride = in(reg) stride,
                options(nostack, preserves_flags),
            )
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match i {
            0 => store!("tmm0"),
            1 => store!("tmm1"),
            2 => store!("tmm2"),
            _ => store!("tmm3"),
        }
    }
}

/// Sums over `blocks` blocks of two row tiles and two panels. The lines that the sums will be stored
/// to, `stride` bytes from row to row, are asked for meanwhile: else the stores wait for them.
///
/// # Safety
/// Tiles are configured as [`shapes`] says; all blocks are there.
#[inline]
unsafe fn products_2x2(
    a: (*const u8, *const u8),
    b: (*const u8, *const u8),
    blocks: usize,
    (y, stride): (*mut u8, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a0} + {line} * 1]",
            "tileloadd tmm6, [{b0} + {line} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {line} * 1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {line} * 1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "prefetchw [{y0}]",
            "prefetchw [{y0} + 64]",
            "prefetchw [{y1}]",
            "prefetchw [{y1} + 64]",
            "add {y0}, {stride}",
            "add {y1}, {stride}",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            a0 = inout(reg) a.0 => _,
            a1 = inout(reg) a.1 => _,
            b0 = inout(reg) b.0 => _,
            b1 = inout(reg) b.1 => _,
            y0 = inout(reg) y => _,
            y1 = inout(reg) y.wrapping_add(TILE * stride) => _,
            stride = in(reg) stride,
            n = inout(reg) blocks => _,
            line = in(reg) LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        );
    }
}

/// As [`products_2x2`], of one row tile and two panels.
///
/// # Safety
/// As there.
#[inline]
unsafe fn products_1x2(a: *const u8, b: (*const u8, *const u8), blocks: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{a0} + {line} * 1]",
            "tileloadd tmm6, [{b0} + {line} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {line} * 1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a0}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            a0 = inout(reg) a => _,
            b0 = inout(reg) b.0 => _,
            b1 = inout(reg) b.1 => _,
            n = inout(reg) blocks => _,
            line = in(reg) LINE,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        );
    }
}
