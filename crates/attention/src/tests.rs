use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_kernels::attend::KvDtype;
use antefix_kernels::cpu::Cpu;
use antefix_kernels::ops::{Rope, RopeStyle};
use antefix_kernels::team::Team;
use antefix_kv::{KvShape, Pool, SeqKv};
use antefix_state::PAGE_ROWS;
use antefix_state::plan::{Cover, Plan, Unit};

use super::*;
use crate::method::Planner;
use crate::sparse::{PlanView, Planning};

const HEADS: usize = 6;
const SHAPE: KvShape = KvShape {
    layers: 1,
    kv_heads: 2,
    dim: 16,
    dtype: KvDtype::F32,
};

const PLAIN: Geometry = Geometry {
    heads: HEADS,
    kv_heads: SHAPE.kv_heads,
    dim: SHAPE.dim,
    scale: 0.25,
    softcap: None,
    window: None,
};

/// Rotation of whole heads.
fn rope() -> Rope {
    let frequencies: Vec<f32> = (0..SHAPE.dim / 2)
        .map(|i| 1e4f32.powf(-2.0 * i as f32 / SHAPE.dim as f32))
        .collect();
    Rope::new(&frequencies, RopeStyle::Neox)
}

/// `n` values in [-1, 1) that depend on the seed alone.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n + 8).map(|_| next()).skip(8).collect()
}

/// Sequences whose last `rows` keys belong to the rows of the batch.
struct Batch {
    pool: Pool,
    seqs: Vec<(SeqKv, usize)>,
}

impl Batch {
    fn new() -> Self {
        Self {
            pool: Pool::new(SHAPE, 1 << 26),
            seqs: Vec::new(),
        }
    }

    /// Writes `n` more keys of the sequence, made from `seed`.
    fn write(pool: &mut Pool, seq: &mut SeqKv, n: usize, seed: u64) {
        let width = SHAPE.kv_heads * SHAPE.dim;
        pool.reserve(seq, n).unwrap();
        pool.write(
            seq,
            0,
            seq.len(),
            &noise(seed, n * width),
            &noise(seed + 1, n * width),
        );
    }

    /// A root of `len` keys: nothing of it is in the batch.
    fn root(&mut self, len: usize, seed: u64) -> SeqKv {
        let mut seq = SeqKv::new(SHAPE);
        Self::write(&mut self.pool, &mut seq, len, seed);
        seq.commit(len);
        seq
    }

    /// A branch of `root` with `own` keys of its own and `rows` rows in the batch.
    fn branch(&mut self, root: &SeqKv, own: usize, rows: usize) {
        let seed = 1000 * (self.seqs.len() as u64 + 1);
        let mut seq = self.pool.fork(root).unwrap();
        Self::write(&mut self.pool, &mut seq, own, seed);
        seq.commit(own);
        Self::write(&mut self.pool, &mut seq, rows, seed + 10);
        self.seqs.push((seq, rows));
    }

    /// Queries of sequence `i` at its row `r`.
    fn query(i: usize, r: usize) -> Vec<f32> {
        noise(77 + 1000 * i as u64 + r as u64, HEADS * SHAPE.dim)
    }

    /// Attends the given (sequence, from row, to row) parts together.
    fn run(&self, threads: usize, geometry: &Geometry, parts: &[(usize, usize, usize)]) -> Vec<Vec<f32>> {
        self.run_under(threads, geometry, parts, |_| None)
    }

