//! GGUF files (versions 2 and 3, little-endian): one checked walk on opening, then views into the map.
//!
//! A file is hostile until the walk has passed: every count is compared with the bytes that are left, sums and products are
//! checked, and the two tables it builds are bounded (about 20 MiB), so that opening never allocates more than the file's
//! size plus 64 MiB. Arrays such as a tokenizer's tables stay in the file.

mod ggml;
mod read;
mod value;
mod write;

use std::path::Path;

pub use self::value::{Array, Kind, Value};
pub use self::write::Replacement;
use crate::{error::LoadError, map::Bytes};

/// What is wrong with the bytes of a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum GgufError {
    #[error(
        "not a GGUF file: it starts with {got:02x?}\nhint: convert other formats first, or name the folder of a safetensors model"
    )]
    Magic { got: [u8; 4] },
    #[error(
        "GGUF version {got} is not supported, versions 2 and 3 are\nhint: files of version 1 and big-endian files have to be converted again"
    )]
    Version { got: u32 },
    #[error(
        "truncated: {what} at byte {at} needs {need} bytes, {left} are left\nhint: the download may be incomplete"
    )]
    Truncated {
        what: &'static str,
        at: u64,
        need: u64,
        left: u64,
    },
    #[error("{what} is {count}, at most {limit} is possible here")]
    TooMany {
        what: &'static str,
        count: u64,
        limit: u64,
    },
    #[error("{what} at byte {at} is not UTF-8")]
    NotUtf8 { what: &'static str, at: u64 },
    #[error("unknown value type {id} at byte {at}")]
    UnknownKind { id: u32, at: u64 },
    #[error("arrays at byte {at} are nested deeper than {limit}")]
    TooDeep { at: u64, limit: usize },
    #[error("`general.alignment` is {got:?}, it has to be a power of two up to 65536")]
    Alignment { got: Option<u64> },
    #[error("{what} `{name}` is there twice")]
    Duplicate { what: &'static str, name: String },
    #[error("tensor `{tensor}` {what}")]
    Tensor { tensor: String, what: String },
    #[error(
        "tensor `{tensor}` (offset {offset}, {len} bytes) ends outside the file: data starts at {data_start}, the file has {file_len} bytes\nhint: the download may be incomplete"
    )]
    TensorOutside {
        tensor: String,
        offset: u64,
        len: u64,
        data_start: u64,
        file_len: u64,
    },
}

/// A tensor in the file.
#[derive(Debug, Clone, Copy)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// The ggml type number, e.g. 0 for f32, 8 for `Q8_0`.
    pub ggml_type: u32,
    /// The data, `rows * row bytes`, aligned within the file.
    pub bytes: &'a [u8],
    dims: [u64; 4],
    n_dims: usize,
}

impl TensorInfo<'_> {
    /// Dimensions, fastest first, as in the file: a `[rows, cols]` matrix is `[cols, rows]`. One to four, none is zero.
    pub fn dims(&self) -> &[u64] {
        &self.dims[..self.n_dims]
    }
}

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    bytes: Bytes,
    tables: read::Tables,
}

impl Gguf {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// [`LoadError::Io`] or [`LoadError::Gguf`].
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let bytes = Bytes::open(path).map_err(|source| LoadError::Io {
            file: path.to_owned(),
            source,
        })?;
        Self::check(bytes).map_err(|error| LoadError::Gguf {
            file: path.to_owned(),
            error,
        })
    }

    /// Checks bytes that are in memory.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(bytes: impl Into<Vec<u8>>) -> Result<Self, GgufError> {
        Self::check(Bytes::Owned(bytes.into()))
    }

    fn check(bytes: Bytes) -> Result<Self, GgufError> {
        let tables = read::walk(&bytes)?;
        Ok(Self { bytes, tables })
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.tables.version
    }

    /// The metadata value of `key`.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let entry = read::find(&self.tables.entries, &self.bytes, |e| e.key, key)?;
        Value::read(entry.kind, entry.value.of(&self.bytes)).map(|(value, _)| value)
    }

    /// An integer; `None` if the key is missing or is not a non-negative integer.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// A number; `None` if the key is missing or is not a number.
    pub fn f32(&self, key: &str) -> Option<f32> {
        self.get(key)?.as_f32()
    }

    /// A truth value; `None` if the key is missing or is something else.
    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// A string; `None` if the key is missing, is something else or is not UTF-8.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// An array; `None` if the key is missing or is something else.
    pub fn array(&self, key: &str) -> Option<Array<'_>> {
        self.get(key)?.as_array()
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.tables.entries.iter().map(|e| text(e.key.of(&self.bytes)))
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<TensorInfo<'_>> {
        read::find(&self.tables.lines, &self.bytes, |l| l.name, name).map(|line| self.info(line))
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tables.lines.iter().map(|line| self.info(line))
    }

    fn info<'a>(&'a self, line: &read::Line) -> TensorInfo<'a> {
        TensorInfo {
            name: text(line.name.of(&self.bytes)),
            ggml_type: line.ggml_type,
            bytes: line.data.of(&self.bytes),
            dims: line.dims,
            n_dims: line.n_dims,
        }
    }

    /// The bytes before the tensor data: metadata and tensor lines.
    pub(crate) fn header(&self) -> &[u8] {
        &self.bytes[..self.tables.header_len]
    }

    /// Length of the whole file in bytes.
    pub fn file_len(&self) -> usize {
        self.bytes.len()
    }

    /// Hint that the file's pages are not needed for now; see [`crate::files::ModelFiles::drop_pages`].
    pub fn drop_pages(&self) {
        self.bytes.drop_pages();
    }
}

/// Names were checked to be UTF-8 by the walk.
fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}
