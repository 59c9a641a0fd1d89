//! The calibration at work on one sequence: a hook at the heads' outputs.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use antefix_attention::hooks::{At, Hook, Site, fingerprint};
use antefix_attention::readout::{AttentionView, Columns};
use antefix_state::PAGE_ROWS;

use super::sinks::{Rule, hand_on};

/// Rows between two looks at the means: sinks are found anew at every multiple.
pub const BLOCK: u32 = 64;

/// Which means decide about a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Those of the rows before its block of 64: no row depends on later ones, nor on how the prompt was cut into steps.
    Causal,
    /// Those of the whole prompt, as in the paper, for prompts that are computed in one step; behind the prompt, and for prompts that
    /// come in pieces, as [`Mode::Causal`].
    TwoPass,
}

/// What is calibrated, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Query heads of each layer, ascending.
    pub heads: Vec<Vec<usize>>,
    /// What is a sink.
    pub rule: Rule,
    /// Part of a sink's weight that it keeps, 0 to 1. Above 1 it gains instead: the control experiment.
    pub beta: f32,
    /// Which means decide.
    pub mode: Mode,
}

impl Calibration {
    /// Whether it changes nothing whatever the text.
    pub fn is_neutral(&self) -> bool {
        self.beta == 1.0 || self.heads.iter().all(Vec::is_empty)
    }

    /// Names the change.
    pub fn fingerprint(&self) -> u64 {
        fingerprint(format!("act {self:?}").as_bytes())
    }
}

/// What is known of one head of one sequence.
#[derive(Debug, Default)]
struct HeadState {
    columns: Columns,
    rows: usize,
    sinks: Vec<u32>,
}

/// A calibration that follows one sequence.
#[derive(Debug)]
pub struct Act {
    calibration: Calibration,
    states: BTreeMap<(usize, usize), Mutex<HeadState>>,
}

impl Act {
    /// For a sequence of which nothing is computed yet.
    pub fn new(calibration: Calibration) -> Self {
        let heads = calibration.heads.iter().enumerate();
        let pairs = heads.flat_map(|(layer, heads)| heads.iter().map(move |&h| (layer, h)));
        Self {
            states: pairs.map(|p| (p, Mutex::default())).collect(),
            calibration,
        }
    }

    /// The sinks of a head as they are now.
    pub fn sinks(&self, layer: usize, head: usize) -> Vec<u32> {
        self.states
            .get(&(layer, head))
            .map_or_else(Vec::new, |s| lock(s).sinks.clone())
    }

    /// Corrects the outputs of `head` in all rows of the step; `z` are these rows, `[rows][D]`.
    fn head(&self, view: &AttentionView<'_>, head: usize, prompt: u32, z: &mut [Vec<f32>]) {
        let Some(state) = self.states.get(&(view.layer, head)) else {
            return;
        };
        let mut state = lock(state);
        let Calibration { rule, beta, mode, .. } = &self.calibration;
        let window = view.geometry.window;
        if view.pos0 == view.base {
            // The sequence begins, or begins again.
            *state = HeadState::default();
        }
        let rows: Vec<usize> = (0..view.rows()).collect();
        let in_one_step = view.pos0 == view.base && view.pos0 + rows.len() as u32 >= prompt;
        let whole = *mode == Mode::TwoPass && in_one_step;
        if whole {
            view.each_row(head, &rows, &mut |_, row| state.columns.add(&row));
            state.rows = rows.len();
            state.sinks = rule.sinks(&state.columns, state.rows, window);
        }
        let value = values(view, head);
        view.each_row(head, &rows, &mut |r, row| {
            if !whole {
                // Step 3.5, mode A: sinks are found anew at fixed positions, out of the rows before them.
                if row.pos.is_multiple_of(BLOCK) && state.rows > 0 {
                    state.sinks = rule.sinks(&state.columns, state.rows, window);
                }
                state.columns.add(&row);
                state.rows += 1;
            }
            hand_on(&state.sinks, *beta, |j| row.at(j), &value, &mut z[r]);
        });
    }
}

/// Values of the keys that `head` reads, by position and dimension.
fn values<'a>(view: &AttentionView<'a>, head: usize) -> impl Fn(u32, usize) -> f32 + 'a {
    let (geometry, pool, base) = (view.geometry, view.pool, view.base);
    let pages = view
        .kv
        .pages(view.layer, head / (geometry.heads / geometry.kv_heads));
    move |pos, d| {
        let row = (pos - base) as usize;
        pool.page(pages[row / PAGE_ROWS])
            .value(geometry.dim, row % PAGE_ROWS, d)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hook for Act {
    fn wants(&self, layer: usize) -> u32 {
        let heads = self.calibration.heads.get(layer).is_some_and(|h| !h.is_empty());
        if heads && self.calibration.beta != 1.0 {
            Site::Z.bit()
        } else {
            0
        }
    }

    fn fingerprint(&self) -> Option<u64> {
        (!self.calibration.is_neutral()).then(|| self.calibration.fingerprint())
    }

    fn at(&mut self, at: &At<'_>, z: &mut [f32]) {
        let Some(view) = &at.attention else { return };
        let dim = view.geometry.dim;
        let heads = &self.calibration.heads[at.layer];
        let cells = |head: usize, r: usize| r * at.width + head * dim..r * at.width + (head + 1) * dim;
        let outputs: Vec<Mutex<Vec<Vec<f32>>>> = heads
            .iter()
            .map(|&h| Mutex::new((0..at.rows).map(|r| z[cells(h, r)].to_vec()).collect()))
            .collect();
        view.run.1.run(heads.len(), &|i| {
            self.head(view, heads[i], at.prompt, &mut lock(&outputs[i]));
        });
        for (&head, rows) in heads.iter().zip(outputs) {
            let rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
            for (r, row) in rows.iter().enumerate() {
                z[cells(head, r)].copy_from_slice(row);
            }
        }
    }
}
