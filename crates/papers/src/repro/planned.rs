//! What prompts and drawn tokens cost and lose under planners, and how two methods compare at equal quality or at equal cost.

use serde::Serialize;
use serde_json::{Value, json};

use super::{Lab, LabError, Way, alone, row};

/// A prompt computed densely, or under a planner.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prefill {
    /// The method as it was asked for, or `dense`.
    pub method: String,
    /// Tokens of the prompt.
    pub length: usize,
    /// Seconds until it was computed.
    pub ttft_s: f64,
    /// Of those, attention with planning.
    pub attn_s: f64,
    /// Of those, planning.
    pub plan_s: f64,
    /// Kept pairs of query and key over all.
    pub density: f64,
    /// Mean share of the dense weights that is kept, with the states of dense attention.
    pub recall: f64,
    /// Mean KL divergence of the predictions at the last positions from the dense ones, nats.
    pub kl: f64,
    /// Share of these positions with the same most likely token.
    pub top1: f64,
}

/// Tokens drawn behind a prompt, densely or under a planner; the tokens are given.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Drawn {
    /// The method as it was asked for, or `dense`.
    pub method: String,
    /// Tokens of the prompt.
    pub length: usize,
    /// Sequences that draw together.
    pub batch: usize,
    /// Whether they read the same pages of the prompt.
    pub shared: bool,
    /// Tokens a second of all of them.
    pub tok_s: f64,
    /// Seconds of attention a step, with planning.
    pub attn_s: f64,
    /// Of those, planning.
    pub plan_s: f64,
    /// Kept pairs of query and key over all, in all layers that could be planned.
    pub density: f64,
    /// Mean KL divergence of the predictions from the dense ones, nats.
    pub kl: f64,
    /// Share of the steps with the same most likely token.
    pub top1: f64,
}

/// Rows of each stretch on which recall is measured.
const ROWS: usize = 4;

/// What [`Lab::prefill`] finds for each method of `names` alone, dense attention first.
///
/// # Errors
/// As [`Lab::prefill`].
pub fn prefill(lab: &mut dyn Lab, length: usize, names: &[String]) -> Result<Vec<Prefill>, LabError> {
    let ways = alone(names);
    let ways: Vec<Way<'_>> = ways.iter().map(Option::as_slice).collect();
    lab.prefill(length, ROWS, &ways)
}

/// `found` as rows of an outcome.
pub fn rows(found: &[Prefill]) -> Vec<Value> {
    found.iter().map(|p| row(json!({}), p)).collect()
}

/// Times faster than dense attention, planning included.
pub fn speedup(dense: &Prefill, under: &Prefill) -> f64 {
    dense.attn_s / under.attn_s
}

/// `y` at `x` on the line through `points` (x, y): nothing where `x` lies outside of them.
pub fn between(points: impl IntoIterator<Item = (f64, f64)>, x: f64) -> Option<f64> {
    let mut points: Vec<(f64, f64)> = points.into_iter().collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let at = match points.binary_search_by(|p| p.0.total_cmp(&x)) {
        Ok(exact) => return Some(points[exact].1),
        Err(at) => at,
    };
    let (before, after) = points.split_at(at);
    let (low, high) = (before.last()?, after.first()?);
    Some(low.1 + (high.1 - low.1) * (x - low.0) / (high.0 - low.0))
}

/// The recall that two sweeps share: `wish`, or what comes nearest to it; nothing if one finds more everywhere than the other does anywhere.
pub fn common_recall(a: &[Prefill], b: &[Prefill], wish: f64) -> Option<f64> {
    let least = |of: &[Prefill]| of.iter().map(|p| p.recall).fold(f64::INFINITY, f64::min);
    let most = |of: &[Prefill]| of.iter().map(|p| p.recall).fold(f64::NEG_INFINITY, f64::max);
    let (from, to) = (least(a).max(least(b)), most(a).min(most(b)));
    (from <= to).then(|| wish.clamp(from, to))
}

#[cfg(test)]
pub(crate) fn made(attn_s: f64, density: f64, recall: f64, kl: f64) -> Prefill {
    Prefill {
        method: "made".into(),
        length: 1000,
        ttft_s: 1.0 + attn_s,
        attn_s,
        plan_s: attn_s / 4.0,
        density,
        recall,
        kl,
        top1: 1.0 - kl,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_on_lines_between_points_and_nowhere_else() {
        let points = [(3.0, 30.0), (1.0, 10.0), (2.0, 0.0)];
        let at = |x| between(points, x);
        assert_eq!(
            [1.0, 1.5, 2.0, 2.5, 3.0].map(at),
            [10.0, 5.0, 0.0, 15.0, 30.0].map(Some)
        );
        assert_eq!([0.9, 3.1, f64::NAN].map(at), [None; 3]);
        assert_eq!(between([], 1.0), None);
    }

    #[test]
    fn sweeps_are_compared_where_both_have_been() {
        let sweep = |recalls: [f64; 2]| recalls.map(|r| made(1.0, 0.5, r, 0.0));
        let common = |a, b| common_recall(&sweep(a), &sweep(b), 0.95);
        assert_eq!(common([0.9, 0.99], [0.8, 0.97]), Some(0.95));
        assert_eq!(common([0.96, 0.99], [0.8, 0.97]), Some(0.96));
        assert_eq!(common([0.96, 0.99], [0.95, 0.8]), None);
        assert_eq!(common([0.9, 0.99], [0.8, 0.94]), Some(0.94));
        assert_eq!(common_recall(&[], &[], 0.95), None);
    }
}
