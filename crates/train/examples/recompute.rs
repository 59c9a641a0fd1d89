//! Memory and time of a training step with and without gradient checkpointing, one process a line:
//! `cargo run --release -p antefix-train --example recompute nothing|layers [MODEL.gguf] [ROWS]`.
//!
//! Sequences of 512 tokens; adapters (rank 8, q and v) of the model, or all of a small decoder without one.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use antefix_kernels::memory::keep_big_blocks;
use antefix_models::files::ModelFiles;
use antefix_train::model::{Batch, Decoder, Gpt, LoraSpec, RawGpt, Recompute, Train};
use antefix_train::ops::{self, Packing, RowLoss};
use antefix_train::optim::Grads;
use antefix_train::prefix_grouper::LanguageModel;
use antefix_train::random::Stream;

type Failure = Box<dyn std::error::Error>;

/// Tokens of a sequence.
const SEQ: usize = 512;

/// Resident memory now and at its peak, MB.
fn memory() -> [f64; 2] {
    antefix_lab::resident_mb().map(|mb| mb.unwrap_or(f64::NAN))
}

fn step(model: &dyn LanguageModel, rows: usize, vocab: usize) -> Result<f64, Failure> {
    let mut stream = Stream::of(1, "tokens");
    let tokens: Vec<u32> = (0..rows).map(|_| stream.below(vocab) as u32).collect();
    let mut targets = tokens.clone();
    targets.rotate_left(1);
    let batch = Batch {
        tokens: Arc::new(tokens),
        packing: Arc::new(Packing::causal(&vec![SEQ; rows / SEQ])?),
    };
    let start = Instant::now();
    let hidden = model.hidden(&batch)?;
    let forward = memory()[0];
    let weights = RowLoss::CrossEntropy(Arc::new(vec![1.0 / rows as f64; rows]));
    let loss = ops::token_loss(&hidden, model.output(), &Arc::new(targets), 1.0, weights)?;
    let mut grads = Grads::default();
    grads.add(model.params(), &loss)?;
    println!(
        "  {:.2} s, behind the forward pass {forward:.0} MB, |g| {:e}",
        start.elapsed().as_secs_f64(),
        grads.norm()
    );
    Ok(forward)
}

fn main() -> Result<(), Failure> {
    keep_big_blocks();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let recompute = match args.first().map(String::as_str) {
        Some("nothing") => Recompute::Nothing,
        Some("layers") => Recompute::Layers,
        _ => return Err("say `nothing` or `layers`".into()),
    };
    let rows = args.get(2).map_or(Ok(2048), |n| n.parse())? / SEQ * SEQ;
    let (model, vocab): (Box<dyn LanguageModel>, usize) = match args.get(1).filter(|p| p.as_str() != "small")
    {
        Some(path) => {
            let files = ModelFiles::open(Path::new(path))?;
            let lora = LoraSpec::default();
            let model = Decoder::load(&files, &Train::Lora(lora), 0)?.with_recompute(recompute);
            (Box::new(model), files.spec().vocab)
        }
        None => {
            let raw = RawGpt {
                layers: 12,
                d: 256,
                ffn: 1024,
                ..RawGpt::default()
            };
            (
                Box::new(Gpt::fresh(&raw, 1)?.with_recompute(recompute)),
                raw.vocab,
            )
        }
    };
    println!("{recompute:?}, {rows} rows; loaded: {:.0} MB", memory()[0]);
    for _ in 0..2 {
        step(&*model, rows, vocab)?;
    }
    println!("  peak {:.0} MB", memory()[1]);
    Ok(())
}
