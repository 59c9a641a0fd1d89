//! tidaldecode: golden choices, and what each layer reads.

use std::sync::Arc;

use antefix_attention::sparse::Planned;

use super::*;
use crate::plan_case::{Lcg, PlanCase, Shape, decode_planner};

#[test]
fn it_conforms() {
    antefix_conformance::method::check_with(
        &TidalDecode,
        &[
            "least=4,share=0.05,start=0,recall=1,unit_keys=1",
            "least=40,share=0.01,start=0,recall=0,unit_keys=32",
            "least=16,share=0.1,start=1,unit_keys=16,unit=query_head",
            "least=8,share=0.05,start=0,correct_every=7",
        ],
    );
}

fn tidal(select: &[usize], least: usize, unit_keys: usize, unit: Unit) -> Arc<dyn DecodePlanner> {
    Arc::new(Tidal {
        budget: Budget { share: 1e-6, least },
        select: select.to_vec(),
        unit_keys,
        unit,
    })
}

fn narrow(rows: &[Vec<f64>]) -> Vec<f32> {
    rows.iter().flatten().map(|&x| x as f32).collect()
}

/// Layers of one drawn row behind 23 others. Queries of the rows before it are zeros.
fn golden(heads: usize, layers: &[(Vec<Vec<f64>>, Vec<Vec<f64>>)]) -> PlanCase {
    let one = |(q, k): &(Vec<Vec<f64>>, Vec<Vec<f64>>)| {
        let mut all = vec![0.0; 23 * heads * 8];
        all.extend(narrow(q));
        (all, narrow(k))
    };
    let layers: Vec<_> = layers.iter().map(one).collect();
    PlanCase::layered(Shape(heads, 1, 8), &layers)
}

fn reads(case: &PlanCase, planned: &Planned, head: usize) -> Vec<u32> {
    case.kept(std::slice::from_ref(planned), head).remove(0)
}

#[test]
fn choices_are_the_golden_ones() {
    let mut lcg = Lcg(4);
    let (q0, k0) = (lcg.rows(2, 8, 2.0), lcg.rows(24, 8, 2.0));
    let add = |a: &[Vec<f64>], b: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
        let row = |(a, b): (&Vec<f64>, Vec<f64>)| a.iter().zip(b).map(|(a, b)| a + b / 2.0).collect();
        a.iter().zip(b).map(row).collect()
    };
    let layers: Vec<_> = (0..6)
        .map(|_| {
            let (dq, dk) = (lcg.rows(2, 8, 1.0), lcg.rows(24, 8, 1.0));
            lcg.rows(24, 8, 1.0);
            (add(&q0, dq), add(&k0, dk))
        })
        .collect();
    let case = golden(2, &layers);
    let plans = case.decode(&tidal(&[1, 3], 4, 1, Unit::QueryHead), 23, 1);
    for layer in [0, 1, 3] {
        assert!(plans[layer].plan.is_dense(), "layer {layer}");
    }
    for layer in [2, 4, 5] {
        assert_eq!(reads(&case, &plans[layer], 0), [5, 6, 22, 23]);
        // The row's own key is added where it did not win.
        assert_eq!(reads(&case, &plans[layer], 1), [3, 7, 9, 21, 23]);
    }
    let plans = case.decode(&tidal(&[1, 3], 6, 1, Unit::KvGroup), 23, 1);
    assert_eq!(reads(&case, &plans[2], 0), [3, 5, 7, 9, 21, 22, 23]);
    assert_eq!(plans[2].plan.unit, Unit::KvGroup);

    let mut lcg = Lcg(41);
    let layers: Vec<_> = (0..4)
        .map(|_| {
            let layer = (lcg.rows(1, 8, 2.0), lcg.rows(24, 8, 2.0));
            lcg.rows(24, 8, 2.0);
            layer
        })
        .collect();
    let case = golden(1, &layers);
    let plans = case.decode(&tidal(&[1], 4, 1, Unit::QueryHead), 23, 1);
    assert_eq!(reads(&case, &plans[2], 0), [4, 7, 16, 21, 23]);
    let plans = case.decode(&tidal(&[2, 3], 4, 1, Unit::QueryHead), 23, 1);
    assert!(plans.iter().all(|p| p.plan.is_dense()));
}

