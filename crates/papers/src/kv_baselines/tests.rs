//! The policies against their references on random layers.

use std::sync::Arc;

use antefix_attention::method::{
    CachePolicy, Chosen, Facts, Knobs, LayerFacts, Method, Profiles, RawChoice, Rig,
};

use super::reference::{h2o, pyramid, snapkv, softmax};
use super::{h2o::H2o, pyramidkv::PyramidKv, snapkv::SnapKv};
use crate::case::{Case, Shape, kept};

const SHAPES: [Shape; 4] = [
    Shape {
        layers: 1,
        heads: 4,
        kv_heads: 2,
        rows: 61,
        queries: 8,
    },
    Shape {
        layers: 1,
        heads: 3,
        kv_heads: 3,
        rows: 100,
        queries: 5,
    },
    Shape {
        layers: 1,
        heads: 6,
        kv_heads: 1,
        rows: 40,
        queries: 12,
    },
    Shape {
        layers: 3,
        heads: 4,
        kv_heads: 2,
        rows: 90,
        queries: 8,
    },
];

/// The policy that a method installs for a model of `layers` layers without windows.
fn policy(method: &'static dyn Method, knobs: &str, layers: usize) -> Arc<dyn CachePolicy> {
    let raw = RawChoice::parse(&format!("{},{knobs}", method.card().name)).expect("well written");
    let knobs = Knobs::new(method.card(), &raw.knobs).expect("in range");
    let example = Facts::example();
    let layer = LayerFacts {
        window: None,
        ..example.layers[0]
    };
    let facts = Facts {
        layers: vec![layer; layers],
        ..example
    };
    let program = Rig::assemble(&facts, &Profiles::default(), &[Chosen { method, knobs }]).expect("it goes");
    Arc::clone(program.policy().expect("it cuts caches"))
}

/// Weights of the query heads of each KV head of a layer: `[Hk][g][W][n]`.
fn weights(case: &Case, layer: usize) -> Vec<Vec<Vec<Vec<f64>>>> {
    let group = case.geometry.heads / case.geometry.kv_heads;
    let of = |head: usize| softmax(&case.scores(layer, head));
    (0..case.geometry.kv_heads)
        .map(|kv| (kv * group..(kv + 1) * group).map(of).collect())
        .collect()
}

/// Rows kept on every shape and seed are those of `want(weights of a KV head, layer, case)`.
fn check(
    method: &'static dyn Method,
    knobs: impl Fn(&Shape) -> String,
    want: impl Fn(&[Vec<Vec<f64>>], usize, &Case) -> Vec<usize>,
) {
    for shape in SHAPES {
        let policy = policy(method, &knobs(&shape), shape.layers);
        for seed in 0..8 {
            let case = Case::random(seed, shape);
            for layer in 0..case.layers {
                let got = kept(policy.layer(&case.view(layer)), shape.rows, shape.kv_heads);
                for (head, group) in weights(&case, layer).iter().enumerate() {
                    let want = want(group, layer, &case);
                    assert_eq!(got[head], want, "seed {seed}, layer {layer}, head {head}");
                }
            }
        }
    }
}

#[test]
fn snapkv_keeps_what_its_reference_keeps() {
    for (kernel, smoothing) in [(5, "mean"), (7, "max"), (1, "mean")] {
        check(
            &SnapKv,
            |s| {
                format!(
                    "budget=24,window={},kernel={kernel},smoothing={smoothing}",
                    s.queries
                )
            },
            |group, _, _| snapkv(group, 24, kernel, smoothing == "max"),
        );
    }
}

#[test]
fn pyramidkv_keeps_what_its_reference_keeps() {
    for beta in [20, 3] {
        check(
            &PyramidKv,
            |s| format!("budget=24,window={},kernel=5,beta={beta}", s.queries),
            |group, layer, case| {
                let w = case.queries;
                let past = pyramid(24, w, case.rows, beta, case.layers)[layer];
                snapkv(group, past + w, 5, false)
            },
        );
    }
}

