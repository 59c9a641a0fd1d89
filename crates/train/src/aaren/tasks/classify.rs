//! Classification: value embedding, layers, the mean over time, a class.

use antefix_papers::aaren::{Scale, Task};
use candle_core::{D, DType, Device, Result, Tensor};

use super::{TEST_BATCH, places};
use crate::aaren::data::{Series, TsFile};
use crate::aaren::loss::{cross_entropy, masked_mean};
use crate::aaren::net::Net;
use crate::aaren::train::Problem;

/// Labelled series.
#[derive(Debug)]
pub struct Classify {
    channels: usize,
    classes: Vec<String>,
    scale: Scale,
    train: Vec<Series>,
    validation: Vec<Series>,
    test: Vec<Series>,
    /// Share of the pooled values that are dropped in training.
    pub dropout: f64,
}

impl Classify {
    /// From a training and a test file. Every fifth series of each class of the training file becomes validation data.
    ///
    /// # Errors
    /// When the files are of different channels or classes, or too small.
    pub fn new(train: TsFile, test: TsFile) -> std::result::Result<Self, String> {
        if (train.channels, &train.classes) != (test.channels, &test.classes) {
            return Err("the two files differ in channels or classes".into());
        }
        let mut seen = vec![0usize; train.classes.len()];
        let (mut learned, mut held_out) = (Vec::new(), Vec::new());
        for series in train.series {
            seen[series.class] += 1;
            if seen[series.class].is_multiple_of(5) {
                held_out.push(series);
            } else {
                learned.push(series);
            }
        }
        if held_out.is_empty() {
            return Err("no class has the five series that validation needs".into());
        }
        let values: Vec<f32> = learned.iter().flat_map(|s| s.values.clone()).collect();
        let scale = Scale::of(&values, train.channels);
        let normal = |all: Vec<Series>| -> Vec<Series> {
            let one = |s: Series| Series {
                values: scale.apply(&s.values),
                class: s.class,
            };
            all.into_iter().map(one).collect()
        };
        Ok(Self {
            channels: train.channels,
            classes: train.classes,
            train: normal(learned),
            validation: normal(held_out),
            test: normal(test.series),
            scale,
            dropout: 0.1,
        })
    }

    fn logits(&self, net: &Net, batch: &[&Series], rng: Option<&mut fastrand::Rng>) -> Result<Tensor> {
        let lengths: Vec<usize> = batch.iter().map(|s| s.values.len() / self.channels).collect();
        let n = lengths.iter().copied().max().unwrap_or(0);
        let mut x = vec![0.0; batch.len() * n * self.channels];
        for (row, series) in x.chunks_exact_mut(n * self.channels).zip(batch) {
            row[..series.values.len()].copy_from_slice(&series.values);
        }
        let x = Tensor::from_vec(x, (batch.len(), n, self.channels), &Device::Cpu)?;
        let x = net
            .linear("embed", &x)?
            .broadcast_add(&places(n, net.config().width)?)?;
        let mut pooled = masked_mean(&net.forward(&x)?, &lengths)?;
        if let Some(rng) = rng.filter(|_| self.dropout > 0.0) {
            let keep = 1.0 - self.dropout;
            let mask: Vec<f32> = (0..pooled.elem_count())
                .map(|_| {
                    if rng.f64() < keep {
                        (1.0 / keep) as f32
                    } else {
                        0.0
                    }
                })
                .collect();
            pooled = (&pooled * Tensor::from_vec(mask, pooled.shape(), &Device::Cpu)?)?;
        }
        net.linear("head", &pooled)
    }

    fn targets(batch: &[&Series]) -> Result<Tensor> {
        let classes: Vec<u32> = batch.iter().map(|s| s.class as u32).collect();
        Tensor::new(&classes[..], &Device::Cpu)
    }

    /// Share of right answers, and mean loss.
    fn score(&self, net: &Net, data: &[Series]) -> Result<(f64, f64)> {
        let (mut right, mut loss) = (0usize, 0.0);
        for batch in data.chunks(TEST_BATCH) {
            let batch: Vec<&Series> = batch.iter().collect();
            let logits = self.logits(net, &batch, None)?;
            let nll = cross_entropy(&logits, &Self::targets(&batch)?)?.sum_all()?;
            loss += nll.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            let said = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
            let hits = said.iter().zip(&batch).filter(|(c, s)| **c as usize == s.class);
            right += hits.count();
        }
        Ok((right as f64 / data.len() as f64, loss / data.len() as f64))
    }
}

impl Problem for Classify {
    fn task(&self) -> Task {
        Task::Classify {
            channels: self.channels,
            classes: self.classes.clone(),
            scale: self.scale.clone(),
        }
    }

    fn items(&self) -> usize {
        self.train.len()
    }

    fn loss(&self, net: &Net, items: &[usize], rng: &mut fastrand::Rng) -> Result<Tensor> {
        let batch: Vec<&Series> = items.iter().map(|&i| &self.train[i]).collect();
        let logits = self.logits(net, &batch, Some(rng))?;
        cross_entropy(&logits, &Self::targets(&batch)?)?.mean_all()
    }

    fn validate(&self, net: &Net) -> Result<f64> {
        Ok(self.score(net, &self.validation)?.1)
    }

    fn test(&self, net: &Net) -> Result<Vec<(String, f64)>> {
        let (accuracy, loss) = self.score(net, &self.test)?;
        Ok(vec![
            ("accuracy".into(), accuracy),
            ("cross_entropy".into(), loss),
        ])
    }
}
