//! Raw logits of a prompt, for comparison with other implementations.

use std::sync::Arc;

use antefix_attention::hooks::Observer;
use antefix_attention::method::Program;
use antefix_engine::{EngineError, Session, argmax, log_softmax_at};
use antefix_models::decoder::Model;
use serde::Serialize;

/// Rows whose logits are held at once.
const ROWS: usize = 64;

/// A token and its raw logit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TopLogit {
    /// Token id.
    pub id: u32,
    /// Before any sampling.
    pub logit: f32,
}

/// The most likely next token after a position.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Best {
    /// Position of the last token read.
    pub pos: usize,
    /// Token id.
    pub id: u32,
    /// Natural log of its probability.
    pub logprob: f32,
}

/// Logits after the last of `tokens`, `[vocab]`.
///
/// # Errors
/// When the model fails.
pub fn last(model: &Arc<Model>, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
    last_under(model, tokens, None, None)
}

/// The same under methods, and with hooks, which take the place of those that the methods have.
///
/// # Errors
/// When the model fails, or the methods work on prompts and answers only.
pub fn last_under(
    model: &Arc<Model>,
    tokens: &[u32],
    program: Option<&Program>,
    hooks: Option<Arc<Observer>>,
) -> Result<Vec<f32>, EngineError> {
    let mut logits = Vec::new();
    let mut session = Session::new(Arc::clone(model), tokens.len(), 512);
    if let Some(program) = program {
        session.run_under(program, tokens.len())?;
    }
    if hooks.is_some() {
        session.observe(hooks);
    }
    session.feed(tokens, 1, &mut logits)?;
    Ok(logits)
}

/// The `n` largest logits, largest first, ties to the lower id.
pub fn top(logits: &[f32], n: usize) -> Vec<TopLogit> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    ids.truncate(n);
    ids.into_iter()
        .map(|id| TopLogit {
            id,
            logit: logits[id as usize],
        })
        .collect()
}

/// Calls `f(position, logits)` for every position of `tokens`.
///
/// # Errors
/// When the model fails.
pub fn each(model: &Arc<Model>, tokens: &[u32], mut f: impl FnMut(usize, &[f32])) -> Result<(), EngineError> {
    let mut session = Session::new(Arc::clone(model), tokens.len(), 512);
    let mut logits = Vec::new();
    for (i, chunk) in tokens.chunks(ROWS).enumerate() {
        logits.clear();
        session.feed(chunk, chunk.len(), &mut logits)?;
        for (r, row) in logits.chunks_exact(model.spec().vocab).enumerate() {
            f(i * ROWS + r, row);
        }
    }
    Ok(())
}

/// The most likely next token at every position.
///
/// # Errors
/// When the model fails.
pub fn all(model: &Arc<Model>, tokens: &[u32]) -> Result<Vec<Best>, EngineError> {
    let mut out = Vec::with_capacity(tokens.len());
    each(model, tokens, |pos, row| {
        let id = argmax(row);
        out.push(Best {
            pos,
            id,
            logprob: log_softmax_at(row, id),
        });
    })?;
    Ok(out)
}
