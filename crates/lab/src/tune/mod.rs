//! Settings of a sparse method that meet a target on somebody's own prompts: searched on most of them, verified on the others.

mod measure;
mod search;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use antefix_attention::method::{Card, Dial, Knobs, Method, Profiles, RawChoice, Value};
use antefix_models::decoder::Model;

pub use crate::panel::Closeness;
pub use measure::{COMPARED, Judge, MeasureError, Verdict};
pub use search::{Bench, Figures, Point, Target, search};

/// Settings behind the best that are verified if that one fails: each keeps more than the one before, or less under a budget.
const SECOND_TRIES: usize = 3;

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TuneError {
    /// Nothing left to verify with.
    #[error(
        "{0} prompts are too few: some are searched with, others verify\nhint: two or more; a long text can be cut in two"
    )]
    Few(usize),
    /// A prompt that says nothing.
    #[error("prompt {index} has {tokens} tokens\nhint: at least {least}")]
    Short {
        /// Counted from 1.
        index: usize,
        /// Its tokens.
        tokens: usize,
        /// Tokens that are needed.
        least: usize,
    },
    /// No settings meet the target on the prompts that were searched with.
    #[error(
        "no setting of `{method}` meets the target on the prompts that were searched with\nhint: an easier target, or other knobs (--knob)"
    )]
    Unmet {
        /// The method.
        method: &'static str,
    },
    /// Settings meet it on those, but not on the others.
    #[error(
        "the settings that meet the target on the prompts that were searched with miss it on those that were held out\nhint: more prompts, or an \
         easier target"
    )]
    Unverified,
    /// Settings cannot be measured.
    #[error(transparent)]
    Measure(#[from] MeasureError),
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// What must hold.
    pub target: Target,
    /// The knobs that are changed; one or two.
    pub dials: Vec<Dial>,
    /// All others.
    pub start: Knobs,
    /// Share of the prompts that verify, at least one.
    pub held_out: f64,
    /// How closely recall is looked at.
    pub closeness: Closeness,
}

/// Something that was tried.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    /// `coarse`, `fine`, `distance` or `held-out`.
    pub stage: &'static str,
    /// The settings.
    pub knobs: Knobs,
    /// Of the search: worst recall and distance, mean density; held out: the means.
    pub figures: Figures,
    /// Share of positions with the same most likely token, of those that were held out.
    pub top1: Option<f64>,
}

/// Settings that meet the target.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// The settings.
    pub knobs: Knobs,
    /// What they do on the prompts that were held out.
    pub verdict: Verdict,
    /// How many prompts those are.
    pub held_out: usize,
}

/// Least tokens of a prompt.
pub const SHORTEST: usize = 64;

/// Searches the settings of `method` on `prompts` (tokens each). `told` hears of everything that is tried, `computed` of every prompt that is
/// computed. The same prompts and seed, the same settings.
///
/// # Errors
/// When nothing meets the target, there are too few prompts, or the model fails.
pub fn tune(
    (model, method): (&Arc<Model>, &'static dyn Method),
    prompts: &[Vec<u32>],
    task: &Task,
    (profiles, computed): (&Profiles, &dyn Fn()),
    told: &mut dyn FnMut(&Tried),
) -> Result<Tuned, TuneError> {
    if prompts.len() < 2 {
        return Err(TuneError::Few(prompts.len()));
    }
    if let Some(i) = prompts.iter().position(|p| p.len() < SHORTEST) {
        return Err(TuneError::Short {
            index: i + 1,
            tokens: prompts[i].len(),
            least: SHORTEST,
        });
    }
    let mut shuffled = prompts.to_vec();
    fastrand::Rng::with_seed(task.closeness.seed).shuffle(&mut shuffled);
    let held = (task.held_out * prompts.len() as f64).round() as usize;
    let held = held.clamp(1, prompts.len() - 1);
    let others = shuffled.split_off(prompts.len() - held);
    let judge = |prompts| Judge::new(model, method, prompts, task.closeness, (profiles, computed));

    let mut heard = |stage: &'static str, point: &Point| {
        told(&Tried {
            stage,
            knobs: point.knobs.clone(),
            figures: point.figures,
            top1: None,
        });
    };
    let met = search(
        &mut judge(shuffled),
        &task.start,
        &task.dials,
        task.target,
        &mut heard,
    )?;
    if met.is_empty() {
        let method = method.card().name;
        return Err(TuneError::Unmet { method });
    }
    let mut other = judge(others);
    for point in met.iter().take(1 + SECOND_TRIES) {
        let verdict = other.verdict(&point.knobs)?;
        told(&Tried {
            stage: "held-out",
            knobs: point.knobs.clone(),
            figures: verdict.figures,
            top1: Some(verdict.top1),
        });
        if task.target.met(&verdict.figures) {
            return Ok(Tuned {
                knobs: point.knobs.clone(),
                verdict,
                held_out: held,
            });
        }
    }
    Err(TuneError::Unverified)
}

/// Name and settings as people would write them: those that are not the card's defaults.
pub fn written(knobs: &Knobs) -> RawChoice {
    let card: &'static Card = knobs.card();
    let other = |(name, value): &(&'static str, &Value)| {
        card.knob(name)
            .is_none_or(|knob| Value::from(knob.default) != **value)
    };
    let own = knobs.iter().filter(other);
    RawChoice {
        name: card.name.to_string(),
        knobs: own
            .map(|(name, value)| (name.to_string(), value.clone()))
            .collect(),
    }
}

/// The lengths that prompts of these lengths stand for: from the power of two at or below the shortest to the one above the longest.
pub fn band(lengths: impl Iterator<Item = usize> + Clone) -> (usize, usize) {
    let (shortest, longest) = (lengths.clone().min().unwrap_or(1), lengths.max().unwrap_or(1));
    let below = |n: usize| 1 << n.max(1).ilog2();
    (below(shortest), below(longest) * 2)
}
