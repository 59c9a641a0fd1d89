//! `antefix analyse`: what goes on inside a model.

use std::io::Write;
use std::path::{Path, PathBuf};

use antefix_lab::attention::{HeadSummary, SinkMap, summaries};
use antefix_lab::heads::{
    Cut, MaskCurve, NeedleRun, NeedleRuns, Pattern, Search, Subject, calibration, eviction, heat_map,
    mask_plot, masking, pattern, retrieval,
};
use antefix_models::tokenizer::Specials;
use antefix_papers::act::sinks::Rule;
use antefix_papers::heads::{HeadProfile, HeadTest, spearman};
use antefix_papers::retrieval_heads::mask::Mask;
use anyhow::{Context, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{json_line, line};
use crate::failure::Failure;
use crate::model::{self, ModelArgs, RunArgs};

mod ape;
mod sparsity;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// What every head reads of a text: sinks, window, entropy, top keys
    Attention(AttentionArgs),
    /// How sparse every head's own attention is: which share of the keys carries 90, 95 and 99 % of the weight
    Sparsity(sparsity::Args),
    /// Which heads retrieve, copy or sink: a profile that methods choose heads by
    Heads(HeadsArgs),
    /// Which temperature and scale of method ape suit a model and its prompts
    Ape(ape::Args),
}

#[derive(clap::Args)]
struct AttentionArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// A text file; `-` reads standard input
    file: PathBuf,
    /// Only this layer; repeatable
    #[arg(long)]
    layer: Vec<usize>,
    /// Only this head of each layer; repeatable
    #[arg(long)]
    head: Vec<usize>,
    /// Keys shown of each head
    #[arg(long, default_value_t = 3)]
    top: usize,
    /// Tokens of the text at most: the work grows with their square
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// A picture of the mass on sinks, SVG
    #[arg(long, value_name = "FILE")]
    heat_map: Option<PathBuf>,
    /// A picture of the mass on hidden sinks (method act), SVG; then also how many heads have some, and which texts they are
    #[arg(long, value_name = "FILE")]
    sink_map: Option<PathBuf>,
    /// One JSON object a head
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct HeadsArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// What to look for
    #[arg(long, value_parser = ["retrieval", "semantic", "induction", "echo", "sink", "previous", "act", "eviction"])]
    kind: String,
    /// Write the profile here; measurements that are in the file already are kept
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Needle runs; labelled examples for act; answers for eviction
    #[arg(long, default_value_t = 60)]
    runs: usize,
    /// Prompt lengths of the needle runs, tokens; for act the first counts
    #[arg(long, value_delimiter = ',', default_values_t = [512, 1024, 2048])]
    lengths: Vec<usize>,
    /// Places of the needle, 0 to 1
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])]
    depths: Vec<f64>,
    /// Tokens that are repeated, for induction and echo
    #[arg(long, default_value_t = 256)]
    segment: usize,
    /// Texts of repeated tokens
    #[arg(long, default_value_t = 3)]
    texts: u64,
    /// Seed of prompts and draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write every needle run to this file, one JSON object a line; runs that are in it already are not made again
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
    /// A picture of the scores, SVG
    #[arg(long, value_name = "FILE")]
    heat_map: Option<PathBuf>,
    /// Take the measurement from the profile in --out, if it is there
    #[arg(long, requires = "out")]
    reuse: bool,
    /// Then switch off so many of the best heads, and as many others, while needles are answered
    #[arg(long, value_delimiter = ',')]
    mask: Vec<usize>,
    /// Prompts of that experiment
    #[arg(long, default_value_t = 12)]
    mask_prompts: usize,
    /// Random draws of other heads
    #[arg(long, default_value_t = 5)]
    mask_draws: usize,
    /// Even attention (uniform) or no output (zero)
    #[arg(long, default_value = "uniform")]
    mask_mode: Mask,
    /// A picture of that experiment: recall against the number of heads off, SVG
    #[arg(long, value_name = "FILE", requires = "mask")]
    mask_plot: Option<PathBuf>,
    /// JSON lines
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    match &args.what {
        What::Attention(args) => attention(args),
        What::Sparsity(args) => sparsity::run(args),
        What::Heads(args) => heads(args),
        What::Ape(args) => ape::run(args),
    }
}

