//! What is trained, and how.

use serde::{Deserialize, Serialize};

/// What people may write. What is left out depends on the architecture.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawSae {
    /// `standard`, `topk`, `batchtopk`, `jumprelu` or `gated`; `batchtopk` if nothing is said.
    pub architecture: Option<String>,
    /// Values of a row.
    pub d_in: usize,
    /// Features `F`; 8 a value of the row if nothing is said.
    pub features: Option<usize>,
    /// Weight of the sum of the features (`standard`, `gated`).
    pub l1: Option<f64>,
    /// Weight of the number of active features (`jumprelu`).
    pub l0: Option<f64>,
    /// Features a row (`topk`), or a row in the mean (`batchtopk`).
    pub k: Option<usize>,
    /// Weight of the loss that revives dead features (`topk`, `batchtopk`).
    pub aux: Option<f64>,
    /// Width of the kernel at the threshold (`jumprelu`).
    pub bandwidth: Option<f64>,
    /// Steps without firing after which a feature counts as dead for the auxiliary loss.
    pub dead_after: Option<u64>,
    /// Adam's step size.
    pub lr: Option<f64>,
    /// Adam's decay of the first moment.
    pub beta1: Option<f64>,
    /// Adam's decay of the second moment.
    pub beta2: Option<f64>,
    /// Steps in which the step size rises from a tenth; 0: none.
    pub warmup: Option<u64>,
    /// Steps in all, for the decay at the end.
    pub steps: Option<u64>,
    /// Share of the steps, at the end, in which the step size falls to 0.
    pub decay: Option<f64>,
    /// Steps between checks for dead features that are drawn anew; 0: never.
    pub resample_every: Option<u64>,
    /// Checks at most.
    pub resample_most: Option<u64>,
    /// A feature with a firing rate up to this is drawn anew.
    pub resample_rate: Option<f64>,
    /// `tied` (encoder is the decoder's transpose) or `independent`.
    pub init: Option<String>,
    /// Where `b_dec` starts: `mean` of the first rows, or `zero`.
    pub bias: Option<String>,
    /// Whether rows are brought to the mean norm `sqrt(d_in)`; the factor is folded into what is saved.
    pub normalise: Option<bool>,
    /// Seed of everything random.
    pub seed: u64,
}

/// Why a configuration cannot be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A value that the field does not take.
    #[error("`{field}` cannot be {got}: it takes {want}")]
    Value {
        /// Which.
        field: &'static str,
        /// What was written.
        got: String,
        /// What it takes.
        want: String,
    },
    /// A field that means nothing for this architecture.
    #[error("`{field}` means nothing for `{architecture}`\nhint: it is for {of}")]
    Foreign {
        /// Which.
        field: &'static str,
        /// The architecture.
        architecture: &'static str,
        /// The architectures that have it.
        of: &'static str,
    },
}

/// What is minimised, beside the squared error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// `l1` times the sum of the features.
    Standard {
        /// Weight.
        l1: f64,
    },
    /// The `k` largest features of a row.
    TopK {
        /// Features a row.
        k: usize,
        /// Weight of the auxiliary loss.
        aux: f64,
    },
    /// The `k * rows` largest features of a batch.
    BatchTopK {
        /// Features a row in the mean.
        k: usize,
        /// Weight of the auxiliary loss.
        aux: f64,
    },
    /// `l0` times the number of active features, through a kernel around the threshold.
    JumpRelu {
        /// Weight.
        l0: f64,
        /// Width of the kernel.
        bandwidth: f64,
    },
    /// `l1` on the gates, and a reconstruction from the gates.
    Gated {
        /// Weight.
        l1: f64,
    },
}

impl Loss {
    /// The name people write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Standard { .. } => "standard",
            Self::TopK { .. } => "topk",
            Self::BatchTopK { .. } => "batchtopk",
            Self::JumpRelu { .. } => "jumprelu",
            Self::Gated { .. } => "gated",
        }
    }

    /// Weight of the auxiliary loss; 0 where there is none.
    pub fn aux(self) -> f64 {
        match self {
            Self::TopK { aux, .. } | Self::BatchTopK { aux, .. } => aux,
            _ => 0.0,
        }
    }
}

