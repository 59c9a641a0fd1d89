//! What a model is: one description for every architecture, filled from GGUF metadata or from `config.json`.
//!
//! The decoder reads this and nothing else; it never asks for the architecture's name. Having a [`ModelSpec`] from
//! [`crate::files::ModelFiles`] proves that the sizes fit together and that the file's tensors have the shapes it implies.

mod config;
mod from_gguf;

use std::path::Path;

pub(crate) use self::{
    config::{Present, from_config},
    from_gguf::from_gguf,
};
use crate::error::LoadError;

/// Names of the supported architectures, for error messages.
pub const SUPPORTED: &str = "llama (also Mistral), qwen2, qwen3, gemma3 (text)";

/// Family of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Llama 2 and 3, Mistral, `SmolLM2`, and what else calls itself `llama`.
    Llama,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
    /// Gemma 3, text part.
    Gemma3,
}

impl Arch {
    /// The name GGUF files use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
        }
    }

    pub(crate) fn from_gguf_name(name: &str) -> Option<Self> {
        [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma3]
            .into_iter()
            .find(|arch| arch.name() == name)
    }
}

/// The function between the two halves of the feed-forward part: `act(gate) * up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `x * sigmoid(x)`
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

/// Which elements of a head RoPE turns together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Element `i` with `i + dims / 2`.
    Neox,
    /// Element `2 i` with `2 i + 1`; GGUF files of `llama` models are permuted for this.
    Interleaved,
}

/// How RoPE frequencies are changed for contexts longer than those of the first training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// `base^(-2 i / dims)` as it is.
    None,
    /// All frequencies are divided by this.
    Linear(f32),
    /// Llama 3: low frequencies are divided by `factor`, high ones kept, those in between blended.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths above `original / low` are low frequencies.
        low: f32,
        /// Wavelengths below `original / high` are high frequencies.
        high: f32,
        /// Context of the first training, tokens.
        original: f32,
    },
    /// Frequency `i` is divided by `factors[i]`; `[dims / 2]`.
    Factors(Vec<f32>),
}

/// One rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub base: f32,
    /// How many elements of a head are turned, even, at most `head_dim`. They come first.
    pub dims: usize,
    /// Pairs.
    pub style: RopeStyle,
    /// Changes to the frequencies.
    pub scaling: RopeScaling,
}

impl RopeSpec {
    /// Angle per position of every pair, `[dims / 2]`, radians.
    pub fn frequencies(&self) -> Vec<f32> {
        let plain = |i: usize| f64::from(self.base).powf(-(2.0 * i as f64) / self.dims as f64);
        (0..self.dims / 2)
            .map(|i| {
                let freq = plain(i);
                let scaled = match &self.scaling {
                    RopeScaling::None => freq,
                    RopeScaling::Linear(factor) => freq / f64::from(*factor),
                    RopeScaling::Factors(factors) => freq / f64::from(factors[i]),
                    RopeScaling::Llama3 {
                        factor,
                        low,
                        high,
                        original,
                    } => {
                        let [factor, low, high, original] =
                            [factor, low, high, original].map(|&v| f64::from(v));
                        let turns = original * freq / std::f64::consts::TAU;
                        let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                        (1.0 - keep) * freq / factor + keep * freq
                    }
                };
                scaled as f32
            })
            .collect()
    }
}

/// What differs between layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerKind {
    /// Index into [`ModelSpec::ropes`].
    pub rope: usize,
    /// A query at position `p` sees keys `p - window + 1 ..= p`; `None`: all keys up to `p`.
    pub window: Option<u32>,
}

/// A decoder-only transformer with grouped-query attention and a gated feed-forward part.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts about a model, each with its own meaning"
)]
pub struct ModelSpec {
    /// Family.
    pub arch: Arch,
    /// Human-readable name, may be empty.
    pub name: String,
    /// `L`, number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the feed-forward part.
    pub d_ff: usize,
    /// `Hq`
    pub heads: usize,
    /// `Hk`, divides `Hq`.
    pub kv_heads: usize,
    /// `D`, a multiple of 16.
    pub head_dim: usize,
    /// Rows of the embedding and of the logits.
    pub vocab: usize,
    /// Longest context of the training, tokens.
    pub context: usize,
    /// Epsilon of all RMS norms.
    pub norm_eps: f32,
    /// Factor on token embeddings.
    pub embed_scale: f32,
    /// Factor on attention scores.
    pub attn_scale: f32,
    /// `cap * tanh(s / cap)` on scores.
    pub attn_softcap: Option<f32>,
    /// The same on logits.
    pub final_softcap: Option<f32>,
    /// Activation.
    pub act: Act,
    /// Biases on q, k and v?
    pub qkv_bias: bool,
    /// RMS norms on each head of q and k?
    pub qk_norm: bool,
    /// RMS norms after attention and after the feed-forward part, before the residual sum?
    pub post_norms: bool,
    /// Is the output matrix the token embedding?
    pub tied: bool,
    /// One per layer.
    pub layer_kinds: Vec<LayerKind>,
    /// The rotary embeddings layers refer to.
    pub ropes: Vec<RopeSpec>,
}

