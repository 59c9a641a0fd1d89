//! `config.json` of a safetensors folder to [`ModelSpec`].

use std::path::Path;

use serde_json::{Map, Value};

use super::{Act, Arch, LayerKind, ModelSpec, RopeScaling, RopeSpec, RopeStyle, SUPPORTED};
use crate::error::{LoadError, shown};

/// What only the tensors can tell.
pub(crate) struct Present {
    /// Is there an output matrix?
    pub(crate) lm_head: bool,
    /// Rows of the token embedding.
    pub(crate) vocab: usize,
}

/// Reads keys of a JSON object; `null` counts as missing.
#[derive(Clone, Copy)]
struct Keys<'a> {
    object: &'a Map<String, Value>,
    file: &'a Path,
}

impl<'a> Keys<'a> {
    fn error(&self, key: &str, what: impl Into<String>) -> LoadError {
        LoadError::Key {
            file: self.file.to_owned(),
            key: key.to_owned(),
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

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn object(&self, key: &str) -> Option<Keys<'a>> {
        let object = self.get(key)?.as_object()?;
        Some(Keys {
            object,
            file: self.file,
        })
    }

    fn str(&self, key: &str) -> Option<&'a str> {
        self.get(key)?.as_str()
    }

    fn flag(&self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    fn opt_size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok());
        size.map(Some)
            .ok_or_else(|| self.error(key, format!("is `{}`, not a size", short(value))))
    }

    /// A size that may be missing only where the architecture has a default.
    fn size(&self, key: &str, default: Option<usize>) -> Result<usize, LoadError> {
        self.opt_size(key)?
            .or(default)
            .ok_or_else(|| self.error(key, "is missing"))
    }

    fn opt_f32(&self, key: &str) -> Result<Option<f32>, LoadError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = value.as_f64().map(|v| v as f32);
        number
            .map(Some)
            .ok_or_else(|| self.error(key, format!("is `{}`, not a number", short(value))))
    }

    fn f32(&self, key: &str, default: f32) -> Result<f32, LoadError> {
        Ok(self.opt_f32(key)?.unwrap_or(default))
    }
}

fn short(value: &Value) -> String {
    shown(&value.to_string())
}

