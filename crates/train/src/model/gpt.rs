//! Small models from nothing: GPT-like blocks with any way of mixing a sequence.

use std::sync::Arc;

use antefix_kernels::grad::Act;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::decoder::Batch;
use super::params::{Init, Params};
use super::recompute::{Recompute, recomputed};
use crate::error::TrainError;
use crate::ops::{self, Attention};

/// Standard deviation of fresh matrices where nothing is said (GPT-2).
pub const INITIALIZER_RANGE: f64 = 0.02;

/// Standard deviation of fresh matrices that write to the residual stream: smaller by the number of them (GPT-2).
pub(super) fn residual_range(range: f64, layers: usize) -> f64 {
    range / (2.0 * layers as f64).sqrt()
}

/// What a recipe says of a small model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawGpt {
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub d: usize,
    /// `Hq`; the head dimension is `d / heads`.
    pub heads: usize,
    /// `Hk`
    pub kv_heads: usize,
    /// Width of the feed-forward part.
    pub ffn: usize,
    /// Tokens.
    pub vocab: usize,
    /// Longest sequence: positions are learned.
    pub context: usize,
    /// Standard deviation of fresh matrices; those that write to the residual stream have it over `sqrt(2 layers)`. Narrow models learn to look
    /// things up sooner with about `1 / sqrt(d)`.
    pub initializer_range: f64,
}

impl Default for RawGpt {
    fn default() -> Self {
        Self {
            layers: 4,
            d: 128,
            heads: 4,
            kv_heads: 4,
            ffn: 512,
            vocab: 256,
            context: 512,
            initializer_range: INITIALIZER_RANGE,
        }
    }
}

impl RawGpt {
    /// How many numbers such a model has, at least; saturating.
    pub fn parameters(&self) -> usize {
        let block = self.d.saturating_mul(
            self.d
                .saturating_mul(4)
                .saturating_add(self.ffn.saturating_mul(2)),
        );
        let tables = self.d.saturating_mul(self.vocab.saturating_add(self.context));
        block.saturating_mul(self.layers).saturating_add(tables)
    }

    fn check(&self) -> Result<(), TrainError> {
        let sizes = [
            ("layers", self.layers),
            ("d", self.d),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("ffn", self.ffn),
            ("vocab", self.vocab),
            ("context", self.context),
        ];
        for (name, size) in sizes {
            if !(1..=1 << 20).contains(&size) {
                return Err(TrainError::Recipe(format!(
                    "`model.{name}` is {size}; it is from 1 to {}",
                    1 << 20
                )));
            }
        }
        let range = self.initializer_range;
        if !(1e-6..=1.0).contains(&range) {
            return Err(TrainError::Recipe(format!(
                "`model.initializer_range` is {range}; it is from 0.000001 to 1"
            )));
        }
        if !self.d.is_multiple_of(self.heads) || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(TrainError::Recipe(format!(
                "`model.heads` is {}: it divides `d` ({}) and is a multiple of `kv_heads` ({})",
                self.heads, self.d, self.kv_heads
            )));
        }
        Ok(())
    }
}

/// A way for the rows of a sequence to read each other.
pub trait Mixer: Send + Sync {
    /// `[R, d]` out of normed rows `x: [R, d]`.
    ///
    /// # Errors
    /// Sizes that do not fit together.
    fn mix(&self, x: &Tensor, batch: &Batch) -> Result<Tensor, TrainError>;
}

/// Makes the mixer of a layer; parameters go under the given prefix.
pub type MakeMixer<'a> = dyn FnMut(usize, &str, &mut Params) -> Result<Box<dyn Mixer>, TrainError> + 'a;

/// Causal softmax attention with grouped heads.
pub struct SelfAttention {
    heads: usize,
    kv_heads: usize,
    qkv: [Tensor; 3],
    out: Tensor,
}

impl SelfAttention {
    /// # Errors
    /// When a name is taken.
    pub fn fresh(raw: &RawGpt, prefix: &str, params: &mut Params, seed: u64) -> Result<Self, TrainError> {
        let dim = raw.d / raw.heads;
        let mut make = |name: &str, rows: usize, cols: usize, deviation: f64| {
            params.fresh(
                &format!("{prefix}.{name}.weight"),
                &[rows, cols],
                Init::Normal(deviation),
                seed,
            )
        };
        let (range, residual) = (
            raw.initializer_range,
            residual_range(raw.initializer_range, raw.layers),
        );
        Ok(Self {
            heads: raw.heads,
            kv_heads: raw.kv_heads,
            qkv: [
                make("q_proj", raw.d, raw.d, range)?,
                make("k_proj", raw.kv_heads * dim, raw.d, range)?,
                make("v_proj", raw.kv_heads * dim, raw.d, range)?,
            ],
            out: make("o_proj", raw.d, raw.d, residual)?,
        })
    }
}

