//! What a model is: its sizes, its task, and from these the names and shapes of its tensors.

use serde::{Deserialize, Serialize};

/// What mixes tokens in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mixer {
    /// Attention of one learned query a head: constant state.
    Aaren,
    /// Causal attention with a query a token, and a cache of keys and values: the Transformer twin.
    Attention,
}

/// Where LayerNorm stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// `x + f(norm(x))`, and a norm behind the last layer.
    Pre,
    /// `norm(x + f(x))`, as in the first Transformer.
    Post,
}

/// What goes in and what comes out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Task {
    /// A class of what was seen so far, from the mean of the outputs.
    Classify {
        /// Values of a token.
        channels: usize,
        /// Names of the classes.
        classes: Vec<String>,
        /// What values are normalised by.
        scale: Scale,
    },
    /// The next `horizon` tokens.
    Forecast {
        /// Values of a token.
        channels: usize,
        /// Tokens ahead.
        horizon: usize,
        /// What values are normalised by.
        scale: Scale,
    },
    /// The time to the next event, as a mixture of log-normals, and its mark.
    Events {
        /// Kinds of marks; 0: events have none.
        marks: usize,
        /// Components of the mixture.
        components: usize,
        /// Mean of `ln(time)`.
        log_mean: f64,
        /// Standard deviation of `ln(time)`.
        log_std: f64,
    },
    /// The action of an expert, conditioned on the return that is asked for.
    Control {
        /// Values of an observed state.
        states: usize,
        /// Values of an action, each in -1 to 1.
        actions: usize,
        /// What states are normalised by.
        scale: Scale,
        /// Returns are divided by this.
        return_scale: f64,
    },
}

/// Mean and standard deviation of each channel of the training data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// Means, one a channel.
    pub mean: Vec<f64>,
    /// Standard deviations, one a channel, above 0.
    pub std: Vec<f64>,
}

impl Scale {
    /// Of rows of `channels` values. A constant channel gets the deviation 1.
    pub fn of(values: &[f32], channels: usize) -> Self {
        let rows = (values.len() / channels.max(1)).max(1) as f64;
        let mean: Vec<f64> = (0..channels)
            .map(|c| {
                let column = values.iter().skip(c).step_by(channels);
                column.map(|x| f64::from(*x)).sum::<f64>() / rows
            })
            .collect();
        let std = (0..channels).map(|c| {
            let column = values.iter().skip(c).step_by(channels);
            let squares: f64 = column.map(|x| (f64::from(*x) - mean[c]).powi(2)).sum();
            let std = (squares / rows).sqrt();
            if std > 1e-12 { std } else { 1.0 }
        });
        Self {
            std: std.collect(),
            mean,
        }
    }

    /// `(x - mean) / std`, row by row.
    pub fn apply(&self, values: &[f32]) -> Vec<f32> {
        let channel = |i: usize| i % self.mean.len();
        let normal = |(i, x): (usize, &f32)| (f64::from(*x) - self.mean[channel(i)]) / self.std[channel(i)];
        values.iter().enumerate().map(|p| normal(p) as f32).collect()
    }

    /// The inverse of [`Scale::apply`].
    pub fn undo(&self, values: &[f32]) -> Vec<f32> {
        let channel = |i: usize| i % self.mean.len();
        let back = |(i, x): (usize, &f32)| f64::from(*x) * self.std[channel(i)] + self.mean[channel(i)];
        values.iter().enumerate().map(|p| back(p) as f32).collect()
    }
}

/// A model's sizes and its task: what stands in its file beside the tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What mixes tokens.
    pub mixer: Mixer,
    /// `d_model`.
    pub width: usize,
    /// Heads `H`, a divisor of the width.
    pub heads: usize,
    /// Layers.
    pub layers: usize,
    /// Middle of the feed-forward part.
    pub ffn: usize,
    /// Where LayerNorm stands.
    pub norm: Norm,
    /// Subtracted from the logarithm of every weight a token; 0 as in the paper. For [`Mixer::Aaren`] only.
    pub decay: f64,
    /// The task.
    pub task: Task,
}

