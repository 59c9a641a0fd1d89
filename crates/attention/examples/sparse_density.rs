//! The cost of planned attention by the share of keys that it keeps: `cargo run --release -p antefix-attention --example sparse_density`.
//!
//! One layer, the last 1,024 rows of a prompt of `n` tokens, at the shapes of two models. For each density a random choice of key blocks of
//! 64 is executed, one for each query head or one for all that share keys, beside dense attention of the same rows. One JSON line a
//! case: `dense_us` and `sparse_us` are medians of runs in turns, without planning; `ideal_us` is dense time in proportion to the kept
//! pairs; `of_ideal` what is reached of it. Options: `--shape NAME`, `--lengths 4096,16384,32768`, `--run 64` keys side by side (1: single keys).
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use antefix_attention::method::{Builder, Plan, PlanView, Planner, Unit};
use antefix_attention::sparse::Planning;
use antefix_attention::{Extra, Geometry, Scratch, SeqRows, Sharing, attend};
use antefix_kernels::attend::KvDtype;
use antefix_kernels::cpu::Cpu;
use antefix_kernels::ops::{Rope, RopeStyle};
use antefix_kernels::team::Team;
use antefix_kv::{KvShape, Pool, SeqKv};
use serde_json::json;

const SHAPES: [(&str, usize, usize, usize); 2] = [("smollm2", 9, 3, 64), ("qwen2.5-0.5b", 14, 2, 64)];

/// Query rows of the stretch, and of a block of the plan.
const ROWS: usize = 1024;
const BLOCK: u32 = 64;

/// Keeps runs of keys by their hash.
#[derive(Debug)]
struct Random {
    unit: Unit,
    density: f64,
    run: u32,
}

impl Random {
    fn keeps(&self, unit: usize, block: u32, run: u32) -> bool {
        let mut x = ((unit as u64) << 40 | u64::from(block) << 20 | u64::from(run))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((x ^ x >> 27) as f64) < self.density * u64::MAX as f64
    }
}

impl Planner for Random {
    fn grain(&self) -> NonZeroUsize {
        NonZeroUsize::new(ROWS).unwrap()
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        view.plan(self.unit, |unit| {
            let mut builder = Builder::new(BLOCK, view.queries());
            while let Some(at) = builder.block() {
                let runs = (0..at.start / self.run).filter(|&r| self.keeps(unit, at.start, r));
                builder.push(runs.map(|r| (r * self.run, (r + 1) * self.run)));
            }
            builder.finish()
        })
    }
}

struct Bench {
    cpu: Cpu,
    team: Team,
    rope: Rope,
    pool: Pool,
    seq: SeqKv,
    geometry: Geometry,
    q: Vec<f32>,
}

impl Bench {
    fn new((heads, kv_heads, dim): (usize, usize, usize), n: usize) -> Self {
        let shape = KvShape {
            layers: 1,
            kv_heads,
            dim,
            dtype: KvDtype::Bf16,
        };
        let mut pool = Pool::new(shape, 1 << 30);
        let mut seq = SeqKv::new(shape);
        pool.reserve(&mut seq, n).unwrap();
        let noise = |n: usize, by: f32| (0..n).map(|i| (i as f32 * by).sin()).collect::<Vec<_>>();
        let keys = noise(n * kv_heads * dim + 1, 0.618);
        pool.write(&seq, 0, 0, &keys[..n * kv_heads * dim], &keys[1..]);
        seq.commit(n);
        Self {
            cpu: Cpu::from_env().unwrap(),
            team: Team::new(std::thread::available_parallelism().map_or(1, usize::from)),
            rope: Rope::new(&[1.0], RopeStyle::Neox),
            pool,
            seq,
            geometry: Geometry {
                heads,
                kv_heads,
                dim,
                scale: (dim as f32).powf(-0.5),
                softcap: None,
                window: None,
            },
            q: noise(ROWS * heads * dim, 0.37),
        }
    }

    /// Microseconds of one run, without planning, and the density.
    fn once(&self, planner: Option<Arc<dyn Planner>>, scratch: &mut Scratch, out: &mut [f32]) -> (f64, f64) {
        let n = self.seq.len();
        let planning = planner.map(|p| Planning::new(Some(p), None, n));
        let rows = [SeqRows {
            kv: &self.seq,
            first: 0,
            rows: ROWS,
            pos0: (n - ROWS) as u32,
            extra: Extra {
                planning: planning.as_ref(),
                ..Extra::default()
            },
        }];
        let sharing = Sharing::of(&rows);
        let started = Instant::now();
        attend(
            (self.cpu, &self.team),
            &self.pool,
            (0, &self.rope),
            &self.geometry,
            (&rows, &sharing),
            &self.q,
            out,
            scratch,
        )
        .unwrap();
        let spent = started
            .elapsed()
            .saturating_sub(planning.as_ref().map_or_else(Default::default, Planning::time));
        let density = planning.and_then(|p| p.density()).unwrap_or(1.0);
        (spent.as_secs_f64() * 1e6, density)
    }

    fn case(&self, shape: &str, unit: Unit, density: f64, run: u32) {
        let (mut scratch, mut out) = (Scratch::default(), vec![0.0; self.q.len()]);
        let planner: Arc<dyn Planner> = Arc::new(Random { unit, density, run });
        let (mut dense, mut sparse, mut kept) = (Vec::new(), Vec::new(), 1.0);
        let begin = Instant::now();
        while dense.len() < 5 || begin.elapsed().as_secs_f64() < 0.5 && dense.len() < 51 {
            dense.push(self.once(None, &mut scratch, &mut out).0);
            let (time, density) = self.once(Some(Arc::clone(&planner)), &mut scratch, &mut out);
            sparse.push(time);
            kept = density;
        }
        let (dense_us, sparse_us) = (median(dense), median(sparse));
        println!(
            "{}",
            json!({
                "test": "sparse", "shape": shape, "n": self.seq.len(), "rows": ROWS, "block": BLOCK, "run": run,
                "unit": if unit == Unit::KvGroup { "kv_group" } else { "query_head" }, "threads": self.team.threads(),
                "path": self.cpu.path().name(), "density": kept, "dense_us": dense_us.round(), "sparse_us": sparse_us.round(),
                "ideal_us": (dense_us * kept).round(), "speedup": dense_us / sparse_us, "of_ideal": dense_us * kept / sparse_us,
            })
        );
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1));
    let lengths = option("--lengths").map_or("4096,16384,32768", String::as_str);
    let run = option("--run").map_or(64, |r| r.parse().unwrap());
    for (name, heads, kv_heads, dim) in SHAPES {
        if option("--shape").is_some_and(|only| only != name) {
            continue;
        }
        for n in lengths.split(',').map(|n| n.parse().unwrap()) {
            let bench = Bench::new((heads, kv_heads, dim), n);
            for unit in [Unit::QueryHead, Unit::KvGroup] {
                for density in [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0] {
                    bench.case(name, unit, density, run);
                }
            }
        }
    }
}
