//! `antefix tokenize` and `antefix detokenize`.

use std::io::Write;
use std::path::PathBuf;

use antefix_models::tokenizer::{Specials, Tokenizer};
use anyhow::anyhow;
use serde_json::json;

use super::{json_line, line};
use crate::failure::Failure;
use crate::model::{ModelArgs, files, path};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Special tokens in the text are text
    #[arg(long)]
    no_special: bool,
    /// JSON
    #[arg(long)]
    json: bool,
    /// The text, `-` for standard input
    file: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct DetokenizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, separated by anything that is no digit; `-` for standard input
    file: PathBuf,
}

fn tokenizer(model: &ModelArgs) -> Result<Tokenizer, Failure> {
    Tokenizer::open(&files(&path(model)?)?).map_err(Failure::input)
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let text = super::read(&args.file)?;
    let tokenizer = tokenizer(&args.model)?;
    let specials = if args.no_special {
        Specials::Plain
    } else {
        Specials::Parse
    };
    let ids = tokenizer.encode_bytes(&text, specials);
    if args.json {
        return json_line(&json!({ "tokens": ids }));
    }
    for id in ids {
        line(format_args!("{id:>7}  {:?}", tokenizer.decode(&[id])))?;
    }
    Ok(())
}

pub(crate) fn detokenize(args: &DetokenizeArgs) -> Result<(), Failure> {
    let text = super::read(&args.file)?;
    let tokenizer = tokenizer(&args.model)?;
    let mut ids = Vec::new();
    for digits in text.split(|b| !b.is_ascii_digit()).filter(|d| !d.is_empty()) {
        let id = std::str::from_utf8(digits)
            .ok()
            .and_then(|d| d.parse::<u32>().ok());
        let id = id
            .filter(|&id| (id as usize) < tokenizer.vocab_size())
            .ok_or_else(|| {
                let size = tokenizer.vocab_size();
                Failure::Input(anyhow!(
                    "{} is not in the vocabulary of {size}",
                    String::from_utf8_lossy(digits)
                ))
            })?;
        ids.push(id);
    }
    std::io::stdout()
        .lock()
        .write_all(&tokenizer.decode_bytes(&ids))?;
    Ok(())
}
