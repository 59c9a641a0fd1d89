//! What the last queries of a prompt look at: the score by which SnapKV and its relatives choose rows.

use antefix_attention::method::LayerView;

/// How a score is smoothed over its neighbours, so that the surroundings of a hit stay, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Smoothing {
    /// The mean; rows beyond the ends count as 0, and the divisor is always the width.
    Mean,
    /// The largest.
    Max,
}

impl Smoothing {
    /// The words of a knob.
    pub const WORDS: &[&str] = &["mean", "max"];

    /// The one of this name.
    pub fn named(word: &str) -> Self {
        if word == "max" { Self::Max } else { Self::Mean }
    }

    /// Smooths `scores` over `width` neighbours (odd), centred.
    pub fn over(self, scores: &[f32], width: usize) -> Vec<f32> {
        let reach = width / 2;
        (0..scores.len())
            .map(|i| {
                let near = &scores[i.saturating_sub(reach)..(i + reach + 1).min(scores.len())];
                match self {
                    Self::Mean => near.iter().sum::<f32>() / width as f32,
                    Self::Max => near.iter().copied().fold(f32::NEG_INFINITY, f32::max),
                }
            })
            .collect()
    }
}

/// Scores of the rows before the window, one vector for each of `heads` (query heads of one KV head): the weights that the queries of
/// the window give them, summed and smoothed.
pub fn scores(
    view: &LayerView<'_>,
    kv_head: usize,
    heads: &[usize],
    smoothing: Smoothing,
    width: usize,
) -> Vec<Vec<f32>> {
    let rows = view.rows(kv_head);
    let keys = view.keys(&rows);
    let past = rows.len().saturating_sub(view.seen());
    heads
        .iter()
        .map(|&head| {
            let weights = view.weights(head, &rows, &keys);
            let mut sums = vec![0.0; past];
            for row in weights.chunks_exact(rows.len().max(1)) {
                sums.iter_mut().zip(row).for_each(|(s, w)| *s += w);
            }
            smoothing.over(&sums, width)
        })
        .collect()
}

/// The mean of score vectors of equal length.
pub fn mean(scores: &[Vec<f32>]) -> Vec<f32> {
    let Some(first) = scores.first() else {
        return Vec::new();
    };
    let count = scores.len() as f32;
    (0..first.len())
        .map(|i| scores.iter().map(|s| s[i]).sum::<f32>() / count)
        .collect()
}

/// Indices of the `k` largest scores, ascending; of equal scores the earlier ones.
pub fn top(scores: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// The best of the rows before the window and the window itself: `budget` of `rows` rows, ascending. `scores` are those before the window.
pub fn keep(scores: &[f32], rows: usize, budget: usize) -> Vec<u32> {
    let window = rows - scores.len();
    let mut keep = top(scores, budget.saturating_sub(window));
    keep.extend(scores.len() as u32..rows as u32);
    keep
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_counts_missing_neighbours_as_nothing() {
        let s = [4.0, 0.0, 0.0, 8.0];
        assert_eq!(
            Smoothing::Mean.over(&s, 3),
            [4.0 / 3.0, 4.0 / 3.0, 8.0 / 3.0, 8.0 / 3.0]
        );
        assert_eq!(Smoothing::Max.over(&s, 3), [4.0, 4.0, 8.0, 8.0]);
        assert_eq!(Smoothing::Mean.over(&s, 1), s);
    }

    #[test]
    fn equal_scores_go_to_the_earlier_rows() {
        assert_eq!(top(&[1.0, 3.0, 3.0, 2.0, 3.0], 2), [1, 2]);
        assert_eq!(top(&[1.0], 5), [0]);
        assert_eq!(keep(&[0.1, 0.9, 0.5], 5, 3), [1, 3, 4]);
        assert_eq!(keep(&[0.1, 0.9], 4, 1), [2, 3], "the window always stays");
    }

    #[test]
    fn the_mean_is_taken_row_by_row() {
        assert_eq!(mean(&[vec![1.0, 2.0], vec![3.0, 6.0]]), [2.0, 4.0]);
        assert!(mean(&[]).is_empty());
    }
}
