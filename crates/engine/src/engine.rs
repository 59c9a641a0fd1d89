//! The loop: admit what fits, schedule, run the model, sample, report.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use antefix_attention::method::Program;
use antefix_kv::{ChunkStats, ChunkStore, EditError, Fingerprint, KvError, Pool, Radix, SeqKv, SeqState};
use antefix_models::decoder::{Extra, ForwardError, Input, Model, Scratch};
use antefix_models::tokenizer::{StreamDecoder, Tokenizer};
use antefix_state::PAGE_ROWS;

use crate::again::Again;
use crate::cache::{Asking, Cache, CacheOptions, CacheStats, PinError, Whereabouts};
use crate::course::{Course, MethodReport, Undecided};
use crate::job::{Job, JobError, Pooling};
use crate::pace::{Pace, Work};
use crate::rescue::Output;
use crate::reuse::Library;
use crate::sampler::{Sampler, log_probs};
use crate::schedule::{Budget, Part, SeqId, SeqView, WaitView, next_in_line, schedule};
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
    /// Methods that score no texts.
    #[error(transparent)]
    Method(#[from] crate::session::NotForTexts),
    /// What a cache policy decided cannot be done.
    #[error(transparent)]
    Edit(#[from] EditError),
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// The model's end token.
    EndToken,
    /// The stop string of this place in the request's list.
    StopString(usize),
    /// `max_tokens` or the context.
    Length,
    /// [`Engine::cancel`].
    Cancelled,
    /// [`crate::RawJob::deadline`] has passed.
    Deadline {
        /// It had drawn tokens by then.
        answered: bool,
    },
    /// The step that it was part of failed, or it made the step panic.
    Failed,
    /// Its constraint could not go on: its limits were used up, or no token could follow. Nothing is wrong with the engine.
    Constraint,
}

/// What a request used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, taken from the prefix cache.
    pub cached_tokens: usize,
    /// Of those, read for this request from a tier below the memory.
    pub loaded_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
}

/// The log-probability of a prompt token given those before it, and the most likely tokens there.
pub type PromptLogprob = (f32, Vec<(u32, f32)>);

/// Something that a step brought about.
#[derive(Debug, Clone)]
pub enum Event {
    /// The prompt was computed: log-probabilities of its tokens from the second on, if the job wanted them.
    Prompt {
        /// Whose.
        id: SeqId,
        /// One for each token but the first.
        logprobs: Vec<PromptLogprob>,
    },
    /// The prompt was computed and pooled, for a job with [`crate::RawJob::pooling`].
    Pooled {
        /// Whose.
        id: SeqId,
        /// `[d_model]`, not normalised.
        vector: Vec<f32>,
    },
    /// A token was drawn.
    Token {
        /// Whose.
        id: SeqId,
        /// Token id.
        token: u32,
        /// Its log-probability under the model, if the job wanted it.
        logprob: Option<f32>,
        /// The most likely tokens with theirs, best first; as many as the job wanted.
        top: Vec<(u32, f32)>,
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
        /// What its methods did; `None` for dense attention.
        method: Option<Box<MethodReport>>,
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

/// Figures of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Sequences that hold memory.
    pub running: usize,
    /// Requests in line.
    pub waiting: usize,
    /// How often a sequence had to give its memory to another one, since the start.
    pub preempted: u64,
    /// Sequences that failed because they panicked, since the start.
    pub panicked: u64,
}

/// A request from its submission to its end. Without memory (`kv` is empty) it stands in line.
pub(crate) struct Seq {
    pub(crate) id: SeqId,
    pub(crate) job: Job,
    kv: SeqState,
    /// Bytes set aside in the pool for what its planners keep of its keys.
    aside: usize,
    course: Course,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    prompt: usize,
    /// Prompt tokens taken from the cache when it first started, and how many of them a tier had brought.
    cached: Option<usize>,
    loaded: usize,
    /// The tiers have been asked for its prompt, or need not be.
    looked_below: bool,
    sampler: Sampler,
    decoder: StreamDecoder,
    stop: StopMatcher,
    /// Tokens that its constraint has decided on and that are not part of the answer yet.
    forced: VecDeque<u32>,
    prompt_logprobs: Vec<PromptLogprob>,
    /// Sum of the vectors to pool, `[d_model]`; f64, so that the mean of a long prompt is not one of its roundings.
    pooled: Vec<f64>,
}

impl Seq {
    fn new(id: SeqId, mut job: Job, kv: SeqState, course: Course) -> Self {
        let tokens = std::mem::take(&mut job.tokens);
        Self {
            id,
            kv,
            aside: 0,
            prompt: tokens.len(),
            tokens,
            cached: None,
            loaded: 0,
            looked_below: job.no_cache || job.recompute() || course.reuse().is_some(),
            course,
            sampler: Sampler::new(job.sampling.clone()),
            decoder: StreamDecoder::new(),
            stop: StopMatcher::new(job.stop.clone()),
            forced: VecDeque::new(),
            prompt_logprobs: Vec::new(),
            pooled: Vec::new(),
            job,
        }
    }

    /// Tokens computed so far.
    fn done(&self) -> usize {
        self.kv.done()
    }

    /// Tokens that can be computed before its cache policy decides again. The last of the prompt ends a step, and the last given one: those
    /// behind them are computed otherwise.
    fn pending(&self) -> usize {
        let ends = [self.prompt, self.course.given()];
        let end = ends.into_iter().find(|&end| end > self.done());
        let known = end.unwrap_or(self.tokens.len());
        known.min(self.course.border()) - self.done()
    }

