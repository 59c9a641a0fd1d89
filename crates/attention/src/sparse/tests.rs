//! Plans on random sequences: executed, printed, counted.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use antefix_kernels::attend::scores_each;
use antefix_kernels::cpu::Cpu;
use antefix_kernels::ops::{Rope, RopeStyle};
use antefix_kernels::team::Team;
use antefix_kv::{KvDtype, KvShape, Pool, SeqKv};
use antefix_state::plan::{Builder, Cover, Plan, Scope, Unit};

use super::*;
use crate::method::{DecodePlanner, DecodeSteps, Planner};
use crate::readout::AttentionView;
use crate::tests::noise;
use crate::{Extra, Geometry, Scratch, SeqRows, Sharing, attend};

/// Plans that depend on positions alone.
#[derive(Debug)]
struct Lots {
    grain: usize,
    block: u32,
    unit: Unit,
    /// A key stays if its hash modulo 64 is below this.
    keep: u64,
    /// Keys in runs of this many.
    run: u32,
}

impl Lots {
    fn keeps(&self, unit: usize, block: u32, key: u32) -> bool {
        let x = (unit as u64) << 40 | u64::from(block) << 20 | u64::from(key / self.run);
        let mut x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x ^= x >> 31;
        x.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 58 < self.keep
    }
}

impl Planner for Lots {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.grain).unwrap()
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        view.plan(self.unit, |unit| {
            let mut builder = Builder::new(self.block, view.queries());
            while let Some(at) = builder.block() {
                let keep = (0..at.start).filter(|&k| self.keeps(unit, at.start / self.block, k));
                builder.push(keep.map(|k| (k, k + 1)));
            }
            builder.finish()
        })
    }
}

/// One sequence whose rows are all in the batch, beside a dense neighbour.
struct Case {
    pool: Pool,
    seq: SeqKv,
    other: SeqKv,
    geometry: Geometry,
    q: Vec<f32>,
    n: usize,
}

const OTHER: usize = 70;

impl Case {
    fn new((heads, kv_heads, dim): (usize, usize, usize), dtype: KvDtype, n: usize) -> Self {
        let shape = KvShape {
            layers: 1,
            kv_heads,
            dim,
            dtype,
        };
        let mut pool = Pool::new(shape, 1 << 28);
        let mut make = |n: usize, seed: u64| {
            let mut seq = SeqKv::new(shape);
            pool.reserve(&mut seq, n).unwrap();
            let width = kv_heads * dim;
            pool.write(&seq, 0, 0, &noise(seed, n * width), &noise(seed + 1, n * width));
            seq.commit(n);
            seq
        };
        let (seq, other) = (make(n, 5), make(OTHER, 9));
        Self {
            pool,
            seq,
            other,
            geometry: Geometry {
                heads,
                kv_heads,
                dim,
                scale: 1.5 / (dim as f32).sqrt(),
                softcap: None,
                window: None,
            },
            q: noise(3, (n + OTHER) * heads * dim),
            n,
        }
    }

    /// Rows `from..to` of the sequence, and all of its neighbour: `([to - from, Hq, D], [70, Hq, D])`.
    fn run(&self, cpu: Cpu, planning: Option<&Planning>, (from, to): (usize, usize)) -> (Vec<f32>, Vec<f32>) {
        let team = Team::new(2);
        let width = self.geometry.heads * self.geometry.dim;
        let rows = |kv, first, rows, pos0: usize, planning| SeqRows {
            kv,
            first,
            rows,
            pos0: pos0 as u32,
            extra: Extra {
                planning,
                ..Extra::default()
            },
        };
        let seqs = [
            rows(&self.seq, 0, to - from, from, planning),
            rows(&self.other, to - from, OTHER, 0, None),
        ];
        let q = [
            &self.q[from * width..to * width],
            &self.q[self.n * width..(self.n + OTHER) * width],
        ]
        .concat();
        let mut out = vec![f32::NAN; q.len()];
        let rope = Rope::new(&[1.0; 8], RopeStyle::Neox);
        attend(
            (cpu, &team),
            &self.pool,
            (0, &rope),
            &self.geometry,
            (&seqs, &Sharing::of(&seqs)),
            &q,
            &mut out,
            &mut Scratch::default(),
        )
        .unwrap();
        let other = out.split_off((to - from) * width);
        (out, other)
    }

