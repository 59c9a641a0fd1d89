//! The loop: admit what fits, schedule, run the model, sample, report.

use std::collections::VecDeque;
use std::sync::Arc;

use antefix_kv::{KvError, Pool, Radix, SeqKv};
use antefix_models::decoder::{ForwardError, Input, Model, Scratch};
use antefix_models::tokenizer::{StreamDecoder, Tokenizer};
use antefix_state::PAGE_ROWS;

use crate::job::{Job, JobError};
use crate::sampler::{Sampler, log_softmax_at};
use crate::schedule::{Budget, Part, SeqId, SeqView, schedule};
use crate::stop::{StopMatcher, Stopped};

/// How an engine runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Bytes of KV pages that may exist at once, cached prefixes included.
    pub kv_bytes: usize,
    /// Tokens of one sequence at most; the model's own context if smaller.
    pub context: usize,
    /// Limits of a step.
    pub budget: Budget,
}

/// Why a step failed. The engine is unchanged but for the sequences of that step, which are dropped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The model could not run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The KV cache could not serve an admitted sequence: our mistake.
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// The model's end token.
    EndToken,
    /// A stop string.
    StopString,
    /// `max_tokens` or the context.
    Length,
    /// [`Engine::cancel`].
    Cancelled,
    /// The step that it was part of failed.
    Failed,
}

/// What a request used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, taken from the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
}

/// Something that a step brought about.
#[derive(Debug, Clone)]
pub enum Event {
    /// A token was drawn.
    Token {
        /// Whose.
        id: SeqId,
        /// Token id.
        token: u32,
        /// Its log-probability under the model, if the job wanted it.
        logprob: Option<f32>,
        /// Text that is now certain; may be empty.
        text: String,
        /// The raw logits it was drawn from, `[vocab]`, if the job wanted them.
        logits: Option<Vec<f32>>,
    },
    /// A sequence ended; its memory is free.
    End {
        /// Which.
        id: SeqId,
        /// Why.
        done: Done,
        /// Text that was held back.
        text: String,
        /// Its cost.
        usage: Usage,
    },
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepReport {
    /// Rows of prompts.
    pub prompt_rows: usize,
    /// Rows of decoding sequences.
    pub decode_rows: usize,
}

struct Seq {
    id: SeqId,
    job: Job,
    kv: SeqKv,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    prompt: usize,
    cached: usize,
    sampler: Sampler,
    decoder: StreamDecoder,
    stop: StopMatcher,
}

impl Seq {
    fn pending(&self) -> usize {
        self.tokens.len() - self.kv.len()
    }

    fn decoding(&self) -> bool {
        self.kv.len() >= self.prompt
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt,
            cached_tokens: self.cached,
            completion_tokens: self.tokens.len() - self.prompt,
        }
    }
}

/// Runs requests on one model.
pub struct Engine {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    options: Options,
    pool: Pool,
    radix: Radix,
    waiting: VecDeque<(SeqId, Job)>,
    running: Vec<Seq>,
    next: u64,
    scratch: Scratch,
    logits: Vec<f32>,
}

