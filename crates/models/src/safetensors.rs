//! Folders with `config.json` and `model.safetensors`, or its parts and their index.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, tensor::Metadata};
use serde_json::Value;

use crate::{
    error::{LoadError, shown},
    map::Bytes,
};

/// Longest header. Its tables take up to four times as much memory.
const MAX_HEADER: u64 = 16 << 20;
/// Longest JSON file we read.
const MAX_JSON: u64 = 16 << 20;
/// Most parts of a model.
const MAX_PARTS: usize = 1024;

/// Where a tensor is.
#[derive(Debug, Clone)]
struct Place {
    part: usize,
    start: usize,
    len: usize,
    ggml_type: Option<u32>,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// A tensor of a folder.
#[derive(Debug, Clone, Copy)]
pub struct TensorInfo<'a> {
    /// The ggml number of its type, `None` if there is none.
    pub ggml_type: Option<u32>,
    /// The type as the file has it.
    pub dtype: Dtype,
    /// Slowest dimension first.
    pub shape: &'a [usize],
    /// The data, of any alignment.
    pub bytes: &'a [u8],
}

/// An open folder.
#[derive(Debug)]
pub struct Folder {
    config: Value,
    parts: Vec<(PathBuf, Bytes)>,
    places: BTreeMap<String, Place>,
}

impl Folder {
    /// Reads `config.json`, maps the tensor files and checks their headers.
    ///
    /// # Errors
    /// A file that is missing or wrong, by its name.
    pub fn open(dir: &Path) -> Result<Self, LoadError> {
        let config_file = dir.join("config.json");
        if !config_file.is_file() {
            return Err(LoadError::NotAModel { path: dir.to_owned() });
        }
        let mut folder = Self {
            config: read_json(&config_file)?,
            parts: Vec::new(),
            places: BTreeMap::new(),
        };
        for file in part_names(dir)? {
            folder.add_part(dir.join(file))?;
        }
        Ok(folder)
    }

    /// `config.json`
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<TensorInfo<'_>> {
        let place = self.places.get(name)?;
        let bytes = &self.parts[place.part].1[place.start..place.start + place.len];
        Some(TensorInfo {
            ggml_type: place.ggml_type,
            dtype: place.dtype,
            shape: &place.shape,
            bytes,
        })
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// See [`crate::files::ModelFiles::drop_pages`].
    pub fn drop_pages(&self) {
        for (_, bytes) in &self.parts {
            bytes.drop_pages();
        }
    }

    fn add_part(&mut self, file: PathBuf) -> Result<(), LoadError> {
        let bytes = Bytes::open(&file).map_err(|source| LoadError::Io {
            file: file.clone(),
            source,
        })?;
        let places = read_header(&bytes).map_err(|what| LoadError::Safetensors {
            file: file.clone(),
            what,
        })?;
        for (name, mut place) in places {
            place.part = self.parts.len();
            if self.places.contains_key(&name) {
                let what = format!("tensor `{}` is in another part as well", shown(&name));
                return Err(LoadError::Safetensors { file, what });
            }
            self.places.insert(name, place);
        }
        self.parts.push((file, bytes));
        Ok(())
    }
}

/// Names of the tensor files, sorted.
fn part_names(dir: &Path) -> Result<Vec<String>, LoadError> {
    let index_file = dir.join("model.safetensors.index.json");
    if !index_file.is_file() {
        let single = "model.safetensors";
        let there = dir.join(single).is_file();
        return if there {
            Ok(vec![single.into()])
        } else {
            Err(LoadError::NotAModel { path: dir.to_owned() })
        };
    }
    let bad = |what: String| LoadError::Json {
        file: index_file.clone(),
        what,
    };
    let index = read_json(&index_file)?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| bad("has no `weight_map`".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().unwrap_or_default();
        // A name, not a path: the index must not lead out of the folder.
        let plain = file.ends_with(".safetensors") && !file.contains(['/', '\\', ':', '\0']);
        if !plain {
            return Err(bad(format!(
                "says that `{}` is in `{}`, which is not the name of a safetensors file",
                shown(tensor),
                shown(file)
            )));
        }
        names.insert(file.to_owned());
        if names.len() > MAX_PARTS {
            return Err(bad(format!("names more than {MAX_PARTS} files")));
        }
    }
    Ok(names.into_iter().collect())
}

fn read_json(file: &Path) -> Result<Value, LoadError> {
    let io = |source| LoadError::Io {
        file: file.to_owned(),
        source,
    };
    let len = fs::metadata(file).map_err(io)?.len();
    let bad = |what: String| LoadError::Json {
        file: file.to_owned(),
        what,
    };
    if len > MAX_JSON {
        return Err(bad(format!("has {len} bytes, at most {MAX_JSON} are read")));
    }
    let bytes = fs::read(file).map_err(io)?;
    serde_json::from_slice(&bytes).map_err(|error| bad(format!("is not JSON: {}", shown(&error.to_string()))))
}

/// Checks the header of a safetensors file; every place lies inside `bytes` and has the size its shape implies.
/// The crate reads the header, sizes are checked here because it adds up unchecked.
fn read_header(bytes: &[u8]) -> Result<Vec<(String, Place)>, String> {
    let (len, rest) = bytes
        .split_first_chunk::<8>()
        .ok_or("is too short for a safetensors file")?;
    let len = u64::from_le_bytes(*len);
    if len > MAX_HEADER || len > rest.len() as u64 {
        let limit = MAX_HEADER.min(rest.len() as u64);
        return Err(format!(
            "its header says it has {len} bytes, at most {limit} are possible\nhint: the download may be incomplete"
        ));
    }
    let (header, data) = rest.split_at(len as usize);
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|error| format!("its header cannot be read: {}", shown(&error.to_string())))?;
    let mut places = Vec::new();
    for (name, info) in metadata.tensors() {
        let (from, to) = info.data_offsets;
        if from > to || to > data.len() {
            let what = format!(
                "tensor `{}` is at {from}..{to}, the file has {} bytes of data",
                shown(&name),
                data.len()
            );
            return Err(format!("{what}\nhint: the download may be incomplete"));
        }
        let values = info
            .shape
            .iter()
            .try_fold(1usize, |acc, &dim| acc.checked_mul(dim));
        let bits = values.and_then(|values| values.checked_mul(info.dtype.bitsize()));
        if bits != (to - from).checked_mul(8) {
            let shape = shown(&format!("{:?}", info.shape));
            return Err(format!(
                "tensor `{}` of shape {shape} cannot have {} bytes",
                shown(&name),
                to - from
            ));
        }
        let ggml_type = match info.dtype {
            Dtype::F32 => Some(0),
            Dtype::F16 => Some(1),
            Dtype::BF16 => Some(30),
            _ => None,
        };
        let start = 8 + header.len() + from;
        let (len, shape) = (to - from, info.shape.clone());
        places.push((
            name,
            Place {
                part: 0,
                start,
                len,
                ggml_type,
                dtype: info.dtype,
                shape,
            },
        ));
    }
    Ok(places)
}

/// Checks the bytes of a safetensors file without keeping anything; for fuzzing.
///
/// # Errors
/// What is wrong, in words.
pub fn check_header(bytes: &[u8]) -> Result<usize, String> {
    read_header(bytes).map(|places| places.len())
}
