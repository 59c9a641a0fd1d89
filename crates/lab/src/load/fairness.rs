//! What somebody's long prompt does to somebody else's tokens.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::client::{LoadError, Message, Target};
use super::stats::Spread;
use super::traffic::{Kind, Shape, conversation};

/// How it is measured.
#[derive(Debug, Clone, Copy)]
pub struct FairnessPlan {
    /// Words of each long prompt.
    pub words: usize,
    /// Long prompts, one after the other.
    pub prompts: usize,
    /// Tokens that are read before the first long prompt is sent, and after each.
    pub idle_tokens: usize,
    /// Tokens that the stream may have at most.
    pub most: usize,
    /// Decides the texts.
    pub seed: u64,
}

/// What came out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fairness {
    /// Always `fairness`.
    pub test: String,
    /// Tokens of a long prompt, as the server counts.
    pub prompt_tokens: u64,
    /// Gaps measured while nobody else was there.
    pub idle_gaps: usize,
    /// Those gaps, milliseconds.
    pub idle_ms: Spread,
    /// Gaps that began or ended while a long prompt was computed.
    pub busy_gaps: usize,
    /// Those gaps, milliseconds.
    pub busy_ms: Spread,
    /// The longest of them.
    pub busy_max_ms: f64,
    /// 99th percentile beside a long prompt over the idle median.
    pub factor: f64,
    /// The same over the idle 99th percentile.
    pub factor_p99: f64,
    /// From each long prompt to its first token, seconds.
    pub prompt_s: Vec<f64>,
}

/// Streams one answer and sends long prompts beside it.
///
/// # Errors
/// When the server fails, or the stream ended before all long prompts were answered.
pub fn fairness(target: &Target, plan: &FairnessPlan) -> Result<Fairness, LoadError> {
    let began = Instant::now();
    let times: Mutex<Vec<f64>> = Mutex::default();
    let (over, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let read = || {
        times
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .len()
    };
    let wait_for = |tokens: usize| {
        while read() < tokens && !over.load(Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    };
    let (windows, prompt_tokens) = std::thread::scope(|scope| {
        let stream = scope.spawn(|| {
            let ask = [Message::new("user", "Tell me a very long story about a river.")];
            let streamed = target.ask(&ask, plan.most, || {
                let now = began.elapsed().as_secs_f64();
                times
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .push(now);
                !stop.load(Ordering::Relaxed)
            });
            over.store(true, Ordering::Relaxed);
            streamed
        });
        let mut windows = Vec::new();
        let mut prompt_tokens = 0;
        let shape = Shape {
            prefix: plan.words,
            ..Shape::default()
        };
        let mut beside = || -> Result<(), LoadError> {
            for i in 0..plan.prompts as u64 {
                wait_for(read() + plan.idle_tokens);
                if over.load(Ordering::Relaxed) {
                    break;
                }
                let long = conversation(Kind::Unique, &shape, plan.seed, i).start();
                let start = began.elapsed().as_secs_f64();
                let asked = target.ask(&long, 1, || true)?;
                prompt_tokens = asked.prompt_tokens;
                windows.push((start, start + asked.first.as_secs_f64()));
            }
            wait_for(read() + plan.idle_tokens / 4);
            Ok(())
        };
        let asked = beside();
        stop.store(true, Ordering::Relaxed);
        let streamed = stream
            .join()
            .unwrap_or_else(|_| Err(LoadError::Nothing("the reader panicked".into())));
        asked.and(streamed.map(drop)).map(|()| (windows, prompt_tokens))
    })?;
    let times = times
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let (idle, busy) = split(&times, &windows);
    if windows.len() < plan.prompts || busy.is_empty() || idle.is_empty() {
        return Err(LoadError::Nothing(format!(
            "the stream ended after {} tokens, beside {} of {} long prompts\nhint: a longer context, or fewer prompts",
            times.len(),
            windows.len(),
            plan.prompts
        )));
    }
    let (idle_ms, busy_ms) = (Spread::of(idle.iter().copied()), Spread::of(busy.iter().copied()));
    Ok(Fairness {
        test: "fairness".into(),
        prompt_tokens,
        idle_gaps: idle.len(),
        idle_ms,
        busy_gaps: busy.len(),
        busy_ms,
        busy_max_ms: busy.iter().copied().fold(0.0, f64::max),
        factor: busy_ms.p99 / idle_ms.p50,
        factor_p99: busy_ms.p99 / idle_ms.p99,
        prompt_s: windows.iter().map(|w| w.1 - w.0).collect(),
    })
}

/// Gaps between `times` in milliseconds: those that touch none of the windows, and those that touch one.
fn split(times: &[f64], windows: &[(f64, f64)]) -> (Vec<f64>, Vec<f64>) {
    let (mut idle, mut busy) = (Vec::new(), Vec::new());
    for pair in times.windows(2) {
        let touches = windows.iter().any(|w| pair[1] > w.0 && pair[0] < w.1);
        let to = if touches { &mut busy } else { &mut idle };
        to.push((pair[1] - pair[0]) * 1e3);
    }
    (idle, busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_that_touches_a_long_prompt_is_busy() {
        let times = [0.0, 1.0, 2.0, 5.0, 6.0];
        let (idle, busy) = split(&times, &[(2.5, 4.5)]);
        assert_eq!((idle, busy), (vec![1000.0, 1000.0, 1000.0], vec![3000.0]));
    }
}