    fn view<'a>(&'a self, cpu: Cpu, team: &'a Team) -> AttentionView<'a> {
        AttentionView {
            run: (cpu, team),
            pool: &self.pool,
            kv: &self.seq,
            base: 0,
            layer: 0,
            geometry: self.geometry,
            q: &self.q[..self.n * self.geometry.heads * self.geometry.dim],
            pos0: 0,
            exact: true,
        }
    }
}

fn planning(lots: Lots) -> Planning {
    Planning::new(Some(Arc::new(lots)), None, usize::MAX).recording()
}

#[test]
fn a_plan_is_softmax_over_its_keys() {
    for (shape, block) in [
        ((4, 4, 32), 16),
        ((6, 2, 64), 32),
        ((7, 1, 64), 64),
        ((8, 2, 16), 48),
    ] {
        for (dtype, near) in [(KvDtype::F32, 1e-5), (KvDtype::Bf16, 6e-3)] {
            for (n, keep, run) in [(1, 9, 1), (63, 5, 1), (150, 3, 1), (301, 9, 40), (1301, 2, 5)] {
                if n > 1000 && shape != (6, 2, 64) {
                    continue;
                }
                let case = Case::new(shape, dtype, n);
                for unit in [Unit::QueryHead, Unit::KvGroup] {
                    let planning = planning(Lots {
                        grain: usize::MAX / 2,
                        block,
                        unit,
                        keep,
                        run,
                    });
                    let cpu = Cpu::best();
                    let (got, _) = case.run(cpu, Some(&planning), (0, n));
                    let plans = planning.take_plans();
                    assert_eq!((plans.len(), &plans[0].queries), (1, &(0..n as u32)));
                    let team = Team::new(1);
                    let want = reference(&plans[0].plan, &case.view(cpu, &team));
                    for (i, (x, y)) in got.iter().zip(&want).enumerate() {
                        assert!(
                            (x - y).abs() < near,
                            "{shape:?} {dtype:?} n {n} {unit:?} at {i}: {x} for {y}"
                        );
                    }
                    let density = planning.density().unwrap();
                    assert!((density - plans[0].plan.density(0..n as u32)).abs() < 1e-12);
                    assert!(n < 100 || density < 0.9, "{density}");
                }
            }
        }
    }
}

#[test]
fn a_full_plan_gives_the_bits_of_dense_attention_and_neighbours_keep_theirs() {
    for cpu in Cpu::available() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let case = Case::new((6, 2, 64), dtype, 1100);
            let dense = case.run(cpu, None, (0, 1100));
            let sparse = |keep, unit| {
                let planning = planning(Lots {
                    grain: 100,
                    block: 32,
                    unit,
                    keep,
                    run: 1,
                });
                case.run(cpu, Some(&planning), (0, 1100))
            };
            for unit in [Unit::QueryHead, Unit::KvGroup] {
                assert!(sparse(64, unit) == dense, "{:?} {dtype:?} {unit:?}", cpu.path());
                let (own, neighbour) = sparse(5, unit);
                assert!(own != dense.0 && neighbour == dense.1);
            }
        }
    }
}

/// A full cover that is not written as dense goes through the fold, too.
#[test]
fn a_full_cover_in_segments_is_dense_bit_for_bit() {
    #[derive(Debug)]
    struct Full;
    impl Planner for Full {
        fn grain(&self) -> NonZeroUsize {
            NonZeroUsize::new(usize::MAX / 2).unwrap()
        }
        fn plan(&self, view: &PlanView<'_>) -> Plan {
            let all = |at: std::ops::Range<u32>| antefix_state::plan::Seg::Span {
                start: 0,
                end: at.end,
                edge: antefix_state::plan::Edge::Causal,
            };
            let queries = view.queries();
            let mut rows = antefix_state::plan::Rows {
                block: 64,
                first_block: 0,
                offsets: vec![0],
                segs: Vec::new(),
                idx: Vec::new(),
            };
            for i in 0..queries.end.div_ceil(64) as usize {
                rows.segs.push(all(rows.queries_of(i, &queries)));
                rows.offsets.push(i as u32 + 1);
            }
            Plan {
                unit: Unit::KvGroup,
                scope: Scope::Causal,
                units: vec![Cover::Sparse(rows); 2],
            }
        }
    }
    for cpu in Cpu::available() {
        for (dtype, n) in [(KvDtype::F32, 333), (KvDtype::Bf16, 1100)] {
            let case = Case::new((14, 2, 64), dtype, n);
            let planning = Planning::new(Some(Arc::new(Full)), None, usize::MAX);
            let (dense, sparse) = (
                case.run(cpu, None, (0, n)),
                case.run(cpu, Some(&planning), (0, n)),
            );
            assert!(dense == sparse, "{:?} {dtype:?}", cpu.path());
        }
    }
}

