//! Dictionaries on disk: directories of SAELens (version 6 and before), one safetensors file with the same in it, and directories of
//! EleutherAI's `sparsify` (section 3.9).
//!
//! A single file holds the tensors of `sae_weights.safetensors`, and the text of `cfg.json` under `cfg` in its metadata.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use antefix_kernels::quant::{Format as Numbers, dequantise};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use super::sae::{Architecture, Norm, Parts, Sae};

/// The longest file of weights that is read, bytes.
pub const LONGEST: u64 = 8 << 30;

/// The longest `cfg.json`, bytes.
const LONGEST_TEXT: u64 = 1 << 20;

/// The version whose layout is written.
const VERSION: &str = "6.18.0";

/// Why something is no dictionary.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaeError {
    /// A file cannot be read or written.
    #[error("{}: {source}", .file.display())]
    Io {
        /// Which.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Nothing that is known lies there.
    #[error(
        "`{}` is no dictionary: it has neither cfg.json with sae_weights.safetensors (SAELens) nor sae.safetensors (sparsify)\n\
         hint: pickles (.pt) are not read; convert them to SAELens' form in Python", .0.display()
    )]
    Nothing(PathBuf),
    /// No JSON, or no object.
    #[error("its configuration is no JSON object: {0}")]
    Json(String),
    /// No safetensors file.
    #[error("its weights are no whole safetensors file: {0}")]
    Broken(String),
    /// A setting that cannot be.
    #[error("`{key}` is {got}, but must be {want}")]
    Setting {
        /// Which.
        key: &'static str,
        /// What it is.
        got: String,
        /// What it may be.
        want: String,
    },
    /// A tensor is missing.
    #[error("tensor `{0}` is missing")]
    Missing(String),
    /// A tensor of another shape or type.
    #[error("tensor `{name}` is {got}, but must be {want}")]
    Shape {
        /// Which.
        name: String,
        /// What it is.
        got: String,
        /// What fits the others.
        want: String,
    },
    /// A tensor with infinite values or NaN.
    #[error("tensor `{0}` holds values that are no numbers")]
    Number(String),
}

/// Which activations of a model a dictionary is of.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Origin {
    /// Name of the model, as the trainer knew it.
    pub model: Option<String>,
    /// Such as `blocks.10.attn.hook_z`.
    pub hook: Option<String>,
    /// Tokens of a row in training.
    pub context: Option<usize>,
    /// Whether rows began with the begin token.
    pub prepend_bos: Option<bool>,
    /// What else the file says of it, kept as it is.
    pub more: Map<String, Value>,
}

impl Origin {
    /// The layer in the hook's name.
    pub fn layer(&self) -> Option<usize> {
        let name: antefix_attention::hooks::SiteName = self.hook.as_deref()?.parse().ok()?;
        name.layer
    }

    /// Whether the hook is the head outputs before `W_o`.
    pub fn is_z(&self) -> bool {
        let name = self.hook.as_deref().and_then(|h| h.parse().ok());
        name.is_some_and(|n: antefix_attention::hooks::SiteName| n.site == antefix_attention::hooks::Site::Z)
    }

    /// Whether `z` lacked the biases of values, as far as the file tells: TransformerLens folds them unless it is told not to process
    /// weights.
    pub fn folds_value_biases(&self) -> bool {
        let Some(Value::Object(kwargs)) = self.more.get("model_from_pretrained_kwargs") else {
            return false;
        };
        let says = |key: &str| kwargs.get(key).and_then(Value::as_bool);
        says("fold_value_biases").unwrap_or(says("no_processing") != Some(true))
    }
}

/// A dictionary with what its files say of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// The dictionary.
    pub sae: Sae,
    /// Where its inputs come from.
    pub origin: Origin,
    /// Log10 of each feature's firing rate in training, `[F]`, if there is a file of them.
    pub sparsity: Option<Vec<f32>>,
    /// What may be wrong with it: said to people, not in the way.
    pub warnings: Vec<String>,
}

fn io(file: &Path) -> impl FnOnce(std::io::Error) -> SaeError {
    let file = file.to_owned();
    |source| SaeError::Io { file, source }
}

