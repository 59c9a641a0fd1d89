//! A model as a file: safetensors, all tensors f32, with two texts in its metadata: `format` and `config` (JSON, [`Config`]).

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use super::config::{Config, ConfigError};

/// The first of a file's texts.
pub const FORMAT: &str = "antefix aaren 1";

/// The longest file that is read, bytes.
pub const LONGEST: u64 = 1 << 30;

/// The longest header, bytes.
const HEADER: usize = 8 << 20;

/// Why a file is no model, or no state of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// Longer than is read.
    #[error("the file has {0} bytes, at most {LONGEST} are read")]
    Long(u64),
    /// No file of this format.
    #[error("it is no whole safetensors file: {0}")]
    Broken(String),
    /// A text of the metadata is missing or wrong.
    #[error("`{key}` in its metadata is {got}, but must be {want}")]
    Text {
        /// Which.
        key: &'static str,
        /// What stands there.
        got: String,
        /// What may stand there.
        want: String,
    },
    /// The configuration cannot be read.
    #[error("its configuration cannot be read: {0}")]
    Json(String),
    /// The configuration makes no model.
    #[error("its configuration: {0}")]
    Config(#[from] ConfigError),
    /// A tensor is missing.
    #[error("tensor `{0}` is missing")]
    Missing(String),
    /// A tensor that such a model does not have.
    #[error("tensor `{0}` is none of this model's")]
    Unknown(String),
    /// A tensor of another type.
    #[error("tensor `{name}` is {got}, but must be {want}")]
    Type {
        /// Which.
        name: String,
        /// Its type.
        got: String,
        /// What it must be.
        want: &'static str,
    },
    /// A tensor of another shape.
    #[error("tensor `{name}` is {got:?}, but must be {want:?}")]
    Shape {
        /// Which.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// The shape that fits the configuration.
        want: Vec<usize>,
    },
    /// A tensor with infinite values or NaN.
    #[error("tensor `{0}` holds values that are no numbers")]
    Number(String),
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Vec<f32>>;

/// A file's header and its tensors, nothing of which is believed yet.
pub(super) struct Raw<'a> {
    pub(super) texts: HashMap<String, String>,
    pub(super) tensors: SafeTensors<'a>,
}

impl<'a> Raw<'a> {
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, FileError> {
        if bytes.len() as u64 > LONGEST {
            return Err(FileError::Long(bytes.len() as u64));
        }
        let broken = |e: &dyn std::fmt::Display| FileError::Broken(e.to_string());
        let start = bytes
            .first_chunk::<8>()
            .ok_or_else(|| broken(&"shorter than 8 bytes"))?;
        if u64::from_le_bytes(*start) > HEADER as u64 {
            return Err(broken(&format!("a header of more than {HEADER} bytes")));
        }
        let (_, header): (usize, Metadata) = SafeTensors::read_metadata(bytes).map_err(|e| broken(&e))?;
        Ok(Self {
            texts: header.metadata().clone().unwrap_or_default(),
            tensors: SafeTensors::deserialize(bytes).map_err(|e| broken(&e))?,
        })
    }

    pub(super) fn text(&self, key: &'static str, want: &str) -> Result<&str, FileError> {
        self.texts
            .get(key)
            .map(String::as_str)
            .ok_or_else(|| FileError::Text {
                key,
                got: "missing".into(),
                want: want.into(),
            })
    }

    /// Fails unless the text `key` is `want`.
    pub(super) fn is(&self, key: &'static str, want: &str) -> Result<(), FileError> {
        let got = self.text(key, &format!("`{want}`"))?;
        if got == want {
            return Ok(());
        }
        Err(FileError::Text {
            key,
            got: format!("`{}`", got.chars().take(60).collect::<String>()),
            want: format!("`{want}`"),
        })
    }