    /// How many of its tokens may come from the cache: not the last, whose logits are needed, nor drawn ones if they are told `apart`.
    fn findable(&self, apart: bool) -> usize {
        let known = self.tokens.len() - 1;
        self.course.cacheable(match apart {
            true => known.min(self.course.given()),
            false => known,
        })
    }

    /// How many of its computed tokens are what another request's prompt would be: not the drawn ones if they are told `apart`.
    fn reusable(&self, apart: bool) -> usize {
        self.course.keepable(match apart {
            true => self.done().min(self.course.given()),
            false => self.done(),
        })
    }

    /// The same part with as many tokens as belong together: a planner's stretches are not cut.
    fn whole(&self, part: Part) -> Part {
        Part {
            tokens: self.course.whole(self.done(), part.tokens, self.pending()),
            ..part
        }
    }

    /// Whether its next rows are of drawn tokens, and not given or corrected ones.
    fn drawn(&self) -> bool {
        self.done() >= self.course.given()
    }

    /// Goes back to where drawn tokens are to be corrected, if they are by now.
    fn correct(&mut self, pool: &mut Pool) {
        if let Some(from) = self.course.correct(&self.kv, self.tokens.len()) {
            pool.truncate(&mut self.kv.tail, from);
            // Its pages stay its own. If there is none for the token drawn last, the next step makes room.
            let _ = pool.reserve(&mut self.kv.tail, self.tokens.len() - from);
        }
    }

    /// Whether it writes its answer: what is to be computed is the token drawn last and those that its constraint put behind it. A
    /// sequence that lost its memory may have more to do.
    fn decoding(&self) -> bool {
        self.done() >= self.prompt && (1..=FORCED_AT_ONCE).contains(&(self.tokens.len() - self.done()))
    }

    /// Sets memory aside for `n` more tokens: their pages, and what its planners keep of them.
    fn reserve(&mut self, pool: &mut Pool, n: usize) -> Result<(), KvError> {
        let beside = match Extra::of(&self.kv).is_bare() {
            true => self.course.beside(self.done() + n).max(self.aside),
            false => 0,
        };
        pool.set_aside(&mut self.aside, beside)?;
        pool.reserve(&mut self.kv.tail, n)
    }

    /// Gives its memory back.
    fn release(&mut self, pool: &mut Pool) {
        let kv = std::mem::replace(&mut self.kv, SeqState::new(pool.shape()));
        kv.release(pool);
        // Less is always allowed.
        let _ = pool.set_aside(&mut self.aside, 0);
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt,
            cached_tokens: self.cached.unwrap_or(0),
            loaded_tokens: self.loaded,
            completion_tokens: self.tokens.len() - self.prompt,
        }
    }

    /// Its rows of a step.
    pub(crate) fn input(&self, part: Part) -> Input<'_> {
        let from = self.done();
        Input {
            tokens: &self.tokens[from..from + part.tokens],
            kv: &self.kv.tail,
            logits: self.wanted(part.tokens),
            drawn: self.drawn(),
            extra: Extra {
                hooks: self.job.hooks.as_deref(),
                ..self.course.extra(&self.kv)
            },
        }
    }

    /// Of how many of its next `n` rows logits are read: all of the prompt's that are asked for, and the very last.
    pub(crate) fn wanted(&self, n: usize) -> usize {
        let from = self.done();
        if self.job.pooling == Some(Pooling::Mean) {
            return n;
        }
        let missing = self.job.prompt_logprobs && self.prompt_logprobs.len() + 1 < self.prompt;
        match (missing, from + n == self.tokens.len()) {
            (true, _) => n,
            (false, ends) => usize::from(ends),
        }
    }

    /// Takes in the vectors `[rows, d_model]` of its next rows to pool; the pooled one when the prompt ends with them.
    fn pool(&mut self, rows: &[f32], d_model: usize) -> Option<Vec<f32>> {
        self.pooled.resize(d_model, 0.0);
        for row in rows.chunks_exact(d_model) {
            self.pooled
                .iter_mut()
                .zip(row)
                .for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let n = match self.job.pooling {
            Some(Pooling::Mean) => self.prompt as f64,
            _ => 1.0,
        };
        (self.done() >= self.prompt).then(|| self.pooled.iter().map(|sum| (sum / n) as f32).collect())
    }

    /// Takes in the logits of row `at`, whose next token is known.
    fn note_prompt(&mut self, at: usize, logits: &[f32]) {
        if at == self.prompt_logprobs.len() && at + 1 < self.prompt {
            self.prompt_logprobs
                .push(log_probs(logits, self.tokens[at + 1], self.job.top_logprobs));
        }
    }
}

/// Tokens of an answer for which memory is set aside at the start; more is taken as it grows.
const FIRST_ANSWER_TOKENS: usize = 64;

/// Tokens that a decoding sequence may have in a step; more come in chunks, like a prompt's.
const FORCED_AT_ONCE: usize = 32;

