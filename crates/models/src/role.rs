//! What tensors are for, which shapes they have in a model, and what files call them.

use crate::spec::{Arch, ModelSpec};

/// What a tensor is for. Numbers are layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Token embedding, `[vocab, d_model]`
    TokenEmbd,
    /// Weights of the last norm, `[1, d_model]`
    OutputNorm,
    /// Output matrix, `[vocab, d_model]`; none if tied
    Output,
    /// Weights of the norm before attention, `[1, d_model]`
    AttnNorm(usize),
    /// `[Hq D, d_model]`
    AttnQ(usize),
    /// `[Hk D, d_model]`
    AttnK(usize),
    /// `[Hk D, d_model]`
    AttnV(usize),
    /// `[1, Hq D]`; Qwen 2
    AttnQBias(usize),
    /// `[1, Hk D]`; Qwen 2
    AttnKBias(usize),
    /// `[1, Hk D]`; Qwen 2
    AttnVBias(usize),
    /// `[d_model, Hq D]`
    AttnOut(usize),
    /// Weights of the norm on query heads, `[1, D]`; Qwen 3, Gemma 3
    AttnQNorm(usize),
    /// Weights of the norm on key heads, `[1, D]`; Qwen 3, Gemma 3
    AttnKNorm(usize),
    /// Weights of the norm after attention, `[1, d_model]`; Gemma 3
    AttnPostNorm(usize),
    /// Weights of the norm before the feed-forward part, `[1, d_model]`
    FfnNorm(usize),
    /// `[d_ff, d_model]`
    FfnGate(usize),
    /// `[d_ff, d_model]`
    FfnUp(usize),
    /// `[d_model, d_ff]`
    FfnDown(usize),
    /// Weights of the norm after the feed-forward part, `[1, d_model]`; Gemma 3
    FfnPostNorm(usize),
}

impl Role {
    /// All roles of a model with `layers` layers, in the order a forward pass meets them.
    pub fn all(layers: usize) -> impl Iterator<Item = Self> {
        let layer = |l| {
            [
                Self::AttnNorm(l),
                Self::AttnQ(l),
                Self::AttnK(l),
                Self::AttnV(l),
                Self::AttnQBias(l),
                Self::AttnKBias(l),
                Self::AttnVBias(l),
                Self::AttnQNorm(l),
                Self::AttnKNorm(l),
                Self::AttnOut(l),
                Self::AttnPostNorm(l),
                Self::FfnNorm(l),
                Self::FfnGate(l),
                Self::FfnUp(l),
                Self::FfnDown(l),
                Self::FfnPostNorm(l),
            ]
        };
        std::iter::once(Self::TokenEmbd)
            .chain((0..layers).flat_map(layer))
            .chain([Self::OutputNorm, Self::Output])
    }

    /// `[rows, cols]` in a model, `None` if the model has no such tensor.
    pub fn shape(self, spec: &ModelSpec) -> Option<[usize; 2]> {
        let (d, q, kv) = (spec.d_model, spec.q_dim(), spec.kv_dim());
        let when = |there: bool, shape: [usize; 2]| there.then_some(shape);
        match self {
            Self::TokenEmbd => Some([spec.vocab, d]),
            Self::Output => when(!spec.tied, [spec.vocab, d]),
            Self::OutputNorm | Self::AttnNorm(_) | Self::FfnNorm(_) => Some([1, d]),
            Self::AttnQ(_) => Some([q, d]),
            Self::AttnK(_) | Self::AttnV(_) => Some([kv, d]),
            Self::AttnQBias(_) => when(spec.qkv_bias, [1, q]),
            Self::AttnKBias(_) | Self::AttnVBias(_) => when(spec.qkv_bias, [1, kv]),
            Self::AttnOut(_) => Some([d, q]),
            Self::AttnQNorm(_) | Self::AttnKNorm(_) => when(spec.qk_norm, [1, spec.head_dim]),
            Self::AttnPostNorm(_) | Self::FfnPostNorm(_) => when(spec.post_norms, [1, d]),
            Self::FfnGate(_) | Self::FfnUp(_) => Some([spec.d_ff, d]),
            Self::FfnDown(_) => Some([d, spec.d_ff]),
        }
    }

