//! Boundaries, scores and choices as the specification writes them, in f64, on whole prompts and one head.

use std::ops::Range;

use crate::sparse_baselines::reference::{dot, mean, ranked, softmax};

/// Which gaps become boundaries.
pub struct Boundaries {
    /// Gaps that may.
    pub gaps: Range<usize>,
    /// Those that always do, before the others.
    pub forced: Vec<usize>,
    /// Scores have to be above this.
    pub theta: f64,
    /// Gaps lie further apart than this.
    pub nms: usize,
    /// Most chunks.
    pub max: usize,
}

impl Boundaries {
    /// Borders of the chunks of `n` tokens, `0` and `n` among them; `scores[j]` is that of the gap behind token `j`.
    pub fn of(&self, scores: &[f64], n: usize) -> Vec<usize> {
        let mut taken = self.forced.clone();
        for j in ranked(scores) {
            if taken.len() + 1 >= self.max || scores[j] <= self.theta {
                break;
            }
            let behind = self.forced.iter().any(|&f| j > f);
            if self.gaps.contains(&j) && !behind && taken.iter().all(|t| t.abs_diff(j) > self.nms) {
                taken.push(j);
            }
        }
        let mut bounds: Vec<usize> = taken.into_iter().map(|j| j + 1).chain([0, n]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        bounds
    }
}

/// `1 - cos` between the means of the `w` keys up to each token and of those behind it; 0 where there are not that many.
pub fn turns(k: &[Vec<f64>], w: usize) -> Vec<f64> {
    let length = |x: &[f64]| dot(x, x).sqrt().max(1e-6);
    let turn = |j: usize| {
        if j + 1 < w || j + w >= k.len() {
            return 0.0;
        }
        let (a, b) = (mean(&k[j + 1 - w..=j]), mean(&k[j + 1..j + 1 + w]));
        1.0 - dot(&a, &b) / (length(&a) * length(&b))
    };
    (0..k.len()).map(turn).collect()
}

/// Scores of the chunks between `bounds` for the mean of the queries `q` of a block.
pub fn chunk_scores(q: &[Vec<f64>], k: &[Vec<f64>], bounds: &[usize], sqrt_len: bool) -> Vec<f64> {
    let long = |rows: usize| if sqrt_len { (rows as f64).sqrt() } else { 1.0 };
    let query = mean(q);
    bounds
        .windows(2)
        .map(|b| long(q.len()) * long(b[1] - b[0]) * dot(&query, &mean(&k[b[0]..b[1]])))
        .collect()
}

/// Scores of the tokens `0..visible`: those of their chunks.
pub fn token_scores(scores: &[f64], bounds: &[usize], visible: usize) -> Vec<f64> {
    let chunk = |j: usize| bounds.partition_point(|&b| b <= j) - 1;
    (0..visible).map(|j| scores[chunk(j)]).collect()
}

/// The published choice before sinks: the last `local` tokens, and the best of the others, `budget` in all.
pub fn best_tokens(tokens: &[f64], budget: usize, local: usize) -> Vec<usize> {
    chosen(tokens, budget, 0, local)
}

/// The published way to add sinks: they replace the first ones of the list.
pub fn spliced(mut list: Vec<usize>, sinks: usize) -> Vec<usize> {
    for (i, to) in list.iter_mut().take(sinks).enumerate() {
        *to = i;
    }
    list
}

/// Ours: sinks and the last tokens always, and the best of the others, `budget` in all.
pub fn chosen(tokens: &[f64], budget: usize, sinks: usize, local: usize) -> Vec<usize> {
    let n = tokens.len();
    let forced = |j: usize| j < sinks || j + local >= n;
    let mut list: Vec<usize> = (0..n).filter(|&j| forced(j)).collect();
    let left = budget.saturating_sub(list.len());
    list.extend(ranked(tokens).into_iter().filter(|&j| !forced(j)).take(left));
    list.sort_unstable();
    list
}

/// A predictor of the attention variant. Matrices are `[out][in]`.
pub struct Predictor {
    /// Keys on each side of a gap.
    pub window: usize,
    /// Heads of the attention.
    pub heads: usize,
    /// Queries, keys and values: weight and bias.
    pub input: (Vec<Vec<f64>>, Vec<f64>),
    /// Output of the attention.
    pub output: (Vec<Vec<f64>>, Vec<f64>),
    /// Factor and shift of the norm.
    pub norm: (Vec<f64>, Vec<f64>),
    /// First layer behind it.
    pub hidden: (Vec<Vec<f64>>, Vec<f64>),
    /// Last layer.
    pub score: (Vec<Vec<f64>>, Vec<f64>),
}

/// Weight and bias.
fn linear((w, b): &(Vec<Vec<f64>>, Vec<f64>), x: &[f64]) -> Vec<f64> {
    w.iter().zip(b).map(|(w, b)| dot(w, x) + b).collect()
}

impl Predictor {
    /// The logit of each gap of `x: [n][C]`.
    pub fn logits(&self, x: &[Vec<f64>]) -> Vec<f64> {
        let (w, channels) = (self.window as isize, x[0].len());
        let one = |j: isize| {
            let rows: Vec<Vec<f64>> = (j - w + 1..=j + w)
                .map(|i| usize::try_from(i).ok().and_then(|i| x.get(i).cloned()))
                .map(|row| linear(&self.input, &row.unwrap_or_else(|| vec![0.0; channels])))
                .collect();
            let y: Vec<Vec<f64>> = rows.iter().map(|row| self.row(row, &rows)).collect();
            let (left, right) = (mean(&y[..self.window]), mean(&y[self.window..]));
            let length = |x: &[f64]| dot(x, x).sqrt().max(1e-6);
            let mut features = [left.clone(), right.clone()].concat();
            features.extend(left.iter().zip(&right).map(|(l, r)| (l - r).abs()));
            features.extend(left.iter().zip(&right).map(|(l, r)| l * r));
            features.push(dot(&left, &right) / (length(&left) * length(&right)));
            let hidden: Vec<f64> = linear(&self.hidden, &features)
                .into_iter()
                .map(|x| x.max(0.0))
                .collect();
            linear(&self.score, &hidden)[0]
        };
        (0..x.len() as isize).map(one).collect()
    }