/// Runs requests on one model.
pub struct Engine {
    pub(crate) model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    options: Options,
    /// The context that was asked for, whatever the model was trained on.
    asked_context: usize,
    pub(crate) pool: Pool,
    cache: Cache,
    chunks: ChunkStore,
    waiting: Vec<Seq>,
    pub(crate) running: Vec<Seq>,
    /// Rows computed for each tenant that waits or runs; a new one starts level with the least of them.
    used: HashMap<u64, u64>,
    next: u64,
    preempted: u64,
    panicked: u64,
    /// By how much deadlines are nearer than the clock says.
    ahead: Duration,
    pace: Pace,
    again: Again,
    pub(crate) scratch: Scratch,
    logits: Vec<f32>,
    masked: Vec<f32>,
}

impl Engine {
    /// An engine with an empty cache.
    pub fn new(model: Arc<Model>, tokenizer: Arc<Tokenizer>, options: Options) -> Self {
        let pool = Pool::new(model.kv_shape(), options.kv_bytes);
        let cache = Cache::new(model.spec(), CacheOptions::default());
        let asked_context = options.context;
        let options = Options {
            context: options.context.min(model.spec().context),
            ..options
        };
        let pace = Pace::of(&model);
        Self {
            model,
            tokenizer,
            options,
            asked_context,
            pool,
            cache,
            chunks: ChunkStore::new(Fingerprint::default(), None),
            waiting: Vec::new(),
            running: Vec::new(),
            used: HashMap::new(),
            next: 0,
            preempted: 0,
            panicked: 0,
            ahead: Duration::ZERO,
            pace,
            again: Again::default(),
            scratch: Scratch::default(),
            logits: Vec::new(),
            masked: Vec::new(),
        }
    }

    /// The same engine, keeping documents that are reused in `folder` as well, under the fingerprint of the model's
    /// [`crate::identity`]. What was kept before is forgotten.
    #[must_use]
    pub fn with_chunks(mut self, fingerprint: Fingerprint, folder: PathBuf) -> Self {
        self.chunks.clear(&mut self.pool);
        self.chunks = ChunkStore::new(fingerprint, Some(folder));
        self
    }

    /// Figures of the documents that are kept for reuse.
    pub fn chunks(&self) -> ChunkStats {
        self.chunks.stats(&self.pool)
    }

