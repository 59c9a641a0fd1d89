//! A step that panics: which of its sequences is to blame, and the others computed all the same.
//!
//! A step is taken back by not committing it. The model writes keys and values of a step only behind the committed length of each
//! sequence, into pages that the sequence owns alone, so computing the same rows again overwrites them; logits and buffers are thrown
//! away. Rows computed alone have the bits that they have in company. What cannot be taken back is what hooks have counted
//! ([`antefix_attention::hooks::Observer::may_repeat`]): such sequences fail with the step.

use std::panic::{AssertUnwindSafe, catch_unwind};

use antefix_models::decoder::{ForwardError, Input, Scratch};

use crate::engine::{Engine, Seq};
use crate::schedule::{Part, SeqId};

/// What is wanted of the model.
#[derive(Clone, Copy)]
pub(crate) enum Output {
    /// `[rows, vocab]`
    Logits,
    /// `[rows, d_model]`
    Hidden,
}

/// What came of the parts of a step.
#[derive(Default)]
pub(crate) struct Computed {
    /// Place among the running, part, and number of its rows in the output: in the order of the output.
    pub(crate) parts: Vec<(usize, Part, usize)>,
    /// Those that panicked, or could not be computed again after somebody did.
    pub(crate) panicked: Vec<SeqId>,
    /// Whether they ran together.
    pub(crate) in_one: bool,
}

impl Engine {
    /// Computes `parts` (place among the running, part) into `rows`, which it clears first. Nothing is committed.
    ///
    /// # Errors
    /// As [`antefix_models::decoder::Model::forward`].
    pub(crate) fn compute(
        &mut self,
        parts: &[(usize, Part)],
        output: Output,
        rows: &mut Vec<f32>,
    ) -> Result<Computed, ForwardError> {
        rows.clear();
        let wanted = |&(at, part): &(usize, Part)| (at, part, self.running[at].wanted(part.tokens));
        let all: Vec<(usize, Part, usize)> = parts.iter().map(wanted).collect();
        if let Some(ran) = self.try_compute(parts, output, rows) {
            ran?;
            return Ok(Computed {
                parts: all,
                panicked: Vec::new(),
                in_one: true,
            });
        }
        let mut computed = Computed::default();
        for (at, part, wanted) in all {
            // Alone it would panic again.
            let again = parts.len() > 1 && may_repeat(&self.running[at]);
            match again
                .then(|| self.try_compute(&[(at, part)], output, rows))
                .flatten()
            {
                Some(ran) => {
                    ran?;
                    computed.parts.push((at, part, wanted));
                }
                None => computed.panicked.push(part.id),
            }
        }
        Ok(computed)
    }

    /// Appends the output of `parts` to `rows`; `None` and nothing if that panicked.
    fn try_compute(
        &mut self,
        parts: &[(usize, Part)],
        output: Output,
        rows: &mut Vec<f32>,
    ) -> Option<Result<(), ForwardError>> {
        let before = rows.len();
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let inputs: Vec<Input<'_>> = parts
                .iter()
                .map(|(at, part)| self.running[*at].input(*part))
                .collect();
            match output {
                Output::Logits => self
                    .model
                    .forward(&mut self.pool, &inputs, &mut self.scratch, rows),
                Output::Hidden => self
                    .model
                    .hidden(&mut self.pool, &inputs, &mut self.scratch, rows),
            }
        }));
        if ran.is_err() {
            rows.truncate(before);
            self.scratch = Scratch::default();
        }
        ran.ok()
    }
}

fn may_repeat(seq: &Seq) -> bool {
    seq.job.hooks.as_ref().is_none_or(|hooks| hooks.may_repeat())
}
