//! Captured activations as safetensors files.
//!
//! A tensor `[ID/]blocks.N.SITE` is `[tokens, width]`, or `[tokens, heads, D]` where the site has heads; beside it
//! `[ID/]blocks.N.SITE.positions` says which tokens. Which heads, if not all, is in the metadata under `heads:NAME`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use antefix_attention::hooks::{Captured, SiteName, Values};
use safetensors::{Dtype, SafeTensors, View};

/// Why a file of captures could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureFileError {
    /// The file system.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// The container.
    #[error("{file}: {source}")]
    Format {
        /// The file.
        file: String,
        /// Why.
        source: safetensors::SafeTensorError,
    },
    /// A tensor that is not what its name says.
    #[error("{file}: tensor `{tensor}`: {problem}")]
    Tensor {
        /// The file.
        file: String,
        /// Its name.
        tensor: String,
        /// What is wrong.
        problem: &'static str,
    },
}

/// Bytes of a tensor, little-endian.
struct Data<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl View for Data<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

const POSITIONS: &str = ".positions";

/// The tensors and the metadata of a file.
fn parts(captured: &[Captured]) -> (Vec<(String, Data<'static>)>, HashMap<String, String>) {
    let mut tensors = Vec::new();
    let mut metadata = HashMap::from([("format".to_owned(), "antefix captures 1".to_owned())]);
    for c in captured {
        let (dtype, bytes): (_, Vec<u8>) = match &c.values {
            Values::F32(v) => (Dtype::F32, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
            Values::Bf16(v) => (Dtype::BF16, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
        };
        let rows = c.positions.len();
        let shape = match &c.heads {
            Some(heads) => {
                metadata.insert(format!("heads:{}", c.name()), format!("{heads:?}"));
                vec![rows, heads.len(), c.width / heads.len().max(1)]
            }
            None => vec![rows, c.width],
        };
        tensors.push((
            c.name(),
            Data {
                dtype,
                shape,
                bytes: bytes.into(),
            },
        ));
        let positions: Vec<u8> = c.positions.iter().flat_map(|p| p.to_le_bytes()).collect();
        tensors.push((
            c.name() + POSITIONS,
            Data {
                dtype: Dtype::U32,
                shape: vec![rows],
                bytes: positions.into(),
            },
        ));
    }
    (tensors, metadata)
}

/// The bytes of a safetensors file of `captured`.
///
/// # Errors
/// When the container cannot hold it.
pub fn to_bytes(captured: &[Captured]) -> Result<Vec<u8>, CaptureFileError> {
    let (tensors, metadata) = parts(captured);
    safetensors::serialize(tensors, Some(metadata)).map_err(|source| CaptureFileError::Format {
        file: "captures".into(),
        source,
    })
}

/// Writes `captured` to `path`.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, captured: &[Captured]) -> Result<(), CaptureFileError> {
    let (tensors, metadata) = parts(captured);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|source| CaptureFileError::Format {
        file: path.display().to_string(),
        source,
    })
}

/// Reads what [`write()`] wrote, or tensors that another program wrote under the same names.
///
/// # Errors
/// When the file cannot be read or a tensor is not what its name says.
pub fn read(path: &Path) -> Result<Vec<Captured>, CaptureFileError> {
    let file = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|source| CaptureFileError::Io {
        file: file.clone(),
        source,
    })?;
    from_bytes(&bytes, &file)
}

