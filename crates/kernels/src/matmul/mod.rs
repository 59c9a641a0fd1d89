//! Products of activations with quantised weights: `y[r, j] = sum_k x[r, k] * w[j, k]`.
//!
//! # The arithmetic contract
//! The bits of an output depend on its row of activations and its row of weights, and on nothing else: not on the number of rows,
//! on threads or on the CPU path. Per element, blocks of 32 along K ascending; `isum = sum (code - offset) * qx`, an exact i32; then
//! `acc = fma(f32(isum), dw * dx, acc)` and, for kinds with a minimum, `acc = fma(mw, sx, acc)` with `sx = dx * f32(sum qx)`. Formats
//! that scale 16 values do this for the first half of the block and then for the second. Weights kept as floats: one fma chain
//! over k ascending. At the end a power of two (see `Matrix::post`) undoes the scaling of the stored f16 scales.
//!
//! Rows that the caller sets apart ([`Acts::set_int8_rows`]) follow another contract on CPUs with bf16 tiles, that of `tiles.rs`: there, too,
//! the bits depend on the two rows alone.
//!
//! Activations are quantised symmetrically, [`Acts`] says how; `layout.rs` says how weights lie in memory.

mod acts;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod gated;
mod layout;
mod pack;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod stretch;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

pub use acts::Acts;
pub use gated::{Gate, Gated, gated};

use acts::Form;

use crate::cpu::{Cpu, Path};
use crate::memory::{Buffer, Shared};
use crate::quant::{Format, QuantError};
use crate::team::Team;
use layout::{COLS, Kind};

/// What a product is computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Quantised weights stay so and meet int8 activations; plain floats stay floats.
    #[default]
    Fast,
    /// Quantised weights become f32 (4 bytes each); all products in f32.
    F32,
}

/// Weights `[n, k]`, packed for the kernels.
pub struct Matrix {
    n: usize,
    k: usize,
    kind: Kind,
    panel_bytes: usize,
    len: usize,
    /// Power of two by which every output is multiplied: the inverse of the factor put into the stored scales.
    post: f32,
    buffer: Buffer,
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix({} x {}, {})", self.n, self.k, self.kind.name())
    }
}

impl Matrix {
    /// Packs `n` rows of `k` values; `bytes` is exactly what the file holds for them.
    ///
    /// # Errors
    /// When the shape is empty, `k` is not a whole number of blocks, `bytes` has the wrong length, or memory is short.
    pub fn pack(
        _cpu: Cpu,
        team: &Team,
        format: Format,
        bytes: &[u8],
        n: usize,
        k: usize,
        precision: Precision,
    ) -> Result<Matrix, QuantError> {
        pack::pack(team, format, bytes, n, k, precision)
    }

    /// Output columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Values summed per output.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.len
    }

    /// How the weights are packed, such as `U4Min`.
    pub fn kind_name(&self) -> &'static str {
        self.kind.name()
    }

    /// Whether the weights are codes and scales rather than floats.
    pub fn is_quantised(&self) -> bool {
        self.kind.record().is_some()
    }

    fn panels(&self) -> usize {
        self.n.div_ceil(COLS)
    }

    fn panel(&self, p: usize) -> &[u8] {
        self.panels_from(p, 1)
    }

    /// `count` panels from `first` on.
    fn panels_from(&self, first: usize, count: usize) -> &[u8] {
        assert!(first < self.panels() && count <= self.panels() - first);
        // SAFETY: the buffer holds `panels()` panels of `panel_bytes` bytes, initialised when packed.
        unsafe {
            std::slice::from_raw_parts(
                self.buffer.ptr().add(first * self.panel_bytes),
                count * self.panel_bytes,
            )
        }
    }
}

/// A part of one product: some rows of activations, some panels of a matrix.
pub(crate) struct Task<'a> {
    cpu: Cpu,
    matrix: &'a Matrix,
    acts: &'a Acts,
    /// All of them rows that are multiplied in bf16, or none.
    rows: Range<usize>,
    panels: Range<usize>,
    /// The whole `y: [rows, n]`; this task alone writes its rows and panels of it.
    y: Shared<f32>,
    /// A matrix and a panel of it that the thread of this task will probably want next.
    next: Option<(&'a Matrix, usize)>,
}

