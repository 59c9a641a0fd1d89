//! The thread that owns the engine. Handlers send it requests and read their events; it never waits for a client.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use antefix_engine::{Done, Engine, Event, Job, JobError, MethodReport, PromptLogprob, RawJob, SeqId, Usage};
use antefix_models::tokenizer::Tokenizer;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::meters::Meters;

/// A drawn token as its request sees it.
#[derive(Debug, Clone)]
pub(crate) struct Drawn {
    pub(crate) token: u32,
    pub(crate) logprob: Option<f32>,
    pub(crate) top: Vec<(u32, f32)>,
    /// Text that became certain with it; may be empty.
    pub(crate) text: String,
}

/// What happens to one of a request's sequences.
#[derive(Debug, Clone)]
pub(crate) enum Happened {
    Prompt(Vec<PromptLogprob>),
    /// The prompt's vector, `[d_model]`.
    Pooled(Vec<f32>),
    Token(Drawn),
    End {
        done: Done,
        text: String,
        usage: Usage,
        method: Option<Box<MethodReport>>,
    },
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// It could never run.
    #[error(transparent)]
    Job(#[from] JobError),
    /// Too many are in line.
    #[error("{waiting} requests are in line already\nhint: try again in {retry_after_s} s")]
    Busy { waiting: usize, retry_after_s: u64 },
    /// The server ends.
    #[error("the server is shutting down")]
    Closing,
}

/// Events of a request's sequences with the index of the sequence. Dropping it cancels what still runs.
pub(crate) struct Generation {
    pub(crate) events: UnboundedReceiver<(usize, Happened)>,
    /// Sequences that have not ended yet.
    pub(crate) open: usize,
}

impl Generation {
    /// The next event; `None` when all sequences have ended or the engine is gone.
    pub(crate) async fn next(&mut self) -> Option<(usize, Happened)> {
        if self.open == 0 {
            return None;
        }
        let event = self.events.recv().await?;
        if matches!(event.1, Happened::End { .. }) {
            self.open -= 1;
        }
        Some(event)
    }
}

type Inspection = Box<dyn FnOnce(&mut Engine) + Send>;

enum Command {
    Submit {
        jobs: Vec<RawJob>,
        reply: oneshot::Sender<Result<Generation, Refused>>,
    },
    Inspect(Inspection),
    Wake,
}

/// Limits of the line.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests that may wait; more are turned away.
    pub queue: usize,
}

/// The engine's thread, as handlers see it.
#[derive(Clone)]
pub(crate) struct Worker {
    commands: mpsc::Sender<Command>,
    closing: Arc<AtomicBool>,
    tokenizer: Arc<Tokenizer>,
}

impl Worker {
    /// Starts the thread. `make` builds the engine, and builds it again after a panic.
    pub(crate) fn start(
        make: impl Fn() -> Engine + Send + 'static,
        limits: Limits,
        meters: Arc<Meters>,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let engine = make();
        let tokenizer = Arc::clone(engine.tokenizer());
        let closing = Arc::new(AtomicBool::new(false));
        let mut state = Loop {
            engine,
            make: Box::new(make),
            inbox,
            limits,
            meters,
            closing: Arc::clone(&closing),
            clients: HashMap::new(),
            recent_step_s: 0.05,
            cache_published: Instant::now(),
            tiers_off: Vec::new(),
        };
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || state.run())?;
        Ok(Self {
            commands,
            closing,
            tokenizer,
        })
    }

    pub(crate) fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Submits the sequences of one request: all or none.
    pub(crate) async fn submit(&self, jobs: Vec<RawJob>) -> Result<Generation, Refused> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Submit { jobs, reply });
        if sent.is_err() {
            return Err(Refused::Closing);
        }
        answer.await.unwrap_or(Err(Refused::Closing))
    }

    /// Runs `look` on the engine between two steps.
    pub(crate) async fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let look: Inspection = Box::new(move |engine| {
            let _ = reply.send(look(engine)); // nobody waits any more: nothing to do
        });
        self.commands.send(Command::Inspect(look)).ok()?;
        answer.await.ok()
    }

    /// Takes no more requests; those that run go on.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
        let _ = self.commands.send(Command::Wake); // the thread is gone already: fine
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }
}

