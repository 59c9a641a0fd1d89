//! AMX int8: one tile product is a block of 32 (or half of one) for 16 rows and 16 columns.
//!
//! Both tiles are signed (`tdpbssd`): the offset is subtracted when a panel is unpacked. The i32 tile goes through memory to the same float
//! steps as on the VNNI path, so bits do not change between the two.
//!
//! What costs time (measured on Sapphire Rapids): storing a tile takes 16 cycles in which nothing else is issued, and stalls when the tile
//! was only just computed; near tile instructions 512-bit float operations run on one port of two. So products are a pipeline: with the
//! float step of product `i`, product `i + 1` is stored and `i + 3` begins, across the borders of tiles and panels.

use std::arch::asm;
#[allow(clippy::wildcard_imports)] // Dozens of intrinsics.
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::acts::TILE;
use super::avx512;
use super::layout::{BLOCK, CODES, COLS, Fixed, with_kind};
use super::stretch::unpack;
use super::{GROUP, Task};
use crate::amx::{TileShape, configure, release};

/// Fewer rows than this leave most of a tile empty; VNNI does them.
pub(super) const LEAST_ROWS: usize = 8;
/// A tile of sums, each row a line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[i32; COLS]; TILE]);

/// `tmm0`, `tmm3`: sums `[rows, 16]` i32. `tmm1`: activations `[rows, depth]` i8. `tmm2`: codes `[depth / 4][16 columns][4]`.
fn shapes(rows: usize, depth: usize) -> [TileShape; 8] {
    let shape = |rows: usize, bytes: usize| TileShape {
        rows: rows as u8,
        bytes: bytes as u16,
    };
    let sums = shape(rows, 4 * COLS);
    let none = shape(0, 0);
    [
        sums,
        shape(rows, depth),
        shape(depth / 4, 4 * COLS),
        sums,
        none,
        none,
        none,
        none,
    ]
}

/// Computes `x * codes` in `tmm0`, or `tmm3` when `odd`; shapes as configured, rows of `x` are `BLOCK` bytes apart.
///
/// # Safety
/// [`configure`] ran on this thread with [`shapes`] and [`release`] did not since; the pointers have the configured shapes.
#[inline]
unsafe fn product(odd: bool, x: *const i8, codes: *const u8) {
    macro_rules! product {
        ($sums:tt) => {
            asm!(
                concat!("tilezero ", $sums),
                "tileloadd tmm1, [{x} + {stride} * 1]",
                "tileloadd tmm2, [{codes} + {line} * 1]",
                concat!("tdpbssd ", $sums, ", tmm1, tmm2"),
                x = in(reg) x,
                stride = in(reg) BLOCK,
                codes = in(reg) codes,
                line = in(reg) 64usize,
                out($sums) _, out("tmm1") _, out("tmm2") _,
                options(nostack, preserves_flags, readonly),
            )
        };
    }
    // SAFETY: the caller's promise. No other code of this thread touches the tiles, so the sums live from one block to the next.
    unsafe {
        if odd {
            product!("tmm3");
        } else {
            product!("tmm0");
        }
    }
}

/// Stores the sums that [`product`] left for `odd`.
///
/// # Safety
/// As [`product`], which ran before.
#[inline]
unsafe fn store_sums(odd: bool, sums: &mut Sums) {
    macro_rules! store {
        ($sums:tt) => {
            asm!(
                concat!("tilestored [{to} + {line} * 1], ", $sums),
                to = in(reg) sums.0.as_mut_ptr(),
                line = in(reg) 64usize,
                out($sums) _,
                options(nostack, preserves_flags),
            )
        };
    }
    // SAFETY: the caller's promise; `sums` has 16 rows of 64 bytes.
    unsafe {
        if odd {
            store!("tmm3");
        } else {
            store!("tmm0");
        }
    }
}

/// A line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    /// Panels unpacked, kept from task to task: codes, then scales, then minima of each.
    static UNPACKED: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Computes a task. Quantised activations are in [`Form::Tiles`](super::acts::Form::Tiles) from [`LEAST_ROWS`] rows on.
