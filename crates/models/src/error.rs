//! Why a file could not become a model.

use std::path::PathBuf;

use crate::gguf::GgufError;

/// Why a file or folder could not become a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum LoadError {
    #[error("{}: cannot be read", .file.display())]
    Io {
        file: PathBuf,
        #[source]
        source: std::io::Error,
    },
    // Not a `source`: the message is whole, a chain would print it twice.
    #[error("{}: {error}", .file.display())]
    Gguf { file: PathBuf, error: GgufError },
    #[error("{}: {what}", .file.display())]
    Safetensors { file: PathBuf, what: String },
    #[error("{}: {what}", .file.display())]
    Json { file: PathBuf, what: String },
    #[error("{}: holds no model that can be read\nhint: name a `.gguf` file, or a folder with `config.json` and `model.safetensors`", .path.display())]
    NotAModel { path: PathBuf },
    #[error("{}: architecture `{arch}` is not supported\nhint: supported are {supported}", .file.display())]
    Arch {
        file: PathBuf,
        arch: String,
        supported: &'static str,
    },
    #[error("{}: {feature} is not supported\nhint: {hint}", .file.display())]
    Unsupported {
        file: PathBuf,
        feature: String,
        hint: &'static str,
    },
    #[error("{}: `{key}` {what}", .file.display())]
    Key {
        file: PathBuf,
        key: String,
        what: String,
    },
    #[error("{}: tensor `{tensor}` cannot be used: {source}", .file.display())]
    Tensor {
        file: PathBuf,
        tensor: String,
        #[source]
        source: antefix_kernels::quant::QuantError,
    },
    #[error("{}: tensor `{tensor}` is missing", .file.display())]
    Missing { file: PathBuf, tensor: String },
    #[error("{}: tensor `{tensor}` is {got:?}, the configuration needs {want:?}", .file.display())]
    Shape {
        file: PathBuf,
        tensor: String,
        want: Vec<usize>,
        got: Vec<usize>,
    },
    #[error("{}: tensor `{tensor}` has type {got}, which cannot be computed with\nhint: supported are {supported}", .file.display())]
    Type {
        file: PathBuf,
        tensor: String,
        got: String,
        supported: &'static str,
    },
}

/// Text out of a file, as it can be shown in a message: the first 200 characters, none of which moves a cursor.
pub(crate) fn shown(text: &str) -> String {
    let visible = |c: char| if c.is_control() { '?' } else { c };
    let mut shown: String = text.chars().take(200).map(visible).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}