struct Client {
    events: UnboundedSender<(usize, Happened)>,
    index: usize,
    submitted: Instant,
    last_token: Option<Instant>,
}

struct Loop {
    engine: Engine,
    make: Box<dyn Fn() -> Engine + Send>,
    inbox: mpsc::Receiver<Command>,
    limits: Limits,
    meters: Arc<Meters>,
    closing: Arc<AtomicBool>,
    clients: HashMap<SeqId, Client>,
    recent_step_s: f64,
    cache_published: Instant,
    /// Tiers that take nothing any more, as was told in the log.
    tiers_off: Vec<String>,
}

impl Loop {
    fn run(&mut self) {
        let mut events = Vec::new();
        loop {
            // Idle: wait until somebody wants something. All senders gone: the server is gone.
            if self.engine.is_idle() {
                self.publish();
                match self.rest() {
                    Ok(command) => self.obey(command),
                    Err(mpsc::RecvError) => return,
                }
            }
            while let Ok(command) = self.inbox.try_recv() {
                self.obey(command);
            }
            self.drop_the_vanished(&mut events);
            self.step(&mut events);
        }
    }

    /// Waits for a command; meanwhile the cache is looked after.
    fn rest(&mut self) -> Result<Command, mpsc::RecvError> {
        loop {
            let tended = catch_unwind(AssertUnwindSafe(|| self.engine.tend_cache()));
            let pause = tended.unwrap_or_else(|_| {
                tracing::error!("the cache panicked: what was in memory is lost");
                self.engine = (self.make)();
                Duration::from_secs(1)
            });
            match self.inbox.recv_timeout(pause) {
                Ok(command) => return Ok(command),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(mpsc::RecvError),
            }
            self.publish_cache();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { jobs, reply } => {
                let taken = self.submit(jobs);
                // The client left while it waited for this answer: dropping the generation cancels.
                let _ = reply.send(taken);
            }
            Command::Inspect(look) => look(&mut self.engine),
            Command::Wake => {}
        }
    }

    fn submit(&mut self, jobs: Vec<RawJob>) -> Result<Generation, Refused> {
        if self.closing.load(Ordering::Relaxed) {
            return Err(Refused::Closing);
        }
        let waiting = self.engine.load().waiting;
        if waiting + jobs.len() > self.limits.queue {
            self.meters.refused.inc();
            let retry_after_s = (self.recent_step_s * waiting as f64 * 8.0)
                .ceil()
                .clamp(1.0, 60.0) as u64;
            return Err(Refused::Busy {
                waiting,
                retry_after_s,
            });
        }
        let jobs: Vec<Job> = jobs
            .into_iter()
            .map(|raw| self.engine.job(raw))
            .collect::<Result<_, _>>()?;
        let (sender, events) = unbounded_channel();
        let open = jobs.len();
        let mut ids = Vec::with_capacity(open);
        for (index, job) in jobs.into_iter().enumerate() {
            match self.engine.submit(job) {
                Ok(id) => ids.push((index, id)),
                Err(error) => {
                    let mut dropped = Vec::new();
                    ids.iter()
                        .for_each(|&(_, id)| self.engine.cancel(id, &mut dropped));
                    return Err(error.into());
                }
            }
        }
        let submitted = Instant::now();
        for (index, id) in ids {
            let client = Client {
                events: sender.clone(),
                index,
                submitted,
                last_token: None,
            };
            self.clients.insert(id, client);
        }
        Ok(Generation { events, open })
    }

    /// Cancels the sequences whose clients are gone.
    fn drop_the_vanished(&mut self, events: &mut Vec<Event>) {
        let gone: Vec<SeqId> = self
            .clients
            .iter()
            .filter(|(_, c)| c.events.is_closed())
            .map(|(&id, _)| id)
            .collect();
        for id in gone {
            self.engine.cancel(id, events);
        }
        self.deliver(events);
    }

