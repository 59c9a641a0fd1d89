//! Case generators and the promises that everything has to keep.
//!
//! The first promise is invariance: the logits of a request are, bit for bit, those of the same request alone on a cold engine.

pub mod method;

use std::path::Path;
use std::sync::Arc;

use antefix_attention::method::{Need, Program};
use antefix_engine::{Beside, Budget, Engine, EngineError, Event, Options, RawJob, SeqId};
use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::team::Team;
use antefix_models::decoder::Model;
use antefix_models::files::ModelFiles;
use antefix_models::gguf::Gguf;
use antefix_models::spec::Arch;
use antefix_models::testing::{Rng, tiny_gguf};
use antefix_models::tokenizer::Tokenizer;

/// A tiny model with random weights.
///
/// # Panics
/// When the generator's file is refused: a mistake of the generator.
pub fn tiny(arch: Arch, cpu: Cpu, threads: usize) -> (Arc<Model>, Arc<Tokenizer>) {
    let gguf = Gguf::parse(tiny_gguf(arch, 11)).expect("the generator writes valid files");
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("the generator writes a tokenizer");
    let files =
        ModelFiles::from_gguf(gguf, Path::new("tiny.gguf")).expect("the generator writes whole models");
    let model = Model::load(files, cpu, Arc::new(Team::new(threads)), Precision::Fast)
        .expect("the formats are known");
    (Arc::new(model), Arc::new(tokenizer))
}

/// What one request brought: each drawn token with the logits it was drawn from.
pub type Answer = Vec<(u32, Vec<f32>)>;

/// Requests that run together, and when each arrives.
#[derive(Debug, Clone)]
pub struct Traffic {
    /// (step at which it is submitted, request).
    pub arrivals: Vec<(usize, RawJob)>,
    /// Limits of a step.
    pub budget: Budget,
}

impl Traffic {
    /// Random requests: prompts of 1 to 160 tokens that share prefixes, greedy and sampled, arriving at different steps.
    pub fn random(rng: &mut Rng, vocab: usize) -> Self {
        Self::with_prefix_below(rng, vocab, 120)
    }

    /// The same with prefixes of up to 2,500 tokens: sequences end in different partitions of the keys.
    pub fn long(rng: &mut Rng, vocab: usize) -> Self {
        Self::with_prefix_below(rng, vocab, 2500)
    }

    fn with_prefix_below(rng: &mut Rng, vocab: usize, limit: usize) -> Self {
        let mut below = |n: usize| (rng.bits() % n as u64) as usize;
        let shared: Vec<u32> = (0..below(limit)).map(|_| below(vocab) as u32).collect();
        let arrivals = (0..2 + below(4))
            .map(|_| {
                let keep = below(shared.len() + 1);
                let tail = 1 + below(40);
                let mut tokens = shared[..keep].to_vec();
                tokens.extend((0..tail).map(|_| below(vocab) as u32));
                let mut raw = RawJob {
                    tokens,
                    max_tokens: Some(match below(4) {
                        0 => 70 + below(90),
                        _ => 1 + below(8),
                    }),
                    ignore_eos: true,
                    want_logits: true,
                    no_cache: below(5) == 0,
                    ..RawJob::default()
                };
                if below(2) == 0 {
                    raw.sampling.temperature = 0.9;
                    raw.sampling.seed = below(1000) as u64;
                }
                (below(12), raw)
            })
            .collect();
        let budget = Budget {
            rows: 1 + below(limit.max(140) / 2),
            beside_decode: match below(3) {
                0 => Beside::Factor(1.0 + below(40) as f64 / 10.0),
                _ => Beside::Rows(1 + below(limit.max(120) / 4)),
            },
        };
        Self { arrivals, budget }
    }

    /// Tokens of the longest request, its answer included.
    pub fn longest(&self) -> usize {
        let tokens = |raw: &RawJob| prompt_tokens(raw) + raw.max_tokens.unwrap_or(0);
        self.arrivals
            .iter()
            .map(|(_, raw)| tokens(raw))
            .max()
            .unwrap_or(0)
    }

