//! hip_attention and hip_decode: the golden search, what the specification asks of any search, and the fast parts against the reference.

use std::sync::Arc;

use antefix_attention::method::{Cover, DecodePlanner};

use super::reference::{Round, Settings, Told, looked_at};
use super::*;
use crate::plan_case::{Lcg, PlanCase, Shape, cases, decode_planner, planner};

#[test]
fn it_conforms() {
    antefix_conformance::method::check_with(
        &HipAttention,
        &[
            "block=16,top_k=12,unit_keys=4,query_stride=3,sinks=4,window=8,dense_layers=0",
            "block=32,top_k=32,sinks=0,window=0,dense_layers=1,unit=kv_group",
            "block=64,top_k=40,unit_keys=8,key_stride=2,sample=all,window=40,dense_layers=0",
        ],
    );
    antefix_conformance::method::check_with(
        &HipDecode,
        &[
            "least=24,share=0.01,refresh=3,unit_keys=2,sinks=4,window=8,dense_layers=0",
            "least=40,share=0.1,refresh=8,unit_keys=16,sinks=0,window=0,dense_layers=1,unit=query_head",
            "least=90,share=0.01,refresh=1,window=16,dense_layers=0",
        ],
    );
}

const PAIRS: Settings = Settings {
    unit_keys: 2,
    key_stride: 1,
    sample: Sample::Center,
};

/// Keys `[64][8]` and queries `[4][8]`.
fn golden() -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let mut lcg = Lcg(3);
    let k = lcg.rows(64, 8, 2.0);
    (lcg.rows(4, 8, 2.0), k)
}

#[test]
fn the_reference_searches_as_the_golden_search_does() {
    // Not scaled.
    let (q, k) = golden();
    let told = reference::search(&q, &k, 0..64, 8, &PAIRS);
    let want: [(&[f64], &[usize]); 3] = [
        (
            &[3.9543, 4.7941, 5.7045, 5.1867, 1.7733, 3.2161, 6.884, 6.9002],
            &[8, 12, 24, 28],
        ),
        (
            &[6.8071, 5.6439, 2.6112, 3.0525, 5.7978, 4.2238, 6.619, 5.5265],
            &[8, 10, 24, 28],
        ),
        (&[], &[9, 25, 28, 29]),
    ];
    assert_eq!(told.rounds.len(), 3);
    for (round, (scores, kept)) in told.rounds.iter().zip(want) {
        assert_eq!(round.kept, kept);
        for (got, want) in round.scores.iter().zip(scores) {
            assert!((got - want).abs() < 6e-5, "{got} for {want}");
        }
    }
    assert_eq!(told.keys, [18, 19, 50, 51, 56, 57, 58, 59]);
    // On keys that do not resemble their neighbours it finds none of the best.
    let all = Settings {
        sample: Sample::All,
        ..PAIRS
    };
    let best = reference::search(&q, &k, 0..64, 8, &all).keys;
    assert_eq!(best, [6, 7, 8, 9, 52, 53, 60, 61]);
}

fn hip(top_k: usize, unit: Unit) -> Hip {
    Hip {
        top_k,
        block: 64,
        query_stride: 1,
        sinks: 0,
        window: 0,
        dense_layers: 0,
        unit,
        search: Search {
            unit_keys: 2,
            key_stride: 1,
            sample: Sample::Center,
        },
    }
}

fn plan_of(case: &PlanCase, hip: Hip) -> Vec<Vec<u32>> {
    let planner: Arc<dyn Planner> = Arc::new(hip);
    case.kept(&case.plans(&planner), 0)
}

#[test]
fn a_block_finds_what_the_golden_search_finds() {
    let (own, keys) = golden();
    let mut q = vec![vec![0.0; 8]; 64];
    q.extend(own);
    let mut k = keys;
    k.extend(vec![vec![0.0; 8]; 4]);
    let narrow = |rows: &[Vec<f64>]| -> Vec<f32> { rows.iter().flatten().map(|&x| x as f32).collect() };
    let case = PlanCase::new(Shape(1, 1, 8), &narrow(&q), &narrow(&k));
    let kept = plan_of(&case, hip(8, Unit::QueryHead));
    assert_eq!(kept[64], [18, 19, 50, 51, 56, 57, 58, 59, 64]);
    assert_eq!(kept[67], [18, 19, 50, 51, 56, 57, 58, 59, 64, 65, 66, 67]);
}

