//! Lanes: further accumulators beside `(m, l, acc)` that obey the same merge law.
//!
//! Everything linear in the attention weights is one more column of `acc`; an arg max is a small ordered list. A probe is a
//! lane, so attention is read out without ever building an `R x T` matrix.

/// An accumulator that rides along with a row's state.
///
/// Laws: `Default` is the identity; [`Lane::push`] then [`Lane::merge`] over any cut of the keys gives the same reading.
pub trait Lane: Default {
    /// Takes one key in: its position, its weight `exp(s - m)` under the row's current maximum, and its score.
    fn push(&mut self, pos: u32, weight: f32, score: f32);
    /// The row's maximum moved: all weights taken in so far are multiplied by `factor`.
    fn rescale(&mut self, factor: f32);
    /// Continues with the keys of `other`, whose weights are under the same maximum.
    fn merge(&mut self, other: &Self);
}

/// No lane: what runs when nobody asks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Off;

impl Lane for Off {
    fn push(&mut self, _: u32, _: f32, _: f32) {}
    fn rescale(&mut self, _: f32) {}
    fn merge(&mut self, _: &Self) {}
}

/// Sum of `weight * score`: with `l` and `lse` it gives the entropy of the row, `lse - sum / l`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Entropy {
    /// `sum exp(s-m) s`.
    pub sum: f32,
}

impl Lane for Entropy {
    fn push(&mut self, _: u32, weight: f32, score: f32) {
        if weight > 0.0 {
            self.sum += weight * score;
        }
    }
    fn rescale(&mut self, factor: f32) {
        self.sum *= factor;
    }
    fn merge(&mut self, other: &Self) {
        self.sum += other.sum;
    }
}

/// The `K` keys of the highest scores, ties to the lower position.
#[derive(Debug, Clone, PartialEq)]
pub struct Arg<const K: usize> {
    best: Vec<(f32, u32)>,
}

impl<const K: usize> Default for Arg<K> {
    fn default() -> Self {
        Self {
            best: Vec::with_capacity(K + 1),
        }
    }
}

impl<const K: usize> Arg<K> {
    /// `(score, position)`, best first; at most `K`.
    pub fn best(&self) -> &[(f32, u32)] {
        &self.best
    }

    fn insert(&mut self, score: f32, pos: u32) {
        let at = self
            .best
            .partition_point(|&(s, p)| s > score || (s.total_cmp(&score).is_eq() && p < pos));
        if at < K {
            self.best.insert(at, (score, pos));
            self.best.truncate(K);
        }
    }
}

impl<const K: usize> Lane for Arg<K> {
    fn push(&mut self, pos: u32, _: f32, score: f32) {
        if score > f32::NEG_INFINITY {
            self.insert(score, pos);
        }
    }
    fn rescale(&mut self, _: f32) {}
    fn merge(&mut self, other: &Self) {
        for &(score, pos) in &other.best {
            self.insert(score, pos);
        }
    }
}

/// Reads a lane over a row of scores: `(m, l, lane)`. Keys stand at positions `first..`.
pub fn read<L: Lane>(scores: &[f32], first: u32) -> (f32, f32, L) {
    let (mut m, mut l, mut lane) = (f32::NEG_INFINITY, 0.0, L::default());
    for (pos, &s) in (first..).zip(scores) {
        if s == f32::NEG_INFINITY {
            continue;
        }
        if s > m {
            let factor = if m == f32::NEG_INFINITY {
                0.0
            } else {
                (m - s).exp()
            };
            l *= factor;
            lane.rescale(factor);
            m = s;
        }
        let w = (s - m).exp();
        l += w;
        lane.push(pos, w, s);
    }
    (m, l, lane)
}

/// Merges two readings `(m, l, lane)` over disjoint keys.
pub fn merge<L: Lane>(a: (f32, f32, L), b: (f32, f32, L)) -> (f32, f32, L) {
    let m = a.0.max(b.0);
    if m == f32::NEG_INFINITY {
        return a;
    }
    let (fa, fb) = ((a.0 - m).exp(), (b.0 - m).exp());
    let (mut left, mut right) = (a.2, b.2);
    left.rescale(fa);
    right.rescale(fb);
    left.merge(&right);
    (m, a.1 * fa + b.1 * fb, left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_cut_of_the_keys_reads_the_same(scores in prop::collection::vec(-9.0f32..9.0, 1..50), cut in 0usize..51) {
            let cut = cut.min(scores.len());
            let whole = read::<Entropy>(&scores, 0);
            let parts = merge(read::<Entropy>(&scores[..cut], 0), read::<Entropy>(&scores[cut..], cut as u32));
            prop_assert!((whole.2.sum / whole.1 - parts.2.sum / parts.1).abs() < 1e-4);
            let whole = read::<Arg<3>>(&scores, 0);
            let parts = merge(read::<Arg<3>>(&scores[..cut], 0), read::<Arg<3>>(&scores[cut..], cut as u32));
            prop_assert_eq!(whole.2, parts.2);
        }
    }

    #[test]
    fn entropy_of_equal_scores_is_the_log_of_their_number() {
        let (m, l, lane) = read::<Entropy>(&[2.5; 8], 0);
        let entropy = m + l.ln() - lane.sum / l;
        assert!((entropy - 8f32.ln()).abs() < 1e-5, "{entropy}");
    }

    #[test]
    fn ties_go_to_the_lower_position() {
        let (_, _, top) = read::<Arg<2>>(&[1.0, 3.0, 3.0, 3.0], 10);
        assert_eq!(top.best(), [(3.0, 11), (3.0, 12)]);
    }
}
