//! `antefix eval`: tasks whose answers a text holds, by length and depth; distance from dense attention and perplexity by position.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use antefix_attention::method::Program;
use antefix_engine::JobError;
use antefix_lab::eval::{self, EvalError, Plan, Record, Row, Runner, Setting, Step};
use antefix_lab::tasks::{Kit, Prose, Task};
use antefix_models::decoder::Model;
use anyhow::{Context, anyhow};
use indicatif::{ProgressBar, ProgressStyle};

use super::json_line;
use crate::failure::Failure;
use crate::method::MethodArgs;
use crate::model::{Loaded, ModelArgs, RunArgs};

mod distance;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// needle, needle-keys, needle-values, variables, common-words, frequent-words, lookup, two-hop, many-shot, copy, or
    /// `ruler` for all of them; `kl`: distance from dense attention at the answers to needles; `ppl`: perplexity by position
    #[arg(required = true)]
    tasks: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    method: MethodArgs,
    /// Run everything once under this method, beside those of `--method`, or without it (`dense`); repeatable
    #[arg(long, value_name = "METHOD")]
    sweep: Vec<String>,
    /// A cache policy decides before it has seen the question
    #[arg(long)]
    question_after_cut: bool,
    /// Compute a prompt once for all methods that start from it densely (cache policies, planners of decoding): the same answers, but the
    /// times to the first token are those of cached prompts
    #[arg(long)]
    reuse_prompts: bool,
    /// Prompt lengths in tokens
    #[arg(long, value_delimiter = ',', default_value = "2048,4096")]
    lengths: Vec<usize>,
    /// Where the fact stands: a list such as 0,0.5,1, or FROM..TO:COUNT
    #[arg(long, default_value = "0..1:5")]
    depths: String,
    /// Samples of each cell
    #[arg(short = 'n', long, default_value_t = 5)]
    samples: usize,
    /// Decides needles, filler and places
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Digits of the numbers that are hidden; small models manage few
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(2..=18))]
    digits: u32,
    /// Tokens of a document of examples in `many-shot`, for methods that reuse documents; 0: each example is one
    #[arg(long, default_value_t = 0)]
    shot_tokens: usize,
    /// Filler out of this text instead of generated sentences
    #[arg(long)]
    prose: Option<PathBuf>,
    /// Keep every sample here (JSON lines); what is there already is not computed again
    #[arg(long)]
    out: Option<PathBuf>,
    /// Write a page with tables and plots
    #[arg(long)]
    report: Option<PathBuf>,
    /// One JSON object for each cell instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let (distances, names): (Vec<String>, Vec<String>) = args
        .tasks
        .iter()
        .cloned()
        .partition(|name| distance::KINDS.contains(&name.as_str()));
    if !distances.is_empty() && (args.out.is_some() || args.report.is_some()) {
        return Err(Failure::Input(anyhow!(
            "`kl` and `ppl` keep no samples\nhint: run them without `--out` and `--report`"
        )));
    }
    let plan = Plan {
        tasks: tasks(&names)?,
        lengths: args.lengths.clone(),
        depths: depths(&args.depths)?,
        samples: args.samples,
        seed: args.seed,
    };
    if plan.samples == 0 || plan.lengths.is_empty() {
        return Err(Failure::Input(anyhow!(
            "nothing to run\nhint: `--samples` and `--lengths` are at least 1"
        )));
    }
    let prose = match &args.prose {
        Some(file) => Prose::Text(String::from_utf8_lossy(&super::read(file)?).into_owned()),
        None => Prose::Generated,
    };
    let mut store = args.out.as_deref().map(Store::open).transpose()?;
    let earlier = store
        .as_mut()
        .map(|s| std::mem::take(&mut s.earlier))
        .unwrap_or_default();
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    let longest = plan.lengths.iter().max().copied().unwrap_or(0);
    let programs = programs(args, &model)?;
    let kit = Kit {
        tokenizer: &tokenizer,
        prose: &prose,
        digits: args.digits,
        shots: args.shot_tokens,
    };
    let subject = distance::Subject {
        model: &model,
        tokenizer: &tokenizer,
        programs: &programs,
    };
    for kind in &distances {
        subject.run(kind, args, &kit, &plan)?;
    }
    if plan.tasks.is_empty() {
        return Ok(());
    }
    let mut setting = Setting {
        name: &args.model.model,
        context: longest + 128,
        kept_prompts: 0,
        question_after_cut: args.question_after_cut,
    };
    // With kept prompts all methods go through one cell after the other, on one engine; else all cells through one method after the other.
    let (plans, groups): (_, Vec<&[_]>) = match args.reuse_prompts {
        true => {
            setting.kept_prompts = plan.samples;
            (plan.cells(), vec![&programs])
        }
        false => (vec![plan.clone()], programs.chunks(1).collect()),
    };
    let mut rows = Vec::new();
    for programs in groups {
        let mut runner = Runner::new(&model, &tokenizer, &setting, programs);
        for plan in &plans {
            for program in programs {
                runner.under(program.clone());
                run_tasks(
                    args,
                    (plan, &kit),
                    &mut runner,
                    (&earlier, store.as_mut()),
                    &mut rows,
                )?;
            }
        }
    }
    if let Some(path) = &args.report {
        let about = [
            format!(
                "Model {}, method {}, seed {}, {} samples a cell.",
                args.model.model,
                programs
                    .iter()
                    .map(|p| eval::method_name(p.as_deref(), args.question_after_cut))
                    .collect::<Vec<_>>()
                    .join(" | "),
                plan.seed,
                plan.samples
            ),
            format!(
                "Prompts of {:?} tokens, facts at {:?} of the context, numbers of {} digits.",
                plan.lengths, plan.depths, args.digits
            ),
        ];
        let page = eval::html("antefix eval", &about, &rows).map_err(Failure::other)?;
        std::fs::write(path, page)
            .with_context(|| format!("`{}` cannot be written", path.display()))
            .map_err(Failure::Other)?;
    }
    if !args.json {
        std::io::stdout()
            .lock()
            .write_all(eval::table(&rows).as_bytes())?;
    }
    Ok(())
}

