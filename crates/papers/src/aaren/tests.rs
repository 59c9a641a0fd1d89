//! Section 6 of the specification: ways that agree, laws, streams, files.

mod files;
mod parallel;
mod streams;

use antefix_kernels::team::Team;
use antefix_state::State;
use proptest::prelude::*;

use super::reference::prefixes;
use super::scan::Prefix;

pub(super) fn rng(seed: u64) -> fastrand::Rng {
    fastrand::Rng::with_seed(seed)
}

pub(super) fn normals(rng: &mut fastrand::Rng, n: usize, scale: f32) -> Vec<f32> {
    let one = |rng: &mut fastrand::Rng| {
        let r = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
        (r * (std::f64::consts::TAU * rng.f64()).cos()) as f32
    };
    (0..n).map(|_| scale * one(rng)).collect()
}

#[track_caller]
pub(super) fn assert_close(name: &str, got: &[f32], want: &[f32], tol: f32) {
    assert_eq!(got.len(), want.len(), "{name}: lengths");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!(
            (a - b).abs() <= tol * (1.0 + b.abs()),
            "{name}: {a} against {b} at {i}"
        );
    }
}

/// Scores and values of `n` tokens; a few tokens are masked, a few scores tie.
struct Case {
    heads: usize,
    dim: usize,
    s: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(n: usize, heads: usize, dim: usize, scale: f32, holes: bool) -> Self {
        let mut rng = rng(n as u64 + 7);
        let mut s = normals(&mut rng, n * heads, scale);
        let v = normals(&mut rng, n * heads * dim, 1.0);
        for i in 0..s.len() {
            match rng.u32(0..10) {
                0 if holes => s[i] = f32::NEG_INFINITY,
                1 | 2 if i >= heads => s[i] = s[i - heads],
                _ => {}
            }
        }
        Self { heads, dim, s, v }
    }

    fn len(&self) -> usize {
        self.s.len() / self.heads
    }

    fn width(&self) -> usize {
        self.heads * self.dim
    }

    fn start(&self) -> Prefix {
        Prefix::new(self.heads, self.dim)
    }

    /// The definition, head by head.
    fn reference(&self, decay: f64) -> Vec<f32> {
        let mut out = vec![0.0; self.v.len()];
        for h in 0..self.heads {
            let s: Vec<f64> = self
                .s
                .iter()
                .skip(h)
                .step_by(self.heads)
                .map(|s| f64::from(*s))
                .collect();
            let rows = (0..self.len()).map(|i| &self.v[i * self.width() + h * self.dim..][..self.dim]);
            let v: Vec<f64> = rows.flatten().map(|v| f64::from(*v)).collect();
            for (i, o) in prefixes(&s, &v, decay).chunks_exact(self.dim).enumerate() {
                let to = &mut out[i * self.width() + h * self.dim..][..self.dim];
                to.iter_mut().zip(o).for_each(|(t, o)| *t = *o as f32);
            }
        }
        out
    }

    fn scan(&self, decay: f64) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.v.len()];
        self.start().scan(&self.s, &self.v, decay, &mut out, None);
        out
    }

    fn chunked(&self, threads: usize, chunk: usize, decay: f64) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.v.len()];
        let mut state = self.start();
        state.scan_chunked(&Team::new(threads), chunk, &self.s, &self.v, decay, &mut out);
        if self.len() > 0 {
            assert_close(
                "the state behind the chunks",
                state.output(),
                &out[out.len() - self.width()..],
                1e-5,
            );
        }
        out
    }
}

#[test]
fn every_way_of_computing_all_prefixes_agrees_with_masked_softmax() {
    for n in [1, 2, 7, 64, 300] {
        for (scale, holes) in [(1.0, false), (50.0, false), (1.0, true)] {
            let case = Case::new(n, 3, 5, scale, holes);
            let want = case.reference(0.0);
            assert_close("scan", &case.scan(0.0), &want, 1e-5);
            assert_close("chunks", &case.chunked(2, 16, 0.0), &want, 1e-5);
            assert_close("Hillis-Steele", &parallel::hillis_steele(&case), &want, 1e-5);
            assert_close("Blelloch", &parallel::blelloch(&case), &want, 1e-5);
            // The recurrence of 3.1 as the algebra of the crate `state` has it, and ours.
            let (mut state, mut ours) = (State::identity(3, 5), case.start());
            for i in 0..n {
                ours.push(&case.s[i * 3..][..3], &case.v[i * 15..][..15]);
                for h in 0..3 {
                    state.push(h, case.s[i * 3 + h], &case.v[i * 15 + h * 5..][..5]);
                }
                assert_close("state", &state.finish().0, &want[i * 15..][..15], 1e-5);
                assert_close("push", ours.output(), &want[i * 15..][..15], 1e-5);
            }
            for block in [1, 2, 7, 64, n] {
                let mut state = case.start();
                let cuts = case.s.chunks(block * 3).zip(case.v.chunks(block * 15));
                for (b, (s, v)) in cuts.enumerate() {
                    state.push_block(s, v);
                    let last = ((b + 1) * block).min(n) - 1;
                    assert_close("block", state.output(), &want[last * 15..][..15], 1e-5);
                }
            }
        }
    }
}

