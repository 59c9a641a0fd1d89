//! `antefix sae attribute`.

use std::path::PathBuf;

use antefix_train::sae::features::attribute_text;
use anyhow::anyhow;
use serde_json::json;

use super::{dictionary, fault, fits, loaded};
use crate::commands::{json_line, line, text_tokens};
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
    /// A text file; `-` reads standard input
    file: PathBuf,
    /// Layer; default: the one that the dictionary names
    #[arg(long)]
    layer: Option<usize>,
    /// Token whose features are attributed; negative ones count from the end
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    pos: i64,
    /// This feature; repeatable; default: the most active ones
    #[arg(long)]
    feature: Vec<usize>,
    /// Features that are shown
    #[arg(long, default_value_t = 5)]
    most: usize,
    /// Source tokens that are shown of each
    #[arg(long, default_value_t = 6)]
    top: usize,
    /// One JSON object a feature, with everything
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let text = crate::commands::read(&args.file)?;
    let loaded = loaded(&args.model, &args.run)?;
    let (stored, layer) = dictionary(&args.sae, args.layer)?;
    fits(&stored, layer, &loaded)?;
    let tokens = text_tokens(&loaded.tokenizer, &text);
    if tokens.is_empty() || tokens.len() > loaded.model.spec().context {
        return Err(Failure::Input(anyhow!(
            "{} tokens: from 1 to the model's {}",
            tokens.len(),
            loaded.model.spec().context
        )));
    }
    let n = tokens.len() as i64;
    let pos = if args.pos < 0 { n + args.pos } else { args.pos };
    if !(0..n).contains(&pos) {
        return Err(Failure::Input(anyhow!(
            "there is no token {}: the text has {n}",
            args.pos
        )));
    }
    if let Some(bad) = args.feature.iter().find(|f| **f >= stored.sae.features()) {
        return Err(Failure::Input(anyhow!(
            "there is no feature {bad}: the dictionary has {}",
            stored.sae.features()
        )));
    }
    let wanted = [(pos as usize, args.feature.clone())];
    let given =
        attribute_text(&loaded.model, &stored.sae, layer, &tokens, &wanted, args.most).map_err(fault)?;
    let word = |t: usize| loaded.tokenizer.shown(tokens[t]);
    for a in given.iter().flatten() {
        if args.json {
            json_line(&json!({ "token": word(pos as usize), "attribution": a }))?;
            continue;
        }
        line(format_args!(
            "feature {} at {:?} (token {pos}): pre-activation {:.4}, of which {:.4} do not depend on the text; rounding {:.1e} by head, {:.1e} by source",
            a.feature,
            word(pos as usize),
            a.pre,
            a.constant,
            a.rest_heads,
            a.rest_sources
        ))?;
        let heads: Vec<String> = a
            .heads
            .iter()
            .enumerate()
            .map(|(h, x)| format!("H{h} {x:+.3}"))
            .collect();
        line(format_args!("  heads    {}", heads.join("  ")))?;
        let sums = a.by_source();
        let mut order: Vec<usize> = (0..sums.len()).collect();
        order.sort_by(|x, y| sums[*y].abs().total_cmp(&sums[*x].abs()));
        let sources: Vec<String> = order
            .iter()
            .take(args.top)
            .map(|&t| format!("{t} {:?} {:+.3}", word(t), sums[t]))
            .collect();
        line(format_args!("  sources  {}", sources.join("  ")))?;
    }
    if given.iter().all(Vec::is_empty) && !args.json {
        line("no feature is active there")?;
    }
    Ok(())
}
