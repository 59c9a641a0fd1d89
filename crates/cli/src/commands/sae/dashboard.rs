//! `antefix sae dashboard`.

use std::path::PathBuf;

use antefix_train::harvest::Rows;
use antefix_train::sae::features::{Card, Fired, add_logits, add_sources};
use antefix_train::sae::page::{About, page};
use anyhow::{Context, anyhow};
use serde_json::json;

use super::{bar, dictionary, fault, fits, loaded};
use crate::commands::{json_line, line};
use crate::failure::Failure;
use crate::model::{ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Folder or file of a dictionary
    sae: PathBuf,
    /// The harvest whose rows are looked at
    #[arg(long)]
    harvest: PathBuf,
    /// Layer; default: the one that the dictionary names
    #[arg(long)]
    layer: Option<usize>,
    /// The page
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Only these features; default: `--most` of them, evenly through those that fire on at least ten tokens
    #[arg(long, value_delimiter = ',')]
    features: Vec<usize>,
    /// Features on the page
    #[arg(long, default_value_t = 100)]
    most: usize,
    /// Instead, the features with the largest share of this head in their decoder row
    #[arg(long)]
    head: Option<usize>,
    /// Tokens that are looked at
    #[arg(long, default_value_t = 200_000)]
    tokens: usize,
    /// Examples of each feature whose source tokens are attributed
    #[arg(long, default_value_t = 2)]
    sources: usize,
    /// JSON instead of a line of text; the page is written all the same
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let loaded = loaded(&args.model, &args.run)?;
    let (stored, layer) = dictionary(&args.sae, args.layer)?;
    fits(&stored, layer, &loaded)?;
    let sae = &stored.sae;
    let heads = loaded.model.facts().heads;
    let rows = Rows::open(&args.harvest, layer).map_err(fault)?;
    if rows.about().width != sae.d_in() {
        return Err(Failure::Input(anyhow!(
            "the harvest has rows of {} values, the dictionary of {}",
            rows.about().width,
            sae.d_in()
        )));
    }
    if let Some(bad) = args.features.iter().find(|f| **f >= sae.features()) {
        return Err(Failure::Input(anyhow!(
            "there is no feature {bad}: the dictionary has {}",
            sae.features()
        )));
    }
    if let Some(head) = args.head.filter(|h| *h >= heads) {
        return Err(Failure::Input(anyhow!(
            "there is no head {head}: the model has {heads}"
        )));
    }
    let fired = Fired::new(sae, &rows, args.tokens).map_err(fault)?;
    let living = || (0..sae.features()).filter(|&j| fired.lists[j].len() >= 10);
    let chosen: Vec<usize> = match (args.features.is_empty(), args.head) {
        (false, _) => args.features.clone(),
        (true, Some(head)) => {
            let mut order: Vec<usize> = living().collect();
            let share = |j: usize| antefix_papers::attention_sae::attribute::shares(sae, j, heads)[head];
            order.sort_by(|a, b| share(*b).total_cmp(&share(*a)));
            order.truncate(args.most);
            order
        }
        (true, None) => {
            let all: Vec<usize> = living().collect();
            let step = (all.len() / args.most.max(1)).max(1);
            all.into_iter().step_by(step).take(args.most).collect()
        }
    };
    let mut cards: Vec<Card> = chosen
        .iter()
        .map(|&j| fired.card(sae, j, heads, &loaded.tokenizer))
        .collect();
    add_logits(&loaded.model, &loaded.tokenizer, sae, layer, &mut cards);
    let bar = bar(0, "sources");
    add_sources(
        &loaded.model,
        &loaded.tokenizer,
        sae,
        (layer, &fired, args.sources),
        &mut cards,
        |n, all| {
            bar.set_length(all as u64);
            bar.set_position(n as u64);
        },
    )
    .map_err(fault)?;
    bar.finish_and_clear();
    let (densities, silent) = fired.densities();
    let active: usize = fired.lists.iter().map(Vec::len).sum();
    let about = About {
        model: args.model.model.clone(),
        layer,
        architecture: sae.parts().architecture.name().into(),
        features: sae.features(),
        tokens: fired.tokens.len(),
        l0: active as f64 / fired.tokens.len().max(1) as f64,
        densities,
        silent,
    };
    let text = page(&about, &cards).map_err(Failure::other)?;
    std::fs::write(&args.out, &text)
        .with_context(|| format!("while writing `{}`", args.out.display()))
        .map_err(Failure::Other)?;
    if args.json {
        return json_line(&json!({"about": about, "features": chosen, "bytes": text.len()}));
    }
    line(format_args!(
        "{} features of {} tokens in {} ({:.1} MB); {:.1} % never fired",
        cards.len(),
        about.tokens,
        args.out.display(),
        text.len() as f64 / 1e6,
        100.0 * silent
    ))
}