    /// The same, each sequence under its planning.
    fn run_under<'a>(
        &'a self,
        threads: usize,
        geometry: &Geometry,
        parts: &[(usize, usize, usize)],
        planning: impl Fn(usize) -> Option<&'a Planning>,
    ) -> Vec<Vec<f32>> {
        let mut seqs = Vec::new();
        let mut q = Vec::new();
        let mut first = 0;
        for &(i, from, to) in parts {
            seqs.push(SeqRows {
                kv: &self.seqs[i].0,
                first,
                rows: to - from,
                pos0: (self.seqs[i].0.len() + from) as u32,
                extra: Extra {
                    planning: planning(i),
                    ..Extra::default()
                },
            });
            first += to - from;
            (from..to).for_each(|r| q.extend(Self::query(i, r)));
        }
        let mut out = vec![f32::NAN; q.len()];
        let team = Team::new(threads);
        let sharing = Sharing::of(&seqs);
        let mut scratch = Scratch::default();
        let cpu = (Cpu::from_env().unwrap(), &team);
        attend(
            cpu,
            &self.pool,
            (0, &rope()),
            geometry,
            (&seqs, &sharing),
            &q,
            &mut out,
            &mut scratch,
        )
        .unwrap();
        out.chunks(HEADS * SHAPE.dim).map(<[f32]>::to_vec).collect()
    }

    fn whole(&self) -> Vec<(usize, usize, usize)> {
        self.seqs.iter().enumerate().map(|(i, s)| (i, 0, s.1)).collect()
    }

    /// Softmax attention in f64, straight from the definition.
    fn naive(&self, geometry: &Geometry, i: usize, r: usize) -> Vec<f32> {
        let (seq, q) = (&self.seqs[i].0, Self::query(i, r));
        let pos = seq.len() + r;
        let lo = geometry
            .window
            .map_or(0, |w| (pos + 1).saturating_sub(w as usize));
        let mut out = Vec::new();
        for head in 0..HEADS {
            let pages = seq.pages(0, head * SHAPE.kv_heads / HEADS);
            let q = &q[head * SHAPE.dim..][..SHAPE.dim];
            let mut weights = Vec::new();
            for t in lo..=pos {
                let page = self.pool.page(pages[t / PAGE_ROWS]);
                let dot: f64 = q
                    .iter()
                    .enumerate()
                    .map(|(d, &x)| f64::from(x) * f64::from(page.key(SHAPE.dim, t % PAGE_ROWS, d)))
                    .sum();
                let score = dot * f64::from(geometry.scale);
                weights.push(
                    geometry
                        .softcap
                        .map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh())
                        .exp(),
                );
            }
            let sum: f64 = weights.iter().sum();
            for d in 0..SHAPE.dim {
                let value = |t: usize| {
                    let page = self.pool.page(pages[t / PAGE_ROWS]);
                    f64::from(page.value(SHAPE.dim, t % PAGE_ROWS, d))
                };
                let dot: f64 = weights.iter().enumerate().map(|(j, w)| w * value(lo + j)).sum();
                out.push((dot / sum) as f32);
            }
        }
        out
    }
}

/// Two prompts, one with a longer common part under it; decoding rows, short and long chunks beside each other.
fn tree() -> Batch {
    let mut b = Batch::new();
    let long = b.root(1100, 1);
    let short = b.root(70, 2);
    b.branch(&long, 0, 1);
    b.branch(&long, 5, 1);
    b.branch(&short, 33, 3);
    b.branch(&long, 64, 40);
    b.branch(&short, 0, 1);
    b.branch(&long, 1000, 2);
    b.pool.release(long);
    b.pool.release(short);
    b
}

fn geometries() -> [Geometry; 3] {
    [
        PLAIN,
        Geometry {
            window: Some(50),
            ..PLAIN
        },
        Geometry {
            softcap: Some(2.0),
            ..PLAIN
        },
    ]
}

#[test]
fn a_batch_is_softmax_attention() {
    let b = tree();
    for g in geometries() {
        let out = b.run(2, &g, &b.whole());
        let rows = b
            .whole()
            .into_iter()
            .flat_map(|(i, from, to)| (from..to).map(move |r| (i, r)));
        for ((i, r), got) in rows.zip(&out) {
            for (x, y) in got.iter().zip(b.naive(&g, i, r)) {
                assert!((x - y).abs() < 2e-6, "sequence {i}, row {r}: {x} for {y} ({g:?})");
            }
        }
    }
}

