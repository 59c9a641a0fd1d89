//! A model's files behind one interface: what the model is, and its tensors by role.
//!
//! Opening checks everything a decoder relies on: all tensors are there, have the shapes the [`ModelSpec`] implies and types
//! the kernels know, and there is no tensor we would silently ignore. Files must not be changed while they are open.

use std::{
    borrow::Cow,
    collections::HashMap,
    path::{Path, PathBuf},
};

use antefix_kernels::quant::Format;
use half::{bf16, f16};

pub use crate::role::Role;
use crate::{
    error::{LoadError, shown},
    gguf::Gguf,
    safetensors::Folder,
    spec::{self, Arch, ModelSpec},
};

/// A matrix, `[rows, cols]` row-major, each row in blocks of `format`. Vectors have one row.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// How values are stored.
    pub format: Format,
    /// Number of rows; of outputs, for a weight matrix.
    pub rows: usize,
    /// Values per row; of inputs, for a weight matrix.
    pub cols: usize,
    /// `rows * row bytes`. Any alignment.
    pub bytes: Cow<'a, [u8]>,
}

/// A model on disk: a `.gguf` file, or a folder with `config.json` and safetensors.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    spec: ModelSpec,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Gguf(Gguf),
    /// The prefix is what names of the language model's tensors start with.
    Folder(Folder, &'static str),
    /// Values in f32, little-endian.
    Memory(HashMap<Role, Vec<u8>>),
}

/// Number of f32 among ggml's types.
const GGML_F32: u32 = 0;

/// Formats the kernels read, for error messages.
const FORMATS: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K";

