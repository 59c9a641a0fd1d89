//! `antefix analyse sparsity`: how few keys carry most of a model's own attention.

use std::path::PathBuf;

use antefix_lab::heads::heat_map;
use antefix_lab::sparsity::{HeadSparsity, sparsity};
use anyhow::anyhow;

use super::write;
use crate::commands::{json_line, line, text_tokens};
use crate::failure::Failure;
use crate::model::{Loaded, ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// A text file; `-` reads standard input
    file: PathBuf,
    /// Rows that are read, in equal distances
    #[arg(long, default_value_t = 64)]
    rows: usize,
    /// Tokens of the text at most; default: the model's context
    #[arg(long)]
    tokens: Option<usize>,
    /// A picture of the share of the keys that carry 95 % of the weight, SVG
    #[arg(long, value_name = "FILE")]
    heat_map: Option<PathBuf>,
    /// One JSON object a head
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    if args.rows == 0 || args.tokens == Some(0) {
        return Err(Failure::Input(anyhow!("`--rows` and `--tokens` are at least 1")));
    }
    let text = crate::commands::read(&args.file)?;
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    let context = model.spec().context;
    let mut tokens = text_tokens(&tokenizer, &text);
    tokens.truncate(args.tokens.unwrap_or(context).min(context));
    if tokens.is_empty() {
        return Err(Failure::Input(anyhow!("there is no token to read")));
    }
    let all = sparsity(&model, &tokens, args.rows).map_err(Failure::input)?;
    if let Some(file) = &args.heat_map {
        let mut table = vec![vec![0.0; model.spec().heads]; model.spec().layers];
        for head in &all {
            table[head.layer][head.head] = share(head, 1) as f32;
        }
        let title = format!("{}: share of the keys with 95 % of the weight", args.model.model);
        write(file, &heat_map(&title, &table).map_err(Failure::other)?)?;
    }
    if args.json {
        return all.iter().try_for_each(json_line);
    }
    line(
        "layer head window     keys  entropy    90 %    95 %    99 %  of the weight lie on this share of the keys",
    )?;
    for head in &all {
        let window = head.window.map_or_else(|| "-".into(), |w| w.to_string());
        line(format_args!(
            "{:>5} {:>4} {window:>6} {:>8.0} {:>8.3} {:>7.4} {:>7.4} {:>7.4}",
            head.layer,
            head.head,
            head.keys,
            head.entropy,
            share(head, 0),
            share(head, 1),
            share(head, 2),
        ))?;
    }
    let few = all.iter().filter(|head| share(head, 1) < 0.1).count();
    let mean = all.iter().map(|head| share(head, 1)).sum::<f64>() / all.len().max(1) as f64;
    line(format_args!(
        "{few} of {} heads have 95 % of the weight on less than a tenth of the keys; the mean over all heads is {mean:.4} ({} tokens, {} rows)",
        all.len(),
        tokens.len(),
        all.first().map_or(0, |head| head.rows),
    ))
}

/// Share of the keys for the `i`-th share of the weight.
fn share(head: &HeadSparsity, i: usize) -> f64 {
    head.needed[i].share
}
