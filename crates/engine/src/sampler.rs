//! From logits to a token, with a generator of the request's own: a sampled answer does not depend on the batch.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What people may ask of the sampler, the names and the order of llama.cpp: logit bias, penalties, top-k, typical, top-p,
/// min-p, temperature, draw.
#[derive(Debug, Clone, PartialEq)]
pub struct RawSampling {
    /// 0 = greedy.
    pub temperature: f32,
    /// Keep the k best tokens; 0 = all.
    pub top_k: usize,
    /// Keep the smallest set with this mass; 1 = all.
    pub top_p: f32,
    /// Drop tokens below this fraction of the best one's probability; 0 = none.
    pub min_p: f32,
    /// Locally typical mass; 1 = all.
    pub typical: f32,
    /// Divides (multiplies, if negative) logits of tokens seen in the last `penalty_window`; 1 = off.
    pub repeat_penalty: f32,
    /// Subtracted once from tokens that occurred.
    pub presence_penalty: f32,
    /// Subtracted per occurrence.
    pub frequency_penalty: f32,
    /// Tokens that penalties look back at.
    pub penalty_window: usize,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the request's generator.
    pub seed: u64,
}

impl Default for RawSampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical: 1.0,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 64,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A number that makes no sense, with its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("`{name}` is {got}, it must be {range}")]
pub struct SamplingError {
    /// Name of the knob.
    pub name: &'static str,
    /// What was given.
    pub got: f64,
    /// What is allowed.
    pub range: &'static str,
}

/// Checked sampling settings; having them proves that the numbers make sense.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling(RawSampling);

impl Sampling {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self(RawSampling::default())
    }

    /// Whether the answer does not depend on the seed.
    pub fn is_greedy(&self) -> bool {
        self.0.temperature == 0.0
    }
}

impl TryFrom<RawSampling> for Sampling {
    type Error = SamplingError;

    fn try_from(raw: RawSampling) -> Result<Self, SamplingError> {
        let check = |name, got: f32, ok: bool, range| {
            if ok {
                Ok(())
            } else {
                Err(SamplingError {
                    name,
                    got: got.into(),
                    range,
                })
            }
        };
        let within = |x: f32, lo: f32, hi: f32| x >= lo && x <= hi; // also refuses NaN
        check(
            "temperature",
            raw.temperature,
            within(raw.temperature, 0.0, 100.0),
            "from 0 to 100",
        )?;
        check(
            "top_p",
            raw.top_p,
            raw.top_p > 0.0 && raw.top_p <= 1.0,
            "above 0, at most 1",
        )?;
        check("min_p", raw.min_p, within(raw.min_p, 0.0, 1.0), "from 0 to 1")?;
        check(
            "typical",
            raw.typical,
            raw.typical > 0.0 && raw.typical <= 1.0,
            "above 0, at most 1",
        )?;
        let ok = raw.repeat_penalty > 0.0 && raw.repeat_penalty <= 100.0;
        check("repeat_penalty", raw.repeat_penalty, ok, "above 0, at most 100")?;
        check(
            "presence_penalty",
            raw.presence_penalty,
            within(raw.presence_penalty, -100.0, 100.0),
            "from -100 to 100",
        )?;
        let ok = within(raw.frequency_penalty, -100.0, 100.0);
        check("frequency_penalty", raw.frequency_penalty, ok, "from -100 to 100")?;
        for &(_, bias) in &raw.logit_bias {
            check("logit_bias", bias, !bias.is_nan(), "a number")?;
        }
        Ok(Self(raw))
    }
}

