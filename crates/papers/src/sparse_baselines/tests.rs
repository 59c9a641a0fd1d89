//! Baselines: what they read.

use std::sync::Arc;

use antefix_attention::method::{Planner, Unit};

use super::*;
use crate::plan_case::{Lcg, PlanCase, Shape, cases, decode_planner, planner};

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
fn a_shape_decode_conforms() {
    antefix_conformance::method::check_with(
        &AShapeDecode,
        &[
            "least=40,share=0.01,dense_layers=0",
            "least=9,share=0.1,sinks=20,dense_layers=1",
        ],
    );
}

#[test]
fn drawn_tokens_read_the_ends_within_their_budget() {
    for case_no in 0..cases(24) {
        let mut rng = fastrand::Rng::with_seed(case_no as u64);
        let (n, group) = (rng.usize(1..4097), [1, 3, 4, 7][case_no % 4]);
        let (least, sinks) = (rng.usize(1..200), rng.usize(0..64));
        let case = PlanCase::random_layers(case_no as u64, Shape(group, 1, 16), n, 2);
        let settings = format!("least={least},share=0.05,sinks={sinks},dense_layers=1");
        let (prompt, step) = (n - rng.usize(1..40).min(n), rng.usize(1..9));
        for planned in case.decode(&decode_planner(&AShapeDecode, &settings), prompt, step) {
            let rows = case.kept(std::slice::from_ref(&planned), 0);
            for (pos, got) in planned.queries.clone().zip(rows) {
                let keys = pos as usize + 1;
                let budget = least.max((0.05 * keys as f64).ceil() as usize).min(keys);
                if planned.layer == 0 || budget == keys {
                    assert_eq!(got.len(), keys, "{settings}, row {pos} of {n}");
                    continue;
                }
                // The token's own key is read even where sinks take the whole budget.
                let last = (budget - sinks.min(budget)).max(1);
                let want: Vec<u32> = (0..keys)
                    .filter(|&k| k < sinks.min(budget) || k >= keys - last)
                    .map(|k| k as u32)
                    .collect();
                assert_eq!(got, want, "{settings}, row {pos} of {n}");
            }
        }
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

#[test]
fn minference_conforms() {
    antefix_conformance::method::check_with(
        &MInference,
        &[
            "vertical=30,slash=100,block=32,chunk=2,rows=16",
            "vertical=60,slash=200,share=0.3,block=32,chunk=4,unit=kv_group",
        ],
    );
}

/// Golden matrices: 32 rows, one head.
fn golden() -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let mut lcg = Lcg(7);
    (lcg.rows(32, 8, 2.0), lcg.rows(32, 8, 2.0))
}

#[test]
fn lines_are_the_golden_ones() {
    let (q, k) = golden();
    let (columns, distances) = reference::lines(&reference::weights(&q[24..], &k, 8f64.powf(-0.5)));
    let six = |sums: &[f64]| {
        let mut best = reference::ranked(sums);
        best.truncate(6);
        best.sort_unstable();
        best
    };
    assert_eq!(six(&columns), [5, 10, 12, 14, 24, 26]);
    assert_eq!(six(&distances), [4, 11, 12, 15, 17, 20]);
}

/// What the rows of `case` read in stretches of `grain` rows, by `keys(from, to, start)`: the keys that the block at `start` of the stretch
/// `from..to` may read.
fn by_stretch(
    case: &PlanCase,
    (grain, block): (usize, usize),
    keys: impl Fn(usize, usize, usize) -> Vec<bool>,
) -> Vec<Vec<u32>> {
    let mut out = Vec::new();
    for from in (0..case.n).step_by(grain) {
        let to = (from + grain).min(case.n);
        for start in (from..to).step_by(block) {
            let may = keys(from, to, start);
            out.extend((start..(start + block).min(to)).map(|pos| {
                let read = |&k: &usize| k >= start || may[k];
                (0..=pos).filter(read).map(|k| k as u32).collect::<Vec<_>>()
            }));
        }
    }
    out
}

#[test]
fn minference_reads_the_lines_of_its_reference() {
    for (seed, shape, share, unit) in [
        (1, Shape(4, 2, 16), 0.0, Unit::QueryHead),
        (2, Shape(3, 1, 32), 0.4, Unit::KvGroup),
        (3, Shape(2, 2, 16), 0.6, Unit::QueryHead),
    ] {
        let case = PlanCase::random(seed, shape, 701);
        let lines = || minference::Lines {
            vertical: 80,
            slash: 160,
            share,
            block: 32,
            rows: 40,
            chunk: 4,
            unit,
        };
        let plans = case.plans(&(Arc::new(lines()) as Arc<dyn Planner>));
        for head in 0..shape.0 {
            let group = shape.0 / shape.1;
            let heads = match unit {
                Unit::QueryHead => head..head + 1,
                Unit::KvGroup => head / group * group..(head / group + 1) * group,
            };
            let k = case.keys(head / group);
            let want = by_stretch(&case, (128, 32), |from, to, start| {
                let (vertical, slash) = lines().lines(to);
                let mut weights = Vec::new();
                for head in heads.clone() {
                    let rows = to - 40.min(to - from)..to;
                    weights.extend(reference::weights(
                        &case.queries(head)[rows],
                        &k[..to],
                        f64::from(case.geometry.scale),
                    ));
                }
                // The longest row stands last.
                weights.sort_by_key(Vec::len);
                let (mut columns, mut distances) = reference::lines(&weights);
                columns[..30].fill(f64::INFINITY);
                distances[..100].fill(f64::INFINITY);
                let best = |sums: &[f64], count| -> Vec<usize> {
                    reference::ranked(sums).into_iter().take(count).collect()
                };
                let mut may = reference::slash_keys(&best(&distances, slash), to, start, 32);
                best(&columns, vertical).into_iter().for_each(|c| may[c] = true);
                may
            });
            let kept = case.kept(&plans, head);
            for (row, (got, want)) in kept.iter().zip(&want).enumerate() {
                assert_eq!(got, want, "seed {seed}, head {head}, row {row}");
            }
            assert!(kept[700].len() < 701, "some keys are left out");
        }
    }
}

#[test]
fn lines_are_scaled_to_the_prompt() {
    let lines = minference::Lines {
        vertical: 1000,
        slash: 6096,
        share: 0.125,
        block: 64,
        rows: 64,
        chunk: 16,
        unit: Unit::QueryHead,
    };
    assert_eq!(lines.lines(131_072), (1000, 6096));
    assert_eq!(lines.lines(8192), (144, 879));
    assert_eq!(lines.lines(600), (30, 64));
    assert_eq!(lines.lines(20), (20, 20));
    let whole = minference::Lines { share: 0.0, ..lines };
    assert_eq!(whole.lines(8192), (1000, 6096));
}

#[test]
fn xattention_conforms() {
    antefix_conformance::method::check_with(
        &XAttention,
        &[
            "tau=0.5,stride=4,block=32,chunk=1",
            "tau=0.7,stride=16,block=32,chunk=3,unit=kv_group",
        ],
    );
}

#[test]
fn antidiagonals_are_the_golden_ones() {
    let (q, k) = golden();
    let sums = reference::antidiagonals(&q, &k, 8, 4, 8f64.powf(-0.5));
    let want: [&[f64]; 4] = [
        &[2.0],
        &[0.8156, 1.1844],
        &[0.5658, 0.8802, 0.5539],
        &[0.509, 0.7141, 0.4227, 0.3541],
    ];
    for (got, want) in sums.iter().zip(want) {
        assert!(got.len() == want.len(), "{got:?}");
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 6e-5), "{got:?}");
    }
    let kept = |tau| -> Vec<Vec<usize>> { sums.iter().map(|s| reference::xattention(s, tau)).collect() };
    assert_eq!(kept(0.55), [vec![0], vec![0, 1], vec![0, 2], vec![0, 1, 3]]);
    assert_eq!(kept(0.6), [vec![0], vec![0, 1], vec![0, 1, 2], vec![0, 1, 3]]);
}

