//! The middle of a gated feed-forward block: two products with the same activations become the activations of the next one.

use std::ops::Range;

use super::acts::Tile;
use super::layout::BLOCK;
use super::{Acts, Matrix, Task, bf16_grain, matmul_first, meet_at_once, prepare, steps};
use crate::cpu::Cpu;
use crate::memory::Shared;
use crate::team::Team;

/// `gate = f(gate) * up`, element by element: [`silu_mul`](crate::ops::silu_mul), [`gelu_tanh_mul`](crate::ops::gelu_tanh_mul).
pub type Gate = fn(Cpu, &mut [f32], &[f32]);

/// What [`gated`] computes.
#[derive(Clone, Copy)]
pub struct Gated<'a> {
    /// The matrix whose product goes through `f`.
    pub gate: &'a Matrix,
    /// The matrix whose product that is multiplied with.
    pub up: &'a Matrix,
    /// The nonlinearity, with the multiplication.
    pub f: Gate,
    /// Whether all values are wanted in f32: to be looked at, or for a matrix that is not quantised.
    pub whole: bool,
}

impl Gated<'_> {
    /// Whether rows that meet weights in bf16 can stay in it.
    fn stays_in_bf16(&self) -> bool {
        let (gate, up) = (self.gate, self.up);
        !self.whole && gate.is_quantised() && up.is_quantised() && gate.n.is_multiple_of(BLOCK)
    }
}

/// A part of it in bf16: some rows, some panels of both matrices.
pub(super) struct Part<'a> {
    pub(super) cpu: Cpu,
    pub(super) gated: Gated<'a>,
    pub(super) acts: &'a Acts,
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
    /// `[tiles][gate.n / 32]`: this part alone writes its rows and panels of it.
    pub(super) out: Shared<Tile>,
}

/// `out = f(acts * gate^T) * (acts * up^T)`, with the rows of `acts` in int8 in the same places. Rows that meet weights in bf16 go from tile
/// to tile: their f32 values never leave the first cache, and the bits are those of the steps one by one. `buffers` are for all others.
///
/// Panics when the shapes of the matrices differ or are not those of `acts`.
pub fn gated(
    cpu: Cpu,
    team: &Team,
    acts: &mut Acts,
    what: Gated<'_>,
    buffers: &mut [Vec<f32>; 2],
    out: &mut Acts,
) {
    let (rows, n) = (acts.rows(), what.gate.n);
    for w in [what.gate, what.up] {
        assert_eq!(
            (w.n, w.k),
            (n, acts.k()),
            "{w:?}: another shape than its gate or activations"
        );
    }
    let int8_rows = acts.int8_rows(cpu);
    let fused = what.stays_in_bf16() && int8_rows < rows;
    let plain = if fused { int8_rows } else { rows };
    for y in buffers.iter_mut() {
        y.resize(plain * n, 0.0);
    }
    let [gate, up] = buffers;
    let (int8, bf16) = (0..int8_rows, int8_rows..rows);
    let (row_step, panel_step) = bf16_grain(team.threads(), bf16.len(), what.gate);
    let at_once = fused && meet_at_once(&int8, &bf16, row_step);
    if !at_once {
        matmul_first(cpu, team, acts, plain, &mut [(what.gate, gate), (what.up, up)]);
    }
    if fused {
        prepare(cpu, team, acts, rows, [what.gate, what.up].into_iter());
        let tiles = out.room(rows, n, int8_rows);
        let acts = &*acts;
        let beside =
            [(what.gate, &mut *gate), (what.up, &mut *up)].map(|(w, y)| (w, Shared::new(y.as_mut_ptr())));
        let jobs: Vec<_> = steps(bf16, row_step)
            .flat_map(|rows| {
                steps(0..what.gate.panels(), panel_step).map(move |panels| (rows.clone(), panels))
            })
            .map(|(rows, panels)| {
                let beside = beside.map(|(matrix, y)| Task {
                    cpu,
                    matrix,
                    acts,
                    rows: int8.clone(),
                    panels: panels.clone(),
                    y,
                });
                let part = Part {
                    cpu,
                    gated: what,
                    acts,
                    rows,
                    panels,
                    out: tiles,
                };
                (at_once.then_some(beside), part)
            })
            .collect();
        team.run(jobs.len(), &|j| {
            let (beside, part) = &jobs[j];
            beside.iter().flatten().for_each(super::run);
            run(part);
        });
    }
    let (gate, up) = (&*gate, &*up);
    let fill = |r: usize, row: &mut [f32]| {
        row.copy_from_slice(&gate[r * n..][..n]);
        (what.f)(cpu, row, &up[r * n..][..n]);
    };
    if fused {
        out.fill_front(team, int8_rows, &fill);
    } else {
        out.set_int8_rows(Some(int8_rows));
        out.fill(team, rows, n, &fill);
    }
}

fn run(part: &Part<'_>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: rows in bf16 exist on a `Cpu` with AVX-512, BF16 and bf16 tiles that this process may use.
    unsafe {
        super::tiles::gated(part);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("{} rows in bf16 without tiles", part.rows.len());
}