/// Keys whose products with one query are `-(j - at)^2`.
fn peak(n: usize, at: usize) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let at = at as f64;
    let key = |j: usize| vec![1.0, j as f64, (j * j) as f64];
    (vec![vec![-at * at, 2.0 * at, -1.0]], (0..n).map(key).collect())
}

#[test]
fn a_peak_of_scores_is_found_wherever_it_is() {
    for (n, count) in [(64, 2), (74, 2), (64, 4), (75, 6), (200, 8), (201, 16)] {
        for at in 0..n {
            let (q, k) = peak(n, at);
            let keys = reference::search(&q, &k, 0..n, count, &PAIRS).keys;
            // One run alone may end beside it, where both halves stand equally far from it.
            let off = keys.iter().map(|k| k.abs_diff(at)).min().expect("some are found");
            assert!(
                off == 0 || count == 2 && off <= 2,
                "{n} keys, {count} of them, peak at {at}: {keys:?}"
            );
        }
    }
}

#[test]
fn one_run_that_looks_at_every_key_ends_at_the_largest_score() {
    let mut lcg = Lcg(5);
    let (q, k) = (lcg.rows(3, 8, 1.0), lcg.rows(301, 8, 1.0));
    let how = Settings {
        sample: Sample::All,
        ..PAIRS
    };
    let keys = reference::search(&q, &k, 7..301, 2, &how).keys;
    let score = |j: usize| {
        q.iter()
            .map(|q| crate::sparse_baselines::reference::dot(q, &k[j]))
            .fold(f64::NEG_INFINITY, f64::max)
    };
    let best = (7..301)
        .max_by(|&a, &b| score(a).total_cmp(&score(b)))
        .expect("there are keys");
    assert!(keys.contains(&best) && keys.len() == 2, "{keys:?} without {best}");
}

#[test]
fn a_search_costs_its_rounds_and_a_larger_one_reads_everything() {
    let mut lcg = Lcg(6);
    let (q, k) = (lcg.rows(5, 8, 1.0), lcg.rows(1003, 8, 1.0));
    for (unit_keys, key_stride, count) in [(2, 1, 64), (8, 3, 100), (5, 2, 7), (32, 32, 256)] {
        let how = Settings {
            unit_keys,
            key_stride,
            sample: Sample::Center,
        };
        let told = reference::search(&q, &k, 3..1003, count, &how);
        let (units, beams) = (1000usize.div_ceil(unit_keys), count.div_ceil(unit_keys));
        // Odd runs have halves of two sizes.
        let rounds = (units / beams).ilog2()..=units.div_ceil(beams).next_power_of_two().ilog2();
        assert!(
            rounds.contains(&(told.rounds.len() as u32)),
            "{} rounds",
            told.rounds.len()
        );
        let most = 2 * beams * q.len() * unit_keys.div_ceil(key_stride);
        let fits = |round: &Round| round.kept.len() == beams && round.products <= most;
        assert!(told.rounds.iter().all(fits));
        assert!(told.keys.windows(2).all(|w| w[0] < w[1]));
        assert!(told.keys[0] >= 3 && told.keys[told.keys.len() - 1] < 1003);
    }
    let Told { rounds, keys } = reference::search(&q, &k, 3..1003, 1000, &PAIRS);
    assert!(rounds.is_empty() && keys.len() == 1000);
}

#[test]
fn the_rows_looked_at_are_the_last_of_each_stride() {
    assert_eq!(looked_at(8, 2), [1, 3, 5, 7]);
    assert_eq!(looked_at(7, 3), [2, 5, 6]);
    assert_eq!(looked_at(3, 64), [2]);
    assert_eq!(looked_at(1, 1), [0]);
}