#[test]
fn layers_read_what_the_reference_chooses_whatever_the_step() {
    for (seed, unit_keys, least, unit) in [
        (1, 1, 9, Unit::QueryHead),
        (2, 16, 40, Unit::KvGroup),
        (3, 32, 64, Unit::KvGroup),
        (4, 1, 20, Unit::KvGroup),
    ] {
        let case = PlanCase::random_layers(seed, Shape(4, 2, 16), 150, 4);
        let planner = tidal(&[0, 2], least, unit_keys, unit);
        let alone = case.decode(&planner, 130, 1);
        for (step, head) in [(1, 0), (1, 3), (7, 1), (20, 2)] {
            let plans = case.decode(&planner, 130, step);
            for planned in plans.iter().filter(|p| p.layer % 2 == 1) {
                let rows = case.kept(std::slice::from_ref(planned), head);
                for (pos, got) in planned.queries.clone().zip(rows) {
                    let heads = match unit {
                        Unit::QueryHead => head..head + 1,
                        Unit::KvGroup => head / 2 * 2..head / 2 * 2 + 2,
                    };
                    let seen = &case.keys_of(planned.layer - 1, head / 2)[..=pos as usize];
                    let scale = f64::from(case.geometry.scale);
                    let weights: Vec<Vec<f64>> = heads
                        .map(|h| {
                            let q = &case.queries_of(planned.layer - 1, h)[pos as usize];
                            reference::log_weights(q, seen, scale)
                        })
                        .collect();
                    let mut want = reference::choose(&weights, unit_keys, (least / unit_keys).max(1));
                    want.push(pos as usize);
                    want.dedup();
                    let want: Vec<u32> = want.into_iter().map(|k| k as u32).collect();
                    assert_eq!(got, want, "seed {seed}, layer {}, row {pos}", planned.layer);
                }
            }
        }
        // One choice for all layers up to the next.
        assert_eq!(alone.len(), 20 * 4);
    }
}

#[test]
fn what_fits_the_budget_is_dense() {
    let case = PlanCase::random_layers(1, Shape(4, 2, 16), 150, 3);
    let plans = case.decode(&tidal(&[0], 150, 1, Unit::KvGroup), 140, 1);
    assert!(plans.iter().all(|p| p.plan.is_dense()));
}

/// A key that only layer 2 looks at is missed by a choice made in layer 0, and found by one made in layer 2: the method's limit.
#[test]
fn a_key_of_a_later_layer_is_missed_until_that_layer_chooses() {
    let mut rng = fastrand::Rng::with_seed(2);
    let mut small = |n: usize| -> Vec<f32> { (0..n * 16).map(|_| rng.f32() * 0.2 - 0.1).collect() };
    let mut layers: Vec<(Vec<f32>, Vec<f32>)> = (0..4).map(|_| (small(100), small(100))).collect();
    let mut plant = |layer: usize, key: usize| {
        layers[layer].0[99 * 16 + 5] = 9.0;
        layers[layer].1[key * 16 + 5] = 9.0;
    };
    plant(0, 30);
    plant(2, 60);
    let case = PlanCase::layered(Shape(1, 1, 16), &layers);
    let found = |select: &[usize]| {
        let plans = case.decode(&tidal(select, 4, 1, Unit::KvGroup), 99, 1);
        let of = |layer: usize| reads(&case, &plans[layer], 0);
        [
            of(1).contains(&30),
            of(1).contains(&60),
            of(3).contains(&30),
            of(3).contains(&60),
        ]
    };
    assert_eq!(found(&[0]), [true, false, true, false]);
    assert_eq!(found(&[0, 2]), [true, false, false, true]);
}

#[test]
fn layers_with_a_window_are_left_out_of_the_lists() {
    // Layer 1 of the example has a window.
    let select = |settings: &str| {
        let text = format!("{:?}", decode_planner(&TidalDecode, settings));
        let from = text.find("select: ").expect("it says which") + 8;
        text[from..].split(']').next().expect("a list").to_string() + "]"
    };
    assert_eq!(select("start=0,recall=2"), "[0, 2]");
    // Nothing is left behind layer 3 that could read its choice.
    assert_eq!(select("start=1,recall=3"), "[2]");
    assert_eq!(select("start=0,recall=1"), "[0, 2]");
    assert_eq!(select("start=3,recall=1"), "[3]");
}
