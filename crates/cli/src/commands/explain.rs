//! `antefix explain`: what would run; with `--plan`, what a sparse method would read of a text.

use std::path::{Path, PathBuf};

use antefix_attention::sparse::{Planned, json as plan_json, picture};
use antefix_kv::Pool;
use antefix_lab::plans::{PlansError, plans};
use anyhow::anyhow;
use serde_json::json;

use super::{json_line, line, text_tokens};
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
    /// The plans that the method makes of FILE: density and recall by layer, or with --json one plan a layer and stretch
    #[arg(long, requires = "file")]
    plan: bool,
    /// With --plan: a picture of what this query head reads, LAYER.HEAD
    #[arg(long, value_name = "LAYER.HEAD", requires = "plan")]
    picture: Option<String>,
    /// With --plan: rows of each stretch on which recall is measured
    #[arg(long, default_value_t = 4)]
    recall_rows: usize,
    /// JSON
    #[arg(long)]
    json: bool,
    /// The text to plan
    #[arg(requires = "plan")]
    file: Option<PathBuf>,
}

/// The plans of a text.
fn show_plans(args: &Args, file: &Path) -> Result<(), Failure> {
    let text = super::read(file)?;
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    let Some(program) = args.method.program(&model)? else {
        return Err(Failure::Input(anyhow!(
            "`--plan` needs a method\nhint: --method flexprefill"
        )));
    };
    let tokens = text_tokens(&tokenizer, &text);
    let context = program.context(model.spec().context);
    if tokens.len() > context {
        return Err(Failure::Input(anyhow!(
            "the text has {} tokens, the context of the model holds {context}\nhint: shorten it",
            tokens.len()
        )));
    }
    let (heads, layers) = (model.spec().heads, model.spec().layers);
    let at = args.picture.as_deref().map(|text| {
        let (layer, head) = text.split_once('.')?;
        let (layer, head) = (layer.parse().ok()?, head.parse().ok()?);
        (layer < layers && head < heads).then_some((layer, head))
    });
    if at == Some(None) {
        return Err(Failure::Input(anyhow!(
            "`--picture` is LAYER.HEAD, the layer below {layers}, the head below {heads}"
        )));
    }
    let plans = plans(&model, &program, &tokens, args.recall_rows.max(1)).map_err(|e| match e {
        PlansError::Engine(_) => Failure::other(e),
        _ => Failure::input(e),
    })?;
    if args.json {
        return plans
            .iter()
            .try_for_each(|planned| line(format_args!("{}", plan_json::print(planned))));
    }
    if let Some((layer, head)) = at.flatten() {
        let group = heads / model.spec().kv_heads;
        return line(format_args!("{}", picture(&plans, layer, head, group).trim_end()));
    }
    line(format_args!("layer  density  recall  ({} tokens)", tokens.len()))?;
    for of_layer in plans.chunk_by(|a, b| a.layer == b.layer) {
        let pairs = |p: &Planned| p.plan.pairs(p.queries.clone());
        let (kept, all) = of_layer
            .iter()
            .map(pairs)
            .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        let recall: f64 = of_layer.iter().filter_map(|p| p.recall).sum::<f64>() / of_layer.len() as f64;
        line(format_args!(
            "{:5}  {:7.3}  {recall:6.3}",
            of_layer[0].layer,
            kept as f64 / all as f64
        ))?;
    }
    Ok(())
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if let (true, Some(file)) = (args.plan, &args.file) {
        return show_plans(args, file);
    }
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