impl ModelFiles {
    /// Opens and checks a model.
    ///
    /// # Errors
    /// [`LoadError`] says which file, what is wrong with it and, if we know, the way out.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_dir() {
            Self::from_folder(path)
        } else {
            Self::from_gguf(Gguf::open(path)?, path)
        }
    }

    /// A model in a GGUF file that is open already. `path` is for messages and [`Self::dir`].
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_gguf(gguf: Gguf, path: &Path) -> Result<Self, LoadError> {
        let spec = spec::from_gguf(&gguf, path)?;
        let files = Self {
            path: path.to_owned(),
            spec,
            source: Source::Gguf(gguf),
        };
        files.check()?;
        Ok(files)
    }

    fn from_folder(dir: &Path) -> Result<Self, LoadError> {
        let folder = Folder::open(dir)?;
        let embd = |prefix: &&str| folder.tensor(&format!("{prefix}embed_tokens.weight"));
        // A plain model, then the two ways in which models that also read images wrap theirs.
        let prefixes = ["model.", "language_model.model.", "model.language_model."];
        let prefix = prefixes.into_iter().find(|prefix| embd(prefix).is_some());
        let missing = || LoadError::Missing {
            file: dir.to_owned(),
            tensor: "model.embed_tokens.weight".into(),
        };
        let prefix = prefix.ok_or_else(missing)?;
        let present = spec::Present {
            lm_head: folder
                .tensor(&Role::Output.folder_name(Arch::Llama, prefix))
                .is_some(),
            vocab: embd(&prefix).and_then(|t| t.shape.first().copied()).unwrap_or(0),
        };
        let spec = spec::from_config(folder.config(), &present, &dir.join("config.json"))?;
        let files = Self {
            path: dir.to_owned(),
            spec,
            source: Source::Folder(folder, prefix),
        };
        files.check()?;
        Ok(files)
    }

    /// A model whose weights are in memory: what a trainer hands over. It has no tokenizer and no path.
    ///
    /// # Errors
    /// [`LoadError`] when a tensor that the description asks for is missing or of another size.
    pub fn in_memory(spec: ModelSpec, tensors: Vec<(Role, Vec<f32>)>) -> Result<Self, LoadError> {
        let bytes = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect();
        let files = Self {
            path: PathBuf::from("(in memory)"),
            spec,
            source: Source::Memory(tensors.into_iter().map(|(role, v)| (role, bytes(v))).collect()),
        };
        files.check()?;
        Ok(files)
    }

    /// The error for a tensor that the model cannot do without.
    pub(crate) fn missing(&self, role: Role) -> LoadError {
        LoadError::Missing {
            file: self.path.clone(),
            tensor: self.name(role),
        }
    }

    /// The error for a tensor whose contents the kernels refuse.
    pub(crate) fn bad_tensor(&self, role: Role, source: antefix_kernels::quant::QuantError) -> LoadError {
        LoadError::Tensor {
            file: self.path.clone(),
            tensor: self.name(role),
            source,
        }
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The path the model was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of the model's files.
    pub fn dir(&self) -> &Path {
        match self.source {
            Source::Gguf(_) => self.path.parent().unwrap_or(Path::new("")),
            Source::Folder(..) | Source::Memory(_) => &self.path,
        }
    }

    /// The GGUF file, if the model is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            Source::Folder(..) | Source::Memory(_) => None,
        }
    }

    /// A tensor, `None` if this model has none of that role (see [`Role::shape`]; also layers it does not have).
    ///
    /// # Errors
    /// A missing tensor, a wrong shape, an unusable type. None of these happens after a successful [`Self::open`].
    pub fn tensor(&self, role: Role) -> Result<Option<Tensor<'_>>, LoadError> {
        let Some([rows, cols]) = role.shape(&self.spec) else {
            return Ok(None);
        };
        let name = self.name(role);
        let missing = || LoadError::Missing {
            file: self.path.clone(),
            tensor: name.clone(),
        };
        let (ggml_type, shape, bytes, type_name) = match &self.source {
            Source::Gguf(gguf) => {
                let info = gguf.tensor(&name).ok_or_else(missing)?;
                let shape: Vec<usize> = info.dims().iter().rev().map(|&d| d as usize).collect();
                (
                    Some(info.ggml_type),
                    shape,
                    info.bytes,
                    format!("number {}", info.ggml_type),
                )
            }
            Source::Folder(folder, _) => {
                let info = folder.tensor(&name).ok_or_else(missing)?;
                (
                    info.ggml_type,
                    info.shape.to_vec(),
                    info.bytes,
                    format!("{:?}", info.dtype),
                )
            }
            Source::Memory(tensors) => {
                let bytes = tensors.get(&role).ok_or_else(missing)?;
                let shape = match bytes.len() == 4 * rows * cols {
                    true => vec![rows, cols],
                    false => vec![bytes.len() / 4],
                };
                (Some(GGML_F32), shape, bytes.as_slice(), "F32".to_string())
            }
        };
        let fits = match *shape {
            [c] => rows == 1 && c == cols,
            [r, c] => r == rows && c == cols,
            _ => false,
        };
        if !fits {
            let want = vec![rows, cols];
            return Err(LoadError::Shape {
                file: self.path.clone(),
                tensor: name,
                want,
                got: shape.into_iter().take(8).collect(),
            });
        }
        let unusable = || LoadError::Type {
            file: self.path.clone(),
            tensor: name.clone(),
            got: type_name,
            supported: FORMATS,
        };
        let format = ggml_type.and_then(Format::from_ggml_type).ok_or_else(unusable)?;
        let tensor = Tensor {
            format,
            rows,
            cols,
            bytes: Cow::Borrowed(bytes),
        };
        let shifted =
            matches!(self.source, Source::Folder(..)) && self.spec.arch == Arch::Gemma3 && role.is_norm();
        Ok(Some(if shifted { plus_one(&tensor) } else { tensor }))
    }

    fn name(&self, role: Role) -> String {
        match &self.source {
            Source::Gguf(_) | Source::Memory(_) => role.gguf_name(),
            Source::Folder(_, prefix) => role.folder_name(self.spec.arch, prefix),
        }
    }

    /// Every tensor the specification needs is right, and there are no others.
    fn check(&self) -> Result<(), LoadError> {
        let mut known = Vec::new();
        for role in Role::all(self.spec.layers) {
            if self.tensor(role)?.is_some() {
                known.push(self.name(role));
            }
        }
        known.sort_unstable();
        let is_unknown = |name: &&str| known.binary_search_by(|k| k.as_str().cmp(name)).is_err();
        let unknown = match &self.source {
            // Tables of RoPE angles: the first is read with the specification, the second can be computed.
            Source::Gguf(gguf) => gguf
                .tensors()
                .map(|t| t.name)
                .filter(|name| *name != "rope_freqs.weight" && !name.contains("attn_rot_embd"))
                .find(is_unknown),
            // Only the layers: other tensors may belong to a part that reads images.
            Source::Folder(folder, prefix) => folder
                .names()
                .filter(|name| {
                    name.strip_prefix(prefix)
                        .is_some_and(|rest| rest.starts_with("layers."))
                })
                .filter(|name| !name.contains("rotary_emb.inv_freq"))
                .find(is_unknown),
            Source::Memory(_) => None,
        };
        match unknown {
            None => Ok(()),
            Some(name) => Err(LoadError::Unsupported {
                file: self.path.clone(),
                feature: format!(
                    "tensor `{}` in a model of architecture `{}`",
                    shown(name),
                    self.spec.arch.name()
                ),
                hint: "the model may be a variant of its architecture that is not known here",
            }),
        }
    }

    /// A cheap hash of what the model computes: its description, the header of its file and samples of every tensor.
    ///
    /// Stable across runs and machines. Two different models practically never share it; an edit of a few weights
    /// that leaves all samples alone is not seen, so this is for cache keys, not for integrity.
    pub fn fingerprint(&self) -> u64 {
        const SAMPLE: usize = 64;
        let mut hash = Fnv::new();
        hash.bytes(format!("{:?}", self.spec).as_bytes());
        match &self.source {
            Source::Gguf(gguf) => {
                hash.bytes(&(gguf.file_len() as u64).to_le_bytes());
                hash.bytes(gguf.header());
            }
            // Names are fixed by the specification, types and sizes follow with the samples.
            Source::Folder(..) | Source::Memory(_) => {}
        }
        for tensor in Role::all(self.spec.layers).filter_map(|role| self.tensor(role).ok().flatten()) {
            let bytes = &*tensor.bytes;
            hash.bytes(&(bytes.len() as u64).to_le_bytes());
            hash.bytes(format!("{:?}", tensor.format).as_bytes());
            for at in [0, bytes.len() / 2, bytes.len().saturating_sub(SAMPLE)] {
                hash.bytes(&bytes[at..bytes.len().min(at + SAMPLE)]);
            }
        }
        hash.0
    }

    /// A hash of everything that the model computes with: its description, the header of its file and every byte of every tensor.
    ///
    /// # Errors
    /// When a tensor cannot be read any more.
    pub fn digest(&self) -> Result<[u8; 32], LoadError> {
        let mut hash = blake3::Hasher::new_derive_key("antefix model digest, version 1");
        hash.update(format!("{:?}", self.spec).as_bytes());
        if let Source::Gguf(gguf) = &self.source {
            hash.update(gguf.header());
        }
        for role in Role::all(self.spec.layers) {
            let Some(tensor) = self.tensor(role)? else {
                continue;
            };
            hash.update(format!("{role:?} {:?} {}", tensor.format, tensor.bytes.len()).as_bytes());
            hash.update(&tensor.bytes);
        }
        self.drop_pages();
        Ok(*hash.finalize().as_bytes())
    }

    /// Hint that the mapped pages are not needed for now, so that resident memory falls once weights are packed.
    /// Tensors stay usable; reading them brings the pages back.
    pub fn drop_pages(&self) {
        match &self.source {
            Source::Gguf(gguf) => gguf.drop_pages(),
            Source::Folder(folder, _) => folder.drop_pages(),
            Source::Memory(_) => {}
        }
    }
}

/// Gemma's norms multiply by `1 + w`; safetensors hold `w`, GGUF files `1 + w`, as do we.
fn plus_one(tensor: &Tensor<'_>) -> Tensor<'static> {
    let two = |c: &[u8]| [c[0], c[1]];
    let values: Vec<f32> = match tensor.format {
        Format::F16 => tensor
            .bytes
            .chunks_exact(2)
            .map(|c| f16::from_le_bytes(two(c)).to_f32())
            .collect(),
        Format::BF16 => tensor
            .bytes
            .chunks_exact(2)
            .map(|c| bf16::from_le_bytes(two(c)).to_f32())
            .collect(),
        // Folders have no other formats.
        _ => tensor
            .bytes
            .chunks_exact(4)
            .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
            .collect(),
    };
    let bytes: Vec<u8> = values.iter().flat_map(|v| (v + 1.0).to_le_bytes()).collect();
    Tensor {
        format: Format::F32,
        rows: tensor.rows,
        cols: tensor.cols,
        bytes: Cow::Owned(bytes),
    }
}

/// FNV-1a over eight bytes at a time.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3);
            self.0 ^= self.0 >> 29; // plain FNV never moves high bits down
        }
    }
}
