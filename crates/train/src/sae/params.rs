//! The trained numbers.

use antefix_kernels::dense::Real;

use super::config::{Bias, Init, Loss, SaeConfig};

/// Parameters, gradients or moments of a dictionary in training. Rows of both matrices belong to features.
#[derive(Debug, Clone, PartialEq)]
pub struct Params<T> {
    /// Encoder, transposed: `[F, d_in]`.
    pub w_enc: Vec<T>,
    /// `[F, d_in]`
    pub w_dec: Vec<T>,
    /// `[F]`; `b_gate` of a gated dictionary.
    pub b_enc: Vec<T>,
    /// `[d_in]`
    pub b_dec: Vec<T>,
    /// `[F]`: natural log of the thresholds of `jumprelu`, `r_mag` of `gated`; else empty.
    pub scale: Vec<T>,
    /// `[F]`: `b_mag` of `gated`; else empty.
    pub b_mag: Vec<T>,
}

/// A number in `[0, 1)` that depends on its arguments alone.
pub(crate) fn uniform(seed: u64, site: u64, i: u64) -> f64 {
    // SplitMix64 over a mixed key: a counter generator.
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let key = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15))
        ^ mix(site.wrapping_mul(0xd1b5_4a32_d192_ed03).wrapping_add(1));
    (mix(key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))) >> 11) as f64 / (1u64 << 53) as f64
}

/// Brings a row to norm 1; a row of zeros stays. Returns the norm.
pub(crate) fn normalise<T: Real>(row: &mut [T]) -> f64 {
    let norm = row.iter().map(|x| x.f64() * x.f64()).sum::<f64>().sqrt();
    if norm > 0.0 {
        let by = T::of(1.0 / norm);
        row.iter_mut().for_each(|x| *x *= by);
    }
    norm
}

impl<T: Real> Params<T> {
    /// Zeros of the sizes of `cfg`.
    pub fn zeros(cfg: &SaeConfig) -> Self {
        let (d, f) = (cfg.d_in, cfg.features);
        let own = |has: bool| vec![T::zero(); if has { f } else { 0 }];
        Self {
            w_enc: vec![T::zero(); f * d],
            w_dec: vec![T::zero(); f * d],
            b_enc: vec![T::zero(); f],
            b_dec: vec![T::zero(); d],
            scale: own(matches!(cfg.loss, Loss::JumpRelu { .. } | Loss::Gated { .. })),
            b_mag: own(matches!(cfg.loss, Loss::Gated { .. })),
        }
    }

    /// The start: uniform weights of Kaiming's width, decoder rows of norm 1 (section 3.1). `rows` are the first rows, scaled.
    pub fn start(cfg: &SaeConfig, rows: &[T]) -> Self {
        let (d, f) = (cfg.d_in, cfg.features);
        let mut p = Self::zeros(cfg);
        let bound = (6.0 / d as f64).sqrt();
        for (i, x) in p.w_dec.iter_mut().enumerate() {
            *x = T::of((2.0 * uniform(cfg.seed, 1, i as u64) - 1.0) * bound);
        }
        for row in p.w_dec.chunks_exact_mut(d) {
            normalise(row);
        }
        match cfg.init {
            Init::Tied => p.w_enc.copy_from_slice(&p.w_dec),
            Init::Independent => {
                // The paper's matrix lies as [d_in, F], of which the library takes F for the fan-in.
                let bound = (6.0 / f as f64).sqrt();
                for (i, x) in p.w_enc.iter_mut().enumerate() {
                    *x = T::of((2.0 * uniform(cfg.seed, 2, i as u64) - 1.0) * bound);
                }
            }
        }
        if matches!(cfg.loss, Loss::JumpRelu { .. }) {
            p.scale.fill(T::of(0.01f64.ln()));
        }
        if cfg.bias == Bias::Mean && !rows.is_empty() {
            let n = (rows.len() / d) as f64;
            for (i, b) in p.b_dec.iter_mut().enumerate() {
                let sum: f64 = rows.iter().skip(i).step_by(d).map(|x| x.f64()).sum();
                *b = T::of(sum / n);
            }
        }
        p
    }

    /// Every tensor with its name.
    pub fn named(&self) -> [(&'static str, &Vec<T>); 6] {
        [
            ("w_enc", &self.w_enc),
            ("w_dec", &self.w_dec),
            ("b_enc", &self.b_enc),
            ("b_dec", &self.b_dec),
            ("scale", &self.scale),
            ("b_mag", &self.b_mag),
        ]
    }

    /// The same, to be written.
    pub fn named_mut(&mut self) -> [(&'static str, &mut Vec<T>); 6] {
        [
            ("w_enc", &mut self.w_enc),
            ("w_dec", &mut self.w_dec),
            ("b_enc", &mut self.b_enc),
            ("b_dec", &mut self.b_dec),
            ("scale", &mut self.scale),
            ("b_mag", &mut self.b_mag),
        ]
    }
}