///
/// # Safety
/// The CPU has AVX-512 with VNNI and AMX-INT8, and the process may use the tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn run(task: &Task<'_>) {
    if task.acts.int8_rows(task.cpu) < LEAST_ROWS || task.matrix.kind.record().is_none() {
        // SAFETY: a part of the caller's promise.
        return unsafe { avx512::run(task) };
    }
    UNPACKED.with_borrow_mut(|unpacked| {
        for first in task.panels.clone().step_by(GROUP) {
            let panels = first..task.panels.end.min(first + GROUP);
            // SAFETY: the caller's promise.
            unsafe {
                with_kind!(
                    task.matrix.kind,
                    K => if task.rows.len() <= 8 {
                        group::<K, 8>(task, panels, unpacked);
                    } else {
                        group::<K, TILE>(task, panels, unpacked);
                    },
                    unreachable!("floats went to AVX-512")
                );
            }
        }
    });
    // SAFETY: the caller's promise.
    unsafe { release() };
}

/// The weights that this thread unpacks next, asked for while it multiplies: unpacking would wait for memory, products don't need it.
struct Fetch {
    from: *const u8,
    lines: usize,
    /// Lines that each step asks for.
    pace: usize,
}

impl Fetch {
    /// In `steps` steps, the group from panel `first` on, or, when the task ends there, the first of the task that probably follows on
    /// this thread.
    fn over(steps: usize, task: &Task<'_>, first: usize) -> Self {
        let next = match first < task.panels.end {
            true => Some((task.matrix, first)),
            false => task.next,
        };
        let bytes = next.map_or(&[][..], |(matrix, first)| {
            matrix.panels_from(first, GROUP.min(matrix.panels() - first))
        });
        let lines = bytes.len() / 64;
        Self {
            from: bytes.as_ptr(),
            lines,
            pace: lines.div_ceil(steps),
        }
    }

    #[inline]
    fn step(&mut self) {
        for _ in 0..self.pace.min(self.lines) {
            // SAFETY: asking for memory reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.from.cast()) };
            self.from = self.from.wrapping_add(64);
        }
        self.lines = self.lines.saturating_sub(self.pace);
    }
}

/// All rows of the task, `R` to a tile, against a group of panels: tile by tile, so that the rows of a tile stay in the first cache and
/// outputs are written in runs of several lines.
///
/// # Safety
/// As [`run`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn group<K: Fixed, const R: usize>(task: &Task<'_>, panels: Range<usize>, unpacked: &mut Vec<Line>) {
    let (acts, parts) = (task.acts, const { K::RECORD.parts() });
    let blocks = acts.blocks();
    let (first, tiles) = (task.rows.start / TILE, task.rows.len().div_ceil(TILE));
    let slots = (first + tiles) * blocks * TILE;
    assert!(task.rows.start.is_multiple_of(TILE) && blocks > 0 && R <= TILE);
    assert!(
        slots <= acts.d.len() && slots * parts <= acts.sx[parts - 1].len() && slots * BLOCK <= acts.q().len()
    );
    // Lines of codes and of scales in a panel.
    let (codes, scales) = (blocks * CODES / 64, blocks * parts);
    let panel = codes + 2 * scales;
    if unpacked.len() < panels.len() * panel {
        unpacked.resize(panels.len() * panel, Line([0; 64]));
    }
    let base = unpacked.as_mut_ptr();
    let mut sums = [Sums([[0; COLS]; TILE]); 2];
    // SAFETY: an unpacked panel has `panel` lines, as the buffer has for each; tiles `first .. first + tiles` with all their blocks are
    // inside the activations, as just checked. The tiles are configured for this kind.
    unsafe {
        for (i, p) in panels.clone().enumerate() {
            let to = base.add(i * panel);
            let (scale, min) = (to.add(codes), to.add(codes + scales));
            unpack::<K, true>(task.matrix.panel(p), (to.cast(), scale.cast(), min.cast()));
        }
        configure(&shapes(R, BLOCK / parts));
        let post = _mm512_set1_ps(task.matrix.post);
        let q = acts.q().as_ptr().add(first * blocks * TILE * BLOCK);
        let mut ahead = Ahead {
            x: q,
            codes: base.cast_const().cast(),
            left: blocks,
            tile: 0,
            panel: 0,
            half: 0,
        };
        let shape = Shape {
            q,
            unpacked: base.cast_const().cast(),
            panel_bytes: 64 * panel,
            blocks,
            tiles,
            panels: panels.len(),
        };
        ahead.compute::<K>(false, &shape);
        ahead.compute::<K>(true, &shape);
        store_sums(false, &mut sums[0]);
        ahead.compute::<K>(false, &shape);
        let mut odd = false;
        let mut fetch = Fetch::over(tiles * panels.len() * blocks * parts, task, panels.end);
        for tile in first..first + tiles {
            let d = acts.d.as_ptr().add(tile * blocks * TILE);
            let sx = acts.sx[parts - 1].as_ptr().add(tile * blocks * parts * TILE);
            for (i, p) in panels.clone().enumerate() {
                let scale: *const f32 = base.add(i * panel + codes).cast();
                let min: *const f32 = base.add(i * panel + codes + scales).cast();
                let mut acc = [_mm512_setzero_ps(); R];
                for b in 0..blocks * parts {
                    store_sums(!odd, &mut sums[usize::from(!odd)]);
                    ahead.compute::<K>(!odd, &shape);
                    fetch.step();
                    let (d, sx) = (d.add(b / parts * TILE), sx.add(b * TILE));
                    let (scale, min) = (
                        _mm512_load_ps(scale.add(b * COLS)),
                        _mm512_load_ps(min.add(b * COLS)),
                    );
                    let sums = &sums[usize::from(odd)];
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let isum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.0[r].as_ptr().cast()));
                        let dw = _mm512_mul_ps(scale, _mm512_set1_ps(*d.add(r)));
                        *acc = _mm512_fmadd_ps(isum, dw, *acc);
                        if K::RECORD.min {
                            *acc = _mm512_fmadd_ps(min, _mm512_set1_ps(*sx.add(r)), *acc);
                        }
                    }
                    odd = !odd;
                }
                for (r, acc) in acc.into_iter().enumerate().take(task.rows.end - tile * TILE) {
                    avx512::store(task, tile * TILE + r, p, _mm512_mul_ps(acc, post));
                }
            }
        }
    }
}

