//! `antefix sae harvest`.

use std::path::PathBuf;

use antefix_train::harvest::{Limits, harvest};
use serde_json::json;

use super::{TextArgs, bar, fault, loaded};
use crate::commands::{json_line, line};
use crate::failure::Failure;
use crate::model::{ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    texts: TextArgs,
    /// Layers whose head outputs are kept, all in one pass
    #[arg(long, value_delimiter = ',', required = true)]
    layers: Vec<usize>,
    /// Folder for the harvest; one that was interrupted goes on
    #[arg(long)]
    out: PathBuf,
    /// Tokens at most
    #[arg(long, default_value_t = 1_000_000)]
    tokens: usize,
    /// Bytes on disk at most
    #[arg(long, default_value_t = 8 << 30)]
    max_bytes: u64,
    /// Rows left out at the start of the texts: `sae eval` measures on them
    #[arg(long, default_value_t = 256)]
    skip: usize,
    /// Rows of a shard
    #[arg(long, default_value_t = 256)]
    shard: usize,
    /// JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let loaded = loaded(&args.model, &args.run)?;
    let texts = args.texts.texts(&loaded)?;
    let limits = Limits {
        tokens: args.tokens,
        bytes: args.max_bytes,
    };
    let bar = bar(args.tokens as u64, "tokens");
    let got = harvest(
        (&loaded.model, &loaded.tokenizer, &args.model.model),
        texts,
        (&args.layers, args.skip, args.shard),
        &args.out,
        &limits,
        |tokens| bar.set_position(tokens as u64),
    )
    .map_err(fault)?;
    bar.finish_and_clear();
    if args.json {
        return json_line(
            &json!({"tokens": got.tokens, "bytes": got.bytes, "texts_used_up": got.done, "layers": args.layers}),
        );
    }
    let why = match got.done {
        true => ", all of the texts",
        false => "",
    };
    line(format_args!(
        "{} tokens of {} layers in {:.1} MB{why}",
        got.tokens,
        args.layers.len(),
        got.bytes as f64 / 1e6
    ))
}
