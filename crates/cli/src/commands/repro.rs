//! `antefix repro`: what papers claim, measured again.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use antefix_kernels::memory::keep_big_blocks;
use antefix_lab::repro::{Bench, Line, Ran, page, read, replace, reproduce, told, words};
use antefix_lab::tasks::Prose;
use antefix_papers::repro::{Claim, LabError, NO_MODEL, Scale, find};
use antefix_papers::{REPROS, claims};
use antefix_train::repro::{Ground, RUNS};
use anyhow::{Context, anyhow};
use indicatif::ProgressBar;
use serde_json::Value;

use super::doctor::processor;
use super::{json_line, line};
use crate::failure::Failure;
use crate::model::{self, ModelArgs, RunArgs, threads};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which; `--list` names them
    #[arg(required_unless_present_any = ["all", "list"], conflicts_with = "all")]
    slug: Vec<String>,
    /// Every reproduction
    #[arg(long)]
    all: bool,
    /// Names and claims, nothing is run
    #[arg(long)]
    list: bool,
    /// Short texts and few samples: minutes for all of them together
    #[arg(long)]
    fast: bool,
    /// Another model than the one each reproduction names: an alias, a `.gguf` file, a folder, or hf:OWNER/REPO[/FILE]
    #[arg(short, long)]
    model: Option<String>,
    #[command(flatten)]
    run: RunArgs,
    /// Filler and texts out of this file instead of generated sentences
    #[arg(long, value_name = "FILE")]
    prose: Option<PathBuf>,
    /// Append the rows behind each verdict, and the verdict, to DIR/repro-SLUG.jsonl
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Take the figures into DIR/reproductions.jsonl, and write DIR/reproductions.md out of it
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = "docs")]
    write_docs: Option<PathBuf>,
    /// One JSON object for each claim
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let all = claims();
    let mut chosen: Vec<Claim> = match &args.slug[..] {
        [] => all,
        slugs => slugs
            .iter()
            .map(|slug| find(&all, slug).map_err(|e| Failure::Input(anyhow!(e))))
            .collect::<Result<_, _>>()?,
    };
    if args.list {
        return chosen.into_iter().try_for_each(|claim| list(claim, args.json));
    }
    let prose = match &args.prose {
        Some(file) => Prose::Text(String::from_utf8_lossy(&super::read(file)?).into_owned()),
        None => Prose::Generated,
    };
    // Read before hours of work, so that a file that is none of ours is refused at once.
    let mut known = args
        .write_docs
        .as_deref()
        .map(known)
        .transpose()?
        .unwrap_or_default();
    if let Some(folder) = &args.out {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("`{}` cannot be made", folder.display()))
            .map_err(Failure::Input)?;
    }
    let scale = if args.fast { Scale::Fast } else { Scale::Full };
    keep_big_blocks();
    // The threads of training; whoever made them first was a test in the same process.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads(args.run.threads)?)
        .build_global();
    let model = |claim: &Claim| match claim.model_for(scale) {
        NO_MODEL => NO_MODEL.to_string(),
        own => args.model.clone().unwrap_or_else(|| own.into()),
    };
    // Each model is loaded once.
    chosen.sort_by_key(|claim| model(claim));
    let mut loaded: Option<(String, Place)> = None;
    let mut broken = Vec::new();
    for claim in chosen {
        let name = model(&claim);
        let place = match &mut loaded {
            Some((held, place)) if *held == name => place,
            other => {
                // The model before is gone before the next is loaded.
                *other = None;
                let place = load(&name, args, &prose)?;
                &mut other.insert((name, place)).1
            }
        };
        let bar = ProgressBar::new_spinner().with_message(claim.slug);
        bar.enable_steady_tick(Duration::from_millis(200));
        let done = measure(claim, place, scale, &prose);
        bar.finish_and_clear();
        let (found, rows) = match done {
            Ok(done) => done,
            Err(error) => {
                eprintln!("antefix: {}: {error}", claim.slug);
                broken.push(claim.slug);
                continue;
            }
        };
        if let Some(folder) = &args.out {
            append(&folder.join(format!("repro-{}.jsonl", claim.slug)), &rows, &found)?;
        }
        match args.json {
            true => json_line(&found)?,
            false => describe(&found, &rows)?,
        }
        replace(&mut known, found);
        if let Some(folder) = &args.write_docs {
            write_docs(folder, &known)?;
        }
    }
    match broken.is_empty() {
        true => Ok(()),
        false => Err(Failure::Other(anyhow!("failed: {}", broken.join(", ")))),
    }
}

/// Where claims are looked into.
struct Place {
    machine: String,
    /// The model, as it was asked for; nothing for claims without one.
    bench: Option<Bench>,
}

