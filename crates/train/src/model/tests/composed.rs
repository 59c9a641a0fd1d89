//! The oracle: a decoder written with candle's own operators, differentiated by candle. Loss and every gradient are those of ours.

use candle_core::{D, Device, Tensor};

use super::*;
use antefix_models::spec::{Act, ModelSpec};

type Result<T> = candle_core::Result<T>;

struct Composed<'a> {
    spec: &'a ModelSpec,
    params: &'a Params,
}

impl Composed<'_> {
    /// The parameter of a layer, if the family has it.
    fn optional(&self, layer: usize, name: &str) -> Option<&Tensor> {
        self.params.get(&format!("model.layers.{layer}.{name}.weight"))
    }

    fn at(&self, layer: usize, name: &str) -> &Tensor {
        self.optional(layer, name)
            .unwrap_or_else(|| panic!("{layer} {name}"))
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean = (x.sqr()?.sum_keepdim(D::Minus1)? / x.dim(D::Minus1)? as f64)?;
        let root = (mean + f64::from(self.spec.norm_eps))?.sqrt()?;
        x.broadcast_div(&root)?.broadcast_mul(weight)
    }

    /// `x: [H, T, D]` by the layer's rotation.
    fn rotate(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let rope = &self.spec.ropes[self.spec.layer_kinds[layer].rope];
        let (freq, rows) = (rope.frequencies(), x.dim(1)?);
        let n = freq.len();
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = (0..rows)
                .flat_map(|p| freq.iter().map(move |w| f(p as f32 * w)))
                .collect();
            Tensor::from_vec(values, (1, rows, n), &Device::Cpu)
        };
        let (cos, sin) = (table(f32::cos)?, table(f32::sin)?);
        let (a, b) = (x.narrow(2, 0, n)?, x.narrow(2, n, n)?);
        let turned = [
            (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?,
            (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?,
            x.narrow(2, 2 * n, self.spec.head_dim - 2 * n)?,
        ];
        let kept = if self.spec.head_dim == 2 * n { 2 } else { 3 };
        Tensor::cat(&turned[..kept], 2)
    }

    fn attention(&self, h: &Tensor, layer: usize) -> Result<Tensor> {
        let rows = h.dim(0)?;
        let heads = |name: &str, heads: usize, norm: &str, turn: bool| -> Result<Tensor> {
            let x = h.matmul(&self.at(layer, name).t()?)?;
            let mut x = x
                .reshape((rows, heads, self.spec.head_dim))?
                .transpose(0, 1)?
                .contiguous()?;
            if let Some(weight) = self.optional(layer, norm) {
                x = self.norm(&x, weight)?;
            }
            if turn { self.rotate(&x, layer) } else { Ok(x) }
        };
        let q = heads("self_attn.q_proj", self.spec.heads, "self_attn.q_norm", true)?;
        let share = self.spec.heads / self.spec.kv_heads;
        let spread = |x: Tensor| -> Result<Tensor> {
            let dims = (self.spec.kv_heads, share, rows, self.spec.head_dim);
            x.unsqueeze(1)?.broadcast_as(dims)?.contiguous()?.reshape((
                self.spec.heads,
                rows,
                self.spec.head_dim,
            ))
        };
        let k = spread(heads(
            "self_attn.k_proj",
            self.spec.kv_heads,
            "self_attn.k_norm",
            true,
        )?)?;
        let v = spread(heads("self_attn.v_proj", self.spec.kv_heads, "none", false)?)?;
        let window = self.spec.layer_kinds[layer].window.map_or(rows, |w| w as usize);
        let mask: Vec<f32> = (0..rows)
            .flat_map(|r| (0..rows).map(move |t| if t <= r && r - t < window { 0.0 } else { -1e30 }))
            .collect();
        let mask = Tensor::from_vec(mask, (1, rows, rows), &Device::Cpu)?;
        let s = (q.matmul(&k.t()?.contiguous()?)? * f64::from(self.spec.attn_scale))?.broadcast_add(&mask)?;
        let p = s.broadcast_sub(&s.max_keepdim(2)?.detach())?.exp()?;
        let p = p.broadcast_div(&p.sum_keepdim(2)?)?;
        let o = p.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape((rows, ()))?;
        o.matmul(&self.at(layer, "self_attn.o_proj").t()?)
    }

    fn feed_forward(&self, h: &Tensor, layer: usize) -> Result<Tensor> {
        let gate = h.matmul(&self.at(layer, "mlp.gate_proj").t()?)?;
        let up = h.matmul(&self.at(layer, "mlp.up_proj").t()?)?;
        let act = match self.spec.act {
            Act::Silu => (&gate / (gate.neg()?.exp()? + 1.0)?)?,
            Act::GeluTanh => {
                let inner =
                    ((&gate + (gate.powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
                ((&gate * 0.5)? * (inner.tanh()? + 1.0)?)?
            }
        };
        (act * up)?.matmul(&self.at(layer, "mlp.down_proj").t()?)
    }

    /// Mean cross-entropy of every next token.
    fn loss(&self, tokens: &[u32]) -> Result<Tensor> {
        let gemma = self.spec.post_norms;
        let ids = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?;
        let embedding = self.params.get("model.embed_tokens.weight").unwrap();
        let mut x = (embedding.index_select(&ids, 0)? * f64::from(self.spec.embed_scale))?;
        for layer in 0..self.spec.layers {
            let mut y = self.attention(&self.norm(&x, self.at(layer, "input_layernorm"))?, layer)?;
            let before_ffn = if gemma {
                "pre_feedforward_layernorm"
            } else {
                "post_attention_layernorm"
            };
            if gemma {
                y = self.norm(&y, self.at(layer, "post_attention_layernorm"))?;
            }
            x = (x + y)?;
            let mut y = self.feed_forward(&self.norm(&x, self.at(layer, before_ffn))?, layer)?;
            if gemma {
                y = self.norm(&y, self.at(layer, "post_feedforward_layernorm"))?;
            }
            x = (x + y)?;
        }
        let x = self.norm(&x, self.params.get("model.norm.weight").unwrap())?;
        let output = self.params.get("lm_head.weight").unwrap_or(embedding);
        let logits = x.narrow(0, 0, tokens.len() - 1)?.matmul(&output.t()?)?;
        let largest = logits.max_keepdim(1)?.detach();
        let lse = (logits.broadcast_sub(&largest)?.exp()?.sum_keepdim(1)?.log()? + largest)?;
        let logp = logits.gather(&ids.narrow(0, 1, tokens.len() - 1)?.unsqueeze(1)?, 1)? - lse;
        logp?.mean_all()?.neg()
    }
}

#[test]
fn losses_and_gradients_are_those_of_candles_own_operators() {
    // Longer than the window of Gemma's local layers (12), so that it matters.
    let tokens = tokens(40);
    for arch in [Arch::Llama, Arch::Qwen3, Arch::Gemma3] {
        let decoder = Decoder::load(&files(arch), &Train::All, 0).unwrap();
        let composed = Composed {
            spec: decoder.spec(),
            params: decoder.params(),
        };
        let theirs = composed.loss(&tokens).unwrap();
        let ours = loss(&decoder, &tokens);
        let value = |t: &Tensor| t.to_scalar::<f32>().unwrap();
        assert!(
            (value(&ours) - value(&theirs)).abs() < 1e-5,
            "{arch:?}: {ours} {theirs}"
        );
        let mut grads = Grads::default();
        grads.add(decoder.params(), &ours).unwrap();
        let store = theirs.backward().unwrap();
        for ((name, var), ours) in decoder.params().variables().zip(grads.sums()) {
            let theirs = store.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let theirs: Vec<f32> = theirs.flatten_all().unwrap().to_vec1().unwrap();
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let size = norm(&mut theirs.iter().copied());
            let far = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b));
            assert!(
                size > 0.0 && far <= 1e-4 * size,
                "{arch:?} {name}: {far} of {size}"
            );
        }
    }
}