#[test]
fn a_row_gets_the_same_bits_whoever_is_beside_it() {
    let b = tree();
    let bits = |rows: &[Vec<f32>]| -> Vec<u32> { rows.iter().flatten().map(|x| x.to_bits()).collect() };
    for g in geometries() {
        let together = b.run(2, &g, &b.whole());
        // Row by row alone; then in chunks of 7, which take another way through the tree.
        for chunk in [1, 7] {
            let mut apart = Vec::new();
            for (i, _, rows) in b.whole() {
                for from in (0..rows).step_by(chunk) {
                    apart.extend(b.run(1, &g, &[(i, from, rows.min(from + chunk))]));
                }
            }
            assert_eq!(bits(&together), bits(&apart), "chunks of {chunk}, {g:?}");
        }
    }
}

/// Rows read everything, or the first key, the last ten and their own.
#[derive(Debug)]
enum Reads {
    Everything,
    Few,
}

impl Planner for Reads {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::MIN
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        match self {
            Self::Everything => view.dense(),
            Self::Few => view.plan(Unit::KvGroup, |_| Cover::a_shape(1, view.queries(), 1, 10)),
        }
    }
}

fn planning(reads: Reads) -> Planning {
    Planning::new(Some(Arc::new(reads)), None, usize::MAX)
}

#[test]
fn shared_pages_are_read_once_whether_rows_are_planned_or_not() {
    let mut b = Batch::new();
    let root = b.root(20 * PAGE_ROWS, 3);
    for _ in 0..8 {
        b.branch(&root, 3, 1);
    }
    let planning = planning(Reads::Everything);
    let rows = |k: usize| SeqRows {
        kv: &b.seqs[k].0,
        first: k,
        rows: 1,
        pos0: b.seqs[k].0.len() as u32,
        extra: Extra {
            planning: k.is_multiple_of(2).then_some(&planning),
            ..Extra::default()
        },
    };
    let seqs: Vec<SeqRows<'_>> = (0..8).map(rows).collect();
    assert_eq!(Sharing::of(&seqs).pages_read(), (20 + 8, 21 * 8));
    // In a layer where two of them read keys of their own choice, the other six share theirs.
    let others = Sharing::but_for(&seqs, |i| i < 2);
    assert_eq!(
        (others.pages_read(), &others.own[..]),
        ((20 + 6, 21 * 6), &[0, 1][..])
    );
}

#[test]
fn planned_rows_beside_others_on_the_same_pages_get_the_bits_they_get_alone() {
    let mut b = Batch::new();
    let root = b.root(1100, 3);
    for rows in [1, 3, 1, 20, 2, 1] {
        b.branch(&root, 3, rows);
    }
    let (everything, few) = (planning(Reads::Everything), planning(Reads::Few));
    let of = |i: usize| {
        [
            None,
            Some(&few),
            Some(&everything),
            Some(&few),
            None,
            Some(&everything),
        ][i]
    };
    for g in geometries() {
        let together = b.run_under(2, &g, &b.whole(), of);
        let mut alone = Vec::new();
        for part in b.whole() {
            alone.extend(b.run_under(1, &g, &[part], of));
        }
        assert_eq!(together, alone, "{g:?}");
        let dense = b.run(2, &g, &b.whole());
        let changed: Vec<bool> = together.iter().zip(&dense).map(|(x, y)| x != y).collect();
        // Rows 1 to 3 and 5 to 24 are those that read few keys; layers with a window are never planned.
        let want: Vec<bool> = (0..28)
            .map(|r| g.window.is_none() && ((1..4).contains(&r) || (5..25).contains(&r)))
            .collect();
        assert_eq!(changed, want, "{g:?}");
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let b = tree();
    let team = Team::new(1);
    let seqs = [SeqRows {
        kv: &b.seqs[0].0,
        first: 0,
        rows: 1,
        pos0: b.seqs[0].0.len() as u32,
        extra: Extra::default(),
    }];
    let mut out = vec![0.0; HEADS * SHAPE.dim];
    let cpu = (Cpu::from_env().unwrap(), &team);
    let sharing = Sharing::of(&seqs);
    let e = attend(
        cpu,
        &b.pool,
        (0, &rope()),
        &PLAIN,
        (&seqs, &sharing),
        &[0.0; 5],
        &mut out,
        &mut Scratch::default(),
    );
    assert_eq!(
        e,
        Err(AttendError::Shape {
            what: "q",
            got: 5,
            want: HEADS * SHAPE.dim
        })
    );
}