/// How weights start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// Encoder and decoder are transposes.
    Tied,
    /// Both are drawn, as in the paper's code.
    Independent,
}

/// How `b_dec` starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// 0, as in the paper's code.
    Zero,
    /// The mean of the first rows.
    Mean,
}

/// What is trained and how. Having one proves that the numbers make sense.
#[derive(Debug, Clone, PartialEq)]
pub struct SaeConfig {
    raw: RawSae,
    /// Values of a row.
    pub(crate) d_in: usize,
    /// Features.
    pub(crate) features: usize,
    pub(crate) loss: Loss,
    pub(crate) lr: f64,
    pub(crate) betas: (f64, f64),
    pub(crate) warmup: u64,
    pub(crate) steps: u64,
    pub(crate) decay: f64,
    pub(crate) dead_after: u64,
    pub(crate) resample_every: u64,
    pub(crate) resample_most: u64,
    pub(crate) resample_rate: f64,
    pub(crate) init: Init,
    pub(crate) bias: Bias,
    pub(crate) normalise: bool,
    pub(crate) seed: u64,
}

fn within<T: Copy + PartialOrd + std::fmt::Display>(
    field: &'static str,
    value: T,
    (least, most): (T, T),
) -> Result<T, ConfigError> {
    // Comparisons refuse what is no number.
    if value >= least && value <= most {
        return Ok(value);
    }
    Err(ConfigError::Value {
        field,
        got: value.to_string(),
        want: format!("{least} to {most}"),
    })
}

impl TryFrom<RawSae> for SaeConfig {
    type Error = ConfigError;