impl Mixer for SelfAttention {
    fn mix(&self, x: &Tensor, batch: &Batch) -> Result<Tensor, TrainError> {
        let [q, k, v] = [0, 1, 2].map(|i| ops::linear(x, &self.qkv[i], None));
        let q = q?;
        let dim = q.dim(1)? / self.heads;
        let attention = Attention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            scale: 1.0 / (dim as f64).sqrt(),
            window: None,
            angles: None,
            packing: batch.packing.clone(),
        };
        Ok(ops::linear(
            &ops::attend(attention, &q, &k?, &v?)?,
            &self.out,
            None,
        )?)
    }
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn fresh(name: &str, d: usize, params: &mut Params) -> Result<Self, TrainError> {
        Ok(Self {
            weight: params.fresh(&format!("{name}.weight"), &[d], Init::Constant(1.0), 0)?,
            bias: params.fresh(&format!("{name}.bias"), &[d], Init::Constant(0.0), 0)?,
        })
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        Ok(ops::layer_norm(x, &self.weight, &self.bias, 1e-5)?)
    }
}

struct Block {
    mixer_norm: Norm,
    mixer: Box<dyn Mixer>,
    ffn_norm: Norm,
    up: Tensor,
    down: Tensor,
}

impl Block {
    fn run(&self, x: &Tensor, batch: &Batch) -> Result<Tensor, TrainError> {
        let x = (x + self.mixer.mix(&self.mixer_norm.apply(x)?, batch)?)?;
        let h = self.ffn_norm.apply(&x)?;
        Ok((&x + ops::mlp(Act::GeluTanh, &h, &self.up, &self.down)?)?)
    }
}

/// A GPT-like model: learned positions, layer norms before each part, GELU, tied output.
pub struct Gpt {
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    blocks: Vec<Arc<Block>>,
    norm: Norm,
    recompute: Recompute,
}

impl Gpt {
    /// With causal softmax attention in every layer.
    ///
    /// # Errors
    /// [`TrainError::Recipe`] for sizes that do not go together.
    pub fn fresh(raw: &RawGpt, seed: u64) -> Result<Self, TrainError> {
        let mixer_of = raw.clone();
        Self::with_mixers(raw, seed, &mut |_, prefix, params| {
            Ok(Box::new(SelfAttention::fresh(&mixer_of, prefix, params, seed)?))
        })
    }

    /// With mixers of one's own.
    ///
    /// # Errors
    /// [`TrainError::Recipe`] for sizes that do not go together, and what `mixer` says.
    pub fn with_mixers(raw: &RawGpt, seed: u64, mixer: &mut MakeMixer<'_>) -> Result<Self, TrainError> {
        raw.check()?;
        let mut params = Params::default();
        let (range, residual) = (
            raw.initializer_range,
            residual_range(raw.initializer_range, raw.layers),
        );
        let tokens = params.fresh("wte.weight", &[raw.vocab, raw.d], Init::Normal(range), seed)?;
        let positions = params.fresh("wpe.weight", &[raw.context, raw.d], Init::Normal(range), seed)?;
        let mut blocks = Vec::new();
        for layer in 0..raw.layers {
            let name = |part: &str| format!("h.{layer}.{part}");
            blocks.push(Arc::new(Block {
                mixer_norm: Norm::fresh(&name("ln_1"), raw.d, &mut params)?,
                mixer: mixer(layer, &name("attn"), &mut params)?,
                ffn_norm: Norm::fresh(&name("ln_2"), raw.d, &mut params)?,
                up: params.fresh(
                    &name("mlp.c_fc.weight"),
                    &[raw.ffn, raw.d],
                    Init::Normal(range),
                    seed,
                )?,
                down: params.fresh(
                    &name("mlp.c_proj.weight"),
                    &[raw.d, raw.ffn],
                    Init::Normal(residual),
                    seed,
                )?,
            }));
        }
        let norm = Norm::fresh("ln_f", raw.d, &mut params)?;
        Ok(Self {
            params,
            tokens,
            positions,
            blocks,
            norm,
            recompute: Recompute::Nothing,
        })
    }

    /// The same model with another choice of what forward keeps.
    #[must_use]
    pub fn with_recompute(self, recompute: Recompute) -> Self {
        Self { recompute, ..self }
    }

    /// Its parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The output matrix, `[V, d]`.
    pub fn output(&self) -> &Tensor {
        &self.tokens
    }

    /// Rows behind the last norm, `[R, d]`.
    ///
    /// # Errors
    /// A token or a position that the model does not have.
    pub fn hidden(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        let places = Arc::new(batch.packing.positions().to_vec());
        let mut x =
            (ops::embed(&self.tokens, &batch.tokens, 1.0)? + ops::embed(&self.positions, &places, 1.0)?)?;
        for block in &self.blocks {
            x = match self.recompute {
                Recompute::Nothing => block.run(&x, batch)?,
                Recompute::Layers => {
                    let (block, batch) = (block.clone(), batch.clone());
                    recomputed(&x, self.params.aside(), move |x| block.run(x, &batch))?
                }
            };
        }
        self.norm.apply(&x)
    }
}
