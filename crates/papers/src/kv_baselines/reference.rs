//! SnapKV, PyramidKV and H2O as their papers write them: on whole rows of weights, in f64.

/// Rows of weights `[W][n]` out of scores `[W][n]`; `None` is a key that the query does not see.
pub fn softmax(scores: &[Vec<Option<f64>>]) -> Vec<Vec<f64>> {
    let row = |row: &Vec<Option<f64>>| -> Vec<f64> {
        let exp = |s: &Option<f64>| s.map_or(0.0, f64::exp);
        let l: f64 = row.iter().map(exp).sum();
        row.iter().map(|s| exp(s) / l).collect()
    };
    scores.iter().map(row).collect()
}

/// `SnapKV`, steps 1 and 2, for one query head: sums of the columns before the window, then the mean (`max`: the largest) over `kernel`
/// neighbours, where those beyond the ends count as 0 in the mean. `weights: [W][n]` to `n - W` scores.
pub fn votes(weights: &[Vec<f64>], kernel: usize, max: bool) -> Vec<f64> {
    let n = weights[0].len();
    let past = n - weights.len();
    let sums: Vec<f64> = (0..past)
        .map(|j| weights.iter().map(|row| row[j]).sum())
        .collect();
    let reach = (kernel / 2) as i64;
    (0..past as i64)
        .map(|i| {
            let near = (i - reach..=i + reach).filter_map(|j| sums.get(usize::try_from(j).ok()?).copied());
            match max {
                true => near.fold(f64::NEG_INFINITY, f64::max),
                false => near.sum::<f64>() / kernel as f64,
            }
        })
        .collect()
}

/// Row by row, the mean of score vectors.
pub fn mean(scores: &[Vec<f64>]) -> Vec<f64> {
    (0..scores[0].len())
        .map(|j| scores.iter().map(|s| s[j]).sum::<f64>() / scores.len() as f64)
        .collect()
}

/// The places of the `count` largest, ascending; of equal ones the earlier: one after the other, the best that is left.
pub fn best(scores: &[f64], count: usize) -> Vec<usize> {
    let mut taken = vec![false; scores.len()];
    for _ in 0..count.min(scores.len()) {
        let mut at = None;
        for (i, s) in scores.iter().enumerate() {
            if !taken[i] && at.is_none_or(|at: usize| *s > scores[at]) {
                at = Some(i);
            }
        }
        if let Some(i) = at {
            taken[i] = true;
        }
    }
    (0..scores.len()).filter(|&i| taken[i]).collect()
}

/// `SnapKV`, step 3: what a KV head keeps, given the weights of its query heads `[g][W][n]`.
pub fn snapkv(group: &[Vec<Vec<f64>>], cap: usize, kernel: usize, max: bool) -> Vec<usize> {
    let (w, n) = (group[0].len(), group[0][0].len());
    let scores: Vec<Vec<f64>> = group.iter().map(|weights| votes(weights, kernel, max)).collect();
    let mut keep = best(&mean(&scores), cap - w);
    keep.extend(n - w..n);
    keep
}

/// `PyramidKV`: rows before the window of each of `layers` layers, for a budget of `cap` of which `w` are the window, on `n` rows.
pub fn pyramid(cap: usize, w: usize, n: usize, beta: usize, layers: usize) -> Vec<usize> {
    let c = cap - w;
    if n < 2 * c + w {
        return vec![c; layers];
    }
    let (mut least, mut most) = (c / beta, 2 * c - c / beta);
    if most >= n - w {
        most = n - w;
        least = 2 * c - most;
    }
    let step = (most - least) / (layers - 1).max(1);
    (0..layers).map(|l| most - l * step).collect()
}

/// H2O: what a KV head keeps of `n` rows, given the weights of its query heads `[g][W][n]`: the last `recent` rows and, of the others,
/// those with most weight in all; with `per_query`, in the mean over the queries that see the row.
pub fn h2o(group: &[Vec<Vec<f64>>], cap: usize, recent: usize, per_query: bool) -> Vec<usize> {
    let (w, n) = (group[0].len(), group[0][0].len());
    let score = |j: usize| {
        let all: f64 = group.iter().flatten().map(|row| row[j]).sum();
        let seen = w - j.saturating_sub(n - w);
        match per_query {
            true => all / seen as f64,
            false => all,
        }
    };
    let scores: Vec<f64> = (0..n - recent).map(score).collect();
    let mut keep = best(&scores, cap - recent);
    keep.extend(n - recent..n);
    keep
}
