//! `antefix models`: the model store.

use antefix_models::store::{Entry, Store, StoreError};
use serde_json::{Value, json};

use super::{json_line, line};
use crate::failure::Failure;
use crate::model::progress;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    /// JSON lines
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum Action {
    /// All known models, and which are here (the default)
    List,
    /// Fetch a model: an alias or hf:OWNER/REPO[/FILE]
    Pull {
        /// Its name
        name: String,
    },
    /// One model
    Show {
        /// Its name
        name: String,
    },
    /// Delete a model's files
    Rm {
        /// Its name
        name: String,
    },
}

fn entry_json(e: &Entry) -> Value {
    json!({
        "name": e.name,
        "installed": e.installed,
        "path": e.path,
        "bytes": e.bytes,
        "licence": e.licence,
        "source": e.source,
    })
}

fn print(e: &Entry, json: bool) -> Result<(), Failure> {
    if json {
        return json_line(&entry_json(e));
    }
    let here = if e.installed { "here" } else { "-" };
    line(format_args!(
        "{:<20} {:<5} {:>5} MB  {}",
        e.name,
        here,
        e.bytes / 1_000_000,
        e.licence
    ))
}

fn failure(error: StoreError) -> Failure {
    Failure::input(error)
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let store = Store::open().map_err(failure)?;
    match args.action.unwrap_or(Action::List) {
        Action::List => store.list().iter().try_for_each(|e| print(e, args.json)),
        Action::Show { name } => {
            let entry = store.show(&name).map_err(failure)?;
            print(&entry, args.json)?;
            if !args.json {
                line(format_args!(
                    "  from {}\n  file {}",
                    entry.source,
                    entry.path.display()
                ))?;
            }
            Ok(())
        }
        Action::Pull { name } => {
            if let Ok(entry) = store.show(&name) {
                eprintln!("licence of {}: {}", entry.name, entry.licence);
            }
            let (bar, mut report) = progress();
            let path = store.pull(&name, &mut report).map_err(failure);
            bar.finish_and_clear();
            let path = path?;
            if args.json {
                json_line(&json!({ "path": path }))
            } else {
                line(path.display())
            }
        }
        Action::Rm { name } => store.remove(&name).map_err(failure),
    }
}
