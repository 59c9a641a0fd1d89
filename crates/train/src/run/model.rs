//! What a recipe trains, its tokens, and what it is exported as.

use std::path::Path;
use std::sync::Arc;

use antefix_kernels::quant::{self, Format};
use antefix_models::files::{ModelFiles, Role};
use antefix_models::gguf::Replacement;
use antefix_models::spec::{Act, Arch, LayerKind, ModelSpec, RopeScaling, RopeSpec, RopeStyle};
use antefix_models::tokenizer::{Specials, Tokenizer};
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::recipe::{RawLlama, RawModel, Recipe};
use crate::error::TrainError;
use crate::model::{Batch, Decoder, Gpt, LoraSpec, Params, Train};
use crate::prefix_grouper::LanguageModel;

/// Text to tokens and back.
#[derive(Clone)]
pub enum Tokens {
    /// A byte is a token; byte 0 is the end.
    Bytes,
    /// A model's own.
    Model(Arc<Tokenizer>),
}

impl Tokens {
    /// Token ids.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match self {
            Self::Bytes => text.bytes().map(u32::from).collect(),
            Self::Model(tokenizer) => tokenizer.encode(text, Specials::Plain),
        }
    }

    /// Text.
    pub fn decode(&self, ids: &[u32]) -> String {
        match self {
            Self::Bytes => {
                String::from_utf8_lossy(&ids.iter().map(|&t| t as u8).collect::<Vec<_>>()).into_owned()
            }
            Self::Model(tokenizer) => tokenizer.decode(ids),
        }
    }

    /// Ends a text.
    pub fn end(&self) -> u32 {
        match self {
            Self::Bytes => 0,
            Self::Model(tokenizer) => tokenizer.eos().unwrap_or(0),
        }
    }

    /// The texts of the begin and end tokens, as chat templates want them.
    pub(super) fn marks(&self) -> (String, String) {
        match self {
            Self::Bytes => (String::new(), self.decode(&[self.end()])),
            Self::Model(tokenizer) => {
                let text = |id: Option<u32>| id.map(|id| tokenizer.decode(&[id])).unwrap_or_default();
                (text(tokenizer.bos()), text(tokenizer.eos()))
            }
        }
    }

    /// Begins a prompt, if the model wants one.
    pub fn begin(&self) -> Option<u32> {
        match self {
            Self::Bytes => None,
            Self::Model(tokenizer) => tokenizer.bos().filter(|_| tokenizer.add_bos()),
        }
    }
}

/// A model in training.
pub(super) enum Trained {
    Decoder(Decoder),
    Gpt(Gpt),
}

impl LanguageModel for Trained {
    fn params(&self) -> &Params {
        match self {
            Self::Decoder(m) => m.params(),
            Self::Gpt(m) => m.params(),
        }
    }

    fn hidden(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        match self {
            Self::Decoder(m) => m.hidden(batch),
            Self::Gpt(m) => m.hidden(batch),
        }
    }

    fn output(&self) -> &Tensor {
        match self {
            Self::Decoder(m) => m.output(),
            Self::Gpt(m) => m.output(),
        }
    }
}

fn llama(raw: &RawLlama, name: &str) -> ModelSpec {
    let head_dim = raw.d / raw.heads;
    ModelSpec {
        arch: Arch::Llama,
        name: name.to_string(),
        layers: raw.layers,
        d_model: raw.d,
        d_ff: raw.ffn,
        heads: raw.heads,
        kv_heads: raw.kv_heads,
        head_dim,
        vocab: raw.vocab,
        context: raw.context,
        norm_eps: 1e-5,
        embed_scale: 1.0,
        attn_scale: (head_dim as f32).sqrt().recip(),
        attn_softcap: None,
        final_softcap: None,
        act: Act::Silu,
        qkv_bias: false,
        qk_norm: false,
        post_norms: false,
        tied: true,
        layer_kinds: vec![
            LayerKind {
                rope: 0,
                window: None
            };
            raw.layers
        ],
        ropes: vec![RopeSpec {
            base: raw.rope_base as f32,
            dims: head_dim,
            style: RopeStyle::Neox,
            scaling: RopeScaling::None,
        }],
    }
}