#[test]
fn stretches_make_no_difference_to_chunks_that_end_with_them() {
    let case = Case::new((6, 2, 64), KvDtype::Bf16, 1100);
    let make = || {
        planning(Lots {
            grain: 96,
            block: 32,
            unit: Unit::KvGroup,
            keep: 4,
            run: 3,
        })
    };
    let whole = make();
    let (want, _) = case.run(Cpu::best(), Some(&whole), (0, 1100));
    for steps in [1, 3, 5] {
        let chunked = make();
        let (mut got, mut from) = (Vec::new(), 0);
        while from < 1100 {
            let to = from + chunked.whole(from, (steps - 1) * 96 + 1, 1100 - from);
            got.extend(case.run(Cpu::best(), Some(&chunked), (from, to)).0);
            from = to;
        }
        assert!(got == want, "{steps} stretches a step");
        assert_eq!(chunked.density(), whole.density());
    }
}

#[test]
fn drawn_rows_are_dense() {
    let case = Case::new((4, 2, 32), KvDtype::F32, 200);
    let lots = Lots {
        grain: 32,
        block: 32,
        unit: Unit::KvGroup,
        keep: 1,
        run: 1,
    };
    let planning = Planning::new(Some(Arc::new(lots)), None, 160);
    let dense = case.run(Cpu::best(), None, (160, 200));
    assert!(case.run(Cpu::best(), Some(&planning), (160, 200)) == dense);
    assert_eq!(planning.density(), None);
}

/// Drawn rows that read a few single keys, chosen again at every eighth position, and all behind.
#[derive(Debug, Clone)]
struct Again {
    lots: Arc<Lots>,
    /// What it says of repeated keys.
    repeated: usize,
}

impl DecodePlanner for Again {
    fn start(&self) -> Box<dyn DecodeSteps> {
        Box::new(self.clone())
    }

    fn repeated(&self, _tokens: usize) -> usize {
        self.repeated
    }
}

impl DecodeSteps for Again {
    fn plan(&mut self, view: &PlanView<'_>) -> Plan {
        view.plan(Unit::KvGroup, |unit| {
            let mut builder = Builder::new(1, view.queries());
            for pos in view.queries() {
                let at = pos - pos % 8;
                let keep = (0..at).filter(|&k| self.lots.keeps(unit, at, k));
                builder.push(keep.map(|k| (k, k + 1)).chain([(at, pos)]));
            }
            builder.finish()
        })
    }
}

#[test]
fn copies_that_are_kept_from_token_to_token_change_no_bit() {
    let (n, prompt) = (6000, 5900);
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        let mut case = Case::new((6, 2, 32), dtype, n);
        let lots = Arc::new(Lots {
            grain: 1,
            block: 1,
            unit: Unit::KvGroup,
            keep: 14,
            run: 2,
        });
        let planning = |repeated: usize| {
            let lots = Arc::clone(&lots);
            Planning::new(None, Some(Arc::new(Again { lots, repeated })), prompt)
        };
        let (kept, none) = (planning(n / 4), planning(0));
        // Several rows of a step take turns with the copies.
        for (from, to) in [
            (5900, 5901),
            (5901, 5902),
            (5902, 5907),
            (5907, 5921),
            (5921, 5922),
            (5922, 5923),
        ] {
            let want = case.run(Cpu::best(), Some(&none), (from, to));
            assert!(
                case.run(Cpu::best(), Some(&kept), (from, to)) == want,
                "{dtype:?} {from}"
            );
        }
        let layout = case.pool.shape().layout();
        let bytes = kept.summary_bytes_now();
        assert!(bytes > 0 && bytes <= kept.summary_bytes(n, 2, layout));
        assert_eq!(
            (none.summary_bytes_now(), none.summary_bytes(n, 2, layout)),
            (0, 0)
        );

        // Other keys come behind position 5,000: copies of those before stay.
        let (rows, width) = (n - 5000, 2 * 32);
        case.pool.write(
            &case.seq,
            0,
            5000,
            &noise(77, rows * width),
            &noise(78, rows * width),
        );
        let want = case.run(Cpu::best(), Some(&none), (5922, 5923));
        assert!(
            case.run(Cpu::best(), Some(&kept), (5922, 5923)) != want,
            "copies are used"
        );
        kept.truncate(5000);
        assert!(kept.summary_bytes_now() > 0);
        assert!(case.run(Cpu::best(), Some(&kept), (5922, 5923)) == want);
        kept.truncate(0);
        assert_eq!(kept.summary_bytes_now(), 0);
    }
}