/// Why a configuration is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` is {got}, but must be {want}")]
pub struct ConfigError {
    /// Which field.
    pub field: &'static str,
    /// What it is.
    pub got: String,
    /// What it may be.
    pub want: String,
}

/// The widest model.
const WIDTH: usize = 1 << 12;
/// Most layers.
const LAYERS: usize = 64;
/// Most channels, classes, marks, components, and steps of a horizon.
const MANY: usize = 1 << 12;

fn within(field: &'static str, x: usize, least: usize, most: usize) -> Result<(), ConfigError> {
    if (least..=most).contains(&x) {
        return Ok(());
    }
    Err(ConfigError {
        field,
        got: x.to_string(),
        want: format!("{least} to {most}"),
    })
}

fn number(field: &'static str, x: f64, fits: bool, want: &str) -> Result<(), ConfigError> {
    if x.is_finite() && fits {
        return Ok(());
    }
    Err(ConfigError {
        field,
        got: x.to_string(),
        want: want.into(),
    })
}

fn scaled(scale: &Scale, channels: usize) -> Result<(), ConfigError> {
    for (field, list) in [("scale.mean", &scale.mean), ("scale.std", &scale.std)] {
        if list.len() != channels {
            return Err(ConfigError {
                field,
                got: format!("a list of {}", list.len()),
                want: format!("a list of {channels}"),
            });
        }
        let least = if field == "scale.std" { 1e-12 } else { -1e30 };
        for x in list {
            number(
                field,
                *x,
                *x >= least && *x <= 1e30,
                &format!("numbers of {least:e} to 1e30"),
            )?;
        }
    }
    Ok(())
}

impl Config {
    /// Whether the sizes go together and are such that their tensors can be asked for.
    ///
    /// # Errors
    /// Names the first field that does not fit.
    pub fn check(&self) -> Result<(), ConfigError> {
        within("width", self.width, 2, WIDTH)?;
        within("layers", self.layers, 1, LAYERS)?;
        within("ffn", self.ffn, 1, 4 * WIDTH)?;
        within("heads", self.heads, 1, self.width)?;
        if !self.width.is_multiple_of(self.heads) || !self.width.is_multiple_of(2) {
            return Err(ConfigError {
                field: "width",
                got: self.width.to_string(),
                want: format!("even, and a multiple of `heads`, {}", self.heads),
            });
        }
        number("decay", self.decay, (0.0..=10.0).contains(&self.decay), "0 to 10")?;
        if self.mixer == Mixer::Attention && self.decay != 0.0 {
            number("decay", self.decay, false, "0 with the mixer `attention`")?;
        }
        match &self.task {
            Task::Classify {
                channels,
                classes,
                scale,
            } => {
                within("task.channels", *channels, 1, MANY)?;
                within("task.classes", classes.len(), 1, MANY)?;
                scaled(scale, *channels)
            }
            Task::Forecast {
                channels,
                horizon,
                scale,
            } => {
                within("task.channels", *channels, 1, MANY)?;
                within("task.horizon", *horizon, 1, MANY)?;
                scaled(scale, *channels)
            }
            Task::Events {
                marks,
                components,
                log_mean,
                log_std,
            } => {
                within("task.marks", *marks, 0, MANY)?;
                within("task.components", *components, 1, MANY)?;
                number("task.log_mean", *log_mean, log_mean.abs() <= 100.0, "-100 to 100")?;
                number(
                    "task.log_std",
                    *log_std,
                    (1e-6..=100.0).contains(log_std),
                    "1e-6 to 100",
                )
            }
            Task::Control {
                states,
                actions,
                scale,
                return_scale,
            } => {
                within("task.states", *states, 1, MANY)?;
                within("task.actions", *actions, 1, MANY)?;
                let large = *return_scale >= 1e-12;
                number("task.return_scale", *return_scale, large, "at least 1e-12")?;
                scaled(scale, *states)
            }
        }
    }