    /// The same engine, caching as `options` say. What was cached before is forgotten.
    #[must_use]
    pub fn with_cache(mut self, options: CacheOptions) -> Self {
        self.clear_cache();
        self.cache = Cache::new(self.model.spec(), options);
        self
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

    /// The same for requests under `program`: angles of its own may reach further than the model's training, up to what was asked
    /// for when the engine was made.
    pub fn context_with(&self, program: &Program) -> usize {
        program.context(self.options.context).min(self.asked_context)
    }

    /// The KV pages, for their figures.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The cached prefixes.
    pub fn radix(&self) -> &Radix {
        self.cache.radix()
    }

    /// As if `by` had passed for what is cached: for tests of what expires.
    pub fn advance_cache(&mut self, by: Duration) {
        self.cache.radix_mut().advance(by);
    }

    /// As if `by` had passed for what has a deadline: for tests.
    pub fn advance_deadlines(&mut self, by: Duration) {
        self.ahead += by;
    }

    /// Figures of the cache.
    pub fn cache_stats(&self) -> CacheStats {
        self.cache.stats()
    }

    /// Where `tokens` would be found under `salt`. Changes nothing.
    pub fn whereabouts(&self, tokens: &[u32], salt: u64) -> Whereabouts {
        self.cache.whereabouts(tokens, salt)
    }

    /// Keeps what is cached of `tokens` in memory until [`Engine::unpin`], and returns how many tokens that are. Pins count.
    ///
    /// # Errors
    /// When a request of the whole context would not fit any more.
    pub fn pin(&mut self, tokens: &[u32], salt: u64) -> Result<usize, PinError> {
        self.cache.pin(&self.pool, tokens, salt, self.options.context)
    }

    /// Takes a pin off `tokens`, and returns how many tokens had one.
    pub fn unpin(&mut self, tokens: &[u32], salt: u64) -> usize {
        self.cache.unpin(tokens, salt)
    }

    /// What else is to be done when no request is there: answers become prefixes for the next turn, blocks go to the tiers, old ones
    /// are forgotten. Returns after how long there may be more to do.
    pub fn tend_cache(&mut self) -> Duration {
        self.cache.work(&mut self.pool);
        if !self.again.is_done() {
            let place = (&mut self.pool, &mut self.cache);
            // A text that the model fails on costs a later request its hit, no more.
            let _ = self.again.work(&self.model, place, &mut self.scratch);
            if !self.again.is_done() {
                return Duration::ZERO;
            }
        }
        self.cache.next_work()
    }

    /// The same, and closes the tiers: what they hold can be opened by another process.
    pub fn close_cache(&mut self, patience: Duration) -> bool {
        let stored = self.store_cache(patience);
        self.cache.close();
        stored
    }

    /// Makes the answers given so far prefixes for a next turn: [`Engine::tend_cache`] does so bit by bit.
    pub fn keep_answers(&mut self) {
        while self.is_idle() && !self.again.is_done() {
            self.tend_cache();
        }
    }

    /// Stores in the tiers whatever is cached, and waits for it at most for `patience`; `false` if that was not enough, or a tier
    /// does not take it.
    pub fn store_cache(&mut self, patience: Duration) -> bool {
        self.cache.store_all(&self.pool, patience)
    }

    /// Figures of the moment.
    pub fn load(&self) -> Load {
        Load {
            running: self.running.len(),
            waiting: self.waiting.len(),
            preempted: self.preempted,
            panicked: self.panicked,
        }
    }

    /// Requests that hold memory, with their tokens so far.
    pub fn running(&self) -> impl Iterator<Item = (SeqId, &[u32])> {
        self.running.iter().map(|s| (s.id, s.tokens.as_slice()))
    }

    /// How many of `tokens` a request under `salt` would find in memory now.
    pub fn cached(&self, tokens: &[u32], salt: u64) -> usize {
        self.cache.matched(tokens, salt)
    }

    /// Takes a request in. It waits until memory is there for its prompt and the start of its answer.
    ///
    /// # Errors
    /// When it could not run even alone.
    pub fn submit(&mut self, mut job: Job) -> Result<SeqId, JobError> {
        let mut need = self.pool.bytes_for(job.tokens.len() + job.max_tokens);
        if job.program.chunk_use().is_some() {
            // Prefix and documents fill pages of their own, and rows that are computed again stand beside the stored ones.
            need = need * 2 + self.pool.bytes_for(PAGE_ROWS) * (job.documents.len() + 2);
        }
        if let Some(policy) = job.program.policy() {
            // The rows that stay are written before the others are freed, and again while the answer grows.
            let cut = match policy.every() {
                Some(_) => job.tokens.len() + job.max_tokens,
                None => job.tokens.len(),
            };
            need = need.max(self.pool.bytes_for(cut) * 2 + self.pool.shape().block_bytes());
        }
        let course = Course::new(&self.model, &job);
        need += course.beside(job.tokens.len() + job.max_tokens);
        let capacity = self.pool.capacity();
        if need > capacity {
            return Err(JobError::Memory { need, capacity });
        }
        job.salt = course.salted(job.salt);
        let id = SeqId(self.next);
        self.next += 1;
        let tenant = job.tenant;
        if !self.used.contains_key(&tenant) {
            let level = self.used.values().min().copied().unwrap_or(0);
            self.used.insert(tenant, level);
        }
        self.waiting
            .push(Seq::new(id, job, SeqState::new(self.pool.shape()), course));
        Ok(id)
    }

    /// Ends a request wherever it is; unknown ids are ignored.
    pub fn cancel(&mut self, id: SeqId, events: &mut Vec<Event>) {
        if let Some(at) = self.waiting.iter().position(|s| s.id == id) {
            let seq = self.waiting.remove(at);
            self.end(seq, Done::Cancelled, events);
        }
        self.end_all(|s| (s.id == id).then_some(Done::Cancelled), events);
    }

    /// Ends the requests whose deadlines have passed, in line or running.
    fn expire(&mut self, events: &mut Vec<Event>) {
        let now = Instant::now() + self.ahead;
        let late = |s: &Seq| {
            let answered = s.tokens.len() > s.prompt;
            let passed = s.job.deadline.is_some_and(|at| at <= now);
            passed.then_some(Done::Deadline { answered })
        };
        let mut at = 0;
        while at < self.waiting.len() {
            match late(&self.waiting[at]) {
                Some(done) => {
                    let seq = self.waiting.remove(at);
                    self.end(seq, done, events);
                }
                None => at += 1,
            }
        }
        self.end_all(late, events);
    }

    /// Whether anything waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Forgets every cached prefix in memory, pinned ones as well; tiers keep theirs.
    pub fn clear_cache(&mut self) {
        self.again.clear();
        self.cache.clear(&mut self.pool);
    }

    /// Runs one batch and appends what happened to `events`. Does nothing when idle. A sequence that panics ends with
    /// [`Done::Failed`]; the others of its batch get their bits all the same.
    ///
    /// # Errors
    /// When the model failed; the sequences of the batch end with [`Done::Failed`].
    ///
    /// # Panics
    /// On mistakes that belong to no sequence's rows: in admission, in the cache, and where edits of a policy are applied.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<StepReport, EngineError> {
        self.cache.work(&mut self.pool);
        self.expire(events);
        self.admit(events)?;
        if self.running.is_empty() {
            self.cache.wait_for_block();
        }
        let started = Instant::now();
        let views: Vec<SeqView> = self
            .running
            .iter()
            .map(|s| SeqView {
                id: s.id,
                pending: s.pending(),
                keys: s.done(),
                decoding: s.decoding(),
            })
            .collect();
        let batch = schedule(&views, self.options.budget, &self.pace);
        let running = |p: &Part| self.running.iter().find(|s| s.id == p.id);
        let whole = |p: &Part| running(p).map_or(*p, |s| s.whole(*p));
        let scheduled: Vec<Part> = batch.parts.iter().map(whole).collect();
        self.make_room(&scheduled)?;
        let (mut report, mut work) = (StepReport::default(), Work::default());
        self.step_pooled(&scheduled, (&mut report, &mut work), events)?;
        let parts = self.in_batch(&scheduled, |job| job.pooling.is_none());
        if parts.is_empty() {
            return Ok(report);
        }
        let mut logits = std::mem::take(&mut self.logits);
        let computed = self.compute(&parts, Output::Logits, &mut logits);
        let computed = self.or_fail(&parts, computed, events)?;
        let mut rows = logits.chunks_exact(self.model.spec().vocab);
        let mut ended: Vec<(SeqId, Done)> = computed.panicked.iter().map(|&id| (id, Done::Failed)).collect();
        let mut deciding = Vec::new();
        let apart = self.model.tells_drawn_apart();
        for (at, part, wanted) in computed.parts {
            let seq = &mut self.running[at];
            *(if seq.decoding() {
                &mut report.decode_rows
            } else {
                &mut report.prompt_rows
            }) += part.tokens;
            work.add(part.tokens, seq.done(), seq.decoding());
            *self.used.entry(seq.job.tenant).or_default() += part.tokens as u64;
            let had_prompt = seq.done() >= seq.prompt;
            seq.kv.tail.commit(part.tokens);
            let done = seq.done();
            if !had_prompt && done >= seq.prompt && !seq.job.no_cache {
                keep_prefix(
                    &mut self.cache,
                    &mut self.pool,
                    seq,
                    seq.course.keepable(seq.prompt),
                );
            }
            if done >= seq.course.border() {
                if !seq.job.no_cache {
                    keep_prefix(&mut self.cache, &mut self.pool, seq, seq.reusable(apart));
                }
                deciding.push(seq.id);
            }
            let last = (done == seq.tokens.len() && wanted > 0).then_some(done - 1);
            for (row, at) in rows.by_ref().take(wanted).zip(done - wanted..) {
                seq.note_prompt(at, row);
                if Some(at) != last {
                    continue;
                }
                if !had_prompt && seq.job.prompt_logprobs && done == seq.prompt {
                    events.push(Event::Prompt {
                        id: seq.id,
                        logprobs: std::mem::take(&mut seq.prompt_logprobs),
                    });
                    seq.job.prompt_logprobs = false;
                }
                // What a panic leaves half done is this sequence's own, and ends with it.
                let drawn = catch_unwind(AssertUnwindSafe(|| {
                    accept(seq, &self.tokenizer, row, &mut self.masked, events)
                }));
                match drawn {
                    Ok(None) => seq.correct(&mut self.pool),
                    Ok(Some(done)) => ended.push((seq.id, done)),
                    Err(_) => ended.push((seq.id, Done::Failed)),
                }
            }
        }
        self.logits = logits;
        self.panicked += ended.iter().filter(|e| e.1 == Done::Failed).count() as u64;
        self.end_all(|s| ended.iter().find(|e| e.0 == s.id).map(|e| e.1), events);
        for id in deciding {
            self.decide(id, events)?;
        }
        if computed.in_one {
            self.pace.learn(&work, started.elapsed().as_secs_f64());
        }
        Ok(report)
    }

