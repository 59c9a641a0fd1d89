//! Baselines: what they read.

use super::*;
use crate::plan_case::{Lcg, PlanCase, Shape, decode_planner, planner};

#[test]
fn they_conform() {
    antefix_conformance::method::check_with(&AShape, &["block=32,sinks=4,window=40"]);
    antefix_conformance::method::check_with(&BlockTopK, &["block=32,keep=2", "block=32,keep=3"]);
    antefix_conformance::method::check_with(&RandomBlocks, &["block=32,keep=3"]);
}

#[test]
fn sinks_and_a_window_before_the_block_are_read() {
    let case = PlanCase::random(1, Shape(4, 2, 16), 200);
    let plans = case.plans(&planner(&AShape, "block=32,sinks=4,window=40"));
    for (pos, kept) in (0u32..).zip(case.kept(&plans, 3)) {
        let block = pos / 32 * 32;
        let want: Vec<u32> = (0..=pos).filter(|&k| k < 4 || k + 40 >= block).collect();
        assert_eq!(kept, want, "row {pos}");
    }
}

#[test]
fn block_means_choose_what_the_reference_chooses() {
    for (seed, shape, keep) in [
        (1, Shape(4, 4, 16), 3),
        (2, Shape(6, 2, 32), 2),
        (3, Shape(7, 1, 16), 5),
    ] {
        let case = PlanCase::random(seed, shape, 411);
        let group = shape.0 / shape.1;
        let plans = case.plans(&planner(&BlockTopK, &format!("block=32,keep={keep}")));
        for kv_head in 0..shape.1 {
            let kept = case.kept(&plans, kv_head * group);
            let keys = case.keys(kv_head);
            for (pos, kept) in kept.iter().enumerate() {
                let i = pos / 32;
                let scores: Vec<Vec<f64>> = (kv_head * group..(kv_head + 1) * group)
                    .map(|h| {
                        reference::block_scores(
                            &case.queries(h),
                            &keys,
                            32,
                            i,
                            f64::from(case.geometry.scale),
                        )
                    })
                    .collect();
                // The fast part sees the mean of the block up to its end, as far as the prompt goes, as the reference does.
                let want: Vec<u32> = match case.n.div_ceil(32) <= keep {
                    true => (0..=pos as u32).collect(),
                    false => reference::block_topk(&scores, i, keep)
                        .into_iter()
                        .flat_map(|b| b as u32 * 32..(b as u32 + 1) * 32)
                        .filter(|&k| k <= pos as u32)
                        .collect(),
                };
                assert_eq!(kept, &want, "{seed}, head {kv_head}, row {pos}");
            }
        }
    }
}

#[test]
fn scores_of_blocks_are_the_golden_ones() {
    let mut lcg = Lcg(7);
    let (q, k) = (lcg.rows(32, 8, 2.0), lcg.rows(32, 8, 2.0));
    let scores = reference::block_scores(&q, &k, 8, 2, 8f64.powf(-0.5));
    for (got, want) in scores.iter().zip([0.0948, 0.3449, 0.2307]) {
        assert!((got - want).abs() < 5e-5, "{scores:?}");
    }
}

#[test]
fn drawn_blocks_are_as_many_as_asked_and_differ_between_heads() {
    let case = PlanCase::random(1, Shape(4, 2, 16), 640);
    let plans = case.plans(&planner(&RandomBlocks, "block=32,keep=5,seed=3"));
    let (one, other) = (case.kept(&plans, 0), case.kept(&plans, 2));
    assert_ne!(one, other);
    for (pos, kept) in one.iter().enumerate() {
        let own = pos % 32 + 1;
        assert_eq!(kept.len(), own + (pos / 32).min(4) * 32, "row {pos}");
        assert_eq!(kept[0], 0);
    }
}

#[test]
fn quest_conforms() {
    antefix_conformance::method::check_with(
        &Quest,
        &[
            "least=40,share=0.01,dense_layers=0",
            "least=64,share=0.2,dense_layers=1",
        ],
    );
}

#[test]
fn bounds_of_pages_are_the_golden_ones_and_bound_every_key() {
    let mut lcg = Lcg(7);
    let (q, k) = (lcg.rows(32, 8, 2.0), lcg.rows(32, 8, 2.0));
    let want = [
        (8.5143, 3.6602),
        (7.7986, 3.0112),
        (9.1545, 6.3046),
        (10.1921, 5.1329),
    ];
    for (page, (bound, largest)) in k.chunks(8).zip(want) {
        let got = reference::page_bound(&q[31], page);
        let max = page
            .iter()
            .map(|k| reference::dot(&q[31], k))
            .fold(f64::NEG_INFINITY, f64::max);
        assert!(
            (got - bound).abs() < 6e-5 && (max - largest).abs() < 6e-5,
            "{got} {max}"
        );
    }
}

#[test]
fn drawn_tokens_read_the_pages_of_the_reference_whatever_the_step() {
    for (seed, shape, least) in [
        (1, Shape(4, 2, 16), 96),
        (2, Shape(3, 1, 32), 64),
        (3, Shape(2, 2, 16), 32),
    ] {
        let case = PlanCase::random_layers(seed, shape, 290, 2);
        let group = shape.0 / shape.1;
        let planner = decode_planner(&Quest, &format!("least={least},share=0.01,dense_layers=1"));
        for step in [1, 7, 40] {
            for planned in case.decode(&planner, 250, step) {
                if planned.layer == 0 {
                    assert!(planned.plan.is_dense());
                    continue;
                }
                for head in 0..shape.0 {
                    let keys = case.keys_of(1, head / group);
                    let rows = case.kept(std::slice::from_ref(&planned), head);
                    for (pos, got) in planned.queries.clone().zip(rows) {
                        let heads: Vec<Vec<f64>> = (head / group * group..(head / group + 1) * group)
                            .map(|h| {
                                case.queries_of(1, h)[pos as usize]
                                    .iter()
                                    .map(|x| x * f64::from(case.geometry.scale))
                                    .collect()
                            })
                            .collect();
                        let pages = reference::quest(&heads, &keys[..=pos as usize], 32, least / 32);
                        let want: Vec<u32> = pages
                            .iter()
                            .flat_map(|&p| p as u32 * 32..(p as u32 + 1) * 32)
                            .filter(|&k| k <= pos)
                            .collect();
                        assert_eq!(got, want, "seed {seed}, head {head}, row {pos}");
                    }
                }
            }
        }
    }
}
