//! razor_attention: which heads retrieve, and what the others keep.

use super::*;
use crate::case::{Case, MADE_UP, Shape, kept};

#[test]
fn it_conforms() {
    antefix_conformance::method::check_profiled(
        &RazorAttention,
        Some(MADE_UP),
        &[
            "induction=0.3,echo=0,sinks=2,buffer=9,every=5",
            "induction=0,echo=0.5,buffer=16,fraction=0.5,every=1",
        ],
    );
}

#[test]
fn shares_are_rounded_and_ties_count() {
    // Layer 1 has a window and takes no part.
    let score = vec![vec![0.1, 0.9], vec![1.0, 1.0], vec![0.5, 0.5]];
    let full = [0, 2];
    assert_eq!(retrieval_heads(&score, &full, 0.25), [(0, 1)]);
    assert_eq!(
        retrieval_heads(&score, &full, 0.5),
        [(0, 1), (2, 0), (2, 1)],
        "both tie with the last"
    );
    assert_eq!(retrieval_heads(&score, &full, 0.01), [(0, 1)], "at least one");
    assert_eq!(retrieval_heads(&score, &full, 0.0), []);
    assert_eq!(retrieval_heads(&score, &full, 1.0).len(), 4);
}

fn razor(buffer: usize, fraction: f64) -> Razor {
    Razor {
        retrieval: Vec::new(),
        sinks: 4,
        buffer,
        fraction,
        fold: Fold::LnCount,
        every: None,
    }
}

#[test]
fn others_keep_sinks_and_a_buffer_that_grows_with_the_prompt() {
    let r = razor(100, 0.2);
    assert_eq!((r.recent(300), r.recent(1000)), (100, 200));
    assert_eq!(r.keep(105, 105), None, "the row between would be its own mean");
    let keep = r.keep(106, 106).expect("two rows between");
    assert_eq!((keep.len(), keep[3], keep[4]), (104, 3, 6));
    let keep = r.keep(1000, 1000).expect("cut");
    assert_eq!((keep.len(), keep[4], keep[203]), (204, 800, 999));
}

#[test]
fn it_keeps_what_its_reference_keeps() {
    for rows in [9, 13, 14, 15, 60, 131] {
        let shape = Shape {
            layers: 1,
            heads: 4,
            kv_heads: 2,
            rows,
            queries: 1,
        };
        let case = Case::random(2, shape);
        for fraction in [0.0, 0.2, 0.5] {
            let mut r = razor(9, fraction);
            r.retrieval = vec![vec![false, true]];
            let got = kept(r.layer(&case.view(0)), rows, 2);
            let drop = reference::dropped(rows, 4, 9, fraction);
            let want: Vec<usize> = (0..rows).filter(|j| !drop.contains(j)).collect();
            assert_eq!(got, [want, (0..rows).collect()], "{rows} rows, {fraction}");
        }
    }
}

#[test]
fn windows_of_linear_biases_are_those_of_the_published_table() {
    // The beginning and the end of the 32 windows that MindIE-LLM ships.
    let windows = reference::linear_bias_windows(32, 1e-5, 100.0);
    assert_eq!((&windows[..4], windows[31]), (&[105, 125, 148, 176][..], 22_652));
    assert!(windows.is_sorted());
    // 12 heads: the 8 of a power of two, then every second of 16.
    let (twelve, eight, sixteen) = (
        reference::linear_bias_windows(12, 1e-5, 20.0),
        reference::linear_bias_windows(8, 1e-5, 20.0),
        reference::linear_bias_windows(16, 1e-5, 20.0),
    );
    assert_eq!(twelve[..8], eight);
    assert_eq!(twelve[8..], [sixteen[0], sixteen[2], sixteen[4], sixteen[6]]);
    assert!(reference::linear_bias_windows(0, 1e-5, 20.0).is_empty());
}

/// Random rows of `dim` values.
fn rows(rng: &mut fastrand::Rng, n: usize, dim: usize) -> Vec<Vec<f64>> {
    (0..n)
        .map(|_| (0..dim).map(|_| rng.f64() * 4.0 - 2.0).collect())
        .collect()
}

#[test]
fn the_compensation_row_never_weighs_more_than_what_it_stands_for() {
    let mut rng = fastrand::Rng::with_seed(5);
    for _ in 0..200 {
        let (q, k) = (rows(&mut rng, 1, 6).remove(0), rows(&mut rng, 30, 6));
        let exp = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>().exp();
        let mean: Vec<f64> = (0..6)
            .map(|d| k.iter().map(|k| k[d]).sum::<f64>() / 30.0)
            .collect();
        assert!(30.0 * exp(&mean) <= k.iter().map(|k| exp(k)).sum::<f64>() * (1.0 + 1e-12));
    }
}

#[test]
fn equal_keys_lose_nothing() {
    let mut rng = fastrand::Rng::with_seed(6);
    let (q, mut k, v) = (
        rows(&mut rng, 1, 6).remove(0),
        rows(&mut rng, 20, 6),
        rows(&mut rng, 20, 6),
    );
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
    let whole = |k: &[Vec<f64>]| reference::attention(&q, k, &v, 0.4, 0..0);
    // One dropped row is its own mean.
    assert!(near(&reference::attention(&q, &k, &v, 0.4, 7..8), &whole(&k)));
    assert!(!near(&reference::attention(&q, &k, &v, 0.4, 4..15), &whole(&k)));
    for j in 5..15 {
        k[j] = k[4].clone();
    }
    assert!(near(&reference::attention(&q, &k, &v, 0.4, 4..15), &whole(&k)));
}

#[test]
fn a_hand_written_induction_head_scores_one_and_nothing_else() {
    let (segment, repeats) = (5, 4);
    let n = 1 + segment * repeats;
    // Every row looks at what followed the last copy of its token, where there is one.
    let induction: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            (0..n)
                .map(|j| f64::from(u8::from(i > segment && j == i - segment + 1)))
                .collect()
        })
        .collect();
    assert_eq!(reference::scores(&induction, segment, repeats), (0.0, 1.0));
    let echo: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            (0..n)
                .map(|j| f64::from(u8::from(i > segment && j == i - segment)))
                .collect()
        })
        .collect();
    assert_eq!(reference::scores(&echo, segment, repeats), (1.0, 0.0));
    let even: Vec<Vec<f64>> = (0..n).map(|_| vec![1.0 / n as f64; n]).collect();
    let (e, i) = reference::scores(&even, segment, repeats);
    assert!((e - 2.0 / n as f64).abs() < 1e-12 && (i - e).abs() < 1e-12);
}
