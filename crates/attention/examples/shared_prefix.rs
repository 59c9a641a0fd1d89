//! Decode attention behind a shared prefix, attention alone: `cargo run --release -p antefix-attention --example shared_prefix`.
//!
//! The micro-benchmark of the paper `hydragen` (section 4.1) at the shapes of three models: `B` sequences with one query row each
//! behind a prefix of `P` tokens, with `S` tokens of their own. One JSON line a case, times of one layer in microseconds:
//! `shared_us` batches the rows that share pages, `apart_us` attends sequence by sequence over the same shared pages, `copies_us`
//! also gives every sequence a prefix of its own. `ideal_us` is the larger of bytes over the read ceiling and operations over the
//! arithmetic ceiling, both measured here first. The last lines are the two-level experiment: a few-shot prompt, 12 problems, 16
//! samples of each. Options: `--shape NAME`, `--levels` for the last experiment alone.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::time::Instant;

use antefix_attention::{Extra, Geometry, Scratch, SeqRows, Sharing, attend};
use antefix_kernels::attend::KvDtype;
use antefix_kernels::cpu::Cpu;
use antefix_kernels::ops::{Rope, RopeStyle};
use antefix_kernels::probe;
use antefix_kernels::team::Team;
use antefix_kv::{KvShape, Pool, SeqKv};
use serde_json::json;

struct Shape {
    name: &'static str,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "smollm2",
        heads: 9,
        kv_heads: 3,
        dim: 64,
    },
    Shape {
        name: "qwen2.5-0.5b",
        heads: 14,
        kv_heads: 2,
        dim: 64,
    },
    Shape {
        name: "gemma3-270m",
        heads: 4,
        kv_heads: 1,
        dim: 256,
    },
];

/// Layers of the pool: enough that a prefix does not stay in L2 from one layer to the next, as in a model.
const LAYERS: usize = 8;

/// The machine and what it can do.
struct Machine {
    cpu: Cpu,
    team: Team,
    rope: Rope,
    read_bytes_s: f64,
    flop_s: f64,
}

/// Sequences in a pool, one query row each.
struct Batch {
    pool: Pool,
    seqs: Vec<SeqKv>,
    geometry: Geometry,
}

impl Batch {
    fn new(shape: &Shape, layers: usize) -> Self {
        let kv = KvShape {
            layers,
            kv_heads: shape.kv_heads,
            dim: shape.dim,
            dtype: KvDtype::Bf16,
        };
        Self {
            pool: Pool::new(kv, 4 << 30),
            seqs: Vec::new(),
            geometry: Geometry {
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                dim: shape.dim,
                scale: (shape.dim as f32).powf(-0.5),
                softcap: None,
                window: None,
            },
        }
    }

    /// `n` more keys and values in every layer.
    fn write(&mut self, seq: &mut SeqKv, n: usize) {
        let width = self.geometry.kv_heads * self.geometry.dim;
        let data: Vec<f32> = (0..n * width + 1).map(|i| (i as f32 * 0.618).sin()).collect();
        self.pool.reserve(seq, n).unwrap();
        for layer in 0..self.pool.shape().layers {
            self.pool
                .write(seq, layer, seq.len(), &data[..n * width], &data[1..]);
        }
        seq.commit(n);
    }

    /// A sequence of `n` tokens behind `parent`.
    fn behind(&mut self, parent: Option<&SeqKv>, n: usize) -> SeqKv {
        let mut seq = match parent {
            Some(parent) => self.pool.fork(parent).unwrap(),
            None => SeqKv::new(self.pool.shape()),
        };
        self.write(&mut seq, n);
        seq
    }