#[test]
fn plans_are_read_back_as_they_are_printed() {
    let case = Case::new((4, 2, 32), KvDtype::F32, 300);
    for unit in [Unit::QueryHead, Unit::KvGroup] {
        let planning = planning(Lots {
            grain: 128,
            block: 32,
            unit,
            keep: 9,
            run: 7,
        });
        case.run(Cpu::best(), Some(&planning), (0, 300));
        for planned in planning.take_plans() {
            let text = json::print(&planned);
            assert_eq!(json::parse(&text).unwrap(), planned, "{text}");
        }
    }
    let text = r#"{"layer":3,"queries":[576,640],"unit":"kv_group","units":[{"u":0,"cover":"sparse","block":64,"first_block":9,
        "rows":[{"b":9,"segs":[["span",0,64],["gather",[130,197,311]],["span",512,640,"causal"]]}]},{"u":1,"cover":"dense"}]}"#;
    let planned = json::parse(text).unwrap();
    let Cover::Sparse(rows) = &planned.plan.units[0] else {
        panic!("sparse");
    };
    assert_eq!(rows.keys(0).len(), 64 + 3 + 128);
    for (bad, why) in [
        (text.replace("197", "100"), "strictly ascending"),
        (text.replace("\"span\",0", "\"spam\",0"), "is no segment"),
        (text.replace("[576,640]", "[640,576]"), "no range"),
        (text.replace("[576,640]", "[576,4000000000]"), "no range"),
        (
            text.replace("64,\"first_block\"", "0,\"first_block\""),
            "first block",
        ),
        (text.replace("kv_group", "layer"), "not a plan"),
        (
            text.replace("\"u\":1", "\"u\":0"),
            "unit 0 stands where 1 belongs",
        ),
        (
            text.replace("\"b\":9", "\"b\":8"),
            "block 8 stands where 9 belongs",
        ),
    ] {
        let error = json::parse(&bad).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn means_of_keys_are_those_of_the_pages_whenever_they_are_asked() {
    let case = Case::new((4, 2, 32), KvDtype::F32, 300);
    let team = Team::new(1);
    let summaries = view::Summaries::of_kinds([Summary::Mean, Summary::Mean]);
    let rope = Rope::new(&[1.0; 8], RopeStyle::Neox);
    for rows in [40, 170, 300] {
        let mut all = case.view(Cpu::best(), &team);
        all.q = &all.q[..rows * 4 * 32];
        let view = PlanView {
            rows: all,
            rope: &rope,
            summaries: &summaries,
        };
        for (head, block) in [(0, 32), (1, 64), (0, 96)] {
            let means = view.mean_keys(head, block);
            assert_eq!(means.len(), rows.div_ceil(block) * 32);
            for (i, mean) in means.iter().enumerate() {
                let (b, d) = (i / 32, i % 32);
                let keys = b * block..rows.min((b + 1) * block);
                let n = keys.len() as f64;
                let want: f64 = keys
                    .map(|t| f64::from(view.page(head, t / 32).key(32, t % 32, d)))
                    .sum();
                assert!((f64::from(*mean) - want / n).abs() < 1e-6);
            }
        }
        // Of the layer's two heads, full pages only.
        assert_eq!(summaries.bytes(), summaries.bytes_for(rows, 2, 32));
        assert_eq!(summaries.bytes(), rows / 32 * 2 * 32 * 4);
    }
}

#[test]
fn the_largest_scores_of_listed_keys_are_those_of_whole_pages_bit_for_bit() {
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        let case = Case::new((4, 2, 32), dtype, 300);
        let team = Team::new(1);
        let summaries = view::Summaries::default();
        let rope = Rope::new(&[1.0; 8], RopeStyle::Neox);
        for (cpu, step) in Cpu::available()
            .into_iter()
            .flat_map(|cpu| [(cpu, 1), (cpu, 100)])
        {
            let view = PlanView {
                rows: case.view(cpu, &team),
                rope: &rope,
                summaries: &summaries,
            };
            // Many queries have single keys copied, few have pages scored where they lie.
            let q: Vec<f32> = (0..300)
                .step_by(step)
                .flat_map(|row| view.query(row, 3))
                .collect();
            let mut all = vec![f32::NEG_INFINITY; 320];
            let pages = (0..10).map(|page| view.page(1, page));
            scores_each(cpu, 32, &q, pages, |page, scores| {
                for row in scores {
                    let all = all[page * 32..].iter_mut();
                    all.zip(row).for_each(|(most, s)| *most = most.max(*s));
                }
            });
            // Whole pages, pages of which many keys are asked for, and more single keys than a page has.
            for keep in [1, 2, 3, 4, 5, 29, 97] {
                let keys: Vec<u32> = (0..300u32)
                    .filter(|k| k % keep == 0 || (64..77).contains(k))
                    .collect();
                let want: Vec<f32> = keys.iter().map(|&k| all[k as usize]).collect();
                assert_eq!(view.largest_scores(1, &q, &keys), want, "every {keep}th key");
            }
            assert!(view.largest_scores(1, &q, &[]).is_empty());
            for keys in [0..300, 0..32, 5..6, 31..33, 64..290, 40..40] {
                assert_eq!(view.largest_scores_between(1, &q, keys.clone()), all[keys]);
            }
        }
    }
}

