//! `antefix explain`: what would run.

use antefix_kv::Pool;
use serde_json::json;

use super::{json_line, line};
use crate::failure::Failure;
use crate::model::{Loaded, ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let start = std::time::Instant::now();
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    let load_s = start.elapsed().as_secs_f64();
    let spec = model.spec();
    let pool = Pool::new(model.kv_shape(), 0);
    let kv_token = pool.bytes_for(32) / 32;
    let windows = spec.layer_kinds.iter().filter(|k| k.window.is_some()).count();
    if args.json {
        return json_line(&json!({
            "arch": spec.arch.name(),
            "name": spec.name,
            "layers": spec.layers,
            "d_model": spec.d_model,
            "d_ff": spec.d_ff,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "vocab": spec.vocab,
            "context": spec.context,
            "windowed_layers": windows,
            "weight_bytes": model.weight_bytes(),
            "kinds": model.kinds(),
            "kv_bytes_per_token": kv_token,
            "path": model.cpu().path().name(),
            "threads": model.team().threads(),
            "load_s": load_s,
            "vocab_tokens": tokenizer.vocab_size(),
        }));
    }
    line(format_args!("model      {} ({})", spec.name, spec.arch.name()))?;
    line(format_args!(
        "shape      {} layers ({windows} windowed), width {}, feed-forward {}, {} query and {} KV heads of {}",
        spec.layers, spec.d_model, spec.d_ff, spec.heads, spec.kv_heads, spec.head_dim
    ))?;
    line(format_args!(
        "context    {} tokens, vocabulary {}",
        spec.context, spec.vocab
    ))?;
    let kinds: Vec<String> = model
        .kinds()
        .into_iter()
        .map(|(kind, bytes)| format!("{kind} {:.1} MB", bytes as f64 / 1e6))
        .collect();
    line(format_args!(
        "weights    {:.1} MB packed: {}",
        model.weight_bytes() as f64 / 1e6,
        kinds.join(", ")
    ))?;
    line(format_args!(
        "KV cache   {kv_token} bytes a token; {:.1} MB at the full context",
        pool.bytes_for(spec.context) as f64 / 1e6
    ))?;
    line(format_args!(
        "kernels    {}, {} threads, loaded in {load_s:.2} s",
        model.cpu().path(),
        model.team().threads()
    ))?;
    line("attention  dense; sequences that share pages are attended together")
}