#[test]
fn xattention_reads_the_blocks_of_its_reference_whatever_is_planned_together() {
    for (seed, shape, stride, tau, unit) in [
        (1, Shape(4, 2, 16), 8, 0.6, "query_head"),
        (2, Shape(3, 1, 32), 16, 0.8, "kv_group"),
        (3, Shape(2, 2, 16), 4, 0.4, "query_head"),
        (4, Shape(7, 1, 16), 32, 0.7, "kv_group"),
    ] {
        let case = PlanCase::random(seed, shape, 459);
        let group = shape.0 / shape.1;
        for chunk in [1, 4] {
            let settings = format!("stride={stride},tau={tau},block=32,unit={unit},chunk={chunk}");
            let plans = case.plans(&planner(&XAttention, &settings));
            for head in 0..shape.0 {
                let heads = match unit {
                    "query_head" => head..head + 1,
                    _ => head / group * group..(head / group + 1) * group,
                };
                let each: Vec<Vec<Vec<f64>>> = heads
                    .map(|h| {
                        let (q, k) = (case.queries(h), case.keys(head / group));
                        reference::antidiagonals(&q, &k, 32, stride, f64::from(case.geometry.scale))
                    })
                    .collect();
                let want = by_stretch(&case, (32, 32), |_, _, start| {
                    let i = start / 32;
                    let sums: Vec<f64> = (0..=i).map(|b| each.iter().map(|s| s[i][b]).sum()).collect();
                    let blocks = reference::xattention(&sums, tau);
                    (0..case.n).map(|k| blocks.contains(&(k / 32))).collect()
                });
                let kept = case.kept(&plans, head);
                for (row, (got, want)) in kept.iter().zip(&want).enumerate() {
                    assert_eq!(got, want, "seed {seed}, chunk {chunk}, head {head}, row {row}");
                }
            }
        }
    }
}

