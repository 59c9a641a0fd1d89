//! What choosing keys costs a drawn token: `cargo run --release -p antefix-papers --example decode_plans`.
//!
//! All layers of a model of the shape of Qwen2.5-0.5B (or `--shape smollm2`) behind `n` made-up keys; nothing but attention is computed. Each
//! method draws `--steps` tokens, in turns with dense attention. One JSON line a method and length: microseconds of a token, all layers
//! together, the median of `--runs`: `attn_us` of attention, of which `plan_us` chose keys, and `dense_us` of dense attention; `density`
//! is the share of keys that was read. Behind the options come methods, `NAME[,knob=value..]`; without, all that plan drawn tokens. Lengths:
//! `--lengths 16384,32768`.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use antefix_attention::method::{
    Axis, Chosen, DecodePlanner, Facts, Knobs, LayerFacts, Profiles, RawChoice, Rig, find,
};
use antefix_attention::sparse::Planning;
use antefix_attention::{Extra, Geometry, Scratch, SeqRows, Sharing, attend};
use antefix_kernels::cpu::Cpu;
use antefix_kernels::ops::{Rope, RopeStyle};
use antefix_kernels::team::Team;
use antefix_kv::{KvDtype, KvShape, Pool, SeqKv};
use serde_json::json;

/// Layers, heads, KV heads, dimensions of a head.
const SHAPES: [(&str, [usize; 4]); 2] = [("qwen2.5-0.5b", [24, 14, 2, 64]), ("smollm2", [30, 9, 3, 64])];

struct Bench {
    cpu: Cpu,
    team: Team,
    rope: Rope,
    pool: Pool,
    seq: SeqKv,
    layers: usize,
    geometry: Geometry,
    /// Queries of a step, by layer.
    q: Vec<f32>,
    prompt: usize,
    steps: usize,
}

impl Bench {
    fn new([layers, heads, kv_heads, dim]: [usize; 4], prompt: usize, steps: usize) -> Self {
        let shape = KvShape {
            layers,
            kv_heads,
            dim,
            dtype: KvDtype::Bf16,
        };
        let n = prompt + steps + 1;
        let mut pool = Pool::new(shape, 4 << 30);
        let mut seq = SeqKv::new(shape);
        pool.reserve(&mut seq, n).unwrap();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut noise = |n: usize| (0..n).map(|_| rng.f32() * 2.0 - 1.0).collect::<Vec<_>>();
        for layer in 0..layers {
            let (k, v) = (noise(n * kv_heads * dim), noise(n * kv_heads * dim));
            pool.write(&seq, layer, 0, &k, &v);
        }
        seq.commit(n);
        Self {
            cpu: Cpu::from_env().unwrap(),
            team: Team::new(std::thread::available_parallelism().map_or(1, usize::from)),
            rope: Rope::new(&[1.0], RopeStyle::Neox),
            pool,
            seq,
            layers,
            geometry: Geometry {
                heads,
                kv_heads,
                dim,
                scale: (dim as f32).powf(-0.5),
                softcap: None,
                window: None,
            },
            q: noise(layers * heads * dim),
            prompt,
            steps,
        }
    }

    /// The planner of a method with these settings, on a model of this shape.
    fn planner(&self, text: &str) -> Arc<dyn DecodePlanner> {
        let g = self.geometry;
        let layer = LayerFacts {
            window: None,
            rope_base: 1e6,
            rope_dims: g.dim,
        };
        let facts = Facts {
            heads: g.heads,
            kv_heads: g.kv_heads,
            dim: g.dim,
            scale: g.scale,
            layers: vec![layer; self.layers],
            ..Facts::example()
        };
        let raw = RawChoice::parse(text).unwrap();
        let method = find(antefix_papers::ALL, &raw.name).unwrap_or_else(|e| panic!("{e}"));
        let knobs = Knobs::new(method.card(), &raw.knobs).unwrap_or_else(|e| panic!("{e}"));
        let program = Rig::assemble(&facts, &Profiles::default(), &[Chosen { method, knobs }]);
        let program = program.unwrap_or_else(|e| panic!("{e}"));
        let planner = program.decode_planner();
        Arc::clone(planner.unwrap_or_else(|| panic!("{text} plans no drawn tokens")))
    }