fn bytes_of(file: &Path, longest: u64) -> Result<Vec<u8>, SaeError> {
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).map_err(io(file))?;
    opened
        .take(longest + 1)
        .read_to_end(&mut bytes)
        .map_err(io(file))?;
    if bytes.len() as u64 > longest {
        return Err(SaeError::Broken(format!(
            "{} has more than {longest} bytes",
            file.display()
        )));
    }
    Ok(bytes)
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, SaeError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(SaeError::Json("it is something else".into())),
        Err(e) => Err(SaeError::Json(e.to_string())),
    }
}

/// The tensors of a file, in f32.
struct Tensors(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Tensors {
    fn read(bytes: &[u8]) -> Result<Self, SaeError> {
        let broken = |e: safetensors::SafeTensorError| SaeError::Broken(e.to_string());
        let file = SafeTensors::deserialize(bytes).map_err(broken)?;
        let mut all = HashMap::new();
        for (name, view) in file.tensors() {
            let kind = match view.dtype() {
                Dtype::F32 => Numbers::F32,
                Dtype::F16 => Numbers::F16,
                Dtype::BF16 => Numbers::BF16,
                other => {
                    return Err(SaeError::Shape {
                        name,
                        got: format!("{other:?}"),
                        want: "F32, F16 or BF16".into(),
                    });
                }
            };
            let mut values = vec![0.0; view.data().len() / kind.block_bytes()];
            dequantise(kind, view.data(), &mut values).map_err(|e| SaeError::Broken(e.to_string()))?;
            all.insert(name, (view.shape().to_vec(), values));
        }
        Ok(Self(all))
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, SaeError> {
        let (got, values) = self
            .0
            .remove(name)
            .ok_or_else(|| SaeError::Missing(name.into()))?;
        match got == shape {
            true => Ok(values),
            false => Err(SaeError::Shape {
                name: name.into(),
                got: format!("{got:?}"),
                want: format!("{shape:?}"),
            }),
        }
    }
}

fn size(cfg: &Map<String, Value>, key: &'static str) -> Result<usize, SaeError> {
    let value = cfg.get(key).unwrap_or(&Value::Null);
    value
        .as_u64()
        .and_then(|x| usize::try_from(x).ok())
        .filter(|x| (1..=1 << 30).contains(x))
        .ok_or_else(|| SaeError::Setting {
            key,
            got: value.to_string(),
            want: "a whole number from 1 to 2^30".into(),
        })
}

/// Whether a configuration is of SAELens 6 or later: before that its keys lie flat and have other names.
fn is_new(cfg: &Map<String, Value>) -> bool {
    let version = |map: &Map<String, Value>| {
        let text = map.get("sae_lens_version")?.as_str()?;
        text.split('.').next()?.parse::<u64>().ok()
    };
    let nested = cfg.get("metadata").and_then(Value::as_object);
    nested
        .and_then(version)
        .or_else(|| version(cfg))
        .is_some_and(|major| major >= 6)
}

/// The keys of an old configuration under their names of today.
fn renewed(mut cfg: Map<String, Value>) -> Map<String, Value> {
    for (old, new) in [
        ("hook_point", "hook_name"),
        ("hook_point_head_index", "hook_head_index"),
        ("activation_fn_str", "activation_fn"),
    ] {
        if let Some(value) = cfg.remove(old) {
            cfg.entry(new).or_insert(value);
        }
    }
    if cfg.get("activation_fn").and_then(Value::as_str) == Some("topk") {
        let k = cfg.get("activation_fn_kwargs").and_then(|k| k.get("k")).cloned();
        cfg.insert("architecture".into(), "topk".into());
        if let Some(k) = k {
            cfg.insert("k".into(), k);
        }
    }
    cfg.entry("architecture").or_insert("standard".into());
    cfg.entry("apply_b_dec_to_input").or_insert(true.into());
    if let Some(Value::Bool(on)) = cfg.get("normalize_activations") {
        let name = if *on { "expected_average_only_in" } else { "none" };
        cfg.insert("normalize_activations".into(), name.into());
    }
    // What concerns the model lies beside the rest.
    let own = [
        "d_in",
        "d_sae",
        "dtype",
        "device",
        "architecture",
        "k",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
        "rescale_acts_by_decoder_norm",
        "finetuning_scaling_factor",
    ];
    let (mut new, mut metadata) = (Map::new(), Map::new());
    for (key, value) in cfg {
        match own.contains(&key.as_str()) {
            true => new.insert(key, value),
            false => metadata.insert(key, value),
        };
    }
    new.insert("metadata".into(), Value::Object(metadata));
    new
}

/// A dictionary out of a configuration and tensors of SAELens.
fn assemble(cfg: Map<String, Value>, mut tensors: Tensors) -> Result<Stored, SaeError> {
    let cfg = if is_new(&cfg) { cfg } else { renewed(cfg) };
    let text = |key: &str| cfg.get(key).and_then(Value::as_str);
    let flag = |key: &str| cfg.get(key).and_then(Value::as_bool);
    let (d_in, features) = (size(&cfg, "d_in")?, size(&cfg, "d_sae")?);
    let mut warnings = Vec::new();
    let norm = match text("normalize_activations").unwrap_or("none") {
        "none" => Norm::None,
        "constant_norm_rescale" => Norm::ConstantRescale,
        "layer_norm" => Norm::LayerNorm,
        "expected_average_only_in" => {
            warnings.push(
                "its inputs were multiplied by a factor in training that the file does not have: values are off unless they are \
                 rescaled"
                    .into(),
            );
            Norm::None
        }
        other => {
            return Err(SaeError::Setting {
                key: "normalize_activations",
                got: format!("`{other}`"),
                want: "none, constant_norm_rescale, layer_norm or expected_average_only_in".into(),
            });
        }
    };
    if let Some((shape, values)) = tensors.0.remove("scaling_factor") {
        let wanted = flag("finetuning_scaling_factor") == Some(true);
        if values.iter().any(|x| *x != 1.0) {
            if !wanted {
                return Err(SaeError::Setting {
                    key: "finetuning_scaling_factor",
                    got: "not true, but the tensor `scaling_factor` is not all ones".into(),
                    want: "true".into(),
                });
            }
            if shape != [features] {
                return Err(SaeError::Shape {
                    name: "scaling_factor".into(),
                    got: format!("{shape:?}"),
                    want: format!("[{features}]"),
                });
            }
            // The decoder reads the features times it.
            if let Some((_, w_dec)) = tensors.0.get_mut("W_dec")
                && w_dec.len() == features * d_in
            {
                let rows = w_dec.chunks_exact_mut(d_in).zip(&values);
                rows.for_each(|(row, by)| row.iter_mut().for_each(|x| *x *= by));
            }
        }
    }
    let name = text("architecture").unwrap_or("standard");
    let (mut bias, mut architecture) = ("b_enc", Architecture::Standard);
    match name {
        "standard" => {}
        "topk" => {
            architecture = Architecture::TopK {
                k: size(&cfg, "k")?,
                rescale: flag("rescale_acts_by_decoder_norm") == Some(true),
            }
        }
        "jumprelu" | "batchtopk" => {
            let threshold = tensors.take("threshold", &[features])?;
            architecture = Architecture::JumpRelu { threshold };
        }
        "gated" => {
            bias = "b_gate";
            architecture = Architecture::Gated {
                r_mag: tensors.take("r_mag", &[features])?,
                b_mag: tensors.take("b_mag", &[features])?,
            };
        }
        other => {
            return Err(SaeError::Setting {
                key: "architecture",
                got: format!("`{other}`"),
                want: "standard, topk, batchtopk, jumprelu or gated".into(),
            });
        }
    }
    let sae = Sae::new(Parts {
        d_in,
        features,
        architecture,
        norm,
        apply_b_dec: flag("apply_b_dec_to_input").unwrap_or(true),
        w_enc: tensors.take("W_enc", &[d_in, features])?,
        b_enc: tensors.take(bias, &[features])?,
        w_dec: tensors.take("W_dec", &[features, d_in])?,
        b_dec: tensors.take("b_dec", &[d_in])?,
    })?;
    let mut more = match cfg.get("metadata") {
        Some(Value::Object(map)) => map.clone(),
        _ => Map::new(),
    };
    let mut word = |key: &str| match more.remove(key) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    };
    let (model, hook) = (word("model_name"), word("hook_name"));
    let context = more.remove("context_size").and_then(|x| x.as_u64());
    let prepend_bos = more.remove("prepend_bos").and_then(|x| x.as_bool());
    let origin = Origin {
        model,
        hook,
        context: context.and_then(|x| usize::try_from(x).ok()),
        prepend_bos,
        more,
    };
    if origin.folds_value_biases() {
        warnings.push(
            "it was trained on a model whose value biases were folded away: on a model with value biases `z` differs by a constant".into(),
        );
    }
    Ok(Stored {
        sae,
        origin,
        sparsity: None,
        warnings,
    })
}

/// A dictionary of EleutherAI's `sparsify`: TopK, `encoder.weight [F, d_in]`. A `W_dec` is told by its shape, not by its name.
fn sparsify(cfg: &Map<String, Value>, mut tensors: Tensors) -> Result<Stored, SaeError> {
    let d_in = size(cfg, "d_in")?;
    let features = match cfg.get("num_latents").and_then(Value::as_u64) {
        Some(n) if n > 0 => size(cfg, "num_latents")?,
        _ => size(cfg, "expansion_factor")?
            .checked_mul(d_in)
            .ok_or_else(|| SaeError::Setting {
                key: "expansion_factor",
                got: "too large".into(),
                want: "smaller".into(),
            })?,
    };
    let turned = |values: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..cols)
            .flat_map(|c| (0..rows).map(move |r| values[r * cols + c]))
            .collect()
    };
    let encoder = tensors.take("encoder.weight", &[features, d_in])?;
    let decoder = match tensors.0.get("W_dec").map(|t| t.0.clone()) {
        Some(shape) if shape == [d_in, features] && d_in != features => {
            turned(&tensors.take("W_dec", &shape)?, d_in, features)
        }
        _ => tensors.take("W_dec", &[features, d_in])?,
    };
    let sae = Sae::new(Parts {
        d_in,
        features,
        architecture: Architecture::TopK {
            k: size(cfg, "k")?,
            rescale: false,
        },
        norm: Norm::None,
        apply_b_dec: true,
        w_enc: turned(&encoder, features, d_in),
        b_enc: tensors.take("encoder.bias", &[features])?,
        w_dec: decoder,
        b_dec: tensors.take("b_dec", &[d_in])?,
    })?;
    Ok(Stored {
        sae,
        origin: Origin::default(),
        sparsity: None,
        warnings: vec!["the file does not say of which layer it is".into()],
    })
}

