//! The partial attention state and its laws.

/// Partial attention of `R` query rows over some set of keys.
///
/// `m: [R]`, `l: [R]`, `acc: [R, D]`, row-major f32: `m` = max of the scores, `l` = sum exp(s-m), `acc` = sum exp(s-m) v.
/// No keys at all: `m = -inf`, `l = 0`, `acc = 0`, the identity of [`State::merge`].
///
/// The laws (tested in this file): merge is associative and commutative up to rounding, has the identity, [`State::gain`] is a
/// homomorphism of it, and any cut of the keys gives the same finished output.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    m: Vec<f32>,
    l: Vec<f32>,
    acc: Vec<f32>,
    dim: usize,
}

impl State {
    /// The state of `rows` rows that have seen no key.
    pub fn identity(rows: usize, dim: usize) -> Self {
        Self {
            m: vec![f32::NEG_INFINITY; rows],
            l: vec![0.0; rows],
            acc: vec![0.0; rows * dim],
            dim,
        }
    }

    /// Number of rows `R`.
    pub fn rows(&self) -> usize {
        self.m.len()
    }

    /// Head dimension `D`.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Maxima, sums and accumulators, `([R], [R], [R, D])`: what a kernel continues.
    pub fn parts_mut(&mut self) -> (&mut [f32], &mut [f32], &mut [f32]) {
        (&mut self.m, &mut self.l, &mut self.acc)
    }

    /// Row maxima, `[R]`.
    pub fn m(&self) -> &[f32] {
        &self.m
    }

    /// Row sums, `[R]`.
    pub fn l(&self) -> &[f32] {
        &self.l
    }

    /// Accumulators, `[R, D]`.
    pub fn acc(&self) -> &[f32] {
        &self.acc
    }

    /// Adds one key with score `s` and value `v` (`[D]`) to row `row`. A score of -inf adds nothing.
    ///
    /// # Panics
    /// When `row` or the length of `v` does not fit.
    pub fn push(&mut self, row: usize, s: f32, v: &[f32]) {
        assert_eq!(v.len(), self.dim, "a value has D entries");
        if s == f32::NEG_INFINITY {
            return;
        }
        let m = self.m[row].max(s);
        let (old, new) = (factor(self.m[row], m), (s - m).exp());
        self.l[row] = self.l[row] * old + new;
        for (a, v) in self.acc[row * self.dim..][..self.dim].iter_mut().zip(v) {
            *a = *a * old + new * v;
        }
        self.m[row] = m;
    }

