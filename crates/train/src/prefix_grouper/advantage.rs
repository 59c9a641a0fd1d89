//! From rewards to advantages, one number a response (section 4.1).

use serde::{Deserialize, Serialize};

/// How a reward is compared with those of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Advantage {
    /// `(r - mean) / (std + 1e-4)`, with the unbiased deviation of the group (`G - 1`): DeepSeekMath's GRPO.
    Group,
    /// `r - mean`: Dr. GRPO.
    Mean,
    /// `(r - mean of the group) / (std of the batch + 1e-4)`
    BatchStd,
    /// `r - mean of the others`: RLOO.
    LeaveOneOut,
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}

/// Unbiased; 0 of fewer than two.
fn deviation(x: &[f64]) -> f64 {
    let mean = mean(x);
    let squares: f64 = x.iter().map(|x| (x - mean) * (x - mean)).sum();
    (squares / (x.len().max(2) - 1) as f64).sqrt()
}

/// Advantages of groups of rewards. A group in which all rewards are equal gets exact zeros.
pub fn advantages(kind: Advantage, rewards: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let all: Vec<f64> = rewards.iter().flatten().copied().collect();
    let batch = deviation(&all);
    rewards
        .iter()
        .map(|group| {
            if group.iter().all(|r| *r == group[0]) {
                return vec![0.0; group.len()];
            }
            let (middle, n) = (mean(group), group.len() as f64);
            let scale = match kind {
                Advantage::Group => 1.0 / (deviation(group) + 1e-4),
                Advantage::Mean => 1.0,
                Advantage::BatchStd => 1.0 / (batch + 1e-4),
                Advantage::LeaveOneOut => n / (n - 1.0),
            };
            group.iter().map(|r| (r - middle) * scale).collect()
        })
        .collect()
}