pub(super) fn write(file: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(file, text)
        .with_context(|| format!("while writing `{}`", file.display()))
        .map_err(Failure::Other)
}

fn attention(args: &AttentionArgs) -> Result<(), Failure> {
    let text = super::read(&args.file)?;
    let subject = model::subject(&args.model, &args.run)?;
    let tokenizer = &subject.tokenizer;
    let mut tokens: Vec<u32> = tokenizer
        .bos()
        .filter(|_| tokenizer.add_bos())
        .into_iter()
        .collect();
    tokens.extend(tokenizer.encode_bytes(&text, Specials::Parse));
    tokens.truncate(args.tokens.min(subject.model.spec().context));
    if tokens.is_empty() {
        return Err(Failure::Input(anyhow!("there is no token to read")));
    }
    let chosen = |list: &[usize]| (!list.is_empty()).then(|| list.to_vec());
    let all = summaries(
        &subject,
        &tokens,
        chosen(&args.layer),
        chosen(&args.head),
        args.top,
    )
    .map_err(Failure::input)?;
    let picture = |title: &str, of: fn(&HeadSummary) -> f64| {
        let spec = subject.model.spec();
        let mut table = vec![vec![0.0; spec.heads]; spec.layers];
        for s in &all {
            table[s.layer][s.head] = of(s) as f32;
        }
        heat_map(&format!("{}: {title}", subject.name), &table).map_err(Failure::other)
    };
    if let Some(file) = &args.heat_map {
        write(file, &picture("mass on the first tokens", |s| s.sink)?)?;
    }
    if let Some(file) = &args.sink_map {
        write(file, &picture("mass on hidden sinks", HeadSummary::hidden_mass)?)?;
    }
    if !args.json {
        line(format_args!(
            "layer head   sink window entropy distance  top keys"
        ))?;
    }
    for s in &all {
        if args.json {
            json_line(s)?;
        } else {
            line(format_args!("{}", row(s)))?;
        }
    }
    if args.sink_map.is_none() {
        return Ok(());
    }
    let map = SinkMap::new(&all, 20);
    if args.json {
        return json_line(&map);
    }
    let texts: Vec<String> = map.texts.iter().map(|(t, n)| format!("{t:?} {n}")).collect();
    line(format_args!(
        "{} of {} heads have hidden sinks: {}",
        map.with_hidden_sinks,
        map.heads,
        texts.join(", ")
    ))
}

fn row(s: &HeadSummary) -> String {
    let keys: Vec<String> = s
        .top
        .iter()
        .map(|k| format!("{} {:?} {:.2}", k.pos, k.text, k.mean))
        .collect();
    format!(
        "{:>5} {:>4} {:>6.3} {:>6.3} {:>7.3} {:>8.1}  {}",
        s.layer,
        s.head,
        s.sink,
        s.window,
        s.entropy,
        s.distance,
        keys.join(", ")
    )
}