/// Instruments on the model `name`, and what the machine is.
fn load(name: &str, args: &Args, prose: &Prose) -> Result<Place, Failure> {
    let cpu = antefix_kernels::cpu::Cpu::best().path();
    let machine = format!("{}, {} threads, {cpu}", processor(), threads(args.run.threads)?);
    if name == NO_MODEL {
        return Ok(Place { machine, bench: None });
    }
    let model = ModelArgs { model: name.into() };
    let subject = model::subject(&model, &args.run)?;
    Ok(Place {
        machine,
        bench: Some(Bench::new(subject, prose.clone())),
    })
}

/// The line of a claim, and the rows behind it.
fn measure(
    claim: Claim,
    place: &mut Place,
    scale: Scale,
    prose: &Prose,
) -> Result<(Line, Vec<Value>), LabError> {
    let machine = &place.machine;
    if let (Some(repro), Some(bench)) = (REPROS.iter().find(|r| r.claim == claim), &mut place.bench) {
        return reproduce(repro, bench, scale, machine);
    }
    let run = RUNS.iter().find(|run| run.0 == claim.slug);
    let (_, run) = run.ok_or_else(|| LabError::Failed("nobody measures it".into()))?;
    let folder = tempfile::tempdir().map_err(|e| LabError::Failed(e.to_string()))?;
    let subject = place.bench.as_ref().map(Bench::subject);
    let ground = Ground {
        model: subject,
        text: &words(prose),
        folder: folder.path(),
    };
    let start = Instant::now();
    let outcome = run(&ground, scale);
    let ran = Ran {
        scale,
        model: subject.map_or(NO_MODEL, |s| &s.name),
        machine,
        seconds: start.elapsed().as_secs_f64(),
    };
    told(claim, &ran, outcome)
}

fn list(claim: Claim, json: bool) -> Result<(), Failure> {
    if json {
        let card = serde_json::json!({
            "slug": claim.slug, "claim": claim.says, "source": claim.source, "rule": claim.rule, "model": claim.model, "fast_model": claim.fast_model,
        });
        return json_line(&card);
    }
    line(format_args!(
        "{}\n  {}\n  {}\n",
        claim.slug, claim.says, claim.rule
    ))
}

fn describe(found: &Line, rows: &[Value]) -> Result<(), Failure> {
    let figure = |x: Option<f64>| x.map_or_else(|| "-".to_string(), |x| format!("{x:.4}"));
    line(format_args!("{}: {}", found.slug, found.verdict))?;
    line(format_args!("  claim     {}", found.claim))?;
    line(format_args!("  ours      {}: {}", found.model, found.scale))?;
    line(format_args!("  figure    {}", found.unit))?;
    line(format_args!("  measured  {}", figure(found.measured)))?;
    line(format_args!("  baseline  {}", figure(found.baseline)))?;
    line(format_args!("  why       {}", found.why))?;
    for row in rows {
        line(format_args!("  row       {row}"))?;
    }
    line(format_args!("  took      {:.0} s\n", found.seconds))
}

fn append(file: &Path, rows: &[Value], found: &Line) -> Result<(), Failure> {
    let mut text = String::new();
    for row in rows {
        text += &format!("{row}\n");
    }
    text += &(serde_json::to_string(found).map_err(Failure::other)? + "\n");
    let mut options = OpenOptions::new();
    options
        .create(true)
        .append(true)
        .open(file)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("`{}` cannot be written", file.display()))
        .map_err(Failure::Other)
}

/// The lines of earlier runs in `folder`.
fn known(folder: &Path) -> Result<Vec<Line>, Failure> {
    let file = folder.join("reproductions.jsonl");
    if !folder.is_dir() {
        return Err(Failure::Input(anyhow!(
            "`--write-docs {0}`: there is no folder `{0}`\nhint: run it in the root of the repository, or name a folder",
            folder.display()
        )));
    }
    if !file.is_file() {
        return Ok(Vec::new());
    }
    let text = String::from_utf8_lossy(&super::read(&file)?).into_owned();
    read(&text).map_err(|e| Failure::Input(anyhow!("`{}`, {e}", file.display())))
}

fn write_docs(folder: &Path, lines: &[Line]) -> Result<(), Failure> {
    let mut text = String::new();
    for line in lines {
        text += &(serde_json::to_string(line).map_err(Failure::other)? + "\n");
    }
    let written = std::fs::write(folder.join("reproductions.jsonl"), text)
        .and_then(|()| std::fs::write(folder.join("reproductions.md"), page(&claims(), lines)));
    written
        .with_context(|| format!("`{}` cannot be written", folder.display()))
        .map_err(Failure::Other)
}