impl Stored {
    /// A dictionary that was just made.
    pub fn new(sae: Sae, origin: Origin) -> Self {
        Self {
            sae,
            origin,
            sparsity: None,
            warnings: Vec::new(),
        }
    }

    /// Reads a directory, or a single file with its configuration in it.
    ///
    /// # Errors
    /// When nothing that is known lies there, or its parts do not fit together.
    pub fn read(path: &Path) -> Result<Self, SaeError> {
        if path.is_file() {
            return Self::from_bytes(&bytes_of(path, LONGEST)?);
        }
        let cfg = path.join("cfg.json");
        let weights = path.join("sae_weights.safetensors");
        let eleuther = path.join("sae.safetensors");
        if !cfg.is_file() || !(weights.is_file() || eleuther.is_file()) {
            return Err(SaeError::Nothing(path.to_owned()));
        }
        let cfg = object(&bytes_of(&cfg, LONGEST_TEXT)?)?;
        if !weights.is_file() {
            return sparsify(&cfg, Tensors::read(&bytes_of(&eleuther, LONGEST)?)?);
        }
        let mut stored = assemble(cfg, Tensors::read(&bytes_of(&weights, LONGEST)?)?)?;
        let sparsity = path.join("sparsity.safetensors");
        if sparsity.is_file() {
            let mut tensors = Tensors::read(&bytes_of(&sparsity, LONGEST)?)?;
            stored.sparsity = Some(tensors.take("sparsity", &[stored.sae.features()])?);
        }
        Ok(stored)
    }