/// Describes the model of a `config.json`. `file` is for error messages.
pub(crate) fn from_config(config: &Value, present: &Present, file: &Path) -> Result<ModelSpec, LoadError> {
    let object = config.as_object().ok_or_else(|| LoadError::Json {
        file: file.to_owned(),
        what: "is not a JSON object".into(),
    })?;
    let top = Keys { object, file };
    // Models that also read images keep the language model's part in `text_config`.
    let keys = top.object("text_config").unwrap_or(top);
    let model_type = top
        .str("model_type")
        .ok_or_else(|| top.error("model_type", "is missing"))?;
    let arch = match model_type {
        "llama" | "mistral" => Arch::Llama,
        "qwen2" => Arch::Qwen2,
        "qwen3" => Arch::Qwen3,
        "gemma3" | "gemma3_text" => Arch::Gemma3,
        other => {
            let arch = shown(other);
            return Err(LoadError::Arch {
                file: file.to_owned(),
                arch,
                supported: SUPPORTED,
            });
        }
    };
    let gemma = arch == Arch::Gemma3;
    refuse_unsupported(top, keys, arch)?;

    // The text part of multimodal Gemma files leaves out what equals the defaults of its class.
    let default = |value: usize| gemma.then_some(value);
    let layers = keys.size("num_hidden_layers", default(26))?;
    let d_model = keys.size("hidden_size", default(2304))?;
    let heads = keys.size("num_attention_heads", default(8))?;
    let head_dim = match (keys.opt_size("head_dim")?, arch) {
        (Some(dim), _) => dim,
        (None, Arch::Gemma3) => 256,
        (None, Arch::Qwen3) => 128,
        (None, _) if heads != 0 && d_model.is_multiple_of(heads) => d_model / heads,
        (None, _) => {
            return Err(keys.error("head_dim", "is missing, and heads do not divide the model width"));
        }
    };
    if let Some(vocab) = keys
        .opt_size("vocab_size")?
        .filter(|&vocab| vocab > present.vocab)
    {
        let what = format!("is {vocab}, the token embedding has {} rows", present.vocab);
        return Err(keys.error("vocab_size", what));
    }
    let query_scale = if gemma {
        keys.f32("query_pre_attn_scalar", 256.0)?
    } else {
        head_dim as f32
    };
    let (ropes, layer_kinds) = positions(keys, arch, model_type, layers, head_dim)?;
    ModelSpec {
        arch,
        name: top
            .str("_name_or_path")
            .unwrap_or_default()
            .chars()
            .take(200)
            .collect(),
        layers,
        d_model,
        d_ff: keys.size("intermediate_size", default(9216))?,
        heads,
        kv_heads: keys.size("num_key_value_heads", default(4).or(Some(heads)))?,
        head_dim,
        vocab: present.vocab,
        context: keys.size("max_position_embeddings", default(131_072))?,
        norm_eps: keys.f32("rms_norm_eps", 1e-6)?,
        embed_scale: if gemma { (d_model as f32).sqrt() } else { 1.0 },
        attn_scale: query_scale.sqrt().recip(),
        attn_softcap: keys.opt_f32("attn_logit_softcapping")?,
        final_softcap: keys.opt_f32("final_logit_softcapping")?,
        act: if gemma { Act::GeluTanh } else { Act::Silu },
        qkv_bias: arch == Arch::Qwen2,
        qk_norm: matches!(arch, Arch::Qwen3 | Arch::Gemma3),
        post_norms: gemma,
        tied: !present.lm_head || keys.flag("tie_word_embeddings") || top.flag("tie_word_embeddings"),
        layer_kinds,
        ropes,
    }
    .validate(file)
}

fn refuse_unsupported(top: Keys<'_>, keys: Keys<'_>, arch: Arch) -> Result<(), LoadError> {
    if let Some(quantization) = top.object("quantization_config") {
        let method = quantization.str("quant_method").unwrap_or("unknown");
        let hint = "name the unquantised model (bf16, f16 or f32), or a `.gguf` file";
        return Err(top.unsupported(format!("quantisation `{}`", shown(method)), hint));
    }
    if ["num_experts", "num_local_experts"]
        .into_iter()
        .any(|key| keys.get(key).is_some())
    {
        return Err(keys.unsupported("a mixture of experts".into(), "only dense models are supported"));
    }
    for key in ["attention_bias", "mlp_bias", "use_bidirectional_attention"] {
        if keys.flag(key) {
            return Err(keys.unsupported(format!("`{key}: true`"), "no supported architecture has this"));
        }
    }
    let want: &[&str] = if arch == Arch::Gemma3 {
        &["gelu_pytorch_tanh"]
    } else {
        &["silu", "swish"]
    };
    let act = keys
        .str("hidden_activation")
        .or(keys.str("hidden_act"))
        .unwrap_or(want[0]);
    if !want.contains(&act) {
        let feature = format!("activation `{}`", shown(act));
        return Err(keys.unsupported(
            feature,
            "supported are silu, and gelu_pytorch_tanh in Gemma models",
        ));
    }
    Ok(())
}