    /// Microseconds of a token: all of attention, and the planner's part; and the density.
    fn once(&self, planner: Option<&Arc<dyn DecodePlanner>>, scratch: &mut Scratch) -> (f64, f64, f64) {
        let planning = planner.map(|p| Planning::new(None, Some(Arc::clone(p)), self.prompt));
        let width = self.geometry.heads * self.geometry.dim;
        let mut out = vec![0.0; width];
        let planned = || planning.as_ref().map_or(Duration::ZERO, Planning::time);
        // What is made once, of all keys, with the first token is not counted.
        let (mut started, mut made) = (Instant::now(), Duration::ZERO);
        for step in 0..=self.steps {
            if step == 1 {
                (started, made) = (Instant::now(), planned());
            }
            let rows = [SeqRows {
                kv: &self.seq,
                first: 0,
                rows: 1,
                pos0: (self.prompt + step) as u32,
                extra: Extra {
                    planning: planning.as_ref(),
                    ..Extra::default()
                },
            }];
            let sharing = Sharing::of(&rows);
            for (layer, q) in self.q.chunks_exact(width).enumerate() {
                attend(
                    (self.cpu, &self.team),
                    &self.pool,
                    (layer, &self.rope),
                    &self.geometry,
                    (&rows, &sharing),
                    q,
                    &mut out,
                    scratch,
                )
                .unwrap();
            }
        }
        let us = |spent: Duration| spent.as_secs_f64() * 1e6 / self.steps as f64;
        let (all, planned) = (us(started.elapsed()), us(planned().saturating_sub(made)));
        (
            all,
            planned,
            planning.and_then(|p| p.decode_density()).unwrap_or(1.0),
        )
    }

    fn case(&self, shape: &str, method: &str, runs: usize) {
        let planner = self.planner(method);
        let mut scratch = Scratch::default();
        let (mut dense, mut attn, mut plan, mut kept) = (Vec::new(), Vec::new(), Vec::new(), 1.0);
        for _ in 0..runs {
            dense.push(self.once(None, &mut scratch).0);
            let (all, planned, density) = self.once(Some(&planner), &mut scratch);
            attn.push(all);
            plan.push(planned);
            kept = density;
        }
        println!(
            "{}",
            json!({
                "test": "decode_plans", "shape": shape, "method": method, "length": self.prompt, "threads": self.team.threads(),
                "path": self.cpu.path().name(), "density": kept, "attn_us": median(attn).round(), "plan_us": median(plan).round(),
                "dense_us": median(dense).round(),
            })
        );
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let mut args = std::env::args().skip(1).peekable();
    let (mut shape, mut lengths, mut steps, mut runs) =
        ("qwen2.5-0.5b".to_string(), "16384".to_string(), 16, 5);
    while let Some(name) = args.next_if(|a| a.starts_with("--")) {
        let value = args.next().unwrap_or_else(|| panic!("{name} wants a value"));
        match name.as_str() {
            "--shape" => shape = value,
            "--lengths" => lengths = value,
            "--steps" => steps = value.parse().unwrap(),
            "--runs" => runs = value.parse().unwrap(),
            _ => panic!("no option {name}"),
        }
    }
    let mut methods: Vec<String> = args.collect();
    if methods.is_empty() {
        let decode = antefix_papers::ALL
            .iter()
            .map(|m| m.card())
            .filter(|c| c.axis == Axis::Decode);
        methods = decode.map(|card| card.name.to_string()).collect();
    }
    let sizes = SHAPES
        .iter()
        .find(|s| s.0 == shape)
        .unwrap_or_else(|| panic!("no shape {shape}"))
        .1;
    for n in lengths.split(',').map(|n| n.parse().unwrap()) {
        let bench = Bench::new(sizes, n, steps);
        methods.iter().for_each(|method| bench.case(&shape, method, runs));
    }
}