fn heads(args: &HeadsArgs) -> Result<(), Failure> {
    let bad = args.depths.iter().any(|d| !(0.0..=1.0).contains(d));
    if bad || args.depths.is_empty() || args.lengths.is_empty() || args.runs == 0 || args.texts == 0 {
        return Err(Failure::Input(anyhow!(
            "at least one run, text, length and depth are needed, depths from 0 to 1"
        )));
    }
    let subject = model::subject(&args.model, &args.run)?;
    let mut profile = match args.out.as_ref().filter(|f| f.is_file()) {
        Some(file) => kept(file, &subject)?,
        None => subject.profile(),
    };
    let runs = NeedleRuns {
        lengths: args.lengths.clone(),
        depths: args.depths.clone(),
        runs: args.runs,
        seed: args.seed,
    };
    let known = args.reuse && profile.test(&args.kind).is_ok();
    let tests = match args.kind.parse::<Pattern>() {
        _ if known => Vec::new(),
        Err(_) if args.kind == "act" => vec![calibrated(args, &subject)?],
        Err(_) if args.kind == "eviction" => vec![evicted(&subject, &profile, &runs)?],
        Ok(kind) => {
            vec![
                pattern(&subject, kind, args.segment, args.seed..args.seed + args.texts)
                    .map_err(Failure::input)?,
            ]
        }
        Err(_) => needles(args, &subject, &runs)?,
    };
    for test in tests {
        profile.put(test);
    }
    if let Some(file) = &args.out {
        let text = serde_json::to_string(&profile).map_err(Failure::other)?;
        write(file, &(text + "\n"))?;
    }
    let test = profile.test(&args.kind).map_err(Failure::other)?;
    report(args, &profile, test)?;
    if !args.mask.is_empty() {
        mask(args, &subject, test, &runs)?;
    }
    Ok(())
}

/// The profile in `file`, if it is one of this model.
fn kept(file: &Path, subject: &Subject) -> Result<HeadProfile, Failure> {
    let fresh = subject.profile();
    let text = String::from_utf8_lossy(&super::read(file)?).into_owned();
    let profile = HeadProfile::parse(&text, [fresh.layers, fresh.heads, fresh.kv_heads])
        .with_context(|| format!("`{}` exists", file.display()))
        .map_err(Failure::Input)?;
    match profile.sha256 == fresh.sha256 {
        true => Ok(profile),
        false => Err(Failure::Input(anyhow!(
            "`{}` is the profile of another file of a model\nhint: another --out",
            file.display()
        ))),
    }
}