fn positions(
    keys: Keys<'_>,
    arch: Arch,
    model_type: &str,
    layers: usize,
    head_dim: usize,
) -> Result<(Vec<RopeSpec>, Vec<LayerKind>), LoadError> {
    if layers > 1024 {
        return Err(keys.error(
            "num_hidden_layers",
            format!("is {layers}, it has to be between 1 and 1024"),
        ));
    }
    let gemma = arch == Arch::Gemma3;
    // Newer files have one `rope_parameters`, Gemma's with one entry per kind of layer; older ones `rope_scaling`.
    let parameters = keys.object("rope_parameters");
    let of_kind = |kind: &str| parameters.and_then(|p| p.object(kind).or((!gemma).then_some(p)));
    let full = of_kind("full_attention").or(parameters.filter(|p| p.get("rope_theta").is_some()));
    let theta = match full.map(|p| p.opt_f32("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => keys.f32("rope_theta", if gemma { 1e6 } else { 1e4 })?,
    };
    let turned = keys.f32("partial_rotary_factor", 1.0)?;
    let global = RopeSpec {
        base: theta,
        dims: (head_dim as f32 * turned) as usize,
        style: RopeStyle::Neox,
        scaling: full
            .or(keys.object("rope_scaling"))
            .map_or(Ok(RopeScaling::None), scaling)?,
    };

    let windowed = match arch {
        Arch::Llama => model_type == "mistral",
        Arch::Qwen2 | Arch::Qwen3 => keys.flag("use_sliding_window"),
        Arch::Gemma3 => true,
    };
    let window = keys
        .opt_size("sliding_window")?
        .filter(|_| windowed)
        .or(gemma.then_some(4096));
    let Some(window) = window.map(|w| u32::try_from(w).unwrap_or(u32::MAX)) else {
        return Ok((
            vec![global],
            vec![
                LayerKind {
                    rope: 0,
                    window: None
                };
                layers
            ],
        ));
    };
    let local_rope = usize::from(gemma);
    let kinds = local_layers(keys, arch, layers)?
        .into_iter()
        .map(|local| {
            let (rope, window) = if local {
                (local_rope, Some(window))
            } else {
                (0, None)
            };
            LayerKind { rope, window }
        })
        .collect();
    let mut ropes = vec![global];
    if gemma {
        let sliding = parameters.and_then(|p| p.object("sliding_attention"));
        let base = match sliding.map(|p| p.opt_f32("rope_theta")).transpose()?.flatten() {
            Some(base) => base,
            None => keys.f32("rope_local_base_freq", 1e4)?,
        };
        let scaling = sliding.map_or(Ok(RopeScaling::None), scaling)?;
        ropes.push(RopeSpec {
            base,
            scaling,
            ..ropes[0].clone()
        });
    }
    Ok((ropes, kinds))
}

/// Which layers have a window.
fn local_layers(keys: Keys<'_>, arch: Arch, layers: usize) -> Result<Vec<bool>, LoadError> {
    if let Some(types) = keys.get("layer_types") {
        let wrong = || keys.error("layer_types", format!("has to name {layers} layers"));
        let types = types
            .as_array()
            .filter(|types| types.len() == layers)
            .ok_or_else(wrong)?;
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => {
                    let feature = format!("layer type `{}`", short(kind));
                    Err(keys.unsupported(feature, "supported are full_attention and sliding_attention"))
                }
            })
            .collect();
    }
    Ok(match arch {
        Arch::Llama => vec![true; layers],
        Arch::Qwen2 | Arch::Qwen3 => {
            let first = keys.size("max_window_layers", Some(28))?;
            (0..layers).map(|layer| layer >= first).collect()
        }
        Arch::Gemma3 => {
            let every = keys.size("sliding_window_pattern", Some(6))?;
            if every == 0 {
                return Err(keys.error("sliding_window_pattern", "is 0"));
            }
            (0..layers).map(|layer| (layer + 1) % every != 0).collect()
        }
    })
}

fn scaling(keys: Keys<'_>) -> Result<RopeScaling, LoadError> {
    let factor = || {
        keys.opt_f32("factor")?
            .ok_or_else(|| keys.error("factor", "is missing"))
    };
    match keys.str("rope_type").or(keys.str("type")) {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear(factor()?)),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: factor()?,
            low: keys.f32("low_freq_factor", 1.0)?,
            high: keys.f32("high_freq_factor", 4.0)?,
            original: keys.f32("original_max_position_embeddings", 8192.0)?,
        }),
        Some(other) => {
            let feature = format!("RoPE scaling `{}`", shown(other));
            Err(keys.unsupported(feature, "supported are default, linear and llama3"))
        }
    }
}
