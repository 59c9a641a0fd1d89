//! Percentiles, ranks and slopes.

use serde::{Deserialize, Serialize};

/// How values spread. Zero where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Spread {
    /// Half are at most this.
    pub p50: f64,
    /// Nine in ten are.
    pub p90: f64,
    /// 99 in 100 are.
    pub p99: f64,
}

impl Spread {
    /// Of `values`, in any order: the smallest value that at least that part of them does not exceed.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |q: f64| match sorted.len() {
            0 => 0.0,
            n => sorted[((q * n as f64).ceil() as usize).clamp(1, n) - 1],
        };
        Self {
            p50: at(0.50),
            p90: at(0.90),
            p99: at(0.99),
        }
    }
}

/// The chance that a value of `low` is smaller than one of `high`, ties counting half: 0.5 when they cannot be told apart.
pub fn auc(low: &[f64], high: &[f64]) -> f64 {
    let mut all: Vec<(f64, bool)> = low
        .iter()
        .map(|&x| (x, false))
        .chain(high.iter().map(|&x| (x, true)))
        .collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut wins) = (0.0, 0.0);
    for tied in all.chunk_by(|a, b| a.0 == b.0) {
        let lows = tied.iter().filter(|x| !x.1).count() as f64;
        let highs = tied.len() as f64 - lows;
        wins += highs * (below + lows / 2.0);
        below += lows;
    }
    wins / (low.len() as f64 * high.len() as f64)
}

/// Least-squares slope of `y` over `x`; 0 for fewer than two points.
pub fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let across: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    let along: f64 = points.iter().map(|p| (p.0 - x) * (p.0 - x)).sum();
    if along > 0.0 { across / along } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let s = Spread::of((1..=200).rev().map(f64::from));
        assert_eq!((s.p50, s.p90, s.p99), (100.0, 180.0, 198.0));
        assert_eq!(Spread::of([7.0]).p99, 7.0);
        assert_eq!(Spread::of([]), Spread::default());
    }

    #[test]
    fn auc_is_the_share_of_pairs_in_order() {
        assert_eq!(auc(&[1.0, 2.0], &[3.0, 4.0]), 1.0);
        assert_eq!(auc(&[3.0, 4.0], &[1.0, 2.0]), 0.0);
        assert_eq!(auc(&[1.0, 1.0], &[1.0, 1.0]), 0.5);
        assert_eq!(auc(&[1.0, 3.0], &[2.0, 4.0]), 0.75);
    }

    #[test]
    fn a_line_has_its_slope() {
        let line: Vec<_> = (0..9).map(|i| (f64::from(i), 3.0 - 2.0 * f64::from(i))).collect();
        assert!((slope(&line) + 2.0).abs() < 1e-12);
        assert_eq!(slope(&[(1.0, 5.0)]), 0.0);
    }
}