fn bar(length: usize, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {eta}");
    ProgressBar::new(length as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(what)
}

fn calibrated(args: &HeadsArgs, subject: &Subject) -> Result<HeadTest, Failure> {
    let spec = subject.model.spec();
    let heads = spec.layers.saturating_sub(3) * spec.heads;
    let bar = bar(heads, "heads");
    let search = Search {
        examples: args.runs,
        length: args.lengths[0],
        seed: args.seed,
        beta: 0.4,
    };
    let test = calibration(subject, &search, Rule::PAPER, &mut |done| {
        bar.set_position(done as u64)
    });
    bar.finish_and_clear();
    test.map_err(Failure::input)
}

/// What eviction costs each layer; the heads that vote are those of the profile.
fn evicted(subject: &Subject, profile: &HeadProfile, runs: &NeedleRuns) -> Result<HeadTest, Failure> {
    let Ok(semantic) = profile.test("semantic") else {
        return Err(Failure::Input(anyhow!(
            "the heads that vote are not known: no profile in --out with the measurement `semantic`\nhint: the same with --kind semantic \
             first"
        )));
    };
    let bar = bar(runs.runs, "answers");
    let test = eviction(subject, runs, semantic, Cut::PAPER, &mut |done| {
        bar.set_position(done as u64)
    });
    bar.finish_and_clear();
    test.map_err(Failure::input)
}

fn needles(args: &HeadsArgs, subject: &Subject, runs: &NeedleRuns) -> Result<Vec<HeadTest>, Failure> {
    let mut done: Vec<NeedleRun> = Vec::new();
    let mut rows = None;
    if let Some(file) = &args.rows {
        let failed = |e: std::io::Error| Failure::other(anyhow!(e).context(format!("`{}`", file.display())));
        let known = if file.is_file() {
            super::read(file)?
        } else {
            Vec::new()
        };
        for line in String::from_utf8_lossy(&known).lines() {
            let run = serde_json::from_str(line)
                .with_context(|| format!("`{}` has a line that is no run", file.display()))
                .map_err(Failure::Input)?;
            done.push(run);
        }
        let open = std::fs::OpenOptions::new().create(true).append(true).open(file);
        rows = Some(open.map_err(failed)?);
    }
    let bar = bar(runs.runs, "needles");
    bar.set_position(done.len() as u64);
    let mut lost = None;
    let tests = retrieval(subject, runs, done, &mut |run| {
        bar.inc(1);
        if let Some(rows) = &mut rows {
            let line = serde_json::to_string(run).unwrap_or_default();
            lost = lost.take().or(writeln!(rows, "{line}").err());
        }
    });
    bar.finish_and_clear();
    match lost {
        Some(error) => Err(Failure::other(error)),
        None => Ok(tests.map_err(Failure::input)?.into()),
    }
}

fn report(args: &HeadsArgs, profile: &HeadProfile, test: &HeadTest) -> Result<(), Failure> {
    let mut ranking = test.ranking();
    if test.name == "eviction" {
        // It is of layers: every head of one has the same.
        ranking.retain(|r| r.head == 0);
    }
    let over = |least: f32| ranking.iter().filter(|r| r.score >= least).count();
    if let Some(file) = &args.heat_map {
        let title = format!("{}: {}", profile.model, test.name);
        write(file, &heat_map(&title, &test.score).map_err(Failure::other)?)?;
    }
    let agreement: Vec<_> = profile
        .tests
        .iter()
        .filter(|t| t.name != test.name)
        .map(|t| json!({ "with": t.name, "spearman": spearman(&t.score.concat(), &test.score.concat()) }))
        .collect();
    if args.json {
        return json_line(&json!({
            "kind": test.name, "model": profile.model, "runs": test.runs, "accepted": test.accepted, "tokens": test.tokens,
            "heads": ranking.len(), "zero": ranking.iter().filter(|r| r.score == 0.0).count(),
            "at_least_0.1": over(0.1), "at_least_0.5": over(0.5), "half_spearman": test.half_spearman,
            "top": &ranking[..ranking.len().min(20)], "agreement": agreement,
        }));
    }
    let what = match test.name == "eviction" {
        true => "layers",
        false => "heads",
    };
    line(format_args!(
        "{} of {} runs count, {}-{} tokens; of {} {what} {} score 0.1 or more, {} score 0.5 or more",
        test.accepted,
        test.runs,
        test.tokens[0],
        test.tokens[1],
        ranking.len(),
        over(0.1),
        over(0.5)
    ))?;
    if let Some(rho) = test.half_spearman {
        line(format_args!("rank correlation of the two halves: {rho:.3}"))?;
    }
    for r in ranking.iter().take(20) {
        line(format_args!(
            "layer {:>2} head {:>2}  {:.3}",
            r.layer, r.head, r.score
        ))?;
    }
    Ok(())
}

fn mask(args: &HeadsArgs, subject: &Subject, test: &HeadTest, runs: &NeedleRuns) -> Result<(), Failure> {
    let curve = MaskCurve {
        runs: NeedleRuns {
            runs: args.mask_prompts,
            // Not the prompts that the heads were found with.
            seed: args.seed ^ 0x6d61_736b,
            ..runs.clone()
        },
        counts: args.mask.clone(),
        draws: args.mask_draws,
        mode: args.mask_mode,
    };
    let bar = bar(args.mask_prompts, "masks");
    let points =
        masking(subject, test, &curve, &mut |done| bar.set_position(done as u64)).map_err(Failure::input)?;
    bar.finish_and_clear();
    if let Some(file) = &args.mask_plot {
        let title = format!("{}: heads of `{}` switched off", subject.name, test.name);
        write(file, &mask_plot(&title, &points).map_err(Failure::other)?)?;
    }
    for p in points {
        if args.json {
            json_line(
                &json!({ "mask": args.mask_mode, "test": test.name, "which": p.which, "draw": p.draw, "heads": p.heads,
                "prompts": p.prompts, "recall": p.recall, "each": p.each }),
            )?;
        } else {
            line(format_args!(
                "{:>6} {:>3} heads off: recall {:.3}",
                p.which, p.heads, p.recall
            ))?;
        }
    }
    Ok(())
}
