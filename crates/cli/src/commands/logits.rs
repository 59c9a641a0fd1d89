//! `antefix logits`: raw logits, for comparison with other implementations.

use std::path::PathBuf;

use antefix_engine::EngineError;
use antefix_lab::logits;
use antefix_models::tokenizer::Specials;
use anyhow::anyhow;
use serde_json::json;

use super::{json_line, line};
use crate::failure::Failure;
use crate::hooks::HookArgs;
use crate::method::MethodArgs;
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
    #[arg(long, conflicts_with_all = ["hooks", "methods"])]
    all: bool,
    #[command(flatten)]
    hooks: HookArgs,
    #[command(flatten)]
    method: MethodArgs,
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
    let program = args.method.program(&model)?;
    let trained = model.spec().context;
    let context = program.as_ref().map_or(trained, |p| p.context(trained));
    if tokens.len() > context {
        return Err(Failure::Input(anyhow!(
            "{} tokens do not fit the context of {context}",
            tokens.len()
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
    if observer.is_some() && program.as_ref().is_some_and(|p| p.has_hooks()) {
        return Err(Failure::Input(anyhow!(
            "the method has hooks itself\nhint: leave `--hooks` or `--method` out"
        )));
    }
    let all = logits::last_under(&model, &tokens, program.as_deref(), observer.clone());
    let all = all.map_err(|e| match e {
        EngineError::Method(_) => Failure::input(e),
        _ => Failure::other(e),
    })?;
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