/// The sampler of one request.
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: RawSampling,
    rng: ChaCha8Rng,
    /// Reused from token to token.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    pub fn new(settings: Sampling) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(settings.0.seed);
        Self {
            settings: settings.0,
            rng,
            candidates: Vec::new(),
        }
    }

    /// Draws from `logits: [vocab]`; `history` holds the tokens so far, for the penalties.
    ///
    /// NaN logits never win. Without any usable logit token 0 is returned.
    pub fn draw(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let s = &self.settings;
        let plain = s.logit_bias.is_empty()
            && s.repeat_penalty == 1.0
            && s.presence_penalty == 0.0
            && s.frequency_penalty == 0.0;
        if s.temperature == 0.0 && plain {
            argmax(logits)
        } else {
            self.choose(logits, history)
        }
    }

    /// Passes over the random number of a token that was not drawn, so that later ones do not depend on who chose it.
    pub fn skip(&mut self) {
        if self.settings.temperature != 0.0 {
            self.rng.next_u64();
        }
    }

    fn choose(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let s = &self.settings;
        let c = &mut self.candidates;
        c.clear();
        c.extend((0u32..).zip(logits.iter().copied()));
        for &(token, bias) in &s.logit_bias {
            if let Some(x) = c.get_mut(token as usize) {
                x.1 += bias;
            }
        }
        penalise(c, &history[history.len().saturating_sub(s.penalty_window)..], s);
        c.retain(|x| x.1 > f32::NEG_INFINITY); // drops NaN too
        if s.temperature == 0.0 {
            return c
                .iter()
                .fold((0, f32::NEG_INFINITY), |a, &b| if b.1 > a.1 { b } else { a })
                .0;
        }
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if s.top_k > 0 && s.top_k < c.len() {
            c.select_nth_unstable_by(s.top_k - 1, order);
            c.truncate(s.top_k);
        }
        c.sort_unstable_by(order);
        if s.typical < 1.0 {
            keep_typical(c, s.typical);
            c.sort_unstable_by(order);
        }
        if s.top_p < 1.0 {
            let p = softmax(c);
            let mut mass = 0.0;
            let keep = p.iter().position(|p| {
                mass += p;
                mass >= s.top_p
            });
            c.truncate(keep.map_or(c.len(), |k| k + 1));
        }
        if s.min_p > 0.0 && !c.is_empty() {
            let floor = c[0].1 + s.min_p.ln();
            c.retain(|x| x.1 >= floor);
        }
        for x in c.iter_mut() {
            x.1 /= s.temperature;
        }
        let p = softmax(c);
        // 53 random bits: one draw per token, whatever the settings.
        let u = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut mass = 0.0f64;
        for (x, p) in c.iter().zip(&p) {
            mass += f64::from(*p);
            if u < mass {
                return x.0;
            }
        }
        c.last().map_or(0, |x| x.0)
    }
}

fn penalise(c: &mut [(u32, f32)], window: &[u32], s: &RawSampling) {
    if s.repeat_penalty == 1.0 && s.presence_penalty == 0.0 && s.frequency_penalty == 0.0 {
        return;
    }
    let mut seen: Vec<u32> = window.to_vec();
    seen.sort_unstable();
    for run in seen.chunk_by(|a, b| a == b) {
        if let Some(x) = c.get_mut(run[0] as usize) {
            x.1 = if x.1 > 0.0 {
                x.1 / s.repeat_penalty
            } else {
                x.1 * s.repeat_penalty
            };
            x.1 -= s.presence_penalty + s.frequency_penalty * run.len() as f32;
        }
    }
}

/// Keeps the tokens whose surprise is closest to the entropy, up to `mass` (Meister et al. 2022).
fn keep_typical(c: &mut Vec<(u32, f32)>, mass: f32) {
    let p = softmax(c);
    let entropy: f32 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
    let mut by_distance: Vec<usize> = (0..c.len()).collect();
    by_distance.sort_by(|&a, &b| {
        (-p[a].ln() - entropy)
            .abs()
            .total_cmp(&(-p[b].ln() - entropy).abs())
            .then(a.cmp(&b))
    });
    let mut sum = 0.0;
    let keep = by_distance.iter().position(|&i| {
        sum += p[i];
        sum >= mass
    });
    by_distance.truncate(keep.map_or(c.len(), |k| k + 1));
    *c = by_distance.into_iter().map(|i| c[i]).collect();
}

fn softmax(c: &[(u32, f32)]) -> Vec<f32> {
    let max = c.iter().map(|x| x.1).fold(f32::NEG_INFINITY, f32::max);
    let mut p: Vec<f32> = c.iter().map(|x| (x.1 - max).exp()).collect();
    let sum: f32 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
    p
}

/// Index of the largest logit, ties to the lower index; NaN never wins.
pub fn argmax(logits: &[f32]) -> u32 {
    /// Logits that stay in the first cache until the largest among them is looked for.
    const NEAR: usize = 1024;
    let (mut best, mut at) = (f32::NEG_INFINITY, 0);
    for (i, near) in logits.chunks(NEAR).enumerate() {
        let top = antefix_kernels::ops::max(near);
        if top > best {
            (best, at) = (top, i * NEAR);
        }
    }
    let place = logits
        .get(at..)
        .unwrap_or_default()
        .iter()
        .position(|&x| x >= best);
    place.map_or(0, |i| (at + i) as u32)
}

/// Natural log of the softmax probability of `token`.
pub fn log_softmax_at(logits: &[f32], token: u32) -> f32 {
    let lse = LogSumExp::of(logits);
    logits
        .get(token as usize)
        .map_or(f32::NEG_INFINITY, |&x| lse.log_prob(x))
}

/// The normaliser of a row of logits.
struct LogSumExp {
    max: f32,
    ln_sum: f32,
}

impl LogSumExp {
    fn of(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
        Self {
            max,
            ln_sum: sum.ln() as f32,
        }
    }

    fn log_prob(&self, logit: f32) -> f32 {
        logit - self.max - self.ln_sum
    }
}

