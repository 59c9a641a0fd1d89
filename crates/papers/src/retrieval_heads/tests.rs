//! Scores against the reference, and what the specification demands of them.

use proptest::prelude::*;

use super::reference;
use super::score::{Look, NoRuns, RunScore, mean, rouge1_recall};
use crate::case::MADE_UP;

#[test]
fn it_conforms() {
    antefix_conformance::method::check_profiled(
        &super::RetrievalHeads,
        Some(MADE_UP),
        &["top=2", "heads=0:0+1:1", "heads=1:0,mask=zero"],
    );
}

/// The looks of a head at its rows.
fn looks(rows: &[Vec<f64>], span: std::ops::Range<usize>) -> Vec<Look> {
    rows.iter()
        .map(|row| Look {
            layer: 0,
            head: 0,
            best: (0..row.len()).fold(0, |b, j| if row[j] > row[b] { j } else { b }),
            mass: row[span.clone()].iter().sum::<f64>() as f32,
        })
        .collect()
}

fn score(rows: &[Vec<f64>], prompt: &[u32], span: std::ops::Range<usize>, output: &[u32]) -> RunScore {
    let mut run = RunScore::new(1, 1);
    for (look, &y) in looks(rows, span.clone()).iter().zip(output) {
        run.step(prompt, span.clone(), y, std::slice::from_ref(look));
    }
    run
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_fast_scores_are_the_reference(
        prompt in prop::collection::vec(0u32..5, 12),
        output in prop::collection::vec(0u32..5, 0..9),
        weights in prop::collection::vec(0u32..100, 12 * 9),
        from in 0usize..10,
        len in 1usize..5,
    ) {
        let span = from..(from + len).min(12);
        let rows: Vec<Vec<f64>> = weights.chunks(12).take(output.len()).map(|row| {
            let sum = f64::from(row.iter().sum::<u32>().max(1));
            row.iter().map(|&w| f64::from(w) / sum).collect()
        }).collect();
        let got = score(&rows, &prompt, span.clone(), &output);
        let classic = reference::retrieval(&rows, &prompt, span.clone(), &output);
        let semantic = reference::semantic(&rows, &prompt, span.clone(), &output);
        prop_assert!((f64::from(got.retrieval[0]) - classic).abs() < 1e-5);
        prop_assert!((f64::from(got.semantic[0]) - semantic).abs() < 1e-4);
        prop_assert!(classic <= output.len() as f64 / span.len() as f64 + 1e-9, "at most steps / span");
    }
}

#[test]
fn a_head_that_copies_the_answer_scores_one_and_others_nothing() {
    let prompt = [9, 9, 1, 2, 3, 4, 9, 9];
    let at = |j: usize| {
        (0..8)
            .map(|i| if i == j { 0.9 } else { 0.1 / 7.0 })
            .collect::<Vec<f64>>()
    };
    let copy = score(&[at(2), at(3), at(4), at(5)], &prompt, 2..6, &[1, 2, 3, 4]);
    assert!((copy.retrieval[0] - 1.0).abs() < 1e-6);
    // Looking at the token just written (the answer's own row) is one step late.
    let late = score(&[at(1), at(2), at(3), at(4)], &prompt, 2..6, &[1, 2, 3, 4]);
    assert_eq!(late.retrieval[0], 0.0);
    // A sink head, and the right token at the wrong place.
    assert_eq!(
        score(&[at(0), at(0), at(0), at(0)], &prompt, 2..6, &[1, 2, 3, 4]).retrieval[0],
        0.0
    );
    assert_eq!(
        score(&[at(6)], &[1, 9, 1, 2, 3, 4, 1, 9], 2..6, &[1]).retrieval[0],
        0.0
    );
}

#[test]
fn a_token_that_occurs_twice_in_the_answer_weighs_twice_in_the_semantic_score() {
    let prompt = [5, 7, 5, 0];
    let row = vec![0.25, 0.25, 0.25, 0.25];
    let got = score(&[row.clone(), row], &prompt, 0..3, &[5, 7]);
    assert!((got.semantic[0] - (2.0 * 0.75 + 0.75)).abs() < 1e-6);
}

#[test]
fn recall_counts_words_as_often_as_the_reference_has_them() {
    assert_eq!(rouge1_recall("a b c d", "d, c! x"), 0.5);
    assert_eq!(rouge1_recall("the cat the dog", "The the dog"), 0.75);
    assert_eq!(rouge1_recall("the cat the dog", "the"), 0.25);
    assert_eq!(rouge1_recall("", "x"), 0.0);
    assert_eq!(rouge1_recall("x", ""), 0.0);
}

#[test]
fn no_accepted_run_is_an_error_and_not_a_table_of_zeros() {
    assert_eq!(mean(&[], 4), Err(NoRuns));
    let (scores, active) = mean(&[&[1.0, 0.0, 0.5, 0.0], &[0.0, 0.0, 0.5, 0.5]], 2).unwrap();
    assert_eq!(scores, [[0.5, 0.0], [0.5, 0.25]]);
    assert_eq!(active, [[0.5, 0.0], [1.0, 0.5]]);
}