    /// The sequences of `parts` whose jobs are `like` this. Whoever lost its memory is not running any more and drops out.
    fn in_batch(&self, parts: &[Part], like: impl Fn(&Job) -> bool) -> Vec<(usize, Part)> {
        let position = |p: &Part| {
            let at = self.running.iter().position(|s| s.id == p.id)?;
            like(&self.running[at].job).then_some((at, *p))
        };
        let mut parts: Vec<(usize, Part)> = parts.iter().filter_map(position).collect();
        // As the model wants them.
        parts.sort_by_key(|(at, _)| !self.running[*at].drawn());
        parts
    }

    /// Runs those of `parts` that want a vector of their prompt: the output matrix, most of a small model, is not applied.
    fn step_pooled(
        &mut self,
        parts: &[Part],
        (report, work): (&mut StepReport, &mut Work),
        events: &mut Vec<Event>,
    ) -> Result<(), EngineError> {
        let parts = self.in_batch(parts, |job| job.pooling.is_some());
        if parts.is_empty() {
            return Ok(());
        }
        let mut hidden = Vec::new();
        let computed = self.compute(&parts, Output::Hidden, &mut hidden);
        let computed = self.or_fail(&parts, computed, events)?;
        let d = self.model.spec().d_model;
        let mut rows = hidden.as_slice();
        let mut ended = Vec::new();
        for (at, part, wanted) in computed.parts {
            let (mine, rest) = rows.split_at(wanted * d);
            rows = rest;
            let seq = &mut self.running[at];
            report.prompt_rows += part.tokens;
            work.add(part.tokens, seq.done(), false);
            *self.used.entry(seq.job.tenant).or_default() += part.tokens as u64;
            seq.kv.tail.commit(part.tokens);
            if let Some(vector) = seq.pool(mine, d) {
                events.push(Event::Pooled { id: seq.id, vector });
                ended.push(seq.id);
            }
        }
        self.end_all(|s| ended.contains(&s.id).then_some(Done::Length), events);
        self.panicked += computed.panicked.len() as u64;
        let failed = |s: &Seq| computed.panicked.contains(&s.id).then_some(Done::Failed);
        self.end_all(failed, events);
        Ok(())
    }

