//! The trained predictor of where chunks begin: its file, and what it says of keys.
//!
//! A file is in the safetensors format, all tensors f32, with these texts in its metadata:
//!
//! | key | value |
//! |---|---|
//! | `format` | `antefix dhsa predictor 1` |
//! | `variant` | `attention` or `convolution` |
//! | `channels` | `C`: KV heads times head dimension of the model |
//! | `window` | `w`: keys on each side of a gap, 1 to 64 |
//! | `heads` | of the attention, a divisor of `C`; for the variant `attention` only |
//! | `rope` | `post`: keys are taken after RoPE, as they stand in the cache |
//!
//! Other keys, such as the name of the model, may be there and are not read. Tensors, `[out, in]`:
//! `hidden.weight [H, 4 E + 1]`, `hidden.bias [H]`, `score.weight [1, H]`, `score.bias [1]`, and
//! - `attention`, `E = C`: `in.weight [3 C, C]` and `in.bias [3 C]` (queries, keys, values), `out.weight [C, C]`, `out.bias [C]`,
//!   `norm.weight [C]`, `norm.bias [C]`;
//! - `convolution`: `depth.weight [C, w]`, `depth.bias [C]`, `point.weight [E, C]`, `point.bias [E]`.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

/// The first of a file's texts.
pub const FORMAT: &str = "antefix dhsa predictor 1";

/// The longest file that is read, bytes.
pub const LONGEST: u64 = 64 << 20;

/// The longest header, bytes.
const HEADER: u64 = 1 << 20;

/// Most channels.
const CHANNELS: usize = 1 << 16;

/// Most keys on one side of a gap.
pub const SIDE: usize = 64;

/// Why a file is no predictor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PredictorError {
    /// Longer than is read.
    #[error("the file has {bytes} bytes, at most {LONGEST} are read")]
    Long {
        /// Its length.
        bytes: u64,
    },
    /// No file of this format.
    #[error("it is no whole safetensors file: {0}")]
    Broken(String),
    /// A text of the metadata is missing or wrong.
    #[error("`{key}` in its metadata is {got}, but must be {want}")]
    Text {
        /// Which.
        key: &'static str,
        /// What stands there.
        got: String,
        /// What may stand there.
        want: String,
    },
    /// A tensor is missing.
    #[error("tensor `{0}` is missing")]
    Missing(&'static str),
    /// A tensor that the variant does not have.
    #[error("tensor `{0}` is none of this variant's")]
    Unknown(String),
    /// A tensor of another type.
    #[error("tensor `{name}` is {got}, but must be F32")]
    Type {
        /// Which.
        name: &'static str,
        /// Its type.
        got: String,
    },
    /// A tensor of another shape.
    #[error("tensor `{name}` is {got}, but must be {want}")]
    Shape {
        /// Which.
        name: &'static str,
        /// Its shape.
        got: String,
        /// The shape that fits the others.
        want: String,
    },
    /// A tensor with infinite values or NaN.
    #[error("tensor `{0}` holds values that are no numbers")]
    Number(&'static str),
}

/// `y = W x + b`.
struct Linear {
    /// `[in, out]`, so that a product adds whole rows.
    weight: Vec<f32>,
    /// `[out]`
    bias: Vec<f32>,
}

impl Linear {
    fn new(weight: &[f32], bias: Vec<f32>) -> Self {
        let (outs, ins) = (bias.len(), weight.len() / bias.len());
        let turned = (0..ins).flat_map(|i| (0..outs).map(move |o| weight[o * ins + i]));
        Self {
            weight: turned.collect(),
            bias,
        }
    }

    /// Of `x: [in]`: `[out]`.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = self.bias.clone();
        for (x, row) in x.iter().zip(self.weight.chunks_exact(y.len())) {
            y.iter_mut().zip(row).for_each(|(y, w)| *y += x * w);
        }
        y
    }
}

/// What turns the keys of a side into one vector.
enum Encoder {
    Attention {
        heads: usize,
        qkv: Linear,
        out: Linear,
        gain: Vec<f32>,
        shift: Vec<f32>,
    },
    Convolution {
        /// `[w, C]`
        depth: Vec<f32>,
        depth_bias: Vec<f32>,
        point: Linear,
    },
}