    /// Head dimension `D`.
    pub fn dim(&self) -> usize {
        self.width / self.heads
    }

    /// Every tensor, by name, with its shape; a linear map is `[out, in]`. Weights of the file, of training and of the counts of
    /// parameters are all made from this list.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let d = self.width;
        let mut list: Vec<(String, Vec<usize>)> = Vec::new();
        let linear = |list: &mut Vec<(String, Vec<usize>)>, name: &str, out: usize, ins: usize| {
            list.push((format!("{name}.weight"), vec![out, ins]));
            list.push((format!("{name}.bias"), vec![out]));
        };
        let norm = |list: &mut Vec<(String, Vec<usize>)>, name: &str| {
            list.push((format!("{name}.weight"), vec![d]));
            list.push((format!("{name}.bias"), vec![d]));
        };
        match &self.task {
            Task::Classify { channels, .. } | Task::Forecast { channels, .. } => {
                linear(&mut list, "embed", d, *channels);
            }
            Task::Events { marks, .. } => {
                linear(&mut list, "embed", d, 2);
                if *marks > 0 {
                    list.push(("embed_mark.weight".into(), vec![*marks, d]));
                }
            }
            Task::Control { states, actions, .. } => {
                linear(&mut list, "embed_return", d, 1);
                linear(&mut list, "embed_state", d, *states);
                linear(&mut list, "embed_action", d, *actions);
                norm(&mut list, "embed_norm");
            }
        }
        for l in 0..self.layers {
            if self.mixer == Mixer::Aaren {
                list.push((format!("layers.{l}.q_tok"), vec![d]));
            }
            for name in ["q", "k", "v", "o"] {
                linear(&mut list, &format!("layers.{l}.{name}"), d, d);
            }
            norm(&mut list, &format!("layers.{l}.norm1"));
            linear(&mut list, &format!("layers.{l}.ffn1"), self.ffn, d);
            linear(&mut list, &format!("layers.{l}.ffn2"), d, self.ffn);
            norm(&mut list, &format!("layers.{l}.norm2"));
        }
        if self.norm == Norm::Pre {
            norm(&mut list, "norm");
        }
        match &self.task {
            Task::Classify { classes, .. } => linear(&mut list, "head", classes.len(), d),
            Task::Forecast {
                channels, horizon, ..
            } => linear(&mut list, "head", channels * horizon, d),
            Task::Events {
                marks, components, ..
            } => {
                linear(&mut list, "mixture", 3 * components, d);
                if *marks > 0 {
                    linear(&mut list, "mark", *marks, d);
                }
            }
            Task::Control { actions, .. } => linear(&mut list, "head", *actions, d),
        }
        list
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        let sizes = self
            .tensors()
            .into_iter()
            .map(|(_, shape)| shape.iter().product::<usize>());
        sizes.sum()
    }
}

/// Position or time `t` as `width` numbers, `[sin | cos]` of falling frequencies from 1 to 1/10,000 radians a unit.
pub fn sinusoid(t: f64, width: usize, out: &mut [f32]) {
    let half = width / 2;
    for i in 0..half {
        let (sin, cos) = (t * 1e4f64.powf(-(i as f64) / half as f64)).sin_cos();
        (out[i], out[half + i]) = (sin as f32, cos as f32);
    }
}

/// Features of a time to the next event: its logarithm, normalised, and its ratio to the typical one, at most 20.
pub fn time_features(dt: f64, log_mean: f64, log_std: f64) -> [f32; 2] {
    let log = (dt.ln() - log_mean) / log_std;
    [log as f32, (dt / log_mean.exp()).min(20.0) as f32]
}