impl Engine {
    /// An engine with an empty cache.
    pub fn new(model: Arc<Model>, tokenizer: Arc<Tokenizer>, options: Options) -> Self {
        let pool = Pool::new(model.kv_shape(), options.kv_bytes);
        let options = Options {
            context: options.context.min(model.spec().context),
            ..options
        };
        Self {
            model,
            tokenizer,
            options,
            pool,
            radix: Radix::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            next: 0,
            scratch: Scratch::default(),
            logits: Vec::new(),
        }
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Tokens of one sequence at most.
    pub fn context(&self) -> usize {
        self.options.context
    }

    /// The KV pages, for their figures.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Takes a request in. It waits until memory is there for its prompt and its longest answer.
    ///
    /// # Errors
    /// When it could not run even alone.
    pub fn submit(&mut self, job: Job) -> Result<SeqId, JobError> {
        let need = self.pool.bytes_for(job.tokens.len() + job.max_tokens);
        let capacity = self.pool.capacity();
        if need > capacity {
            return Err(JobError::Memory { need, capacity });
        }
        let id = SeqId(self.next);
        self.next += 1;
        self.waiting.push_back((id, job));
        Ok(id)
    }

    /// Ends a request wherever it is; unknown ids are ignored.
    pub fn cancel(&mut self, id: SeqId, events: &mut Vec<Event>) {
        if let Some(at) = self.waiting.iter().position(|w| w.0 == id) {
            if let Some((id, job)) = self.waiting.remove(at) {
                let usage = Usage {
                    prompt_tokens: job.tokens.len(),
                    ..Usage::default()
                };
                events.push(Event::End {
                    id,
                    done: Done::Cancelled,
                    text: String::new(),
                    usage,
                });
            }
        } else if let Some(at) = self.running.iter().position(|s| s.id == id) {
            self.end(at, Done::Cancelled, events);
        }
    }

    /// Whether anything waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Forgets every cached prefix.
    pub fn clear_cache(&mut self) {
        self.radix.clear(&mut self.pool);
    }

    /// Runs one batch and appends what happened to `events`. Does nothing when idle.
    ///
    /// # Errors
    /// When the model failed; the sequences of the batch end with [`Done::Failed`].
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<StepReport, EngineError> {
        self.admit()?;
        let views: Vec<SeqView> = self
            .running
            .iter()
            .map(|s| SeqView {
                id: s.id,
                pending: s.pending(),
                decoding: s.decoding(),
            })
            .collect();
        let batch = schedule(&views, self.options.budget);
        let mut report = StepReport::default();
        if batch.parts.is_empty() {
            return Ok(report);
        }
        let parts: Vec<(usize, Part)> = batch
            .parts
            .iter()
            .filter_map(|p| self.running.iter().position(|s| s.id == p.id).map(|at| (at, *p)))
            .collect();
        let inputs: Vec<Input<'_>> = parts
            .iter()
            .map(|(at, part)| {
                let seq = &self.running[*at];
                let from = seq.kv.len();
                let ends = from + part.tokens == seq.tokens.len();
                *(if seq.decoding() {
                    &mut report.decode_rows
                } else {
                    &mut report.prompt_rows
                }) += part.tokens;
                Input {
                    tokens: &seq.tokens[from..from + part.tokens],
                    kv: &seq.kv,
                    logits: usize::from(ends),
                }
            })
            .collect();
        self.logits.clear();
        let ran = self
            .model
            .forward(&mut self.pool, &inputs, &mut self.scratch, &mut self.logits);
        let drawn: Vec<bool> = inputs.iter().map(|i| i.logits == 1).collect();
        drop(inputs);
        if let Err(error) = ran {
            let mut failed: Vec<usize> = parts.iter().map(|p| p.0).collect();
            failed.sort_unstable_by(|a, b| b.cmp(a));
            failed
                .into_iter()
                .for_each(|at| self.end(at, Done::Failed, events));
            return Err(error.into());
        }
        let logits = std::mem::take(&mut self.logits);
        let mut rows = logits.chunks_exact(self.model.spec().vocab);
        let mut ended = Vec::new();
        for ((at, part), draws) in parts.into_iter().zip(drawn) {
            let seq = &mut self.running[at];
            let was_decoding = seq.decoding();
            seq.kv.commit(part.tokens);
            if !was_decoding && seq.decoding() && !seq.job.no_cache {
                self.radix
                    .insert(&mut self.pool, &seq.tokens[..seq.prompt], seq.job.salt, &seq.kv);
            }
            if draws && let Some(row) = rows.next() {
                if let Some(done) = accept(seq, &self.tokenizer, row, events) {
                    ended.push((at, done));
                }
            }
        }
        self.logits = logits;
        ended.sort_unstable_by_key(|e| std::cmp::Reverse(e.0));
        ended
            .into_iter()
            .for_each(|(at, done)| self.end(at, done, events));
        Ok(report)
    }

    /// Steps until nothing is left.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn run(&mut self) -> Result<Vec<Event>, EngineError> {
        let mut events = Vec::new();
        while !self.is_idle() {
            self.step(&mut events)?;
        }
        Ok(events)
    }

