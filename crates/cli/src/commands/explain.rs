//! `antefix explain`: what would run; with `--plan`, what a sparse method would read of a text.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use antefix_attention::method::Program;
use antefix_attention::sparse::{Planned, grid, json as plan_json, picture};
use antefix_kv::Pool;
use antefix_lab::plans::{PlansError, densities, live_plans, plans};
use antefix_lab::plot::{HeatMap, heat_map};
use antefix_lab::replay::{Replay, ReplayError, replay};
use antefix_models::decoder::Model;
use anyhow::{Context, anyhow};
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
    /// With --plan: a picture, SVG: the density of every head, or with --picture what that head reads
    #[arg(long, value_name = "FILE", requires = "plan")]
    heat_map: Option<PathBuf>,
    /// With --plan: rows of each stretch on which recall is measured
    #[arg(long, default_value_t = 4)]
    recall_rows: usize,
    /// With --plan: the plans that are made while plans are executed, not those of a text that is attended densely; without recall
    #[arg(long, requires = "plan")]
    live: bool,
    /// With --plan: execute the plans of this file, as --json printed them, and tell how far predictions are from dense ones and from those
    /// of the method
    #[arg(long, value_name = "FILE", requires = "plan", conflicts_with_all = ["live", "picture", "heat_map"])]
    replay: Option<PathBuf>,
    /// JSON
    #[arg(long)]
    json: bool,
    /// The text to plan
    #[arg(requires = "plan")]
    file: Option<PathBuf>,
}

/// The plans of a text, or what some that were written down do to it.
fn show_plans(args: &Args, file: &Path) -> Result<(), Failure> {
    let text = super::read(file)?;
    let written = args.replay.as_deref().map(read_plans).transpose()?;
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    let program = args.method.program(&model)?;
    let tokens = text_tokens(&tokenizer, &text);
    let trained = model.spec().context;
    let context = program
        .as_ref()
        .map_or(trained, |program| program.context(trained));
    if tokens.is_empty() || tokens.len() > context {
        return Err(Failure::Input(anyhow!(
            "the text has {} tokens, the context of the model holds {context}\nhint: give a shorter text, not an empty one",
            tokens.len()
        )));
    }
    if let Some(plans) = written {
        return replayed(args, (&model, &tokens), plans, program.as_deref());
    }
    let Some(program) = program else {
        return Err(Failure::Input(anyhow!(
            "`--plan` needs a method\nhint: --method flexprefill, or --replay FILE for plans that were written down"
        )));
    };
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
    let plans = match args.live {
        true => live_plans(&model, &program, &tokens),
        false => plans(&model, &program, &tokens, args.recall_rows.max(1)),
    };
    let plans = plans.map_err(|e| match e {
        PlansError::Engine(_) => Failure::other(e),
        _ => Failure::input(e),
    })?;
    let (at, group) = (at.flatten(), heads / model.spec().kv_heads);
    if let Some(file) = &args.heat_map {
        let svg = drawn(&args.model.model, &plans, at, [layers, heads, group])?;
        super::analyse::write(file, &svg)?;
    }
    if args.json {
        return plans
            .iter()
            .try_for_each(|planned| line(format_args!("{}", plan_json::print(planned))));
    }
    if let Some((layer, head)) = at {
        return line(format_args!("{}", picture(&plans, layer, head, group).trim_end()));
    }
    line(format_args!("layer  density  recall  ({} tokens)", tokens.len()))?;
    for of_layer in plans.chunk_by(|a, b| a.layer == b.layer) {
        let pairs = |p: &Planned| p.plan.pairs(p.queries.clone());
        let (kept, all) = of_layer
            .iter()
            .map(pairs)
            .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        let recalls: Vec<f64> = of_layer.iter().filter_map(|p| p.recall).collect();
        let recall = match recalls.len() {
            0 => "-".into(),
            n => format!("{:.3}", recalls.iter().sum::<f64>() / n as f64),
        };
        line(format_args!(
            "{:5}  {:7.3}  {recall:>6}",
            of_layer[0].layer,
            kept as f64 / all as f64
        ))?;
    }
    Ok(())
}

/// Plans as a picture, SVG: what one head reads, or the density of every head.
fn drawn(
    name: &str,
    plans: &[Planned],
    at: Option<(usize, usize)>,
    [layers, heads, group]: [usize; 3],
) -> Result<String, Failure> {
    let names = |n: usize, by: usize| -> Vec<String> { (0..n).map(|i| (i * by).to_string()).collect() };
    let svg = match at {
        None => heat_map(&HeatMap {
            title: &format!("{name}: share of the keys that each head reads"),
            axes: ("head", "layer"),
            columns: &names(heads, 1),
            rows: &names(layers, 1),
            values: &densities(plans, layers, heads, group),
            range: (0.0, 1.0),
        }),
        Some((layer, head)) => {
            let Some(grid) = grid(plans, layer, head, group) else {
                return Err(Failure::Input(anyhow!(
                    "layer {layer} is not planned: it has a window\nhint: another layer"
                )));
            };
            let n = grid.lines.len();
            // The diagonal is always read; behind it nothing can be.
            let line = |line: Vec<f64>| {
                let behind = n - line.len() - 1;
                line.into_iter()
                    .chain([1.0])
                    .chain(std::iter::repeat_n(f64::NAN, behind))
            };
            heat_map(&HeatMap {
                title: &format!("{name}: what head {head} of layer {layer} reads"),
                axes: ("key", "query"),
                columns: &names(n, grid.side),
                rows: &names(n, grid.side),
                values: &grid.lines.into_iter().flat_map(line).collect::<Vec<f64>>(),
                range: (0.0, 1.0),
            })
        }
    };
    svg.map_err(Failure::other)
}

/// The plans of a file, one a line.
fn read_plans(file: &Path) -> Result<Vec<Planned>, Failure> {
    let text = String::from_utf8_lossy(&super::read(file)?).into_owned();
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let at = || format!("`{}`, line {}", file.display(), i + 1);
            plan_json::parse(line).with_context(at).map_err(Failure::Input)
        })
        .collect()
}

/// What `plans` do to the predictions for a text.
fn replayed(
    args: &Args,
    (model, tokens): (&Arc<Model>, &[u32]),
    plans: Vec<Planned>,
    program: Option<&Program>,
) -> Result<(), Failure> {
    let failure = |e: ReplayError| match e {
        ReplayError::Plans(PlansError::Engine(_)) => Failure::other(e),
        _ => Failure::input(e),
    };
    let looked_at = plans.iter().any(|planned| planned.recall.is_some());
    let plans = Replay::new(model, tokens.len(), plans).map_err(failure)?;
    let done = replay(model, tokens, plans, program).map_err(failure)?;
    if args.json {
        json_line(&done)?;
    } else {
        line(format_args!(
            "{} tokens at density {:.3}; from dense attention: KL {:.5}, top-1 {:.3} at the last {} positions",
            done.tokens, done.density, done.kl, done.top1, done.compared
        ))?;
        if let Some(live) = &done.live {
            let same = if live.same_bits {
                "the same bits"
            } else {
                "other bits"
            };
            line(format_args!(
                "from {}: {same}, KL {:.5}, top-1 {:.3}",
                live.method, live.kl, live.top1
            ))?;
        }
    }
    if looked_at && done.live.is_some_and(|live| !live.same_bits) {
        eprintln!(
            "antefix: these plans were made while attention was dense\nhint: `--live` writes those that the method makes when they are executed"
        );
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
