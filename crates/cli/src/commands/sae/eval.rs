//! `antefix sae eval`.

use std::path::PathBuf;
use std::sync::Arc;

use antefix_train::harvest::Rows;
use antefix_train::sae::baselines::{Pca, random};
use antefix_train::sae::splice::{Replace, Spliced, measure, recovered};
use serde_json::json;

use super::{TextArgs, bar, dictionary, fault, fits, held_out, loaded};
use crate::commands::{json_line, line};
use crate::failure::Failure;
use crate::model::{ModelArgs, RunArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    texts: TextArgs,
    /// Folder or file of a dictionary; repeatable, all of one layer
    #[arg(long = "sae", value_name = "PATH", required = true)]
    saes: Vec<PathBuf>,
    /// Layer; default: the one that the dictionary names
    #[arg(long)]
    layer: Option<usize>,
    /// Rows of text that are measured on: the first ones, which `sae harvest --skip` leaves out
    #[arg(long, default_value_t = 64)]
    rows: usize,
    /// A harvest, from which baselines are made: the mean row, and PCA and random directions of the same number of coefficients
    #[arg(long, value_name = "FOLDER")]
    baselines: Option<PathBuf>,
    /// Rows of the harvest that baselines are fitted to
    #[arg(long, default_value_t = 65_536)]
    fit: usize,
    /// JSON, one object a line
    #[arg(long)]
    json: bool,
}

/// Share of the variance below which a dictionary probably is of other activations.
const SUSPECT: f64 = 0.3;

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let loaded = loaded(&args.model, &args.run)?;
    let mut all = Vec::new();
    for path in &args.saes {
        let (stored, layer) = dictionary(path, args.layer)?;
        fits(&stored, layer, &loaded)?;
        all.push((path, Arc::new(stored.sae), layer));
    }
    let layer = all[0].2;
    if let Some(other) = all.iter().find(|a| a.2 != layer) {
        return Err(Failure::Input(anyhow::anyhow!(
            "dictionaries of layers {layer} and {}\nhint: one layer a call",
            other.2
        )));
    }
    let rows = held_out(&args.texts, &loaded, args.rows)?;
    let one = |with: &Replace, what: &'static str| -> Result<Spliced, Failure> {
        let bar = bar(rows.len() as u64, what);
        let got = measure(&loaded.model, &rows, layer, with, |n| bar.set_position(n as u64));
        bar.finish_and_clear();
        got.map_err(Failure::other)
    };
    let clean = one(&Replace::Nothing, "clean")?;
    let zero = one(&Replace::Zero, "zeros")?;
    let say = |name: &str, s: &Spliced| -> Result<(), Failure> {
        let share = recovered(s.ce, zero.ce, clean.ce);
        let rest = recovered(s.ce_without_bos, zero.ce_without_bos, clean.ce);
        if args.json {
            return json_line(&json!({
                "what": name, "layer": layer, "ce": s.ce, "ce_clean": clean.ce, "ce_zero": zero.ce, "recovered": share,
                "ce_without_bos": s.ce_without_bos, "ce_zero_without_bos": zero.ce_without_bos, "recovered_without_bos": rest,
                "l0": s.l0, "explained": s.explained, "explained_without_bos": s.explained_without_bos, "tokens": s.tokens,
            }));
        }
        line(format_args!(
            "{name:40} {:8.2} {:9.4} {:9.1} % {:9.1} % {:10.4} {:10.4}",
            s.l0,
            s.ce,
            100.0 * share,
            100.0 * rest,
            s.explained,
            s.explained_without_bos
        ))
    };
    if !args.json {
        line(format_args!(
            "layer {layer}, {} tokens: cross-entropy {:.4}, with zeros {:.4} (begin tokens spared {:.4})",
            clean.tokens, clean.ce, zero.ce, zero.ce_without_bos
        ))?;
        line(format_args!(
            "{:40} {:>8} {:>9} {:>11} {:>11} {:>10} {:>10}",
            "", "L0", "CE", "recovered", "without BOS", "explained", "w/o BOS"
        ))?;
    }
    let fit = match &args.baselines {
        None => None,
        Some(folder) => {
            let rows = Rows::open(folder, layer).map_err(fault)?;
            Some(rows.first(args.fit).map_err(fault)?)
        }
    };
    if let (Some(values), Some((_, sae, _))) = (&fit, all.first()) {
        let mean = Pca::fit(values, sae.d_in(), 0);
        say("mean row", &one(&Replace::Pca(Arc::new(mean)), "mean")?)?;
    }
    for (path, sae, _) in all {
        let got = one(&Replace::Sae(Arc::clone(&sae)), "dictionary")?;
        say(&path.display().to_string(), &got)?;
        if got.explained < SUSPECT && got.explained_without_bos < SUSPECT {
            eprintln!(
                "antefix: {}: it explains {:.2} of the variance: it probably is of other activations (another layer, model, or value biases folded)",
                path.display(),
                got.explained
            );
        }
        if let Some(values) = &fit {
            let d = sae.d_in();
            let rank = (got.l0.round() as usize).clamp(1, d);
            let pca = Pca::fit(values, d, rank);
            say(
                &format!("  PCA of rank {rank}"),
                &one(&Replace::Pca(Arc::new(pca)), "PCA")?,
            )?;
            let directions =
                random(values, d, sae.features(), rank.min(sae.features()), 1).map_err(Failure::other)?;
            say(
                &format!("  {rank} of {} random directions", sae.features()),
                &one(&Replace::Sae(Arc::new(directions)), "random")?,
            )?;
        }
    }
    Ok(())
}