#[test]
fn prefixes_of_4096_tokens_agree_with_masked_softmax() {
    for scale in [1.0, 50.0] {
        let case = Case::new(4096, 1, 3, scale, false);
        let want = case.reference(0.0);
        assert_close("scan", &case.scan(0.0), &want, 1e-5);
        assert_close("chunks", &case.chunked(2, 256, 0.0), &want, 1e-5);
        assert_close("Hillis-Steele", &parallel::hillis_steele(&case), &want, 1e-5);
        assert_close("Blelloch", &parallel::blelloch(&case), &want, 1e-5);
        let mut state = case.start();
        state.push_block(&case.s, &case.v);
        assert_close("one block", state.output(), &want[4095 * 3..], 1e-5);
    }
}

#[test]
fn forgetting_is_a_weight_that_falls_with_age() {
    let case = Case::new(200, 2, 3, 2.0, true);
    let want = case.reference(0.07);
    assert_close("scan", &case.scan(0.07), &want, 1e-5);
    assert_close("chunks", &case.chunked(2, 32, 0.07), &want, 1e-5);
    let (last, no_decay) = (&want[199 * 6..], case.reference(0.0));
    assert!(
        last.iter()
            .zip(&no_decay[199 * 6..])
            .any(|(a, b)| (a - b).abs() > 0.05),
        "the decay does something"
    );
}

