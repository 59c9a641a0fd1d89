//! One layer of a decoder, as a function of its rows.

use std::sync::Arc;

use antefix_kernels::grad::Act;
use antefix_models::spec::{Act as SpecAct, ModelSpec};
use candle_core::Tensor;

use super::lora::Lora;
use crate::error::TrainError;
use crate::ops::{self, Attention};

/// A weight matrix, with its bias and its low-rank part if it has them.
#[derive(Debug)]
pub(super) struct Projection {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
    pub(super) lora: Option<Lora>,
}

impl Projection {
    fn apply(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        Ok(match &self.lora {
            Some(Lora { a, b, scale }) => ops::lora(x, &self.weight, self.bias.as_ref(), a, b, *scale)?,
            None => ops::linear(x, &self.weight, self.bias.as_ref())?,
        })
    }

    fn plain(&self) -> bool {
        self.lora.is_none() && self.bias.is_none() && self.weight.track_op()
    }
}

/// Parameters of a layer.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) attn_norm: Tensor,
    pub(super) qkv: [Projection; 3],
    pub(super) qk_norm: Option<[Tensor; 2]>,
    pub(super) out: Projection,
    pub(super) attn_post_norm: Option<Tensor>,
    pub(super) ffn_norm: Tensor,
    pub(super) gate: Projection,
    pub(super) up: Projection,
    pub(super) down: Projection,
    pub(super) ffn_post_norm: Option<Tensor>,
}

/// A layer at work on one batch. It owns what it needs, so that it can be computed again later.
pub(super) struct Layer {
    pub(super) spec: Arc<ModelSpec>,
    pub(super) weights: Arc<Weights>,
    pub(super) attention: Attention,
}

impl Layer {
    /// `[R, d]` out of `[R, d]`.
    pub(super) fn run(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        let x = (x + self.attend(x)?)?;
        Ok((&x + self.feed_forward(&x)?)?)
    }

    fn rms(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, TrainError> {
        Ok(ops::rms_norm(x, weight, f64::from(self.spec.norm_eps))?)
    }

    /// Norms of the heads of `x: [R, H D]`.
    fn head_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, TrainError> {
        let shape = x.shape().clone();
        let heads = self.rms(&x.reshape(((), self.spec.head_dim))?, weight)?;
        Ok(heads.reshape(shape)?)
    }

    fn attend(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        let layer = &*self.weights;
        let h = self.rms(x, &layer.attn_norm)?;
        let [mut q, mut k] = [layer.qkv[0].apply(&h)?, layer.qkv[1].apply(&h)?];
        let v = layer.qkv[2].apply(&h)?;
        if let Some([q_norm, k_norm]) = &layer.qk_norm {
            q = self.head_norm(&q, q_norm)?;
            k = self.head_norm(&k, k_norm)?;
        }
        let o = layer
            .out
            .apply(&ops::attend(self.attention.clone(), &q, &k, &v)?)?;
        match &layer.attn_post_norm {
            Some(norm) => self.rms(&o, norm),
            None => Ok(o),
        }
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor, TrainError> {
        let layer = &*self.weights;
        let act = match self.spec.act {
            SpecAct::Silu => Act::Silu,
            SpecAct::GeluTanh => Act::GeluTanh,
        };
        let h = self.rms(x, &layer.ffn_norm)?;
        let middle = match layer.gate.plain() && layer.up.plain() {
            true => ops::glu(act, &h, &layer.gate.weight, &layer.up.weight)?,
            false => ops::gated_act(act, &layer.gate.apply(&h)?, &layer.up.apply(&h)?)?,
        };
        let y = layer.down.apply(&middle)?;
        match &layer.ffn_post_norm {
            Some(norm) => self.rms(&y, norm),
            None => Ok(y),
        }
    }
}