const SAMPLES: [Sample; 4] = [Sample::Center, Sample::First, Sample::Last, Sample::All];
const GROUPS: [usize; 4] = [1, 3, 4, 7];

/// 1 to 4096, small numbers as often as large ones.
fn length(rng: &mut fastrand::Rng) -> usize {
    ((rng.f64() * 4097f64.ln()).exp() as usize).clamp(1, 4096)
}

/// Small numbers more often than large ones, `most` among them.
fn up_to(rng: &mut fastrand::Rng, most: usize) -> usize {
    let bits = rng.u32(0..=most.ilog2());
    rng.usize(1..=(1 << bits).min(most))
}

fn search_of(rng: &mut fastrand::Rng) -> Search {
    Search {
        unit_keys: up_to(rng, 64),
        key_stride: up_to(rng, 8),
        sample: SAMPLES[rng.usize(0..4)],
    }
}

/// Scaled queries of the rows of these heads, and the keys that they share.
type Rows = (Vec<Vec<Vec<f64>>>, Vec<Vec<f64>>);

fn rows_of(case: &PlanCase, layer: usize, heads: std::ops::Range<usize>) -> Rows {
    let scale = f64::from(case.geometry.scale);
    let kv_head = heads.start / (case.geometry.heads / case.geometry.kv_heads);
    let scaled = |q: Vec<f64>| q.into_iter().map(|x| x * scale).collect();
    let head = |h: usize| case.queries_of(layer, h).into_iter().map(scaled).collect();
    (heads.map(head).collect(), case.keys_of(layer, kv_head))
}

fn heads_of(unit: Unit, i: usize, group: usize) -> std::ops::Range<usize> {
    match unit {
        Unit::QueryHead => i..i + 1,
        Unit::KvGroup => i * group..(i + 1) * group,
    }
}

/// The keys that the queries `q` find before `end`, with the first ones and those from there to `to`.
fn wanted(
    q: &[Vec<f64>],
    k: &[Vec<f64>],
    search: &Search,
    sinks: usize,
    (end, to): (usize, usize),
    count: usize,
) -> Vec<u32> {
    let how = Settings {
        unit_keys: search.unit_keys,
        key_stride: search.key_stride,
        sample: search.sample,
    };
    let sinks = sinks.div_ceil(search.unit_keys) * search.unit_keys;
    let found = reference::search(q, k, sinks.min(end)..end, count, &how).keys;
    (0..sinks).chain(found).chain(end..to).map(|k| k as u32).collect()
}

/// `ANTEFIX_CASES=2000 cargo test --release -p antefix-papers hip_attention` runs the long version.
#[test]
fn blocks_read_what_the_reference_finds() {
    let mut rng = fastrand::Rng::with_seed(11);
    for case_no in 0..cases(40) {
        let (group, kv_heads, n) = (GROUPS[case_no % 4], rng.usize(1..3), length(&mut rng));
        let hip = Hip {
            top_k: up_to(&mut rng, 512),
            block: [16, 32, 64, 128, 256][rng.usize(0..5)],
            query_stride: up_to(&mut rng, 64),
            sinks: rng.usize(0..40),
            window: rng.usize(0..300),
            dense_layers: 0,
            unit: [Unit::QueryHead, Unit::KvGroup][rng.usize(0..2)],
            search: search_of(&mut rng),
        };
        let told = format!("case {case_no}, {n} tokens, groups of {group}: {hip:?}");
        let case = PlanCase::exact_layers(case_no as u64, Shape(group * kv_heads, kv_heads, 16), n, 1);
        let (block, unit, search) = (hip.block, hip.unit, hip.search);
        let (top_k, stride, sinks, window) = (hip.top_k, hip.query_stride, hip.sinks, hip.window);
        let planner: Arc<dyn Planner> = Arc::new(hip);
        let plans = case.plans(&planner);
        assert_eq!(plans.iter().map(|p| p.queries.len()).sum::<usize>(), n, "{told}");
        // Long ones by one unit: the reference is slow.
        let units = plans[0].plan.units.len();
        let units = if n > 1000 {
            vec![rng.usize(0..units)]
        } else {
            (0..units).collect()
        };
        for i in units {
            let (q, k) = rows_of(&case, 0, heads_of(unit, i, group));
            for planned in &plans {
                let queries = planned.queries.clone();
                let starts = (queries.start as usize..queries.end as usize).step_by(block);
                let sets: Vec<Vec<u32>> = starts
                    .map(|start| {
                        let rows = looked_at((queries.end as usize - start).min(block), stride);
                        let q: Vec<Vec<f64>> = q
                            .iter()
                            .flat_map(|q| rows.iter().map(|row| q[start + row].clone()))
                            .collect();
                        wanted(
                            &q,
                            &k,
                            &search,
                            sinks,
                            (start.saturating_sub(window), start),
                            top_k,
                        )
                    })
                    .collect();
                let want = Cover::from_sets(block as u32, queries, &sets);
                assert!(
                    planned.plan.units[i] == want,
                    "{told}: unit {i} of {:?}",
                    planned.queries
                );
            }
        }
    }
}

