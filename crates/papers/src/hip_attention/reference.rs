//! The search as the specification writes it, in f64.

use std::ops::Range;

use super::Sample;
use crate::sparse_baselines::reference::{dot, ranked};

/// How keys are searched.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Keys of a unit.
    pub unit_keys: usize,
    /// Of the keys of a unit every so many is scored.
    pub key_stride: usize,
    /// Which unit stands for a half.
    pub sample: Sample,
}

/// One round of a search.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// Scores of the halves, by ascending start.
    pub scores: Vec<f64>,
    /// First units of those that stay.
    pub kept: Vec<usize>,
    /// Products of a query and a key.
    pub products: usize,
}

/// What a search came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// Its rounds; none if everything is read.
    pub rounds: Vec<Round>,
    /// The keys that are read, ascending.
    pub keys: Vec<usize>,
}

/// Searches the keys at `range` of `k: [T][D]` for `count` of them that suit the queries `q: [R][D]`.
pub fn search(q: &[Vec<f64>], k: &[Vec<f64>], range: Range<usize>, count: usize, how: &Settings) -> Told {
    let mut rounds = Vec::new();
    if range.len() <= count {
        let keys = range.collect();
        return Told { rounds, keys };
    }
    let of_unit = |u: usize| {
        let from = range.start + u * how.unit_keys;
        from..(from + how.unit_keys).min(range.end)
    };
    let (units, beams) = (range.len().div_ceil(how.unit_keys), count.div_ceil(how.unit_keys));
    let start = |j: usize| (units as f64 * j as f64 / beams as f64).floor() as usize;
    let mut nodes: Vec<(usize, usize)> = (0..beams).map(|j| (start(j), start(j + 1) - start(j))).collect();
    while nodes.iter().any(|&(_, size)| size > 1) {
        let mut children = Vec::new();
        for &(a, z) in &nodes {
            let m = a + z / 2;
            children.extend([(a, m - a), (m, a + z - m)].into_iter().filter(|c| c.1 > 0));
        }
        let mut products = 0;
        let scores: Vec<f64> = children
            .iter()
            .map(|&(a, z)| {
                let mut score = f64::NEG_INFINITY;
                for key in how
                    .sample
                    .units(a, z)
                    .flat_map(|u| of_unit(u).step_by(how.key_stride))
                {
                    for q in q {
                        products += 1;
                        score = score.max(dot(q, &k[key]));
                    }
                }
                score
            })
            .collect();
        nodes = ranked(&scores)
            .into_iter()
            .take(beams)
            .map(|i| children[i])
            .collect();
        nodes.sort_unstable();
        rounds.push(Round {
            scores,
            kept: nodes.iter().map(|n| n.0).collect(),
            products,
        });
    }
    let keys = nodes.iter().flat_map(|&(u, _)| of_unit(u)).collect();
    Told { rounds, keys }
}

/// The rows of a block of `rows` that are looked at: the last of every `stride`, and of what is left.
pub fn looked_at(rows: usize, stride: usize) -> Vec<usize> {
    (0..rows)
        .filter(|row| (row + 1) % stride == 0 || row + 1 == rows)
        .collect()
}
