//! The decoder families of `antefix-models` as trainable models, out of the same description.
//!
//! Parameters bear Hugging Face's names and layout: rows of q and k that GGUF files of Llama models interleave are put back at loading, so that
//! pairs of a rotation are always `(i, i + n)`.

use std::sync::Arc;

use antefix_kernels::quant;
use antefix_models::files::{ModelFiles, Role};
use antefix_models::spec::{ModelSpec, RopeStyle};
use candle_core::{Device, Tensor};

use super::gpt::residual_range;
use super::layer::{Layer, Projection, Weights};
use super::lora::{Lora, LoraSpec};
use super::params::{Init, Params};
use super::recompute::{Recompute, recomputed};
use crate::error::TrainError;
use crate::ops::{self, Angles, Attention, Packing};

/// What of a model is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Train {
    /// Every parameter.
    All,
    /// Nothing: for log-probabilities of a reference.
    Nothing,
    /// Low-rank parts beside frozen weights.
    Lora(LoraSpec),
}

/// Tokens of a packed batch, one a row.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[R]`
    pub tokens: Arc<Vec<u32>>,
    /// Who attends whom, `R` rows.
    pub packing: Arc<Packing>,
}

/// A decoder-only transformer that can be trained.
#[derive(Debug)]
pub struct Decoder {
    spec: Arc<ModelSpec>,
    params: Params,
    embedding: Tensor,
    layers: Vec<Arc<Weights>>,
    norm: Tensor,
    output: Tensor,
    recompute: Recompute,
}

/// Where parameters come from.
enum Source<'a> {
    Files(&'a ModelFiles),
    /// Fresh, by seed and standard deviation.
    Seed(u64, f64),
}

struct Builder<'a> {
    spec: &'a ModelSpec,
    source: Source<'a>,
    train: &'a Train,
    seed: u64,
    params: Params,
}

/// Rows of halves in the order of interleaved pairs: undoes [`halves`].
fn interleaved(values: &mut [f32], head_dim: usize, dims: usize, cols: usize) {
    let n = dims / 2;
    let mut turned = vec![0.0; dims * cols];
    for head in values.chunks_exact_mut(head_dim * cols) {
        for i in 0..n {
            for j in 0..2 {
                turned[(2 * i + j) * cols..][..cols].copy_from_slice(&head[(j * n + i) * cols..][..cols]);
            }
        }
        head[..dims * cols].copy_from_slice(&turned);
    }
}

/// Undoes the row order of interleaved pairs: row `2 i + j` of a head becomes row `j n + i`, for the `2 n` rows that are turned.
fn halves(values: &mut [f32], head_dim: usize, dims: usize, cols: usize) {
    let n = dims / 2;
    let mut turned = vec![0.0; dims * cols];
    for head in values.chunks_exact_mut(head_dim * cols) {
        for i in 0..n {
            for j in 0..2 {
                turned[(j * n + i) * cols..][..cols].copy_from_slice(&head[(2 * i + j) * cols..][..cols]);
            }
        }
        head[..dims * cols].copy_from_slice(&turned);
    }
}

