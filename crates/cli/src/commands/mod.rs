//! One file per command.

pub(crate) mod analyse;
pub(crate) mod bench;
pub(crate) mod blend_check;
pub(crate) mod cache;
pub(crate) mod chat;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod explain;
pub(crate) mod ingest;
pub(crate) mod load;
pub(crate) mod logits;
pub(crate) mod methods;
pub(crate) mod models;
pub(crate) mod perplexity;
pub(crate) mod repro;
pub(crate) mod run;
pub(crate) mod sae;
pub(crate) mod serve;
pub(crate) mod stream;
pub(crate) mod tokenize;
pub(crate) mod train;
pub(crate) mod tune;

use std::io::Write;

use antefix_models::tokenizer::{Specials, Tokenizer};
use serde::Serialize;

use crate::failure::Failure;

/// One JSON value on a line of its own.
fn json_line(value: &impl Serialize) -> Result<(), Failure> {
    let line = serde_json::to_string(value).map_err(Failure::other)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

/// A line of text.
fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    writeln!(std::io::stdout().lock(), "{text}")?;
    Ok(())
}

/// Reads a file, `-` for standard input.
pub(crate) fn read(file: &std::path::Path) -> Result<Vec<u8>, Failure> {
    let bytes = if file == std::path::Path::new("-") {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut bytes).map(|_| bytes)
    } else {
        std::fs::read(file)
    };
    bytes.map_err(|e| {
        Failure::Input(anyhow::Error::new(e).context(format!("`{}` cannot be read", file.display())))
    })
}

/// A text as it is, with the begin token where the model wants one.
fn text_tokens(tokenizer: &Tokenizer, text: &[u8]) -> Vec<u32> {
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    bos.into_iter()
        .chain(tokenizer.encode_bytes(text, Specials::Plain))
        .collect()
}
