//! `antefix analyse ape`: which temperature and scale suit a model and a user's prompts.

use std::path::{Path, PathBuf};

use antefix_kv::Pool;
use antefix_lab::parallel::{Found, Setting, search};
use antefix_lab::reuse::{Bench, Documents, Sizes};
use antefix_models::documents;
use antefix_models::template::Message;
use anyhow::{Context, anyhow};
use serde::Deserialize;
use serde_json::json;

use super::bar;
use crate::commands::{json_line, line, read};
use crate::failure::Failure;
use crate::model::{Loaded, ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Prompts of one's own: a JSON object a line with `documents` (a list of texts), `question` and perhaps `system`; without, generated ones
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Generated prompts; one half of all prompts is searched with, the other judges
    #[arg(short = 'n', long, default_value_t = 8, conflicts_with = "prompts")]
    generated: usize,
    /// Documents of a generated prompt
    #[arg(long, default_value_t = 4)]
    documents: usize,
    /// Tokens of a document of a generated prompt
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Temperatures to try
    #[arg(long, value_delimiter = ',', default_values_t = [0.6, 0.7, 0.8, 0.9, 1.0])]
    temperatures: Vec<f32>,
    /// Scales to try
    #[arg(long, value_delimiter = ',', default_values_t = [0.6, 0.7, 0.8, 0.9, 1.0])]
    scales: Vec<f32>,
    /// Seed of generated prompts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// JSON lines
    #[arg(long)]
    json: bool,
}

/// A line of `--prompts`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Prompt {
    documents: Vec<String>,
    question: String,
    system: Option<String>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let all = args.temperatures.iter().chain(&args.scales);
    if args.temperatures.is_empty() || args.scales.is_empty() || all.clone().any(|x| !(0.1..=2.0).contains(x))
    {
        return Err(Failure::Input(anyhow!(
            "`--temperatures` and `--scales` are numbers from 0.1 to 2"
        )));
    }
    if args.documents == 0 || args.tokens < 16 {
        return Err(Failure::Input(anyhow!(
            "too little text\nhint: at least 1 document of 16 tokens"
        )));
    }
    let loaded = Loaded::new(&args.model, &args.run)?;
    let prompts = match &args.prompts {
        Some(file) => own(file, &loaded)?,
        None => (0..args.generated as u64)
            .map(|i| {
                let sizes = Sizes {
                    documents: args.documents,
                    tokens: args.tokens,
                    question: 64,
                    answer: 0,
                };
                Documents::made(&loaded.tokenizer, sizes, args.seed + i)
            })
            .collect(),
    };
    if prompts.len() < 2 {
        return Err(Failure::Input(anyhow!(
            "{} prompts are too few: one half is searched with, the other judges\nhint: two or more",
            prompts.len()
        )));
    }
    let (model, longest) = (&loaded.model, prompts.iter().map(|p| p.tokens.len()).max());
    let (longest, context) = (longest.unwrap_or(0), loaded.model.spec().context);
    if longest > context {
        return Err(Failure::Input(anyhow!(
            "a prompt has {longest} tokens, the model's context {context}: there is nothing to compare with\nhint: fewer or shorter documents; the \
             values found serve more of them"
        )));
    }
    let room = Pool::new(model.kv_shape(), 0).bytes_for(longest + 64) * 5;
    let fingerprint = antefix_engine::identity(model)
        .map_err(Failure::other)?
        .fingerprint();
    let mut bench = Bench::new(model.clone(), room, fingerprint, None);
    let bar = bar(prompts.len(), "prompts");
    let found = search(
        &mut bench,
        &prompts,
        (&args.temperatures, &args.scales),
        &mut |n| bar.set_position(n as u64),
    );
    bar.finish_and_clear();
    report(args, &found.map_err(Failure::other)?)
}

fn own(file: &Path, loaded: &Loaded) -> Result<Vec<Documents>, Failure> {
    let text = String::from_utf8_lossy(&read(file)?).into_owned();
    let template = loaded.template()?;
    let lines = text.lines().enumerate().filter(|l| !l.1.trim().is_empty());
    lines
        .map(|(i, line)| {
            let prompt: Prompt = serde_json::from_str(line)
                .with_context(|| format!("`{}`, line {}", file.display(), i + 1))
                .map_err(Failure::Input)?;
            let asked = documents::MARK.to_string() + &prompt.question;
            let text = match &template {
                Some(template) => {
                    let system = prompt.system.map(|s| Message::new("system", s));
                    let messages: Vec<Message> = system.into_iter().chain([Message::new("user", asked)]).collect();
                    template.render(&messages, None, true).map_err(Failure::input)?
                }
                None => prompt.system.unwrap_or_default() + &asked,
            };
            let whole = documents::encode(&loaded.tokenizer, &text, &prompt.documents);
            let first = whole.documents.first().map_or(0, |d| d.start);
            let last = whole.documents.last().map_or(0, |d| d.end);
            if first == 0 || last == whole.tokens.len() {
                return Err(Failure::Input(anyhow!(
                    "`{}`, line {}: a prompt needs something in front of its documents, a document that is not empty, and a question",
                    file.display(),
                    i + 1
                )));
            }
            Ok(Documents {
                tokens: whole.tokens,
                places: whole.documents,
            })
        })
        .collect()
}

fn report(args: &Args, found: &Found) -> Result<(), Failure> {
    let held_out = [
        ("best", found.best),
        ("official", found.official),
        ("plain", found.plain),
    ];
    if args.json {
        found.grid.iter().try_for_each(json_line)?;
        let row = |(which, s): (&str, Setting)| {
            json_line(&json!({"held_out": which, "method": s.method(), "kl": s.kl}))
        };
        return held_out.into_iter().try_for_each(row);
    }
    line(format_args!(
        "KL from full prefill, nats; temperatures downwards, scales to the right"
    ))?;
    let cells = |of: &dyn Fn(usize) -> String| (0..args.scales.len()).map(of).collect::<String>();
    line(format_args!(
        "{:6}{}",
        "",
        cells(&|s| format!("{:>9.2}", args.scales[s]))
    ))?;
    for (t, row) in args.temperatures.iter().zip(found.grid.chunks(args.scales.len())) {
        line(format_args!(
            "{t:<6.2}{}",
            cells(&|s| format!("{:>9.4}", row[s].kl))
        ))?;
    }
    line(format_args!("\non the prompts held out:"))?;
    for (which, setting) in held_out {
        line(format_args!(
            "{which:<9} {:<16} {:.4}",
            setting.method(),
            setting.kl
        ))?;
    }
    line(format_args!("\nuse it as --method {}", found.best.method()))
}
