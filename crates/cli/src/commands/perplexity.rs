//! `antefix perplexity`.

use std::path::PathBuf;

use antefix_lab::perplexity::{PerplexityError, perplexity};
use antefix_models::tokenizer::Specials;
use anyhow::anyhow;
use indicatif::ProgressBar;

use super::{json_line, line};
use crate::failure::Failure;
use crate::method::MethodArgs;
use crate::model::{Loaded, ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    method: MethodArgs,
    /// Tokens of a window; the second half is scored
    #[arg(long, default_value_t = 512)]
    ctx: usize,
    /// JSON
    #[arg(long)]
    json: bool,
    /// The text
    file: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let text = super::read(&args.file)?;
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    let program = args.method.program(&model)?;
    let trained = model.spec().context;
    let context = program.as_ref().map_or(trained, |p| p.context(trained));
    if args.ctx < 8 || args.ctx > context {
        return Err(Failure::Input(anyhow!(
            "`--ctx` is {}\nhint: from 8 to {context}",
            args.ctx
        )));
    }
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let tokens: Vec<u32> = bos
        .into_iter()
        .chain(tokenizer.encode_bytes(&text, Specials::Plain))
        .collect();
    let bar = ProgressBar::new(0);
    let progress = |done: usize, all: usize, so_far: f64| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        bar.set_message(format!("{so_far:.3}"));
    };
    let result = perplexity(
        &model,
        &tokenizer,
        &tokens,
        args.ctx,
        program.as_deref(),
        progress,
    )
    .map_err(|e| match e {
        PerplexityError::Engine(_) => Failure::other(e),
        _ => Failure::input(e),
    })?;
    bar.finish_and_clear();
    if args.json {
        return json_line(&result);
    }
    line(format_args!(
        "perplexity {:.4} over {} tokens (nll {:.5})",
        result.ppl, result.tokens, result.nll
    ))
}