impl Task<'_> {
    /// Whether its rows meet the weights in bf16.
    fn in_bf16(&self) -> bool {
        self.matrix.kind.record().is_some() && self.rows.start >= self.acts.int8_rows(self.cpu)
    }

    /// Where row `r` of panel `p` goes, and how many of its columns exist: 1 to 16.
    #[inline]
    fn place(&self, r: usize, p: usize) -> (*mut f32, usize) {
        debug_assert!(self.rows.contains(&r) && self.panels.contains(&p));
        let n = self.matrix.n;
        // SAFETY: `y` has `acts.rows() * n` elements (`write_products`), `r < acts.rows()`, `p * COLS < n`.
        (
            unsafe { self.y.get().add(r * n + p * COLS) },
            (n - p * COLS).min(COLS),
        )
    }

    /// Writes the columns of panel `p` that exist into row `r`.
    #[inline]
    fn store(&self, r: usize, p: usize, values: &[f32; COLS]) {
        let (at, cols) = self.place(r, p);
        if cols == COLS {
            // A copy of known length needs no call.
            // SAFETY: 16 floats from `at` exist, and no other task has this row and panel.
            unsafe { at.cast::<[f32; COLS]>().write_unaligned(*values) };
        } else {
            // SAFETY: as above, with `cols` floats.
            unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), at, cols) };
        }
    }
}

/// `y = acts * w^T`: `y: [acts.rows(), w.n()]`, row-major.
///
/// Panics when `acts.k() != w.k()` or `y` has another length.
pub fn matmul(cpu: Cpu, team: &Team, acts: &mut Acts, w: &Matrix, y: &mut [f32]) {
    matmul_many(cpu, team, acts, &mut [(w, y)]);
}

/// Several products with the same activations, shared out to the team at once.
///
/// Panics like [`matmul`].
pub fn matmul_many(cpu: Cpu, team: &Team, acts: &mut Acts, products: &mut [(&Matrix, &mut [f32])]) {
    let rows = acts.rows();
    for (w, y) in products.iter() {
        assert_eq!(y.len(), rows * w.n, "{w:?}: output is not {rows} x {}", w.n);
    }
    let products: Vec<_> = products
        .iter_mut()
        .map(|(w, y)| (*w, Shared::new(y.as_mut_ptr())))
        .collect();
    write_products(cpu, team, acts, &products);
}

/// As [`matmul`], with the product appended to `y`.
///
/// Panics when `acts.k() != w.k()`.
pub fn matmul_append(cpu: Cpu, team: &Team, acts: &mut Acts, w: &Matrix, y: &mut Vec<f32>) {
    let (len, more) = (y.len(), acts.rows() * w.n);
    y.reserve(more);
    write_products(
        cpu,
        team,
        acts,
        &[(w, Shared::new(y.spare_capacity_mut().as_mut_ptr().cast()))],
    );
    // SAFETY: there is room for `more`, and every element of the product was written.
    unsafe { y.set_len(len + more) };
}

/// Writes every element of the products, each `[acts.rows(), n]`, for which the caller has room there.
fn write_products(cpu: Cpu, team: &Team, acts: &mut Acts, products: &[(&Matrix, Shared<f32>)]) {
    let rows = acts.rows();
    for (w, _) in products {
        assert_eq!(acts.k(), w.k, "{w:?}: activations have another k");
    }
    if rows == 0 {
        return;
    }
    prepare(cpu, team, acts, rows, products.iter().map(|(w, _)| *w));
    let int8_rows = acts.int8_rows(cpu).min(rows);
    let acts = &*acts;
    let mut jobs = Vec::new();
    for &(w, y) in products {
        let task = |rows, panels| Task {
            cpu,
            matrix: w,
            acts,
            rows,
            panels,
            y,
            next: None,
        };
        let (int8, bf16) = match w.is_quantised() {
            true => (0..int8_rows, int8_rows..rows),
            false => (0..rows, rows..rows),
        };
        let (row_step, panel_step) = bf16_grain(team.threads(), bf16.len(), w);
        if meet_at_once(&int8, &bf16, row_step) {
            jobs.extend(steps(0..w.panels(), panel_step).map(|panels| {
                (
                    task(int8.clone(), panels.clone()),
                    Some(task(bf16.clone(), panels)),
                )
            }));
            continue;
        }
        for (rows, (row_step, panel_step)) in [
            (int8.clone(), grain(team.threads(), int8.len(), w, 1)),
            (bf16, (row_step, panel_step)),
        ] {
            for rows in steps(rows, row_step) {
                jobs.extend(
                    steps(0..w.panels(), panel_step).map(|panels| (task(rows.clone(), panels), None)),
                );
            }
        }
    }
    for j in team.threads()..jobs.len() {
        let (task, _) = &jobs[j];
        jobs[j - team.threads()].0.next = Some((task.matrix, task.panels.start));
    }
    team.run(jobs.len(), &|j| {
        let (task, then) = &jobs[j];
        run(task);
        then.iter().for_each(run);
    });
}

