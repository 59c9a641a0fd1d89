//! Tokens per second and peak memory of a full training step: `cargo run --release -p antefix-train --example step [gpt|composed|lora MODEL.gguf] [STEPS]`.
//!
//! `composed` is the GPT out of candle's own operators, without ours. `bench/train_step.py` is the same in PyTorch.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

mod composed;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use antefix_kernels::memory::keep_big_blocks;
use antefix_models::files::ModelFiles;
use antefix_train::model::{Batch, Decoder, Gpt, LoraSpec, Params, RawGpt, Train};
use antefix_train::ops::{self, Packing, RowLoss};
use antefix_train::optim::{AdamW, Grads, RawAdamW};
use antefix_train::random::Stream;
use candle_core::Tensor;

use self::composed::Composed;

type Failure = Box<dyn std::error::Error>;

/// The loss of a batch with these targets.
type Loss<'a> = dyn Fn(&Batch, &Arc<Vec<u32>>) -> Result<Tensor, antefix_train::TrainError> + 'a;

struct Run {
    engine: &'static str,
    sequences: usize,
    length: usize,
    vocab: usize,
    steps: usize,
}

/// Mean cross-entropy by our operators.
fn cross_entropy(
    hidden: &Tensor,
    output: &Tensor,
    targets: &Arc<Vec<u32>>,
) -> Result<Tensor, antefix_train::TrainError> {
    let rows = targets.len();
    let weights = RowLoss::CrossEntropy(Arc::new(vec![1.0 / rows as f64; rows]));
    Ok(ops::token_loss(hidden, output, targets, 1.0, weights)?)
}

fn measure(run: &Run, params: &Params, loss_of: &Loss<'_>) -> Result<(), Failure> {
    let rows = run.sequences * run.length;
    let packing = Arc::new(Packing::causal(&vec![run.length; run.sequences])?);
    let mut optimiser = AdamW::new(RawAdamW::default(), params)?;
    let mut times = Vec::new();
    for step in 0..run.steps + 2 {
        let mut stream = Stream::at(1, "tokens", step as u64);
        let tokens: Vec<u32> = (0..rows).map(|_| stream.below(run.vocab) as u32).collect();
        let mut targets = tokens.clone();
        targets.rotate_left(1);
        let batch = Batch {
            tokens: Arc::new(tokens),
            packing: packing.clone(),
        };
        let start = Instant::now();
        let loss = loss_of(&batch, &Arc::new(targets))?;
        let forward = start.elapsed().as_secs_f64();
        let mut grads = Grads::default();
        grads.add(params, &loss)?;
        let backward = start.elapsed().as_secs_f64() - forward;
        optimiser.step(params, &grads, 1.0)?;
        let seconds = start.elapsed().as_secs_f64();
        if step >= 2 {
            times.push([seconds, forward, backward]);
        }
        if step == 0 {
            assert!(
                grads.silent(params).iter().all(|n| n.contains("lora_A")),
                "every variable has a gradient"
            );
        }
    }
    times.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let [seconds, forward, backward] = times[times.len() / 2];
    let peak = antefix_lab::resident_mb()[1].unwrap_or(f64::NAN);
    println!(
        "{{\"engine\":\"{}\",\"tokens_s\":{:.0},\"step_s\":{seconds:.4},\"forward_s\":{forward:.4},\"backward_s\":{backward:.4},\"peak_mb\":{peak:.0}}}",
        run.engine,
        rows as f64 / seconds
    );
    Ok(())
}

fn main() -> Result<(), Failure> {
    keep_big_blocks();
    let args: Vec<String> = std::env::args().skip(1).collect();
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global()?;
    if args.first().is_some_and(|a| a == "lora") {
        let files = ModelFiles::open(Path::new(args.get(1).ok_or("which model?")?))?;
        let spec = LoraSpec::default();
        let model = Decoder::load(&files, &Train::Lora(spec), 1)?;
        let run = Run {
            engine: "antefix",
            sequences: 2,
            length: 512,
            vocab: files.spec().vocab,
            steps: args.get(2).map_or(Ok(5), |n| n.parse())?,
        };
        let loss = |b: &Batch, t: &Arc<Vec<u32>>| cross_entropy(&model.hidden(b)?, model.output(), t);
        return measure(&run, model.params(), &loss);
    }
    let raw = RawGpt {
        layers: 4,
        d: 256,
        heads: 4,
        kv_heads: 4,
        ffn: 1024,
        vocab: 4096,
        context: 512,
        ..RawGpt::default()
    };
    let model = Gpt::fresh(&raw, 1)?;
    let own = args.first().is_none_or(|a| a != "composed");
    let run = Run {
        engine: if own { "antefix" } else { "candle" },
        sequences: 8,
        length: 512,
        vocab: raw.vocab,
        steps: args.get(1).map_or(Ok(10), |n| n.parse())?,
    };
    let composed = Composed::new(model.params(), &raw, run.length)?;
    let loss = |b: &Batch, t: &Arc<Vec<u32>>| match own {
        true => cross_entropy(&model.hidden(b)?, model.output(), t),
        false => Ok(composed.loss(&b.tokens, t)?),
    };
    measure(&run, model.params(), &loss)
}
