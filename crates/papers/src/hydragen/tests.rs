use antefix_attention::{Extra, Geometry, Scratch, SeqRows, Sharing, attend};
use antefix_kernels::attend::{KvDtype, bf16_to_f32, f32_to_bf16};
use antefix_kernels::cpu::{Cpu, Path};
use antefix_kernels::ops::{Rope, RopeStyle};
use antefix_kernels::team::Team;
use antefix_kv::{KvShape, Pool, SeqKv};

use super::reference::{self, Part, Segment, Vertex};

/// `n` values in [-1, 1) that depend on the seed alone.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n + 8).map(|_| next()).skip(8).collect()
}

/// Lengths of the segments of a tree: of the root, and below it.
struct Shape(usize, Vec<Shape>);

fn leaf(len: usize) -> Shape {
    Shape(len, Vec::new())
}

/// A tree in the pool and, head by head, for the reference.
struct Tree {
    pool: Pool,
    seqs: Vec<SeqKv>,
    heads: Vec<Vertex>,
    kv_heads: usize,
    dim: usize,
}

impl Tree {
    fn new(shape: &Shape, dtype: KvDtype, kv_heads: usize, dim: usize) -> Self {
        let kv = KvShape {
            layers: 1,
            kv_heads,
            dim,
            dtype,
        };
        let mut tree = Self {
            pool: Pool::new(kv, 1 << 28),
            seqs: Vec::new(),
            heads: Vec::new(),
            kv_heads,
            dim,
        };
        let start = SeqKv::new(kv);
        tree.heads = tree.grow(shape, &start, &mut 1);
        tree.pool.release(start);
        tree
    }

    fn grow(&mut self, shape: &Shape, parent: &SeqKv, seed: &mut u64) -> Vec<Vertex> {
        let (width, n) = (self.kv_heads * self.dim, shape.0);
        let (k, v) = (noise(*seed, n * width), noise(*seed + 1, n * width));
        *seed += 2;
        let mut seq = self.pool.fork(parent).unwrap();
        self.pool.reserve(&mut seq, n).unwrap();
        self.pool.write(&seq, 0, seq.len(), &k, &v);
        seq.commit(n);
        let dtype = self.pool.shape().dtype;
        let stored = |x: f32| match dtype {
            KvDtype::F32 => f64::from(x),
            KvDtype::Bf16 => f64::from(bf16_to_f32(f32_to_bf16(x))),
        };
        let rows = |data: &[f32], head: usize| -> Vec<Vec<f64>> {
            data.chunks(width)
                .map(|row| {
                    row[head * self.dim..(head + 1) * self.dim]
                        .iter()
                        .map(|&x| stored(x))
                        .collect()
                })
                .collect()
        };
        let mut heads: Vec<Vertex> = (0..self.kv_heads)
            .map(|head| Vertex {
                segment: Segment {
                    k: rows(&k, head),
                    v: rows(&v, head),
                },
                children: Vec::new(),
            })
            .collect();
        for child in &shape.1 {
            for (head, below) in heads.iter_mut().zip(self.grow(child, &seq, seed)) {
                head.children.push(below);
            }
        }
        if shape.1.is_empty() {
            self.seqs.push(seq);
        } else {
            self.pool.release(seq);
        }
        heads
    }

    fn rows(&self) -> Vec<SeqRows<'_>> {
        self.seqs
            .iter()
            .enumerate()
            .map(|(first, kv)| SeqRows {
                kv,
                first,
                rows: 1,
                pos0: kv.len() as u32 - 1,
                extra: Extra::default(),
            })
            .collect()
    }

    /// The engine's attention and the reference's, `[R, Hq, D]`, and the rows' sharing.
    fn both(&self, rep: usize, threads: usize, apart: bool) -> (Vec<f32>, Vec<f64>) {
        let (rows, dim) = (self.rows(), self.dim);
        let heads = self.kv_heads * rep;
        let q = noise(99, rows.len() * heads * dim);
        let geometry = Geometry {
            heads,
            kv_heads: self.kv_heads,
            dim,
            scale: (dim as f32).powf(-0.5),
            softcap: None,
            window: None,
        };
        let sharing = if apart {
            Sharing::apart(&rows)
        } else {
            Sharing::of(&rows)
        };
        let mut out = vec![f32::NAN; q.len()];
        attend(
            (Cpu::from_env().unwrap(), &Team::new(threads)),
            &self.pool,
            (0, &Rope::new(&[1.0], RopeStyle::Neox)),
            &geometry,
            (&rows, &sharing),
            &q,
            &mut out,
            &mut Scratch::default(),
        )
        .unwrap();
        let mut want = vec![0.0; out.len()];
        for head in 0..heads {
            let queries: Vec<Vec<f64>> = q
                .chunks(heads * dim)
                .map(|row| {
                    let scaled = |&x: &f32| f64::from(x * geometry.scale);
                    row[head * dim..(head + 1) * dim].iter().map(scaled).collect()
                })
                .collect();
            let parts = reference::decode(&self.heads[head / rep], &queries);
            for (r, part) in parts.iter().enumerate() {
                want[(r * heads + head) * dim..][..dim].copy_from_slice(&part.o);
            }
        }
        (out, want)
    }
}

