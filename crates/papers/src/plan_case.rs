//! Queries and keys of a prompt, given or random, for tests of planners against their references.

use std::ops::Range;
use std::sync::Arc;

use antefix_attention::method::{
    Chosen, Cover, DecodePlanner, Facts, Knobs, Method, Planner, Profiles, Program, RawChoice, Rig, RigError,
    Unit,
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

/// Layers of a sequence of `n` tokens.
pub(crate) struct PlanCase {
    pub(crate) geometry: Geometry,
    pub(crate) n: usize,
    pool: Pool,
    seq: SeqKv,
    /// By layer: queries `[n, Hq, D]` and keys `[n, Hk, D]`.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

/// Heads, KV heads, dimension.
#[derive(Clone, Copy)]
pub(crate) struct Shape(pub(crate) usize, pub(crate) usize, pub(crate) usize);

impl PlanCase {
    /// Queries `[n, Hq, D]` and keys `[n, Hk, D]`. Heads are filled up with zeros to what the kernels take; the scale stays.
    pub(crate) fn new(shape: Shape, q: &[f32], k: &[f32]) -> Self {
        Self::layered(shape, &[(q.to_vec(), k.to_vec())])
    }

    /// The same for several layers.
    pub(crate) fn layered(Shape(heads, kv_heads, own): Shape, layers: &[(Vec<f32>, Vec<f32>)]) -> Self {
        let dim = own.next_multiple_of(16);
        let fill = |x: &[f32]| -> Vec<f32> {
            let zeros = std::iter::repeat_n(0.0, dim - own);
            let row = |row: &[f32]| row.iter().copied().chain(zeros.clone()).collect::<Vec<_>>();
            x.chunks_exact(own).flat_map(row).collect()
        };
        let layers: Vec<(Vec<f32>, Vec<f32>)> = layers.iter().map(|(q, k)| (fill(q), fill(k))).collect();
        let n = layers[0].1.len() / (kv_heads * dim);
        let shape = KvShape {
            layers: layers.len(),
            kv_heads,
            dim,
            dtype: KvDtype::F32,
        };
        let mut pool = Pool::new(shape, 64 << 20);
        let mut seq = SeqKv::new(shape);
        pool.reserve(&mut seq, n).expect("enough memory");
        for (layer, (_, k)) in layers.iter().enumerate() {
            pool.write(&seq, layer, 0, k, k);
        }
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
            layers,
        }
    }

    /// Random ones that drift, so that neighbours resemble each other; values of about -2 to 2.
    pub(crate) fn random(seed: u64, shape: Shape, n: usize) -> Self {
        Self::random_layers(seed, shape, n, 1)
    }

    /// The same for several layers.
    pub(crate) fn random_layers(seed: u64, shape: Shape, n: usize, layers: usize) -> Self {
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
        let layers: Vec<_> = (0..layers).map(|_| (drift(shape.0), drift(shape.1))).collect();
        Self::layered(shape, &layers)
    }

    /// Random ones that drift, in eighths: products are exact, so that it is known which scores are equal.
    pub(crate) fn exact_layers(
        seed: u64,
        Shape(heads, kv_heads, dim): Shape,
        n: usize,
        layers: usize,
    ) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut drift = |heads: usize| {
            let mut at = vec![0i32; heads * dim];
            let mut out = Vec::with_capacity(n * at.len());
            for _ in 0..n {
                for x in &mut at {
                    *x = (*x + rng.i32(-2..3)).clamp(-16, 16);
                    out.push((*x + rng.i32(-4..5)) as f32 / 8.0);
                }
            }
            out
        };
        let layers: Vec<_> = (0..layers).map(|_| (drift(heads), drift(kv_heads))).collect();
        Self::layered(Shape(heads, kv_heads, dim), &layers)
    }

    /// Queries of a head of the first layer, `[n][D]`.
    pub(crate) fn queries(&self, head: usize) -> Vec<Vec<f64>> {
        self.queries_of(0, head)
    }

    /// Keys of a KV head of the first layer, `[n][D]`.
    pub(crate) fn keys(&self, head: usize) -> Vec<Vec<f64>> {
        self.keys_of(0, head)
    }

    /// Queries of a head of a layer, `[n][D]`.
    pub(crate) fn queries_of(&self, layer: usize, head: usize) -> Vec<Vec<f64>> {
        rows(
            &self.layers[layer].0,
            self.geometry.heads,
            self.geometry.dim,
            head,
        )
    }

    /// Keys of a KV head of a layer, `[n][D]`.
    pub(crate) fn keys_of(&self, layer: usize, head: usize) -> Vec<Vec<f64>> {
        rows(
            &self.layers[layer].1,
            self.geometry.kv_heads,
            self.geometry.dim,
            head,
        )
    }

    /// Its first `n` tokens.
    pub(crate) fn first(&self, n: usize) -> Self {
        let g = self.geometry;
        let cut = |(q, k): &(Vec<f32>, Vec<f32>)| {
            (
                q[..n * g.heads * g.dim].to_vec(),
                k[..n * g.kv_heads * g.dim].to_vec(),
            )
        };
        let layers: Vec<_> = self.layers.iter().map(cut).collect();
        let mut case = Self::layered(Shape(g.heads, g.kv_heads, g.dim), &layers);
        case.geometry = g;
        case
    }

    /// The plans of a prompt, computed at once: by layer, one a stretch.
    pub(crate) fn plans(&self, planner: &Arc<dyn Planner>) -> Vec<Planned> {
        self.plans_from(planner, 0)
    }

    /// The same of the rows from `from` on: those before them came out of a cache.
    pub(crate) fn plans_from(&self, planner: &Arc<dyn Planner>, from: usize) -> Vec<Planned> {
        let planning = Planning::new(Some(Arc::clone(planner)), None, usize::MAX).recording();
        for layer in 0..self.layers.len() {
            self.attend(&planning, layer, from..self.n);
        }
        planning.take_plans()
    }

    /// The plans of all layers of the rows from `prompt` on, which were drawn: by layer within steps of `step` rows.
    pub(crate) fn decode(
        &self,
        planner: &Arc<dyn DecodePlanner>,
        prompt: usize,
        step: usize,
    ) -> Vec<Planned> {
        let steps = (prompt..self.n).step_by(step);
        self.decode_steps(planner, prompt, steps.map(|from| from..(from + step).min(self.n)))
    }

    /// The same in these steps.
    pub(crate) fn decode_steps(
        &self,
        planner: &Arc<dyn DecodePlanner>,
        prompt: usize,
        steps: impl IntoIterator<Item = Range<usize>>,
    ) -> Vec<Planned> {
        let planning = Planning::new(None, Some(Arc::clone(planner)), prompt).recording();
        for rows in steps {
            for layer in 0..self.layers.len() {
                self.attend(&planning, layer, rows.clone());
            }
        }
        planning.take_plans()
    }

    fn attend(&self, planning: &Planning, layer: usize, rows: Range<usize>) {
        let width = self.geometry.heads * self.geometry.dim;
        let q = &self.layers[layer].0[rows.start * width..rows.end * width];
        let seqs = [SeqRows {
            kv: &self.seq,
            first: 0,
            rows: rows.len(),
            pos0: rows.start as u32,
            extra: Extra {
                planning: Some(planning),
                ..Extra::default()
            },
        }];
        let (team, mut out) = (Team::new(2), vec![0.0; q.len()]);
        let rope = Rope::new(&[1.0; 4], RopeStyle::Neox);
        attend(
            (Cpu::best(), &team),
            &self.pool,
            (layer, &rope),
            &self.geometry,
            (&seqs, &Sharing::of(&seqs)),
            q,
            &mut out,
            &mut Scratch::default(),
        )
        .expect("shapes fit");
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

/// Cases of a random test: `ANTEFIX_CASES`, or `usual`.
pub(crate) fn cases(usual: usize) -> usize {
    let given = std::env::var("ANTEFIX_CASES").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// The planner of a method with these settings on the example model.
pub(crate) fn planner(method: &'static dyn Method, settings: &str) -> Arc<dyn Planner> {
    let program = program(method, settings);
    Arc::clone(program.planner().expect("it plans"))
}

/// The same of settings that may not go.
pub(crate) fn planner_with(method: &'static dyn Method, knobs: Knobs) -> Result<Arc<dyn Planner>, RigError> {
    let program = assemble(method, knobs)?;
    Ok(Arc::clone(program.planner().expect("it plans")))
}

/// The same for drawn tokens.
pub(crate) fn decode_planner(method: &'static dyn Method, settings: &str) -> Arc<dyn DecodePlanner> {
    let program = program(method, settings);
    Arc::clone(program.decode_planner().expect("it plans"))
}

fn program(method: &'static dyn Method, settings: &str) -> Program {
    let raw = RawChoice::parse(&format!("{},{settings}", method.card().name)).expect("well written");
    let knobs = Knobs::new(method.card(), &raw.knobs).expect("in range");
    assemble(method, knobs).expect("it goes")
}

fn assemble(method: &'static dyn Method, knobs: Knobs) -> Result<Program, RigError> {
    let chosen = [Chosen { method, knobs }];
    Rig::assemble(&Facts::example(), &Profiles::default(), &chosen)
}