    /// Ends all sequences of `parts` if the model could not compute them.
    fn or_fail<T>(
        &mut self,
        parts: &[(usize, Part)],
        computed: Result<T, ForwardError>,
        events: &mut Vec<Event>,
    ) -> Result<T, EngineError> {
        computed.map_err(|error| {
            let failed = |s: &Seq| parts.iter().any(|p| p.1.id == s.id).then_some(Done::Failed);
            self.end_all(failed, events);
            error.into()
        })
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

    /// Starts waiting requests, the next in line first, as long as memory for their prompts is there.
    fn admit(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        self.look_below();
        loop {
            let ready: Vec<usize> = self.ready().collect();
            let line: Vec<WaitView> = ready
                .iter()
                .map(|&at| &self.waiting[at])
                .map(|s| WaitView {
                    priority: s.job.priority,
                    used: self.used.get(&s.job.tenant).copied().unwrap_or(0),
                    id: s.id,
                })
                .collect();
            let Some(at) = next_in_line(&line).map(|i| ready[i]) else {
                return Ok(());
            };
            if self.waiting[at].course.reuse().is_some() {
                match self.admit_reuse(at, events) {
                    true => continue,
                    false => return Ok(()),
                }
            }
            let seq = &self.waiting[at];
            // A request whose prefix is just being computed by another waits for it rather than computing it again.
            if !seq.job.no_cache && !seq.job.recompute() && self.prefix_in_flight(seq) {
                return Ok(());
            }
            let known = seq.tokens.len();
            // The last token is always computed: its logits are needed.
            let mut kv = match seq.job.no_cache || seq.job.recompute() {
                true => SeqKv::new(self.pool.shape()),
                false => {
                    let known = &seq.tokens[..seq.findable(self.model.tells_drawn_apart())];
                    let mut found = self.cache.lookup(&mut self.pool, known, seq.job.salt);
                    // Whole stretches, of which some pages may have been forgotten.
                    let whole = seq.course.keepable(found.len());
                    self.pool.truncate(&mut found, whole);
                    found
                }
            };
            let cached = kv.len();
            let answer = (seq.prompt + seq.job.max_tokens - known).min(FIRST_ANSWER_TOKENS);
            let more = known + answer - cached;
            // Those who run can go on for a while, too: else the newcomer would soon lose its memory to them again.
            let spare = self.pool.shape().block_bytes() * self.running.len();
            let beside = seq.course.beside(known + answer);
            let need = self.pool.bytes_for(more + PAGE_ROWS) + beside;
            if self.pool.free_bytes() < need + spare {
                free(&mut self.cache, &mut self.chunks, &mut self.pool, need + spare);
            }
            let enough = self.running.is_empty() || self.pool.free_bytes() >= need + spare;
            let mut aside = 0;
            let reserved = match enough {
                true => match self.pool.reserve(&mut kv, more) {
                    Ok(()) => self.pool.set_aside(&mut aside, beside),
                    error => error,
                },
                false => {
                    self.pool.release(kv);
                    return Ok(());
                }
            };
            if let Err(error) = reserved {
                self.pool.release(kv);
                if self.running.is_empty() && self.cache.give_loads_up(&mut self.pool) {
                    free(&mut self.cache, &mut self.chunks, &mut self.pool, need);
                    continue;
                }
                // Somebody who runs will end and free memory; alone it must fit, or `submit` would have refused.
                return match self.running.is_empty() {
                    true => Err(error.into()),
                    false => Ok(()),
                };
            }
            let mut seq = self.waiting.remove(at);
            (seq.kv.tail, seq.aside) = (kv, aside);
            let came = self.cache.take_loaded(&mut self.pool, seq.id);
            if seq.cached.is_none() {
                seq.cached = Some(cached);
                seq.loaded = cached.min(came.to).saturating_sub(came.from);
            }
            self.running.push(seq);
        }
    }

    /// Starts the waiting request `at`, whose documents are reused: they are found or computed here, and everything behind them but the
    /// last token. Returns whether it is out of the line; if not, it waits for memory.
    fn admit_reuse(&mut self, at: usize, events: &mut Vec<Event>) -> bool {
        let seq = &self.waiting[at];
        let Some((how, policy)) = seq.course.reuse() else {
            return false;
        };
        let mut library = Library {
            model: &self.model,
            pool: &mut self.pool,
            chunks: &mut self.chunks,
            scratch: &mut self.scratch,
        };
        let need = library.need(&seq.tokens, &seq.job.documents, how.as_ref(), seq.job.salt);
        if self.pool.free_bytes() < need {
            free(&mut self.cache, &mut self.chunks, &mut self.pool, need);
        }
        if self.pool.free_bytes() < need && !self.running.is_empty() {
            return false;
        }
        let mut seq = self.waiting.remove(at);
        let mut library = Library {
            model: &self.model,
            pool: &mut self.pool,
            chunks: &mut self.chunks,
            scratch: &mut self.scratch,
        };
        let salt = seq.job.salt;
        // What it has drawn before it lost its memory is computed as drawn again, behind the prompt.
        let prompt = &seq.tokens[..seq.prompt];
        match library.start(prompt, &seq.job.documents, (how.as_ref(), &policy), salt, 1) {
            Ok((kv, provenance)) => {
                seq.kv = kv;
                seq.cached.get_or_insert(provenance.found);
                seq.course.note_documents(provenance);
                // A folder that cannot be written costs later hits, not this answer.
                let _ = self.chunks.flush(&self.pool);
                self.running.push(seq);
            }
            Err(_) => self.end(seq, Done::Failed, events),
        }
        true
    }

    /// Has the tiers asked for prompts of which they may have more than the memory.
    fn look_below(&mut self) {
        for seq in self.waiting.iter_mut().filter(|s| !s.looked_below) {
            let asking = Asking {
                id: seq.id,
                tokens: &seq.tokens[..seq.findable(self.model.tells_drawn_apart())],
                salt: seq.job.salt,
                keep: seq.job.keep,
            };
            seq.looked_below = self.cache.look_below(&mut self.pool, &asking);
        }
    }

    /// Waiting requests that no tier is bringing anything for.
    fn ready(&self) -> impl Iterator<Item = usize> {
        let ready = |s: &Seq| s.looked_below && !self.cache.is_loading(s.id);
        (0..self.waiting.len()).filter(move |&at| ready(&self.waiting[at]))
    }

    /// Reserves the memory that `parts` will write. When there are none left, cached prefixes go first; then the sequences that
    /// came last give their memory up: what they have computed stays cached as long as it can, the rest is computed again.
    fn make_room(&mut self, parts: &[Part]) -> Result<(), EngineError> {
        for part in parts {
            while let Some(at) = self.running.iter().position(|s| s.id == part.id) {
                let seq = &mut self.running[at];
                let Err(error) = seq.reserve(&mut self.pool, part.tokens) else {
                    break;
                };
                let beside = seq
                    .course
                    .beside(seq.done() + part.tokens)
                    .saturating_sub(seq.aside);
                let short = self.pool.bytes_for(part.tokens + PAGE_ROWS) + beside;
                free(&mut self.cache, &mut self.chunks, &mut self.pool, short);
                let seq = &mut self.running[at];
                if seq.reserve(&mut self.pool, part.tokens).is_ok() {
                    break;
                }
                if self.cache.give_loads_up(&mut self.pool) {
                    continue;
                }
                if self.running.len() == 1 {
                    return Err(error.into());
                }
                let last = (0..self.running.len())
                    .max_by_key(|&i| (self.running[i].job.priority, self.running[i].id));
                if let Some(last) = last {
                    self.preempt(last);
                }
            }
        }
        Ok(())
    }

    /// Lets the cache policy of `id` decide. When there is no room for what stays, cached prefixes go, then the memory of others.
    fn decide(&mut self, id: SeqId, events: &mut Vec<Event>) -> Result<(), EngineError> {
        while let Some(at) = self.running.iter().position(|s| s.id == id) {
            let Seq { course, kv, .. } = &mut self.running[at];
            let error = match course.decide(&self.model, &mut self.pool, kv) {
                Ok(()) => return Ok(()),
                Err(Undecided::Panicked) => {
                    self.panicked += 1;
                    self.end_all(|s| (s.id == id).then_some(Done::Failed), events);
                    return Ok(());
                }
                Err(Undecided::Edit(error)) => error,
            };
            let EditError::Kv(KvError::OutOfMemory { asked, .. }) = error else {
                self.end_all(|s| (s.id == id).then_some(Done::Failed), events);
                return Err(error.into());
            };
            let before = self.pool.free_bytes();
            free(
                &mut self.cache,
                &mut self.chunks,
                &mut self.pool,
                asked.max(before + 1),
            );
            if self.pool.free_bytes() > before {
                continue;
            }
            let others = (0..self.running.len()).filter(|&i| i != at);
            match others.max_by_key(|&i| (self.running[i].job.priority, self.running[i].id)) {
                Some(last) => self.preempt(last),
                None => {
                    self.end_all(|s| (s.id == id).then_some(Done::Failed), events);
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    fn preempt(&mut self, at: usize) {
        let mut seq = self.running.remove(at);
        if !seq.job.no_cache {
            let reusable = seq.reusable(self.model.tells_drawn_apart());
            keep_prefix(&mut self.cache, &mut self.pool, &seq, reusable);
        }
        seq.release(&mut self.pool);
        // What a policy decided is decided again, at the same places.
        seq.course.restart();
        seq.prompt_logprobs.clear();
        seq.looked_below = seq.job.no_cache || seq.job.recompute() || seq.course.reuse().is_some();
        seq.pooled.clear();
        self.preempted += 1;
        self.waiting.push(seq);
    }

    fn prefix_in_flight(&self, seq: &Seq) -> bool {
        let known = &seq.tokens[..seq.findable(self.model.tells_drawn_apart())];
        let computing = self
            .running
            .iter()
            .filter(|s| s.done() < s.prompt && !s.job.no_cache && s.job.salt == seq.job.salt)
            .filter(|s| s.course.reuse().is_none());
        let in_common = |s: &Seq| {
            let pairs = s.tokens[..s.prompt].iter().zip(known);
            let same = pairs.take_while(|(a, b)| a == b).count();
            s.course.keepable(same) / PAGE_ROWS * PAGE_ROWS
        };
        let most = computing.map(in_common).max().unwrap_or(0);
        most > 0 && most > self.cache.matched(known, seq.job.salt)
    }

    /// Ends the running sequences that `why` names.
    fn end_all(&mut self, why: impl Fn(&Seq) -> Option<Done>, events: &mut Vec<Event>) {
        let mut at = 0;
        while at < self.running.len() {
            match why(&self.running[at]) {
                Some(done) => {
                    let seq = self.running.remove(at);
                    self.end(seq, done, events);
                }
                None => at += 1,
            }
        }
    }

    fn end(&mut self, mut seq: Seq, done: Done, events: &mut Vec<Event>) {
        let text = match done {
            Done::StopString(_) | Done::Failed => String::new(),
            _ => {
                let tail = seq.decoder.flush();
                match seq.stop.push(&tail) {
                    Stopped::Go(text) => text + &seq.stop.finish(),
                    Stopped::Stop(text, _) => text,
                }
            }
        };
        let mut method = seq.course.report(&self.pool, &seq.kv).map(Box::new);
        if let (Some(report), Some(hooks)) = (&mut method, &seq.job.hooks) {
            report.told = hooks.take_told();
        }
        let plain = method.is_none() && seq.job.hooks.is_none();
        events.push(Event::End {
            id: seq.id,
            done,
            text,
            usage: seq.usage(),
            method,
        });
        // The answer is the start of the next turn's prompt.
        if done != Done::Failed && seq.done() >= seq.prompt && !seq.job.no_cache {
            let reusable = seq.reusable(self.model.tells_drawn_apart());
            keep_prefix(&mut self.cache, &mut self.pool, &seq, reusable);
            if reusable < seq.done() && plain {
                let known = &seq.tokens[..seq.done()];
                self.again.note(known, seq.prompt, seq.job.salt, seq.job.keep);
            }
        }
        self.cache.take_loaded(&mut self.pool, seq.id);
        seq.release(&mut self.pool);
        let tenant = seq.job.tenant;
        let still = |s: &Seq| s.job.tenant == tenant;
        if !self.waiting.iter().any(still) && !self.running.iter().any(still) {
            self.used.remove(&tenant);
        }
    }
}

/// Forgets what nobody reads until `bytes` are free, as far as it goes: prefixes first, then documents.
fn free(cache: &mut Cache, chunks: &mut ChunkStore, pool: &mut Pool, bytes: usize) {
    cache.evict(pool, bytes);
    if pool.free_bytes() < bytes {
        chunks.evict(pool, bytes);
    }
}

/// Keeps the first `tokens` tokens of `seq` in the tree of prefixes, if they are exact: what a policy has cut never is.
fn keep_prefix(cache: &mut Cache, pool: &mut Pool, seq: &Seq, tokens: usize) {
    if let Some(exact) = seq.kv.exact() {
        cache.insert(pool, &seq.tokens[..tokens], seq.job.salt, exact, seq.job.keep);
    }
}

/// What is known of a token beside its id.
#[derive(Default)]
struct Report {
    logprob: Option<f32>,
    top: Vec<(u32, f32)>,
    logits: Option<Vec<f32>>,
}

impl Report {
    fn of(job: &Job, token: u32, logits: &[f32]) -> Self {
        let (logprob, top) = match job.want_logprobs || job.top_logprobs > 0 {
            true => {
                let (own, top) = log_probs(logits, token, job.top_logprobs);
                (Some(own), top)
            }
            false => (None, Vec::new()),
        };
        Self {
            logprob,
            top,
            logits: job.want_logits.then(|| logits.to_vec()),
        }
    }
}

/// Draws the next token of `seq`, with those after it about which its constraint leaves no choice, and says whether it ends there.
fn accept(
    seq: &mut Seq,
    tokenizer: &Tokenizer,
    logits: &[f32],
    masked: &mut Vec<f32>,
    events: &mut Vec<Event>,
) -> Option<Done> {
    let Some(constraint) = &mut seq.job.constraint else {
        let token = seq.sampler.draw(logits, &seq.tokens);
        let is_end = tokenizer.is_end(token) && !seq.job.ignore_eos;
        let report = Report::of(&seq.job, token, logits);
        return push(seq, token, is_end, report, tokenizer, events);
    };
    let token = match seq.forced.pop_front() {
        Some(token) => {
            seq.sampler.skip();
            token
        }
        None => {
            masked.clear();
            masked.extend_from_slice(logits);
            if let Err(_failed) = constraint.0.mask(masked) {
                return Some(Done::Constraint);
            }
            let token = seq.sampler.draw(masked, &seq.tokens);
            if !tokenizer.is_end(token) {
                if let Err(_failed) = constraint.0.commit(token) {
                    return Some(Done::Constraint);
                }
                seq.forced.extend(constraint.0.forced());
            }
            token
        }
    };
    let report = Report::of(&seq.job, token, logits);
    let mut done = push(seq, token, tokenizer.is_end(token), report, tokenizer, events);
    // Forced tokens are computed together, unless their logits are to be told.
    let tells = seq.job.want_logprobs || seq.job.top_logprobs > 0 || seq.job.want_logits;
    while done.is_none()
        && !tells
        && let Some(token) = seq.forced.pop_front()
    {
        seq.sampler.skip();
        done = push(seq, token, false, Report::default(), tokenizer, events);
    }
    let complete = seq.forced.is_empty() && seq.job.constraint.as_ref().is_some_and(|c| c.0.is_done());
    done.or_else(|| complete.then_some(Done::EndToken))
}

/// Appends `token` to `seq`, tells of it, and says whether the sequence ends there.
fn push(
    seq: &mut Seq,
    token: u32,
    is_end: bool,
    report: Report,
    tokenizer: &Tokenizer,
    events: &mut Vec<Event>,
) -> Option<Done> {
    seq.tokens.push(token);
    let generated = seq.tokens.len() - seq.prompt;
    let piece = if is_end {
        None
    } else {
        seq.decoder.push(tokenizer, token)
    };
    let (text, stopped) = match seq.stop.push(&piece.unwrap_or_default()) {
        Stopped::Go(text) => (text, None),
        Stopped::Stop(text, which) => (text, Some(which)),
    };
    events.push(Event::Token {
        id: seq.id,
        token,
        logprob: report.logprob,
        top: report.top,
        text,
        logits: report.logits,
    });
    if is_end {
        Some(Done::EndToken)
    } else if let Some(which) = stopped {
        Some(Done::StopString(which))
    } else if generated >= seq.job.max_tokens {
        Some(Done::Length)
    } else {
        None
    }
}
