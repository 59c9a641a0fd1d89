//! `antefix train`: runs a recipe, goes on with one, exports what it made.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use antefix_kernels::memory::keep_big_blocks;
use antefix_kernels::quant::Format;
use antefix_train::TrainError;
use antefix_train::run::{Checkpoint, Progress, Recipe, Watch, export, export_gguf, train};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{json_line, line};
use crate::failure::Failure;
use crate::model::threads;

/// Set by ctrl-C: the run saves and ends.
static STOP: AtomicBool = AtomicBool::new(false);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The recipe, a TOML file
    recipe: PathBuf,
    /// KEY=VALUE: any key of the recipe, e.g. `optim.lr=1e-3`; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// One of the recipe's profiles, laid over it
    #[arg(long)]
    profile: Option<String>,
    /// The run's folder [default: runs/RECIPE/SEED]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Go on from the newest checkpoint in the run's folder
    #[arg(long)]
    resume: bool,
    /// Only check the recipe and print it with all defaults
    #[arg(long)]
    dry_run: bool,
    /// Write the newest checkpoint of the run as files that others load (safetensors folder, PEFT adapter), and train nothing
    #[arg(long, value_name = "DIR")]
    export: Option<PathBuf>,
    /// Write the base model as GGUF with what was trained merged into it, and train nothing
    #[arg(long, value_name = "FILE")]
    export_gguf: Option<PathBuf>,
    /// Format of the matrices that training changed, for --export-gguf
    #[arg(long, value_enum, default_value_t = Quant::Q8_0)]
    quant: Quant,
    /// Threads [default: one a core]
    #[arg(long)]
    threads: Option<usize>,
    /// One JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Formats that are written.
#[derive(Clone, Copy, clap::ValueEnum)]
#[allow(non_camel_case_types, reason = "as GGUF files call them")]
enum Quant {
    #[value(name = "q8_0")]
    Q8_0,
    F16,
    Bf16,
    F32,
}

impl Quant {
    fn format(self) -> Format {
        match self {
            Self::Q8_0 => Format::Q8_0,
            Self::F16 => Format::F16,
            Self::Bf16 => Format::BF16,
            Self::F32 => Format::F32,
        }
    }
}

fn failure(error: TrainError) -> Failure {
    match error {
        TrainError::Recipe(_) | TrainError::Load(_) | TrainError::File { .. } => Failure::input(error),
        other => Failure::other(other),
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let recipe = Recipe::read(&args.recipe, args.profile.as_deref(), &args.overrides).map_err(failure)?;
    if args.dry_run {
        return line(recipe.to_toml().map_err(failure)?);
    }
    let out = args.out.unwrap_or_else(|| {
        PathBuf::from("runs")
            .join(&recipe.recipe)
            .join(recipe.seed.to_string())
    });
    if let Some(to) = args.export {
        let found = Checkpoint::latest(&out).map_err(failure)?;
        let found =
            found.ok_or_else(|| Failure::input(anyhow::anyhow!("{} has no checkpoint", out.display())))?;
        export(&recipe, &found.folder, &to).map_err(failure)?;
        return line(format_args!("step {} is in {}", found.step, to.display()));
    }
    if let Some(to) = args.export_gguf {
        let found = Checkpoint::latest(&out).map_err(failure)?;
        let found =
            found.ok_or_else(|| Failure::input(anyhow::anyhow!("{} has no checkpoint", out.display())))?;
        export_gguf(&recipe, &found.folder, &to, args.quant.format()).map_err(failure)?;
        return line(format_args!("step {} is in {}", found.step, to.display()));
    }
    keep_big_blocks();
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads(args.threads)?)
        .build_global()
        .map_err(Failure::other)?;
    ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed)).map_err(Failure::other)?;
    let bar = ProgressBar::new(recipe.train.steps);
    if let Ok(style) = ProgressStyle::with_template("step {pos}/{len} {wide_bar} {msg} left {eta}") {
        bar.set_style(style);
    }
    let mut progress = |p: Progress| {
        let reward = p.reward.map(|r| format!("  reward {r:.3}")).unwrap_or_default();
        bar.set_position(p.step);
        bar.set_message(format!(
            "loss {:.4}{reward}  |g| {:.2}  {:.0} tok/s ",
            p.loss, p.grad_norm, p.tokens_s
        ));
    };
    let mut watch = Watch {
        stop: &STOP,
        progress: &mut progress,
    };
    let finish = train(&recipe, &out, args.resume, &mut watch).map_err(failure)?;
    bar.finish_and_clear();
    if args.json {
        let held_out: serde_json::Map<_, _> = finish
            .held_out
            .iter()
            .map(|(n, v)| (n.clone(), json!(v)))
            .collect();
        return json_line(&json!({
            "recipe": recipe.recipe, "seed": recipe.seed, "step": finish.step, "complete": finish.complete,
            "checkpoint": finish.checkpoint.folder, "held_out": held_out,
        }));
    }
    for (name, value) in &finish.held_out {
        line(format_args!("held out: {name} {value:.4}"))?;
    }
    line(format_args!(
        "step {}: {}",
        finish.step,
        finish.checkpoint.folder.display()
    ))?;
    if !finish.complete {
        let profile = args
            .profile
            .map(|p| format!(" --profile {p}"))
            .unwrap_or_default();
        let set: Vec<String> = args.overrides.iter().map(|o| format!(" --set '{o}'")).collect();
        let set = set.concat();
        line(format_args!(
            "stopped; go on with: antefix train {}{profile}{set} --out {} --resume",
            args.recipe.display(),
            out.display()
        ))?;
    }
    Ok(())
}
