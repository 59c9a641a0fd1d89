//! Lists of one head as the specification writes them, in f64, on a whole prompt.

use crate::sparse_baselines::reference::{dot, mean};

/// Sizes: rows of a block, blocks of a group, first keys; and the factor of `q . k`.
pub struct Settings {
    /// Rows of a block.
    pub block: usize,
    /// Blocks of a group.
    pub step: usize,
    /// First keys.
    pub init: usize,
    /// How far below its anchor a score may lie.
    pub theta: f64,
    /// Factor of `q . k`.
    pub scale: f64,
}

/// Phase 1: the anchor of each row.
pub fn anchors(q: &[Vec<f64>], k: &[Vec<f64>], s: &Settings) -> Vec<f64> {
    let group = s.block * s.step;
    let row = |p: usize| {
        let region = (0..s.init.min(p + 1)).chain(p / group * group..=p);
        region
            .map(|j| s.scale * dot(&q[p], &k[j]))
            .fold(f64::NEG_INFINITY, f64::max)
    };
    (0..q.len()).map(row).collect()
}

/// Means of the anchors of each block.
pub fn block_anchors(q: &[Vec<f64>], k: &[Vec<f64>], s: &Settings) -> Vec<f64> {
    let anchors = anchors(q, k, s);
    anchors
        .chunks(s.block)
        .map(|a| a.iter().sum::<f64>() / a.len() as f64)
        .collect()
}

/// Phase 2: the keys that each group reads beside the first ones and its own.
pub fn lists(q: &[Vec<f64>], k: &[Vec<f64>], s: &Settings) -> Vec<Vec<usize>> {
    let (group, anchors) = (s.block * s.step, block_anchors(q, k, s));
    let list = |g: usize| {
        let blocks = g * s.step..((g + 1) * s.step).min(anchors.len());
        let near = |j: &usize| {
            blocks.clone().any(|i| {
                let rows = &q[i * s.block..((i + 1) * s.block).min(q.len())];
                s.scale * dot(&mean(rows), &k[*j]) + s.theta >= anchors[i]
            })
        };
        (s.init..g * group).filter(near).collect()
    };
    (0..q.len().div_ceil(group)).map(list).collect()
}