    fn try_from(raw: RawSae) -> Result<Self, ConfigError> {
        let d_in = within("d_in", raw.d_in, (1, 1 << 20))?;
        let features = within("features", raw.features.unwrap_or(8 * d_in), (1, 1 << 24))?;
        if d_in.checked_mul(features).is_none_or(|n| n > 1 << 31) {
            return Err(ConfigError::Value {
                field: "features",
                got: features.to_string(),
                want: format!("up to {} for d_in {d_in}", (1usize << 31) / d_in),
            });
        }
        let l1 = || within("l1", raw.l1.unwrap_or(1.0), (0.0, 1e6));
        let k = || within("k", raw.k.unwrap_or(32), (1, features));
        let aux = || within("aux", raw.aux.unwrap_or(1.0 / 32.0), (0.0, 1e3));
        let loss = match raw.architecture.as_deref().unwrap_or("batchtopk") {
            "standard" => Loss::Standard { l1: l1()? },
            "topk" => Loss::TopK { k: k()?, aux: aux()? },
            "batchtopk" => Loss::BatchTopK { k: k()?, aux: aux()? },
            "jumprelu" => Loss::JumpRelu {
                l0: within("l0", raw.l0.unwrap_or(1.0), (0.0, 1e6))?,
                bandwidth: within("bandwidth", raw.bandwidth.unwrap_or(0.05), (1e-6, 1e3))?,
            },
            "gated" => Loss::Gated { l1: l1()? },
            other => {
                return Err(ConfigError::Value {
                    field: "architecture",
                    got: format!("`{other}`"),
                    want: "standard, topk, batchtopk, jumprelu or gated".into(),
                });
            }
        };
        let foreign = [
            (
                "l1",
                raw.l1.is_some(),
                "standard and gated",
                matches!(loss, Loss::Standard { .. } | Loss::Gated { .. }),
            ),
            (
                "l0",
                raw.l0.is_some(),
                "jumprelu",
                matches!(loss, Loss::JumpRelu { .. }),
            ),
            (
                "bandwidth",
                raw.bandwidth.is_some(),
                "jumprelu",
                matches!(loss, Loss::JumpRelu { .. }),
            ),
            (
                "k",
                raw.k.is_some(),
                "topk and batchtopk",
                matches!(loss, Loss::TopK { .. } | Loss::BatchTopK { .. }),
            ),
            (
                "aux",
                raw.aux.is_some(),
                "topk and batchtopk",
                matches!(loss, Loss::TopK { .. } | Loss::BatchTopK { .. }),
            ),
        ];
        if let Some((field, _, of, _)) = foreign.into_iter().find(|(_, said, _, has)| *said && !has) {
            return Err(ConfigError::Foreign {
                field,
                architecture: loss.name(),
                of,
            });
        }
        let paper = matches!(loss, Loss::Standard { .. });
        let word = |field, said: &Option<String>, names: [&str; 2], preset: usize| match said.as_deref() {
            None => Ok(preset),
            Some(name) => names
                .iter()
                .position(|n| *n == name)
                .ok_or_else(|| ConfigError::Value {
                    field,
                    got: format!("`{name}`"),
                    want: names.join(" or "),
                }),
        };
        let init = match word("init", &raw.init, ["tied", "independent"], usize::from(paper))? {
            0 => Init::Tied,
            _ => Init::Independent,
        };
        let bias = match word("bias", &raw.bias, ["mean", "zero"], 0)? {
            0 => Bias::Mean,
            _ => Bias::Zero,
        };
        Ok(Self {
            d_in,
            features,
            loss,
            lr: within(
                "lr",
                raw.lr.unwrap_or(if paper { 1.2e-3 } else { 3e-4 }),
                (0.0, 1.0),
            )?,
            betas: (
                within(
                    "beta1",
                    raw.beta1.unwrap_or(if paper { 0.0 } else { 0.9 }),
                    (0.0, 0.999_999),
                )?,
                within(
                    "beta2",
                    raw.beta2.unwrap_or(if paper { 0.9999 } else { 0.999 }),
                    (0.0, 0.999_999_9),
                )?,
            ),
            warmup: within(
                "warmup",
                raw.warmup.unwrap_or(if paper { 1000 } else { 0 }),
                (0, 1 << 40),
            )?,
            steps: within("steps", raw.steps.unwrap_or(0), (0, 1 << 40))?,
            decay: within(
                "decay",
                raw.decay.unwrap_or(if paper { 0.0 } else { 0.2 }),
                (0.0, 1.0),
            )?,
            dead_after: within("dead_after", raw.dead_after.unwrap_or(200), (1, 1 << 40))?,
            resample_every: within(
                "resample_every",
                raw.resample_every.unwrap_or(if paper { 2000 } else { 0 }),
                (0, 1 << 40),
            )?,
            resample_most: within("resample_most", raw.resample_most.unwrap_or(4), (0, 1 << 20))?,
            resample_rate: within("resample_rate", raw.resample_rate.unwrap_or(1e-6), (0.0, 1.0))?,
            init,
            bias,
            normalise: raw.normalise.unwrap_or(true),
            seed: raw.seed,
            raw,
        })
    }
}

impl SaeConfig {
    /// What was written.
    pub fn raw(&self) -> &RawSae {
        &self.raw
    }

    /// Values of a row.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// Features `F`.
    pub fn features(&self) -> usize {
        self.features
    }

    /// What is minimised.
    pub fn loss(&self) -> Loss {
        self.loss
    }

    /// Steps in all; 0 if nobody said.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Adam's step size at `step` (from 0), of which the last `since` came after a warm-up began: half a cosine up from a tenth, then
    /// constant, then down to 0 over the last share `decay` of the steps.
    pub fn lr_at(&self, step: u64, since: u64) -> f64 {
        let up = if since < self.warmup {
            let turn = std::f64::consts::PI * since as f64 / self.warmup as f64;
            0.1 + 0.9 * 0.5 * (1.0 - turn.cos())
        } else {
            1.0
        };
        let tail = self.decay * self.steps as f64;
        let left = self.steps.saturating_sub(step) as f64;
        let down = if tail >= 1.0 { (left / tail).min(1.0) } else { 1.0 };
        self.lr * up * down
    }
}
