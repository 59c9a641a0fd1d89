//! Whether one tenant can tell from the time of an answer what another one asked before.

use std::cell::Cell;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::client::{LoadError, Target};
use super::stats::{Spread, auc};

/// How it is tried.
#[derive(Debug, Clone, Copy)]
pub struct IsolationPlan {
    /// Probes in all.
    pub trials: usize,
    /// Tokens of a secret prompt.
    pub tokens: usize,
    /// Token ids are drawn from `low .. low + kinds`.
    pub low: u32,
    /// See `low`.
    pub kinds: u32,
    /// Decides prompts and coins.
    pub seed: u64,
}

/// What came out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Isolation {
    /// Always `isolation`.
    pub test: String,
    /// What the caller says of the server: `apart` or `shared`.
    pub caches: String,
    /// Probes.
    pub trials: usize,
    /// Of those, after the other tenant had asked just that.
    pub asked_before: usize,
    /// Tokens of a prompt.
    pub tokens: usize,
    /// The chance that a probe of a prompt that was asked before is quicker than one of a prompt that was not. 0.5: no telling.
    pub auc: f64,
    /// Standard error of an `auc` of 0.5 with as many trials.
    pub standard_error: f64,
    /// Times of probes after the prompt was asked, milliseconds.
    pub asked_ms: Spread,
    /// Times of the others.
    pub not_asked_ms: Spread,
    /// Tokens that probes found cached, as the server says: none where tenants are kept apart.
    pub cached_tokens: u64,
}

/// A victim asks a secret prompt or, as a coin decides, another one; then a prober, under a key of its own, asks the secret prompt
/// and takes the time.
///
/// # Errors
/// When the server fails.
pub fn isolation(
    victim: &Target,
    prober: &Target,
    caches: &str,
    plan: &IsolationPlan,
) -> Result<Isolation, LoadError> {
    let state = Cell::new(plan.seed | 1);
    let bits = || {
        let x = state.get().wrapping_mul(6_364_136_223_846_793_005);
        state.set(x.wrapping_add(1_442_695_040_888_963_407));
        state.get() >> 33
    };
    let prompt = || -> Vec<u32> {
        (0..plan.tokens)
            .map(|_| plan.low + (bits() % u64::from(plan.kinds.max(1))) as u32)
            .collect()
    };
    let (mut asked, mut not_asked, mut cached_tokens) = (Vec::new(), Vec::new(), 0);
    for _ in 0..plan.trials {
        let (secret, other, coin) = (prompt(), prompt(), bits() & 1 == 0);
        victim.ask_tokens(if coin { &secret } else { &other })?;
        let probe = prober.ask_tokens(&secret)?;
        cached_tokens += probe.cached_tokens;
        let to = if coin { &mut asked } else { &mut not_asked };
        to.push(ms(probe.whole));
    }
    if asked.is_empty() || not_asked.is_empty() {
        return Err(LoadError::Nothing(
            "too few trials: the coin fell on one side only".into(),
        ));
    }
    let (a, b) = (asked.len() as f64, not_asked.len() as f64);
    Ok(Isolation {
        test: "isolation".into(),
        caches: caches.into(),
        trials: plan.trials,
        asked_before: asked.len(),
        tokens: plan.tokens,
        auc: auc(&asked, &not_asked),
        standard_error: ((a + b + 1.0) / (12.0 * a * b)).sqrt(),
        asked_ms: Spread::of(asked),
        not_asked_ms: Spread::of(not_asked),
        cached_tokens,
    })
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
