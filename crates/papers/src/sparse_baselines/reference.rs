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

/// `exp(s) / sum exp(s)`.
pub fn softmax(scores: &[f64]) -> Vec<f64> {
    let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let l: f64 = scores.iter().map(|s| (s - m).exp()).sum();
    scores.iter().map(|s| (s - m).exp() / l).collect()
}

/// Attention weights of the rows `q`, the last of those whose keys are `k`: each over the keys up to itself.
pub fn weights(q: &[Vec<f64>], k: &[Vec<f64>], scale: f64) -> Vec<Vec<f64>> {
    let row = |(i, q): (usize, &Vec<f64>)| {
        let scores: Vec<f64> = k[..=i].iter().map(|k| scale * dot(q, k)).collect();
        softmax(&scores)
    };
    let first = k.len() - q.len();
    (first..).zip(q).map(row).collect()
}

/// MInference: sums of such weights by key, and by distance from the query.
pub fn lines(weights: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let n = weights.last().map_or(0, Vec::len);
    let (mut columns, mut distances) = (vec![0.0; n], vec![0.0; n]);
    for row in weights {
        for (j, w) in row.iter().enumerate() {
            columns[j] += w;
            distances[row.len() - 1 - j] += w;
        }
    }
    (columns, distances)
}

/// MInference: which of `n` keys the rows of the block that starts at `start` may read by the distances, causality aside.
pub fn slash_keys(distances: &[usize], n: usize, start: usize, block: usize) -> Vec<bool> {
    let mut keys = vec![false; n];
    let mut ends: Vec<usize> = distances
        .iter()
        .filter(|&&d| d < start + block)
        .map(|d| (start + block - d).max(block))
        .collect();
    ends.sort_unstable();
    let mut run: Option<(usize, usize)> = None;
    for end in ends {
        run = match run {
            Some((from, to)) if end <= to => Some((from, to)),
            Some((from, to)) if end - block <= to => Some((from, to + block)),
            _ => Some((end - block, end)),
        };
        let (from, to) = run.expect("just set");
        keys[from.min(n)..to.min(n)].fill(true);
    }
    keys
}

/// XAttention: estimated weights of each block of queries in the blocks of keys up to its own. Queries and keys that are missing at the
/// end are zeros.
pub fn antidiagonals(
    q: &[Vec<f64>],
    k: &[Vec<f64>],
    block: usize,
    stride: usize,
    scale: f64,
) -> Vec<Vec<f64>> {
    let groups = k.len().div_ceil(stride);
    let square = |gq: usize, gk: usize| -> f64 {
        let product = |t: usize| {
            let pair = q.get(gq * stride + stride - 1 - t).zip(k.get(gk * stride + t));
            pair.map_or(0.0, |(q, k)| dot(q, k))
        };
        scale / stride as f64 * (0..stride).map(product).sum::<f64>()
    };
    let mut sums = vec![vec![0.0; k.len().div_ceil(block)]; k.len().div_ceil(block)];
    for gq in 0..groups {
        let scores: Vec<f64> = (0..=gq).map(|gk| square(gq, gk)).collect();
        for (gk, w) in softmax(&scores).into_iter().enumerate() {
            sums[gq * stride / block][gk * stride / block] += w;
        }
    }
    for (i, row) in sums.iter_mut().enumerate() {
        row.truncate(i + 1);
    }
    sums
}

/// XAttention: the blocks of keys that a block of queries with these estimates reads.
pub fn xattention(sums: &[f64], tau: f64) -> Vec<usize> {
    let own = sums.len() - 1;
    let all: f64 = sums.iter().sum();
    let mut blocks = vec![0, own];
    blocks.dedup();
    for b in ranked(sums).into_iter().filter(|&b| b != 0 && b != own) {
        if blocks.iter().map(|&b| sums[b]).sum::<f64>() >= tau * all {
            break;
        }
        blocks.push(b);
    }
    blocks.sort_unstable();
    blocks
}

/// The largest sums of `size` neighbours each out of the sums of a block's weights by key, as indices of the neighbours: at most `count`,
/// and no more than are needed for the mass `enough`.
pub fn oracle(mass: &[f64], size: usize, count: usize, enough: f64) -> Vec<usize> {
    let sums: Vec<f64> = mass.chunks(size).map(|m| m.iter().sum()).collect();
    let mut kept = 0.0;
    let mut chosen: Vec<usize> = ranked(&sums)
        .into_iter()
        .take(count)
        .take_while(|&i| {
            let missing = kept < enough;
            kept += sums[i];
            missing
        })
        .collect();
    chosen.sort_unstable();
    chosen
}