#[test]
fn h2o_keeps_what_its_reference_keeps() {
    for (share, recent, score) in [
        (0.5, 12, "sum"),
        (0.125, 3, "sum"),
        (0.125, 3, "mean"),
        (1.0, 24, "mean"),
    ] {
        check(
            &H2o,
            |s| format!("budget=24,recent={share},queries={},score={score}", s.queries),
            |group, _, _| h2o(group, 24, recent, score == "mean"),
        );
    }
}

#[test]
fn h2o_sees_the_whole_prompt_also_in_blocks() {
    // More queries than are weighed at once, and all that there are: the sums of the paper.
    let shape = Shape {
        layers: 1,
        heads: 4,
        kv_heads: 2,
        rows: 100,
        queries: 100,
    };
    let policy = policy(&H2o, "budget=30,recent=0.33,queries=100", 1);
    for seed in 0..8 {
        let case = Case::random(seed, shape);
        let got = kept(policy.layer(&case.view(0)), 100, 2);
        for (head, group) in weights(&case, 0).iter().enumerate() {
            assert_eq!(got[head], h2o(group, 30, 10, false), "seed {seed}");
        }
    }
}

/// Made by hand: rows of weights of one head over 8 keys, for the last 2 queries.
fn by_hand() -> Vec<Vec<Vec<f64>>> {
    vec![vec![
        vec![0.30, 0.05, 0.05, 0.20, 0.00, 0.10, 0.30, 0.00],
        vec![0.10, 0.05, 0.25, 0.05, 0.05, 0.05, 0.05, 0.40],
    ]]
}

#[test]
fn figures_made_by_hand() {
    // Sums .4 .1 .3 .25 .05 .15 | .35 .4.
    assert_eq!(h2o(&by_hand(), 4, 1, false), [0, 2, 6, 7]);
    assert_eq!(h2o(&by_hand(), 4, 2, false), [0, 2, 6, 7]);
    assert_eq!(h2o(&by_hand(), 3, 2, false), [0, 6, 7]);
    assert_eq!(snapkv(&by_hand(), 4, 1, false), [0, 2, 6, 7]);
    // Over 3 neighbours: .167 .267 .217 .2 .15 .067; largest: .4 .4 .3 .3 .25 .15.
    assert_eq!(snapkv(&by_hand(), 4, 3, false), [1, 2, 6, 7]);
    assert_eq!(snapkv(&by_hand(), 4, 3, true), [0, 1, 6, 7]);
    // Sums 1.2 .8 .7; row 2 is seen by two queries only: means .4 .267 .35.
    let late = vec![vec![
        vec![0.6, 0.4, 0.0, 0.0],
        vec![0.4, 0.2, 0.4, 0.0],
        vec![0.2, 0.2, 0.3, 0.3],
    ]];
    assert_eq!(h2o(&late, 3, 1, false), [0, 1, 3]);
    assert_eq!(h2o(&late, 3, 1, true), [0, 2, 3]);
}

#[test]
fn query_heads_of_other_groups_have_no_vote() {
    // Query heads 0 and 1 belong to KV head 0, 2 and 3 to KV head 1: a grouping by remainder would mix them up.
    let shape = SHAPES[0];
    let case = Case::random(3, shape);
    let all = weights(&case, 0);
    let mixed = [
        vec![all[0][0].clone(), all[1][0].clone()],
        vec![all[0][1].clone(), all[1][1].clone()],
    ];
    let got = kept(
        policy(&SnapKv, "budget=24,window=8", 1).layer(&case.view(0)),
        shape.rows,
        2,
    );
    let wrong: Vec<_> = mixed.iter().map(|group| snapkv(group, 24, 5, false)).collect();
    assert_ne!(got, wrong, "the test could not tell them apart");
}

#[test]
fn a_budget_that_fits_keeps_everything() {
    for (method, knobs) in [
        (&SnapKv as &'static dyn Method, "budget=61,window=8"),
        (&PyramidKv, "budget=61,window=8"),
        (&H2o, "budget=61,recent=0.1"),
    ] {
        let case = Case::random(1, SHAPES[0]);
        let got = kept(policy(method, knobs, 1).layer(&case.view(0)), 61, 2);
        assert_eq!(got, [(0..61).collect::<Vec<_>>(), (0..61).collect()]);
    }
}
