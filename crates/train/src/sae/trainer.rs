//! Steps of training: gradients, the decoder's projection, Adam, thresholds, and features that are drawn anew.

use antefix_papers::attention_sae::{Architecture, Norm, Parts, Sae, SaeError};
use rayon::prelude::*;
use serde::Serialize;

use super::config::{Loss, SaeConfig};
use super::gradient::gradients;
use super::params::{Params, normalise, uniform};
use crate::harvest::{HarvestError, Rows};

/// Share by which the threshold of a batch moves the remembered one.
const THRESHOLD_RATE: f64 = 0.01;

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Report {
    /// Steps done, this one included.
    pub step: u64,
    /// The whole loss, of scaled rows.
    pub loss: f64,
    /// Mean squared error of a scaled row, summed over its values.
    pub mse: f64,
    /// `1 - mse / variance` within the batch.
    pub explained: f64,
    /// Mean number of active features.
    pub l0: f64,
    /// Share of features that did not fire in the last `dead_after` steps.
    pub dead: f64,
    /// Adam's step size.
    pub lr: f64,
}

/// A dictionary in training. Everything that a later step depends on is in it, and in a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Trainer {
    pub(super) cfg: SaeConfig,
    pub(super) params: Params<f32>,
    /// Adam's moments.
    pub(super) moments: [Params<f32>; 2],
    pub(super) at: Place,
    /// Step at which each feature fired last, `[F]`.
    pub(super) fired: Vec<u64>,
    /// Times that each feature fired since the last check, `[F]`.
    pub(super) fires: Vec<u64>,
}

/// The numbers beside the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, serde::Deserialize)]
pub(super) struct Place {
    /// Steps done.
    pub(super) step: u64,
    /// Steps since the last warm-up began.
    pub(super) since: u64,
    /// Rows since the last check for dead features.
    pub(super) rows: u64,
    /// Checks made.
    pub(super) checks: u64,
    /// Features drawn anew so far.
    pub(super) drawn: u64,
    /// Bits of the factor of the inputs.
    pub(super) scale: u32,
    /// Bits of the remembered threshold (`batchtopk`); of NaN before the first step.
    pub(super) threshold: u64,
}

impl Trainer {
    /// Starts: `rows` are the first rows of the data, from which the factor of the inputs and the first `b_dec` come.
    ///
    /// # Panics
    /// When there are no rows, or no whole ones.
    pub fn new(cfg: SaeConfig, rows: &[f32]) -> Self {
        let d = cfg.d_in;
        assert!(
            !rows.is_empty() && rows.len().is_multiple_of(d),
            "whole rows of {d} values"
        );
        let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let mean = rows.chunks_exact(d).map(norm).sum::<f64>() / (rows.len() / d) as f64;
        let scale = match cfg.normalise && mean > 0.0 {
            true => ((d as f64).sqrt() / mean) as f32,
            false => 1.0,
        };
        let scaled: Vec<f32> = rows.iter().map(|x| x * scale).collect();
        let params = Params::start(&cfg, &scaled);
        let zeros = Params::zeros(&cfg);
        Self {
            fired: vec![0; cfg.features],
            fires: vec![0; cfg.features],
            params,
            moments: [zeros.clone(), zeros],
            at: Place {
                step: 0,
                since: 0,
                rows: 0,
                checks: 0,
                drawn: 0,
                scale: scale.to_bits(),
                threshold: f64::NAN.to_bits(),
            },
            cfg,
        }
    }

    /// What is trained.
    pub fn config(&self) -> &SaeConfig {
        &self.cfg
    }

    /// The parameters, of scaled rows.
    pub fn params(&self) -> &Params<f32> {
        &self.params
    }

    /// Adam's first and second moments.
    pub fn moments(&self) -> &[Params<f32>; 2] {
        &self.moments
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.at.step
    }

    /// The factor by which rows are multiplied.
    pub fn scale(&self) -> f32 {
        f32::from_bits(self.at.scale)
    }

    /// The remembered threshold of `batchtopk`, of scaled rows.
    pub fn threshold(&self) -> Option<f64> {
        Some(f64::from_bits(self.at.threshold)).filter(|t| !t.is_nan())
    }

    /// Features drawn anew so far.
    pub fn drawn(&self) -> u64 {
        self.at.drawn
    }

    /// Whether a feature has not fired in the last `dead_after` steps, `[F]`.
    pub fn dead(&self) -> Vec<bool> {
        let since = |last: &u64| self.at.step.saturating_sub(*last) >= self.cfg.dead_after;
        self.fired.iter().map(since).collect()
    }

