//! Speed of prompts, of decoding at depth, and of many sequences behind a shared prefix.

use std::sync::Arc;
use std::time::Instant;

use antefix_attention::hooks::Observer;
use antefix_engine::{Budget, Engine, EngineError, Job, JobError, Options, RawJob, Session};
use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::{median, resident_mb};

/// Rows of a prompt chunk.
const CHUNK: usize = 512;

/// One row of `antefix bench`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// `pp512@d0`: 512 prompt tokens after 0 others; `tg128@d4096`: 128 single steps after 4,096 tokens.
    pub test: String,
    /// Median of `runs`.
    pub tok_s: f64,
    /// Tokens per second of each run.
    pub runs: Vec<f64>,
    /// Peak resident memory of the process so far, MiB.
    pub rss_mb: f64,
}

/// One row of `antefix bench --shared-prefix`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SharedRow {
    /// Always `shared`.
    pub test: String,
    /// Tokens of the shared prompt.
    pub prefix: usize,
    /// Sequences behind it.
    pub batch: usize,
    /// Sum over all sequences.
    pub decode_tok_s_sum: f64,
    /// The prompt, computed once.
    pub prefill_tok_s: f64,
    /// Bytes of KV pages at the end of the run.
    pub kv_bytes: usize,
    /// Peak resident memory of the process so far, MiB.
    pub rss_mb: f64,
}

/// Why a bench did not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The sizes make no sense for the model.
    #[error(transparent)]
    Job(#[from] JobError),
    /// Longer than the model's context.
    #[error("{what} needs {need} positions, the model's context is {context}\nhint: ask for smaller sizes")]
    Context {
        /// Which test.
        what: String,
        /// Positions.
        need: usize,
        /// Limit.
        context: usize,
    },
}

/// `n` tokens that look like anything: fixed by `seed`, never a special token of a real vocabulary's first 1,000 entries where
/// the vocabulary is larger.
pub fn tokens(model: &Model, n: usize, seed: u64) -> Vec<u32> {
    let vocab = model.spec().vocab as u64;
    let low = if vocab > 4000 { 1000 } else { 0 };
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (low + (x >> 33) % (vocab - low).min(20_000)) as u32
        })
        .collect()
}

fn rss_mb() -> f64 {
    resident_mb()[1].unwrap_or(0.0)
}

fn check(model: &Model, what: &str, need: usize) -> Result<(), BenchError> {
    let context = model.spec().context;
    if need > context {
        return Err(BenchError::Context {
            what: what.to_string(),
            need,
            context,
        });
    }
    Ok(())
}

/// Tokens per second of `n` prompt tokens after `depth` others, `repeats` times, after one short warm-up.
///
/// # Errors
/// When the model fails or its context is too short.
pub fn prompt(model: &Arc<Model>, n: usize, depth: usize, repeats: usize) -> Result<Row, BenchError> {
    let test = format!("pp{n}@d{depth}");
    check(model, &test, n + depth)?;
    let tokens = tokens(model, n + depth, 1);
    let mut session = Session::new(Arc::clone(model), n + depth, CHUNK);
    let mut logits = Vec::new();
    session.feed(&tokens[..depth.max(n.min(64))], 0, &mut logits)?;
    let mut runs = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        session.truncate(depth);
        logits.clear();
        let start = Instant::now();
        session.feed(&tokens[depth..], 1, &mut logits)?;
        runs.push(n as f64 / start.elapsed().as_secs_f64());
    }
    Ok(Row {
        test,
        tok_s: median(&runs),
        runs,
        rss_mb: rss_mb(),
    })
}

/// Tokens per second of `n` single steps after `depth` tokens, `repeats` times, after a warm-up of four steps.
///
/// # Errors
/// When the model fails or its context is too short.
pub fn decode(model: &Arc<Model>, n: usize, depth: usize, repeats: usize) -> Result<Row, BenchError> {
    let test = format!("tg{n}@d{depth}");
    check(model, &test, n.max(4) + depth + 1)?;
    let tokens = tokens(model, n.max(4) + depth + 1, 2);
    let mut session = Session::new(Arc::clone(model), n.max(4) + depth + 1, CHUNK);
    let mut logits = Vec::new();
    session.feed(&tokens[..=depth], 0, &mut logits)?;
    let mut step = |session: &mut Session, i: usize| {
        logits.clear();
        session.feed_drawn(&tokens[depth + 1 + i..][..1], 1, &mut logits)
    };
    for i in 0..4 {
        step(&mut session, i)?;
    }
    let mut runs = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        session.truncate(depth + 1);
        let start = Instant::now();
        for i in 0..n {
            step(&mut session, i)?;
        }
        runs.push(n as f64 / start.elapsed().as_secs_f64());
    }
    Ok(Row {
        test,
        tok_s: median(&runs),
        runs,
        rss_mb: rss_mb(),
    })
}

