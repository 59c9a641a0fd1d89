//! `antefix tune`: settings of a sparse method that meet a target on one's own prompts, as a profile for `--profile`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use antefix_attention::method::{Axis, Band, Bands, Card, Dial, Knobs, Method, RawChoice, Trust, find};
use antefix_lab::tune::{
    self, Closeness, MeasureError, Target, Task, Tried, TuneError, Tuned, band, tune, written,
};
use antefix_papers::ALL;
use anyhow::{Context, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::json;

use super::{json_line, line, text_tokens};
use crate::failure::Failure;
use crate::method::{Profile, profiles};
use crate::model::{Loaded, ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// NAME[,knob=value...] of the axis `prefill` or `decode`: knobs that are given stay as they are
    #[arg(long)]
    method: String,
    /// The least density at which this share of the weights of dense attention is kept
    #[arg(long, value_name = "SHARE")]
    target_recall: Option<f64>,
    /// The least density at which predictions are no farther from dense ones, nats; takes longer
    #[arg(long, value_name = "NATS")]
    target_kl: Option<f64>,
    /// The largest recall at which no more than this share of the pairs of query and key is kept
    #[arg(long, value_name = "SHARE")]
    budget: Option<f64>,
    /// KNOB=FROM..TO: a knob to turn instead of the method's own; once or twice
    #[arg(long, value_name = "KNOB=FROM..TO")]
    knob: Vec<String>,
    /// Share of the prompts that verify what the others found, at least one prompt
    #[arg(long, default_value_t = 0.25)]
    held_out: f64,
    /// Stretches of a prompt on which recall is looked at
    #[arg(long, default_value_t = 4)]
    stretches: usize,
    /// Rows of a stretch on which recall is measured
    #[arg(long, default_value_t = 4)]
    rows: usize,
    /// Decides which prompts verify, and which stretches are looked at
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the profile here; bands of other lengths, and methods of other axes, that are in the file already are kept
    #[arg(long, value_name = "PROFILE")]
    out: PathBuf,
    /// JSON lines
    #[arg(long)]
    json: bool,
    /// Texts, a file a prompt; in files that end with `.jsonl` each line is one: a string, or an object with `prompt`
    #[arg(required = true)]
    prompts: Vec<PathBuf>,
}

/// A line of a `.jsonl` file.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a line is a string, or an object with `prompt`")]
enum Line {
    Text(String),
    Object { prompt: String },
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let target = target(args)?;
    if !(args.held_out > 0.0 && args.held_out < 1.0) || args.rows == 0 || args.stretches == 0 {
        return Err(Failure::Input(anyhow!(
            "`--held-out` lies between 0 and 1, `--rows` and `--stretches` are at least 1"
        )));
    }
    let (method, task) = task(args, target)?;
    let texts = texts(&args.prompts)?;
    let earlier = match args.out.exists() {
        true => Profile::read(&args.out, Trust::Local)?,
        false => Profile::default(),
    };
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    earlier.fit(&model, &args.model.model, Trust::Local)?;
    let prompts: Vec<Vec<u32>> = texts
        .iter()
        .map(|text| text_tokens(&tokenizer, text.as_bytes()))
        .collect();
    let context = model.spec().context;
    if let Some(i) = prompts.iter().position(|prompt| prompt.len() > context) {
        return Err(Failure::Input(anyhow!(
            "prompt {} has {} tokens, the context of the model holds {context}\nhint: shorten it",
            i + 1,
            prompts[i].len()
        )));
    }
    let (from, below) = band(prompts.iter().map(Vec::len));
    let fresh = Band {
        from,
        below: Some(below),
        ..Band::default()
    };
    let place = place(&earlier, &fresh, &args.out)?;

    let bar = spinner();
    let computed = || bar.inc(1);
    let mut printed = Ok(());
    let mut told = |tried: &Tried| {
        let print = bar.suspend(|| say(tried, args.json));
        if printed.is_ok() {
            printed = print;
        }
    };
    let folders = profiles()?;
    let found = tune(
        (&model, method),
        &prompts,
        &task,
        (&folders, &computed),
        &mut told,
    );
    bar.finish_and_clear();
    printed?;
    let tuned = found.map_err(|e| match e {
        TuneError::Few(_)
        | TuneError::Short { .. }
        | TuneError::Measure(MeasureError::Rig(_) | MeasureError::NoPlanner(_)) => Failure::input(e),
        _ => Failure::other(e),
    })?;
    keep(args, (earlier, place, fresh), method.card().axis, &tuned)?;
    report(args, &tuned, (from, below))
}

fn target(args: &Args) -> Result<Target, Failure> {
    let share = |name: &str, x: f64| match x > 0.0 && x <= 1.0 {
        true => Ok(x),
        false => Err(Failure::Input(anyhow!(
            "`{name}` is {x}\nhint: a share above 0, up to 1"
        ))),
    };
    match (args.target_recall, args.target_kl, args.budget) {
        (Some(recall), None, None) => Ok(Target::Recall(share("--target-recall", recall)?)),
        (None, Some(kl), None) if kl > 0.0 && kl.is_finite() => Ok(Target::Kl(kl)),
        (None, Some(kl), None) => Err(Failure::Input(anyhow!(
            "`--target-kl` is {kl}\nhint: nats, above 0"
        ))),
        (None, None, Some(budget)) => Ok(Target::Budget(share("--budget", budget)?)),
        _ => Err(Failure::Input(anyhow!(
            "one target is needed\nhint: --target-recall 0.95, --target-kl 0.01 or --budget 0.2"
        ))),
    }
}

/// The method, and what to search.
fn task(args: &Args, target: Target) -> Result<(&'static dyn Method, Task), Failure> {
    let raw = RawChoice::parse(&args.method).map_err(Failure::input)?;
    find(ALL, &raw.name).map_err(Failure::input)?;
    let named = ALL.iter().copied().find(|m| m.card().name == raw.name);
    let method = named.expect("it was found");
    let card: &'static Card = method.card();
    if !matches!(card.axis, Axis::Prefill | Axis::Decode) {
        return Err(Failure::Input(anyhow!(
            "`{}` is a method of the axis `{}`\nhint: methods of the axes `prefill` and `decode` can be tuned",
            card.name,
            card.axis
        )));
    }
    let start = Knobs::new(card, &raw.knobs).map_err(Failure::input)?;
    let dials = match args.knob.is_empty() {
        true => {
            let own = method.dials().iter().copied();
            own.filter(|dial| !raw.knobs.contains_key(dial.knob))
                .take(2)
                .collect()
        }
        false => args
            .knob
            .iter()
            .map(|text| dial(card, text))
            .collect::<Result<Vec<_>, _>>()?,
    };
    let twice = dials.len() == 2 && dials[0].knob == dials[1].knob;
    if dials.is_empty() || dials.len() > 2 || twice {
        return Err(Failure::Input(anyhow!(
            "one or two knobs of `{}` can be turned, {} are\nhint: --knob KNOB=FROM..TO; `antefix methods {}` lists them",
            card.name,
            if twice { 1 } else { dials.len() },
            card.name
        )));
    }
    let closeness = Closeness {
        stretches: args.stretches,
        rows: args.rows,
        seed: args.seed,
    };
    Ok((
        method,
        Task {
            target,
            dials,
            start,
            held_out: args.held_out,
            closeness,
        },
    ))
}

/// Reads `KNOB=FROM..TO`.
fn dial(card: &'static Card, text: &str) -> Result<Dial, Failure> {
    let parts = || {
        let (name, range) = text.split_once('=')?;
        let (from, to) = range.split_once("..")?;
        Some((name.trim(), from.trim().parse().ok()?, to.trim().parse().ok()?))
    };
    let Some((name, from, to)) = parts() else {
        return Err(Failure::Input(anyhow!(
            "`--knob {text}`\nhint: KNOB=FROM..TO, such as gamma=0.5..0.99"
        )));
    };
    let names: Vec<&str> = card.knobs.iter().map(|k| k.name).collect();
    let Some(knob) = card.knob(name) else {
        return Err(Failure::Input(anyhow!(
            "`{}` has no knob `{name}`\nhint: choose from {}",
            card.name,
            names.join(", ")
        )));
    };
    let dial = Dial {
        knob: knob.name,
        from,
        to,
    };
    match dial.fault(card) {
        None => Ok(dial),
        Some(fault) => Err(Failure::Input(anyhow!("{fault}"))),
    }
}

fn texts(files: &[PathBuf]) -> Result<Vec<String>, Failure> {
    let mut texts = Vec::new();
    for file in files {
        let text = String::from_utf8_lossy(&super::read(file)?).into_owned();
        if file.extension().is_none_or(|extension| extension != "jsonl") {
            texts.push(text);
            continue;
        }
        for (i, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
        {
            let at = || format!("`{}`, line {}", file.display(), i + 1);
            let read: Line = serde_json::from_str(line)
                .with_context(at)
                .map_err(Failure::Input)?;
            texts.push(match read {
                Line::Text(text) | Line::Object { prompt: text } => text,
            });
        }
    }
    Ok(texts)
}

/// Which band of `earlier` the fresh one continues, if any.
fn place(earlier: &Profile, fresh: &Band, file: &Path) -> Result<Option<usize>, Failure> {
    let same = |band: &Band| (band.from, band.below) == (fresh.from, fresh.below);
    if let Some(at) = earlier.bands.all().iter().position(same) {
        return Ok(Some(at));
    }
    match earlier.bands.all().iter().find(|band| band.overlaps(fresh)) {
        None => Ok(None),
        Some(other) => Err(Failure::Input(anyhow!(
            "`{}` has a band {}, the prompts make one {}\nhint: another --out, or prompts of other lengths",
            file.display(),
            other.lengths(),
            fresh.lengths()
        ))),
    }
}

fn spinner() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {pos} prompts computed, {elapsed}");
    let bar = ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn say(tried: &Tried, json: bool) -> Result<(), Failure> {
    let settings = written(&tried.knobs);
    let f = tried.figures;
    if json {
        return json_line(&json!({
            "stage": tried.stage, "settings": settings, "recall": f.recall, "density": f.density, "kl": f.kl, "top1": tried.top1,
        }));
    }
    let kl = f.kl.map_or_else(String::new, |kl| format!(", KL {kl:.5}"));
    line(format_args!(
        "{:<8}  recall {:.4}, density {:.4}{kl}  {settings}",
        tried.stage, f.recall, f.density
    ))
}

/// Writes the profile.
fn keep(
    args: &Args,
    (earlier, place, mut fresh): (Profile, Option<usize>, Band),
    axis: Axis,
    tuned: &Tuned,
) -> Result<(), Failure> {
    let mut bands: Vec<Band> = earlier.bands.all().to_vec();
    if let Some(at) = place {
        fresh = bands.remove(at);
    }
    fresh.methods.0.insert(axis, written(&tuned.knobs));
    bands.push(fresh);
    let profile = Profile {
        model: earlier.model.or_else(|| Some(args.model.model.clone())),
        bands: Bands::new(bands).map_err(Failure::other)?,
    };
    let text = profile.text().map_err(Failure::other)?;
    std::fs::write(&args.out, text)
        .with_context(|| format!("while writing `{}`", args.out.display()))
        .map_err(Failure::Other)
}

fn report(args: &Args, tuned: &Tuned, (from, below): (usize, usize)) -> Result<(), Failure> {
    let (settings, f) = (written(&tuned.knobs), tuned.verdict.figures);
    if args.json {
        return json_line(&json!({
            "stage": "tuned", "settings": settings, "recall": f.recall, "density": f.density, "kl": f.kl, "top1": tuned.verdict.top1,
            "held_out": tuned.held_out, "from": from, "below": below, "profile": args.out,
        }));
    }
    line(format_args!(
        "{settings} on {} prompts held out: recall {:.4}, density {:.4}, KL {:.5}, top-1 {:.3} at the last {} positions\n`{}` holds it for prompts \
         from {from} to below {below} tokens",
        tuned.held_out,
        f.recall,
        f.density,
        f.kl.unwrap_or(0.0),
        tuned.verdict.top1,
        tune::COMPARED,
        args.out.display()
    ))
}