    /// One step on `rows: [n, d_in]`.
    ///
    /// # Panics
    /// When there are no rows, or no whole ones.
    pub fn step(&mut self, rows: &[f32]) -> Report {
        let d = self.cfg.d_in;
        let scale = self.scale();
        let x: Vec<f32> = rows.iter().map(|x| x * scale).collect();
        let dead = self.dead();
        let mut got = gradients(&self.cfg, &self.params, &x, &dead);
        project(&mut self.params.w_dec, &mut got.gradients.w_dec, d);
        let lr = self.cfg.lr_at(self.at.step, self.at.since);
        self.at.step += 1;
        self.at.since += 1;
        self.at.rows += (rows.len() / d) as u64;
        self.adam(&got.gradients, lr);
        if matches!(self.cfg.loss, Loss::TopK { .. } | Loss::BatchTopK { .. }) {
            // These compare features with each other, so that what is saved must be what is trained: norms cannot be folded later.
            self.params.w_dec.par_chunks_mut(d).for_each(|row| {
                normalise(row);
            });
        }
        if let Some(least) = got.least {
            let threshold = match self.threshold() {
                None => least,
                Some(old) => (1.0 - THRESHOLD_RATE) * old + THRESHOLD_RATE * least,
            };
            self.at.threshold = threshold.to_bits();
        }
        for (j, n) in got.fires.iter().enumerate() {
            if *n > 0 {
                self.fired[j] = self.at.step;
                self.fires[j] += u64::from(*n);
            }
        }
        let silent = dead.iter().filter(|d| **d).count();
        Report {
            step: self.at.step,
            loss: got.loss,
            mse: got.mse,
            explained: if got.variance > 0.0 {
                1.0 - got.mse / got.variance
            } else {
                0.0
            },
            l0: got.l0,
            dead: silent as f64 / self.cfg.features as f64,
            lr,
        }
    }

    /// Adam's update with bias correction; eps 1e-8.
    fn adam(&mut self, gradients: &Params<f32>, lr: f64) {
        let (b1, b2) = self.cfg.betas;
        let t = self.at.step.min(1 << 30) as i32;
        let step = (lr / (1.0 - b1.powi(t))) as f32;
        let root = (1.0 - b2.powi(t)).sqrt() as f32;
        let (b1, b2) = (b1 as f32, b2 as f32);
        let [first, second] = &mut self.moments;
        let all = self.params.named_mut().into_iter().zip(gradients.named());
        let moments = first.named_mut().into_iter().zip(second.named_mut());
        for (((_, p), (_, g)), ((_, m), (_, v))) in all.zip(moments) {
            const BLOCK: usize = 1 << 12;
            p.par_chunks_mut(BLOCK)
                .zip(g.par_chunks(BLOCK))
                .zip(m.par_chunks_mut(BLOCK))
                .zip(v.par_chunks_mut(BLOCK))
                .for_each(|(((p, g), m), v)| {
                    for i in 0..p.len() {
                        m[i] = b1 * m[i] + (1.0 - b1) * g[i];
                        v[i] = b2 * v[i] + (1.0 - b2) * g[i] * g[i];
                        p[i] -= step * m[i] / (v[i].sqrt() / root + 1e-8);
                    }
                });
        }
    }

    /// Looks for dead features if it is time to, and draws them anew out of a shard of `rows`, another one at every check. Returns how many, if
    /// it looked.
    ///
    /// # Errors
    /// When the shard cannot be read.
    pub fn resample_if_due(&mut self, rows: &Rows) -> Result<Option<usize>, HarvestError> {
        if !self.wants_resample() {
            return Ok(None);
        }
        let shard = rows.rows(self.at.step as usize % rows.shards())?;
        Ok(Some(self.resample(&shard)))
    }

    /// Whether it is time to look for dead features: the caller then brings rows to [`Trainer::resample`].
    pub fn wants_resample(&self) -> bool {
        let every = self.cfg.resample_every;
        every > 0
            && self.at.step > 0
            && self.at.step.is_multiple_of(every)
            && self.at.checks < self.cfg.resample_most
            && self.at.rows > 0
    }