/// Log-probabilities of one row: of `token`, and of the `top` most likely tokens, best first, equal ones by id.
pub(crate) fn log_probs(logits: &[f32], token: u32, top: usize) -> (f32, Vec<(u32, f32)>) {
    let lse = LogSumExp::of(logits);
    let of = |id: u32| {
        logits
            .get(id as usize)
            .map_or(f32::NEG_INFINITY, |&x| lse.log_prob(x))
    };
    if top == 0 {
        return (of(token), Vec::new());
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let best_first = |a: &u32, b: &u32| of(*b).total_cmp(&of(*a)).then(a.cmp(b));
    if top < ids.len() {
        ids.select_nth_unstable_by(top, best_first);
        ids.truncate(top);
    }
    ids.sort_unstable_by(best_first);
    (of(token), ids.into_iter().map(|id| (id, of(id))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(raw: RawSampling) -> Sampler {
        Sampler::new(Sampling::try_from(raw).unwrap())
    }

    fn histogram(raw: RawSampling, logits: &[f32], n: usize) -> Vec<usize> {
        let mut s = sampler(raw);
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            counts[s.draw(logits, &[]) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_never_nan() {
        assert_eq!(
            Sampler::new(Sampling::greedy()).draw(&[f32::NAN, 1.0, 3.0, 3.0], &[]),
            2
        );
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0f32, 1.0, 2.0];
        let z: f32 = logits.iter().map(|x| x.exp()).sum();
        let counts = histogram(
            RawSampling {
                temperature: 1.0,
                seed: 3,
                ..RawSampling::default()
            },
            &logits,
            20_000,
        );
        for (c, l) in counts.iter().zip(logits) {
            let want = l.exp() / z * 20_000.0;
            assert!((*c as f32 - want).abs() < 400.0, "{counts:?} {want}");
        }
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let logits = [0.0f32, 1.0, 2.0, 3.0, -5.0];
        let base = RawSampling {
            temperature: 1.0,
            ..RawSampling::default()
        };
        let nonzero = |raw: RawSampling| -> Vec<usize> {
            histogram(raw, &logits, 3000)
                .iter()
                .enumerate()
                .filter(|x| *x.1 > 0)
                .map(|x| x.0)
                .collect()
        };
        assert_eq!(
            nonzero(RawSampling {
                top_k: 2,
                ..base.clone()
            }),
            [2, 3]
        );
        // Probabilities of the best three: .644 .237 .087.
        assert_eq!(
            nonzero(RawSampling {
                top_p: 0.8,
                ..base.clone()
            }),
            [2, 3]
        );
        assert_eq!(
            nonzero(RawSampling {
                min_p: 0.3,
                ..base.clone()
            }),
            [2, 3]
        );
        // Entropy 0.95: token 2 (surprise 1.44) and 3 (0.44) are nearest to it.
        assert_eq!(nonzero(RawSampling { typical: 0.7, ..base }), [2, 3]);
    }

    #[test]
    fn penalties_and_bias_change_the_winner() {
        let logits = [2.0f32, 1.9, 0.0];
        let mut s = sampler(RawSampling {
            repeat_penalty: 1.5,
            ..RawSampling::default()
        });
        assert_eq!(s.draw(&logits, &[0]), 1);
        let mut s = sampler(RawSampling {
            frequency_penalty: 1.0,
            ..RawSampling::default()
        });
        assert_eq!(s.draw(&logits, &[0, 0, 1]), 1);
        let mut s = sampler(RawSampling {
            presence_penalty: 3.0,
            ..RawSampling::default()
        });
        assert_eq!(s.draw(&logits, &[0, 1]), 2);
        let mut s = sampler(RawSampling {
            logit_bias: vec![(2, 5.0), (9, 1.0)],
            ..RawSampling::default()
        });
        assert_eq!(s.draw(&logits, &[]), 2);
    }

    #[test]
    fn equal_seeds_give_equal_answers() {
        let raw = RawSampling {
            temperature: 1.3,
            seed: 42,
            ..RawSampling::default()
        };
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let run = |raw: RawSampling| {
            let mut s = sampler(raw);
            (0..50).map(|_| s.draw(&logits, &[])).collect::<Vec<_>>()
        };
        assert_eq!(run(raw.clone()), run(raw.clone()));
        assert_ne!(run(raw.clone()), run(RawSampling { seed: 43, ..raw }));
    }

    #[test]
    fn numbers_without_sense_are_refused_by_name() {
        for (raw, name) in [
            (
                RawSampling {
                    temperature: f32::NAN,
                    ..RawSampling::default()
                },
                "temperature",
            ),
            (
                RawSampling {
                    top_p: 0.0,
                    ..RawSampling::default()
                },
                "top_p",
            ),
            (
                RawSampling {
                    repeat_penalty: -1.0,
                    ..RawSampling::default()
                },
                "repeat_penalty",
            ),
        ] {
            assert_eq!(Sampling::try_from(raw).unwrap_err().name, name);
        }
    }
}