#[test]
fn oracle_topk_conforms() {
    antefix_conformance::method::check_with(
        &OracleTopK,
        &[
            "block=32,share=0.1,least=40",
            "block=32,share=0.2,least=70,of=blocks,unit=kv_group",
            "block=32,gamma=0.8",
        ],
    );
}

/// Sums of the weights of the rows of `heads` from `start` to `end`, by key.
fn mass(case: &PlanCase, heads: std::ops::Range<usize>, (start, end): (usize, usize)) -> Vec<f64> {
    let group = case.geometry.heads / case.geometry.kv_heads;
    let mut mass = vec![0.0; end];
    for head in heads {
        let (q, k) = (case.queries(head), case.keys(head / group));
        let weights = reference::weights(&q[start..end], &k[..end], f64::from(case.geometry.scale));
        let (columns, _) = reference::lines(&weights);
        mass.iter_mut().zip(columns).for_each(|(sum, c)| *sum += c);
    }
    mass
}

#[test]
fn the_oracle_reads_the_keys_of_the_largest_weights() {
    for (seed, of, gamma, unit) in [
        (1, "keys", 0.0, "query_head"),
        (2, "blocks", 0.0, "kv_group"),
        (3, "keys", 0.7, "kv_group"),
        (4, "blocks", 0.5, "query_head"),
    ] {
        let case = PlanCase::random(seed, Shape(6, 2, 16), 339);
        let settings = format!("block=32,share=0.2,least=80,of={of},gamma={gamma},unit={unit}");
        let plans = case.plans(&planner(&OracleTopK, &settings));
        for head in [0, 4] {
            let heads = match unit {
                "query_head" => head..head + 1,
                _ => head / 3 * 3..(head / 3 + 1) * 3,
            };
            let want = by_stretch(&case, (32, 32), |_, end, start| {
                let size = if of == "keys" { 1 } else { 32 };
                let all = mass(&case, heads.clone(), (start, end));
                let (count, enough) = match gamma {
                    0.0 => {
                        let budget = 80.max((0.2 * end as f64).ceil() as usize).min(end);
                        (budget.saturating_sub(end - start).div_ceil(size), f64::INFINITY)
                    }
                    gamma => {
                        let total = ((end - start) * heads.len()) as f64;
                        (end, gamma * total - all[start..].iter().sum::<f64>())
                    }
                };
                let chosen = reference::oracle(&all[..start], size, count, enough);
                (0..case.n).map(|k| chosen.contains(&(k / size))).collect()
            });
            for (row, (got, want)) in case.kept(&plans, head).iter().zip(&want).enumerate() {
                assert_eq!(got, want, "seed {seed}, head {head}, row {row}");
            }
        }
    }
}

#[test]
fn nobody_finds_more_than_the_oracle_in_as_many_blocks() {
    let case = PlanCase::random(5, Shape(4, 2, 16), 640);
    let found = |plans: &[antefix_attention::sparse::Planned]| -> f64 {
        let of = |head: usize| -> f64 {
            let (q, k) = (case.queries(head), case.keys(head / 2));
            let weights = reference::weights(&q, &k, f64::from(case.geometry.scale));
            let kept = case.kept(plans, head);
            let row = |(kept, w): (&Vec<u32>, &Vec<f64>)| kept.iter().map(|&k| w[k as usize]).sum::<f64>();
            kept.iter().zip(&weights).map(row).sum()
        };
        (0..4).map(of).sum::<f64>() / (4 * case.n) as f64
    };
    let other = |method, settings| found(&case.plans(&planner(method, settings)));
    // Six blocks with the block's own; the last block is full, so that counts agree.
    let oracle = other(
        &OracleTopK,
        "block=32,share=0.001,least=192,of=blocks,unit=kv_group",
    );
    let means = other(&BlockTopK, "block=32,keep=6");
    let lots = other(&RandomBlocks, "block=32,keep=6,seed=1");
    assert!(oracle >= means && oracle > lots, "{oracle}, {means}, {lots}");
}