/// The long version as above.
#[test]
fn drawn_tokens_read_what_the_reference_finds() {
    let mut rng = fastrand::Rng::with_seed(12);
    for case_no in 0..cases(40) {
        let (group, kv_heads, n) = (GROUPS[case_no % 4], rng.usize(1..3), length(&mut rng));
        let (least, share) = (up_to(&mut rng, 512), [1e-6, 0.1][rng.usize(0..2)]);
        let (refresh, sinks, window) = (up_to(&mut rng, 16), rng.usize(0..40), rng.usize(0..200));
        let (unit, search) = (["query_head", "kv_group"][rng.usize(0..2)], search_of(&mut rng));
        let sample =
            ["center", "first", "last", "all"][SAMPLES.iter().position(|&s| s == search.sample).unwrap()];
        let settings = format!(
            "least={least},share={share},refresh={refresh},sinks={sinks},window={window},dense_layers=1,unit={unit},\
             unit_keys={},key_stride={},sample={sample}",
            search.unit_keys, search.key_stride
        );
        let told = format!("case {case_no}, {n} tokens, groups of {group}: {settings}");
        let case = PlanCase::exact_layers(case_no as u64, Shape(group * kv_heads, kv_heads, 16), n, 2);
        let planner = decode_planner(&HipDecode, &settings);
        let (prompt, step) = (n - rng.usize(1..50).min(n), rng.usize(1..12));
        let mut rows = 0;
        for planned in case.decode(&planner, prompt, step) {
            if planned.layer == 0 {
                assert!(planned.plan.is_dense(), "{told}");
                continue;
            }
            rows += planned.queries.len();
            for (i, cover) in planned.plan.units.iter().enumerate() {
                let (q, k) = rows_of(&case, 1, heads_of(planned.plan.unit, i, group));
                let read = |pos: u32| -> Vec<u32> {
                    let pos = pos as usize;
                    let at = pos - (pos - prompt) % refresh;
                    let budget = least.max((share * (at + 1) as f64).ceil() as usize);
                    if budget > at {
                        return (0..pos as u32).collect();
                    }
                    let whole = sinks.div_ceil(search.unit_keys) * search.unit_keys;
                    let count = budget.saturating_sub(whole + window).max(search.unit_keys);
                    let q: Vec<Vec<f64>> = q.iter().map(|q| q[at].clone()).collect();
                    wanted(&q, &k, &search, sinks, (at.saturating_sub(window), pos), count)
                };
                let sets: Vec<Vec<u32>> = planned.queries.clone().map(read).collect();
                let want = Cover::from_sets(1, planned.queries.clone(), &sets);
                assert!(*cover == want, "{told}: unit {i} of {:?}", planned.queries);
            }
        }
        assert_eq!(rows, n - prompt, "{told}");
    }
}

/// Settings under which a token of a few hundred reads little.
const SHORT: &str = "least=48,share=0.01,sinks=4,window=16,unit_keys=4,dense_layers=0";