/// A small network that looks at the keys left and right of a gap and says whether a chunk should end there.
pub struct Predictor {
    channels: usize,
    window: usize,
    encoder: Encoder,
    hidden: Linear,
    score: Linear,
}

impl fmt::Debug for Predictor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Predictor")
            .field("channels", &self.channels)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

impl Predictor {
    /// Reads a file.
    ///
    /// # Errors
    /// See [`PredictorError`].
    pub fn read(bytes: &[u8]) -> Result<Self, PredictorError> {
        let file = File::open(bytes)?;
        file.text("format", FORMAT, |t| (t == FORMAT).then_some(()))?;
        file.text("rope", "`post`", |t| (t == "post").then_some(()))?;
        let channels = file.number("channels", 1, CHANNELS)?;
        let window = file.number("window", 1, SIDE)?;
        let variant = file.text("variant", "`attention` or `convolution`", |t| {
            ["attention", "convolution"].into_iter().find(|v| *v == t)
        })?;
        let (encoder, width) = if variant == "attention" {
            let want = format!("a divisor of {channels}");
            let heads = file.text("heads", &want, |t| {
                t.parse()
                    .ok()
                    .filter(|&h: &usize| h > 0 && channels.is_multiple_of(h))
            })?;
            let encoder = Encoder::Attention {
                heads,
                qkv: file.linear(["in.weight", "in.bias"], Some(3 * channels), channels)?,
                out: file.linear(["out.weight", "out.bias"], Some(channels), channels)?,
                gain: file.tensor("norm.weight", &[channels])?,
                shift: file.tensor("norm.bias", &[channels])?,
            };
            (encoder, channels)
        } else {
            let depth = file.tensor("depth.weight", &[channels, window])?;
            let point = file.linear(["point.weight", "point.bias"], None, channels)?;
            let width = point.bias.len();
            let encoder = Encoder::Convolution {
                depth: (0..window)
                    .flat_map(|t| (0..channels).map(move |c| (c, t)))
                    .map(|(c, t)| depth[c * window + t])
                    .collect(),
                depth_bias: file.tensor("depth.bias", &[channels])?,
                point,
            };
            (encoder, width)
        };
        let hidden = file.linear(["hidden.weight", "hidden.bias"], None, 4 * width + 1)?;
        let score = file.linear(["score.weight", "score.bias"], Some(1), hidden.bias.len())?;
        file.nothing_else(variant)?;
        Ok(Self {
            channels,
            window,
            encoder,
            hidden,
            score,
        })
    }

    /// Values of a key, all KV heads together.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Keys on each side of a gap.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Logits that a chunk ends with token `j`, for each `j` of `gaps`. `x: [n, C]` are keys after RoPE; zeros stand in for those that
    /// are missing at the ends.
    pub fn logits(&self, x: &[f32], gaps: Range<usize>) -> Vec<f32> {
        let sides: Vec<(Vec<f32>, Vec<f32>)> = match &self.encoder {
            Encoder::Attention {
                heads,
                qkv,
                out,
                gain,
                shift,
            } => {
                let rows: Vec<Vec<f32>> = x.chunks_exact(self.channels).map(|x| qkv.apply(x)).collect();
                gaps.map(|gap| {
                    let around: Vec<&[f32]> = (0..2 * self.window)
                        .map(|i| (gap + 1 + i).checked_sub(self.window).and_then(|j| rows.get(j)))
                        .map(|row| row.map_or(&qkv.bias[..], Vec::as_slice))
                        .collect();
                    let y: Vec<Vec<f32>> = (0..2 * self.window)
                        .map(|i| norm(&out.apply(&attended(&around, i, *heads)), gain, shift))
                        .collect();
                    (mean(&y[..self.window]), mean(&y[self.window..]))
                })
                .collect()
            }
            Encoder::Convolution {
                depth,
                depth_bias,
                point,
            } => {
                // The right side of a gap is the left side of the one `w` tokens on: each is encoded once.
                let side = |from: isize| {
                    let mut y = depth_bias.clone();
                    for (t, w) in depth.chunks_exact(self.channels).enumerate() {
                        let row = usize::try_from(from + t as isize).ok();
                        let row = row.and_then(|row| x.chunks_exact(self.channels).nth(row));
                        for ((y, w), x) in y.iter_mut().zip(w).zip(row.into_iter().flatten()) {
                            *y += w * x;
                        }
                    }
                    relu(&mut y);
                    let mut y = point.apply(&y);
                    relu(&mut y);
                    y
                };
                let w = self.window as isize;
                let first = gaps.start as isize - w + 1;
                let all: Vec<Vec<f32>> = (first..gaps.end as isize + 1).map(side).collect();
                let at = |from: isize| all[(from - first) as usize].clone();
                gaps.map(|gap| (at(gap as isize + 1 - w), at(gap as isize + 1)))
                    .collect()
            }
        };
        sides
            .iter()
            .map(|(left, right)| self.judge(left, right))
            .collect()
    }

