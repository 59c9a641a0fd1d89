//! Time and memory of one training step on G responses behind one prompt, grouped or with the prompt repeated:
//! `cargo run --release -p antefix-train --example grouped -- MODEL.gguf FORM G L l [STEPS] [full|lora]`, FORM one of grouped, repeated, plain.
//!
//! `plain` is one sequence of L + l tokens without any grouping: what G = 1 is compared with. One JSON object; run forms in turn
//! (`bench/grouped.sh`).
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use std::path::Path;

use antefix_kernels::memory::keep_big_blocks;
use antefix_models::files::ModelFiles;
use antefix_train::repro::{Trial, Way};

type Failure = Box<dyn std::error::Error>;

fn peak_mb() -> f64 {
    antefix_lab::resident_mb()[1].unwrap_or(f64::NAN)
}

fn main() -> Result<(), Failure> {
    keep_big_blocks();
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global()?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = "MODEL.gguf grouped|repeated|plain G L l [STEPS] [full|lora]";
    let number = |i: usize| -> Result<usize, Failure> { Ok(args.get(i).ok_or(usage)?.parse()?) };
    let (group, prefix, length) = (number(2)?, number(3)?, number(4)?);
    let steps = args.get(5).map_or(Ok(3), |n| n.parse::<usize>())?;
    let files = ModelFiles::open(Path::new(args.first().ok_or(usage)?))?;
    let everything = args.get(6).map(String::as_str) == Some("full");
    let way = args.get(1).and_then(|name| Way::named(name)).ok_or(usage)?;
    let mut trial = Trial::new(&files, everything)?;
    let base_mb = peak_mb();
    let mut rows = 0;
    let mut times = Vec::new();
    for step in 0..=steps {
        let done = trial.step((group, prefix, length), way)?;
        rows = done.rows;
        if step > 0 {
            times.push(done.seconds);
        }
    }
    times.sort_by(f64::total_cmp);
    println!(
        "{{\"form\":\"{}\",\"G\":{group},\"L\":{prefix},\"l\":{length},\"rows\":{rows},\"step_s\":{:.3},\"peak_mb\":{:.0},\"model_mb\":{base_mb:.0}}}",
        way.name(),
        times[times.len() / 2],
        peak_mb()
    );
    Ok(())
}
