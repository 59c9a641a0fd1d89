//! A sparse autoencoder: its parts, and what it computes.

use antefix_kernels::dense::{Mat, MatMut, Sum, Threads, product};

use super::format::SaeError;

/// Rows whose pre-activations are held at once.
const ROWS: usize = 256;

/// Most values of a weight matrix: 2^31, 8 GiB.
const MOST: usize = 1 << 31;

/// How features come from pre-activations (section 3.8).
#[derive(Debug, Clone, PartialEq)]
pub enum Architecture {
    /// `relu(f_pre)`.
    Standard,
    /// The `k` largest of `f_pre`, then relu; ties to the lower feature.
    TopK {
        /// Features of a row at most.
        k: usize,
        /// Features are compared and kept times the norm of their decoder row, which the decoder takes back.
        rescale: bool,
    },
    /// `f_pre` where it is above 0 and above the feature's threshold. Also what a BatchTopK dictionary is once it is trained.
    JumpRelu {
        /// `[F]`
        threshold: Vec<f32>,
    },
    /// `relu(x (W_enc exp(r_mag)) + b_mag)` where `x W_enc + b_gate > 0`. [`Parts::b_enc`] is `b_gate`.
    Gated {
        /// `[F]`
        r_mag: Vec<f32>,
        /// `[F]`
        b_mag: Vec<f32>,
    },
}

impl Architecture {
    /// The name in files of SAELens.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::TopK { .. } => "topk",
            Self::JumpRelu { .. } => "jumprelu",
            Self::Gated { .. } => "gated",
        }
    }
}

/// What is done to a row before it is encoded, and undone after it is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// Nothing.
    None,
    /// The row is brought to the norm `sqrt(d_in)`.
    ConstantRescale,
    /// Mean 0 and standard deviation 1 (of `n - 1`, with 1e-5 added).
    LayerNorm,
}

/// The parts of a dictionary, as files hold them. Nothing is folded.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    /// Values of a row, `Hq * D` at the site `z`.
    pub d_in: usize,
    /// Features `F`.
    pub features: usize,
    /// How features come about.
    pub architecture: Architecture,
    /// Input normalisation.
    pub norm: Norm,
    /// Whether `b_dec` is subtracted from the input.
    pub apply_b_dec: bool,
    /// `[d_in, F]`
    pub w_enc: Vec<f32>,
    /// `[F]`; `b_gate` of a gated dictionary.
    pub b_enc: Vec<f32>,
    /// `[F, d_in]`
    pub w_dec: Vec<f32>,
    /// `[d_in]`
    pub b_dec: Vec<f32>,
}

/// A dictionary whose sizes fit together and whose values are numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Sae {
    parts: Parts,
    /// Norms of the decoder's rows, `[F]`.
    norms: Vec<f32>,
}

/// How a row was normalised: `x = scale * x' + shift`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Frame {
    /// Factor.
    pub scale: f32,
    /// Added to every value.
    pub shift: f32,
}

/// Rows as sparse codes: only features that are not 0, ascending.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Codes {
    /// Where each row ends in the two lists.
    pub ends: Vec<usize>,
    /// Features.
    pub ids: Vec<u32>,
    /// Their values.
    pub values: Vec<f32>,
    /// How each row was normalised.
    pub frames: Vec<Frame>,
}

impl Codes {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.ends.len()
    }

    /// Features of row `r` and their values.
    pub fn row(&self, r: usize) -> (&[u32], &[f32]) {
        let from = if r == 0 { 0 } else { self.ends[r - 1] };
        (&self.ids[from..self.ends[r]], &self.values[from..self.ends[r]])
    }

    /// Mean number of features of a row; 0 without rows.
    pub fn l0(&self) -> f64 {
        self.ids.len() as f64 / self.rows().max(1) as f64
    }

    /// Adds a row.
    pub fn push(&mut self, row: &[(u32, f32)], frame: Frame) {
        self.ids.extend(row.iter().map(|f| f.0));
        self.values.extend(row.iter().map(|f| f.1));
        self.ends.push(self.ids.len());
        self.frames.push(frame);
    }
}