    fn step(&mut self, events: &mut Vec<Event>) {
        let started = Instant::now();
        let panicked = self.engine.load().panicked;
        // A panic that the engine cannot lay at one request's door: all requests fail, the server goes on with a fresh engine.
        let stepped = catch_unwind(AssertUnwindSafe(|| self.engine.step(events)));
        let took = started.elapsed();
        match stepped {
            Ok(Ok(report)) => {
                let panicked = self.engine.load().panicked - panicked;
                if panicked > 0 {
                    tracing::error!(
                        requests = panicked,
                        "requests panicked: they fail, the others go on"
                    );
                    self.meters.failed_steps.inc();
                }
                self.recent_step_s = 0.9 * self.recent_step_s + 0.1 * took.as_secs_f64();
                if report.prompt_rows + report.decode_rows > 0 {
                    self.meters.step(report.prompt_rows, report.decode_rows, took);
                }
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "a step failed");
                self.meters.failed_steps.inc();
                // Whoever could not even be started is never going to be.
                if self.engine.load().running == 0 {
                    self.fail_all(events);
                }
            }
            Err(_) => {
                tracing::error!("a step panicked: its requests fail, the cache is lost");
                self.meters.failed_steps.inc();
                self.engine = (self.make)();
                self.fail_all(events);
            }
        }
        self.deliver(events);
        self.publish();
    }

    fn fail_all(&mut self, events: &mut Vec<Event>) {
        events.clear();
        let mut ids: Vec<SeqId> = self.clients.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let mut dropped = Vec::new();
            self.engine.cancel(id, &mut dropped);
            events.push(Event::End {
                id,
                done: Done::Failed,
                text: String::new(),
                usage: Usage::default(),
                method: None,
            });
        }
    }

    fn deliver(&mut self, events: &mut Vec<Event>) {
        let now = Instant::now();
        for event in events.drain(..) {
            let (id, happened) = match event {
                Event::Prompt { id, logprobs } => (id, Happened::Prompt(logprobs)),
                Event::Pooled { id, vector } => (id, Happened::Pooled(vector)),
                Event::Token {
                    id,
                    token,
                    logprob,
                    top,
                    text,
                    ..
                } => (
                    id,
                    Happened::Token(Drawn {
                        token,
                        logprob,
                        top,
                        text,
                    }),
                ),
                Event::End {
                    id,
                    done,
                    text,
                    usage,
                    method,
                } => (
                    id,
                    Happened::End {
                        done,
                        text,
                        usage,
                        method,
                    },
                ),
            };
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            match &happened {
                Happened::Token(_) => match client.last_token.replace(now) {
                    None => self.meters.first_token(now - client.submitted),
                    Some(before) => self.meters.next_token(now - before),
                },
                Happened::End {
                    done, usage, method, ..
                } => {
                    let after = now - client.submitted;
                    self.meters.ended(*done, *usage, method.as_deref(), after);
                }
                Happened::Prompt(_) | Happened::Pooled(_) => {}
            }
            let ended = matches!(happened, Happened::End { .. });
            let _ = client.events.send((client.index, happened)); // gone: cancelled before the next step
            if ended {
                self.clients.remove(&id);
            }
        }
    }

    fn publish(&mut self) {
        self.meters.load(self.engine.load(), self.engine.pool().stats());
        self.publish_cache();
    }

    /// Once a second; a tier that takes nothing any more is told of once.
    fn publish_cache(&mut self) {
        if self.cache_published.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.cache_published = Instant::now();
        let stats = self.engine.cache_stats();
        self.meters.cache(&stats);
        for tier in stats.below.iter().flat_map(|b| &b.tiers) {
            let known = self.tiers_off.contains(&tier.name);
            match &tier.off {
                Some(why) if !known => {
                    tracing::error!(tier = tier.name, why, "blocks are not stored any more");
                    self.tiers_off.push(tier.name.clone());
                }
                None if known => self.tiers_off.retain(|name| *name != tier.name),
                _ => {}
            }
        }
    }
}
