//! `antefix sae train`.

use std::path::PathBuf;
use std::time::Instant;

use antefix_papers::attention_sae::{Origin, Stored};
use antefix_train::harvest::{Batches, Rows};
use antefix_train::sae::{RawSae, Report, SaeConfig, Trainer};
use anyhow::{Context, anyhow};
use serde_json::json;

use super::{bar, fault};
use crate::commands::{json_line, line};
use crate::failure::Failure;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of a harvest
    harvest: PathBuf,
    /// Layer of the harvest
    #[arg(long)]
    layer: usize,
    /// Folder for the dictionary (SAELens' form) and its checkpoint
    #[arg(long)]
    out: PathBuf,
    /// standard, topk, batchtopk, jumprelu or gated
    #[arg(long, default_value = "batchtopk")]
    architecture: String,
    /// Features; default: 8 a value of the row
    #[arg(long)]
    features: Option<usize>,
    /// Features a row (topk), or in the mean (batchtopk)
    #[arg(long)]
    k: Option<usize>,
    /// Weight of the sum of features (standard, gated)
    #[arg(long)]
    l1: Option<f64>,
    /// Weight of the number of features (jumprelu)
    #[arg(long)]
    l0: Option<f64>,
    /// Adam's step size
    #[arg(long)]
    lr: Option<f64>,
    /// A file with any other settings, TOML; what is given here wins
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Rows that are trained on, over all epochs
    #[arg(long, default_value_t = 1_000_000)]
    rows: u64,
    /// Rows of a step
    #[arg(long, default_value_t = 2048)]
    batch: usize,
    /// Bytes of rows that are held in memory and mixed
    #[arg(long, default_value_t = 2 << 30)]
    pool: u64,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 200)]
    save_every: u64,
    /// Seed of weights and order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; default: all cores
    #[arg(short = 't', long)]
    threads: Option<usize>,
    /// JSON, one object a line
    #[arg(long)]
    json: bool,
}

impl Args {
    fn raw(&self, d_in: usize, steps: u64) -> Result<RawSae, Failure> {
        let mut raw = match &self.config {
            None => RawSae::default(),
            Some(file) => {
                let text = String::from_utf8_lossy(&crate::commands::read(file)?).into_owned();
                toml::from_str(&text)
                    .with_context(|| format!("`{}` is no configuration of a dictionary", file.display()))
                    .map_err(Failure::Input)?
            }
        };
        raw.architecture = raw.architecture.or_else(|| Some(self.architecture.clone()));
        raw.d_in = d_in;
        raw.features = self.features.or(raw.features);
        (raw.k, raw.l1, raw.l0, raw.lr) = (
            self.k.or(raw.k),
            self.l1.or(raw.l1),
            self.l0.or(raw.l0),
            self.lr.or(raw.lr),
        );
        raw.steps = raw.steps.or(Some(steps));
        raw.seed = self.seed;
        Ok(raw)
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let threads = crate::model::threads(args.threads)?;
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global();
    let rows = Rows::open(&args.harvest, args.layer).map_err(fault)?;
    let about = rows.about().clone();
    let steps = args.rows.div_ceil(args.batch.max(1) as u64).max(1);
    let cfg = SaeConfig::try_from(args.raw(about.width, steps)?).map_err(Failure::input)?;
    let mut batches = Batches::new(rows.clone(), args.batch, args.pool, args.seed).map_err(fault)?;
    let checkpoint = args.out.join("checkpoint.safetensors");
    let mut trainer = match checkpoint.is_file() {
        true => {
            let trainer = Trainer::load(&checkpoint).map_err(Failure::input)?;
            if *trainer.config() != cfg {
                return Err(Failure::Input(anyhow!(
                    "`{}` is of a run with other settings\nhint: another --out, or the settings it was begun with",
                    checkpoint.display()
                )));
            }
            batches.seek(trainer.steps()).map_err(fault)?;
            trainer
        }
        false => Trainer::new(cfg, &rows.rows(0).map_err(fault)?),
    };
    let bar = bar(steps, "steps");
    let (start, from) = (Instant::now(), trainer.steps());
    let mut last: Option<Report> = None;
    let mut seen = 0;
    while trainer.steps() < steps {
        let batch = batches.next_batch().map_err(fault)?;
        seen += batch.len() / about.width;
        let report = trainer.step(&batch);
        if !report.loss.is_finite() {
            return Err(Failure::Other(anyhow!(
                "the loss is no number after step {}: the last checkpoint stands\nhint: a smaller --lr",
                report.step
            )));
        }
        bar.set_position(report.step);
        if let Some(drawn) = trainer.resample_if_due(&rows).map_err(fault)? {
            bar.suspend(|| eprintln!("step {}: {drawn} features drawn anew", report.step));
        }
        if report.step % 50 == 0 || report.step == steps {
            if args.json {
                json_line(&report)?;
            } else {
                let text = format!(
                    "step {}/{steps}  loss {:.3}  explained {:.4}  L0 {:.1}  dead {:.1} %  lr {:.1e}",
                    report.step,
                    report.loss,
                    report.explained,
                    report.l0,
                    100.0 * report.dead,
                    report.lr
                );
                bar.suspend(|| eprintln!("{text}"));
            }
        }
        if report.step % args.save_every.max(1) == 0 {
            trainer.save(&checkpoint).map_err(Failure::other)?;
        }
        last = Some(report);
    }
    bar.finish_and_clear();
    trainer.save(&checkpoint).map_err(Failure::other)?;
    let mut origin = Origin {
        model: Some(about.model.clone()),
        hook: Some(format!("blocks.{}.attn.hook_z", args.layer)),
        context: Some(about.context),
        prepend_bos: Some(true),
        ..Origin::default()
    };
    // Raw head outputs: nothing is folded into them.
    origin.more.insert(
        "model_from_pretrained_kwargs".into(),
        json!({"no_processing": true, "fold_value_biases": false}),
    );
    origin.more.insert("bos_token_id".into(), json!(about.bos));
    origin.more.insert("trained_rows".into(), json!(args.rows));
    let stored = Stored::new(trainer.export().map_err(Failure::other)?, origin);
    stored.write(&args.out).map_err(Failure::other)?;
    let took = start.elapsed().as_secs_f64();
    let speed = seen as f64 / took.max(1e-9);
    if args.json {
        return json_line(
            &json!({"steps": trainer.steps(), "from": from, "rows_per_s": speed, "last": last, "drawn": trainer.drawn()}),
        );
    }
    line(format_args!(
        "{} steps, {speed:.0} rows/s; the dictionary is in {}",
        trainer.steps() - from,
        args.out.display()
    ))
}
