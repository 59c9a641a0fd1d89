//! Inference: a stack of layers (3.6) that goes on from a state, one token or a block at a time.

use antefix_kernels::cpu::Cpu;
use antefix_kernels::dense::{Mat, MatMut, Sum, Threads, product};

use super::config::{Config, Mixer, Norm};
use super::file::{self, FileError, Tensors};
use super::scan::Prefix;
use super::twin::Cache;

/// `y = W x + b`, the weights turned to `[in, out]`.
pub(super) struct Linear {
    weight: Vec<f32>,
    bias: Vec<f32>,
    ins: usize,
}

impl Linear {
    /// From `weight: [out, in]`.
    fn new(weight: &[f32], bias: Vec<f32>) -> Self {
        let (outs, ins) = (bias.len(), weight.len() / bias.len().max(1));
        let turned = (0..ins).flat_map(|i| (0..outs).map(move |o| weight[o * ins + i]));
        Self {
            weight: turned.collect(),
            bias,
            ins,
        }
    }

    fn take(tensors: &mut Tensors, name: &str) -> Result<Self, FileError> {
        let weight = take(tensors, &format!("{name}.weight"))?;
        Ok(Self::new(&weight, take(tensors, &format!("{name}.bias"))?))
    }

    pub(super) fn outs(&self) -> usize {
        self.bias.len()
    }

    /// Of `x: [b, in]`, into `y: [b, out]`.
    pub(super) fn apply(&self, x: &[f32], y: &mut Vec<f32>) {
        let (rows, outs) = (x.len() / self.ins, self.outs());
        y.clear();
        (0..rows).for_each(|_| y.extend_from_slice(&self.bias));
        if rows == 1 {
            // One row: whole rows of the weights, four at a time, so that a sum is loaded and stored once for four products.
            let (x, rest) = x.as_chunks::<4>();
            let mut rows = self.weight.chunks_exact(outs);
            for x in x {
                let (Some(a), Some(b), Some(c), Some(d)) =
                    (rows.next(), rows.next(), rows.next(), rows.next())
                else {
                    return;
                };
                let [a, b, c, d] = [&a[..outs], &b[..outs], &c[..outs], &d[..outs]];
                for (o, y) in y[..outs].iter_mut().enumerate() {
                    *y += (x[0] * a[o] + x[1] * b[o]) + (x[2] * c[o] + x[3] * d[o]);
                }
            }
            for (x, row) in rest.iter().zip(rows) {
                y.iter_mut().zip(row).for_each(|(y, w)| *y += x * w);
            }
            return;
        }
        product(
            MatMut::new(y, rows, outs),
            Sum::Add,
            1.0,
            Mat::new(x, rows, self.ins),
            Mat::new(&self.weight, self.ins, outs),
            Threads::One,
        );
    }
}

fn take(tensors: &mut Tensors, name: &str) -> Result<Vec<f32>, FileError> {
    tensors
        .remove(name)
        .ok_or_else(|| FileError::Missing(name.into()))
}

/// LayerNorm over the last dimension, with the variance of the whole row and 1e-5 beside it.
struct LayerNorm {
    gain: Vec<f32>,
    shift: Vec<f32>,
}

/// Added to the variance in every LayerNorm.
pub const EPS: f32 = 1e-5;

impl LayerNorm {
    fn take(tensors: &mut Tensors, name: &str) -> Result<Self, FileError> {
        Ok(Self {
            gain: take(tensors, &format!("{name}.weight"))?,
            shift: take(tensors, &format!("{name}.bias"))?,
        })
    }

    fn apply(&self, x: &mut [f32]) {
        let n = self.gain.len();
        for row in x.chunks_exact_mut(n) {
            let mean = row.iter().sum::<f32>() / n as f32;
            let var = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / n as f32;
            let scale = (var + EPS).sqrt().recip();
            for ((x, g), b) in row.iter_mut().zip(&self.gain).zip(&self.shift) {
                *x = (*x - mean) * scale * g + b;
            }
        }
    }
}