/// What [`Ahead`] walks over.
struct Shape {
    /// Activations `[tiles][blocks][16 rows][32]`.
    q: *const i8,
    /// Unpacked panels; codes `[blocks][8 groups][16 columns][4]` come first in each.
    unpacked: *const u8,
    panel_bytes: usize,
    blocks: usize,
    tiles: usize,
    panels: usize,
}

/// The product that the pipeline computes next: tiles in order, for each all panels, for each the blocks, for each its parts.
struct Ahead {
    x: *const i8,
    codes: *const u8,
    /// Blocks left in the panel, this one included.
    left: usize,
    tile: usize,
    panel: usize,
    half: usize,
}

impl Ahead {
    /// Computes the next product, into the sums of `odd`; after the last one, the first again.
    ///
    /// # Safety
    /// As [`product`], for everything of the shape.
    #[inline]
    unsafe fn compute<K: Fixed>(&mut self, odd: bool, shape: &Shape) {
        // SAFETY: the caller's promise; the pointers are inside the shape and move on to its next product.
        unsafe {
            product(odd, self.x, self.codes);
            if K::RECORD.halves {
                // The halves of a row of activations lie side by side, those of the codes behind each other.
                self.half ^= 1;
                self.codes = self.codes.add(CODES / 2);
                if self.half == 1 {
                    self.x = self.x.add(BLOCK / 2);
                    return;
                }
                self.x = self.x.add(TILE * BLOCK - BLOCK / 2);
            } else {
                self.codes = self.codes.add(CODES);
                self.x = self.x.add(TILE * BLOCK);
            }
            self.left -= 1;
            if self.left == 0 {
                self.next_panel(shape);
            }
        }
    }

    /// # Safety
    /// As [`Self::compute`].
    #[cold]
    unsafe fn next_panel(&mut self, shape: &Shape) {
        self.left = shape.blocks;
        self.panel += 1;
        if self.panel == shape.panels {
            self.panel = 0;
            self.tile += 1;
            if self.tile == shape.tiles {
                self.tile = 0;
            }
        }
        // SAFETY: tile and panel are inside the shape.
        unsafe {
            self.x = shape.q.add(self.tile * shape.blocks * TILE * BLOCK);
            self.codes = shape.unpacked.add(self.panel * shape.panel_bytes);
        }
    }
}
