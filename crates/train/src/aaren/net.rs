//! The trainable form of [`antefix_papers::aaren::Model`]: the same tensors as variables, whole sequences at once.

use std::sync::Arc;

use antefix_papers::aaren::file::{self, FileError, Tensors};
use antefix_papers::aaren::{Config, Mixer, Norm, model::EPS};
use candle_core::{DType, Device, Result, Tensor};

use super::scan::scan;
use crate::TrainError;
use crate::model::Params;
use crate::ops::{Attention, Packing, attend, layer_norm, linear};
use crate::random::Stream;

/// Variables by the names of [`Config::tensors`].
#[derive(Debug)]
pub struct Net {
    config: Config,
    params: Params,
}

/// A standard normal number.
pub(super) fn normal(rng: &mut fastrand::Rng) -> f64 {
    let r = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
    r * (std::f64::consts::TAU * rng.f64()).cos()
}

impl Net {
    /// Fresh variables. Each depends on its name and the seed alone, so that twins start from the same values where they have the same
    /// tensors: weights are uniform as Glorot's, `q_tok` is standard normal like a normed token, norms are 1 and biases 0.
    ///
    /// # Errors
    /// When the configuration makes no model.
    pub fn new(config: &Config, seed: u64, dtype: DType) -> std::result::Result<Self, TrainError> {
        config.check().map_err(|e| TrainError::Recipe(e.to_string()))?;
        let mut params = Params::default();
        for (name, shape) in config.tensors() {
            let mut stream = Stream::of(seed, &name);
            let n: usize = shape.iter().product();
            let values: Vec<f64> = match shape[..] {
                _ if name.ends_with("q_tok") => (0..n).map(|_| stream.normal()).collect(),
                [out, ins] => {
                    let bound = (6.0 / (out + ins) as f64).sqrt();
                    (0..n).map(|_| bound * (2.0 * stream.unit() - 1.0)).collect()
                }
                _ if name.contains("norm") && name.ends_with("weight") => vec![1.0; n],
                _ => vec![0.0; n],
            };
            params.trained(
                &name,
                Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?,
            )?;
        }
        Ok(Self {
            config: config.clone(),
            params,
        })
    }

    /// Sizes and task.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The variables. Decay of an optimiser goes to matrices alone, so neither to `q_tok` nor to norms nor biases.
    pub fn params(&self) -> &Params {
        &self.params
    }

    fn var(&self, name: &str) -> Result<&Tensor> {
        let missing = || candle_core::Error::Msg(format!("no variable `{name}`"));
        self.params.get(name).ok_or_else(missing)
    }