/// Where the scores come from.
enum Query {
    /// The query never changes, so that key projection and query fold into one vector a head: `[d] -> [H]` scores.
    Constant(Linear),
    /// Queries, scaled, and keys of every token.
    Token { q: Linear, k: Linear },
}

struct Layer {
    query: Query,
    v: Linear,
    o: Linear,
    norm1: LayerNorm,
    ffn1: Linear,
    ffn2: Linear,
    norm2: LayerNorm,
}

impl Layer {
    fn take(config: &Config, tensors: &mut Tensors, l: usize) -> Result<Self, FileError> {
        let name = |part: &str| format!("layers.{l}.{part}");
        let (d, dim) = (config.width, config.dim());
        let scale = 1.0 / (dim as f64).sqrt();
        let (qw, qb) = (take(tensors, &name("q.weight"))?, take(tensors, &name("q.bias"))?);
        let (kw, kb) = (take(tensors, &name("k.weight"))?, take(tensors, &name("k.bias"))?);
        let query = if config.mixer == Mixer::Aaren {
            let token = take(tensors, &name("q_tok"))?;
            let wide = |x: &f32| f64::from(*x);
            let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| wide(a) * wide(b)).sum() };
            let q: Vec<f64> = (0..d)
                .map(|o| scale * (dot(&qw[o * d..][..d], &token) + wide(&qb[o])))
                .collect();
            let mut folded = vec![0.0; config.heads * d];
            let mut bias = vec![0.0; config.heads];
            for h in 0..config.heads {
                let rows = h * dim..(h + 1) * dim;
                bias[h] = rows.clone().map(|r| q[r] * wide(&kb[r])).sum::<f64>() as f32;
                for i in 0..d {
                    folded[h * d + i] = rows.clone().map(|r| q[r] * wide(&kw[r * d + i])).sum::<f64>() as f32;
                }
            }
            Query::Constant(Linear::new(&folded, bias))
        } else {
            let scaled = |x: Vec<f32>| x.into_iter().map(|x| x * scale as f32).collect::<Vec<_>>();
            Query::Token {
                q: Linear::new(&scaled(qw), scaled(qb)),
                k: Linear::new(&kw, kb),
            }
        };
        Ok(Self {
            query,
            v: Linear::take(tensors, &name("v"))?,
            o: Linear::take(tensors, &name("o"))?,
            norm1: LayerNorm::take(tensors, &name("norm1"))?,
            ffn1: Linear::take(tensors, &name("ffn1"))?,
            ffn2: Linear::take(tensors, &name("ffn2"))?,
            norm2: LayerNorm::take(tensors, &name("norm2"))?,
        })
    }
}

/// What a layer remembers.
#[derive(Debug, Clone)]
pub enum LayerState {
    /// A constant number of values.
    Aaren(Prefix),
    /// Keys and values of all tokens.
    Attention(Cache),
}

impl LayerState {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Aaren(prefix) => prefix.bytes(),
            Self::Attention(cache) => cache.bytes(),
        }
    }
}

/// A model that is ready to run.
pub struct Model {
    config: Config,
    layers: Vec<Layer>,
    norm: Option<LayerNorm>,
    embed_norm: Option<LayerNorm>,
    /// Embeddings and heads of the task, by their names.
    outer: std::collections::BTreeMap<String, Linear>,
    /// `[marks, d]`
    marks: Vec<f32>,
    fingerprint: u64,
    cpu: Cpu,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Buffers of a call, reused from call to call.
#[derive(Default)]
pub struct Scratch {
    a: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    z: Vec<f32>,
    y: Vec<f32>,
}

/// FNV-1a: tells files of models apart, no more.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl Model {
    /// From a file's bytes.
    ///
    /// # Errors
    /// See [`FileError`].
    pub fn read(bytes: &[u8]) -> Result<Self, FileError> {
        let (config, mut tensors) = file::read(bytes)?;
        let layers = (0..config.layers)
            .map(|l| Layer::take(&config, &mut tensors, l))
            .collect::<Result<_, _>>()?;
        let norm = (config.norm == Norm::Pre)
            .then(|| LayerNorm::take(&mut tensors, "norm"))
            .transpose()?;
        let embed_norm = tensors
            .contains_key("embed_norm.weight")
            .then(|| LayerNorm::take(&mut tensors, "embed_norm"))
            .transpose()?;
        let marks = tensors.remove("embed_mark.weight").unwrap_or_default();
        // What is left are linear maps.
        let names: Vec<String> = tensors
            .keys()
            .filter_map(|name| name.strip_suffix(".weight").map(str::to_owned))
            .collect();
        let outer = names
            .into_iter()
            .map(|name| Ok((name.clone(), Linear::take(&mut tensors, &name)?)))
            .collect::<Result<_, FileError>>()?;
        Ok(Self {
            config,
            layers,
            norm,
            embed_norm,
            outer,
            marks,
            fingerprint: fnv(bytes),
            cpu: Cpu::best(),
        })
    }

