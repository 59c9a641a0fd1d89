//! The small GPT out of candle's own operators, on the same parameters: what one writes without handwritten gradients.

use antefix_train::model::{Params, RawGpt};
use candle_core::{D, DType, Device, Result, Tensor};

/// A model's parameters and its sizes.
pub(crate) struct Composed<'a> {
    params: &'a Params,
    raw: &'a RawGpt,
    mask: Tensor,
    length: usize,
}

impl<'a> Composed<'a> {
    pub(crate) fn new(params: &'a Params, raw: &'a RawGpt, length: usize) -> Result<Self> {
        let mask: Vec<f32> = (0..length)
            .flat_map(|r| (0..length).map(move |t| if t <= r { 0.0 } else { f32::NEG_INFINITY }))
            .collect();
        Ok(Self {
            params,
            raw,
            mask: Tensor::from_vec(mask, (length, length), &Device::Cpu)?,
            length,
        })
    }

    fn get(&self, name: &str) -> Result<&Tensor> {
        let missing = || candle_core::Error::Msg(format!("no parameter `{name}`"));
        self.params.get(name).ok_or_else(missing)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        centred
            .broadcast_div(&(variance + 1e-5)?.sqrt()?)?
            .broadcast_mul(self.get(&format!("{name}.weight"))?)?
            .broadcast_add(self.get(&format!("{name}.bias"))?)
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.matmul(&self.get(&format!("{name}.weight"))?.t()?)
    }

    fn attention(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let (heads, dim) = (self.raw.heads, self.raw.d / self.raw.heads);
        let split = |part: &str| {
            self.linear(x, &format!("{name}.{part}"))?
                .reshape(((), self.length, heads, dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let scores = (split("q_proj")?.matmul(&split("k_proj")?.t()?)? / (dim as f64).sqrt())?;
        let scores = scores.broadcast_add(&self.mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let y = weights.matmul(&split("v_proj")?)?.transpose(1, 2)?;
        self.linear(&y.reshape(((), self.raw.d))?, &format!("{name}.o_proj"))
    }

    /// Mean cross-entropy; tokens and targets of whole sequences of one length.
    pub(crate) fn loss(&self, tokens: &[u32], targets: &[u32]) -> Result<Tensor> {
        let ids = |t: &[u32]| Tensor::from_slice(t, t.len(), &Device::Cpu);
        let places: Vec<u32> = (0..tokens.len()).map(|i| (i % self.length) as u32).collect();
        let table = self.get("wte.weight")?;
        let mut x = (table.index_select(&ids(tokens)?, 0)?
            + self.get("wpe.weight")?.index_select(&ids(&places)?, 0)?)?;
        for layer in 0..self.raw.layers {
            let name = |part: &str| format!("h.{layer}.{part}");
            let h = self.norm(&x, &name("ln_1"))?;
            x = (x + self.attention(&h, &name("attn"))?)?;
            let h = self
                .linear(&self.norm(&x, &name("ln_2"))?, &name("mlp.c_fc"))?
                .gelu()?;
            x = (x + self.linear(&h, &name("mlp.c_proj"))?)?;
        }
        let logits = self.norm(&x, "ln_f")?.matmul(&table.t()?)?.to_dtype(DType::F32)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        let lse = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let chosen = shifted.gather(&ids(targets)?.unsqueeze(1)?, 1)?;
        (lse - chosen)?.mean_all()
    }
}