    /// Continues with the keys of `other`: afterwards this is the state over the union.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn merge(&mut self, other: &State) {
        assert_eq!(
            (self.rows(), self.dim),
            (other.rows(), other.dim),
            "only states of the same rows merge"
        );
        for r in 0..self.rows() {
            let m = self.m[r].max(other.m[r]);
            if m == f32::NEG_INFINITY {
                // Both empty in the sense of softmax; a linear part always has a finite m.
                continue;
            }
            let (a, b) = (factor(self.m[r], m), factor(other.m[r], m));
            self.m[r] = m;
            self.l[r] = self.l[r] * a + other.l[r] * b;
            let span = r * self.dim..(r + 1) * self.dim;
            for (x, y) in self.acc[span.clone()].iter_mut().zip(&other.acc[span]) {
                *x = *x * a + y * b;
            }
        }
    }

    /// Multiplies the weight of this part by `e^b`, for every row. `b = -inf` cuts the part off.
    pub fn gain(&mut self, b: f32) {
        if b == f32::NEG_INFINITY {
            *self = State::identity(self.rows(), self.dim);
            return;
        }
        for m in &mut self.m {
            *m += b;
        }
    }

    /// Scales the log-sum-exp by `alpha` and leaves the output alone (paper `ape`, its scaling factor).
    ///
    /// Not a homomorphism of merge: apply it once, to a finished group of keys.
    pub fn power(&mut self, alpha: f32) {
        for (m, l) in self.m.iter_mut().zip(&self.l) {
            if *l > 0.0 {
                // lse' = m' + ln l = alpha (m + ln l)
                *m = alpha * (*m + l.ln()) - l.ln();
            }
        }
    }

    /// Adds a part that is linear in a feature map: row `r` gets the weight `phi[r] . k` and the value `phi[r] . z`
    /// (paper `ntk_attention`). `phi: [R, F]`, `k: [F]`, `z: [F, D]`. Weights must be positive; values may have any sign.
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn push_linear(&mut self, phi: &[f32], k: &[f32], z: &[f32]) {
        let features = k.len();
        assert_eq!(phi.len(), self.rows() * features, "phi is [R, F]");
        assert_eq!(z.len(), features * self.dim, "z is [F, D]");
        let mut part = State::identity(self.rows(), self.dim);
        for r in 0..part.rows() {
            let phi = &phi[r * features..][..features];
            part.m[r] = 0.0;
            part.l[r] = phi.iter().zip(k).map(|(p, k)| p * k).sum();
            for (f, p) in phi.iter().enumerate() {
                for (a, z) in part.acc[r * self.dim..][..self.dim]
                    .iter_mut()
                    .zip(&z[f * self.dim..])
                {
                    *a += p * z;
                }
            }
        }
        self.merge(&part);
    }

    /// Adds a key whose value is zero: an attention sink with this logit in every row.
    pub fn push_sink(&mut self, logit: f32) {
        let mut part = State::identity(self.rows(), self.dim);
        if logit > f32::NEG_INFINITY {
            part.m.fill(logit);
            part.l.fill(1.0);
        }
        self.merge(&part);
    }

    /// The output `o: [R, D]` and `lse: [R]`. A row without keys gives zeros and -inf.
    pub fn finish(&self) -> (Vec<f32>, Vec<f32>) {
        let mut o = self.acc.clone();
        for (row, l) in o.chunks_exact_mut(self.dim.max(1)).zip(&self.l) {
            for x in row {
                *x = if *l == 0.0 { 0.0 } else { *x / l };
            }
        }
        let lse = self
            .m
            .iter()
            .zip(&self.l)
            .map(|(m, l)| if *l == 0.0 { f32::NEG_INFINITY } else { m + l.ln() });
        (o, lse.collect())
    }
}