    /// The logit of two sides.
    fn judge(&self, left: &[f32], right: &[f32]) -> f32 {
        let both = || left.iter().zip(right);
        let mut features: Vec<f32> = left.iter().chain(right).copied().collect();
        features.extend(both().map(|(l, r)| (l - r).abs()));
        features.extend(both().map(|(l, r)| l * r));
        features.push(cosine(left, right));
        let mut hidden = self.hidden.apply(&features);
        relu(&mut hidden);
        self.score.apply(&hidden)[0]
    }
}

/// Cosine of two vectors, whose lengths count as at least 1e-6.
pub(super) fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(a, b) / (dot(a, a).sqrt().max(1e-6) * dot(b, b).sqrt().max(1e-6))
}

fn relu(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = x.max(0.0));
}

fn mean(rows: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = vec![0.0; rows[0].len()];
    for row in rows {
        sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
    }
    sum.iter_mut().for_each(|s| *s /= rows.len() as f32);
    sum
}

/// Row `i` of the attention of `rows: [q | k | v]`, heads side by side: `[C]`.
fn attended(rows: &[&[f32]], i: usize, heads: usize) -> Vec<f32> {
    let channels = rows[0].len() / 3;
    let dim = channels / heads;
    let scale = (dim as f32).powf(-0.5);
    let mut out = vec![0.0; channels];
    for (head, out) in out.chunks_exact_mut(dim).enumerate() {
        let part = |row: &'_ [f32], which: usize| -> Range<usize> {
            debug_assert_eq!(row.len(), 3 * channels);
            let from = which * channels + head * dim;
            from..from + dim
        };
        let q = &rows[i][part(rows[i], 0)];
        let score = |row: &&[f32]| -> f32 {
            let k = &row[part(row, 1)];
            scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>()
        };
        let mut weights: Vec<f32> = rows.iter().map(score).collect();
        let m = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|w| *w = (*w - m).exp());
        let l: f32 = weights.iter().sum();
        for (row, w) in rows.iter().zip(weights) {
            let v = &row[part(row, 2)];
            out.iter_mut().zip(v).for_each(|(o, v)| *o += w / l * v);
        }
    }
    out
}

/// Layer norm.
fn norm(x: &[f32], gain: &[f32], shift: &[f32]) -> Vec<f32> {
    let n = x.len() as f32;
    let mean = x.iter().sum::<f32>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / n;
    let factor = (variance + 1e-5).sqrt().recip();
    x.iter()
        .zip(gain.iter().zip(shift))
        .map(|(x, (gain, shift))| (x - mean) * factor * gain + shift)
        .collect()
}

/// A file that was looked at.
struct File<'a> {
    texts: HashMap<String, String>,
    tensors: HashMap<String, TensorInfo>,
    data: &'a [u8],
}

