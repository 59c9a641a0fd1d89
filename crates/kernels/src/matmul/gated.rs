//! The middle of a gated feed-forward block: two products with the same activations become the activations of the next one.

use std::ops::Range;
use std::slice;

use super::acts::{Quantiser, Tile};
use super::layout::{BLOCK, COLS};
use super::{Acts, Matrix, Task, bf16_grain, form_of, grain, meet_at_once, prepare, steps};
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
    /// The quantised matrix that the result meets next. Without one, all of it is wanted in f32: to be looked at, or for other weights.
    pub next: Option<&'a Matrix>,
}

impl Gated<'_> {
    /// Whether rows that meet weights in bf16 can stay in it.
    fn stays_in_bf16(&self) -> bool {
        let (gate, up) = (self.gate, self.up);
        self.next.is_some() && gate.is_quantised() && up.is_quantised() && gate.n.is_multiple_of(BLOCK)
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

/// A part of it in f32: both products, then the nonlinearity while they are near, and the rounding for the next product.
struct Front<'a> {
    products: [Task<'a>; 2],
    f: Gate,
    quantiser: Option<&'a Quantiser>,
}

impl Front<'_> {
    fn run(&self) {
        let [gate, up] = &self.products;
        super::run(gate);
        super::run(up);
        let n = gate.matrix.n;
        let (first, last) = (gate.panels.start * COLS, n.min(gate.panels.end * COLS));
        for r in gate.rows.clone() {
            let at = r * n + first;
            // SAFETY: both have `[rows, n]` values, which the products have just written; nobody else has these rows and columns.
            let (gate, up) = unsafe {
                (
                    slice::from_raw_parts_mut(gate.y.get().add(at), last - first),
                    slice::from_raw_parts(up.y.get().add(at), last - first),
                )
            };
            (self.f)(self.products[0].cpu, gate, up);
        }
        if let Some(quantiser) = self.quantiser {
            let rows = quantiser.whole_tiles(gate.rows.clone());
            quantiser.run(gate.cpu, rows, first / BLOCK..last / BLOCK);
        }
    }
}

/// `out = f(acts * gate^T) * (acts * up^T)`, with the rows of `acts` in int8 in the same places. Values are changed and rounded where they
/// were computed, and those of rows that meet weights in bf16 never leave the first cache; the bits are those of the steps one by one.
/// `buffer` is for values in between.
///
/// Panics when the shapes of the matrices differ or are not those of `acts`.
pub fn gated(cpu: Cpu, team: &Team, acts: &mut Acts, what: Gated<'_>, buffer: &mut Vec<f32>, out: &mut Acts) {
    let (rows, n) = (acts.rows(), what.gate.n);
    for w in [what.gate, what.up] {
        assert_eq!(
            (w.n, w.k),
            (n, acts.k()),
            "{w:?}: another shape than its gate or activations"
        );
    }
    if rows == 0 {
        return out.expect(0, n, 0);
    }
    let int8_rows = acts.int8_rows(cpu);
    let (int8, bf16) = (0..int8_rows, int8_rows..rows);
    prepare(cpu, team, acts, rows, [what.gate, what.up].into_iter());
    let acts = &*acts;
    let tiles = (what.stays_in_bf16() && !bf16.is_empty()).then(|| out.room(rows, n, int8_rows));
    let plain = if tiles.is_some() { int8_rows } else { rows };
    let y = out.front(plain, n);
    if tiles.is_none() {
        out.expect(rows, n, int8_rows);
    }
    buffer.resize(plain * n, 0.0);
    let beside = Shared::new(buffer.as_mut_ptr());
    let quantiser = what
        .next
        .filter(|_| !int8.is_empty() && n.is_multiple_of(BLOCK))
        .map(|next| out.quantiser(cpu, form_of(cpu, int8_rows, std::iter::once(next))));
    let front = |rows: &Range<usize>, panels: Range<usize>| {
        let product = |matrix, y, next| Task {
            cpu,
            matrix,
            acts,
            rows: rows.clone(),
            panels: panels.clone(),
            y,
            next,
        };
        Front {
            products: [
                product(what.gate, y, Some((what.up, panels.start))),
                product(what.up, beside, None),
            ],
            f: what.f,
            quantiser: (rows.start < int8_rows).then_some(quantiser.as_ref()).flatten(),
        }
    };
    let all = 0..what.gate.panels();
    let mut jobs: Vec<(Option<Front<'_>>, Option<Part<'_>>)> = Vec::new();
    let (row_step, panel_step) = bf16_grain(team.threads(), bf16.len(), what.gate);
    let at_once = tiles.is_some() && meet_at_once(&int8, &bf16, row_step);
    let mut fronts = |rows: &Range<usize>, (row_step, panel_step): (usize, usize)| {
        // Whole blocks of the next product.
        for panels in steps(all.clone(), panel_step.next_multiple_of(2)) {
            jobs.extend(steps(rows.clone(), row_step).map(|rows| (Some(front(&rows, panels.clone())), None)));
        }
    };
    if !at_once {
        fronts(&int8, grain(team.threads(), int8.len(), what.gate, 2));
    }
    match tiles {
        None => fronts(&bf16, (row_step, panel_step)),
        Some(out) => jobs.extend(steps(bf16, row_step).flat_map(|rows| {
            let (front, int8) = (&front, &int8);
            steps(all.clone(), panel_step).map(move |panels| {
                let part = Part {
                    cpu,
                    gated: what,
                    acts,
                    rows: rows.clone(),
                    panels: panels.clone(),
                    out,
                };
                (at_once.then(|| front(int8, panels)), Some(part))
            })
        })),
    }
    for j in team.threads()..jobs.len() {
        let next = jobs[j].0.as_ref().map(|front| front.products[0].panels.start);
        if let (Some(before), Some(panel)) = (&mut jobs[j - team.threads()].0, next) {
            before.products[1].next = Some((what.gate, panel));
        }
    }
    team.run(jobs.len(), &|j| {
        let (front, part) = &jobs[j];
        front.iter().for_each(Front::run);
        part.iter().for_each(run);
    });
    drop(jobs);
    if let Some(quantiser) = quantiser {
        out.has_quantised(&quantiser);
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