    /// Sizes and task.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Tells this model's states from those of other models.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// States of all layers before the first token.
    pub fn start(&self) -> Vec<LayerState> {
        let (heads, dim) = (self.config.heads, self.config.dim());
        let one = || match self.config.mixer {
            Mixer::Aaren => LayerState::Aaren(Prefix::new(heads, dim)),
            Mixer::Attention => LayerState::Attention(Cache::new(heads, dim)),
        };
        (0..self.layers.len()).map(|_| one()).collect()
    }

    /// Appends `W x + b` of the linear map `name` to `out`; nothing if there is no such map.
    pub(super) fn map(&self, name: &str, x: &[f32], out: &mut Vec<f32>) {
        match self.outer.get(name) {
            Some(linear) => linear.apply(x, out),
            None => out.clear(),
        }
    }

    /// The embedding of mark `mark`, `[d]`; empty without marks.
    pub(super) fn mark(&self, mark: usize) -> &[f32] {
        let d = self.config.width;
        self.marks.get(mark * d..(mark + 1) * d).unwrap_or(&[])
    }

    /// The norm behind the embedding, where the task has one.
    pub(super) fn embedded(&self, x: &mut [f32]) {
        if let Some(norm) = &self.embed_norm {
            norm.apply(x);
        }
    }

    /// Goes on by the tokens `x: [b, d]`, which become the outputs of the last layer. Any cut into blocks gives the same outputs up to
    /// rounding: the products of one row and of many add in other orders.
    ///
    /// # Panics
    /// When the shapes do not fit, or `state` is of another model.
    pub fn forward(&self, x: &mut [f32], state: &mut [LayerState], scratch: &mut Scratch) {
        assert!(
            x.len().is_multiple_of(self.config.width) && state.len() == self.layers.len(),
            "tokens are [b, d], with a state a layer"
        );
        let Scratch { a, q, k, v, z, y } = scratch;
        let pre = self.config.norm == Norm::Pre;
        for (layer, state) in self.layers.iter().zip(state) {
            a.clear();
            a.extend_from_slice(x);
            if pre {
                layer.norm1.apply(a);
            }
            layer.v.apply(a, v);
            z.clear();
            z.resize(x.len(), 0.0);
            match (&layer.query, state) {
                (Query::Constant(scores), LayerState::Aaren(prefix)) => {
                    scores.apply(a, q);
                    prefix.scan(q, v, self.config.decay, z, None);
                }
                (Query::Token { q: wq, k: wk }, LayerState::Attention(cache)) => {
                    wq.apply(a, q);
                    wk.apply(a, k);
                    cache.attend(self.cpu, q, k, v, z);
                }
                _ => unreachable!("states are made by `Model::start`"),
            }
            layer.o.apply(z, y);
            x.iter_mut().zip(&*y).for_each(|(x, y)| *x += y);
            if !pre {
                layer.norm1.apply(x);
            }
            a.clear();
            a.extend_from_slice(x);
            if pre {
                layer.norm2.apply(a);
            }
            layer.ffn1.apply(a, z);
            z.iter_mut().for_each(|z| *z = z.max(0.0));
            layer.ffn2.apply(z, y);
            x.iter_mut().zip(&*y).for_each(|(x, y)| *x += y);
            if !pre {
                layer.norm2.apply(x);
            }
        }
        if let Some(norm) = &self.norm {
            norm.apply(x);
        }
    }
}
