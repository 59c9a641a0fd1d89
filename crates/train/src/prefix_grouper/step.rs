//! One update of the policy on a batch of groups, and what is reported of it (section 4.4).

use std::sync::Arc;

use candle_core::Tensor;

use super::advantage::advantages;
use super::layout::{Form, Prompted, Scored, pack};
use super::objective::{PolicyLoss, PolicyRows, RatioLevel, Seen};
use crate::error::TrainError;
use crate::model::{Batch, Params};
use crate::ops;
use crate::optim::Grads;

/// A model whose rows can be scored.
pub trait LanguageModel {
    /// Its parameters.
    fn params(&self) -> &Params;

    /// Rows behind the last norm, `[R, d]`.
    ///
    /// # Errors
    /// Tokens that the model does not have.
    fn hidden(&self, batch: &Batch) -> Result<Tensor, TrainError>;

    /// The output matrix, `[V, d]`.
    fn output(&self) -> &Tensor;
}

impl LanguageModel for crate::model::Decoder {
    fn params(&self) -> &Params {
        self.params()
    }

    fn hidden(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        self.hidden(batch)
    }

    fn output(&self) -> &Tensor {
        self.output()
    }
}

impl LanguageModel for crate::model::Gpt {
    fn params(&self) -> &Params {
        self.params()
    }

    fn hidden(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        self.hidden(batch)
    }

    fn output(&self) -> &Tensor {
        self.output()
    }
}

/// A prompt, its responses and what they earned.
#[derive(Debug, Clone)]
pub struct GroupOutcome {
    /// Tokens.
    pub item: Prompted,
    /// Log-probability of each token of each response when it was drawn.
    pub old: Vec<Vec<f64>>,
    /// One a response.
    pub rewards: Vec<f64>,
    /// Responses that count for nothing: cut off ones, if asked.
    pub masked: Vec<bool>,
}

/// Figures of one update.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepReport {
    /// The objective's loss.
    pub loss: f64,
    /// Mean reward.
    pub reward: f64,
    /// Unbiased deviation of rewards over the batch.
    pub reward_std: f64,
    /// Share of groups in which all rewards are equal.
    pub flat_groups: f64,
    /// Mean tokens of a response.
    pub length: f64,
    /// Mean k3 to the reference; 0 without one.
    pub kl: f64,
    /// Mean `logp - ref` (k1); 0 without one.
    pub k1: f64,
    /// Share of tokens clipped below and above.
    pub clipped: [f64; 2],
    /// Mean importance ratio: 1 at the first update after a rollout, if trainer and engine agree.
    pub ratio: f64,
    /// Rows computed, forward and backward.
    pub rows: usize,
}

/// Log-probabilities of the scored tokens, `[N]`, without gradients.
pub(super) fn score(
    model: &dyn LanguageModel,
    scored: &Scored,
    temperature: f64,
) -> Result<Vec<f64>, TrainError> {
    let hidden = model.hidden(&scored.batch)?.detach();
    let hidden = ops::embed(&hidden, &scored.rows, 1.0)?;
    let logp = ops::log_probs(&hidden, &model.output().detach(), &scored.targets, temperature)?;
    Ok(logp.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

/// Mean of `logp - old` over each response, spread over its tokens.
fn sequence_ratios(scored: &Scored, logp: &[f64], old: &[f64]) -> Vec<f64> {
    let mut sums: std::collections::HashMap<[usize; 2], (f64, f64)> = std::collections::HashMap::new();
    for ((owner, logp), old) in scored.owners.iter().zip(logp).zip(old) {
        let sum = sums.entry(*owner).or_default();
        sum.0 += logp - old;
        sum.1 += 1.0;
    }
    scored.owners.iter().map(|o| sums[o].0 / sums[o].1).collect()
}

/// Computes the loss of `outcomes` and adds its gradient to `grads`. `reference` is the policy that KL is taken to.
///
/// # Errors
/// Empty prompts or responses, and tensor operations that fail.
pub fn policy_step(
    model: &dyn LanguageModel,
    reference: Option<&dyn LanguageModel>,
    outcomes: &[GroupOutcome],
    loss: PolicyLoss,
    temperature: f64,
    form: Form,
    grads: &mut Grads,
) -> Result<StepReport, TrainError> {
    let items: Vec<Prompted> = outcomes.iter().map(|o| o.item.clone()).collect();
    let scored = pack(&items, form)?;
    let rewards: Vec<Vec<f64>> = outcomes.iter().map(|o| o.rewards.clone()).collect();
    let masked: Vec<Vec<bool>> = outcomes.iter().map(|o| o.masked.clone()).collect();
    let advantage = advantages(loss.advantage, &rewards);
    let old: Vec<f64> = outcomes
        .iter()
        .flat_map(|o| o.old.iter().flatten().copied())
        .collect();
    let reference = match reference {
        Some(reference) if loss.beta > 0.0 => Some(score(reference, &scored, temperature)?),
        _ => None,
    };
    let log_ratio = match loss.level {
        RatioLevel::Token => None,
        RatioLevel::Sequence => Some(sequence_ratios(
            &scored,
            &score(model, &scored, temperature)?,
            &old,
        )),
    };
    let rows = Arc::new(PolicyRows {
        weights: loss.weights(&scored.owners, &masked),
        advantages: scored.owners.iter().map(|&[i, j]| advantage[i][j]).collect(),
        old,
        reference,
        log_ratio,
    });
    let seen = Seen::new(scored.targets.len());
    let hidden = ops::embed(&model.hidden(&scored.batch)?, &scored.rows, 1.0)?;
    let total = ops::token_loss(
        &hidden,
        model.output(),
        &scored.targets,
        temperature,
        loss.rule(rows.clone(), seen.clone()),
    )?;
    grads.add(model.params(), &total)?;
    Ok(report(
        &rewards,
        &scored,
        &rows,
        loss,
        &seen.values(),
        f64::from(total.to_scalar::<f32>()?),
    ))
}

fn report(
    rewards: &[Vec<f64>],
    scored: &Scored,
    rows: &PolicyRows,
    loss: PolicyLoss,
    logp: &[f64],
    total: f64,
) -> StepReport {
    let all: Vec<f64> = rewards.iter().flatten().copied().collect();
    let n = all.len().max(1) as f64;
    let reward = all.iter().sum::<f64>() / n;
    let squares: f64 = all.iter().map(|r| (r - reward) * (r - reward)).sum();
    let flat = rewards.iter().filter(|g| g.iter().all(|r| *r == g[0])).count();
    let tokens = logp.len().max(1) as f64;
    let mut out = StepReport {
        loss: total,
        reward,
        reward_std: (squares / (n - 1.0).max(1.0)).sqrt(),
        flat_groups: flat as f64 / rewards.len().max(1) as f64,
        length: tokens / n,
        rows: scored.batch.packing.rows(),
        ..StepReport::default()
    };
    for (row, &logp) in logp.iter().enumerate() {
        let reference = rows.reference.as_ref().map(|r| r[row]);
        let stats = loss.token(
            logp,
            rows.old[row],
            reference,
            rows.advantages[row],
            rows.log_ratio.as_ref().map(|r| r[row]),
        );
        out.ratio += stats.ratio / tokens;
        out.kl += stats.kl / tokens;
        out.k1 += reference.map_or(0.0, |r| logp - r) / tokens;
        if stats.clipped {
            out.clipped[usize::from(rows.advantages[row] >= 0.0)] += 1.0 / tokens;
        }
    }
    out
}
