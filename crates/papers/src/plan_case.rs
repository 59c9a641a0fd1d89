//! Queries and keys of a prompt, given or random, for tests of planners against their references.

use std::sync::Arc;

use antefix_attention::method::{
    Chosen, Cover, Facts, Knobs, Method, Planner, Profiles, RawChoice, Rig, Unit,
};
use antefix_attention::sparse::{Planned, Planning};
use antefix_attention::{Extra, Geometry, Scratch, SeqRows, Sharing, attend};
use antefix_kernels::cpu::Cpu;
use antefix_kernels::ops::{Rope, RopeStyle};
use antefix_kernels::team::Team;
use antefix_kv::{KvDtype, KvShape, Pool, SeqKv};

/// The generator of golden vectors.
pub(crate) struct Lcg(pub(crate) u64);

impl Lcg {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        2.0 * (self.0 >> 40) as f64 / f64::from(1 << 24) - 1.0
    }

    /// Rows of a matrix, times `factor`.
    pub(crate) fn rows(&mut self, n: usize, dim: usize, factor: f64) -> Vec<Vec<f64>> {
        (0..n)
            .map(|_| (0..dim).map(|_| factor * self.next()).collect())
            .collect()
    }
}

/// One layer of a prompt of `n` tokens.
pub(crate) struct PlanCase {
    pub(crate) geometry: Geometry,
    pub(crate) n: usize,
    pool: Pool,
    seq: SeqKv,
    q: Vec<f32>,
    k: Vec<f32>,
}

/// Heads, KV heads, dimension.
#[derive(Clone, Copy)]
pub(crate) struct Shape(pub(crate) usize, pub(crate) usize, pub(crate) usize);

impl PlanCase {
    /// Queries `[n, Hq, D]` and keys `[n, Hk, D]`. Heads are filled up with zeros to what the kernels take; the scale stays.
    pub(crate) fn new(Shape(heads, kv_heads, own): Shape, q: &[f32], k: &[f32]) -> Self {
        let dim = own.next_multiple_of(16);
        let fill = |x: &[f32]| -> Vec<f32> {
            let row = |row: &[f32]| {
                row.iter()
                    .copied()
                    .chain(std::iter::repeat_n(0.0, dim - own))
                    .collect::<Vec<_>>()
            };
            x.chunks_exact(own).flat_map(row).collect()
        };
        let (q, k) = (fill(q), fill(k));
        let n = k.len() / (kv_heads * dim);
        let shape = KvShape {
            layers: 1,
            kv_heads,
            dim,
            dtype: KvDtype::F32,
        };
        let mut pool = Pool::new(shape, 64 << 20);
        let mut seq = SeqKv::new(shape);
        pool.reserve(&mut seq, n).expect("enough memory");
        pool.write(&seq, 0, 0, &k, &k);
        seq.commit(n);
        Self {
            geometry: Geometry {
                heads,
                kv_heads,
                dim,
                scale: (own as f32).powf(-0.5),
                softcap: None,
                window: None,
            },
            n,
            pool,
            seq,
            q,
            k,
        }
    }

    /// Random ones that drift, so that neighbours resemble each other; values of about -2 to 2.
    pub(crate) fn random(seed: u64, shape: Shape, n: usize) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut drift = |heads: usize| {
            let mut at = vec![0.0f32; heads * shape.2];
            let mut out = Vec::with_capacity(n * at.len());
            for _ in 0..n {
                at.iter_mut().for_each(|x| *x = 0.9 * *x + rng.f32() - 0.5);
                out.extend(at.iter().map(|x| x + rng.f32() * 2.0 - 1.0));
            }
            out
        };
        let (q, k) = (drift(shape.0), drift(shape.1));
        Self::new(shape, &q, &k)
    }

    /// Queries of a head, `[n][D]`.
    pub(crate) fn queries(&self, head: usize) -> Vec<Vec<f64>> {
        rows(&self.q, self.geometry.heads, self.geometry.dim, head)
    }

    /// Keys of a KV head, `[n][D]`.
    pub(crate) fn keys(&self, head: usize) -> Vec<Vec<f64>> {
        rows(&self.k, self.geometry.kv_heads, self.geometry.dim, head)
    }

    /// The plans of the prompt, computed at once: one a stretch.
    pub(crate) fn plans(&self, planner: &Arc<dyn Planner>) -> Vec<Planned> {
        let planning = Planning::new(Arc::clone(planner), usize::MAX).recording();
        let seqs = [SeqRows {
            kv: &self.seq,
            first: 0,
            rows: self.n,
            pos0: 0,
            extra: Extra {
                planning: Some(&planning),
                ..Extra::default()
            },
        }];
        let (team, mut out) = (Team::new(2), vec![0.0; self.q.len()]);
        let rope = Rope::new(&[1.0; 4], RopeStyle::Neox);
        attend(
            (Cpu::best(), &team),
            &self.pool,
            (0, &rope),
            &self.geometry,
            (&seqs, &Sharing::of(&seqs)),
            &self.q,
            &mut out,
            &mut Scratch::default(),
        )
        .expect("shapes fit");
        planning.take_plans()
    }

    /// The keys that each row of query head `head` reads under these plans.
    pub(crate) fn kept(&self, plans: &[Planned], head: usize) -> Vec<Vec<u32>> {
        let group = self.geometry.heads / self.geometry.kv_heads;
        let row = |planned: &Planned, pos: u32| -> Vec<u32> {
            let cover = match planned.plan.unit {
                Unit::QueryHead => &planned.plan.units[head],
                Unit::KvGroup => &planned.plan.units[head / group],
            };
            match cover {
                Cover::Dense => (0..=pos).collect(),
                Cover::Sparse(rows) => {
                    let keys = rows.keys((pos / rows.block - rows.first_block) as usize);
                    keys.into_iter().filter(|&k| k <= pos).collect()
                }
            }
        };
        let all = |planned: &Planned| {
            planned
                .queries
                .clone()
                .map(|pos| row(planned, pos))
                .collect::<Vec<_>>()
        };
        plans.iter().flat_map(all).collect()
    }
}

fn rows(x: &[f32], heads: usize, dim: usize, head: usize) -> Vec<Vec<f64>> {
    x.chunks_exact(heads * dim)
        .map(|row| row[head * dim..][..dim].iter().map(|&x| f64::from(x)).collect())
        .collect()
}

/// The planner of a method with these settings on the example model.
pub(crate) fn planner(method: &'static dyn Method, settings: &str) -> Arc<dyn Planner> {
    let raw = RawChoice::parse(&format!("{},{settings}", method.card().name)).expect("well written");
    let knobs = Knobs::new(method.card(), &raw.knobs).expect("in range");
    let program = Rig::assemble(
        &Facts::example(),
        &Profiles::default(),
        &[Chosen { method, knobs }],
    );
    let program = program.expect("it goes");
    Arc::clone(program.planner().expect("it plans"))
}
