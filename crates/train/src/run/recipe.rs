//! Recipes: what people may write, and what of it can be run.

mod check;

use std::path::{Path, PathBuf};

use antefix_kernels::quant::Format;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::data::{RawIds, Synthetic};
use crate::error::TrainError;
use crate::model::{INITIALIZER_RANGE, RawGpt, Recompute};
use crate::optim::{RawAdamW, RawSchedule};
use crate::prefix_grouper::{Task, Variant};

/// A training run, as a TOML file says it. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run.
    pub recipe: String,
    /// Decides first values, the order of data and what is drawn.
    #[serde(default)]
    pub seed: u64,
    /// What it learns from.
    pub data: RawData,
    /// What is trained.
    pub model: RawModel,
    /// The loss.
    #[serde(default)]
    pub objective: RawObjective,
    /// AdamW.
    #[serde(default)]
    pub optim: RawAdamW,
    /// Learning rate by step.
    #[serde(default)]
    pub schedule: RawSchedule,
    /// Steps, sizes, how often to look and to save.
    pub train: RawSteps,
}

/// How text becomes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum RawTokenizer {
    /// A byte is a token; byte 0 ends a text.
    #[default]
    Bytes,
    /// That of the base model.
    Model,
}

/// Where data come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case", deny_unknown_fields)]
pub enum RawData {
    /// Files, or folders of files, one after the other, in windows.
    Text {
        /// Paths, relative to the recipe.
        files: Vec<PathBuf>,
        /// Tokens of a window.
        seq: usize,
        /// Share held out, from the end.
        #[serde(default = "held_out")]
        val: f64,
        /// Text to tokens.
        #[serde(default)]
        tokenizer: RawTokenizer,
    },
    /// Objects with `prompt` and `response` (or `responses`, scored behind one prompt), one a line.
    JsonLines {
        /// Path, relative to the recipe.
        file: PathBuf,
        /// Share held out, from the end.
        #[serde(default = "held_out")]
        val: f64,
        /// Text to tokens.
        #[serde(default)]
        tokenizer: RawTokenizer,
    },
    /// Token ids, one after the other, in windows.
    Tokens {
        /// `.bin` or `.safetensors`, or folders of them, relative to the recipe.
        files: Vec<PathBuf>,
        /// Tokens of a window.
        seq: usize,
        /// Share held out, from the end.
        #[serde(default = "held_out")]
        val: f64,
        /// Width of ids in `.bin` files that do not tell.
        #[serde(default)]
        ids: RawIds,
    },
    /// Objects with `messages` (and `tools`), one a line, through a chat template; what the assistant says is scored.
    Chat {
        /// Path, relative to the recipe.
        file: PathBuf,
        /// Tokens of a conversation; longer ones are cut.
        #[serde(default = "conversation")]
        seq: usize,
        /// Share held out, from the end.
        #[serde(default = "held_out")]
        val: f64,
        /// A Jinja file instead of the model's own template, relative to the recipe.
        #[serde(default)]
        template: Option<PathBuf>,
        /// Text to tokens.
        #[serde(default)]
        tokenizer: RawTokenizer,
    },
    /// Objects with `prompt`, `chosen` and `rejected`, one a line: for `dpo`.
    Preferences {
        /// Path, relative to the recipe.
        file: PathBuf,
        /// Share held out, from the end.
        #[serde(default = "held_out")]
        val: f64,
        /// Text to tokens.
        #[serde(default)]
        tokenizer: RawTokenizer,
    },
    /// Problems of bare tokens, made up as they are needed, for models from nothing.
    Synthetic {
        /// Which.
        task: Synthetic,
    },
    /// Problems that are made up as they are needed, with answers that a program can check.
    Task {
        /// Which.
        task: Task,
        /// Text to tokens.
        #[serde(default)]
        tokenizer: RawTokenizer,
    },
}

fn held_out() -> f64 {
    0.05
}

fn conversation() -> usize {
    2048
}

/// Low-rank adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawLora {
    /// `r`
    pub rank: usize,
    /// Factor `alpha / r`; `2 r` if not given.
    #[serde(default)]
    pub alpha: Option<f64>,
    /// `q_proj`, `v_proj`, ..
    pub modules: Vec<String>,
}

