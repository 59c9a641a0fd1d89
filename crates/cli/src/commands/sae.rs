//! `antefix sae`: dictionaries of attention outputs: gather, train, measure, look at, attribute.

use std::path::{Path, PathBuf};

use antefix_kernels::memory::keep_big_blocks;
use antefix_papers::attention_sae::Stored;
use antefix_train::harvest::{HarvestError, Texts};
use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;
use crate::model::{Loaded, ModelArgs, RunArgs};

mod attribute;
mod dashboard;
mod eval;
mod harvest;
mod train;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Run text through a model once and keep the head outputs of some layers on disk
    Harvest(harvest::Args),
    /// Train a dictionary on a harvest; goes on where it was interrupted
    Train(train::Args),
    /// What a dictionary costs the model: cross-entropy recovered, beside PCA and random directions
    Eval(eval::Args),
    /// A web page of a dictionary's features, one file
    Dashboard(dashboard::Args),
    /// Which heads and which tokens make the features of a text
    Attribute(attribute::Args),
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    // Steps ask for the same blocks again and again.
    keep_big_blocks();
    match &args.what {
        What::Harvest(args) => harvest::run(args),
        What::Train(args) => train::run(args),
        What::Eval(args) => eval::run(args),
        What::Dashboard(args) => dashboard::run(args),
        What::Attribute(args) => attribute::run(args),
    }
}

/// Text files.
#[derive(clap::Args, Clone)]
struct TextArgs {
    /// A text file, or a folder with text files in it; repeatable
    #[arg(long = "text", value_name = "PATH", required = true)]
    text: Vec<PathBuf>,
    /// Endings of the files in folders that are read
    #[arg(long, value_delimiter = ',', default_value = "txt,md,rst,py")]
    ext: Vec<String>,
    /// Tokens of a row, the begin token included
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// The token at the start of every row; default: the model's begin token, or its end token where it has none
    #[arg(long)]
    bos: Option<u32>,
}

impl TextArgs {
    fn texts(&self, loaded: &Loaded) -> Result<Texts, Failure> {
        let own = self.bos.or(loaded.tokenizer.bos()).or(loaded.tokenizer.eos());
        let bos = own.ok_or_else(|| {
            Failure::Input(anyhow!(
                "the model has neither a begin nor an end token\nhint: --bos ID"
            ))
        })?;
        if bos as usize >= loaded.model.spec().vocab {
            return Err(Failure::Input(anyhow!(
                "token {bos} is not in the vocabulary of {}",
                loaded.model.spec().vocab
            )));
        }
        Texts::new(&self.text, &self.ext, self.context, bos).map_err(fault)
    }
}

/// Who is to blame for what went wrong with a harvest.
fn fault(error: HarvestError) -> Failure {
    match error {
        HarvestError::Engine(_) | HarvestError::Hooks(_) => Failure::other(error),
        _ => Failure::input(error),
    }
}

/// A dictionary with its warnings said, and its layer: the one asked for, or the one in its file.
fn dictionary(path: &Path, layer: Option<usize>) -> Result<(Stored, usize), Failure> {
    let stored = Stored::read(path).map_err(Failure::input)?;
    for warning in &stored.warnings {
        eprintln!("antefix: {}: {warning}", path.display());
    }
    let layer = layer.or_else(|| stored.origin.layer());
    let layer = layer.ok_or_else(|| {
        Failure::Input(anyhow!(
            "the dictionary does not say of which layer it is\nhint: --layer N"
        ))
    })?;
    Ok((stored, layer))
}

/// Refuses a dictionary that is of other head outputs than the model has.
fn fits(stored: &Stored, layer: usize, loaded: &Loaded) -> Result<(), Failure> {
    let facts = loaded.model.facts();
    let (own, width) = (stored.sae.d_in(), facts.heads * facts.dim);
    if own != width {
        return Err(Failure::Input(anyhow!(
            "the dictionary is of rows of {own} values, the model's head outputs have {width}"
        )));
    }
    if layer >= facts.layers.len() {
        return Err(Failure::Input(anyhow!(
            "there is no layer {layer}: the model has {}",
            facts.layers.len()
        )));
    }
    Ok(())
}

fn loaded(model: &ModelArgs, run: &RunArgs) -> Result<Loaded, Failure> {
    pool(run)?;
    Loaded::new(model, run)
}

/// The threads of dense products.
fn pool(run: &RunArgs) -> Result<(), Failure> {
    let threads = crate::model::threads(run.threads)?;
    // Whoever made it first was a test in the same process.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global();
    Ok(())
}

fn bar(length: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {elapsed} left {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what);
    bar
}

/// Rows of tokens that a harvest of the same texts left out with `--skip`.
fn held_out(texts: &TextArgs, loaded: &Loaded, rows: usize) -> Result<Vec<Vec<u32>>, Failure> {
    let out = texts
        .texts(loaded)?
        .rows(&loaded.tokenizer, rows)
        .map_err(fault)?;
    match out.is_empty() {
        true => Err(Failure::Input(anyhow!(
            "the texts have less than one row of {} tokens",
            texts.context
        ))),
        false => Ok(out),
    }
}
