//! `antefix bench`: speed, as text or JSON lines. `--serve` and what goes with it is in `load`.

use std::path::PathBuf;
use std::sync::Arc;

use antefix_attention::method::Program;
use antefix_lab::bench::{self, BenchError, Row, SharedRow};
use antefix_lab::{bench_method, host::EngineHost};
use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::ALL;
use anyhow::anyhow;

use super::load::{self, LoadArgs};
use super::{json_line, line};
use crate::failure::Failure;
use crate::hooks::HookArgs;
use crate::method::{MethodArgs, profiles};
use crate::model::{Loaded, ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Prompt lengths; 0 or nothing skips them
    #[arg(short = 'p', long, value_delimiter = ',', default_value = "512")]
    prompt: Vec<usize>,
    /// Tokens to decode; 0 skips that
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "128")]
    decode: Vec<usize>,
    /// Tokens already in the cache
    #[arg(short = 'd', long, value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Counted runs of each test
    #[arg(short = 'r', long, default_value_t = 5)]
    repeats: usize,
    /// Measure many sequences behind one prompt of these lengths instead
    #[arg(long, value_delimiter = ',')]
    shared_prefix: Vec<usize>,
    #[command(flatten)]
    method: MethodArgs,
    /// Decode with the hooks of this JSON file and without, in pairs: what they cost
    #[arg(long, value_name = "FILE", conflicts_with_all = ["methods", "shared_prefix", "compare"])]
    hooks: Option<PathBuf>,
    /// How many sequences
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    batch: Vec<usize>,
    /// JSON lines
    #[arg(long)]
    json: bool,
    /// JSON lines of an earlier run: adds the ratio to it
    #[arg(long)]
    compare: Option<PathBuf>,
    #[command(flatten)]
    load: LoadArgs,
}

fn failure(error: BenchError) -> Failure {
    match error {
        BenchError::Engine(_) => Failure::other(error),
        _ => Failure::input(error),
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if args.load.wanted() {
        return load::run(&args.load, &args.model, &args.run, args.json);
    }
    if args.repeats == 0 || args.batch.contains(&0) {
        return Err(Failure::Input(anyhow!(
            "`--repeats` and `--batch` are at least 1"
        )));
    }
    let before = args.compare.as_deref().map(earlier).transpose()?;
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    if !args.shared_prefix.is_empty() {
        let n = args.decode.iter().copied().find(|&n| n > 0).unwrap_or(64);
        for &prefix in &args.shared_prefix {
            for &batch in &args.batch {
                let row = bench::shared(&model, &tokenizer, prefix, batch, n).map_err(failure)?;
                print_shared(&row, args.json)?;
            }
        }
        return Ok(());
    }
    if let Some(program) = args.method.program(&model)? {
        return methods(args, &model, &tokenizer, &program);
    }
    if let Some(file) = &args.hooks {
        return hooks(args, &model, file);
    }
    for &depth in &args.depth {
        for &n in args.prompt.iter().filter(|&&n| n > 0) {
            print(
                &bench::prompt(&model, n, depth, args.repeats).map_err(failure)?,
                args.json,
                before.as_deref(),
            )?;
        }
        for &n in args.decode.iter().filter(|&&n| n > 0) {
            print(
                &bench::decode(&model, n, depth, args.repeats).map_err(failure)?,
                args.json,
                before.as_deref(),
            )?;
        }
    }
    Ok(())
}

/// Decoding with hooks beside decoding without: every number of tokens at every depth.
fn hooks(args: &Args, model: &Arc<Model>, file: &std::path::Path) -> Result<(), Failure> {
    for &depth in &args.depth {
        for &n in args.decode.iter().filter(|&&n| n > 0) {
            let hooks = HookArgs::of(file.to_path_buf()).observer(model, depth + 1)?;
            let Some(hooks) = hooks else { continue };
            let row = bench::hooked(model, &hooks, (n, depth), args.repeats).map_err(failure)?;
            if args.json {
                json_line(&row)?;
                continue;
            }
            line(format_args!(
                "{:<16} {:>9.1} tok/s, {:.1} without: {:+.2} % of the time (middle half {:+.2} to {:+.2}), {} pairs",
                row.test,
                row.tok_s,
                row.plain_tok_s,
                row.cost * 100.0,
                row.quartiles[0] * 100.0,
                row.quartiles[1] * 100.0,
                row.pairs
            ))?;
        }
    }
    Ok(())
}

/// A method beside dense attention: every prompt length with every number of decoded tokens.
fn methods(
    args: &Args,
    model: &Arc<Model>,
    tokenizer: &Arc<Tokenizer>,
    program: &Arc<Program>,
) -> Result<(), Failure> {
    for &n in args.prompt.iter().filter(|&&n| n > 1) {
        for &steps in args.decode.iter().filter(|&&n| n > 1) {
            let tokens = bench::tokens(model, n + steps, 1);
            // Methods may write a prompt several times.
            let mut host = EngineHost::with_room(model, tokenizer, n * 4 + steps, (ALL, profiles()?));
            let (prompt, answer) = tokens.split_at(n);
            let row = bench_method::method(&mut host, program, prompt, answer, args.repeats);
            let row = row.map_err(Failure::input)?;
            if args.json {
                json_line(&row)?;
                continue;
            }
            line(format_args!(
                "{}\n  prompt {n}, {steps} tokens: first token {:.3} s (dense {:.3}), then {:.1} tok/s (dense {:.1}), {:.1} % kept",
                row.method,
                row.ttft_s,
                row.dense_ttft_s,
                row.decode_tok_s,
                row.dense_decode_tok_s,
                row.kept * 100.0
            ))?;
        }
    }
    Ok(())
}

fn earlier(file: &std::path::Path) -> Result<Vec<Row>, Failure> {
    let text = String::from_utf8_lossy(&super::read(file)?).into_owned();
    text.lines()
        .filter(|l| !l.trim().is_empty())
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .map_err(|e| {
            Failure::Input(anyhow!(
                "`{}` is not what `antefix bench --json` writes: {e}",
                file.display()
            ))
        })
}

fn print(row: &Row, json: bool, before: Option<&[Row]>) -> Result<(), Failure> {
    if json {
        return json_line(row);
    }
    let spread = row
        .runs
        .iter()
        .fold((f64::INFINITY, 0.0f64), |a, &x| (a.0.min(x), a.1.max(x)));
    let ratio = before
        .and_then(|rows| rows.iter().find(|r| r.test == row.test))
        .map(|r| format!("  {:.2}x", row.tok_s / r.tok_s))
        .unwrap_or_default();
    line(format_args!(
        "{:<16} {:>9.1} tok/s  ({:.1} - {:.1}, {} runs)  rss {:.0} MiB{ratio}",
        row.test,
        row.tok_s,
        spread.0,
        spread.1,
        row.runs.len(),
        row.rss_mb
    ))
}

fn print_shared(row: &SharedRow, json: bool) -> Result<(), Failure> {
    if json {
        return json_line(row);
    }
    line(format_args!(
        "prefix {:>6}  batch {:>4}  {:>9.1} tok/s in all  prompt {:>9.1} tok/s  kv {:.1} MiB",
        row.prefix,
        row.batch,
        row.decode_tok_s_sum,
        row.prefill_tok_s,
        row.kv_bytes as f64 / f64::from(1 << 20)
    ))
}