/// The same out of memory; `file` is for messages.
///
/// # Errors
/// As [`read`].
pub fn from_bytes(bytes: &[u8], file: &str) -> Result<Vec<Captured>, CaptureFileError> {
    let format = |source| CaptureFileError::Format {
        file: file.to_owned(),
        source,
    };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(format)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(format)?;
    let mut out = Vec::new();
    for name in tensors.names() {
        if name.ends_with(POSITIONS) {
            continue;
        }
        let wrong = |problem| CaptureFileError::Tensor {
            file: file.to_owned(),
            tensor: name.to_owned(),
            problem,
        };
        let (id, site) = match name.rsplit_once('/') {
            Some((id, site)) => (id, site),
            None => ("", name),
        };
        let SiteName { site, layer } = site.parse().map_err(|_| wrong("its name is no site"))?;
        let tensor = tensors.tensor(name).map_err(format)?;
        let (rows, width) = match *tensor.shape() {
            [rows, width] => (rows, width),
            [rows, heads, dim] => (rows, heads * dim),
            _ => return Err(wrong("captures are [tokens, width] or [tokens, heads, D]")),
        };
        let values = match tensor.dtype() {
            Dtype::F32 => Values::F32(words(tensor.data(), f32::from_le_bytes)),
            Dtype::BF16 => Values::Bf16(words(tensor.data(), u16::from_le_bytes)),
            _ => return Err(wrong("captures are f32 or bf16")),
        };
        let positions = match tensors.tensor(&format!("{name}{POSITIONS}")) {
            Ok(p) if p.dtype() == Dtype::U32 => words(p.data(), u32::from_le_bytes),
            Ok(_) => return Err(wrong("its positions are not u32")),
            Err(_) => (0..rows as u32).collect(),
        };
        if positions.len() != rows || !positions.is_sorted_by(|a, b| a < b) {
            return Err(wrong("its positions are not one for each row, ascending"));
        }
        let listed = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get(&format!("heads:{name}")));
        let heads = match (tensor.shape(), listed) {
            ([_, _, _], Some(list)) => {
                Some(serde_json::from_str(list).map_err(|_| wrong("its list of heads is none"))?)
            }
            ([_, heads, _], None) => Some((0..*heads).collect()),
            _ => None,
        };
        out.push(Captured {
            id: id.to_owned(),
            site,
            layer: layer.unwrap_or(0),
            heads,
            width,
            positions,
            values,
        });
    }
    out.sort_by_key(|c| (c.id.clone(), c.layer, c.site));
    Ok(out)
}

fn words<const N: usize, T>(bytes: &[u8], word: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&b| word(b)).collect()
}

#[cfg(test)]
mod tests {
    use antefix_attention::hooks::Site;

    use super::*;

    fn captured() -> Vec<Captured> {
        vec![
            Captured {
                id: String::new(),
                site: Site::Embed,
                layer: 0,
                heads: None,
                width: 2,
                positions: vec![0, 1, 5],
                values: Values::F32(vec![1.0, 2.0, 3.0, 4.0, 5.0, -6.5]),
            },
            Captured {
                id: "clean".into(),
                site: Site::Z,
                layer: 3,
                heads: Some(vec![1, 4]),
                width: 4,
                positions: vec![7],
                values: Values::Bf16(vec![0x3f80, 0, 0x4000, 1]),
            },
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = to_bytes(&captured()).unwrap();
        assert_eq!(from_bytes(&bytes, "x").unwrap(), captured());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("captures.safetensors");
        write(&path, &captured()).unwrap();
        assert_eq!(read(&path).unwrap(), captured());
        let names = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(
            names.tensor("clean/blocks.3.attn.hook_z").unwrap().shape(),
            [1, 2, 2]
        );
    }

    #[test]
    fn other_names_and_types_are_refused() {
        let tensor = |name: &str, dtype, shape: Vec<usize>, len: usize| {
            let data = Data {
                dtype,
                shape,
                bytes: vec![0; len].into(),
            };
            safetensors::serialize(vec![(name.to_owned(), data)], None).unwrap()
        };
        let error = |bytes: &[u8]| from_bytes(bytes, "x").unwrap_err().to_string();
        assert!(error(&tensor("blocks.0.attn.hook_y", Dtype::F32, vec![1, 1], 4)).contains("no site"));
        assert!(error(&tensor("hook_embed", Dtype::I32, vec![1, 1], 4)).contains("f32 or bf16"));
        assert!(error(&tensor("hook_embed", Dtype::F32, vec![1], 4)).contains("[tokens, width]"));
        assert!(from_bytes(b"no safetensors", "x").is_err());
    }
}
