//! What a method may know of the model that it is installed on.

use crate::hooks::HookShape;

/// Sizes and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// The model's name, as its file gives it; may be empty.
    pub name: String,
    /// Identity of the model: profiles carry it. Hexadecimal.
    pub id: String,
    /// Query heads `Hq`.
    pub heads: usize,
    /// Key/value heads `Hk`; divides `Hq`.
    pub kv_heads: usize,
    /// Head dimension `D`.
    pub dim: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Tokens of a sequence in the longest training.
    pub context: usize,
    /// Factor of `q . k`.
    pub scale: f32,
    /// Width of the feed-forward part.
    pub d_ff: usize,
    /// One per layer; `L` in all.
    pub layers: Vec<LayerFacts>,
}

/// What differs between layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerFacts {
    /// A query sees this many keys at most; `None`: all of them.
    pub window: Option<u32>,
    /// Base of its rotary embedding.
    pub rope_base: f32,
    /// Rotated dimensions of a head.
    pub rope_dims: usize,
}

impl Facts {
    /// The sizes that hooks are checked against.
    pub fn hook_shape(&self) -> HookShape {
        HookShape {
            layers: self.layers.len(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            dim: self.dim,
            d_model: self.d_model,
            d_ff: self.d_ff,
            vocab: self.vocab,
        }
    }

    /// Query heads that read one key/value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Layers whose queries see all keys, ascending.
    pub fn full_layers(&self) -> impl Iterator<Item = usize> {
        self.layers
            .iter()
            .enumerate()
            .filter(|(_, l)| l.window.is_none())
            .map(|(i, _)| i)
    }

    /// A small made-up model for tests: 4 layers, of which layer 1 has a window, 4 heads on 2.
    pub fn example() -> Self {
        let layer = |window| LayerFacts {
            window,
            rope_base: 10_000.0,
            rope_dims: 16,
        };
        Self {
            name: "example".into(),
            id: "0".repeat(32),
            heads: 4,
            kv_heads: 2,
            dim: 16,
            d_model: 64,
            vocab: 320,
            context: 4096,
            scale: 0.25,
            d_ff: 128,
            layers: vec![layer(None), layer(Some(512)), layer(None), layer(None)],
        }
    }
}
