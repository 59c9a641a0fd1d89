//! The fast form against the matrix, and the laws of section 6.

use antefix_attention::Geometry;
use antefix_attention::hooks::{At, Hook, Site};
use antefix_attention::readout::AttentionView;
use antefix_kernels::{cpu::Cpu, team::Team};
use antefix_kv::{KvDtype, KvShape, Pool, SeqKv};
use antefix_state::PAGE_ROWS;

use super::calibrate::{Act, BLOCK, Calibration, Mode};
use super::reference;
use super::sinks::{Rule, Threshold, hand_on};
use crate::case::MADE_UP;

const N: usize = 150;
const DIM: usize = 16;
const HEADS: usize = 4;

const RULE: Rule = Rule {
    threshold: Threshold::Alpha(3.0),
    min_rows: 1,
    spare_first_found: false,
};

struct Case {
    pool: Pool,
    kv: SeqKv,
    team: Team,
    q: Vec<f32>,
    geometry: Geometry,
}

fn noise(i: usize) -> f32 {
    let x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((x >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
}

impl Case {
    /// Keys 0, 17 and 90 attract every query.
    fn new(window: Option<u32>) -> Self {
        let shape = KvShape {
            layers: 1,
            kv_heads: 2,
            dim: DIM,
            dtype: KvDtype::F32,
        };
        let mut pool = Pool::new(shape, 1 << 22);
        let mut kv = SeqKv::new(shape);
        pool.reserve(&mut kv, N).expect("room");
        let mut k: Vec<f32> = (0..N * 2 * DIM).map(noise).collect();
        for sink in [0, 17, 90] {
            k[sink * 2 * DIM..(sink + 1) * 2 * DIM].fill(1.5);
        }
        let v: Vec<f32> = (0..N * 2 * DIM).map(|i| noise(i + 99_999)).collect();
        pool.write(&kv, 0, 0, &k, &v);
        kv.commit(N);
        let q = (0..N * HEADS * DIM)
            .map(|i| 0.6 + 0.5 * noise(i + 7_777))
            .collect();
        let geometry = Geometry {
            heads: HEADS,
            kv_heads: 2,
            dim: DIM,
            scale: 0.25,
            softcap: None,
            window,
        };
        Self {
            pool,
            kv,
            team: Team::new(2),
            q,
            geometry,
        }
    }

    fn view(&self, from: usize, to: usize) -> AttentionView<'_> {
        AttentionView {
            run: (Cpu::best(), &self.team),
            pool: &self.pool,
            kv: &self.kv,
            base: 0,
            layer: 0,
            geometry: self.geometry,
            q: &self.q[from * HEADS * DIM..to * HEADS * DIM],
            pos0: from as u32,
            exact: true,
        }
    }

    /// Weights of a head, `[N][N]`.
    fn matrix(&self, head: usize) -> Vec<Vec<f64>> {
        let mut rows = vec![vec![0.0; N]; N];
        let all: Vec<usize> = (0..N).collect();
        self.view(0, N).each_row(head, &all, &mut |r, row| {
            for j in 0..N {
                rows[r][j] = f64::from(row.at(j as u32));
            }
        });
        rows
    }

    fn values(&self, head: usize) -> Vec<Vec<f64>> {
        let value = |t: usize, d: usize| {
            let page = self.kv.pages(0, head / 2)[t / PAGE_ROWS];
            f64::from(self.pool.page(page).value(DIM, t % PAGE_ROWS, d))
        };
        (0..N).map(|t| (0..DIM).map(|d| value(t, d)).collect()).collect()
    }

    /// Outputs without calibration, `[N, Hq, D]`.
    fn outputs(&self) -> Vec<f32> {
        let mut z = vec![0.0; N * HEADS * DIM];
        for head in 0..HEADS {
            let out = reference::output(&self.matrix(head), &self.values(head));
            for (t, row) in out.iter().enumerate() {
                for (d, x) in row.iter().enumerate() {
                    z[(t * HEADS + head) * DIM + d] = *x as f32;
                }
            }
        }
        z
    }

    /// Runs `act` over the rows in steps that end at `borders`.
    fn run(&self, act: &mut Act, borders: &[usize], prompt: usize) -> Vec<f32> {
        let mut z = self.outputs();
        let mut from = 0;
        for &to in borders {
            let width = HEADS * DIM;
            let at = At {
                layer: 0,
                site: Site::Z,
                rows: to - from,
                width,
                pos0: from as u32,
                prompt: prompt as u32,
                attention: Some(self.view(from, to)),
            };
            act.at(&at, &mut z[from * width..to * width]);
            from = to;
        }
        z
    }
}

fn act(heads: Vec<usize>, beta: f32, mode: Mode) -> Act {
    Act::new(Calibration {
        heads: vec![heads],
        rule: RULE,
        beta,
        mode,
    })
}

#[test]
fn it_conforms() {
    antefix_conformance::method::check_profiled(
        &super::Calibrated,
        Some(MADE_UP),
        &[
            "top=2,alpha=1.5,min_rows=1",
            "heads=0:0+1:1,beta=0.4,alpha=1.5,min_rows=1",
            "heads=0:1,beta=2,threshold=0.02",
        ],
    );
}

#[test]
fn two_passes_over_a_prompt_are_the_matrix_form() {
    let case = Case::new(None);
    let mut act = act(vec![0, 3], 0.4, Mode::TwoPass);
    let got = case.run(&mut act, &[N], N);
    let plain = case.outputs();
    for head in 0..HEADS {
        let a = case.matrix(head);
        let sinks = reference::sinks(&a, 3.0 / N as f64, false);
        if head == 0 || head == 3 {
            assert!(sinks.contains(&17) && !sinks.contains(&0));
            let mine: Vec<usize> = act.sinks(0, head).iter().map(|&j| j as usize).collect();
            assert_eq!(mine, sinks);
        }
        let changed = reference::redistribute(&a, &sinks, 0.4);
        for row in &changed {
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-6, "mass is kept");
        }
        let want = reference::output(&changed, &case.values(head));
        for t in 0..N {
            for d in 0..DIM {
                let at = (t * HEADS + head) * DIM + d;
                if head == 0 || head == 3 {
                    assert!(
                        (f64::from(got[at]) - want[t][d]).abs() < 1e-5,
                        "head {head} row {t}"
                    );
                } else {
                    assert_eq!(got[at], plain[at], "heads that are not calibrated keep every bit");
                }
            }
        }
    }
}

