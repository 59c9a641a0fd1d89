//! The planner of one head as the specification writes it, in f64, with sorting.

use crate::sparse_baselines::reference::{dot, mean, ranked};

/// Settings.
pub struct Settings {
    /// Rows of a block.
    pub block: usize,
    /// Keys that make one block of a budget.
    pub divisor: usize,
    /// Mass to keep.
    pub gamma: f64,
    /// Distance below which the estimate is trusted.
    pub tau: f64,
    /// Least budget, keys.
    pub min_budget: usize,
    /// Representative rows.
    pub rows: usize,
    /// Factor of `q . k`.
    pub scale: f64,
}

/// What is known on the way.
#[derive(Default)]
pub struct Told {
    /// Keys and distances that carry the mass (3.2).
    pub covers: (usize, usize),
    /// Mass of key blocks, of blocks of distances, and the estimate (3.3).
    pub mass: [Vec<f64>; 3],
    /// Distance of the estimate.
    pub distance: f64,
    /// Chosen key blocks and block distances, ascending (3.4).
    pub chosen: (Vec<usize>, Vec<usize>),
    /// Key blocks of each query block by the estimate alone (3.5).
    pub aware: Vec<Vec<usize>>,
    /// The plan: key blocks of each query block, ascending.
    pub rows: Vec<Vec<usize>>,
}

/// Plans the queries `q`, the last of the positions whose keys are `k`.
pub fn plan(q: &[Vec<f64>], k: &[Vec<f64>], s: &Settings) -> Told {
    let (n, m) = (k.len(), q.len());
    let (blocks, first) = (n.div_ceil(s.block), (n - m) / s.block);
    // 3.1
    let r = s.rows.min(m);
    let last = &q[m - r..];
    let mut a = vec![vec![0.0; n]; r];
    for (i, q) in last.iter().enumerate() {
        let seen = n - r + i + 1;
        let scores: Vec<f64> = k[..seen].iter().map(|k| s.scale * dot(q, k)).collect();
        a[i][..seen].copy_from_slice(&softmax(&scores));
    }
    let vert: Vec<f64> = (0..n)
        .map(|j| a.iter().map(|a| a[j]).sum::<f64>() / r as f64)
        .collect();
    let slash: Vec<f64> = (0..n)
        .map(|t| {
            let at = |i: usize| {
                (i + t)
                    .checked_sub(r - 1)
                    .map_or(0.0, |j| a[i].get(j).copied().unwrap_or(0.0))
            };
            (0..r).map(at).sum::<f64>() / r as f64
        })
        .collect();
    // 3.2
    let covers = (1 + prefix(&vert, s.gamma), 1 + prefix(&slash, s.gamma));
    let least = s.min_budget.div_ceil(s.block);
    let budget = |cover: usize| (cover / s.divisor + 1).max(least).min(blocks);
    let (mut columns, mut diagonals) = (budget(covers.0), budget(covers.1));
    // 3.3
    let by_block = |x: &[f64]| -> Vec<f64> { x.chunks(s.block).map(|b| b.iter().sum()).collect() };
    let (v, sb) = (by_block(&vert), by_block(&slash));
    let kb: Vec<Vec<f64>> = k.chunks(s.block).map(mean).collect();
    let p = softmax(
        &kb.iter()
            .map(|k| s.scale * dot(&mean(last), k))
            .collect::<Vec<_>>(),
    );
    let kl = |x: f64, y: f64| {
        if x > 0.0 {
            0.5 * x * (2.0 * x / (x + y)).ln()
        } else {
            0.0
        }
    };
    let distance = v
        .iter()
        .zip(&p)
        .map(|(&v, &p)| kl(v, p) + kl(p, v))
        .sum::<f64>()
        .sqrt();
    let is_aware = distance < s.tau;
    if is_aware {
        (columns, diagonals) = (least.min(blocks), least.min(blocks));
    }
    // 3.4
    let top = |x: &[f64], forced: usize, count: usize| -> Vec<usize> {
        let mut x = x.to_vec();
        x[forced] = f64::INFINITY;
        ranked(&x).into_iter().take(count).collect()
    };
    let mut cols = top(&v, 0, columns);
    let mut diags: Vec<usize> = top(&sb, blocks - 1, diagonals)
        .into_iter()
        .map(|c| blocks - 1 - c)
        .collect();
    cols.sort_unstable();
    diags.sort_unstable();
    // 3.5
    let mut flat = Vec::new();
    for i in first..blocks {
        let from = (i * s.block).max(n - m) - (n - m);
        let own = mean(&q[from..((i + 1) * s.block - (n - m)).min(m)]);
        let row = softmax(
            &kb[..=i]
                .iter()
                .map(|k| s.scale * dot(&own, k))
                .collect::<Vec<_>>(),
        );
        flat.extend(row.into_iter().enumerate().map(|(b, w)| (w, i, b)));
    }
    let weights: Vec<f64> = flat.iter().map(|f| f.0).collect();
    let mut aware = vec![Vec::new(); blocks - first];
    for at in ranked(&weights)
        .into_iter()
        .take(prefix(&weights, s.gamma * (blocks - first) as f64))
    {
        aware[flat[at].1 - first].push(flat[at].2);
    }
    aware.iter_mut().for_each(|row| row.sort_unstable());
    let rows = (first..blocks)
        .map(|i| {
            let mut row: Vec<usize> = cols.iter().copied().filter(|&b| b <= i).collect();
            row.extend(diags.iter().filter(|&&d| d <= i).map(|d| i - d));
            row.extend(aware[i - first].iter().filter(|_| is_aware));
            row.push(i);
            row.sort_unstable();
            row.dedup();
            row
        })
        .collect();
    Told {
        covers,
        mass: [v, sb, p],
        distance,
        chosen: (cols, diags),
        aware,
        rows,
    }
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let l: f64 = scores.iter().map(|s| (s - m).exp()).sum();
    scores.iter().map(|s| (s - m).exp() / l).collect()
}

/// Prefix sums of the sorted values that are at most `mass`.
fn prefix(values: &[f64], mass: f64) -> usize {
    let mut sum = 0.0;
    let order = ranked(values);
    order
        .iter()
        .take_while(|&&i| {
            sum += values[i];
            sum <= mass
        })
        .count()
}
