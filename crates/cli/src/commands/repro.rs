//! `antefix repro`: what papers claim, measured again.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use antefix_lab::repro::{Bench, Line, page, read, replace, reproduce};
use antefix_lab::tasks::Prose;
use antefix_papers::REPROS;
use antefix_papers::repro::{Repro, Scale, find};
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
    let mut chosen: Vec<&'static Repro> = match &args.slug[..] {
        [] => REPROS.to_vec(),
        slugs => slugs
            .iter()
            .map(|slug| find(REPROS, slug).map_err(|e| Failure::Input(anyhow!(e))))
            .collect::<Result<_, _>>()?,
    };
    if args.list {
        return chosen.into_iter().try_for_each(|r| list(r, args.json));
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
    let model = |repro: &Repro| args.model.clone().unwrap_or_else(|| repro.model.into());
    // Each model is loaded once.
    chosen.sort_by_key(|r| model(r));
    let mut loaded: Option<(Bench, String)> = None;
    let mut broken = Vec::new();
    for repro in chosen {
        let name = model(repro);
        let (bench, machine) = match &mut loaded {
            Some(l) if l.0.model_name() == name => l,
            other => {
                // The model before is gone before the next is loaded.
                *other = None;
                other.insert(load(&name, args, &prose)?)
            }
        };
        let bar = ProgressBar::new_spinner().with_message(repro.slug);
        bar.enable_steady_tick(Duration::from_millis(200));
        let done = reproduce(repro, bench, scale, machine);
        bar.finish_and_clear();
        let (found, rows) = match done {
            Ok(done) => done,
            Err(error) => {
                eprintln!("antefix: {}: {error}", repro.slug);
                broken.push(repro.slug);
                continue;
            }
        };
        if let Some(folder) = &args.out {
            append(&folder.join(format!("repro-{}.jsonl", repro.slug)), &rows, &found)?;
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

/// Instruments on the model `name`, and what the machine is.
fn load(name: &str, args: &Args, prose: &Prose) -> Result<(Bench, String), Failure> {
    let model = ModelArgs { model: name.into() };
    let subject = model::subject(&model, &args.run)?;
    let machine = format!(
        "{}, {} threads, {}",
        processor(),
        threads(args.run.threads)?,
        subject.model.cpu().path()
    );
    Ok((Bench::new(subject, prose.clone()), machine))
}

fn list(repro: &Repro, json: bool) -> Result<(), Failure> {
    if json {
        let card = serde_json::json!({
            "slug": repro.slug, "claim": repro.claim, "source": repro.source, "rule": repro.rule, "model": repro.model,
        });
        return json_line(&card);
    }
    line(format_args!(
        "{}\n  {}\n  {}\n",
        repro.slug, repro.claim, repro.rule
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
        .and_then(|()| std::fs::write(folder.join("reproductions.md"), page(REPROS, lines)));
    written
        .with_context(|| format!("`{}` cannot be written", folder.display()))
        .map_err(Failure::Other)
}