#[test]
fn neutral_settings_change_no_bit() {
    let case = Case::new(None);
    let plain = case.outputs();
    for act in [
        act(vec![], 0.4, Mode::TwoPass),
        act(vec![0, 1], 1.0, Mode::Causal),
    ] {
        assert_eq!(act.wants(0), 0, "it is not even called");
        assert_eq!(act.fingerprint(), None);
    }
    // A threshold that no key reaches: no sinks.
    let mut none = Act::new(Calibration {
        heads: vec![vec![0, 1, 2, 3]],
        rule: Rule {
            threshold: Threshold::Fixed(1.1),
            ..RULE
        },
        beta: 0.4,
        mode: Mode::Causal,
    });
    assert_eq!(case.run(&mut none, &[N], N), plain);
}

#[test]
fn causal_rows_do_not_depend_on_steps_or_on_what_comes_later() {
    for window in [None, Some(50)] {
        let case = Case::new(window);
        let whole = case.run(&mut act(vec![1, 2], 0.4, Mode::Causal), &[N], N);
        assert_ne!(whole, case.outputs());
        for step in [1, 7, 64, 100] {
            let borders: Vec<usize> = (step..N).step_by(step).chain([N]).collect();
            let cut = case.run(&mut act(vec![1, 2], 0.4, Mode::Causal), &borders, N);
            assert_eq!(cut, whole, "steps of {step}");
        }
        let first = case.run(&mut act(vec![1, 2], 0.4, Mode::Causal), &[100], N);
        let width = HEADS * DIM;
        assert_eq!(first[..100 * width], whole[..100 * width]);
        let plain = case.outputs();
        let untouched = BLOCK as usize * width;
        assert_eq!(
            whole[..untouched],
            plain[..untouched],
            "nothing is known in the first block"
        );
    }
}

