//! Speed of a method beside dense attention, in alternating pairs on one machine.

use std::sync::Arc;

use antefix_attention::method::{Answer, Ask, Host, HostError, Program, Prompt};
use serde::Serialize;

use crate::median;

/// One row of `antefix bench --method`. Times are medians; each run of the method has a dense one before it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MethodRow {
    /// Always `method`.
    pub test: String,
    /// The methods with their settings.
    pub method: String,
    /// Tokens of the prompt before methods rewrite it.
    pub prompt: usize,
    /// Tokens of the answer.
    pub decode: usize,
    /// Bytes of keys and values held at the end, over those of dense attention.
    pub kept: f64,
    /// Seconds to the first token.
    pub ttft_s: f64,
    /// The same, dense.
    pub dense_ttft_s: f64,
    /// Tokens per second after the first.
    pub decode_tok_s: f64,
    /// The same, dense.
    pub dense_decode_tok_s: f64,
}

/// Measures `program` with the tokens `prompt`, all but the first of which are one document, and a given answer.
///
/// # Errors
/// When the request is refused or the model fails.
pub fn method(
    host: &mut dyn Host,
    program: &Arc<Program>,
    prompt: &[u32],
    answer: &[u32],
    repeats: usize,
) -> Result<MethodRow, HostError> {
    let mut ask = Ask {
        prompt: Prompt {
            tokens: prompt.to_vec(),
            documents: std::iter::once(1..prompt.len().saturating_sub(1))
                .filter(|d| !d.is_empty())
                .collect(),
        },
        answer: Answer::Given(answer.to_vec()),
        fresh: true,
        ..Ask::default()
    };
    let steps = answer.len().saturating_sub(1) as f64;
    let (mut first, mut speed, mut kept) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()], 1.0);
    for _ in 0..repeats {
        for (which, program) in [None, Some(Arc::clone(program))].into_iter().enumerate() {
            ask.program = program;
            let told = host.ask(&ask)?;
            first[which].push(told.first_token.as_secs_f64());
            speed[which].push(steps / told.rest.as_secs_f64().max(1e-9));
            kept = told.kept;
        }
    }
    Ok(MethodRow {
        test: "method".into(),
        method: program.tag(),
        prompt: prompt.len(),
        decode: answer.len(),
        kept,
        ttft_s: median(&first[1]),
        dense_ttft_s: median(&first[0]),
        decode_tok_s: median(&speed[1]),
        dense_decode_tok_s: median(&speed[0]),
    })
}
