//! ape through the algebra of states, as the attention core computes it, against its reference.

use antefix_attention::method::{Chosen, Facts, Knobs, Profiles, Rig};
use antefix_state::State;

use super::reference::{Rows, attention};
use super::*;

#[test]
fn it_conforms() {
    antefix_conformance::method::check(&Ape);
}

const D: usize = 6;

/// `n` rows that depend on the seed alone.
fn rows(n: usize, seed: usize) -> Rows {
    let row = |t: usize, salt: usize| -> Vec<f64> {
        (0..D)
            .map(|d| (((t * 31 + d * 17 + seed * 101 + salt) * 7919 % 1000) as f64 / 250.0) - 2.0)
            .collect()
    };
    Rows {
        k: (0..n).map(|t| row(t, 3)).collect(),
        v: (0..n).map(|t| row(t, 8)).collect(),
    }
}

fn together(contexts: &[Rows]) -> Rows {
    Rows {
        k: contexts.iter().flat_map(|c| c.k.clone()).collect(),
        v: contexts.iter().flat_map(|c| c.v.clone()).collect(),
    }
}

fn query(seed: usize) -> Vec<f64> {
    rows(1, seed + 1000).k.remove(0)
}

/// State of one query row over `rows`, scores divided by `temperature`.
fn state(q: &[f64], rows: &Rows, temperature: f32) -> State {
    let mut state = State::identity(1, D);
    for (k, v) in rows.k.iter().zip(&rows.v) {
        let s: f64 = q.iter().zip(k).map(|(a, b)| a * b).sum();
        let v: Vec<f32> = v.iter().map(|&x| x as f32).collect();
        state.push(0, s as f32 / temperature, &v);
    }
    state
}

/// What the attention core does with the layout: the contexts merge, then the power, then the others.
fn by_states(q: &[f64], contexts: &[Rows], others: &Rows, how: Parallel) -> Vec<f32> {
    let sizes: Vec<usize> = contexts.iter().map(|c| c.k.len()).collect();
    let layout = how.layout(4, &sizes);
    let mut group = State::identity(1, D);
    for context in contexts {
        group.merge(&state(q, context, layout.temperature));
    }
    group.power(layout.lse_scale);
    group.merge(&state(q, others, 1.0));
    group.finish().0
}

fn assert_near(got: &[f32], want: &[f64]) {
    for (a, b) in got.iter().zip(want) {
        assert!((f64::from(*a) - b).abs() < 1e-5, "{got:?} {want:?}");
    }
}

const HOW: Parallel = Parallel {
    temperature: 0.7,
    scale: 0.6,
};

#[test]
fn the_layout_is_the_formula_for_any_temperature_and_scale() {
    for (i, (t, s)) in [(1.0, 1.0), (0.9, 0.9), (0.3, 1.2), (1.2, 0.3), (0.6, 1.0)]
        .into_iter()
        .enumerate()
    {
        for n in [0, 1, 3, 8] {
            let contexts: Vec<Rows> = (0..n).map(|c| rows(1 + c * 5 % 7, c + i)).collect();
            let (q, others) = (query(i), rows(5, 77));
            let how = Parallel {
                temperature: t,
                scale: s,
            };
            let want = attention(&q, &together(&contexts), &others, f64::from(t), f64::from(s));
            assert_near(&by_states(&q, &contexts, &others, how), &want);
        }
    }
}

#[test]
fn a_power_for_each_context_is_something_else() {
    let contexts: Vec<Rows> = (0..4).map(|c| rows(6, c)).collect();
    let (q, others) = (query(0), rows(5, 77));
    let layout = HOW.layout(4, &[6; 4]);
    let mut wrong = State::identity(1, D);
    for context in &contexts {
        let mut part = state(&q, context, layout.temperature);
        part.power(layout.lse_scale);
        wrong.merge(&part);
    }
    wrong.merge(&state(&q, &others, 1.0));
    let want = attention(&q, &together(&contexts), &others, 0.7, 0.6);
    let off = wrong
        .finish()
        .0
        .iter()
        .zip(&want)
        .map(|(a, b)| (f64::from(*a) - b).abs())
        .fold(0.0, f64::max);
    assert!(off > 1e-3, "the test could not tell them apart: {off}");
}

#[test]
fn contexts_may_stand_in_any_order_and_a_copy_counts_twice() {
    let contexts: Vec<Rows> = (0..3).map(|c| rows(4 + c, c)).collect();
    let (q, others) = (query(1), rows(5, 77));
    let turned: Vec<Rows> = contexts.iter().rev().cloned().collect();
    let a = by_states(&q, &contexts, &others, HOW);
    let b: Vec<f64> = by_states(&q, &turned, &others, HOW)
        .iter()
        .map(|&x| f64::from(x))
        .collect();
    assert_near(&a, &b);
    // At T = S = 1, two copies of a context weigh as much as one whose scores are higher by ln 2.
    let plain = Parallel {
        temperature: 1.0,
        scale: 1.0,
    };
    let twice = by_states(&q, &[contexts[0].clone(), contexts[0].clone()], &others, plain);
    let mut once = state(&q, &contexts[0], 1.0);
    once.gain(2f32.ln());
    once.merge(&state(&q, &others, 1.0));
    let want: Vec<f64> = once.finish().0.iter().map(|&x| f64::from(x)).collect();
    assert_near(&twice, &want);
}

#[test]
fn a_low_temperature_finds_the_row_of_the_highest_score() {
    let contexts = [rows(9, 5)];
    let q = query(2);
    let scores: Vec<f64> = contexts[0]
        .k
        .iter()
        .map(|k| q.iter().zip(k).map(|(a, b)| a * b).sum())
        .collect();
    let best = (0..9).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
    // Nothing else has weight: another row far below.
    let others = Rows {
        k: vec![q.iter().map(|x| -100.0 * x).collect()],
        v: vec![vec![0.0; D]],
    };
    let how = Parallel {
        temperature: 0.001,
        scale: 1.0,
    };
    assert_near(&by_states(&q, &contexts, &others, how), &contexts[0].v[best]);
    // The weight of all rows together becomes that of the best one, to the power S.
    for scale in [1.0, 0.6] {
        let mut group = state(&q, &contexts[0], how.temperature);
        group.power(scale * how.temperature);
        let lse = f64::from(group.finish().1[0]);
        assert!((lse - f64::from(scale) * scores[best]).abs() < 1e-2, "{lse}");
    }
}

#[test]
fn the_question_begins_behind_the_longest_document() {
    let layout = HOW.layout(10, &[5, 70, 3]);
    assert_eq!((layout.deltas, layout.next), (vec![0; 3], 80));
    assert_eq!(HOW.mend(24, 78), None);
}

#[test]
fn a_text_as_it_is_cannot_be_scored_under_it() {
    let chosen = Chosen {
        method: &Ape,
        knobs: Knobs::defaults(&CARD),
    };
    let program = Rig::assemble(&Facts::example(), &Profiles::default(), &[chosen]).expect("it goes");
    assert!(!program.scores_texts(), "its documents lie side by side");
}
