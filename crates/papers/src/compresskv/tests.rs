//! compresskv: who votes, and how much each layer keeps.

use antefix_attention::method::{Chosen, Facts, Profiles, Program, RawChoice};

use super::*;
use crate::case::{Case, MADE_UP, Shape, kept};
use crate::heads::HeadProfile;
use crate::kv_baselines::reference::{snapkv, softmax};

#[test]
fn it_conforms() {
    antefix_conformance::method::check_profiled(
        &CompressKv,
        Some(MADE_UP),
        &["budget=16,window=4", "budget=40,layers=uniform,heads=1"],
    );
}

#[test]
fn the_best_heads_vote_and_ties_go_to_the_lower_one() {
    assert_eq!(best(&[0.1, 0.7, 0.7, 0.2], 3), [1, 2, 3]);
    assert_eq!(best(&[0.5, 0.1], 4), [0, 1]);
}

fn profile(eviction: Option<Vec<f32>>) -> String {
    let facts = Facts::example();
    let table = |f: &dyn Fn(usize, usize) -> f32| -> Vec<Vec<f32>> {
        (0..facts.layers.len())
            .map(|l| (0..facts.heads).map(|h| f(l, h)).collect())
            .collect()
    };
    let mut scores = vec![("semantic", table(&|l, h| ((l + h) % facts.heads) as f32))];
    scores.extend(eviction.map(|e| ("eviction", table(&|l, _| e[l]))));
    let profile = HeadProfile::example(&facts, scores);
    serde_json::to_string(&profile).expect("plain data")
}

/// The program under these settings on the example model, whose profile is `text`.
fn installed(text: &str, settings: &str) -> Result<Program, RigError> {
    let dir = tempfile::TempDir::new().expect("a folder for tests");
    std::fs::create_dir(dir.path().join(KIND)).expect("a folder for tests");
    std::fs::write(dir.path().join(KIND).join("default.json"), text).expect("a file for tests");
    let raw = RawChoice::parse(&format!("compresskv,{settings}")).expect("well written");
    let chosen = Chosen {
        method: &CompressKv,
        knobs: Knobs::new(&CARD, &raw.knobs).expect("in range"),
    };
    let profiles = Profiles::named_in(vec![dir.path().to_owned()]);
    Rig::assemble(&Facts::example(), &profiles, &[chosen])
}

#[test]
fn budgets_follow_the_profile() {
    // Layer 1 has a window and no limit; the others share three budgets by their errors.
    let told = |eviction| {
        format!(
            "{:?}",
            installed(&profile(eviction), "budget=132").expect("it goes")
        )
    };
    let program = told(Some(vec![1.0, 9.0, 2.0, 1.0]));
    let caps = format!("caps: [{}, {}, {}, {}]", 32 + 75, usize::MAX, 32 + 150, 32 + 75);
    assert!(program.contains(&caps), "{program}");
    let program = told(None);
    assert!(
        program.contains(&format!("caps: [132, {}, 132, 132]", usize::MAX)),
        "{program}"
    );
    assert!(program.contains("voters: [[3, 2, 1, 0]"), "{program}");
}

#[test]
fn a_profile_of_another_model_is_refused() {
    let error = installed(
        &profile(None).replace("\"layers\":4", "\"layers\":5"),
        "budget=64",
    )
    .expect_err("wrong shape");
    assert!(error.to_string().contains("compresskv"), "{error}");
    assert!(installed("{}", "budget=64").is_err());
}

/// Every layer of random cases under these settings, beside what `want(weights of all heads, layer, case)` says.
fn check(settings: &str, want: impl Fn(&[Vec<Vec<f64>>], usize, &Case) -> Vec<usize>) {
    let program = installed(&profile(None), settings).expect("it goes");
    let policy = program.policy().expect("it cuts caches");
    let shape = Shape {
        layers: 4,
        heads: 4,
        kv_heads: 2,
        rows: 77,
        queries: 8,
    };
    for seed in 0..8 {
        let case = Case::random(seed, shape);
        for layer in [0, 2, 3] {
            let weights: Vec<_> = (0..4).map(|h| softmax(&case.scores(layer, h))).collect();
            let want = want(&weights, layer, &case);
            let got = kept(policy.layer(&case.view(layer)), shape.rows, shape.kv_heads);
            assert_eq!(
                got,
                [want.clone(), want],
                "{settings}, seed {seed}, layer {layer}"
            );
        }
        let all: Vec<usize> = (0..shape.rows).collect();
        let got = kept(policy.layer(&case.view(1)), shape.rows, shape.kv_heads);
        assert_eq!(got, [all.clone(), all], "layer 1 has a window");
    }
}

#[test]
fn it_keeps_what_its_reference_keeps() {
    for (heads, kernel) in [(1, 5), (2, 5), (4, 7)] {
        check(
            &format!("budget=40,window=8,kernel={kernel},heads={heads}"),
            |weights, layer, _| {
                // Head h of layer l has score (l + h) mod 4.
                let mut order: Vec<usize> = (0..4).collect();
                order.sort_by_key(|h| std::cmp::Reverse((layer + h) % 4));
                let voters: Vec<_> = order[..heads].iter().map(|&h| weights[h].clone()).collect();
                reference::keep(&voters, 40, kernel)
            },
        );
    }
}

#[test]
fn with_all_heads_it_is_snapkv_with_one_set_for_the_layer() {
    check("budget=40,window=8,heads=4", |weights, _, _| {
        snapkv(weights, 40, 5, false)
    });
}

#[test]
fn only_the_voters_are_heard() {
    // Layer 0: head 3 votes alone, and what head 0 looks at makes no difference.
    check("budget=40,window=8,heads=1", |weights, layer, _| {
        let mut changed = weights.to_vec();
        changed[(4 - layer) % 4].reverse();
        reference::keep(&[changed[(7 - layer) % 4].clone()], 40, 5)
    });
}

#[test]
fn eviction_costs_the_same_however_large_values_are() {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut row = || -> Vec<f64> { (0..32).map(|_| rng.f64() * 2.0 - 1.0).collect() };
    let (cut, whole) = (row(), row());
    assert_eq!(reference::error(&whole, &whole), 0.0);
    let error = reference::error(&cut, &whole);
    for by in [0.25, 8.0, 1000.0] {
        let scaled = |x: &[f64]| -> Vec<f64> { x.iter().map(|x| x * by).collect() };
        let got = reference::error(&scaled(&cut), &scaled(&whole));
        assert!((got / error - 1.0).abs() < 1e-4, "{got} for {error}");
    }
}

#[test]
fn budgets_are_those_of_the_reference() {
    let mut rng = fastrand::Rng::with_seed(11);
    for _ in 0..300 {
        let layers = rng.usize(1..33);
        let drawn: Vec<f64> = (0..layers).map(|_| rng.f64().powi(3) + 1e-3).collect();
        let sum: f64 = drawn.iter().sum();
        let e: Vec<f64> = drawn.iter().map(|e| e / sum).collect();
        let mean = rng.usize(33..400);
        let want = reference::budgets(&e, mean as i64, LEAST as i64, 3 * mean as i64);
        let got: Vec<i64> = budget::allocate(&drawn, mean, LEAST, 3 * mean)
            .iter()
            .map(|&b| b as i64)
            .collect();
        assert_eq!(got, want, "{layers} layers, mean {mean}");
    }
}