    /// Median microseconds of one layer's attention.
    fn time(&self, machine: &Machine, apart: bool) -> f64 {
        // The last token of every sequence is the query.
        let rows: Vec<SeqRows<'_>> = self
            .seqs
            .iter()
            .enumerate()
            .map(|(first, kv)| SeqRows {
                kv,
                first,
                rows: 1,
                pos0: kv.len() as u32 - 1,
                extra: Extra::default(),
            })
            .collect();
        let width = self.geometry.heads * self.geometry.dim;
        let q: Vec<f32> = (0..rows.len() * width).map(|i| (i as f32 * 0.37).cos()).collect();
        let mut out = vec![0.0; q.len()];
        let sharing = if apart {
            Sharing::apart(&rows)
        } else {
            Sharing::of(&rows)
        };
        let mut scratch = Scratch::default();
        let layers = self.pool.shape().layers;
        let (mut times, begin) = (Vec::new(), Instant::now());
        while times.len() < 2 * layers.max(4) || (begin.elapsed().as_secs_f64() < 0.1 && times.len() < 1000) {
            let start = Instant::now();
            attend(
                (machine.cpu, &machine.team),
                &self.pool,
                (times.len() % layers, &machine.rope),
                &self.geometry,
                (&rows, &sharing),
                &q,
                &mut out,
                &mut scratch,
            )
            .unwrap();
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    fn bytes(&self) -> usize {
        self.pool.stats().bytes_used / self.pool.shape().layers
    }
}

impl Machine {
    /// Microseconds of a layer that reads `tokens` keys and values once and scores `pairs` (query row of a head, key) pairs.
    fn ideal_us(&self, shape: &Shape, tokens: usize, pairs: usize) -> f64 {
        let bytes = (tokens * shape.kv_heads * shape.dim * 2 * KvDtype::Bf16.bytes()) as f64;
        let flops = (4 * shape.dim * shape.heads * pairs) as f64;
        (bytes / self.read_bytes_s).max(flops / self.flop_s) * 1e6
    }
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}

/// One case of the table.
fn case(machine: &Machine, shape: &Shape, prefix: usize, own: usize, b: usize) {
    let mut shared = Batch::new(shape, LAYERS);
    let root = shared.behind(None, prefix);
    shared.seqs = (0..b).map(|_| shared.behind(Some(&root), own.max(1))).collect();
    let shared_us = shared.time(machine, false);
    let apart_us = shared.time(machine, true);
    // One layer of copies is larger than the caches already.
    let mut copies = Batch::new(shape, if b < 8 { LAYERS } else { 1 });
    copies.seqs = (0..b).map(|_| copies.behind(None, prefix + own.max(1))).collect();
    let copies_us = copies.time(machine, true);
    let ideal_us = machine.ideal_us(shape, prefix + b * own.max(1), b * (prefix + own.max(1)));
    println!(
        "{}",
        json!({
            "test": "attention", "shape": shape.name, "B": b, "P": prefix, "S": own, "threads": machine.team.threads(),
            "path": machine.cpu.path().name(), "shared_us": round(shared_us), "apart_us": round(apart_us),
            "copies_us": round(copies_us), "ideal_us": round(ideal_us), "of_roofline": round(ideal_us / shared_us),
            "gain_over_apart": round(apart_us / shared_us), "gain_over_copies": round(copies_us / shared_us),
            "kv_bytes_a_layer": shared.bytes(), "kv_bytes_a_layer_of_copies": copies.bytes(),
        })
    );
}

/// A few-shot prompt > 12 problems > samples, as a tree and with the problems' statements copied for every sample.
fn levels(machine: &Machine, shape: &Shape) {
    const PROMPT: usize = 2400;
    const PROBLEMS: usize = 12;
    const STATEMENT: usize = 256;
    const OWN: usize = 64;
    let tree = |samples: usize| {
        let mut batch = Batch::new(shape, 4);
        let root = batch.behind(None, PROMPT);
        for _ in 0..PROBLEMS {
            let problem = batch.behind(Some(&root), STATEMENT);
            for _ in 0..samples {
                let seq = batch.behind(Some(&problem), OWN);
                batch.seqs.push(seq);
            }
        }
        batch
    };
    let mut single = Batch::new(shape, 4);
    let root = single.behind(None, PROMPT);
    single.seqs = (0..PROBLEMS * 16)
        .map(|_| single.behind(Some(&root), STATEMENT + OWN))
        .collect();
    let two = tree(16);
    // As many samples as fit the memory of the single level.
    let samples = (PROBLEMS * 16 * (STATEMENT + OWN) - PROBLEMS * STATEMENT) / (PROBLEMS * OWN);
    let full = tree(samples);
    let (single_us, two_us, full_us) = (
        single.time(machine, false),
        two.time(machine, false),
        full.time(machine, false),
    );
    let rows = (PROBLEMS * 16) as f64;
    println!(
        "{}",
        json!({
            "test": "levels", "shape": shape.name, "prompt": PROMPT, "problems": PROBLEMS, "statement": STATEMENT, "own": OWN,
            "samples": 16, "single_us": round(single_us), "two_us": round(two_us),
            "time_change_at_equal_batch": round(two_us / single_us - 1.0),
            "single_bytes_a_layer": single.bytes(), "two_bytes_a_layer": two.bytes(),
            "samples_at_equal_memory": samples, "full_us": round(full_us), "full_bytes_a_layer": full.bytes(),
            "time_change_a_sample_at_equal_memory": round(full_us / (PROBLEMS * samples) as f64 / (single_us / rows) - 1.0),
        })
    );
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let only = args
        .iter()
        .position(|a| a == "--shape")
        .and_then(|i| args.get(i + 1));
    let cpu = Cpu::from_env().unwrap();
    let team = Team::new(std::thread::available_parallelism().map_or(1, usize::from));
    let ceilings = probe::measure(cpu, &team);
    let machine = Machine {
        cpu,
        rope: Rope::new(&[1.0], RopeStyle::Neox),
        read_bytes_s: ceilings.read_bytes_s,
        flop_s: ceilings.tiles.map_or(ceilings.f32_flop_s, |t| t.bf16_flop_s),
        team,
    };
    println!(
        "{}",
        json!({"test": "ceilings", "read_gb_s": round(machine.read_bytes_s * 1e-9), "gflop_s": round(machine.flop_s * 1e-9)})
    );
    for shape in SHAPES.iter().filter(|s| only.is_none_or(|name| name == s.name)) {
        if !args.iter().any(|a| a == "--levels") {
            for prefix in [512, 2048, 4096, 8192] {
                for own in [0, 64] {
                    for b in [1, 8, 32, 64] {
                        case(&machine, shape, prefix, own, b);
                    }
                }
            }
        }
        levels(&machine, shape);
    }
}