/// Refuses a model whose values, gradients and moments would not fit into memory: `parameters` numbers, 16 bytes each.
fn fits(parameters: usize) -> Result<(), TrainError> {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else {
        return Ok(());
    };
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"));
    let available = line.and_then(|l| l.split_whitespace().nth(1)?.parse::<f64>().ok());
    let (need, gb) = (parameters as f64 * 16.0, 1e9);
    match available {
        Some(kb) if need > kb * 1024.0 => Err(TrainError::Recipe(format!(
            "`model` has {parameters} parameters: with gradients and moments {:.1} GB, and {:.1} GB are free",
            need / gb,
            kb * 1024.0 / gb
        ))),
        _ => Ok(()),
    }
}

/// Parameters of a description, saturating.
fn parameters(spec: &ModelSpec) -> usize {
    let sizes = Role::all(spec.layers).filter_map(|role| role.shape(spec));
    sizes.fold(0, |sum: usize, [rows, cols]| {
        sum.saturating_add(rows.saturating_mul(cols))
    })
}

/// Makes or loads what the recipe trains.
pub(super) fn build(recipe: &Recipe) -> Result<(Trained, Tokens), TrainError> {
    let (model, tokens, init) = match &recipe.model {
        RawModel::Llama(raw) => {
            let spec = llama(raw, &recipe.recipe);
            fits(parameters(&spec))?;
            let model = Trained::Decoder(Decoder::fresh(&spec, raw.initializer_range, recipe.seed)?);
            (model, Tokens::Bytes, raw.init.as_ref())
        }
        RawModel::Gpt(raw) => {
            fits(raw.parameters())?;
            (Trained::Gpt(Gpt::fresh(raw, recipe.seed)?), Tokens::Bytes, None)
        }
        RawModel::Base { path, lora, init } => {
            let files = ModelFiles::open(path)?;
            if lora.is_none() {
                fits(parameters(files.spec()))?;
            }
            let tokenizer = Tokenizer::open(&files).map_err(|e| TrainError::file(path, e.to_string()))?;
            let train = lora.as_ref().map_or(Train::All, |raw| {
                Train::Lora(LoraSpec {
                    modules: raw.modules.clone(),
                    rank: raw.rank,
                    alpha: raw.alpha.unwrap_or(2.0 * raw.rank as f64),
                })
            });
            let model = Decoder::load(&files, &train, recipe.seed)?;
            (
                Trained::Decoder(model),
                Tokens::Model(Arc::new(tokenizer)),
                init.as_ref(),
            )
        }
    };
    let model = match model {
        Trained::Decoder(m) => Trained::Decoder(m.with_recompute(recipe.train.recompute)),
        Trained::Gpt(m) => Trained::Gpt(m.with_recompute(recipe.train.recompute)),
    };
    if let Some(init) = init {
        read_params(&init.join("model.safetensors"), model.params())?;
    }
    Ok((model, tokens))
}

/// Bytes of f32 values, little-endian.
fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Writes named tensors.
pub(super) fn write_tensors(
    file: &Path,
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
    metadata: &[(&str, String)],
) -> Result<(), TrainError> {
    let raw: Vec<_> = tensors
        .into_iter()
        .map(|(name, dims, values)| (name, dims, bytes(&values)))
        .collect();
    let views = raw
        .iter()
        .map(|(name, dims, bytes)| {
            let view = TensorView::new(Dtype::F32, dims.clone(), bytes);
            Ok((
                name.as_str(),
                view.map_err(|e| TrainError::file(file, e.to_string()))?,
            ))
        })
        .collect::<Result<Vec<_>, TrainError>>()?;
    let metadata = metadata
        .iter()
        .map(|(k, v)| ((*k).to_string(), v.clone()))
        .collect();
    let out =
        safetensors::serialize(views, Some(metadata)).map_err(|e| TrainError::file(file, e.to_string()))?;
    std::fs::write(file, out).map_err(TrainError::io(file))
}