/// A small decoder of Llama's kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawLlama {
    /// Layers.
    pub layers: usize,
    /// Width.
    pub d: usize,
    /// `Hq`
    pub heads: usize,
    /// `Hk`
    pub kv_heads: usize,
    /// Width of the feed-forward part.
    pub ffn: usize,
    /// Tokens: the 256 bytes, or more for data of token ids.
    pub vocab: usize,
    /// Longest sequence, for the exported model.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Standard deviation of fresh matrices; those that write to the residual stream have it over `sqrt(2 layers)`.
    pub initializer_range: f64,
    /// Checkpoint folder to start from.
    pub init: Option<PathBuf>,
}

impl Default for RawLlama {
    fn default() -> Self {
        Self {
            layers: 4,
            d: 128,
            heads: 4,
            kv_heads: 2,
            ffn: 384,
            vocab: 256,
            context: 2048,
            rope_base: 10_000.0,
            initializer_range: INITIALIZER_RANGE,
            init: None,
        }
    }
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RawModel {
    /// A small decoder of bytes with rotary positions, RMS norms and SwiGLU, from nothing. The engine runs what is exported.
    Llama(RawLlama),
    /// A small GPT-like model of bytes, from nothing.
    Gpt(RawGpt),
    /// A model file, dequantised to f32.
    Base {
        /// A GGUF file or a safetensors folder.
        path: PathBuf,
        /// Adapters; without them every parameter is trained.
        #[serde(default)]
        lora: Option<RawLora>,
        /// Checkpoint folder to start from.
        #[serde(default)]
        init: Option<PathBuf>,
    },
}

/// The loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum RawObjective {
    /// Cross-entropy of every next token; of responses only, where data have prompts.
    #[default]
    Ce,
    /// Group-relative policy optimisation on a task: responses are drawn by the engine, rewards by a program.
    Grpo {
        /// Whose settings.
        #[serde(default = "grpo")]
        variant: Variant,
        /// `G`
        group: usize,
        /// Longest response.
        max_tokens: usize,
        /// Of drawing and of log-probabilities.
        #[serde(default = "one")]
        temperature: f64,
        /// Weight of the KL to the first policy; the variant's if not given.
        #[serde(default)]
        beta: Option<f64>,
        /// Updates on each rollout.
        #[serde(default = "once")]
        iterations: usize,
        /// Leave responses that were cut off out of the loss.
        #[serde(default)]
        mask_truncated: bool,
        /// Compute the prompt again for each response: the baseline.
        #[serde(default)]
        repeat_prompts: bool,
    },
    /// Direct preference optimisation (arXiv 2305.18290): of two responses to a prompt the chosen one becomes likelier than the rejected.
    Dpo {
        /// How far from the reference a margin of 1 is.
        #[serde(default = "dpo_beta")]
        beta: f64,
        /// Share of pairs whose preference is taken to be the wrong way round.
        #[serde(default)]
        label_smoothing: f64,
        /// What log-probabilities are compared with.
        #[serde(default)]
        reference: RawReference,
        /// Compute the prompt again for each response: the baseline.
        #[serde(default)]
        repeat_prompts: bool,
    },
}

/// What a preference is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum RawReference {
    /// The model as it is before the first step.
    #[default]
    Start,
    /// Nothing: the policy's own log-probabilities alone.
    None,
}

fn dpo_beta() -> f64 {
    0.1
}

fn grpo() -> Variant {
    Variant::Grpo
}

fn one() -> f64 {
    1.0
}

fn once() -> usize {
    1
}

/// How long, how much at a time, how often.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawSteps {
    /// Steps.
    pub steps: u64,
    /// Sequences of a step; prompts, for policies.
    pub batch: usize,
    /// Of those, at a time; all if not given. The gradient is the same.
    #[serde(default)]
    pub micro: Option<usize>,
    /// What of a forward pass is computed again in backward rather than kept: less memory, more time, the same gradient.
    #[serde(default)]
    pub recompute: Recompute,
    /// Look at held-out data every so many steps; 0 = at the end only.
    #[serde(default)]
    pub eval_every: u64,
    /// Held-out sequences or problems looked at.
    #[serde(default = "eval_items")]
    pub eval_items: usize,
    /// What of held-out data goes through the engine too.
    #[serde(default)]
    pub served: RawServed,
    /// Save every so many steps; 0 = at the end only.
    #[serde(default)]
    pub save_every: u64,
    /// A loss above this ends the run as diverged.
    #[serde(default = "bound")]
    pub loss_bound: f64,
}

