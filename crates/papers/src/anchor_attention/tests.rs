//! anchor_attention: golden lists of its reference, and the fast part against it.

use std::sync::Arc;

use super::*;
use crate::anchor_attention::reference::Settings;
use crate::plan_case::{Lcg, PlanCase, Shape};

#[test]
fn it_conforms() {
    antefix_conformance::method::check_with(
        &AnchorAttention,
        &[
            "block=32,step=1,theta=0.5",
            "block=32,step=2,theta=0.1,dense_tail=false",
            "block=32,step=2,theta=1,unit=query_head,dense_tail=false",
        ],
    );
}

#[test]
fn the_reference_gives_the_golden_lists() {
    let mut lcg = Lcg(2);
    let (q, k) = (lcg.rows(64, 8, 2.0), lcg.rows(64, 8, 2.0));
    let settings = |theta| Settings {
        block: 4,
        step: 4,
        init: 4,
        theta,
        scale: 8f64.powf(-0.5),
    };
    let want = [
        1.2121, 1.5013, 2.7175, 1.8173, 1.174, 1.7534, 2.0905, 2.0056, 1.4356, 1.3896, 1.444, 2.1743, 1.8308,
        1.8602, 1.6772, 2.2171,
    ];
    for (got, want) in reference::block_anchors(&q, &k, &settings(0.0)).iter().zip(want) {
        assert!((got - want).abs() < 6e-5, "{got} for {want}");
    }
    let lists = |theta| reference::lists(&q, &k, &settings(theta));
    let half: [&[usize]; 4] = [&[], &[4, 6, 10, 15], &[9, 21, 22, 27, 28], &[6]];
    assert_eq!(lists(0.5), half);
    let one: [&[usize]; 4] = [
        &[],
        &[4, 6, 7, 10, 11, 15],
        &[4, 6, 7, 9, 11, 13, 14, 16, 20, 21, 22, 24, 25, 26, 27, 28, 30, 31],
        &[6, 11, 16, 23, 24, 32, 42, 45],
    ];
    assert_eq!(lists(1.0), one);
    let all: Vec<Vec<usize>> = (0..4).map(|g| (4..16 * g).collect()).collect();
    assert_eq!(lists(2.0), all);
}

fn anchors(theta: f64, unit: Unit) -> Anchors {
    Anchors {
        theta: theta as f32,
        block: 32,
        group: 64,
        init: 32,
        dense_tail: false,
        unit,
    }
}

fn kept(case: &PlanCase, anchors: Anchors, head: usize) -> Vec<Vec<u32>> {
    let planner: Arc<dyn Planner> = Arc::new(anchors);
    case.kept(&case.plans(&planner), head)
}

#[test]
fn it_reads_what_its_reference_lists() {
    for (seed, theta) in [(1, 0.0), (2, 0.7), (3, 2.0), (4, -0.5)] {
        let case = PlanCase::random(seed, Shape(4, 2, 16), 411);
        let settings = Settings {
            block: 32,
            step: 2,
            init: 32,
            theta,
            scale: f64::from(case.geometry.scale),
        };
        let lists: Vec<Vec<Vec<usize>>> = (0..4)
            .map(|head| reference::lists(&case.queries(head), &case.keys(head / 2), &settings))
            .collect();
        for (unit, head) in [
            (Unit::QueryHead, 1),
            (Unit::QueryHead, 2),
            (Unit::KvGroup, 0),
            (Unit::KvGroup, 3),
        ] {
            let heads = match unit {
                Unit::QueryHead => head..head + 1,
                Unit::KvGroup => head / 2 * 2..head / 2 * 2 + 2,
            };
            for (pos, got) in kept(&case, anchors(theta, unit), head).iter().enumerate() {
                let g = pos / 64;
                let listed = |k: usize| heads.clone().any(|h| lists[h][g].contains(&k));
                let want: Vec<u32> = (0..=pos)
                    .filter(|&k| k < 32 || k >= g * 64 || listed(k))
                    .map(|k| k as u32)
                    .collect();
                assert_eq!(got, &want, "seed {seed}, {unit:?}, head {head}, row {pos}");
            }
        }
    }
}

