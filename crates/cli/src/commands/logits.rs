//! `antefix logits`: raw logits, for comparison with other implementations.

use std::path::PathBuf;

use antefix_lab::logits;
use antefix_models::tokenizer::Specials;
use anyhow::anyhow;
use serde_json::json;

use super::{json_line, line};
use crate::failure::Failure;
use crate::hooks::HookArgs;
use crate::model::{Loaded, ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Token ids, exactly as given
    #[arg(
        long,
        value_delimiter = ',',
        required_unless_present = "text",
        conflicts_with = "text"
    )]
    tokens: Vec<u32>,
    /// A text file
    #[arg(long)]
    text: Option<PathBuf>,
    /// No begin token, special tokens in the text are text
    #[arg(long)]
    raw: bool,
    /// How many logits
    #[arg(long, default_value_t = 20)]
    top: usize,
    /// The most likely token after every position instead
    #[arg(long, conflicts_with = "hooks")]
    all: bool,
    #[command(flatten)]
    hooks: HookArgs,
    /// JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let text = args.text.as_deref().map(super::read).transpose()?;
    let Loaded { model, tokenizer } = Loaded::new(&args.model, &args.run)?;
    let tokens = match text {
        Some(text) if args.raw => tokenizer.encode_bytes(&text, Specials::Plain),
        Some(text) => {
            let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
            bos.into_iter()
                .chain(tokenizer.encode_bytes(&text, Specials::Parse))
                .collect()
        }
        None => args.tokens.clone(),
    };
    if tokens.is_empty() {
        return Err(Failure::Input(anyhow!("there is no token to start from")));
    }
    let vocab = model.spec().vocab;
    if let Some(bad) = tokens.iter().find(|&&t| t as usize >= vocab) {
        return Err(Failure::Input(anyhow!(
            "token {bad} is not in the vocabulary of {vocab}"
        )));
    }
    if tokens.len() > model.spec().context {
        return Err(Failure::Input(anyhow!(
            "{} tokens do not fit the context of {}",
            tokens.len(),
            model.spec().context
        )));
    }
    if args.all {
        for best in logits::all(&model, &tokens).map_err(Failure::other)? {
            if args.json {
                json_line(&best)?;
            } else {
                let text = tokenizer.decode(&[best.id]);
                line(format_args!(
                    "{:>6} {:>7} {:>10.4}  {text:?}",
                    best.pos, best.id, best.logprob
                ))?;
            }
        }
        return Ok(());
    }
    let observer = args.hooks.observer(&model, tokens.len())?;
    let all = logits::last_observed(&model, &tokens, observer.clone()).map_err(Failure::other)?;
    args.hooks.write(observer.as_deref())?;
    let top = logits::top(&all, args.top);
    if args.json {
        return json_line(&json!({ "tokens": tokens.len(), "top": top }));
    }
    for t in top {
        line(format_args!(
            "{:>7} {:>10.4}  {:?}",
            t.id,
            t.logit,
            tokenizer.decode(&[t.id])
        ))?;
    }
    Ok(())
}