fn drawn(case: &PlanCase, planner: &Arc<dyn DecodePlanner>, prompt: usize) -> Vec<Vec<u32>> {
    case.kept(&case.decode(planner, prompt, 1), 0)
}

#[test]
fn what_was_found_holds_until_the_next_search() {
    let case = PlanCase::random(3, Shape(3, 1, 16), 400);
    let rare = drawn(
        &case,
        &decode_planner(&HipDecode, &format!("{SHORT},refresh=6")),
        370,
    );
    let always = drawn(
        &case,
        &decode_planner(&HipDecode, &format!("{SHORT},refresh=1")),
        370,
    );
    let mut changes = 0;
    for (i, (rare_keys, always_keys)) in rare.iter().zip(&always).enumerate() {
        // Everything from the window of the last search on is read.
        let from = 370 + i / 6 * 6 - 16;
        let before =
            |keys: &[u32]| -> Vec<u32> { keys.iter().copied().filter(|&k| (k as usize) < from).collect() };
        assert!((from..=370 + i).all(|k| rare_keys.contains(&(k as u32))));
        assert_eq!(before(rare_keys), before(&rare[i / 6 * 6]), "row {i}");
        if i % 6 == 0 {
            assert_eq!(rare_keys, always_keys, "row {i}");
        }
        changes += usize::from(before(always_keys) != before(&always[i / 6 * 6]));
    }
    assert!(changes > 0, "no token looked elsewhere than the one before it");
}

#[test]
fn a_step_that_is_taken_back_is_planned_as_before() {
    let case = PlanCase::random_layers(4, Shape(4, 2, 16), 400, 2);
    let planner = decode_planner(&HipDecode, &format!("{SHORT},refresh=5"));
    let once = case.decode_steps(&planner, 300, [300..303, 303..311, 311..330]);
    let again = case.decode_steps(
        &planner,
        300,
        [300..303, 303..311, 303..311, 303..304, 304..311, 311..330],
    );
    assert_eq!(once[..2], again[..2]);
    assert_eq!(once[2..4], again[2..4]);
    assert_eq!(once[2..4], again[4..6]);
    assert_eq!(once[4..], again[10..]);
    let layer = |plans: &[antefix_attention::sparse::Planned]| -> Vec<Vec<u32>> {
        let of: Vec<_> = plans.iter().filter(|p| p.layer == 1).cloned().collect();
        case.kept(&of, 0)
    };
    assert_eq!(layer(&again[6..10]), layer(&once[2..4]));
}

#[test]
fn a_lone_key_is_missed_where_a_run_of_them_is_found() {
    let n = 512;
    let find = |planted: std::ops::Range<usize>| {
        let mut rng = fastrand::Rng::with_seed(8);
        let mut small = |n: usize| -> Vec<f32> { (0..n * 16).map(|_| rng.f32() * 0.2 - 0.1).collect() };
        let (mut q, mut k) = (small(n), small(n));
        q[448 * 16..].chunks_exact_mut(16).for_each(|q| q[3] = 9.0);
        // The run that it stands in looks the other way.
        (140..168).for_each(|j| k[j * 16 + 3] = if planted.contains(&j) { 9.0 } else { -1.0 });
        let case = PlanCase::new(Shape(1, 1, 16), &q, &k);
        let kept = plan_of(&case, hip(32, Unit::KvGroup));
        planted.filter(|&j| kept[500].contains(&(j as u32))).count()
    };
    // Sixteen runs of 28 keys, of which the 7th, 8th, 21st and 22nd are looked at first.
    assert_eq!(find(152..153), 0);
    assert_eq!(find(142..154), 12);
}

#[test]
fn short_prompts_and_first_layers_are_dense() {
    let case = PlanCase::random(5, Shape(2, 1, 16), 300);
    let dense = |settings: &str| {
        case.plans(&planner(&HipAttention, settings))
            .iter()
            .all(|p| p.plan.is_dense())
    };
    assert!(dense("dense_layers=0"));
    assert!(!dense("dense_layers=0,top_k=32,window=32"));
    assert!(dense("dense_layers=1,top_k=32,window=32"));
}
