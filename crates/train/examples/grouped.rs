//! Time and memory of one training step on G responses behind one prompt, grouped or with the prompt repeated:
//! `cargo run --release -p antefix-train --example grouped -- MODEL.gguf FORM G L l [STEPS] [full|lora]`, FORM one of grouped, repeated, plain.
//!
//! `plain` is one sequence of L + l tokens without any grouping: what G = 1 is compared with. One JSON object; run forms in turn
//! (`bench/grouped.sh`).
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use std::path::Path;
use std::time::Instant;

use antefix_kernels::memory::keep_big_blocks;
use antefix_models::files::ModelFiles;
use antefix_train::model::{Decoder, LoraSpec, Train};
use antefix_train::ops::{self, RowLoss};
use antefix_train::optim::{AdamW, Grads, RawAdamW};
use antefix_train::prefix_grouper::{Form, Prompted, Scored, pack, pack_sequences};
use antefix_train::random::Stream;

type Failure = Box<dyn std::error::Error>;

fn peak_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<f64>().ok())
        .unwrap_or(f64::NAN)
        / 1024.0
}

fn main() -> Result<(), Failure> {
    keep_big_blocks();
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global()?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = "MODEL.gguf grouped|repeated|plain G L l [STEPS] [full|lora]";
    let number = |i: usize| -> Result<usize, Failure> { Ok(args.get(i).ok_or(usage)?.parse()?) };
    let [group, prefix, length] = [number(2)?, number(3)?, number(4)?];
    let steps = args.get(5).map_or(Ok(3), |n| n.parse::<usize>())?;
    let files = ModelFiles::open(Path::new(args.first().ok_or(usage)?))?;
    let train = match args.get(6).map(String::as_str) {
        Some("full") => Train::All,
        _ => Train::Lora(LoraSpec {
            modules: vec!["q_proj".into(), "v_proj".into()],
            rank: 8,
            alpha: 16.0,
        }),
    };
    let model = Decoder::load(&files, &train, 1)?;
    let mut optimiser = AdamW::new(RawAdamW::default(), model.params())?;
    let base_mb = peak_mb();
    let mut times = Vec::new();
    let mut rows = 0;
    for step in 0..=steps {
        let mut stream = Stream::at(1, "tokens", step as u64);
        let mut tokens =
            |n: usize| -> Vec<u32> { (0..n).map(|_| stream.below(files.spec().vocab) as u32).collect() };
        let item = Prompted {
            prefix: tokens(prefix),
            responses: (0..group).map(|_| tokens(length)).collect(),
        };
        let start = Instant::now();
        let scored: Scored = match args.get(1).map(String::as_str) {
            Some("grouped") => pack(&[item], Form::Grouped)?,
            Some("repeated") => pack(&[item], Form::Repeated)?,
            Some("plain") => {
                let whole = [item.prefix, item.responses.concat()].concat();
                let mut scored = pack_sequences(&[whole])?;
                let first = prefix - 1;
                scored.rows = scored.rows[first..].to_vec().into();
                scored.targets = scored.targets[first..].to_vec().into();
                scored
            }
            _ => return Err(usage.into()),
        };
        rows = scored.batch.packing.rows();
        let n = scored.targets.len();
        let hidden = ops::embed(&model.hidden(&scored.batch)?, &scored.rows, 1.0)?;
        let weights = RowLoss::CrossEntropy(vec![1.0 / n as f64; n].into());
        let loss = ops::token_loss(&hidden, model.output(), &scored.targets, 1.0, weights)?;
        let mut grads = Grads::default();
        grads.add(model.params(), &loss)?;
        optimiser.step(model.params(), &grads, 1.0)?;
        if step > 0 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    println!(
        "{{\"form\":\"{}\",\"G\":{group},\"L\":{prefix},\"l\":{length},\"rows\":{rows},\"step_s\":{:.3},\"peak_mb\":{:.0},\"model_mb\":{base_mb:.0}}}",
        args[1],
        times[times.len() / 2],
        peak_mb()
    );
    Ok(())
}