    /// The tensor's name in GGUF files.
    pub fn gguf_name(self) -> String {
        let (layer, suffix) = match self {
            Self::TokenEmbd => return "token_embd.weight".into(),
            Self::OutputNorm => return "output_norm.weight".into(),
            Self::Output => return "output.weight".into(),
            Self::AttnNorm(l) => (l, "attn_norm.weight"),
            Self::AttnQ(l) => (l, "attn_q.weight"),
            Self::AttnK(l) => (l, "attn_k.weight"),
            Self::AttnV(l) => (l, "attn_v.weight"),
            Self::AttnQBias(l) => (l, "attn_q.bias"),
            Self::AttnKBias(l) => (l, "attn_k.bias"),
            Self::AttnVBias(l) => (l, "attn_v.bias"),
            Self::AttnOut(l) => (l, "attn_output.weight"),
            Self::AttnQNorm(l) => (l, "attn_q_norm.weight"),
            Self::AttnKNorm(l) => (l, "attn_k_norm.weight"),
            Self::AttnPostNorm(l) => (l, "post_attention_norm.weight"),
            Self::FfnNorm(l) => (l, "ffn_norm.weight"),
            Self::FfnGate(l) => (l, "ffn_gate.weight"),
            Self::FfnUp(l) => (l, "ffn_up.weight"),
            Self::FfnDown(l) => (l, "ffn_down.weight"),
            Self::FfnPostNorm(l) => (l, "post_ffw_norm.weight"),
        };
        format!("blk.{layer}.{suffix}")
    }

    /// The tensor's name in safetensors folders. `prefix` ends in `model.` in one way or another.
    pub fn folder_name(self, arch: Arch, prefix: &str) -> String {
        // Llama's norm "after attention" is the one before the feed-forward part; Gemma has both and names them apart.
        let ffn_norm = if arch == Arch::Gemma3 {
            "pre_feedforward_layernorm"
        } else {
            "post_attention_layernorm"
        };
        let (layer, name, kind) = match self {
            Self::TokenEmbd => return format!("{prefix}embed_tokens.weight"),
            Self::OutputNorm => return format!("{prefix}norm.weight"),
            Self::Output if prefix.starts_with("language_model.") => {
                return "language_model.lm_head.weight".into();
            }
            Self::Output => return "lm_head.weight".into(),
            Self::AttnNorm(l) => (l, "input_layernorm", "weight"),
            Self::AttnQ(l) => (l, "self_attn.q_proj", "weight"),
            Self::AttnK(l) => (l, "self_attn.k_proj", "weight"),
            Self::AttnV(l) => (l, "self_attn.v_proj", "weight"),
            Self::AttnQBias(l) => (l, "self_attn.q_proj", "bias"),
            Self::AttnKBias(l) => (l, "self_attn.k_proj", "bias"),
            Self::AttnVBias(l) => (l, "self_attn.v_proj", "bias"),
            Self::AttnOut(l) => (l, "self_attn.o_proj", "weight"),
            Self::AttnQNorm(l) => (l, "self_attn.q_norm", "weight"),
            Self::AttnKNorm(l) => (l, "self_attn.k_norm", "weight"),
            Self::AttnPostNorm(l) => (l, "post_attention_layernorm", "weight"),
            Self::FfnNorm(l) => (l, ffn_norm, "weight"),
            Self::FfnGate(l) => (l, "mlp.gate_proj", "weight"),
            Self::FfnUp(l) => (l, "mlp.up_proj", "weight"),
            Self::FfnDown(l) => (l, "mlp.down_proj", "weight"),
            Self::FfnPostNorm(l) => (l, "post_feedforward_layernorm", "weight"),
        };
        format!("{prefix}layers.{layer}.{name}.{kind}")
    }

    /// The layer of a tensor whose rows a rotation turns: q, k and their biases.
    pub fn turned_layer(self) -> Option<usize> {
        match self {
            Self::AttnQ(l) | Self::AttnK(l) | Self::AttnQBias(l) | Self::AttnKBias(l) => Some(l),
            _ => None,
        }
    }

    /// Is it the weight of a norm?
    pub fn is_norm(self) -> bool {
        use Role::{AttnKNorm, AttnNorm, AttnPostNorm, AttnQNorm, FfnNorm, FfnPostNorm, OutputNorm};
        matches!(
            self,
            OutputNorm
                | AttnNorm(_)
                | AttnQNorm(_)
                | AttnKNorm(_)
                | AttnPostNorm(_)
                | FfnNorm(_)
                | FfnPostNorm(_)
        )
    }
}
