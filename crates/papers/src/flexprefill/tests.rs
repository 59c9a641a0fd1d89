//! flexprefill: golden figures of its reference, and the fast part against it.

use std::sync::Arc;

use super::*;
use crate::flexprefill::reference::Settings;
use crate::plan_case::{Lcg, PlanCase, Shape};

#[test]
fn it_conforms() {
    antefix_conformance::method::check_with(
        &FlexPrefill,
        &[
            "block=32,min_budget=32,chunk=2,rows=16,gamma=0.7",
            "block=32,min_budget=32,chunk=4,rows=40,tau=0.9,unit=kv_group",
        ],
    );
}

fn close(got: &[f64], want: &[f64]) {
    let off = got
        .iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max);
    assert!(got.len() == want.len() && off < 1e-5, "{got:?} for {want:?}");
}

#[test]
fn the_reference_gives_the_golden_figures() {
    let mut lcg = Lcg(1);
    let (q, k) = (lcg.rows(61, 8, 3.0), lcg.rows(61, 8, 2.0));
    let told = reference::plan(
        &q,
        &k,
        &Settings {
            block: 8,
            divisor: 8,
            gamma: 0.5,
            tau: 0.1,
            min_budget: 8,
            rows: 8,
            scale: 8f64.powf(-0.5),
        },
    );
    assert_eq!(told.covers, (11, 13));
    let [v, slash, p] = &told.mass;
    close(
        v,
        &[
            0.13055, 0.14894, 0.19052, 0.19792, 0.11339, 0.08503, 0.09438, 0.03927,
        ],
    );
    close(
        slash,
        &[
            0.09194, 0.1308, 0.13058, 0.15552, 0.22863, 0.09916, 0.10628, 0.05709,
        ],
    );
    close(
        p,
        &[
            0.12688, 0.19873, 0.13611, 0.1231, 0.11449, 0.11465, 0.06712, 0.11893,
        ],
    );
    close(&[told.distance], &[0.145_735]);
    assert_eq!(told.chosen, (vec![0, 3], vec![0, 3]));
    let rows: [&[usize]; 8] = [
        &[0],
        &[0, 1],
        &[0, 2],
        &[0, 3],
        &[0, 1, 3, 4],
        &[0, 2, 3, 5],
        &[0, 3, 6],
        &[0, 3, 4, 7],
    ];
    assert_eq!(told.rows, rows);
    let aware: [&[usize]; 8] = [&[0], &[0, 1], &[0, 1, 2], &[0, 1], &[], &[2], &[], &[]];
    assert_eq!(told.aware, aware);
}

fn flex(gamma: f64, tau: f64) -> Flex {
    Flex {
        gamma,
        tau,
        min_budget: 32,
        block: 32,
        rows: 40,
        chunk: 4,
        unit: Unit::QueryHead,
    }
}

/// The keys of each row by the reference, stretch by stretch.
fn want(case: &PlanCase, flex: &Flex, head: usize) -> Vec<Vec<u32>> {
    let (q, k) = (
        case.queries(head),
        case.keys(head * case.geometry.kv_heads / case.geometry.heads),
    );
    let grain = flex.grain().get();
    let settings = Settings {
        block: flex.block,
        divisor: flex.block,
        gamma: flex.gamma,
        tau: flex.tau,
        min_budget: flex.min_budget,
        rows: flex.rows,
        scale: f64::from(case.geometry.scale),
    };
    let mut out = Vec::new();
    for from in (0..case.n).step_by(grain) {
        let to = (from + grain).min(case.n);
        let dense = to <= (2 * flex.block).max(flex.min_budget.next_multiple_of(flex.block));
        let told = reference::plan(&q[from..to], &k[..to], &settings);
        out.extend((from..to).map(|pos| {
            let blocks = &told.rows[(pos - from) / flex.block];
            (0..=pos as u32)
                .filter(|&k| dense || blocks.contains(&(k as usize / flex.block)))
                .collect::<Vec<_>>()
        }));
    }
    out
}

