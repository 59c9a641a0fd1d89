//! GGUF metadata to [`ModelSpec`].

use std::path::Path;

use super::{Act, Arch, LayerKind, ModelSpec, RopeScaling, RopeSpec, RopeStyle, SUPPORTED};
use crate::{
    error::{LoadError, shown},
    gguf::{Gguf, Value},
};

/// Reads `{arch}.*` keys.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: Arch,
    file: &'a Path,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.arch.name())
    }

    fn error(&self, key: &str, what: impl Into<String>) -> LoadError {
        LoadError::Key {
            file: self.file.to_owned(),
            key: self.full(key),
            what: what.into(),
        }
    }

    fn unsupported(&self, feature: String, hint: &'static str) -> LoadError {
        LoadError::Unsupported {
            file: self.file.to_owned(),
            feature,
            hint,
        }
    }

    fn get(&self, key: &str) -> Option<Value<'_>> {
        self.gguf.get(&self.full(key))
    }

    /// A size, also when it is written as an array with the same number for every layer.
    fn opt_size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let value = match value.as_array() {
            None => value,
            Some(array) => {
                let mut items = array.iter();
                let first = items.next().ok_or_else(|| self.error(key, "is an empty array"))?;
                if items.any(|item| item.as_u64() != first.as_u64()) {
                    return Err(self.unsupported(
                        format!("`{}` that differs between layers", self.full(key)),
                        "only models whose layers all have the same shape are supported",
                    ));
                }
                first
            }
        };
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok());
        size.map(Some)
            .ok_or_else(|| self.error(key, format!("is {value:?}, not a size")))
    }

    fn size(&self, key: &str) -> Result<usize, LoadError> {
        self.opt_size(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    fn opt_f32(&self, key: &str) -> Result<Option<f32>, LoadError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_f32()
            .map(Some)
            .ok_or_else(|| self.error(key, format!("is {value:?}, not a number")))
    }
}