    /// Runs everything together on `engine`; answers in the order of `arrivals`.
    ///
    /// # Errors
    /// When the engine fails.
    ///
    /// # Panics
    /// When a request is refused: random requests are valid.
    pub fn run(&self, engine: &mut Engine) -> Result<Vec<Answer>, EngineError> {
        let mut ids: Vec<Option<SeqId>> = vec![None; self.arrivals.len()];
        let mut answers = vec![Answer::new(); self.arrivals.len()];
        let mut events = Vec::new();
        let mut step = 0;
        while ids.iter().any(Option::is_none) || !engine.is_idle() {
            for (i, (at, raw)) in self.arrivals.iter().enumerate() {
                if ids[i].is_none() && *at <= step {
                    let job = engine.job(raw.clone()).expect("valid");
                    ids[i] = Some(engine.submit(job).expect("it fits"));
                }
            }
            engine.step(&mut events)?;
            step += 1;
            for event in events.drain(..) {
                if let Event::Token {
                    id,
                    token,
                    logits: Some(logits),
                    ..
                } = event
                    && let Some(i) = ids.iter().position(|&x| x == Some(id))
                {
                    answers[i].push((token, logits));
                }
            }
        }
        Ok(answers)
    }
}

/// Tokens that the prompt of `raw` may come to have: methods write documents several times.
fn prompt_tokens(raw: &RawJob) -> usize {
    let writes = |p: &std::sync::Arc<Program>| {
        let mut cards = p.methods().iter().map(|(_, knobs)| knobs.card());
        cards.any(|card| card.needs.contains(&Need::Documents))
    };
    let copies = if raw.program.as_ref().is_some_and(writes) {
        5
    } else {
        1
    };
    raw.tokens.len() * copies + 8
}

/// An engine with room for little more than the longest request of `traffic`: requests wait, prefixes are evicted and
/// sequences lose their memory to others.
pub fn engine(model: &Arc<Model>, tokenizer: &Arc<Tokenizer>, traffic: &Traffic) -> Engine {
    let sizes = antefix_kv::Pool::new(model.kv_shape(), 0);
    let context = traffic.longest() + 32;
    // A policy writes what stays before the rest is freed.
    let cut = |(_, raw): &(usize, RawJob)| {
        let policy = raw.program.as_ref().and_then(|p| p.policy());
        let cuts = policy.is_some();
        let again = policy.is_some_and(|p| p.every().is_some());
        let answer = if again { raw.max_tokens.unwrap_or(0) } else { 0 };
        let twice = sizes.bytes_for(prompt_tokens(raw) + answer) * 2 + sizes.shape().block_bytes();
        // Documents fill pages of their own, and their rows that are computed again others.
        let reuses = raw.program.as_ref().is_some_and(|p| p.chunk_use().is_some());
        let whole = raw.tokens.len() + raw.max_tokens.unwrap_or(0);
        let apart = sizes.bytes_for(whole) * 2 + sizes.shape().block_bytes() * (raw.documents.len() + 2);
        // Copies of keys that are read again and again: of a quarter at most, in pages of their own.
        let planner = raw.program.as_ref().and_then(|p| p.decode_planner());
        let copies = planner.is_some_and(|p| p.repeated(whole) > 0);
        match (cuts, reuses, copies) {
            (true, ..) => twice,
            (_, true, _) => apart,
            (_, _, true) => sizes.bytes_for(whole) * 3 / 2 + sizes.shape().block_bytes(),
            _ => 0,
        }
    };
    let cut = traffic.arrivals.iter().map(cut).max().unwrap_or(0);
    let options = Options {
        kv_bytes: (sizes.bytes_for(context) * 5 / 4).max(cut),
        context,
        budget: traffic.budget,
    };
    Engine::new(Arc::clone(model), Arc::clone(tokenizer), options)
}