#[test]
fn watching_changes_no_bit_and_measures_the_kept_weights() {
    let case = Case::new((4, 2, 32), KvDtype::F32, 200);
    let lots = |keep| Lots {
        grain: 100,
        block: 32,
        unit: Unit::KvGroup,
        keep,
        run: 1,
    };
    let watch = |keep| Planning::new(Some(Arc::new(lots(keep))), None, usize::MAX).watching(3);
    let (some, all) = (watch(10), watch(64));
    let dense = case.run(Cpu::best(), None, (0, 200));
    for planning in [&some, &all] {
        assert!(case.run(Cpu::best(), Some(planning), (0, 200)) == dense);
    }
    assert!(all.take_plans().iter().all(|p| p.recall == Some(1.0)));
    let team = Team::new(1);
    let view = case.view(Cpu::best(), &team);
    for planned in some.take_plans() {
        let Range { start, end } = planned.queries;
        let rows: Vec<usize> = (0..3)
            .map(|i| (start + (2 * i + 1) * (end - start) / 6) as usize)
            .collect();
        let (mut kept, mut count) = (0.0, 0);
        for head in 0..4 {
            let Cover::Sparse(cover) = &planned.plan.units[head / 2] else {
                panic!("sparse");
            };
            view.each_row(head, &rows, &mut |row, weights| {
                let keys = cover.keys(row / 32 - cover.first_block as usize);
                kept += keys.iter().map(|&k| f64::from(weights.at(k))).sum::<f64>();
                count += 1;
            });
        }
        let want = kept / f64::from(count);
        assert!(
            want < 0.9 && (planned.recall.unwrap() - want).abs() < 1e-5,
            "{:?} {want}",
            planned.recall
        );
    }
}

#[test]
fn a_picture_shows_what_is_read() {
    let planned = Planned {
        layer: 2,
        queries: 0..64,
        plan: Plan {
            unit: Unit::KvGroup,
            scope: Scope::Causal,
            units: vec![Cover::a_shape(16, 0..64, 4, 16); 2],
        },
        recall: None,
    };
    assert_eq!(picture(&[planned], 2, 3, 2), "/\n#/\n:#/\n:.#/\n");
    assert_eq!(picture(&[], 2, 3, 2), "");
}
