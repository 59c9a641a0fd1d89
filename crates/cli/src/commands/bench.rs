//! `antefix bench`: speed, as text or JSON lines. `--serve` and what goes with it is in `load`.

use std::path::PathBuf;
use std::sync::Arc;

use antefix_attention::method::{DENSE, Program};
use antefix_lab::bench::{self, BenchError, Row, SharedRow};
use antefix_lab::likelihood::passage;
use antefix_lab::plans::PlansError;
use antefix_lab::plot::{Curve, curves};
use antefix_lab::sparse::{SparseRow, compare};
use antefix_lab::sparse_decode::{Draws, decode};
use antefix_lab::tasks::Prose;
use antefix_lab::{bench_method, host::EngineHost};
use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::ALL;
use antefix_papers::repro::Drawn;
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
    /// Sparse attention beside dense instead: time, density, distance of the predictions. Methods of the axis `decode` draw `--decode` tokens
    /// in `--batch` sequences
    #[arg(long, conflicts_with_all = ["methods", "shared_prefix", "compare", "hooks"])]
    sparse: bool,
    /// With --sparse: tokens of the prompts
    #[arg(long, value_delimiter = ',', default_value = "4096,8192")]
    lengths: Vec<usize>,
    /// With --sparse: methods, each NAME[,knob=value...]
    #[arg(
        long = "methods",
        value_delimiter = ',',
        default_value = "flexprefill,anchor_attention,block_topk"
    )]
    sparse_methods: Vec<String>,
    /// With --sparse: measure the recall of the plans of prompts on this many rows of each of up to 32 stretches, in passes of their own
    #[arg(long, default_value_t = 0)]
    recall_rows: usize,
    /// With --sparse: prompts out of this text instead of generated prose
    #[arg(long, value_name = "FILE", requires = "sparse")]
    text: Option<PathBuf>,
    /// With --sparse: draw the lost share of attention (KL, if recall is not measured) against the time of attention of prompts, as SVG
    #[arg(long, value_name = "FILE", requires = "sparse")]
    plot: Option<PathBuf>,
    /// With --sparse: sequences that draw read the same pages of the prompt, as in the server; otherwise each has a copy
    #[arg(long, requires = "sparse")]
    shared: bool,
    /// How many sequences; default: 1,8,32, with --sparse 1
    #[arg(long, value_delimiter = ',')]
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
    if args.sparse {
        return sparse(args, &model, &tokenizer);
    }
    if !args.shared_prefix.is_empty() {
        let n = args.decode.iter().copied().find(|&n| n > 0).unwrap_or(64);
        for &prefix in &args.shared_prefix {
            for &batch in batches(args, &[1, 8, 32]) {
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

fn batches<'a>(args: &'a Args, default: &'a [usize]) -> &'a [usize] {
    if args.batch.is_empty() {
        default
    } else {
        &args.batch
    }
}

/// Sparse attention beside dense attention, length by length: prompts, then drawn tokens.
fn sparse(args: &Args, model: &Arc<Model>, tokenizer: &Arc<Tokenizer>) -> Result<(), Failure> {
    let prose = match &args.text {
        Some(file) => Prose::Text(String::from_utf8_lossy(&super::read(file)?).into_owned()),
        None => Prose::Generated,
    };
    // `a,x=1,b` are the methods `a,x=1` and `b`.
    let mut texts: Vec<String> = Vec::new();
    for word in &args.sparse_methods {
        match texts.last_mut() {
            Some(last) if word.contains('=') => *last += &format!(",{word}"),
            _ => texts.push(word.clone()),
        }
    }
    let one = |text: &String| {
        let method = MethodArgs {
            methods: vec![text.clone()],
        };
        method.program(model)
    };
    // Dense attention is always there, and first.
    let asked = texts.iter().filter(|text| *text != DENSE);
    let programs: Vec<Arc<Program>> = asked
        .map(one)
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .collect();
    let (given, drawn): (Vec<_>, Vec<_>) = programs.into_iter().partition(|p| p.planner().is_some());
    let steps = args.decode.iter().copied().find(|&n| n > 0).unwrap_or(64);
    let failure = |e: PlansError| match e {
        PlansError::Engine(_) => Failure::other(e),
        _ => Failure::input(e),
    };
    let mut points = Vec::new();
    for &length in &args.lengths {
        let context = model.spec().context;
        if length < 2 || length > context {
            return Err(Failure::Input(anyhow!(
                "a length is {length}\nhint: `--lengths` from 2 to {context}"
            )));
        }
        let tokens = passage(tokenizer, &prose, length, 1);
        if tokens.len() < length {
            return Err(Failure::Input(anyhow!(
                "the text has {} tokens, {length} are asked for\nhint: give a longer text or smaller `--lengths`",
                tokens.len()
            )));
        }
        let mut printed = Ok(());
        if !given.is_empty() {
            let row = |row: SparseRow| {
                let print = print_prefill(&row, args.json);
                points.push((
                    row.method,
                    length,
                    row.attn_s,
                    row.recall.map_or(row.kl, |recall| 1.0 - recall),
                ));
                if printed.is_ok() {
                    printed = print;
                }
            };
            compare(model, &tokens, &given, args.recall_rows, row).map_err(failure)?;
        }
        if !drawn.is_empty() {
            let row = |row: Drawn| {
                let print = print_drawn(&row, args.json);
                if printed.is_ok() {
                    printed = print;
                }
            };
            let draws = Draws {
                steps,
                batches: batches(args, &[1]),
                shared: args.shared,
            };
            decode(model, &tokens, draws, &drawn, row).map_err(failure)?;
        }
        printed?;
    }
    match &args.plot {
        Some(file) => plot(file, points, args.recall_rows > 0),
        None => Ok(()),
    }
}

fn print_prefill(row: &SparseRow, json: bool) -> Result<(), Failure> {
    if json {
        return json_line(row);
    }
    let recall = row.recall.map_or_else(|| "-".into(), |r| format!("{r:.3}"));
    line(format_args!(
        "{:>6}  {:8.2} s, attention {:7.2} s, planning {:6.2} s, density {:.3}, recall {recall}, KL {:.4}, top-1 {:.3}  {}",
        row.length, row.ttft_s, row.attn_s, row.plan_s, row.density, row.kl, row.top1, row.method
    ))
}

fn print_drawn(row: &Drawn, json: bool) -> Result<(), Failure> {
    if json {
        return json_line(row);
    }
    line(format_args!(
        "{:>6} x {:<3} {:7.1} tok/s, attention {:6.2} ms a step, planning {:6.2} ms, density {:.3}, KL {:.4}, top-1 {:.3}  {}",
        row.length,
        row.batch,
        row.tok_s,
        row.attn_s * 1e3,
        row.plan_s * 1e3,
        row.density,
        row.kl,
        row.top1,
        row.method
    ))
}

/// A curve a method and length through its settings, `(method, length, seconds, lost share)`.
fn plot(
    file: &std::path::Path,
    mut points: Vec<(String, usize, f64, f64)>,
    recall: bool,
) -> Result<(), Failure> {
    points.sort_by(|a, b| a.2.total_cmp(&b.2));
    let mut drawn: Vec<Curve> = Vec::new();
    for (method, length, seconds, lost) in points {
        let name = format!("{} {length}", method.split(',').next().unwrap_or_default());
        match drawn.iter_mut().find(|c| c.name == name) {
            Some(curve) => curve.points.push((seconds, lost)),
            None => drawn.push(Curve {
                name,
                points: vec![(seconds, lost)],
            }),
        }
    }
    let lost = match recall {
        true => "lost share of attention (1 - recall)",
        false => "KL from dense predictions, nats",
    };
    let axes = ("attention of the prompt, seconds", lost);
    let svg = curves("Sparse prefill: what is lost against time", axes, &drawn).map_err(Failure::other)?;
    super::analyse::write(file, &svg)
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
