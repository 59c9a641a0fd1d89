//! The rules as the survey writes them, in f64, on whole matrices of one head. Rows are `[n][D]`.

/// `sum a b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Mean of rows.
pub fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    (0..rows[0].len())
        .map(|d| rows.iter().map(|row| row[d]).sum::<f64>() / rows.len() as f64)
        .collect()
}

/// Indices by descending score, of equals the lower one first.
pub fn ranked(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order
}

/// Scaled products of the mean of query block `i` with the means of key blocks `0..=i`.
pub fn block_scores(q: &[Vec<f64>], k: &[Vec<f64>], block: usize, i: usize, scale: f64) -> Vec<f64> {
    let of = |x: &[Vec<f64>], b: usize| mean(&x[b * block..((b + 1) * block).min(x.len())]);
    let own = of(q, i);
    (0..=i).map(|b| scale * dot(&own, &of(k, b))).collect()
}

/// Key blocks of query block `i` out of the scores of each head of its group: the first, its own, and the best of the others.
pub fn block_topk(scores: &[Vec<f64>], i: usize, keep: usize) -> Vec<usize> {
    let joint: Vec<f64> = (1..i)
        .map(|b| scores.iter().map(|s| s[b]).fold(f64::NEG_INFINITY, f64::max))
        .collect();
    let best = ranked(&joint);
    let mut blocks: Vec<usize> = best.into_iter().take(keep - 2).map(|b| b + 1).collect();
    blocks.extend([0, i]);
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

/// Quest's bound of a page: no product of `q` with a key of it is larger.
pub fn page_bound(q: &[f64], page: &[Vec<f64>]) -> f64 {
    let end = |d: usize, pick: fn(f64, f64) -> f64| page[1..].iter().fold(page[0][d], |x, k| pick(x, k[d]));
    (0..q.len())
        .map(|d| (q[d] * end(d, f64::min)).max(q[d] * end(d, f64::max)))
        .sum()
}

/// Pages of `rows` keys that heads read together: the open one, and the best of those before it, `count` in all.
pub fn quest(heads: &[Vec<f64>], k: &[Vec<f64>], rows: usize, count: usize) -> Vec<usize> {
    let full = (k.len() - 1) / rows;
    let mut joint = vec![f64::NEG_INFINITY; full];
    for q in heads {
        let bounds: Vec<f64> = (0..full)
            .map(|p| page_bound(q, &k[p * rows..(p + 1) * rows]))
            .collect();
        let top = bounds.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        joint
            .iter_mut()
            .zip(bounds)
            .for_each(|(s, b)| *s = s.max(b - top));
    }
    let mut pages: Vec<usize> = ranked(&joint).into_iter().take(count - 1).collect();
    pages.push(full);
    pages.sort_unstable();
    pages
}
