//! The clipped policy objective, its KL term, and how tokens are summed up (sections 4.2 and 4.3).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::advantage::Advantage;
use crate::ops::RowLoss;

/// How the losses of tokens become one number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregate {
    /// Mean over a response's tokens, then over responses, then over prompts: a token of a long answer weighs less.
    Response,
    /// Mean over all response tokens of the batch.
    Token,
    /// Sum over tokens, over `G * L_max` with a constant `L_max`, then mean over prompts: no bias by length.
    Constant(usize),
}

/// What the probability ratio is taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// Each token.
    Token,
    /// The whole response, `exp(mean (logp - logp_old))`: GSPO.
    Sequence,
}

/// Named settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// DeepSeekMath.
    Grpo,
    /// Clip-higher, token-level mean, no KL.
    Dapo,
    /// No deviation, no length in the denominators, no KL.
    DrGrpo,
    /// Ratios of whole responses.
    Gspo,
}

/// A policy objective. Loss of a token: `-min(rho A, clip(rho, 1 - low, 1 + high) A) + beta kl`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyLoss {
    /// `eps_lo`, `eps_hi`
    pub clip: [f64; 2],
    /// Weight of the KL to the reference (k3, `exp(ref - logp) - (ref - logp) - 1`); 0 needs no reference.
    pub beta: f64,
    /// Tokens or responses.
    pub level: RatioLevel,
    /// Sums.
    pub aggregate: Aggregate,
    /// Rewards.
    pub advantage: Advantage,
}

impl Variant {
    /// The settings of its paper; `longest` is the constant length of `dr_grpo`.
    pub fn loss(self, longest: usize) -> PolicyLoss {
        let grpo = PolicyLoss {
            clip: [0.2, 0.2],
            beta: 0.04,
            level: RatioLevel::Token,
            aggregate: Aggregate::Response,
            advantage: Advantage::Group,
        };
        match self {
            Self::Grpo => grpo,
            Self::Dapo => PolicyLoss {
                clip: [0.2, 0.28],
                beta: 0.0,
                aggregate: Aggregate::Token,
                ..grpo
            },
            Self::DrGrpo => PolicyLoss {
                beta: 0.0,
                aggregate: Aggregate::Constant(longest),
                advantage: Advantage::Mean,
                ..grpo
            },
            Self::Gspo => PolicyLoss {
                clip: [3e-4, 4e-4],
                beta: 0.0,
                level: RatioLevel::Sequence,
                ..grpo
            },
        }
    }
}

/// What one token's loss is made of.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TokenStats {
    /// Loss and its derivative by the log-probability, before weighting.
    pub loss: f64,
    /// `d loss / d logp`
    pub slope: f64,
    /// `rho`
    pub ratio: f64,
    /// k3
    pub kl: f64,
    /// The clipped branch counts, so the policy term has no gradient.
    pub clipped: bool,
}

impl PolicyLoss {
    /// A token with log-probability `logp`, `old` when it was drawn, `reference` under the reference; `log_ratio` replaces `logp - old` for
    /// sequence ratios.
    pub fn token(
        &self,
        logp: f64,
        old: f64,
        reference: Option<f64>,
        advantage: f64,
        log_ratio: Option<f64>,
    ) -> TokenStats {
        let ratio = log_ratio.unwrap_or(logp - old).exp();
        let [low, high] = self.clip;
        let clipped = if advantage >= 0.0 {
            ratio > 1.0 + high
        } else {
            ratio < 1.0 - low
        };
        let bounded = ratio.clamp(1.0 - low, 1.0 + high);
        let policy = (ratio * advantage).min(bounded * advantage);
        let (kl, kl_slope) = match reference {
            Some(reference) if self.beta > 0.0 => {
                let d = reference - logp;
                (d.exp() - d - 1.0, 1.0 - d.exp())
            }
            _ => (0.0, 0.0),
        };
        TokenStats {
            loss: -policy + self.beta * kl,
            slope: if clipped { 0.0 } else { -advantage * ratio } + self.beta * kl_slope,
            ratio,
            kl,
            clipped,
        }
    }

    /// The weight of each token, `[N]`, from the prompt and response it belongs to; `masked[i][j]` leaves a response out.
    pub fn weights(&self, owners: &[[usize; 2]], masked: &[Vec<bool>]) -> Vec<f64> {
        let prompts = masked.len().max(1) as f64;
        let mut lengths: Vec<Vec<usize>> = masked.iter().map(|m| vec![0; m.len()]).collect();
        for &[i, j] in owners {
            lengths[i][j] += 1;
        }
        let counted: usize = lengths
            .iter()
            .zip(masked)
            .flat_map(|(l, m)| l.iter().zip(m))
            .filter(|(_, masked)| !**masked)
            .map(|(l, _)| l)
            .sum();
        owners
            .iter()
            .map(|&[i, j]| {
                if masked[i][j] {
                    return 0.0;
                }
                let group = masked[i].len() as f64;
                match self.aggregate {
                    Aggregate::Response => 1.0 / (prompts * group * lengths[i][j] as f64),
                    Aggregate::Token => 1.0 / counted as f64,
                    Aggregate::Constant(longest) => 1.0 / (prompts * group * longest.max(1) as f64),
                }
            })
            .collect()
    }
}

/// Tokens of a batch with all that the objective needs, each `[N]`.
#[derive(Debug, Clone)]
pub struct PolicyRows {
    /// Weight in the sum.
    pub weights: Vec<f64>,
    /// Of the response.
    pub advantages: Vec<f64>,
    /// When drawn.
    pub old: Vec<f64>,
    /// Under the reference, if there is one.
    pub reference: Option<Vec<f64>>,
    /// Logarithm of the sequence ratio, for [`RatioLevel::Sequence`].
    pub log_ratio: Option<Vec<f64>>,
}

/// Log-probabilities that a pass writes down as it goes, `[N]`.
#[derive(Debug, Clone)]
pub struct Seen(Arc<Vec<AtomicU64>>);

impl Seen {
    /// Room for `n`.
    pub fn new(n: usize) -> Self {
        Self(Arc::new((0..n).map(|_| AtomicU64::new(0)).collect()))
    }

    /// What was written.
    pub fn values(&self) -> Vec<f64> {
        self.0
            .iter()
            .map(|b| f64::from_bits(b.load(Ordering::Relaxed)))
            .collect()
    }
}

impl PolicyLoss {
    /// The rule for [`crate::ops::token_loss`]. Log-probabilities are written into `seen`.
    pub fn rule(self, rows: Arc<PolicyRows>, seen: Seen) -> RowLoss {
        RowLoss::Rule(Arc::new(move |row, logp| {
            seen.0[row].store(logp.to_bits(), Ordering::Relaxed);
            let stats = self.token(
                logp,
                rows.old[row],
                rows.reference.as_ref().map(|r| r[row]),
                rows.advantages[row],
                rows.log_ratio.as_ref().map(|r| r[row]),
            );
            // A sequence ratio depends on the mean of its tokens: with weights of 1 / (.. |o|) the slopes of its tokens are already right.
            (rows.weights[row] * stats.loss, rows.weights[row] * stats.slope)
        }))
    }
}