#[test]
fn it_plans_what_its_reference_plans() {
    let mut aware = 0;
    for (seed, gamma, tau) in [
        (1, 0.9, 0.0),
        (2, 0.6, 0.0),
        (3, 0.9, 1.0),
        (4, 0.6, 0.3),
        (5, 0.8, 0.2),
    ] {
        let case = PlanCase::random(seed, Shape(4, 2, 16), 399);
        let planner: Arc<dyn Planner> = Arc::new(flex(gamma, tau));
        let plans = case.plans(&planner);
        for head in 0..4 {
            let (got, want) = (case.kept(&plans, head), want(&case, &flex(gamma, tau), head));
            for (row, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_eq!(got, want, "seed {seed}, head {head}, row {row}");
            }
            aware += usize::from(tau > 0.0 && got != self::want(&case, &flex(gamma, 0.0), head));
        }
    }
    assert!(aware > 2, "some heads are query-aware: {aware}");
}

#[test]
fn more_mass_reads_more_and_all_of_it_everything() {
    let case = PlanCase::random(8, Shape(4, 2, 16), 399);
    let density = |gamma: f64, unit: Unit| {
        let planner: Arc<dyn Planner> = Arc::new(Flex {
            unit,
            ..flex(gamma, 0.0)
        });
        let pairs = |p: &antefix_attention::sparse::Planned| p.plan.pairs(p.queries.clone());
        let (kept, all) = case
            .plans(&planner)
            .iter()
            .map(pairs)
            .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        kept as f64 / all as f64
    };
    for unit in [Unit::QueryHead, Unit::KvGroup] {
        let sweep: Vec<f64> = [0.3, 0.6, 0.9, 0.99].iter().map(|&g| density(g, unit)).collect();
        assert!(sweep.is_sorted() && sweep[0] < sweep[3], "{unit:?}: {sweep:?}");
    }
}

/// Queries look at one key, or at one distance, whatever their position.
#[test]
fn planted_columns_and_diagonals_are_read() {
    let (n, dim) = (384, 64);
    let mut rng = fastrand::Rng::with_seed(5);
    let mut small = |n: usize| -> Vec<f32> { (0..n * dim).map(|_| rng.f32() * 0.2 - 0.1).collect() };
    let plan = |q: &[f32], k: &[f32]| {
        let case = PlanCase::new(Shape(1, 1, dim), q, k);
        // One block of the budget goes to the first keys, or the diagonal.
        let planner: Arc<dyn Planner> = Arc::new(Flex {
            min_budget: 64,
            ..flex(0.6, 0.0)
        });
        case.kept(&case.plans(&planner), 0)
    };
    // Key 70 has the direction of every query.
    let (mut q, mut k) = (small(n), small(n));
    q.chunks_exact_mut(dim).for_each(|q| q[3] = 8.0);
    k[70 * dim + 3] = 8.0;
    let kept = plan(&q, &k);
    assert!(
        kept[128..]
            .iter()
            .all(|row| row.contains(&70) && row.len() <= 128 + 64)
    );
    // A query looks at the key 100 before it: random directions, repeated.
    let (mut q, mut k) = (small(n), small(n));
    for t in 0..n {
        let to: Vec<f32> = (0..dim).map(|_| if rng.bool() { 2.0 } else { -2.0 }).collect();
        k[t * dim..][..dim].copy_from_slice(&to);
        if t + 100 < n {
            q[(t + 100) * dim..][..dim].copy_from_slice(&to);
        }
    }
    let kept = plan(&q, &k);
    let found = (128..n).filter(|&t| kept[t].contains(&(t as u32 - 100))).count();
    // A diagonal of keys lies across two of blocks, of which one is read: half of the rows find their key at least.
    assert!(found * 2 >= n - 128, "{found}");
    assert!(kept.iter().all(|row| row.len() <= 128 + 64));
}