/// The program of `--method`, once with each method of `--sweep`.
fn programs(args: &Args, model: &Model) -> Result<Vec<Option<Arc<Program>>>, Failure> {
    if args.sweep.is_empty() {
        return Ok(vec![args.method.program(model)?]);
    }
    let more = |name: &String| (name != "dense").then(|| name.clone());
    args.sweep
        .iter()
        .map(|name| args.method.program_with(model, more(name).as_deref()))
        .collect()
}

/// Runs the tasks of `plan` and adds their cells to `rows`. In a sweep, a method under which a length does not fit the model goes without
/// it and all after it.
fn run_tasks(
    args: &Args,
    (plan, kit): (&Plan, &Kit<'_>),
    runner: &mut Runner,
    (earlier, mut store): (&[Record], Option<&mut Store>),
    rows: &mut Vec<Row>,
) -> Result<(), Failure> {
    let bar = ProgressBar::new(0);
    bar.set_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left {eta}) {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let done = eval::run(plan, kit, runner, earlier, |step| match step {
        Step::Sample {
            done,
            all,
            record,
            new,
        } => {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            bar.set_message(format!("{} {}", record.task, record.length));
            match &mut store {
                Some(store) if new => store.append(record),
                _ => Ok(()),
            }
        }
        Step::Cell(row) => {
            rows.push(row.clone());
            match args.json {
                true => bar
                    .suspend(|| json_line(row))
                    .map_err(|e| std::io::Error::other(e.to_string())),
                false => Ok(()),
            }
        }
    });
    bar.finish_and_clear();
    match done {
        Ok(_) => Ok(()),
        Err(EvalError::Job(error @ JobError::TooLong { .. })) if !args.sweep.is_empty() => {
            eprintln!("antefix: {}: {error}", runner.method());
            Ok(())
        }
        Err(e @ (EvalError::Task(_) | EvalError::Job(_))) => Err(Failure::input(e)),
        Err(e) => Err(Failure::other(e)),
    }
}

fn tasks(names: &[String]) -> Result<Vec<Task>, Failure> {
    let mut out = Vec::new();
    for name in names {
        match name.as_str() {
            "ruler" => out.extend(Task::ALL),
            name => out.push(
                name.parse()
                    .map_err(|e| Failure::Input(anyhow!("{e}; or ruler, kl, ppl")))?,
            ),
        }
    }
    Ok(out)
}

/// `0,0.5,1` or `0..1:5`.
fn depths(text: &str) -> Result<Vec<f64>, Failure> {
    let wrong = || {
        Failure::Input(anyhow!(
            "`--depths {text}`\nhint: a list such as 0,0.5,1, or FROM..TO:COUNT, all from 0 to 1"
        ))
    };
    let number = |t: &str| t.trim().parse::<f64>().ok().filter(|d| (0.0..=1.0).contains(d));
    let list: Option<Vec<f64>> = match text.split_once("..") {
        Some((from, rest)) => {
            let (to, count) = rest.split_once(':').unwrap_or((rest, "5"));
            let count: usize = count
                .parse()
                .ok()
                .filter(|n| (1..=1000).contains(n))
                .ok_or_else(wrong)?;
            let (from, to) = number(from).zip(number(to)).ok_or_else(wrong)?;
            let step = (to - from) / (count.max(2) - 1) as f64;
            Some((0..count).map(|i| from + step * i as f64).collect())
        }
        None => text.split(',').map(number).collect(),
    };
    list.ok_or_else(wrong)
}

/// A file of records that grows line by line.
struct Store {
    earlier: Vec<Record>,
    file: File,
}

impl Store {
    /// Opens or makes the file and reads what it holds. A last line that was cut off, as a killed run leaves it, is dropped.
    fn open(path: &Path) -> Result<Self, Failure> {
        let trouble = |e: std::io::Error| {
            Failure::Input(anyhow::Error::new(e).context(format!("`{}` cannot be used", path.display())))
        };
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(trouble)?;
        let (mut earlier, mut whole, mut number) = (Vec::new(), 0u64, 0);
        let mut reader = BufReader::new(&file);
        let mut line = String::new();
        while reader.read_line(&mut line).map_err(trouble)? > 0 {
            number += 1;
            match serde_json::from_str(&line) {
                Ok(record) if line.ends_with('\n') => earlier.push(record),
                Err(e) if line.ends_with('\n') => {
                    return Err(Failure::Input(anyhow!(
                        "`{}`, line {number} is not what `antefix eval --out` writes: {e}\nhint: choose another file",
                        path.display()
                    )));
                }
                _ => break,
            }
            whole += line.len() as u64;
            line.clear();
        }
        file.set_len(whole).map_err(trouble)?;
        Ok(Self { earlier, file })
    }

    fn append(&mut self, record: &Record) -> std::io::Result<()> {
        let mut line = serde_json::to_string(record)?;
        line.push('\n');
        self.file.write_all(line.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_are_lists_or_ranges() {
        assert_eq!(depths("0..1:5").unwrap(), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(depths("0.2..0.2:1").unwrap(), [0.2]);
        assert_eq!(depths("0,0.5").unwrap(), [0.0, 0.5]);
        for bad in ["", "2", "0..1:0", "a..b:3", "0..1:99999", "nan", "-0.5"] {
            assert!(depths(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_cut_line_is_dropped_and_a_foreign_file_is_refused() {
        let dir = std::env::temp_dir().join(format!("antefix-eval-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("out.jsonl");
        let record = r#"{"task":"needle","method":"dense","model":"m","length":9,"depth":0.5,"seed":0,"sample":0,"score":1.0,"kept":1.0,"ttft_s":0.1,"answers":["1"],"text":"1"}"#;
        std::fs::write(&path, format!("{record}\n{{\"task\":\"nee")).unwrap();
        let mut store = Store::open(&path).unwrap();
        assert_eq!(store.earlier.len(), 1);
        let first = store.earlier[0].clone();
        store.append(&first).unwrap();
        drop(store);
        assert_eq!(Store::open(&path).unwrap().earlier.len(), 2);
        std::fs::write(&path, "not ours\n").unwrap();
        assert!(Store::open(&path).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