    /// `W x + b` of the linear map `name`.
    ///
    /// # Errors
    /// When there is no such map or `x` does not fit.
    pub fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (
            self.var(&format!("{name}.weight"))?,
            self.var(&format!("{name}.bias"))?,
        );
        linear(x, weight, Some(bias))
    }

    /// Rows of the table `name`, `[R, d]`, by index.
    ///
    /// # Errors
    /// When there is no such table or an index is none of its rows.
    pub fn rows(&self, name: &str, indices: Vec<u32>) -> Result<Tensor> {
        crate::ops::embed(self.var(&format!("{name}.weight"))?, &Arc::new(indices), 1.0)
    }

    /// The LayerNorm `name`.
    ///
    /// # Errors
    /// When there is no such norm or `x` does not fit.
    pub fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (
            self.var(&format!("{name}.weight"))?,
            self.var(&format!("{name}.bias"))?,
        );
        layer_norm(x, weight, bias, f64::from(EPS))
    }

    /// Scores of the constant queries of layer `l`, `[B, N, H]`: query and key projection fold into one vector a head.
    fn scores(&self, l: usize, a: &Tensor) -> Result<Tensor> {
        let (heads, dim, d) = (self.config.heads, self.config.dim(), self.config.width);
        let name = |part: &str| format!("layers.{l}.{part}");
        let token = self.var(&name("q_tok"))?.unsqueeze(0)?;
        let q = (self.linear(&name("q"), &token)? / (dim as f64).sqrt())?.reshape((d, 1))?;
        let folded = self.var(&name("k.weight"))?.broadcast_mul(&q)?;
        let folded = folded.reshape((heads, dim, d))?.sum(1)?;
        let bias = (self.var(&name("k.bias"))?.unsqueeze(1)? * q)?;
        let bias = bias.reshape((heads, dim))?.sum(1)?;
        linear(a, &folded, Some(&bias))
    }

    fn mix(&self, l: usize, a: &Tensor) -> Result<Tensor> {
        let (b, n, d) = a.dims3()?;
        let name = |part: &str| format!("layers.{l}.{part}");
        let v = self.linear(&name("v"), a)?;
        let z = match self.config.mixer {
            Mixer::Aaren => scan(&self.scores(l, a)?, &v, self.config.decay)?,
            Mixer::Attention => {
                let flat = |x: Tensor| x.reshape((b * n, d));
                let attention = Attention {
                    heads: self.config.heads,
                    kv_heads: self.config.heads,
                    scale: 1.0 / (self.config.dim() as f64).sqrt(),
                    window: None,
                    angles: None,
                    packing: Arc::new(Packing::causal(&vec![n; b]).map_err(candle_core::Error::wrap)?),
                };
                let (q, k) = (self.linear(&name("q"), a)?, self.linear(&name("k"), a)?);
                attend(attention, &flat(q)?, &flat(k)?, &flat(v)?)?.reshape((b, n, d))?
            }
        };
        self.linear(&name("o"), &z)
    }

    /// Outputs of the last layer, `[B, N, d]`, of embedded tokens `[B, N, d]`. Shorter sequences are filled up at their end with anything.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        let pre = self.config.norm == Norm::Pre;
        for l in 0..self.config.layers {
            let name = |part: &str| format!("layers.{l}.{part}");
            let inner = if pre {
                self.norm(&name("norm1"), &x)?
            } else {
                x.clone()
            };
            x = (&x + self.mix(l, &inner)?)?;
            if !pre {
                x = self.norm(&name("norm1"), &x)?;
            }
            let inner = if pre {
                self.norm(&name("norm2"), &x)?
            } else {
                x.clone()
            };
            let middle = self.linear(&name("ffn1"), &inner)?.relu()?;
            x = (&x + self.linear(&name("ffn2"), &middle)?)?;
            if !pre {
                x = self.norm(&name("norm2"), &x)?;
            }
        }
        if pre { self.norm("norm", &x) } else { Ok(x) }
    }

    /// The values of all variables.
    ///
    /// # Errors
    /// When a variable cannot be read.
    pub fn tensors(&self) -> Result<Tensors> {
        let read = |(name, var): (&str, &candle_core::Var)| {
            let values = var.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
            Ok((name.to_owned(), values))
        };
        self.params.variables().map(read).collect()
    }

    /// Sets all variables to earlier values.
    ///
    /// # Errors
    /// When one is missing or of another size.
    pub fn restore(&self, tensors: &Tensors) -> Result<()> {
        for (name, var) in self.params.variables() {
            let missing = || candle_core::Error::Msg(format!("no values of `{name}`"));
            let values = tensors.get(name).ok_or_else(missing)?.clone();
            let values = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
            var.set(&values.to_dtype(var.dtype())?)?;
        }
        Ok(())
    }

    /// The model's file, as [`antefix_papers::aaren::Model::read`] and `antefix stream` read it.
    ///
    /// # Errors
    /// When a variable cannot be read, or is no number.
    pub fn export(&self) -> std::result::Result<Vec<u8>, FileError> {
        let tensors = self.tensors().map_err(|e| FileError::Broken(e.to_string()))?;
        if let Some((name, _)) = tensors.iter().find(|(_, v)| v.iter().any(|x| !x.is_finite())) {
            return Err(FileError::Number(name.clone()));
        }
        file::write(&self.config, &tensors)
    }
}