impl ModelSpec {
    /// Width of all query heads, `Hq * D`.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads, `Hk * D`.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Do these numbers make a model? Called before anything is sized by them.
    pub(crate) fn validate(self, file: &Path) -> Result<Self, LoadError> {
        let bad = |key: &str, what: String| {
            Err(LoadError::Key {
                file: file.to_owned(),
                key: key.into(),
                what,
            })
        };
        let sizes = [
            ("number of layers", self.layers, 1024),
            ("model width", self.d_model, 1 << 16),
            ("feed-forward width", self.d_ff, 1 << 20),
            ("number of heads", self.heads, 1024),
            ("number of key/value heads", self.kv_heads, 1024),
            ("head dimension", self.head_dim, 512),
            ("vocabulary size", self.vocab, 1 << 22),
            ("context length", self.context, 1 << 30),
        ];
        for (key, got, limit) in sizes {
            if got == 0 || got > limit {
                return bad(key, format!("is {got}, it has to be between 1 and {limit}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let what = format!(
                "({}) is not a multiple of the number of key/value heads ({})",
                self.heads, self.kv_heads
            );
            return bad("number of heads", what);
        }
        if !self.head_dim.is_multiple_of(16) {
            return bad(
                "head dimension",
                format!("is {}, it has to be a multiple of 16", self.head_dim),
            );
        }
        let positive = |v: f32| v.is_finite() && v > 0.0;
        if !(positive(self.norm_eps) && self.norm_eps < 1.0) {
            return bad(
                "norm epsilon",
                format!("is {}, it has to be between 0 and 1", self.norm_eps),
            );
        }
        let factors = [
            ("embedding scale", Some(self.embed_scale)),
            ("attention scale", Some(self.attn_scale)),
            ("attention softcap", self.attn_softcap),
            ("logit softcap", self.final_softcap),
        ];
        for (key, value) in factors {
            if let Some(v) = value.filter(|&v| !positive(v)) {
                return bad(key, format!("is {v}, it has to be positive"));
            }
        }
        for rope in &self.ropes {
            if rope.dims == 0 || rope.dims > self.head_dim || !rope.dims.is_multiple_of(2) {
                let what = format!(
                    "are {}, they have to be even and at most {}",
                    rope.dims, self.head_dim
                );
                return bad("RoPE dimensions", what);
            }
            if !(positive(rope.base) && rope.base >= 1.0) {
                return bad("RoPE base", format!("is {}, it has to be at least 1", rope.base));
            }
            // Far beyond what models use, and near enough that frequencies stay finite.
            let sane = |v: f32| (1e-3..=1e9).contains(&v);
            let fine = match &rope.scaling {
                RopeScaling::None => true,
                RopeScaling::Linear(factor) => sane(*factor),
                RopeScaling::Llama3 {
                    factor,
                    low,
                    high,
                    original,
                } => [factor, low, high, original].into_iter().all(|&v| sane(v)) && high > low,
                RopeScaling::Factors(f) => f.len() == rope.dims / 2 && f.iter().all(|&v| sane(v)),
            };
            if !fine {
                let what = format!(
                    "is {:?}, its numbers have to be between 1e-3 and 1e9 and fit the dimensions",
                    rope.scaling
                );
                return bad("RoPE scaling", what);
            }
        }
        for kind in &self.layer_kinds {
            if kind.window == Some(0) {
                return bad("sliding window", "is 0".into());
            }
        }
        // Both are filled by our own code from `layers` and a fixed list.
        assert_eq!(self.layer_kinds.len(), self.layers, "one kind per layer");
        assert!(
            self.layer_kinds.iter().all(|kind| kind.rope < self.ropes.len()),
            "kinds name existing ropes"
        );
        Ok(self)
    }
}