/// Quantises and rounds what the first `rows` rows need to meet the matrices.
fn prepare<'a>(
    cpu: Cpu,
    team: &Team,
    acts: &mut Acts,
    rows: usize,
    matrices: impl Iterator<Item = &'a Matrix> + Clone,
) {
    assert!(
        matrices.clone().all(Matrix::is_quantised) || acts.x().len() >= rows * acts.k(),
        "only bf16 is kept of these activations"
    );
    if !matrices.clone().any(Matrix::is_quantised) {
        return;
    }
    let int8_rows = acts.int8_rows(cpu).min(rows);
    if int8_rows < rows {
        acts.round(cpu, team);
    }
    if int8_rows > 0 {
        acts.quantise(cpu, team, form_of(cpu, int8_rows, matrices));
    }
}

/// The form in which `rows` quantised rows meet the matrices.
fn form_of<'a>(cpu: Cpu, rows: usize, mut matrices: impl Iterator<Item = &'a Matrix>) -> Form {
    match cpu.path() {
        Path::Avx2 if rows > 1 && !cpu.avx_vnni() && matrices.any(|w| w.kind == Kind::I8) => Form::Wide,
        #[cfg(target_arch = "x86_64")]
        Path::Amx if rows >= amx::LEAST_ROWS => Form::Tiles,
        _ => Form::Rows,
    }
}

/// Whether rows of both kinds are few enough that one thread should let them meet the same panels one after the other: the weights then
/// come from memory once.
fn meet_at_once(int8: &Range<usize>, bf16: &Range<usize>, row_step: usize) -> bool {
    !int8.is_empty() && int8.len() <= MAX_ROWS && !bf16.is_empty() && bf16.len() <= row_step
}

/// Ranges of `step`, the last one shorter.
fn steps(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(step).map(move |at| at..end.min(at + step))
}

/// Most rows of a task: what its accumulators (16 f32 per row) may take of the first cache.
const MAX_ROWS: usize = 256;

/// Panels that the AMX path unpacks together (0.4 MB at 4,864 values a column, a part of the second cache): tasks of many rows have whole
/// groups of them.
const GROUP: usize = 4;

/// Rows and panels of a task that multiplies with `matrices` matrices of this shape: enough tasks that threads finish together, few enough
/// that handing them out costs nothing.
fn grain(threads: usize, rows: usize, w: &Matrix, matrices: usize) -> (usize, usize) {
    let rows = rows.max(1);
    if threads == 1 {
        return (MAX_ROWS, w.panels());
    }
    let want = 8 * threads;
    // Rows are split (in multiples of 16, at least 32) only when there are too few panels.
    let splits = want.div_ceil(w.panels()).min(rows.div_ceil(32)).max(1);
    let row_step = rows.div_ceil(splits).next_multiple_of(16).min(MAX_ROWS);
    // A task of less than about 2^18 multiplications is not worth a hand-over.
    let least = (1usize << 18).div_ceil(COLS * w.k * row_step.min(rows) * matrices);
    let panel_step = (w.panels() * splits).div_ceil(want).max(least);
    // As many for each thread: with few tasks, one more than that would be waited for.
    let tasks = w.panels().div_ceil(panel_step).next_multiple_of(threads);
    let panel_step = w.panels().div_ceil(tasks);
    let panel_step = if rows > COLS {
        panel_step.next_multiple_of(GROUP)
    } else {
        panel_step
    };
    (row_step, panel_step.min(w.panels()))
}

/// As [`grain`], for rows in bf16: unpacking a panel costs as much as 128 rows do, so all rows are in one task unless there are too few panels.
fn bf16_grain(threads: usize, rows: usize, w: &Matrix) -> (usize, usize) {
    let rows = rows.max(1);
    if threads == 1 {
        return (rows.next_multiple_of(acts::TILE), w.panels());
    }
    let want = 8 * threads;
    let splits = threads
        .div_ceil(w.panels().div_ceil(2))
        .min(rows.div_ceil(128))
        .max(1);
    let row_step = rows.div_ceil(splits).next_multiple_of(2 * acts::TILE);
    let least = (1usize << 18).div_ceil(COLS * w.k * row_step.min(rows));
    let panel_step = (w.panels() * splits)
        .div_ceil(want)
        .max(least)
        .next_multiple_of(2);
    (row_step, panel_step.min(w.panels()))
}

fn run(task: &Task<'_>) {
    let cpu = task.cpu;
    match cpu.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` of this path proves AVX-512 with BF16 and bf16 tiles this process may use.
        Path::Amx if task.in_bf16() => unsafe { tiles::run(task) },
        Path::Scalar => scalar::run(task),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` of this path proves AVX2, FMA and F16C, and AVX-VNNI if it says so.
        Path::Avx2 => unsafe {
            if cpu.avx_vnni() {
                avx2::run::<true>(task);
            } else {
                avx2::run::<false>(task);
            }
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` of this path proves AVX-512 F, BW, DQ, VL and VNNI.
        Path::Avx512 => unsafe { avx512::run(task) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` of this path proves AVX-512 and int8 tiles this process may use.
        Path::Amx => unsafe { amx::run(task) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => scalar::run(task),
    }
}
