//! Perplexity with llama-perplexity's windowing: windows of `ctx` tokens, each starting with the begin-of-text token where the
//! model has one, the second half of each window scored.

use std::sync::Arc;

use antefix_attention::method::Program;
use antefix_engine::{EngineError, NotForTexts, Session, log_softmax_at};
use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;
use serde::Serialize;

/// Rows whose logits are held at once: a vocabulary of 262,144 makes 64 MiB of them.
const ROWS: usize = 64;

/// The measured perplexity.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Perplexity {
    /// `exp(nll)`.
    pub ppl: f64,
    /// Mean negative log-likelihood in nats.
    pub nll: f64,
    /// Scored tokens.
    pub tokens: usize,
}

/// Why there is no perplexity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PerplexityError {
    /// Too little text.
    #[error(
        "the text has {tokens} tokens, one window needs {ctx}\nhint: give a longer text or a smaller --ctx"
    )]
    Short {
        /// Tokens of the text.
        tokens: usize,
        /// Window.
        ctx: usize,
    },
    /// Methods that score no texts.
    #[error(transparent)]
    Method(#[from] NotForTexts),
    /// The model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Scores `tokens` (with the begin-of-text token at the start, if the model uses one) in windows of `ctx`, under `program`.
///
/// `progress` hears the number of finished windows, of all windows, and the perplexity so far.
///
/// # Errors
/// When not even one window fits or the model fails.
pub fn perplexity(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    tokens: &[u32],
    ctx: usize,
    program: Option<&Program>,
    mut progress: impl FnMut(usize, usize, f64),
) -> Result<Perplexity, PerplexityError> {
    let windows = tokens.len() / ctx.max(2);
    if windows == 0 {
        return Err(PerplexityError::Short {
            tokens: tokens.len(),
            ctx,
        });
    }
    let (first, vocab) = (ctx / 2, model.spec().vocab);
    let (mut nll, mut count) = (0.0f64, 0usize);
    let mut session = Session::new(Arc::clone(model), ctx, 512);
    if let Some(program) = program {
        session.run_under(program, ctx)?;
    }
    let mut logits = Vec::new();
    for w in 0..windows {
        let mut window = tokens[w * ctx..(w + 1) * ctx].to_vec();
        if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.add_bos()) {
            window[0] = bos;
        }
        session.truncate(0);
        session.feed(&window[..first], 0, &mut logits)?;
        // The last token of a window is predicted, never a predictor.
        for from in (first..ctx - 1).step_by(ROWS) {
            let to = (from + ROWS).min(ctx - 1);
            logits.clear();
            session.feed(&window[from..to], to - from, &mut logits)?;
            for (row, &next) in logits.chunks_exact(vocab).zip(&window[from + 1..]) {
                nll -= f64::from(log_softmax_at(row, next));
                count += 1;
            }
        }
        progress(w + 1, windows, (nll / count as f64).exp());
    }
    let nll = nll / count as f64;
    Ok(Perplexity {
        ppl: nll.exp(),
        nll,
        tokens: count,
    })
}
