//! The plans that a method makes of a text, while the text is attended densely: what each would have kept.

use std::sync::Arc;

use antefix_attention::method::Program;
use antefix_attention::sparse::{Planned, Planning};
use antefix_engine::{EngineError, Session};
use antefix_models::decoder::Model;

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
    let none = || PlansError::None {
        method: program.name(),
    };
    let planner = program.planner().ok_or_else(none)?;
    if tokens.is_empty() {
        return Err(PlansError::Empty);
    }
    let planning = Planning::new(Some(Arc::clone(planner)), None, usize::MAX).watching(rows);
    let planning = Arc::new(planning);
    let mut session = Session::new(Arc::clone(model), tokens.len(), CHUNK);
    session.plan(Some(Arc::clone(&planning)));
    session.feed(tokens, 0, &mut Vec::new())?;
    let mut plans = planning.take_plans();
    plans.sort_by_key(|p| (p.layer, p.queries.start));
    Ok(plans)
}
