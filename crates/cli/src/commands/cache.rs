//! `antefix cache`: what a cache folder holds, whether it is whole, and how to empty it.

use std::path::PathBuf;

use antefix_kv::disk::{DiskTier, Listed};
use anyhow::anyhow;
use clap::Subcommand;
use serde_json::{Value, json};

use crate::failure::Failure;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Blocks by model and tenant
    Ls(Folder),
    /// Bytes and counts of the whole folder
    Stats(Folder),
    /// Read every byte and name what is damaged; ends with 1 if anything is
    Verify(Folder),
    /// Delete all blocks, of all models; not while a server uses the folder
    Clear(Folder),
}

#[derive(clap::Args)]
struct Folder {
    /// The folder that `antefix serve --cache-dir` was given
    #[arg(long, env = "ANTEFIX_CACHE_DIR")]
    cache_dir: PathBuf,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    match &args.what {
        What::Ls(folder) => ls(folder),
        What::Stats(folder) => stats(folder),
        What::Verify(folder) => verify(folder),
        What::Clear(folder) => clear(folder),
    }
}

fn open(folder: &Folder) -> Result<DiskTier, Failure> {
    DiskTier::inspect(&folder.cache_dir).map_err(Failure::input)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

fn print(value: &Value) -> Result<(), Failure> {
    super::line(serde_json::to_string_pretty(value).map_err(Failure::other)?)
}

fn ls(folder: &Folder) -> Result<(), Failure> {
    let all: Vec<Listed> = open(folder)?.ls().collect();
    if folder.json {
        let entry = |e: &Listed| {
            json!({
                "model": e.model, "salt": e.salt, "blocks": e.blocks, "tokens": e.blocks * 32, "bytes": e.bytes,
                "oldest_s": e.oldest.as_secs(), "newest_s": e.newest.as_secs(),
            })
        };
        return print(&all.iter().map(entry).collect());
    }
    super::line("model             tenant            tokens        size  oldest")?;
    for e in all {
        super::line(format!(
            "{:16}  {:16}  {:>6}  {:>10}  {:.1} h",
            e.model,
            e.salt,
            e.blocks * 32,
            mib(e.bytes),
            e.oldest.as_secs_f64() / 3600.0
        ))?;
    }
    Ok(())
}

fn stats(folder: &Folder) -> Result<(), Failure> {
    let tier = open(folder)?;
    let (all, stats) = (tier.ls().collect::<Vec<_>>(), tier.stats());
    let mut models: Vec<&str> = all.iter().map(|e| e.model.as_str()).collect();
    models.dedup();
    let blocks: usize = all.iter().map(|e| e.blocks).sum();
    if folder.json {
        return print(&json!({
            "models": models.len(), "tenants": all.len(), "blocks": blocks, "tokens": blocks * 32,
            "segments": stats.segments, "bytes": stats.bytes,
        }));
    }
    super::line(format!(
        "{} models, {} tenants, {blocks} blocks ({} tokens), {} in {} files",
        models.len(),
        all.len(),
        blocks * 32,
        mib(stats.bytes),
        stats.segments
    ))
}

fn verify(folder: &Folder) -> Result<(), Failure> {
    let found = open(folder)?.verify().map_err(Failure::input)?;
    if folder.json {
        let bad = |b: &antefix_kv::disk::BadRecord| json!({"file": b.file, "offset": b.offset, "bytes": b.bytes, "reason": b.reason});
        print(&json!({
            "segments": found.segments, "records": found.records, "bytes": found.bytes,
            "bad": found.bad.iter().map(bad).collect::<Vec<_>>(),
        }))?;
    } else {
        for b in &found.bad {
            super::line(format!(
                "{}: {} bytes at {}: {}",
                b.file.display(),
                b.bytes,
                b.offset,
                b.reason
            ))?;
        }
        super::line(format!(
            "{} blocks in {} files are whole ({})",
            found.records,
            found.segments,
            mib(found.bytes)
        ))?;
    }
    match found.bad.len() {
        0 => Ok(()),
        n => Err(Failure::other(anyhow!(
            "{n} places are damaged\nhint: the server leaves them out; `antefix cache clear` empties the folder"
        ))),
    }
}

fn clear(folder: &Folder) -> Result<(), Failure> {
    let bytes = DiskTier::wipe(&folder.cache_dir).map_err(Failure::input)?;
    match folder.json {
        true => print(&json!({"freed_bytes": bytes})),
        false => super::line(format!("{} freed", mib(bytes))),
    }
}