/// Describes the model in a GGUF file. `file` is for error messages.
pub(crate) fn from_gguf(gguf: &Gguf, file: &Path) -> Result<ModelSpec, LoadError> {
    let name = gguf.str("general.architecture").ok_or_else(|| LoadError::Key {
        file: file.to_owned(),
        key: "general.architecture".into(),
        what: "is missing".into(),
    })?;
    let arch = Arch::from_gguf_name(name).ok_or_else(|| LoadError::Arch {
        file: file.to_owned(),
        arch: shown(name),
        supported: SUPPORTED,
    })?;
    let keys = Keys { gguf, arch, file };
    refuse_unsupported(&keys)?;

    let layers = keys.size("block_count")?;
    let d_model = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let head_dim = match keys.opt_size("attention.key_length")? {
        Some(dim) => dim,
        None if heads != 0 && d_model.is_multiple_of(heads) => d_model / heads,
        None => {
            return Err(keys.error(
                "attention.key_length",
                "is missing, and heads do not divide the model width",
            ));
        }
    };
    if let Some(dim) = keys
        .opt_size("attention.value_length")?
        .filter(|&dim| dim != head_dim)
    {
        return Err(keys.error(
            "attention.value_length",
            format!("is {dim}, only the key length ({head_dim}) is supported"),
        ));
    }
    let vocab = vocab(&keys)?;
    let gemma = arch == Arch::Gemma3;
    let attn_scale = match keys.opt_f32("attention.scale")? {
        Some(scale) if scale > 0.0 => scale,
        // Gemma 3 27B (62 layers) is the one size whose query_pre_attn_scalar is not its head dimension; the file has no
        // key for it, other engines know it by its layer count as well.
        _ if gemma && layers == 62 && heads != 0 => ((d_model / heads) as f32).sqrt().recip(),
        _ => (head_dim as f32).sqrt().recip(),
    };
    let (ropes, layer_kinds) = positions(&keys, layers, head_dim)?;
    ModelSpec {
        arch,
        name: gguf
            .str("general.name")
            .unwrap_or_default()
            .chars()
            .take(200)
            .collect(),
        layers,
        d_model,
        d_ff: keys.size("feed_forward_length")?,
        heads,
        kv_heads: keys.opt_size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab,
        context: keys.size("context_length")?,
        norm_eps: keys
            .opt_f32("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.error("attention.layer_norm_rms_epsilon", "is missing"))?,
        embed_scale: if gemma { (d_model as f32).sqrt() } else { 1.0 },
        attn_scale,
        attn_softcap: keys.opt_f32("attn_logit_softcapping")?.filter(|&cap| cap != 0.0),
        final_softcap: keys.opt_f32("final_logit_softcapping")?.filter(|&cap| cap != 0.0),
        act: if gemma { Act::GeluTanh } else { Act::Silu },
        qkv_bias: arch == Arch::Qwen2 || gguf.tensor("blk.0.attn_q.bias").is_some(),
        qk_norm: matches!(arch, Arch::Qwen3 | Arch::Gemma3),
        post_norms: gemma,
        tied: gguf.tensor("output.weight").is_none(),
        layer_kinds,
        ropes,
    }
    .validate(file)
}

fn refuse_unsupported(keys: &Keys<'_>) -> Result<(), LoadError> {
    if keys.opt_size("expert_count")?.is_some_and(|n| n > 0) {
        let hint = "only dense models are supported, name one without experts";
        return Err(keys.unsupported("a mixture of experts".into(), hint));
    }
    if keys.gguf.u64("split.count").is_some_and(|n| n > 1) {
        let hint = "join the parts first (llama.cpp's `gguf-split --merge` does that)";
        return Err(keys.unsupported("a GGUF file split into parts".into(), hint));
    }
    Ok(())
}

/// Rows of the embedding matrix. The tokenizer's table may be shorter (padding), never longer.
fn vocab(keys: &Keys<'_>) -> Result<usize, LoadError> {
    let missing = || LoadError::Missing {
        file: keys.file.to_owned(),
        tensor: "token_embd.weight".into(),
    };
    let embd = keys.gguf.tensor("token_embd.weight").ok_or_else(missing)?;
    let rows = embd.dims().get(1).copied().unwrap_or(1) as usize;
    match keys.gguf.array("tokenizer.ggml.tokens") {
        Some(tokens) if tokens.len() > rows => {
            let what = format!(
                "has {} entries, `token_embd.weight` has {rows} rows",
                tokens.len()
            );
            Err(LoadError::Key {
                file: keys.file.to_owned(),
                key: "tokenizer.ggml.tokens".into(),
                what,
            })
        }
        _ => Ok(rows),
    }
}

/// Rotary embeddings and layer kinds. Bounded by `layers`, which is compared with the file before it sizes anything.
fn positions(
    keys: &Keys<'_>,
    layers: usize,
    head_dim: usize,
) -> Result<(Vec<RopeSpec>, Vec<LayerKind>), LoadError> {
    if layers > 1024 {
        return Err(keys.error(
            "block_count",
            format!("is {layers}, it has to be between 1 and 1024"),
        ));
    }
    let global = RopeSpec {
        base: keys.opt_f32("rope.freq_base")?.unwrap_or(10_000.0),
        dims: keys.opt_size("rope.dimension_count")?.unwrap_or(head_dim),
        style: if keys.arch == Arch::Llama {
            RopeStyle::Interleaved
        } else {
            RopeStyle::Neox
        },
        scaling: scaling(keys)?,
    };
    let window = match keys.arch {
        Arch::Llama | Arch::Gemma3 => keys.opt_size("attention.sliding_window")?.filter(|&w| w != 0),
        // Files of these may carry the number although the models do not use it (`use_sliding_window: false`).
        Arch::Qwen2 | Arch::Qwen3 => None,
    };
    let window = window.map(|w| u32::try_from(w).unwrap_or(u32::MAX));
    if keys.arch != Arch::Gemma3 || window.is_none() {
        return Ok((vec![global], vec![LayerKind { rope: 0, window }; layers]));
    }
    // Published files have neither key: five local layers, then a global one; local base 10,000 and no scaling.
    let local = RopeSpec {
        base: keys.opt_f32("rope.freq_base_swa")?.unwrap_or(10_000.0),
        scaling: RopeScaling::None,
        ..global.clone()
    };
    let is_local = local_layers(keys, layers)?;
    let kinds = is_local
        .into_iter()
        .map(|local| {
            if local {
                LayerKind { rope: 1, window }
            } else {
                LayerKind {
                    rope: 0,
                    window: None,
                }
            }
        })
        .collect();
    Ok((vec![global, local], kinds))
}

/// Which layers have a window: every `n`th does not, or as an array says.
fn local_layers(keys: &Keys<'_>, layers: usize) -> Result<Vec<bool>, LoadError> {
    let key = "attention.sliding_window_pattern";
    match keys.get(key) {
        None => Ok((0..layers).map(|layer| layer % 6 < 5).collect()),
        Some(Value::Array(array)) => {
            let flags: Option<Vec<bool>> = array
                .iter()
                .take(layers)
                .map(|v| v.as_bool().or(v.as_u64().map(|v| v != 0)))
                .collect();
            flags
                .filter(|flags| flags.len() == layers && array.len() == layers)
                .ok_or_else(|| keys.error(key, format!("has to be {layers} truth values")))
        }
        Some(value) => match value.as_u64() {
            Some(0) => Ok(vec![true; layers]),
            Some(n) => Ok((0..layers as u64).map(|layer| layer % n < n - 1).collect()),
            None => Err(keys.error(key, format!("is {value:?}, not a number"))),
        },
    }
}

fn scaling(keys: &Keys<'_>) -> Result<RopeScaling, LoadError> {
    if let Some(tensor) = keys.gguf.tensor("rope_freqs.weight") {
        // 0 is f32; more than 256 pairs cannot be, heads have at most 512 elements.
        if tensor.ggml_type != 0 || tensor.dims().len() != 1 || tensor.bytes.len() > 256 * 4 {
            return Err(LoadError::Type {
                file: keys.file.to_owned(),
                tensor: tensor.name.to_owned(),
                got: format!("{} with dimensions {:?}", tensor.ggml_type, tensor.dims()),
                supported: "f32, one per pair of a head",
            });
        }
        let factors = tensor
            .bytes
            .chunks_exact(4)
            .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        return Ok(RopeScaling::Factors(factors.collect()));
    }
    let factor = match keys.opt_f32("rope.scaling.factor")? {
        None => keys.opt_f32("rope.scale_linear")?,
        some => some,
    };
    // Without a type a factor means linear scaling; 0 and 1 both mean none.
    match keys
        .get("rope.scaling.type")
        .map(|v| v.as_str().unwrap_or("?").to_owned())
        .as_deref()
    {
        Some("none") => Ok(RopeScaling::None),
        None | Some("linear") => Ok(match factor {
            None | Some(0.0 | 1.0) => RopeScaling::None,
            Some(factor) => RopeScaling::Linear(factor),
        }),
        Some(other) => {
            let feature = format!("RoPE scaling `{}`", shown(other));
            Err(keys.unsupported(feature, "supported are none, linear and Llama 3's"))
        }
    }
}