/// `exp(old - new)` for `old <= new`, where two -inf mean an empty part.
fn factor(old: f32, new: f32) -> f32 {
    if old == f32::NEG_INFINITY {
        0.0
    } else {
        (old - new).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const D: usize = 5;

    fn keys() -> impl Strategy<Value = Vec<(f32, [f32; D])>> {
        prop::collection::vec((-30.0f32..30.0, prop::array::uniform5(-2.0f32..2.0)), 0..40)
    }

    fn state_of(keys: &[(f32, [f32; D])]) -> State {
        let mut st = State::identity(1, D);
        for (s, v) in keys {
            st.push(0, *s, v);
        }
        st
    }

    fn reference(keys: &[(f32, [f32; D])]) -> (Vec<f64>, f64) {
        let max = keys
            .iter()
            .map(|k| f64::from(k.0))
            .fold(f64::NEG_INFINITY, f64::max);
        let l: f64 = keys.iter().map(|k| (f64::from(k.0) - max).exp()).sum();
        let o = (0..D)
            .map(|d| {
                keys.iter()
                    .map(|k| (f64::from(k.0) - max).exp() * f64::from(k.1[d]))
                    .sum::<f64>()
                    / l
            })
            .collect();
        (o, max + l.ln())
    }

    fn assert_same(a: &State, b: &State, tol: f32) {
        let ((oa, la), (ob, lb)) = (a.finish(), b.finish());
        for (x, y) in oa.iter().zip(&ob).chain(la.iter().zip(&lb)) {
            assert!(
                x == y || (x - y).abs() <= tol * (1.0 + y.abs()),
                "{x} against {y}\n{a:?}\n{b:?}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn pushing_keys_is_softmax(ks in keys()) {
            prop_assume!(!ks.is_empty());
            let (o, lse) = state_of(&ks).finish();
            let (want, want_lse) = reference(&ks);
            for (x, y) in o.iter().zip(&want) {
                prop_assert!((f64::from(*x) - y).abs() < 1e-5, "{x} against {y}");
            }
            prop_assert!((f64::from(lse[0]) - want_lse).abs() < 1e-4);
        }

        #[test]
        fn it_does_not_matter_where_the_keys_are_cut(ks in keys(), cut in 0usize..41) {
            let cut = cut.min(ks.len());
            let mut parts = state_of(&ks[..cut]);
            parts.merge(&state_of(&ks[cut..]));
            assert_same(&parts, &state_of(&ks), 1e-5);
        }

        #[test]
        fn merge_commutes_and_associates(a in keys(), b in keys(), c in keys()) {
            let [a, b, c] = [state_of(&a), state_of(&b), state_of(&c)];
            let (mut ab, mut ba) = (a.clone(), b.clone());
            ab.merge(&b);
            ba.merge(&a);
            assert_same(&ab, &ba, 1e-5);
            let mut left = ab;
            left.merge(&c);
            let mut bc = b;
            bc.merge(&c);
            let mut right = a;
            right.merge(&bc);
            assert_same(&left, &right, 1e-5);
        }

        #[test]
        fn the_identity_changes_no_bit(a in keys()) {
            let a = state_of(&a);
            let mut left = State::identity(1, D);
            left.merge(&a);
            let mut right = a.clone();
            right.merge(&State::identity(1, D));
            prop_assert_eq!(&left, &a);
            prop_assert_eq!(&right, &a);
        }

        #[test]
        fn gain_is_a_homomorphism(a in keys(), b in keys(), g in -5.0f32..5.0) {
            let (mut a, mut b) = (state_of(&a), state_of(&b));
            let mut whole = a.clone();
            whole.merge(&b);
            whole.gain(g);
            a.gain(g);
            b.gain(g);
            a.merge(&b);
            assert_same(&a, &whole, 1e-5);
        }

        #[test]
        fn adding_a_constant_to_all_scores_moves_only_the_lse(ks in keys(), c in -1e4f32..1e4) {
            prop_assume!(!ks.is_empty());
            let moved: Vec<_> = ks.iter().map(|(s, v)| (s + c, *v)).collect();
            let ((o, lse), (p, moved_lse)) = (state_of(&ks).finish(), state_of(&moved).finish());
            for (x, y) in o.iter().zip(&p) {
                prop_assert!((x - y).abs() < 2e-2 && y.is_finite(), "{x} {y}");
            }
            prop_assert!((moved_lse[0] - lse[0] - c).abs() < 1e-2);
        }

        #[test]
        fn power_scales_the_lse_alone(ks in keys(), alpha in 0.1f32..2.0) {
            prop_assume!(!ks.is_empty());
            let mut st = state_of(&ks);
            let (o, lse) = st.finish();
            st.power(alpha);
            let (p, scaled) = st.finish();
            prop_assert_eq!(o, p);
            prop_assert!((scaled[0] - alpha * lse[0]).abs() < 1e-3);
        }

        #[test]
        fn a_sink_takes_weight_and_adds_no_value(ks in keys(), logit in -10.0f32..10.0) {
            prop_assume!(!ks.is_empty());
            let mut with = state_of(&ks);
            with.push_sink(logit);
            let mut as_key = state_of(&ks);
            as_key.push(0, logit, &[0.0; D]);
            assert_same(&with, &as_key, 1e-5);
        }

        #[test]
        fn a_linear_part_adds_its_weight_and_value(ks in keys(), phi in prop::array::uniform3(0.1f32..2.0)) {
            let (k, z) = ([0.5f32, 1.0, 2.0], (0..3 * D).map(|i| i as f32 - 7.0).collect::<Vec<_>>());
            let mut st = state_of(&ks);
            st.push_linear(&phi, &k, &z);
            // Reference: one key of score ln(phi.k) and value phi.z / phi.k.
            let w: f32 = phi.iter().zip(&k).map(|(p, k)| p * k).sum();
            let v: Vec<f32> = (0..D).map(|d| (0..3).map(|f| phi[f] * z[f * D + d]).sum::<f32>() / w).collect();
            let mut want = state_of(&ks);
            want.push(0, w.ln(), &v);
            assert_same(&st, &want, 1e-4);
        }
    }

    #[test]
    fn an_empty_row_is_zero_and_never_nan() {
        let mut st = State::identity(2, 3);
        st.merge(&State::identity(2, 3));
        st.push(0, f32::NEG_INFINITY, &[f32::NAN; 3]);
        assert_eq!(st.finish(), (vec![0.0; 6], vec![f32::NEG_INFINITY; 2]));
    }

    #[test]
    fn a_gain_of_minus_infinity_cuts_a_part_off() {
        let mut st = state_of(&[(1.0, [1.0; D])]);
        st.gain(f32::NEG_INFINITY);
        assert_eq!(st, State::identity(1, D));
    }
}
