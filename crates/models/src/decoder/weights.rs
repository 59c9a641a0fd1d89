//! The weights of a model, packed for the CPU at hand.

use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::{Matrix, Precision};
use antefix_kernels::ops::{Rope, RopeStyle as KernelStyle};
use antefix_kernels::quant;
use antefix_kernels::team::Team;

use crate::error::LoadError;
use crate::files::{ModelFiles, Tensor};
use crate::role::Role;
use crate::spec::{RopeSpec, RopeStyle};

/// One decoder block. `[n, k]` means n outputs, k inputs.
pub(super) struct Layer {
    pub(super) attn_norm: Vec<f32>,
    /// `[Hq D, d]`, `[Hk D, d]`, `[Hk D, d]`.
    pub(super) qkv: [Matrix; 3],
    pub(super) qkv_bias: [Option<Vec<f32>>; 3],
    /// Norms of each head's q and k, `[D]`.
    pub(super) qk_norm: Option<[Vec<f32>; 2]>,
    /// `[d, Hq D]`.
    pub(super) attn_out: Matrix,
    pub(super) attn_post_norm: Option<Vec<f32>>,
    pub(super) ffn_norm: Vec<f32>,
    /// Gate and up, `[ff, d]` each.
    pub(super) gate_up: [Matrix; 2],
    /// `[d, ff]`.
    pub(super) down: Matrix,
    pub(super) ffn_post_norm: Option<Vec<f32>>,
}

pub(super) struct Weights {
    pub(super) layers: Vec<Layer>,
    pub(super) output_norm: Vec<f32>,
    /// `[vocab, d]`.
    pub(super) output: Matrix,
}

struct Loader<'a> {
    files: &'a ModelFiles,
    cpu: Cpu,
    team: &'a Team,
    precision: Precision,
}

impl Loader<'_> {
    fn need(&self, role: Role) -> Result<Tensor<'_>, LoadError> {
        self.files.tensor(role)?.ok_or_else(|| self.files.missing(role))
    }

    fn matrix(&self, role: Role) -> Result<Matrix, LoadError> {
        let t = self.need(role)?;
        Matrix::pack(
            self.cpu,
            self.team,
            t.format,
            &t.bytes,
            t.rows,
            t.cols,
            self.precision,
        )
        .map_err(|source| self.files.bad_tensor(role, source))
    }

    fn optional(&self, role: Role) -> Result<Option<Vec<f32>>, LoadError> {
        let Some(t) = self.files.tensor(role)? else {
            return Ok(None);
        };
        let mut out = vec![0.0; t.rows * t.cols];
        quant::dequantise(t.format, &t.bytes, &mut out)
            .map_err(|source| self.files.bad_tensor(role, source))?;
        Ok(Some(out))
    }

    fn vector(&self, role: Role) -> Result<Vec<f32>, LoadError> {
        self.optional(role)?.ok_or_else(|| self.files.missing(role))
    }

    /// A vector that the spec asks for, or none.
    fn asked(&self, asked: bool, role: Role) -> Result<Option<Vec<f32>>, LoadError> {
        asked.then(|| self.vector(role)).transpose()
    }

    fn layer(&self, l: usize) -> Result<Layer, LoadError> {
        let spec = self.files.spec();
        let bias = |role| self.asked(spec.qkv_bias, role);
        Ok(Layer {
            attn_norm: self.vector(Role::AttnNorm(l))?,
            qkv: [
                self.matrix(Role::AttnQ(l))?,
                self.matrix(Role::AttnK(l))?,
                self.matrix(Role::AttnV(l))?,
            ],
            qkv_bias: [
                bias(Role::AttnQBias(l))?,
                bias(Role::AttnKBias(l))?,
                bias(Role::AttnVBias(l))?,
            ],
            qk_norm: match spec.qk_norm {
                true => Some([self.vector(Role::AttnQNorm(l))?, self.vector(Role::AttnKNorm(l))?]),
                false => None,
            },
            attn_out: self.matrix(Role::AttnOut(l))?,
            attn_post_norm: self.asked(spec.post_norms, Role::AttnPostNorm(l))?,
            ffn_norm: self.vector(Role::FfnNorm(l))?,
            gate_up: [self.matrix(Role::FfnGate(l))?, self.matrix(Role::FfnUp(l))?],
            down: self.matrix(Role::FfnDown(l))?,
            ffn_post_norm: self.asked(spec.post_norms, Role::FfnPostNorm(l))?,
        })
    }
}

impl Weights {
    pub(super) fn load(
        files: &ModelFiles,
        cpu: Cpu,
        team: &Team,
        precision: Precision,
    ) -> Result<Self, LoadError> {
        let loader = Loader {
            files,
            cpu,
            team,
            precision,
        };
        let output = if files.spec().tied {
            Role::TokenEmbd
        } else {
            Role::Output
        };
        // The largest matrix first: no other is in memory while the file's and the packed form of it are.
        let output = loader.matrix(output)?;
        files.drop_pages();
        Ok(Self {
            output,
            layers: (0..files.spec().layers)
                .map(|l| {
                    let layer = loader.layer(l);
                    // Packed: what was read of the file need not stay in memory beside it.
                    files.drop_pages();
                    layer
                })
                .collect::<Result<_, _>>()?,
            output_norm: loader.vector(Role::OutputNorm)?,
        })
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.layers
            .iter()
            .flat_map(|l| l.qkv.iter().chain(&l.gate_up).chain([&l.attn_out, &l.down]))
            .chain([&self.output])
    }

    pub(super) fn bytes(&self) -> usize {
        self.matrices().map(Matrix::bytes).sum()
    }

    pub(super) fn any_quantised(&self) -> bool {
        self.matrices().any(Matrix::is_quantised)
    }

    pub(super) fn kinds(&self) -> Vec<(String, usize)> {
        let mut kinds: Vec<(String, usize)> = Vec::new();
        for m in self.matrices() {
            match kinds.iter_mut().find(|k| k.0 == m.kind_name()) {
                Some(kind) => kind.1 += m.bytes(),
                None => kinds.push((m.kind_name().to_string(), m.bytes())),
            }
        }
        kinds.sort_by_key(|k| std::cmp::Reverse(k.1));
        kinds
    }
}

/// The rotation table of one RoPE description.
pub(super) fn rope(spec: &RopeSpec) -> Rope {
    rope_of(spec, &spec.frequencies())
}

/// The same with other frequencies, `[dims / 2]`.
pub(super) fn rope_of(spec: &RopeSpec, frequencies: &[f32]) -> Rope {
    let style = match spec.style {
        RopeStyle::Neox => KernelStyle::Neox,
        RopeStyle::Interleaved => KernelStyle::Interleaved,
    };
    Rope::new(frequencies, style)
}