#[test]
fn chunks_do_not_depend_on_the_number_of_threads() {
    let case = Case::new(1000, 2, 7, 3.0, true);
    let bits = |threads| {
        let out = case.chunked(threads, 64, 0.01);
        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = bits(1);
    for threads in [2, 3, 7] {
        assert!(bits(threads) == one, "{threads} threads give other bits");
    }
    assert_close("serial", &case.chunked(1, 64, 0.01), &case.scan(0.01), 1e-6);
}

#[test]
fn a_later_token_changes_no_bit_of_an_earlier_output() {
    let mut case = Case::new(100, 2, 4, 5.0, false);
    let before = case.scan(0.0);
    for j in [1, 50, 99] {
        let (mut s, mut v) = (case.s.clone(), case.v.clone());
        s[j * 2] += 40.0;
        v[j * 8..][..8].fill(-9.0);
        std::mem::swap(&mut s, &mut case.s);
        std::mem::swap(&mut v, &mut case.v);
        let after = case.scan(0.0);
        std::mem::swap(&mut s, &mut case.s);
        std::mem::swap(&mut v, &mut case.v);
        assert!(
            after[..j * 8]
                .iter()
                .zip(&before)
                .all(|(a, b)| a.to_bits() == b.to_bits()),
            "token {j} reached back"
        );
        assert_ne!(after[j * 8..], before[j * 8..], "token {j} is seen");
    }
}

#[test]
fn equal_scores_give_the_running_mean_and_a_dominant_one_its_value() {
    let mut case = Case::new(50, 1, 2, 1.0, false);
    case.s.fill(0.0); // q_tok = 0
    let out = case.scan(0.0);
    for k in 0..50 {
        for d in 0..2 {
            let mean = (0..=k).map(|i| case.v[i * 2 + d]).sum::<f32>() / (k + 1) as f32;
            assert!((out[k * 2 + d] - mean).abs() < 1e-5);
        }
    }
    case.s[20] = 1000.0;
    let out = case.scan(0.0);
    for k in 20..50 {
        assert_eq!(out[k * 2..][..2], case.v[40..42], "prefix {k} copies token 20");
    }
}

#[test]
fn padding_leaves_outputs_untouched_and_nothing_seen_is_zero() {
    let mut state = Prefix::new(1, 3);
    state.push(&[f32::NEG_INFINITY], &[f32::NAN; 3]);
    assert_eq!(state, Prefix::new(1, 3));
    state.push(&[1e30], &[1.0, 2.0, 3.0]);
    state.push(&[-1e30], &[9.0; 3]);
    let seen = state.clone();
    state.push_block(&[f32::NEG_INFINITY; 2], &[f32::NAN; 6]);
    state.push(&[f32::NEG_INFINITY], &[f32::INFINITY; 3]);
    assert_eq!(state, seen);
    assert_eq!(state.output(), [1.0, 2.0, 3.0]);
}

#[test]
fn a_stream_of_flat_scores_still_listens_after_2_to_the_24_tokens() {
    // Where a sum of weights in f32 has stopped: adding 1 changes nothing.
    let mut state = State::identity(1, 1);
    state.parts_mut().0[0] = 0.0;
    state.parts_mut().1[0] = (1u32 << 24) as f32;
    for _ in 0..1000 {
        state.push(0, 0.0, &[1.0]);
    }
    assert_eq!(state.l()[0], (1u32 << 24) as f32);
    let n = f64::from(1u32 << 24);
    let mut ours = Prefix::from_parts(vec![n.ln()], vec![0.0f64], 1).unwrap();
    for _ in 0..1000 {
        ours.push(&[0.0], &[1.0]);
    }
    assert!((ours.lse()[0] - (n + 1000.0).ln()).abs() < 1e-11);
    assert!((ours.output()[0] - 1000.0 / (n + 1000.0)).abs() < 1e-15);
}

fn tokens() -> impl Strategy<Value = Vec<(f32, [f32; 3])>> {
    prop::collection::vec((-30.0f32..30.0, prop::array::uniform3(-2.0f32..2.0)), 0..30)
}

fn prefix(tokens: &[(f32, [f32; 3])]) -> Prefix {
    let mut state = Prefix::new(1, 3);
    for (s, v) in tokens {
        state.push(&[*s], v);
    }
    state
}

#[track_caller]
fn assert_same(a: &Prefix, b: &Prefix, tol: f32) {
    assert_close("o", a.output(), b.output(), tol);
    for (a, b) in a.lse().iter().zip(b.lse()) {
        assert!(a == b || (a - b).abs() < 1e-9, "lse {a} against {b}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_operator_is_associative_and_commutative(a in tokens(), b in tokens(), c in tokens()) {
        let [a, b, c] = [prefix(&a), prefix(&b), prefix(&c)];
        let (mut ab, mut ba) = (a.clone(), b.clone());
        ab.merge(&b);
        ba.merge(&a);
        assert_same(&ab, &ba, 1e-6);
        ab.merge(&c);
        let mut bc = b.clone();
        bc.merge(&c);
        let mut right = a.clone();
        right.merge(&bc);
        assert_same(&ab, &right, 1e-6);
    }

    #[test]
    fn the_identity_changes_no_bit(a in tokens()) {
        let a = prefix(&a);
        let mut left = Prefix::new(1, 3);
        left.merge(&a);
        let mut right = a.clone();
        right.merge(&Prefix::new(1, 3));
        prop_assert_eq!(&left, &a);
        prop_assert_eq!(&right, &a);
    }

    #[test]
    fn it_does_not_matter_where_tokens_are_cut(t in tokens(), cut in 0usize..31) {
        let cut = cut.min(t.len());
        let whole = prefix(&t);
        let mut merged = prefix(&t[..cut]);
        merged.merge(&prefix(&t[cut..]));
        assert_same(&merged, &whole, 1e-5);
        let mut block = prefix(&t[..cut]);
        let (s, v): (Vec<f32>, Vec<[f32; 3]>) = t[cut..].iter().copied().unzip();
        block.push_block(&s, v.as_flattened());
        assert_same(&block, &whole, 1e-5);
    }

    #[test]
    fn a_prefix_is_a_state_of_the_algebra(a in tokens(), b in tokens()) {
        let (mut ours, mut theirs) = (prefix(&a), prefix(&a).state());
        ours.merge(&prefix(&b));
        theirs.merge(&prefix(&b).state());
        assert_close("o", &theirs.finish().0, ours.output(), 1e-5);
        let back = Prefix::from(&theirs);
        assert_close("back", back.output(), ours.output(), 1e-5);
        for (x, y) in back.lse().iter().zip(ours.lse()) {
            prop_assert!(x == y || (x - y).abs() < 1e-4, "{x} {y}");
        }
    }

    #[test]
    fn gain_is_a_homomorphism(a in tokens(), b in tokens(), g in -5.0f64..5.0) {
        let (mut a, mut b) = (prefix(&a), prefix(&b));
        let mut whole = a.clone();
        whole.merge(&b);
        whole.gain(g);
        a.gain(g);
        b.gain(g);
        a.merge(&b);
        assert_same(&a, &whole, 1e-6);
    }
}