/// Held-out data through the engine, at every look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct RawServed {
    /// Sequences; 0 = none.
    pub items: usize,
    /// As what matrices are written before the engine reads them.
    pub format: RawFormat,
}

/// Formats of weights that exports write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum RawFormat {
    /// As they are.
    #[default]
    F32,
    /// Half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Blocks of 32 in 8 bits.
    #[serde(rename = "q8_0")]
    Q8,
}

impl RawFormat {
    pub(super) fn format(self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::F16 => Format::F16,
            Self::Bf16 => Format::BF16,
            Self::Q8 => Format::Q8_0,
        }
    }
}

fn eval_items() -> usize {
    64
}

fn bound() -> f64 {
    1e6
}

/// The two tables, the second over the first.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(into)), Value::Table(value)) => merge(into, value),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// `a.b = value` into the table; the value is TOML, or else a string.
fn set(table: &mut Table, assignment: &str) -> Result<(), TrainError> {
    let bad = |what: &str| TrainError::Recipe(format!("`{assignment}`: {what}"));
    let (path, value) = assignment
        .split_once('=')
        .ok_or_else(|| bad("an override is key=value"))?;
    let value = value.trim();
    let parsed = format!("v = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(value.to_string()));
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys
        .pop()
        .filter(|k| !k.is_empty())
        .ok_or_else(|| bad("no key"))?;
    let mut at = table;
    for key in keys {
        at = at
            .entry(key)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| bad(&format!("`{key}` is not a table")))?;
    }
    at.insert(last.to_string(), parsed);
    Ok(())
}

impl Recipe {
    /// Reads a recipe, lays one of its profiles and overrides over it, and checks every number.
    ///
    /// # Errors
    /// [`TrainError::Recipe`] names the key and what it should be.
    pub fn parse(text: &str, profile: Option<&str>, overrides: &[String]) -> Result<Self, TrainError> {
        let mut table: Table = text
            .parse()
            .map_err(|e: toml::de::Error| TrainError::Recipe(e.to_string()))?;
        let profiles = table.remove("profile");
        if let Some(name) = profile {
            let found = profiles
                .as_ref()
                .and_then(Value::as_table)
                .and_then(|p| p.get(name));
            match found.and_then(Value::as_table) {
                Some(over) => merge(&mut table, over.clone()),
                None => {
                    let names = profiles
                        .as_ref()
                        .and_then(Value::as_table)
                        .map(|p| p.keys().map(String::as_str).collect::<Vec<_>>().join(", "));
                    return Err(TrainError::Recipe(format!(
                        "no profile is called `{name}`; there are: {}",
                        names.unwrap_or_else(|| "none".into())
                    )));
                }
            }
        }
        for assignment in overrides {
            set(&mut table, assignment)?;
        }
        let recipe: Self = table
            .try_into()
            .map_err(|e: toml::de::Error| TrainError::Recipe(e.to_string()))?;
        recipe.check()?;
        Ok(recipe)
    }

    /// The recipe of a file; paths in it are taken from the file's folder.
    ///
    /// # Errors
    /// When it cannot be read, and as [`Self::parse`].
    pub fn read(file: &Path, profile: Option<&str>, overrides: &[String]) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(file).map_err(TrainError::io(file))?;
        let mut recipe = Self::parse(&text, profile, overrides)?;
        recipe.resolve(file.parent().unwrap_or(Path::new("")));
        Ok(recipe)
    }

    fn resolve(&mut self, folder: &Path) {
        let from = |path: &mut PathBuf| *path = folder.join(&*path);
        match &mut self.data {
            RawData::Text { files, .. } | RawData::Tokens { files, .. } => files.iter_mut().for_each(from),
            RawData::JsonLines { file, .. } | RawData::Preferences { file, .. } => from(file),
            RawData::Chat { file, template, .. } => {
                from(file);
                template.iter_mut().for_each(from);
            }
            RawData::Task { .. } | RawData::Synthetic { .. } => {}
        }
        match &mut self.model {
            RawModel::Base { init, .. } | RawModel::Llama(RawLlama { init, .. }) => {
                if let Some(init) = init {
                    from(init);
                }
            }
            RawModel::Gpt(_) => {}
        }
    }

    /// As TOML, for the run's folder.
    ///
    /// # Errors
    /// When a value has no TOML form.
    pub fn to_toml(&self) -> Result<String, TrainError> {
        toml::to_string(self).map_err(|e| TrainError::Recipe(e.to_string()))
    }
}