impl Builder<'_> {
    fn name(&self, role: Role) -> String {
        role.folder_name(self.spec.arch, "model.")
    }

    /// Reads a parameter, or makes it; `None` if this model has none of the role.
    fn optional(&mut self, role: Role) -> Result<Option<Tensor>, TrainError> {
        let Some([rows, cols]) = role.shape(self.spec) else {
            return Ok(None);
        };
        let dims: &[usize] = if rows == 1 { &[cols] } else { &[rows, cols] };
        let name = self.name(role);
        let value = match self.source {
            Source::Seed(seed, range) => {
                let init = match role {
                    _ if role.is_norm() => Init::Constant(1.0),
                    Role::AttnQBias(_) | Role::AttnKBias(_) | Role::AttnVBias(_) => Init::Constant(0.0),
                    Role::AttnOut(_) | Role::FfnDown(_) => {
                        Init::Normal(residual_range(range, self.spec.layers))
                    }
                    _ => Init::Normal(range),
                };
                return self.params.fresh(&name, dims, init, seed).map(Some);
            }
            Source::Files(files) => {
                let Some(tensor) = files.tensor(role)? else {
                    return Ok(None);
                };
                let mut values = vec![0.0f32; rows * cols];
                quant::dequantise(tensor.format, &tensor.bytes, &mut values)
                    .map_err(|e| TrainError::Unsupported(format!("tensor `{name}`: {e}")))?;
                if let Some(layer) = role.turned_layer() {
                    let rope = &self.spec.ropes[self.spec.layer_kinds[layer].rope];
                    if rope.style == RopeStyle::Interleaved {
                        halves(
                            &mut values,
                            self.spec.head_dim,
                            rope.dims,
                            cols * rows / self.turned_rows(role),
                        );
                    }
                }
                Tensor::from_vec(values, dims, &Device::Cpu)?
            }
        };
        let made = match self.train {
            Train::All => self.params.trained(&name, value)?,
            Train::Nothing | Train::Lora(_) => self.params.frozen(&name, &value)?,
        };
        Ok(Some(made))
    }

    /// Rows of q or k that a rotation turns: a bias has one element for each.
    fn turned_rows(&self, role: Role) -> usize {
        match role {
            Role::AttnQ(_) | Role::AttnQBias(_) => self.spec.q_dim(),
            _ => self.spec.kv_dim(),
        }
    }

    fn need(&mut self, role: Role) -> Result<Tensor, TrainError> {
        let name = self.name(role);
        self.optional(role)?
            .ok_or_else(|| TrainError::Unsupported(format!("tensor `{name}` is missing")))
    }

    fn projection(&mut self, role: Role, bias: Option<Role>) -> Result<Projection, TrainError> {
        let weight = self.need(role)?;
        let lora = match self.train {
            Train::Lora(spec) => {
                let name = self.name(role);
                spec.beside(&name, &weight, &mut self.params, self.seed)?
            }
            Train::All | Train::Nothing => None,
        };
        Ok(Projection {
            weight,
            bias: bias.map(|b| self.optional(b)).transpose()?.flatten(),
            lora,
        })
    }

    fn layer(&mut self, l: usize) -> Result<Weights, TrainError> {
        let qk_norm = match (
            self.optional(Role::AttnQNorm(l))?,
            self.optional(Role::AttnKNorm(l))?,
        ) {
            (Some(q), Some(k)) => Some([q, k]),
            _ => None,
        };
        Ok(Weights {
            attn_norm: self.need(Role::AttnNorm(l))?,
            qkv: [
                self.projection(Role::AttnQ(l), Some(Role::AttnQBias(l)))?,
                self.projection(Role::AttnK(l), Some(Role::AttnKBias(l)))?,
                self.projection(Role::AttnV(l), Some(Role::AttnVBias(l)))?,
            ],
            qk_norm,
            out: self.projection(Role::AttnOut(l), None)?,
            attn_post_norm: self.optional(Role::AttnPostNorm(l))?,
            ffn_norm: self.need(Role::FfnNorm(l))?,
            gate: self.projection(Role::FfnGate(l), None)?,
            up: self.projection(Role::FfnUp(l), None)?,
            down: self.projection(Role::FfnDown(l), None)?,
            ffn_post_norm: self.optional(Role::FfnPostNorm(l))?,
        })
    }

    fn build(mut self) -> Result<Decoder, TrainError> {
        if self.spec.attn_softcap.is_some() || self.spec.final_softcap.is_some() {
            return Err(TrainError::Unsupported("its scores or logits are capped".into()));
        }
        let embedding = self.need(Role::TokenEmbd)?;
        let layers = (0..self.spec.layers)
            .map(|l| self.layer(l).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let norm = self.need(Role::OutputNorm)?;
        let output = match self.spec.tied {
            true => embedding.clone(),
            false => self.need(Role::Output)?,
        };
        if let Train::Lora(spec) = self.train {
            spec.check(&self.params)?;
        }
        let mut spec = self.spec.clone();
        for rope in &mut spec.ropes {
            rope.style = RopeStyle::Neox;
        }
        Ok(Decoder {
            spec: Arc::new(spec),
            recompute: Recompute::Nothing,
            params: self.params,
            embedding,
            layers,
            norm,
            output,
        })
    }
}