/// Shapes like those of the official tests, and trees that it cannot express.
fn shapes() -> Vec<Shape> {
    vec![
        Shape(3, vec![leaf(6), leaf(7)]),
        Shape(129, vec![leaf(1), leaf(10), leaf(4), leaf(33)]),
        Shape(
            64,
            vec![
                Shape(96, vec![leaf(1), leaf(2), leaf(40)]),
                leaf(5),
                Shape(7, vec![Shape(32, vec![leaf(1), leaf(1)]), leaf(9)]),
            ],
        ),
        Shape(1100, (1..=20).map(leaf).collect()),
    ]
}

#[test]
fn its_card_is_complete_and_no_request_can_choose_it() {
    use antefix_attention::method::{Axis, RawMethods};
    antefix_conformance::method::card_and_page_are_complete(&super::CARD);
    assert_eq!(Axis::named(super::CARD.axis.name()), None);
    assert!(RawMethods::default().add(crate::ALL, "hydragen").is_err());
    let by_axis = r#"{"execution": "hydragen"}"#;
    assert!(serde_json::from_str::<RawMethods>(by_axis).is_err());
}

#[test]
fn the_engine_computes_the_papers_attention() {
    for (kv_heads, rep, dim) in [(1, 4, 256), (2, 7, 64), (3, 3, 64), (1, 1, 128)] {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            // Weights in bf16 on AMX.
            let tiles = Cpu::from_env().unwrap().path() == Path::Amx && dtype == KvDtype::Bf16;
            let tolerance = if tiles { 3e-3 } else { 1e-5 };
            for shape in shapes() {
                let (got, want) = Tree::new(&shape, dtype, kv_heads, dim).both(rep, 2, false);
                for (got, want) in got.iter().zip(&want) {
                    assert!(
                        (f64::from(*got) - want).abs() < tolerance,
                        "{dtype:?} D {dim}: {got} {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn company_changes_no_bit() {
    for shape in shapes() {
        let tree = Tree::new(&shape, KvDtype::Bf16, 2, 64);
        let bits = |out: Vec<f32>| -> Vec<u32> { out.iter().map(|x| x.to_bits()).collect() };
        let together = bits(tree.both(3, 2, false).0);
        assert_eq!(together, bits(tree.both(3, 2, true).0));
        assert_eq!(together, bits(tree.both(3, 1, false).0));
    }
}

#[test]
fn a_prefix_is_stored_and_read_once_whatever_the_batch() {
    let figures = |b: usize| {
        let tree = Tree::new(
            &Shape(640, (0..b).map(|_| leaf(32)).collect()),
            KvDtype::Bf16,
            1,
            64,
        );
        let (read, alone) = Sharing::of(&tree.rows()).pages_read();
        (read, alone, tree.pool.stats().bytes_used)
    };
    let (one, many) = (figures(1), figures(24));
    let page = 32 * 64 * 2 * 2;
    assert_eq!(many.0 - one.0, 23, "only the sequences' own pages");
    assert_eq!(many.1, 24 * one.1);
    assert_eq!(many.2 - one.2, 23 * page);
}

fn parts(seed: u64, n: usize) -> Vec<Part> {
    (0..n as u64)
        .map(|i| {
            let row = |s| -> Vec<f64> { noise(s, 8).into_iter().map(f64::from).collect() };
            let segment = Segment {
                k: (0..5).map(|t| row(seed + 100 * i + t)).collect(),
                v: (0..5).map(|t| row(seed + 100 * i + t + 50)).collect(),
            };
            reference::attend(&row(seed + 7), &segment)
        })
        .collect()
}

#[test]
fn parts_meet_in_any_order_and_grouping() {
    let close = |a: &Part, b: &Part| {
        assert!((a.lse - b.lse).abs() < 1e-12);
        assert!(a.o.iter().zip(&b.o).all(|(a, b)| (a - b).abs() < 1e-12));
    };
    let p = parts(3, 4);
    let whole = reference::combine(&p);
    let nobody = Part {
        o: vec![0.0; 8],
        lse: f64::NEG_INFINITY,
    };
    close(
        &reference::combine(&[p[3].clone(), p[1].clone(), p[0].clone(), p[2].clone()]),
        &whole,
    );
    let (left, right) = (reference::combine(&p[..1]), reference::combine(&p[1..]));
    close(&reference::combine(&[left, nobody.clone(), right]), &whole);
    assert_eq!(reference::combine(&[nobody.clone(), nobody.clone()]), nobody);
}

#[test]
fn a_constant_on_all_scores_moves_the_lse_alone() {
    for shift in [-1e4, 3.5, 1e4] {
        let p = parts(11, 3);
        let moved: Vec<Part> = p
            .iter()
            .map(|p| Part {
                o: p.o.clone(),
                lse: p.lse + shift,
            })
            .collect();
        let (a, b) = (reference::combine(&p), reference::combine(&moved));
        assert!((b.lse - a.lse - shift).abs() < 1e-9);
        assert!(
            a.o.iter()
                .zip(&b.o)
                .all(|(a, b)| (a - b).abs() < 1e-9 && b.is_finite())
        );
    }
}