    /// Norm of the output of the attention of one row.
    fn row(&self, row: &[f64], rows: &[Vec<f64>]) -> Vec<f64> {
        let channels = row.len() / 3;
        let dim = channels / self.heads;
        let mut out = Vec::new();
        for head in 0..self.heads {
            let part = |row: &[f64], which: usize| row[which * channels + head * dim..][..dim].to_vec();
            let scores: Vec<f64> = rows
                .iter()
                .map(|k| dot(&part(row, 0), &part(k, 1)) / (dim as f64).sqrt())
                .collect();
            let weights = softmax(&scores);
            out.extend((0..dim).map(|d| {
                rows.iter()
                    .zip(&weights)
                    .map(|(v, w)| w * part(v, 2)[d])
                    .sum::<f64>()
            }));
        }
        let y = linear(&self.output, &out);
        let n = y.len() as f64;
        let m = y.iter().sum::<f64>() / n;
        let variance = y.iter().map(|x| (x - m) * (x - m)).sum::<f64>() / n;
        let unit = y.iter().map(|x| (x - m) / (variance + 1e-5).sqrt());
        unit.zip(self.norm.0.iter().zip(&self.norm.1))
            .map(|(x, (gain, shift))| x * gain + shift)
            .collect()
    }
}

/// The lines of the second version: sums of the weights of a prompt's last rows by key and by distance, and which of each are chosen.
pub struct Lines {
    /// By key.
    pub columns: Vec<f64>,
    /// By distance.
    pub distances: Vec<f64>,
    /// Chosen keys and distances, ascending.
    pub chosen: (Vec<usize>, Vec<usize>),
}

impl Lines {
    /// Half of `tokens` lines are columns.
    pub fn of(columns: Vec<f64>, distances: Vec<f64>, tokens: usize) -> Self {
        let top = |sums: &[f64], count: usize| {
            let mut best = ranked(sums);
            best.truncate(count);
            best.sort_unstable();
            best
        };
        let half = (tokens / 2).min(columns.len());
        Self {
            chosen: (top(&columns, half), top(&distances, tokens - half)),
            columns,
            distances,
        }
    }

    /// Scores of the blocks of `size` keys up to the end of the queries `rows`.
    pub fn scores(&self, rows: Range<usize>, size: usize) -> Vec<f64> {
        let touches = |b: usize, d: usize| {
            let (from, to) = (
                rows.start as isize - d as isize,
                rows.end as isize - 1 - d as isize,
            );
            let block = (b * size) as isize..((b + 1) * size) as isize;
            from.max(0) < block.end && to >= block.start
        };
        let one = |b: usize| {
            let columns = self.chosen.0.iter().filter(|&&c| c / size == b);
            let distances = self.chosen.1.iter().filter(|&&d| touches(b, d));
            columns.map(|&c| self.columns[c]).sum::<f64>()
                + distances.map(|&d| self.distances[d]).sum::<f64>()
        };
        (0..rows.end.div_ceil(size)).map(one).collect()
    }
}

/// The `count` blocks with the best scores, the first and those from `own` on always and counted.
pub fn best_blocks(scores: &[f64], own: usize, count: usize) -> Vec<usize> {
    let forced = |b: usize| b == 0 || b >= own;
    let mut blocks: Vec<usize> = (0..scores.len()).filter(|&b| forced(b)).collect();
    let left = count.saturating_sub(blocks.len());
    blocks.extend(ranked(scores).into_iter().filter(|&b| !forced(b)).take(left));
    blocks.sort_unstable();
    blocks
}