impl Decoder {
    /// A model out of a file, dequantised to f32. `seed` is for fresh low-rank parts.
    ///
    /// # Errors
    /// [`TrainError`] when a tensor is missing or the model has a part that cannot be trained.
    pub fn load(files: &ModelFiles, train: &Train, seed: u64) -> Result<Self, TrainError> {
        Builder {
            spec: files.spec(),
            source: Source::Files(files),
            train,
            seed,
            params: Params::default(),
        }
        .build()
    }

    /// A model from nothing, all of it trained. Matrices have the standard deviation `range`, those that write to the residual stream
    /// `range / sqrt(2 layers)`.
    ///
    /// # Errors
    /// [`TrainError`] when the description has a part that cannot be trained.
    pub fn fresh(spec: &ModelSpec, range: f64, seed: u64) -> Result<Self, TrainError> {
        Builder {
            spec,
            source: Source::Seed(seed, range),
            train: &Train::All,
            seed,
            params: Params::default(),
        }
        .build()
    }

    /// The same model with another choice of what forward keeps.
    #[must_use]
    pub fn with_recompute(self, recompute: Recompute) -> Self {
        Self { recompute, ..self }
    }

    /// What the model is; rotations are of halves.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The output matrix, `[V, d]`.
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// Rows behind the last norm, `[R, d]`: what the output matrix reads.
    ///
    /// # Errors
    /// A token that the model does not know, or as many tokens as the packing has rows.
    pub fn hidden(&self, batch: &Batch) -> Result<Tensor, TrainError> {
        let angles: Vec<Arc<Angles>> = self
            .spec
            .ropes
            .iter()
            .map(|rope| Arc::new(Angles::new(&rope.frequencies(), batch.packing.positions())))
            .collect();
        let mut x = ops::embed(&self.embedding, &batch.tokens, f64::from(self.spec.embed_scale))?;
        for (weights, kind) in self.layers.iter().zip(&self.spec.layer_kinds) {
            let attention = Attention {
                heads: self.spec.heads,
                kv_heads: self.spec.kv_heads,
                scale: f64::from(self.spec.attn_scale),
                window: kind.window,
                angles: Some(angles[kind.rope].clone()),
                packing: batch.packing.clone(),
            };
            let layer = Layer {
                spec: self.spec.clone(),
                weights: weights.clone(),
                attention,
            };
            x = match self.recompute {
                Recompute::Nothing => layer.run(&x)?,
                Recompute::Layers => recomputed(&x, self.params.aside(), move |x| layer.run(x))?,
            };
        }
        Ok(ops::rms_norm(&x, &self.norm, f64::from(self.spec.norm_eps))?)
    }

    /// The tensors that training changes, in the layout of a model of description `base`: low-rank parts added, rows of q and k interleaved
    /// where its files have them so.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn changed_for(&self, base: &ModelSpec) -> Result<Vec<(Role, Vec<f32>)>, TrainError> {
        let changed = |role: &Role| {
            let name = role.folder_name(self.spec.arch, "model.");
            Lora::of(&name, &self.params).is_some() || self.params.variables().any(|(n, _)| n == name)
        };
        let mut out = self.tensors()?;
        out.retain(|(role, _)| changed(role));
        for (role, values) in &mut out {
            let Some(layer) = role.turned_layer() else {
                continue;
            };
            let rope = &base.ropes[base.layer_kinds[layer].rope];
            if rope.style == RopeStyle::Interleaved {
                let rows = match role {
                    Role::AttnQ(_) | Role::AttnQBias(_) => base.q_dim(),
                    _ => base.kv_dim(),
                };
                let cols = values.len() / rows;
                interleaved(values, base.head_dim, rope.dims, cols);
            }
        }
        Ok(out)
    }

    /// Every tensor by role, as the engine reads it: low-rank parts added to their weights, rotations of halves.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn tensors(&self) -> Result<Vec<(Role, Vec<f32>)>, TrainError> {
        let mut out = Vec::new();
        for role in Role::all(self.spec.layers) {
            let name = role.folder_name(self.spec.arch, "model.");
            let Some(value) = self.params.get(&name) else {
                continue;
            };
            let mut values = value.flatten_all()?.to_vec1::<f32>()?;
            if let Some(lora) = Lora::of(&name, &self.params) {
                lora.add_to(&mut values)?;
            }
            out.push((role, values));
        }
        Ok(out)
    }
}
