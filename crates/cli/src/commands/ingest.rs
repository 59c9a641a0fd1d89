//! `antefix ingest`: computes documents ahead, so that prompts find them.

use std::path::{Path, PathBuf};

use antefix_engine::Library;
use antefix_kv::{ChunkStore, Pool};
use antefix_models::decoder::Scratch;
use antefix_models::documents;
use antefix_models::template::Message;
use anyhow::anyhow;
use indicatif::ProgressBar;

use super::{json_line, line};
use crate::failure::Failure;
use crate::model::{Loaded, ModelArgs, RunArgs, chunk_folder};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
    /// System message of the prompts that will use them: documents are computed behind it
    #[arg(long)]
    system: Option<String>,
    /// JSON
    #[arg(long)]
    json: bool,
    /// Folder of text files (.txt, .md), or one file
    path: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut files = Vec::new();
    find(&args.path, &mut files)?;
    files.sort();
    if files.is_empty() {
        return Err(Failure::Input(anyhow!(
            "no text in `{}`\nhint: files end in .txt or .md",
            args.path.display()
        )));
    }
    let loaded = Loaded::new(&args.model, &args.run)?;
    let template = loaded.template()?.ok_or_else(|| {
        Failure::Input(anyhow!(
            "this model has no chat template, so nothing stands in front of documents"
        ))
    })?;
    let system = args.system.clone().map(|s| Message::new("system", s));
    let question = Message::new("user", documents::MARK);
    let messages: Vec<Message> = system.into_iter().chain([question]).collect();
    let text = template.render(&messages, None, true).map_err(Failure::input)?;
    let (model, folder) = (&loaded.model, chunk_folder()?);
    let fingerprint = antefix_engine::identity(model)
        .map_err(Failure::other)?
        .fingerprint();
    let mut chunks = ChunkStore::new(fingerprint, Some(folder.clone()));
    let bar = ProgressBar::new(files.len() as u64);
    let (mut tokens, mut new) = (0, 0);
    for file in &files {
        let document = String::from_utf8_lossy(&super::read(file)?).into_owned();
        let prompt = documents::encode(&loaded.tokenizer, &text, &[document]);
        bar.inc(1);
        let Some(place) = prompt.documents.first().cloned() else {
            continue;
        };
        // A pool for one document: what was computed is on disk.
        let sizes = Pool::new(model.kv_shape(), 0);
        let mut pool = Pool::new(model.kv_shape(), sizes.bytes_for(place.end + 64) * 2);
        let mut library = Library {
            model,
            pool: &mut pool,
            chunks: &mut chunks,
            scratch: &mut Scratch::default(),
        };
        let done = library
            .ingest(&prompt.tokens[..place.start], &[&prompt.tokens[place.clone()]], 0)
            .map_err(Failure::other)?;
        tokens += place.len();
        new += done.encoded;
        chunks.clear(&mut pool);
    }
    bar.finish_and_clear();
    if args.json {
        return json_line(&serde_json::json!({
            "files": files.len(), "tokens": tokens, "computed": new, "folder": folder.display().to_string(),
        }));
    }
    line(format_args!(
        "{} files, {tokens} tokens, {new} of them computed now; kept in {}",
        files.len(),
        folder.display()
    ))
}

/// Text files at or below `path`.
fn find(path: &Path, out: &mut Vec<PathBuf>) -> Result<(), Failure> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            let entry = entry?.path();
            let text = entry.extension().is_some_and(|e| e == "txt" || e == "md");
            if entry.is_dir() || text {
                find(&entry, out)?;
            }
        }
    } else {
        out.push(path.to_path_buf());
    }
    Ok(())
}