/// Reads tensors of f32, in the order of their names.
pub(super) fn read_tensors(file: &Path) -> Result<Vec<(String, Vec<usize>, Vec<f32>)>, TrainError> {
    let all = std::fs::read(file).map_err(TrainError::io(file))?;
    let tensors = SafeTensors::deserialize(&all).map_err(|e| TrainError::file(file, e.to_string()))?;
    let mut found = tensors
        .iter()
        .map(|(name, view)| {
            if view.dtype() != Dtype::F32 {
                return Err(TrainError::file(
                    file,
                    format!("tensor `{name}` is {:?}, not F32", view.dtype()),
                ));
            }
            let (chunks, _) = view.data().as_chunks::<4>();
            let values = chunks.iter().map(|c| f32::from_le_bytes(*c)).collect();
            Ok((name.to_string(), view.shape().to_vec(), values))
        })
        .collect::<Result<Vec<_>, _>>()?;
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// The trained parameters, with names and shapes.
pub(super) fn params_of(params: &Params) -> Result<Vec<(String, Vec<usize>, Vec<f32>)>, TrainError> {
    params
        .variables()
        .map(|(name, var)| {
            Ok((
                name.to_string(),
                var.dims().to_vec(),
                var.flatten_all()?.to_vec1()?,
            ))
        })
        .collect()
}

/// Sets the trained parameters to those of a file, which has all of them.
pub(super) fn read_params(file: &Path, params: &Params) -> Result<(), TrainError> {
    let found = read_tensors(file)?;
    for (name, _) in params.variables() {
        if !found.iter().any(|(n, ..)| n == name) {
            return Err(TrainError::file(file, format!("parameter `{name}` is missing")));
        }
    }
    for (name, dims, values) in found {
        if params.variables().any(|(n, _)| n == name) {
            params
                .set(&name, &Tensor::from_vec(values, dims, &Device::Cpu)?)
                .map_err(|e| TrainError::file(file, e.to_string()))?;
        }
    }
    Ok(())
}

/// A byte as byte-level tokenizers write it.
fn byte_char(byte: u8) -> char {
    let plain = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !plain(b)).count() as u32;
    char::from_u32(256 + before).unwrap_or('?')
}

/// A tokenizer of bytes; ids beyond them have names that no text becomes.
fn byte_tokenizer(vocab: usize) -> serde_json::Value {
    let bytes = (0..=255u8).map(|b| (byte_char(b).to_string(), json!(b)));
    let beyond = (256..vocab).map(|id| (format!("<{id}>"), json!(id)));
    let vocab: serde_json::Map<String, serde_json::Value> = bytes.chain(beyond).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

fn write_json(file: &Path, value: &serde_json::Value) -> Result<(), TrainError> {
    std::fs::write(file, format!("{value:#}\n")).map_err(TrainError::io(file))
}

/// Writes what a run has trained so that others can load it: a safetensors folder for a small decoder, PEFT's adapter files for adapters, a
/// safetensors folder of a base model that was trained whole. `checkpoint` is a checkpoint's folder.
///
/// # Errors
/// When the recipe's model has no such form, or a file cannot be written.
pub fn export(recipe: &Recipe, checkpoint: &Path, to: &Path) -> Result<(), TrainError> {
    let (model, _) = build(recipe)?;
    read_params(&checkpoint.join("model.safetensors"), model.params())?;
    std::fs::create_dir_all(to).map_err(TrainError::io(to))?;
    let Trained::Decoder(decoder) = &model else {
        return Err(TrainError::Unsupported(
            "the engine does not run GPT-like models; train `kind = \"llama\"`".into(),
        ));
    };
    match &recipe.model {
        RawModel::Base {
            lora: Some(lora),
            path,
            ..
        } => {
            write_tensors(
                &to.join("adapter_model.safetensors"),
                params_of(decoder.params())?,
                &[("format", "pt".into())],
            )?;
            let config = json!({
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank,
                "lora_alpha": lora.alpha.unwrap_or(2.0 * lora.rank as f64), "lora_dropout": 0.0, "bias": "none",
                "target_modules": lora.modules, "fan_in_fan_out": false, "inference_mode": true,
                "base_model_name_or_path": path,
            });
            write_json(&to.join("adapter_config.json"), &config)
        }
        _ => {
            let spec = decoder.spec();
            if spec.arch != Arch::Llama {
                return Err(TrainError::Unsupported(format!(
                    "models of architecture `{}` are not exported whole; train adapters",
                    spec.arch.name()
                )));
            }
            write_tensors(
                &to.join("model.safetensors"),
                params_of(decoder.params())?,
                &[("format", "pt".into())],
            )?;
            let rope = &spec.ropes[0];
            let config = json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
                "hidden_size": spec.d_model, "intermediate_size": spec.d_ff, "num_hidden_layers": spec.layers,
                "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim,
                "vocab_size": spec.vocab, "max_position_embeddings": spec.context, "rms_norm_eps": spec.norm_eps,
                "rope_theta": rope.base, "tie_word_embeddings": spec.tied, "hidden_act": "silu",
                "eos_token_id": 0, "bos_token_id": null,
            });
            write_json(&to.join("config.json"), &config)?;
            if matches!(recipe.model, RawModel::Llama(_)) {
                write_json(&to.join("tokenizer.json"), &byte_tokenizer(spec.vocab))?;
            }
            Ok(())
        }
    }
}