impl<'a> File<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, PredictorError> {
        let broken = |what: &str| PredictorError::Broken(what.to_owned());
        if bytes.len() as u64 > LONGEST {
            return Err(PredictorError::Long {
                bytes: bytes.len() as u64,
            });
        }
        let (len, rest) = bytes
            .split_first_chunk::<8>()
            .ok_or_else(|| broken("it is too short"))?;
        let len = u64::from_le_bytes(*len);
        if len > HEADER || len > rest.len() as u64 {
            return Err(broken(&format!("its header says that it has {len} bytes")));
        }
        let (header, data) = rest.split_at(len as usize);
        let header: Metadata =
            serde_json::from_slice(header).map_err(|e| broken(&format!("its header cannot be read: {e}")))?;
        let tensors = header.tensors();
        Ok(Self {
            texts: header.metadata().clone().unwrap_or_default(),
            tensors: tensors
                .into_iter()
                .map(|(name, info)| (name, info.clone()))
                .collect(),
            data,
        })
    }

    /// The text of `key`, read by `read`.
    fn text<T>(
        &self,
        key: &'static str,
        want: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, PredictorError> {
        let got = self.texts.get(key);
        got.and_then(|t| read(t)).ok_or_else(|| PredictorError::Text {
            key,
            got: got.map_or("missing".into(), |t| format!("`{}`", shown(t))),
            want: want.to_owned(),
        })
    }

    fn number(&self, key: &'static str, min: usize, max: usize) -> Result<usize, PredictorError> {
        self.text(key, &format!("{min} to {max}"), |t| {
            t.parse().ok().filter(|n| (min..=max).contains(n))
        })
    }

    /// Weight `[outs, ins]` and bias `[outs]`; `None`: as many as the file has.
    fn linear(
        &self,
        [weight, bias]: [&'static str; 2],
        outs: Option<usize>,
        ins: usize,
    ) -> Result<Linear, PredictorError> {
        let outs = match outs {
            Some(outs) => outs,
            None => match self.info(bias)?.shape[..] {
                [outs] if outs > 0 => outs,
                ref got => return Err(misshapen(bias, got, "[1 or more]".into())),
            },
        };
        let values = self.tensor(weight, &[outs, ins])?;
        Ok(Linear::new(&values, self.tensor(bias, &[outs])?))
    }

    fn info(&self, name: &'static str) -> Result<&TensorInfo, PredictorError> {
        self.tensors.get(name).ok_or(PredictorError::Missing(name))
    }

    fn tensor(&self, name: &'static str, shape: &[usize]) -> Result<Vec<f32>, PredictorError> {
        let info = self.info(name)?;
        if info.dtype != Dtype::F32 {
            return Err(PredictorError::Type {
                name,
                got: format!("{:?}", info.dtype),
            });
        }
        if info.shape != shape {
            return Err(misshapen(name, &info.shape, format!("{shape:?}")));
        }
        let (from, to) = info.data_offsets;
        let bytes = (from <= to).then(|| self.data.get(from..to)).flatten();
        let values = shape.iter().try_fold(4usize, |n, &d| n.checked_mul(d));
        let bytes = bytes
            .filter(|bytes| Some(bytes.len()) == values)
            .ok_or_else(|| PredictorError::Broken(format!("the place of tensor `{name}` is not in it")))?;
        let values: Vec<f32> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect();
        match values.iter().all(|x| x.is_finite()) {
            true => Ok(values),
            false => Err(PredictorError::Number(name)),
        }
    }

    /// Refuses tensors that the variant does not have.
    fn nothing_else(&self, variant: &str) -> Result<(), PredictorError> {
        let own: &[&str] = match variant {
            "attention" => &["in.", "out.", "norm."],
            _ => &["depth.", "point."],
        };
        let known = |name: &str| {
            let part = ["hidden.", "score."]
                .iter()
                .chain(own)
                .find_map(|p| name.strip_prefix(p));
            matches!(part, Some("weight" | "bias"))
        };
        let mut unknown: Vec<&String> = self.tensors.keys().filter(|name| !known(name)).collect();
        unknown.sort_unstable();
        match unknown.first() {
            None => Ok(()),
            Some(name) => Err(PredictorError::Unknown(shown(name))),
        }
    }
}

fn misshapen(name: &'static str, got: &[usize], want: String) -> PredictorError {
    PredictorError::Shape {
        name,
        got: shown(&format!("{got:?}")),
        want,
    }
}

/// The beginning of a text out of a file.
fn shown(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}