/// One row of `antefix bench --hooks`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HookRow {
    /// `hooks-tg128@d0`: 128 single steps after 0 tokens.
    pub test: String,
    /// Median with hooks.
    pub tok_s: f64,
    /// Median without.
    pub plain_tok_s: f64,
    /// Time that hooks add, as a part of the time without: median of pairs that ran one after the other.
    pub cost: f64,
    /// The middle half of the pairs lies between these.
    pub quartiles: [f64; 2],
    /// Pairs.
    pub pairs: usize,
}

/// `n` single steps after `depth` tokens with `hooks` and without, in `repeats` pairs whose order alternates.
///
/// # Errors
/// When the model fails or its context is too short.
pub fn hooked(
    model: &Arc<Model>,
    hooks: &Arc<Observer>,
    (n, depth): (usize, usize),
    repeats: usize,
) -> Result<HookRow, BenchError> {
    let test = format!("hooks-tg{n}@d{depth}");
    check(model, &test, n + depth + 1)?;
    let tokens = tokens(model, n + depth + 1, 2);
    let mut session = Session::new(Arc::clone(model), n + depth + 1, CHUNK);
    let mut logits = Vec::new();
    session.feed(&tokens[..=depth], 0, &mut logits)?;
    let mut run = |with: bool| -> Result<f64, EngineError> {
        session.truncate(depth + 1);
        session.observe(with.then(|| Arc::clone(hooks)));
        let start = Instant::now();
        for token in &tokens[depth + 1..] {
            logits.clear();
            session.feed_drawn(std::slice::from_ref(token), 1, &mut logits)?;
        }
        Ok(start.elapsed().as_secs_f64())
    };
    run(false)?;
    let (mut with, mut plain, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..repeats {
        let first = run(i % 2 == 0)?;
        let second = run(i % 2 != 0)?;
        let (w, p) = if i % 2 == 0 {
            (first, second)
        } else {
            (second, first)
        };
        with.push(n as f64 / w);
        plain.push(n as f64 / p);
        added.push(w / p - 1.0);
    }
    added.sort_by(f64::total_cmp);
    let at = |q: usize| added.get(added.len() * q / 4).copied().unwrap_or(0.0);
    Ok(HookRow {
        test,
        tok_s: median(&with),
        plain_tok_s: median(&plain),
        cost: median(&added),
        quartiles: [at(1), at(3)],
        pairs: repeats,
    })
}

/// `batch` greedy requests of `n` tokens behind one prompt of `prefix` tokens, through the engine and its prefix cache: nothing
/// tells it that they share.
///
/// # Errors
/// When the model fails or its context is too short.
pub fn shared(
    model: &Arc<Model>,
    tokenizer: &Arc<Tokenizer>,
    prefix: usize,
    batch: usize,
    n: usize,
) -> Result<SharedRow, BenchError> {
    check(model, "shared prefix", prefix + n + 2)?;
    let shape = model.kv_shape();
    let one = antefix_kv::Pool::new(shape, 0);
    let kv_bytes = one.bytes_for(prefix + 64) * 2 + batch * one.bytes_for(n + 128);
    let options = Options {
        kv_bytes,
        context: usize::MAX,
        budget: Budget {
            rows: CHUNK.max(batch),
            ..Budget::default()
        },
    };
    let mut engine = Engine::new(Arc::clone(model), Arc::clone(tokenizer), options);
    let prompt = tokens(model, prefix + batch, 3);
    let job = |tail: Option<u32>, max_tokens| {
        let tokens = prompt[..prefix].iter().copied().chain(tail).collect();
        let raw = RawJob {
            tokens,
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..RawJob::default()
        };
        Job::new(raw, model.spec().vocab, engine.context())
    };
    let first = job(None, 1)?;
    let rest: Vec<Job> = (0..batch)
        .map(|i| job(Some(prompt[prefix + i]), n))
        .collect::<Result<_, _>>()?;

    let start = Instant::now();
    engine.submit(first)?;
    engine.run()?;
    let prefill_tok_s = prefix as f64 / start.elapsed().as_secs_f64();
    for job in rest {
        engine.submit(job)?;
    }
    // The step that reads each request's last prompt tokens is not decoding yet.
    let mut events = Vec::new();
    while !engine.is_idle() {
        let report = engine.step(&mut events)?;
        if report.prompt_rows == 0 || report.decode_rows > 0 {
            break;
        }
    }
    let (mut seconds, mut rows, mut kv_bytes) = (0.0, 0, 0);
    while !engine.is_idle() {
        let start = Instant::now();
        let report = engine.step(&mut events)?;
        if report.decode_rows == batch && report.prompt_rows == 0 {
            seconds += start.elapsed().as_secs_f64();
            rows += report.decode_rows;
            kv_bytes = kv_bytes.max(engine.pool().stats().bytes_used);
        }
    }
    Ok(SharedRow {
        test: "shared".into(),
        prefix,
        batch,
        decode_tok_s_sum: rows as f64 / seconds,
        prefill_tok_s,
        kv_bytes,
        rss_mb: rss_mb(),
    })
}