/// Writes the base model of the recipe as GGUF again, with what was trained in it: adapters merged, changed matrices in `format` (or f32 where
/// rows are not whole blocks), all else as it was.
///
/// # Errors
/// When the recipe's base is no GGUF file, `format` cannot be written, or the disk is full; `to` is whole or not there.
pub fn export_gguf(recipe: &Recipe, checkpoint: &Path, to: &Path, format: Format) -> Result<(), TrainError> {
    let RawModel::Base { path, .. } = &recipe.model else {
        return Err(TrainError::Unsupported(
            "only a base model that is a GGUF file is written as GGUF".into(),
        ));
    };
    if quant::quantise(format, &[]).is_none() {
        return Err(TrainError::Unsupported(format!(
            "{} is read here, not written",
            format.name()
        )));
    }
    let files = ModelFiles::open(path)?;
    let gguf = files
        .gguf()
        .ok_or_else(|| TrainError::Unsupported(format!("{} is not a GGUF file", path.display())))?;
    let (model, _) = build(recipe)?;
    read_params(&checkpoint.join("model.safetensors"), model.params())?;
    let Trained::Decoder(decoder) = &model else {
        return Err(TrainError::Unsupported(
            "a GPT-like model is not written as GGUF".into(),
        ));
    };
    let mut changed = std::collections::HashMap::new();
    for (role, values) in decoder.changed_for(files.spec())? {
        let vector = role.shape(files.spec()).is_none_or(|[rows, _]| rows == 1);
        let cols = role.shape(files.spec()).map_or(1, |[_, cols]| cols);
        let whole = cols.is_multiple_of(format.block_len());
        let used = if vector || !whole { Format::F32 } else { format };
        let bytes = quant::quantise(used, &values)
            .ok_or_else(|| TrainError::Unsupported(format!("`{}` has no whole blocks", role.gguf_name())))?;
        let replacement = Replacement {
            ggml_type: used.ggml_type(),
            bytes,
        };
        changed.insert(role.gguf_name(), replacement);
    }
    let new = to.with_extension("gguf.new");
    let write = || -> std::io::Result<()> {
        let mut out = std::io::BufWriter::new(std::fs::File::create(&new)?);
        gguf.rewrite(&mut out, |t| changed.get(t.name).cloned())?;
        out.into_inner()?.sync_all()?;
        std::fs::rename(&new, to)
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(&new);
        TrainError::io(to)(e)
    })
}
