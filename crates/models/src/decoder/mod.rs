//! The decoder: one generic block, read from a [`ModelSpec`], for every architecture that we run.

mod blend;
mod encode;
mod facts;
mod forward;
mod weights;

use std::sync::Arc;

use antefix_attention::Geometry;
use antefix_attention::hooks::HookShape;
pub use antefix_attention::{Deviation, Extra};
use antefix_kernels::cpu::{Cpu, Path};
use antefix_kernels::matmul::Precision;
use antefix_kernels::ops::Rope;
use antefix_kernels::team::Team;
use antefix_kv::{KvDtype, KvShape};

pub use blend::{Blend, Blended};
pub use encode::EncodeError;
pub use forward::{ForwardError, Input, Scratch};
use weights::Weights;

use crate::error::LoadError;
use crate::files::ModelFiles;
use crate::spec::ModelSpec;

/// A model in memory, ready to run. Shared between engines behind an `Arc`.
pub struct Model {
    files: ModelFiles,
    cpu: Cpu,
    team: Arc<Team>,
    precision: Precision,
    weights: Weights,
    ropes: Vec<Rope>,
    angles: facts::AngleTables,
}

impl Model {
    /// Packs the weights of `files` for `cpu`.
    ///
    /// # Errors
    /// When a tensor is missing, has the wrong shape or a format that we do not run.
    pub fn load(
        files: ModelFiles,
        cpu: Cpu,
        team: Arc<Team>,
        precision: Precision,
    ) -> Result<Self, LoadError> {
        let weights = Weights::load(&files, cpu, &team, precision)?;
        let ropes = files.spec().ropes.iter().map(weights::rope).collect();
        files.drop_pages();
        Ok(Self {
            files,
            cpu,
            team,
            precision,
            weights,
            ropes,
            angles: facts::AngleTables::default(),
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        self.files.spec()
    }

    /// The files that it came from: tokenizer and template are read from them.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// The kernels that it was packed for.
    pub fn cpu(&self) -> Cpu {
        self.cpu
    }

    /// The threads that run it.
    pub fn team(&self) -> &Arc<Team> {
        &self.team
    }

    /// Whether weights are as quantised in the file or widened to f32.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether drawn tokens are computed with other roundings than given ones ([`Input::drawn`]): on CPUs with bf16 tiles, the products of a
    /// prompt with quantised weights are in bf16, those of an answer in int8. What was computed of an answer is not what would have been
    /// computed had it been given, then.
    pub fn tells_drawn_apart(&self) -> bool {
        self.precision == Precision::Fast && self.cpu.path() == Path::Amx && self.weights.any_quantised()
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Bytes of packed weights that one decode step reads (all of them; a tied embedding counts once).
    pub fn bytes_read_per_step(&self) -> usize {
        self.weights.bytes()
    }

    /// Packed kinds and their bytes, largest first, for `antefix explain`.
    pub fn kinds(&self) -> Vec<(String, usize)> {
        self.weights.kinds()
    }

    /// The shape of its KV cache: bf16, or f32 at [`Precision::F32`].
    pub fn kv_shape(&self) -> KvShape {
        let spec = self.spec();
        let dtype = match self.precision {
            Precision::F32 => KvDtype::F32,
            Precision::Fast => KvDtype::Bf16,
        };
        KvShape {
            layers: spec.layers,
            kv_heads: spec.kv_heads,
            dim: spec.head_dim,
            dtype,
        }
    }

    /// The sizes that hooks are checked against.
    pub fn hook_shape(&self) -> HookShape {
        let spec = self.spec();
        HookShape {
            layers: spec.layers,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            dim: spec.head_dim,
            d_model: spec.d_model,
            d_ff: spec.d_ff,
            vocab: spec.vocab,
        }
    }

    /// Rotation of one layer.
    fn rope(&self, layer: usize) -> &Rope {
        &self.ropes[self.spec().layer_kinds[layer].rope]
    }

    /// Attention of one layer.
    pub fn geometry(&self, layer: usize) -> Geometry {
        let spec = self.spec();
        Geometry {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            dim: spec.head_dim,
            scale: spec.attn_scale,
            softcap: spec.attn_softcap,
            window: spec.layer_kinds[layer].window,
        }
    }
}