    /// Starts waiting requests, in order, as long as memory for their longest answer is there.
    fn admit(&mut self) -> Result<(), EngineError> {
        while let Some((_, job)) = self.waiting.front() {
            // A request whose prefix is just being computed by another waits for it rather than computing it again.
            if !job.no_cache && self.prefix_in_flight(job) {
                return Ok(());
            }
            let prompt = job.tokens.len();
            // The last token is always computed: its logits are needed.
            let mut kv = match job.no_cache {
                true => SeqKv::new(self.pool.shape()),
                false => self
                    .radix
                    .lookup(&mut self.pool, &job.tokens[..prompt - 1], job.salt),
            };
            let cached = kv.len();
            let more = prompt + job.max_tokens - cached;
            if self.pool.reserve(&mut kv, more).is_err() {
                let short = self.pool.bytes_for(more + PAGE_ROWS);
                self.radix.evict(&mut self.pool, short);
                if let Err(error) = self.pool.reserve(&mut kv, more) {
                    self.pool.release(kv);
                    // Somebody who runs will end and free memory; alone it must fit, or `submit` would have refused.
                    return if self.running.is_empty() {
                        Err(error.into())
                    } else {
                        Ok(())
                    };
                }
            }
            if let Some((id, job)) = self.waiting.pop_front() {
                self.running.push(Seq {
                    id,
                    kv,
                    tokens: job.tokens.clone(),
                    prompt,
                    cached,
                    sampler: Sampler::new(job.sampling.clone()),
                    decoder: StreamDecoder::new(),
                    stop: StopMatcher::new(job.stop.clone()),
                    job,
                });
            }
        }
        Ok(())
    }

    fn prefix_in_flight(&self, job: &Job) -> bool {
        let useful = |n: usize| n / PAGE_ROWS * PAGE_ROWS;
        self.running.iter().any(|s| {
            if s.decoding() || s.job.no_cache || s.job.salt != job.salt {
                return false;
            }
            let limit = s.prompt.min(job.tokens.len() - 1);
            let common = s.tokens[..limit]
                .iter()
                .zip(&job.tokens)
                .take_while(|(a, b)| a == b)
                .count();
            useful(common) > self.radix.matched(&job.tokens[..job.tokens.len() - 1], job.salt)
        })
    }

    fn end(&mut self, at: usize, done: Done, events: &mut Vec<Event>) {
        let mut seq = self.running.remove(at);
        let text = match done {
            Done::StopString => String::new(),
            _ => {
                let tail = seq.decoder.flush();
                match seq.stop.push(&tail) {
                    Stopped::Go(text) => text + &seq.stop.finish(),
                    Stopped::Stop(text) => text,
                }
            }
        };
        events.push(Event::End {
            id: seq.id,
            done,
            text,
            usage: seq.usage(),
        });
        self.pool.release(seq.kv);
    }
}

/// Draws the next token of `seq` and says whether it ends there.
fn accept(seq: &mut Seq, tokenizer: &Tokenizer, logits: &[f32], events: &mut Vec<Event>) -> Option<Done> {
    let token = seq.sampler.draw(logits, &seq.tokens);
    seq.tokens.push(token);
    let generated = seq.tokens.len() - seq.prompt;
    let is_end = tokenizer.is_end(token) && !seq.job.ignore_eos;
    let piece = if is_end {
        None
    } else {
        seq.decoder.push(tokenizer, token)
    };
    let (text, stopped) = match seq.stop.push(&piece.unwrap_or_default()) {
        Stopped::Go(text) => (text, false),
        Stopped::Stop(text) => (text, true),
    };
    events.push(Event::Token {
        id: seq.id,
        token,
        logprob: seq.job.want_logprobs.then(|| log_softmax_at(logits, token)),
        text,
        logits: seq.job.want_logits.then(|| logits.to_vec()),
    });
    if is_end {
        Some(Done::EndToken)
    } else if stopped {
        Some(Done::StopString)
    } else if generated >= seq.job.max_tokens {
        Some(Done::Length)
    } else {
        None
    }
}
