//! Responses drawn by the engine: the prompt is computed once and its pages are shared by all responses (Hydragen).

use antefix_kv::{KvError, Pool, SeqKv};
use antefix_models::decoder::{Extra, ForwardError, Input, Model, Scratch};
use antefix_state::PAGE_ROWS;

use crate::random::Stream;

/// Rows of a prompt computed at a time.
const CHUNK: usize = 512;

/// How responses are drawn. There is no top-p or top-k: they would make the importance ratio wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// `G`
    pub group: usize,
    /// Longest response, its end token included.
    pub max_tokens: usize,
    /// Above 0; log-probabilities are those of `logits / temperature`.
    pub temperature: f64,
    /// Ends a response; it belongs to it and is scored.
    pub end: u32,
}

/// One response.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// Tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each when it was drawn.
    pub log_probs: Vec<f64>,
    /// Cut off at the longest length.
    pub truncated: bool,
}

/// Why a rollout failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RolloutError {
    /// The model could not run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// No room for keys and values.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// Nothing to start from, or nothing to draw.
    #[error("a rollout needs a prompt, a group and at least one token")]
    Empty,
}

/// Token and log-probability drawn from `logits / temperature`.
fn draw(logits: &[f32], temperature: f64, stream: &mut Stream) -> (u32, f64) {
    let scaled = |x: f32| f64::from(x) / temperature;
    let largest = logits.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(scaled(x)));
    let total: f64 = logits.iter().map(|&x| (scaled(x) - largest).exp()).sum();
    let mut left = stream.unit() * total;
    let mut token = logits.len() - 1;
    for (i, &x) in logits.iter().enumerate() {
        left -= (scaled(x) - largest).exp();
        if left < 0.0 {
            token = i;
            break;
        }
    }
    (token as u32, scaled(logits[token]) - largest - total.ln())
}

/// `G` responses to each prompt. Random numbers follow from `(seed, step, prompt, response)` alone, and the engine's rows do not depend on the
/// batch: a response is the same whoever else is drawn.
///
/// # Errors
/// [`RolloutError`] when the model cannot run.
pub fn rollout(
    model: &Model,
    prompts: &[Vec<u32>],
    sampling: Sampling,
    seed: u64,
    step: u64,
) -> Result<Vec<Vec<Response>>, RolloutError> {
    if sampling.group == 0 || sampling.max_tokens == 0 || prompts.iter().any(Vec::is_empty) {
        return Err(RolloutError::Empty);
    }
    let mut scratch = Scratch::default();
    prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| {
            let shape = model.kv_shape();
            let probe = Pool::new(shape, 0);
            let bytes = probe.bytes_for(prompt.len() + PAGE_ROWS)
                + sampling.group * probe.bytes_for(sampling.max_tokens + 2 * PAGE_ROWS);
            let mut pool = Pool::new(shape, bytes);
            one_prompt(model, &mut pool, &mut scratch, prompt, sampling, |j| {
                Stream::at(seed, &format!("rollout {i} {j}"), step)
            })
        })
        .collect()
}

fn one_prompt(
    model: &Model,
    pool: &mut Pool,
    scratch: &mut Scratch,
    prompt: &[u32],
    sampling: Sampling,
    stream: impl Fn(usize) -> Stream,
) -> Result<Vec<Response>, RolloutError> {
    let vocab = model.spec().vocab;
    let mut first = Vec::new();
    let mut prefix = SeqKv::new(pool.shape());
    pool.reserve(&mut prefix, prompt.len())?;
    let last = prompt.len().div_ceil(CHUNK) - 1;
    for (i, chunk) in prompt.chunks(CHUNK).enumerate() {
        let input = Input {
            tokens: chunk,
            kv: &prefix,
            logits: usize::from(i == last),
            drawn: false,
            extra: Extra::default(),
        };
        model.forward(pool, &[input], scratch, &mut first)?;
        prefix.commit(chunk.len());
    }
    let mut live: Vec<(usize, SeqKv, Stream)> = (0..sampling.group)
        .map(|j| Ok((j, pool.fork(&prefix)?, stream(j))))
        .collect::<Result<_, KvError>>()?;
    let mut responses = vec![
        Response {
            tokens: Vec::new(),
            log_probs: Vec::new(),
            truncated: false,
        };
        sampling.group
    ];
    let mut logits = first.repeat(sampling.group);
    loop {
        let mut going = Vec::new();
        for ((j, kv, mut stream), logits) in live.into_iter().zip(logits.chunks_exact(vocab)) {
            let (token, log_prob) = draw(logits, sampling.temperature, &mut stream);
            let response = &mut responses[j];
            response.tokens.push(token);
            response.log_probs.push(log_prob);
            if token == sampling.end {
                pool.release(kv);
            } else if response.tokens.len() == sampling.max_tokens {
                response.truncated = true;
                pool.release(kv);
            } else {
                going.push((j, kv, stream));
            }
        }
        if going.is_empty() {
            pool.release(prefix);
            return Ok(responses);
        }
        live = going;
        for (_, kv, _) in &mut live {
            pool.reserve(kv, 1)?;
        }
        let inputs: Vec<Input<'_>> = live
            .iter()
            .map(|(j, kv, _)| Input {
                tokens: &responses[*j].tokens[responses[*j].tokens.len() - 1..],
                kv,
                logits: 1,
                drawn: true,
                extra: Extra::default(),
            })
            .collect();
        logits.clear();
        model.forward(pool, &inputs, scratch, &mut logits)?;
        live.iter_mut().for_each(|(_, kv, _)| kv.commit(1));
    }
}
