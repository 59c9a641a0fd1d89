//! The plans that a method makes of a text, while the text is attended densely: what each would have kept.

use std::sync::Arc;

use antefix_attention::method::Program;
use antefix_attention::sparse::{Planned, Planning};
use antefix_engine::{EngineError, Session};
use antefix_models::decoder::Model;
use antefix_state::plan::{Cover, Unit, causal_pairs};

/// Rows of a step; stretches of a plan may make it longer.
const CHUNK: usize = 512;

/// Why there are no plans.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlansError {
    /// A method that plans no prompts.
    #[error(
        "`{method}` plans no prompts\nhint: choose a method of the axis `prefill`; `antefix methods` lists them"
    )]
    None {
        /// The methods.
        method: String,
    },
    /// Nothing to plan.
    #[error("the text has no tokens")]
    Empty,
    /// The model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Plans `tokens` under `program`, and measures the recall of each plan on `rows` rows of its stretch: with the states of dense attention,
/// so that errors do not add up over the layers.
///
/// # Errors
/// When `program` plans no prompts, or the model fails.
pub fn plans(
    model: &Arc<Model>,
    program: &Program,
    tokens: &[u32],
    rows: usize,
) -> Result<Vec<Planned>, PlansError> {
    planned(model, program, tokens, |planning| planning.watching(rows))
}

/// The plans that `program` makes of `tokens` while they are executed: layers read what planned layers wrote. Nothing is measured.
///
/// # Errors
/// As [`plans`].
pub fn live_plans(model: &Arc<Model>, program: &Program, tokens: &[u32]) -> Result<Vec<Planned>, PlansError> {
    planned(model, program, tokens, Planning::recording)
}

fn planned(
    model: &Arc<Model>,
    program: &Program,
    tokens: &[u32],
    record: impl FnOnce(Planning) -> Planning,
) -> Result<Vec<Planned>, PlansError> {
    let none = || PlansError::None {
        method: program.name(),
    };
    let planner = program.planner().ok_or_else(none)?;
    if tokens.is_empty() {
        return Err(PlansError::Empty);
    }
    let planning = Planning::new(Some(Arc::clone(planner)), None, usize::MAX);
    let planning = Arc::new(record(planning));
    let mut session = Session::new(Arc::clone(model), tokens.len(), CHUNK);
    session.plan(Some(Arc::clone(&planning)));
    session.feed(tokens, 0, &mut Vec::new())?;
    let mut plans = planning.take_plans();
    plans.sort_by_key(|p| (p.layer, p.queries.start));
    Ok(plans)
}

/// The density of what each query head reads, `[layers, heads]`: kept pairs over causal ones, not a number where nothing is planned. `group`
/// query heads share keys.
pub fn densities(plans: &[Planned], layers: usize, heads: usize, group: usize) -> Vec<f64> {
    let mut pairs = vec![(0u64, 0u64); layers * heads];
    for planned in plans.iter().filter(|p| p.layer < layers) {
        let all = causal_pairs(planned.queries.clone());
        for head in 0..heads {
            let cover = match planned.plan.unit {
                Unit::QueryHead => planned.plan.units.get(head),
                Unit::KvGroup => planned.plan.units.get(head / group),
            };
            let kept = match cover {
                Some(Cover::Sparse(rows)) => rows.pairs(planned.queries.clone()),
                _ => all,
            };
            let sum = &mut pairs[planned.layer * heads + head];
            *sum = (sum.0 + kept, sum.1 + all);
        }
    }
    pairs
        .into_iter()
        .map(|(kept, all)| kept as f64 / all as f64)
        .collect()
}

#[cfg(test)]
mod tests {
    use antefix_state::plan::{Plan, Scope};

    use super::*;

    #[test]
    fn a_head_has_the_density_of_its_cover_over_all_stretches() {
        let queries = 0..64u32;
        let window = Cover::a_shape(16, queries.clone(), 0, 0);
        let planned = |layer, unit, units| Planned {
            layer,
            queries: queries.clone(),
            plan: Plan {
                unit,
                scope: Scope::Causal,
                units,
            },
            recall: None,
        };
        let plans = [
            planned(0, Unit::KvGroup, vec![Cover::Dense, window.clone()]),
            planned(
                2,
                Unit::QueryHead,
                vec![window.clone(), Cover::Dense, window.clone(), window],
            ),
        ];
        let diagonal = 4.0 * (16.0 * 17.0 / 2.0) / (64.0 * 65.0 / 2.0);
        let got = densities(&plans, 3, 4, 2);
        assert_eq!(got[..4], [1.0, 1.0, diagonal, diagonal]);
        assert!(got[4..8].iter().all(|d| d.is_nan()));
        assert_eq!(got[8..], [diagonal, 1.0, diagonal, diagonal]);
    }
}