fn norm(row: &[f32]) -> f64 {
    row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

impl Sae {
    /// Checks sizes and values.
    ///
    /// # Errors
    /// When sizes do not fit together, or a value is no number.
    pub fn new(parts: Parts) -> Result<Self, SaeError> {
        let Parts { d_in, features, .. } = parts;
        let whole = d_in.checked_mul(features).filter(|n| (1..=MOST).contains(n));
        let whole = whole.ok_or_else(|| SaeError::Setting {
            key: "d_in, d_sae",
            got: format!("{d_in}, {features}"),
            want: "from 1, with a product up to 2^31".into(),
        })?;
        let mut tensors = vec![
            ("W_enc", &parts.w_enc, whole),
            ("b_enc", &parts.b_enc, features),
            ("W_dec", &parts.w_dec, whole),
            ("b_dec", &parts.b_dec, d_in),
        ];
        match &parts.architecture {
            Architecture::Standard => {}
            Architecture::TopK { k, .. } => {
                if !(1..=features).contains(k) {
                    return Err(SaeError::Setting {
                        key: "k",
                        got: k.to_string(),
                        want: format!("1 to {features}, the number of features"),
                    });
                }
            }
            Architecture::JumpRelu { threshold } => tensors.push(("threshold", threshold, features)),
            Architecture::Gated { r_mag, b_mag } => {
                tensors.push(("r_mag", r_mag, features));
                tensors.push(("b_mag", b_mag, features));
            }
        }
        for (name, values, want) in tensors {
            if values.len() != want {
                return Err(SaeError::Shape {
                    name: name.into(),
                    got: format!("{} values", values.len()),
                    want: format!("{want} for d_in {d_in} and {features} features"),
                });
            }
            if !values.iter().all(|x| x.is_finite()) {
                return Err(SaeError::Number(name.into()));
            }
        }
        let norms = parts
            .w_dec
            .chunks_exact(d_in)
            .map(|row| norm(row) as f32)
            .collect();
        Ok(Self { parts, norms })
    }

    /// Its parts.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Values of a row.
    pub fn d_in(&self) -> usize {
        self.parts.d_in
    }

    /// Number of features `F`.
    pub fn features(&self) -> usize {
        self.parts.features
    }

    /// Norms of the decoder's rows, `[F]`.
    pub fn decoder_norms(&self) -> &[f32] {
        &self.norms
    }

    /// The decoder's row of a feature, `[d_in]`.
    ///
    /// # Panics
    /// When there is no such feature.
    pub fn direction(&self, feature: usize) -> &[f32] {
        &self.parts.w_dec[feature * self.parts.d_in..][..self.parts.d_in]
    }

    /// What the encoder's matrix is multiplied with: the row normalised, without `b_dec` where that is taken off.
    pub fn input(&self, x: &[f32], out: &mut [f32]) -> Frame {
        let d = x.len() as f32;
        let frame = match self.parts.norm {
            Norm::None => Frame {
                scale: 1.0,
                shift: 0.0,
            },
            Norm::ConstantRescale => Frame {
                // A row of zeros stays one.
                scale: match norm(x) as f32 / d.sqrt() {
                    0.0 => 1.0,
                    scale => scale,
                },
                shift: 0.0,
            },
            Norm::LayerNorm => {
                let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / f64::from(d);
                let squares: f64 = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
                Frame {
                    scale: (squares / f64::from(d - 1.0).max(1.0)).sqrt() as f32 + 1e-5,
                    shift: mean as f32,
                }
            }
        };
        let plain = self.parts.norm == Norm::None;
        for ((out, x), b) in out.iter_mut().zip(x).zip(&self.parts.b_dec) {
            let x = if plain {
                *x
            } else {
                (x - frame.shift) / frame.scale
            };
            *out = if self.parts.apply_b_dec { x - b } else { x };
        }
        frame
    }

    /// Features of a row out of `h = x' W_enc`, `[F]`, where `x'` is what [`Sae::input`] made; ascending, without zeros.
    pub fn activate(&self, h: &[f32], out: &mut Vec<(u32, f32)>) {
        out.clear();
        let pre = |j: usize| h[j] + self.parts.b_enc[j];
        let all = 0..self.parts.features;
        match &self.parts.architecture {
            Architecture::Standard | Architecture::JumpRelu { .. } | Architecture::Gated { .. } => {
                out.extend(all.filter_map(|j| Some((j as u32, self.one(j, h[j])?))));
            }
            Architecture::TopK { k, rescale } => {
                let scaled = |j: usize| if *rescale { pre(j) * self.norms[j] } else { pre(j) };
                // What is not above 0 is cut by the relu, so that it need not compete.
                out.extend(all.map(|j| (j as u32, scaled(j))).filter(|f| f.1 > 0.0));
                largest(out, *k);
            }
        }
    }

    /// One feature out of its product `h`, or `None` if it is 0. Where features compete it takes all of them: `None` always.
    pub fn one(&self, feature: usize, h: f32) -> Option<f32> {
        let pre = h + self.parts.b_enc[feature];
        let value = match &self.parts.architecture {
            Architecture::Standard => pre,
            Architecture::JumpRelu { threshold } if pre > threshold[feature] => pre,
            Architecture::Gated { r_mag, b_mag } if pre > 0.0 => h * r_mag[feature].exp() + b_mag[feature],
            _ => 0.0,
        };
        (value > 0.0).then_some(value)
    }

    /// The codes of `x: [rows, d_in]`.
    ///
    /// # Panics
    /// When `x` is no whole number of rows.
    pub fn encode(&self, x: &[f32], threads: Threads) -> Codes {
        let (d, features) = (self.parts.d_in, self.parts.features);
        assert!(x.len().is_multiple_of(d), "whole rows of {d} values");
        let mut codes = Codes::default();
        let mut inputs = vec![0.0; ROWS * d];
        let mut h = vec![0.0; ROWS * features];
        let mut row = Vec::new();
        for block in x.chunks(ROWS * d) {
            let rows = block.len() / d;
            let frames: Vec<Frame> = block
                .chunks_exact(d)
                .zip(inputs.chunks_exact_mut(d))
                .map(|(x, to)| self.input(x, to))
                .collect();
            product(
                MatMut::new(&mut h, rows, features),
                Sum::Replace,
                1.0,
                Mat::new(&inputs, rows, d),
                Mat::new(&self.parts.w_enc, d, features),
                threads,
            );
            for (h, frame) in h.chunks_exact(features).zip(frames) {
                self.activate(h, &mut row);
                codes.push(&row, frame);
            }
        }
        codes
    }

    /// What a value of feature `j` is worth in front of its decoder row.
    pub fn weight(&self, feature: u32, value: f32) -> f32 {
        match self.parts.architecture {
            Architecture::TopK { rescale: true, .. } if self.norms[feature as usize] > 0.0 => {
                value / self.norms[feature as usize]
            }
            _ => value,
        }
    }

    /// The rows that `codes` stand for, `[rows, d_in]`.
    pub fn decode(&self, codes: &Codes) -> Vec<f32> {
        let d = self.parts.d_in;
        let mut out = Vec::with_capacity(codes.rows() * d);
        for (r, frame) in codes.frames.iter().enumerate() {
            let start = out.len();
            out.extend_from_slice(&self.parts.b_dec);
            let row = &mut out[start..];
            let (ids, values) = codes.row(r);
            for (&j, &value) in ids.iter().zip(values) {
                add(row, self.weight(j, value), self.direction(j as usize));
            }
            if self.parts.norm != Norm::None {
                row.iter_mut().for_each(|x| *x = *x * frame.scale + frame.shift);
            }
        }
        out
    }

    /// Changes feature `j` of a row from `was` to `is`, in the cheap form of section 3.5: `out = x + (is - was) W_dec[j]`. What the
    /// dictionary does not explain stays as it is; nothing is added where nothing changes.
    pub fn edit(&self, x: &mut [f32], frame: Frame, feature: u32, was: f32, is: f32) {
        let by = self.weight(feature, is - was) * frame.scale;
        if by != 0.0 {
            add(x, by, self.direction(feature as usize));
        }
    }

    /// The same dictionary with decoder rows of norm 1: the norms go into the encoder, and thresholds with them. Rows of zeros stay.
    ///
    /// # Errors
    /// Of a TopK dictionary that compares features without the norms: others would be the largest.
    pub fn fold_decoder_norms(mut self) -> Result<Self, SaeError> {
        let factors: Vec<f32> = self
            .norms
            .iter()
            .map(|&n| if n > 0.0 { n } else { 1.0 })
            .collect();
        let p = &mut self.parts;
        let each = |values: &mut [f32]| values.iter_mut().zip(&factors).for_each(|(x, n)| *x *= n);
        match &mut p.architecture {
            Architecture::Standard | Architecture::TopK { rescale: true, .. } => {}
            Architecture::TopK { .. } => {
                return Err(SaeError::Setting {
                    key: "rescale_acts_by_decoder_norm",
                    got: "false".into(),
                    want: "true: the k largest features would be others after the norms are folded".into(),
                });
            }
            Architecture::JumpRelu { threshold } => each(threshold),
            Architecture::Gated { b_mag, .. } => each(b_mag),
        }
        each(&mut p.b_enc);
        p.w_enc.chunks_exact_mut(p.features).for_each(each);
        for (row, n) in p.w_dec.chunks_exact_mut(p.d_in).zip(&factors) {
            row.iter_mut().for_each(|x| *x /= n);
        }
        Self::new(self.parts)
    }

    /// The same dictionary for inputs that were not multiplied by `scale`: what files with `expected_average_only_in` need.
    ///
    /// # Errors
    /// When `scale` is not above 0.
    pub fn fold_input_scale(mut self, scale: f32) -> Result<Self, SaeError> {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(SaeError::Setting {
                key: "scale",
                got: scale.to_string(),
                want: "above 0".into(),
            });
        }
        let p = &mut self.parts;
        p.w_enc.iter_mut().for_each(|x| *x *= scale);
        p.w_dec.iter_mut().for_each(|x| *x /= scale);
        p.b_dec.iter_mut().for_each(|x| *x /= scale);
        Self::new(self.parts)
    }

    /// The same dictionary for the model's own `z`, if it was trained on `z - offset`: TransformerLens folds the biases of values into
    /// what comes after `z` (section 3.10). `offset: [d_in]`.
    ///
    /// # Errors
    /// When rows are normalised, where a constant cannot be taken along, or `offset` has another size.
    pub fn fold_offset(mut self, offset: &[f32]) -> Result<Self, SaeError> {
        let p = &mut self.parts;
        if p.norm != Norm::None {
            return Err(SaeError::Setting {
                key: "normalize_activations",
                got: "a norm".into(),
                want: "none, if value biases are folded".into(),
            });
        }
        if offset.len() != p.d_in {
            return Err(SaeError::Shape {
                name: "offset".into(),
                got: offset.len().to_string(),
                want: p.d_in.to_string(),
            });
        }
        if !p.apply_b_dec {
            for (o, row) in offset.iter().zip(p.w_enc.chunks_exact(p.features)) {
                p.b_enc.iter_mut().zip(row).for_each(|(b, w)| *b -= o * w);
            }
        }
        p.b_dec.iter_mut().zip(offset).for_each(|(b, o)| *b += o);
        Self::new(self.parts)
    }
}

/// `row += by * values`.
fn add(row: &mut [f32], by: f32, values: &[f32]) {
    row.iter_mut().zip(values).for_each(|(x, v)| *x += by * v);
}

/// Keeps the `k` largest, ties to the lower feature, in ascending order of features.
pub fn largest(row: &mut Vec<(u32, f32)>, k: usize) {
    if row.len() > k {
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if k > 0 {
            row.select_nth_unstable_by(k - 1, order);
        }
        row.truncate(k);
        row.sort_unstable_by_key(|f| f.0);
    }
}