    /// Reads a single file.
    ///
    /// # Errors
    /// When it has no configuration, or its parts do not fit together.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SaeError> {
        let broken = |e: safetensors::SafeTensorError| SaeError::Broken(e.to_string());
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let cfg = header.metadata().as_ref().and_then(|m| m.get("cfg"));
        let cfg =
            cfg.ok_or_else(|| SaeError::Json("a single file has it under `cfg` in its metadata".into()))?;
        assemble(object(cfg.as_bytes())?, Tensors::read(bytes)?)
    }

    /// The configuration, as SAELens 6 writes it.
    pub fn cfg(&self) -> Value {
        let p = self.sae.parts();
        let mut metadata = self.origin.more.clone();
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                metadata.insert(key.into(), value);
            }
        };
        put("model_name", self.origin.model.clone().map(Into::into));
        put("hook_name", self.origin.hook.clone().map(Into::into));
        put("context_size", self.origin.context.map(Into::into));
        put("prepend_bos", self.origin.prepend_bos.map(Into::into));
        put("sae_lens_version", Some(VERSION.into()));
        let mut cfg = json!({
            "d_in": p.d_in,
            "d_sae": p.features,
            "dtype": "float32",
            "device": "cpu",
            "architecture": p.architecture.name(),
            "apply_b_dec_to_input": p.apply_b_dec,
            "normalize_activations": match p.norm {
                Norm::None => "none",
                Norm::ConstantRescale => "constant_norm_rescale",
                Norm::LayerNorm => "layer_norm",
            },
            "reshape_activations": if self.origin.is_z() { "hook_z" } else { "none" },
            "metadata": metadata,
        });
        if let Architecture::TopK { k, rescale } = p.architecture {
            cfg["k"] = json!(k);
            cfg["rescale_acts_by_decoder_norm"] = json!(rescale);
        }
        cfg
    }

    /// A single file with everything in it.
    ///
    /// # Errors
    /// When it would be too large for its format.
    pub fn to_bytes(&self) -> Result<Vec<u8>, SaeError> {
        let p = self.sae.parts();
        let mut tensors = vec![
            ("W_enc", vec![p.d_in, p.features], &p.w_enc),
            ("W_dec", vec![p.features, p.d_in], &p.w_dec),
            ("b_dec", vec![p.d_in], &p.b_dec),
        ];
        let f = vec![p.features];
        match &p.architecture {
            Architecture::Standard | Architecture::TopK { .. } => tensors.push(("b_enc", f, &p.b_enc)),
            Architecture::JumpRelu { threshold } => {
                tensors.push(("b_enc", f.clone(), &p.b_enc));
                tensors.push(("threshold", f, threshold));
            }
            Architecture::Gated { r_mag, b_mag } => {
                tensors.push(("b_gate", f.clone(), &p.b_enc));
                tensors.push(("r_mag", f.clone(), r_mag));
                tensors.push(("b_mag", f, b_mag));
            }
        }
        let cfg = HashMap::from([("cfg".to_string(), self.cfg().to_string())]);
        serialise(&tensors, Some(cfg))
    }

    /// Writes a directory of SAELens 6; whole files under temporary names first.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), SaeError> {
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        let text = serde_json::to_string_pretty(&self.cfg()).map_err(|e| SaeError::Json(e.to_string()))?;
        put(&folder.join("sae_weights.safetensors"), &self.to_bytes()?)?;
        if let Some(sparsity) = &self.sparsity {
            let tensors = [("sparsity", vec![sparsity.len()], sparsity)];
            put(&folder.join("sparsity.safetensors"), &serialise(&tensors, None)?)?;
        }
        put(&folder.join("cfg.json"), (text + "\n").as_bytes())
    }
}

fn serialise(
    tensors: &[(&str, Vec<usize>, &Vec<f32>)],
    texts: Option<HashMap<String, String>>,
) -> Result<Vec<u8>, SaeError> {
    let broken = |e: safetensors::SafeTensorError| SaeError::Broken(e.to_string());
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|t| t.2.iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (*name, view))
    });
    let views: Result<Vec<_>, _> = views.collect();
    safetensors::serialize(views.map_err(broken)?, texts).map_err(broken)
}

fn put(file: &Path, bytes: &[u8]) -> Result<(), SaeError> {
    let draft = file.with_extension("part");
    std::fs::write(&draft, bytes).map_err(io(&draft))?;
    std::fs::rename(&draft, file).map_err(io(file))
}