    /// The bytes of a tensor that must have this type and shape.
    pub(super) fn bytes(
        &self,
        name: &str,
        (dtype, type_name): (Dtype, &'static str),
        shape: &[usize],
    ) -> Result<&'a [u8], FileError> {
        let tensor = self
            .tensors
            .tensor(name)
            .map_err(|_| FileError::Missing(name.into()))?;
        if tensor.dtype() != dtype {
            return Err(FileError::Type {
                name: name.into(),
                got: format!("{:?}", tensor.dtype()),
                want: type_name,
            });
        }
        if tensor.shape() != shape {
            return Err(FileError::Shape {
                name: name.into(),
                got: tensor.shape().to_vec(),
                want: shape.to_vec(),
            });
        }
        Ok(tensor.data())
    }

    /// The finite f32 values of a tensor that must have this shape.
    pub(super) fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, FileError> {
        let bytes = self.bytes(name, (Dtype::F32, "F32"), shape)?;
        let values: Vec<f32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        if values.iter().all(|x| x.is_finite()) {
            Ok(values)
        } else {
            Err(FileError::Number(name.into()))
        }
    }
}

/// Reads and checks a model's file: its configuration, and each tensor of [`Config::tensors`], no more and no fewer.
///
/// # Errors
/// See [`FileError`].
pub fn read(bytes: &[u8]) -> Result<(Config, Tensors), FileError> {
    let raw = Raw::open(bytes)?;
    raw.is("format", FORMAT)?;
    let config: Config = serde_json::from_str(raw.text("config", "a configuration")?)
        .map_err(|e| FileError::Json(e.to_string()))?;
    config.check()?;
    let list = config.tensors();
    let mut tensors = Tensors::new();
    for (name, shape) in list {
        let values = raw.floats(&name, &shape)?;
        tensors.insert(name, values);
    }
    match raw
        .tensors
        .names()
        .into_iter()
        .find(|n| !tensors.contains_key(*n))
    {
        Some(name) => Err(FileError::Unknown(name.into())),
        None => Ok((config, tensors)),
    }
}

/// A model's file.
///
/// # Errors
/// When the configuration makes no model, or a tensor is missing, unknown, or of another size.
pub fn write(config: &Config, tensors: &Tensors) -> Result<Vec<u8>, FileError> {
    config.check()?;
    let list: BTreeMap<String, Vec<usize>> = config.tensors().into_iter().collect();
    if let Some(name) = tensors.keys().find(|name| !list.contains_key(*name)) {
        return Err(FileError::Unknown(name.clone()));
    }
    let mut parts = Vec::new();
    for (name, shape) in list {
        let values = tensors
            .get(&name)
            .ok_or_else(|| FileError::Missing(name.clone()))?;
        if values.len() != shape.iter().product::<usize>() {
            return Err(FileError::Shape {
                got: vec![values.len()],
                name,
                want: shape,
            });
        }
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        parts.push((name, Dtype::F32, shape, bytes));
    }
    let config = serde_json::to_string(config).map_err(|e| FileError::Json(e.to_string()))?;
    pack(&parts, &[("format", FORMAT.into()), ("config", config)])
}

/// A safetensors file of these tensors and texts. Written here, since the library puts texts in an order that changes from run to run: the same
/// contents are the same bytes.
pub(super) fn pack(
    parts: &[(String, Dtype, Vec<usize>, Vec<u8>)],
    texts: &[(&str, String)],
) -> Result<Vec<u8>, FileError> {
    let mut header = serde_json::Map::new();
    let texts: serde_json::Map<_, _> = texts
        .iter()
        .map(|(key, text)| ((*key).to_owned(), json!(text)))
        .collect();
    header.insert("__metadata__".into(), texts.into());
    // Wide values first, so that all stand on multiples of their size.
    let mut order: Vec<_> = parts.iter().collect();
    order.sort_by_key(|(name, dtype, ..)| (std::cmp::Reverse(dtype.bitsize()), name));
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in order {
        let from = data.len();
        data.extend_from_slice(bytes);
        let tensor = json!({"dtype": dtype, "shape": shape, "data_offsets": [from, data.len()]});
        header.insert(name.clone(), tensor);
    }
    let mut header = serde_json::to_vec(&header).map_err(|e| FileError::Json(e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    // What cannot be read is not written.
    SafeTensors::deserialize(&file).map_err(|e| FileError::Broken(e.to_string()))?;
    Ok(file)
}