#[test]
fn a_larger_theta_reads_more_and_the_largest_everything() {
    let case = PlanCase::random(6, Shape(4, 2, 16), 400);
    let read = |theta| kept(&case, anchors(theta, Unit::KvGroup), 0);
    let (few, some, all) = (read(-1e9), read(0.8), read(1e9));
    for pos in 0..400usize {
        let ends: Vec<u32> = (0..=pos as u32)
            .filter(|&k| k < 32 || k as usize >= pos / 64 * 64)
            .collect();
        assert_eq!(few[pos], ends);
        assert!(few[pos].iter().all(|k| some[pos].contains(k)));
        assert_eq!(all[pos], (0..=pos as u32).collect::<Vec<_>>());
    }
    let size = |rows: &[Vec<u32>]| rows.iter().map(Vec::len).sum::<usize>();
    assert!(size(&few) < size(&some) && size(&some) < size(&all));
}

#[test]
fn what_is_dropped_weighs_little_when_every_row_is_a_block_of_alike() {
    // Rows of a block are equal: their mean query is each of them, so that a dropped key lies `theta` below the row's own anchor.
    let (n, dim, theta) = (384, 16, 3.0);
    let mut rng = fastrand::Rng::with_seed(4);
    let mut draw = |n: usize| -> Vec<f32> { (0..n * dim).map(|_| rng.f32() * 6.0 - 3.0).collect() };
    let (rows, k) = (draw(n / 32), draw(n));
    let q: Vec<f32> = rows.chunks_exact(dim).flat_map(|row| row.repeat(32)).collect();
    let case = PlanCase::new(Shape(1, 1, dim), &q, &k);
    let settings = Settings {
        block: 32,
        step: 2,
        init: 32,
        theta,
        scale: f64::from(case.geometry.scale),
    };
    let (q, k) = (case.queries(0), case.keys(0));
    let means = reference::block_anchors(&q, &k, &settings);
    for (pos, kept) in kept(&case, anchors(theta, Unit::KvGroup), 0).iter().enumerate() {
        for j in (0..=pos).filter(|&j| !kept.contains(&(j as u32))) {
            let score = settings.scale * crate::sparse_baselines::reference::dot(&q[pos], &k[j]);
            assert!(score < means[pos / 32] - theta + 1e-4, "row {pos}, key {j}");
        }
    }
}

#[test]
fn a_planted_key_is_listed_for_the_group_that_looks_at_it_alone() {
    let (n, dim) = (512, 16);
    let mut rng = fastrand::Rng::with_seed(9);
    let mut small = |n: usize| -> Vec<f32> { (0..n * dim).map(|_| rng.f32() * 0.4 - 0.2).collect() };
    let (mut q, mut k) = (small(n), small(n));
    // Group 5, rows 320 to 383, looks at key 100.
    q[320 * dim..384 * dim]
        .chunks_exact_mut(dim)
        .for_each(|q| q[2] = 20.0);
    k[100 * dim + 2] = 4.0;
    let case = PlanCase::new(Shape(1, 1, dim), &q, &k);
    for (pos, kept) in kept(&case, anchors(-2.0, Unit::KvGroup), 0)
        .iter()
        .enumerate()
        .skip(128)
    {
        assert_eq!(kept.contains(&100), (320..384).contains(&pos), "row {pos}");
    }
}

#[test]
fn the_tail_may_be_dense() {
    let case = PlanCase::random(6, Shape(2, 1, 16), 400);
    let dense_tail = Anchors {
        dense_tail: true,
        ..anchors(-1e9, Unit::KvGroup)
    };
    let rows = kept(&case, dense_tail, 0);
    assert_eq!(rows[399].len(), 400);
    assert!(rows[383].len() < 100);
}