    /// Draws dead features anew (section 3.3) out of `rows: [n, d_in]`: each becomes a row that is explained badly, chosen with a
    /// probability that follows its squared squared error, without replacement. Encoder columns get a fifth of the mean norm of the living, moments
    /// become 0, and the warm-up starts again. Returns how many.
    ///
    /// # Panics
    /// When there are no rows, or no whole ones.
    pub fn resample(&mut self, rows: &[f32]) -> usize {
        let d = self.cfg.d_in;
        let rate = |n: &u64| *n as f64 / self.at.rows.max(1) as f64;
        let dead: Vec<usize> = (0..self.cfg.features)
            .filter(|&j| rate(&self.fires[j]) <= self.cfg.resample_rate)
            .collect();
        let check = self.at.checks;
        (self.at.checks, self.at.rows) = (check + 1, 0);
        self.fires.fill(0);
        let scale = self.scale();
        let x: Vec<f32> = rows.iter().map(|x| x * scale).collect();
        let mut errors = Vec::with_capacity(x.len() / d);
        for block in x.chunks(d << 10) {
            errors.extend(gradients(&self.cfg, &self.params, block, &[]).errors);
        }
        let worst = errors.iter().copied().fold(0.0, f64::max);
        if dead.is_empty() || worst < 1e-6 {
            return 0;
        }
        // Without replacement: the largest of ln(u) / w, one key a row (Efraimidis and Spirakis).
        let key = |(r, e): (usize, &f64)| {
            let u = uniform(self.cfg.seed, 100 + check, r as u64).max(f64::MIN_POSITIVE);
            (u.ln() / (e * e).max(f64::MIN_POSITIVE), r)
        };
        let mut order: Vec<(f64, usize)> = errors.iter().enumerate().map(key).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut is_dead = vec![false; self.cfg.features];
        dead.iter().for_each(|&j| is_dead[j] = true);
        let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let living: Vec<f64> = self
            .params
            .w_enc
            .chunks_exact(d)
            .zip(&is_dead)
            .filter(|(_, dead)| !**dead)
            .map(|(row, _)| norm(row))
            .collect();
        let mean = if living.is_empty() {
            1.0
        } else {
            living.iter().sum::<f64>() / living.len() as f64
        };
        let mut drawn = 0;
        for (&j, &(_, r)) in dead.iter().zip(&order) {
            let mut u: Vec<f32> = x[r * d..][..d]
                .iter()
                .zip(&self.params.b_dec)
                .map(|(x, b)| x - b)
                .collect();
            if normalise(&mut u) == 0.0 {
                continue;
            }
            self.params.w_dec[j * d..][..d].copy_from_slice(&u);
            let to = &mut self.params.w_enc[j * d..][..d];
            to.iter_mut()
                .zip(&u)
                .for_each(|(w, u)| *w = (0.2 * mean) as f32 * u);
            self.params.b_enc[j] = 0.0;
            for moment in &mut self.moments {
                moment.w_enc[j * d..][..d].fill(0.0);
                moment.w_dec[j * d..][..d].fill(0.0);
                moment.b_enc[j] = 0.0;
                for own in [&mut moment.scale, &mut moment.b_mag] {
                    own.get_mut(j).into_iter().for_each(|x| *x = 0.0);
                }
            }
            self.fired[j] = self.at.step;
            drawn += 1;
        }
        if drawn > 0 {
            self.at.since = 0;
            self.at.drawn += drawn as u64;
        }
        drawn
    }

    /// The dictionary for rows as they are: the factor of the inputs and the decoder's norms are folded. `batchtopk` becomes `jumprelu`
    /// with the remembered threshold.
    ///
    /// # Errors
    /// When training left values that are no numbers.
    pub fn export(&self) -> Result<Sae, SaeError> {
        let (d, features) = (self.cfg.d_in, self.cfg.features);
        let p = &self.params;
        let architecture = match self.cfg.loss {
            Loss::Standard { .. } => Architecture::Standard,
            Loss::TopK { k, .. } => Architecture::TopK { k, rescale: false },
            Loss::BatchTopK { .. } => Architecture::JumpRelu {
                threshold: vec![self.threshold().unwrap_or(0.0) as f32; features],
            },
            Loss::JumpRelu { .. } => Architecture::JumpRelu {
                threshold: p.scale.iter().map(|x| x.exp()).collect(),
            },
            Loss::Gated { .. } => Architecture::Gated {
                r_mag: p.scale.clone(),
                b_mag: p.b_mag.clone(),
            },
        };
        let turned = (0..d).flat_map(|i| (0..features).map(move |j| p.w_enc[j * d + i]));
        let sae = Sae::new(Parts {
            d_in: d,
            features,
            architecture,
            norm: Norm::None,
            apply_b_dec: true,
            w_enc: turned.collect(),
            b_enc: p.b_enc.clone(),
            w_dec: p.w_dec.clone(),
            b_dec: p.b_dec.clone(),
        })?;
        let sae = sae.fold_input_scale(self.scale())?;
        match self.cfg.loss {
            // Its rows have one norm, that of the factor, and folding would round each a little differently.
            Loss::TopK { .. } => Ok(sae),
            _ => sae.fold_decoder_norms(),
        }
    }
}

/// Step 2 and 3 of section 3.1: the part of each gradient that is parallel to its row, brought to norm 1, goes away.
fn project(w_dec: &mut [f32], gradient: &mut [f32], d: usize) {
    w_dec
        .par_chunks_mut(d)
        .zip(gradient.par_chunks_mut(d))
        .for_each(|(w, g)| {
            normalise(w);
            let along: f64 = w
                .iter()
                .zip(&*g)
                .map(|(w, g)| f64::from(*w) * f64::from(*g))
                .sum();
            g.iter_mut().zip(&*w).for_each(|(g, w)| *g -= along as f32 * w);
        });
}
