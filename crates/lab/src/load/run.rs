//! Many conversations at a time, and what their users had to wait for.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::client::{Asked, LoadError, Message, Target};
use super::stats::Spread;
use super::traffic::{Kind, Shape, conversation, gap};

/// When conversations start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrivals {
    /// This many at a time; the next starts when one has ended.
    Closed(usize),
    /// A Poisson process of this many a second, however many are under way.
    Open(f64),
}

/// What a request must keep to count as good.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// To the first token, milliseconds.
    pub ttft_ms: f64,
    /// From token to token, the request's mean, milliseconds.
    pub itl_ms: f64,
}

impl Default for Limits {
    /// A second until something is seen, then ten tokens a second, which is faster than people read.
    fn default() -> Self {
        Self {
            ttft_ms: 1000.0,
            itl_ms: 100.0,
        }
    }
}

/// One run.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// What is asked.
    pub kind: Kind,
    /// Sizes.
    pub shape: Shape,
    /// When.
    pub arrivals: Arrivals,
    /// How many.
    pub conversations: usize,
    /// Decides texts and arrivals.
    pub seed: u64,
    /// What is good.
    pub limits: Limits,
}

/// One row of `antefix bench --serve`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadRow {
    /// Always `serve`.
    pub test: String,
    /// What was asked.
    pub kind: Kind,
    /// Conversations at a time, or `None`.
    pub concurrency: Option<usize>,
    /// Conversations that arrive in a second, or `None`.
    pub rate: Option<f64>,
    /// Seed.
    pub seed: u64,
    /// Sizes.
    pub shape: Shape,
    /// Limits of a good request.
    pub limits: Limits,
    /// Requests that were answered: each turn of a conversation is one.
    pub requests: usize,
    /// Requests that were not.
    pub errors: usize,
    /// The first error.
    pub first_error: Option<String>,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Answered requests a second.
    pub requests_s: f64,
    /// Requests a second that kept the limits.
    pub goodput: f64,
    /// Their share.
    pub good_share: f64,
    /// Tokens of answers a second.
    pub tok_s: f64,
    /// Tokens of prompts a second, cached ones included.
    pub prompt_tok_s: f64,
    /// Cached part of the prompts, as the server says.
    pub cached_share: f64,
    /// Mean length of a prompt.
    pub prompt_tokens: f64,
    /// Time to the first text, milliseconds.
    pub ttft_ms: Spread,
    /// From text to text, all requests' together, milliseconds.
    pub itl_ms: Spread,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// Asks turn after turn; stops at an error.
pub(super) fn talk(target: &Target, plan: &Plan, i: u64, mut each: impl FnMut(Result<Asked, LoadError>)) {
    let said = conversation(plan.kind, &plan.shape, plan.seed, i);
    let mut messages = said.start();
    for turn in 0..said.turns.len() {
        if turn > 0 {
            messages.push(Message::new("user", &said.turns[turn]));
        }
        let asked = target.ask(&messages, plan.shape.output, || true);
        let ended = match &asked {
            Ok(asked) => {
                messages.push(Message::new("assistant", &asked.text));
                false
            }
            Err(_) => true,
        };
        each(asked);
        if ended {
            break;
        }
    }
}

/// Runs `plan` against `target`.
///
/// # Errors
/// When no request at all was answered.
pub fn run(target: &Target, plan: &Plan) -> Result<LoadRow, LoadError> {
    let answers = Mutex::new((Vec::new(), Vec::new()));
    let note = |asked: Result<Asked, LoadError>| {
        let mut answers = answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match asked {
            Ok(asked) => answers.0.push(asked),
            Err(error) => answers.1.push(error),
        }
    };
    let next = &AtomicU64::new(0);
    let note = &note;
    let start = Instant::now();
    std::thread::scope(|scope| match plan.arrivals {
        Arrivals::Closed(people) => {
            for _ in 0..people.min(plan.conversations) {
                scope.spawn(move || {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        if i >= plan.conversations as u64 {
                            break;
                        }
                        talk(target, plan, i, note);
                    }
                });
            }
        }
        Arrivals::Open(rate) => {
            let mut due = Duration::ZERO;
            for i in 0..plan.conversations as u64 {
                std::thread::sleep(due.saturating_sub(start.elapsed()));
                scope.spawn(move || talk(target, plan, i, note));
                due += Duration::from_secs_f64(gap(rate, plan.seed, i));
            }
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let (asked, mut errors) = answers
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if asked.is_empty() {
        let nothing = || LoadError::Nothing("nothing was asked".into());
        return Err(errors.pop().unwrap_or_else(nothing));
    }
    Ok(row(plan, &asked, &errors, seconds))
}

fn row(plan: &Plan, asked: &[Asked], errors: &[LoadError], seconds: f64) -> LoadRow {
    let good =
        |a: &&Asked| ms(a.first) <= plan.limits.ttft_ms && a.seconds_a_token() * 1e3 <= plan.limits.itl_ms;
    let good = asked.iter().filter(good).count() as f64;
    let sum = |of: fn(&Asked) -> u64| asked.iter().map(of).sum::<u64>() as f64;
    let prompts = sum(|a| a.prompt_tokens);
    LoadRow {
        test: "serve".into(),
        kind: plan.kind,
        concurrency: match plan.arrivals {
            Arrivals::Closed(n) => Some(n),
            Arrivals::Open(_) => None,
        },
        rate: match plan.arrivals {
            Arrivals::Closed(_) => None,
            Arrivals::Open(rate) => Some(rate),
        },
        seed: plan.seed,
        shape: plan.shape,
        limits: plan.limits,
        requests: asked.len(),
        errors: errors.len(),
        first_error: errors.first().map(ToString::to_string),
        seconds,
        requests_s: asked.len() as f64 / seconds,
        goodput: good / seconds,
        good_share: good / (asked.len() + errors.len()) as f64,
        tok_s: sum(|a| a.completion_tokens) / seconds,
        prompt_tok_s: prompts / seconds,
        cached_share: sum(|a| a.cached_tokens) / prompts.max(1.0),
        prompt_tokens: prompts / asked.len() as f64,
        ttft_ms: Spread::of(asked.iter().map(|a| ms(a.first))),
        itl_ms: Spread::of(asked.iter().flat_map(|a| &a.gaps).map(|&g| ms(g))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_is_what_keeps_both_limits() {
        let asked = |first: u64, whole: u64| Asked {
            first: Duration::from_millis(first),
            whole: Duration::from_millis(whole),
            completion_tokens: 11,
            prompt_tokens: 100,
            cached_tokens: 25,
            ..Asked::default()
        };
        let plan = Plan {
            kind: Kind::Unique,
            shape: Shape::default(),
            arrivals: Arrivals::Closed(1),
            conversations: 4,
            seed: 0,
            limits: Limits::default(),
        };
        // Good; a slow start; slow tokens; and one that was not answered.
        let all = [asked(900, 1800), asked(1100, 1200), asked(100, 1200)];
        let row = row(&plan, &all, &[LoadError::Nothing("gone".into())], 2.0);
        assert_eq!(
            (row.requests, row.errors, row.goodput, row.good_share),
            (3, 1, 0.5, 0.25)
        );
        assert_eq!((row.tok_s, row.cached_share), (16.5, 0.25));
    }
}