#[test]
fn a_sequence_that_begins_again_forgets() {
    let case = Case::new(None);
    let mut act = act(vec![0], 0.4, Mode::Causal);
    let first = case.run(&mut act, &[N], N);
    assert_eq!(case.run(&mut act, &[N], N), first);
}

#[test]
fn keys_that_are_no_sinks_may_change_places() {
    let case = Case::new(None);
    let (a, v) = (case.matrix(0), case.values(0));
    let sinks = reference::sinks(&a, 3.0 / N as f64, false);
    assert!(sinks.contains(&17) && sinks.len() < 20);
    // The last row sees all of them: turned round among each other, and the sinks where they are.
    let others: Vec<usize> = (0..N).filter(|j| !sinks.contains(j)).collect();
    let mut order: Vec<usize> = (0..N).collect();
    for (&j, &from) in others.iter().zip(others.iter().rev()) {
        order[j] = from;
    }
    let turned = |row: &[f64]| -> Vec<f64> { order.iter().map(|&j| row[j]).collect() };
    let last = &a[N - 1];
    let plain = reference::redistribute(std::slice::from_ref(last), &sinks, 0.4);
    let moved = reference::redistribute(&[turned(last)], &sinks, 0.4);
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
    assert!(near(&turned(&plain[0]), &moved[0]));
    let values: Vec<Vec<f64>> = order.iter().map(|&j| v[j].clone()).collect();
    let (was, is) = (reference::output(&plain, &v), reference::output(&moved, &values));
    assert!(near(&was[0], &is[0]));
    // And so in the fast form.
    let z = |weights: &[f64], v: &[Vec<f64>]| -> Vec<f32> {
        let mut z: Vec<f32> = reference::output(&[weights.to_vec()], v)[0]
            .iter()
            .map(|&x| x as f32)
            .collect();
        let list: Vec<u32> = sinks.iter().map(|&j| j as u32).collect();
        hand_on(
            &list,
            0.4,
            |j| weights[j as usize] as f32,
            |j, d| v[j as usize][d] as f32,
            &mut z,
        );
        z
    };
    let (fast, fast_moved) = (z(last, &v), z(&turned(last), &values));
    for ((a, b), want) in fast.iter().zip(&fast_moved).zip(&was[0]) {
        assert!((a - b).abs() < 1e-5 && (f64::from(*a) - want).abs() < 1e-5);
    }
}

#[test]
fn the_official_rule_spares_the_first_sink_it_finds() {
    let a = vec![
        vec![1.0, 0.0, 0.0, 0.0],
        vec![0.1, 0.9, 0.0, 0.0],
        vec![0.05, 0.5, 0.45, 0.0],
        vec![0.01, 0.5, 0.29, 0.2],
    ];
    // Means 0.29, 0.633, 0.37, 0.2.
    assert_eq!(
        reference::sinks(&a, 0.3, true),
        [2],
        "key 1 is spared, though it is not the first token"
    );
    assert_eq!(reference::sinks(&a, 0.3, false), [1, 2]);
    assert_eq!(reference::sinks(&a, 0.1, true), [1, 2, 3]);
}

#[test]
fn rows_of_sinks_alone_stay_and_more_weight_for_sinks_hurts_the_rest() {
    let mut z = [2.0, 3.0];
    hand_on(&[0, 1], 0.4, |_| 0.5, |j, d| (j as usize + d) as f32, &mut z);
    assert_eq!(z, [2.0, 3.0], "no other key to hand the weight to");
    // One sink of weight 0.5 and value 1, another key of weight 0.5 and value 3: z = 2.
    let mut z = [2.0];
    hand_on(&[0], 0.4, |j| if j == 0 { 0.5 } else { 0.0 }, |_, _| 1.0, &mut z);
    assert!((z[0] - (0.2 + 0.8 * 3.0)).abs() < 1e-6);
}
