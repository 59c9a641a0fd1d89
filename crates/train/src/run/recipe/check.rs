//! Whether a recipe's numbers and parts make sense together.

use super::{RawData, RawLlama, RawModel, RawObjective, RawTokenizer, Recipe};
use crate::error::TrainError;

fn ranged<T: PartialOrd + std::fmt::Display>(key: &str, value: T, low: T, high: T) -> Result<(), TrainError> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(TrainError::Recipe(format!(
        "`{key}` is {value}; it is from {low} to {high}"
    )))
}

fn bad(what: impl Into<String>) -> Result<(), TrainError> {
    Err(TrainError::Recipe(what.into()))
}

impl Recipe {
    pub(super) fn check(&self) -> Result<(), TrainError> {
        let name = &self.recipe;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.chars().all(plain) {
            return bad(format!(
                "`recipe` is `{name}`; it names a folder: letters, digits, `-`, `_` and `.`"
            ));
        }
        self.check_data()?;
        self.check_model()?;
        self.check_objective()?;
        let steps = &self.train;
        ranged("train.steps", steps.steps, 1, 1 << 40)?;
        ranged("train.batch", steps.batch, 1, 1 << 16)?;
        ranged("train.micro", steps.micro.unwrap_or(steps.batch), 1, steps.batch)?;
        ranged("train.eval_items", steps.eval_items, 1, 1 << 20)?;
        ranged("train.served.items", steps.served.items, 0, 1 << 20)?;
        if steps.served.items > 0 && matches!(self.model, RawModel::Gpt(_)) {
            return bad("`train.served.items`: the engine does not run `model.kind` \"gpt\"");
        }
        ranged("train.loss_bound", steps.loss_bound, 1e-9, f64::MAX)?;
        crate::optim::Schedule::new(self.schedule.clone(), steps.steps)?;
        Ok(())
    }

    fn check_data(&self) -> Result<(), TrainError> {
        match &self.data {
            RawData::Text { files, seq, val, .. } | RawData::Tokens { files, seq, val, .. } => {
                if files.is_empty() {
                    return bad("`data.files` names no file");
                }
                ranged("data.seq", *seq, 2, 1 << 20)?;
                ranged("data.val", *val, 0.0, 0.9)
            }
            RawData::Chat { seq, val, .. } => {
                ranged("data.seq", *seq, 2, 1 << 20)?;
                ranged("data.val", *val, 0.0, 0.9)
            }
            RawData::JsonLines { val, .. } | RawData::Preferences { val, .. } => {
                ranged("data.val", *val, 0.0, 0.9)
            }
            RawData::Synthetic { task } => task.check(),
            RawData::Task { task, .. } => task.check().map_err(|e| TrainError::Recipe(format!("data.{e}"))),
        }
    }

    /// How text becomes tokens; `None` where data are tokens already.
    fn tokenizer(&self) -> Option<RawTokenizer> {
        match &self.data {
            RawData::Text { tokenizer, .. }
            | RawData::JsonLines { tokenizer, .. }
            | RawData::Chat { tokenizer, .. }
            | RawData::Preferences { tokenizer, .. }
            | RawData::Task { tokenizer, .. } => Some(*tokenizer),
            RawData::Tokens { .. } | RawData::Synthetic { .. } => None,
        }
    }

    fn check_model(&self) -> Result<(), TrainError> {
        let tokenizer = self.tokenizer();
        match &self.model {
            RawModel::Llama(raw) => check_llama(raw)?,
            RawModel::Gpt(raw) => {
                if tokenizer.is_some() && raw.vocab < 256 {
                    return bad(format!(
                        "`model.vocab` is {}; where tokens are bytes it is 256 or more",
                        raw.vocab
                    ));
                }
                if let RawData::Synthetic { task } = &self.data
                    && task.tokens() > raw.context
                {
                    return bad(format!(
                        "`model.context` is {}; sequences of `data.task` have {} tokens",
                        raw.context,
                        task.tokens()
                    ));
                }
            }
            RawModel::Base { lora, .. } => {
                if let Some(lora) = lora {
                    ranged("model.lora.rank", lora.rank, 1, 1024)?;
                    ranged("model.lora.alpha", lora.alpha.unwrap_or(1.0), 1e-6, 1e6)?;
                }
            }
        }
        let small = !matches!(self.model, RawModel::Base { .. });
        match tokenizer {
            Some(tokenizer) if small != (tokenizer == RawTokenizer::Bytes) => bad(
                "`data.tokenizer`: small models read \"bytes\", a base model reads what its own tokenizer (\"model\") makes",
            ),
            _ => Ok(()),
        }
    }

    fn check_objective(&self) -> Result<(), TrainError> {
        let preferences = matches!(self.data, RawData::Preferences { .. });
        match &self.objective {
            RawObjective::Ce if preferences => {
                bad("`data.source` is \"preferences\": they are learned by `objective.name` \"dpo\"")
            }
            RawObjective::Ce => Ok(()),
            RawObjective::Grpo {
                group,
                max_tokens,
                temperature,
                beta,
                iterations,
                ..
            } => {
                ranged("objective.group", *group, 1, 1024)?;
                ranged("objective.max_tokens", *max_tokens, 1, 1 << 16)?;
                ranged("objective.temperature", *temperature, 0.01, 10.0)?;
                ranged("objective.beta", beta.unwrap_or(0.0), 0.0, 100.0)?;
                ranged("objective.iterations", *iterations, 1, 64)?;
                if !matches!(self.data, RawData::Task { .. }) {
                    return bad(
                        "`objective.name` is \"grpo\": it needs rewards, so `data.source` is \"task\"",
                    );
                }
                match self.model {
                    RawModel::Gpt(_) => bad(
                        "`objective.name` is \"grpo\": responses are drawn by the engine, which runs `model.kind` \"llama\" and \"base\"",
                    ),
                    _ => Ok(()),
                }
            }
            RawObjective::Dpo {
                beta,
                label_smoothing,
                ..
            } => {
                ranged("objective.beta", *beta, 1e-6, 100.0)?;
                ranged("objective.label_smoothing", *label_smoothing, 0.0, 0.5)?;
                match preferences {
                    true => Ok(()),
                    false => bad(
                        "`objective.name` is \"dpo\": it needs pairs of responses, so `data.source` is \"preferences\"",
                    ),
                }
            }
        }
    }
}

fn check_llama(raw: &RawLlama) -> Result<(), TrainError> {
    let sizes = [
        ("layers", raw.layers, 1, 256),
        ("heads", raw.heads, 1, 1024),
        ("kv_heads", raw.kv_heads, 1, 1024),
        ("d", raw.d, 1, 1 << 16),
        ("ffn", raw.ffn, 1, 1 << 18),
        ("vocab", raw.vocab, 256, 1 << 20),
        ("context", raw.context, 1, 1 << 20),
    ];
    for (key, value, least, most) in sizes {
        ranged(&format!("model.{key}"), value, least, most)?;
    }
    ranged("model.rope_base", raw.rope_base, 1.0, 1e12)?;
    ranged("model.initializer_range", raw.initializer_range, 1e-6, 1.0)?;
    let dim = raw.d / raw.heads;
    let fits =
        raw.d.is_multiple_of(raw.heads) && raw.heads.is_multiple_of(raw.kv_heads) && dim.is_multiple_of(16);
    if !fits {
        return bad(format!(
            "`model`: d {} over {} heads and {} key heads; head dimensions are multiples of 16, key heads divide heads",
            raw.d, raw.heads, raw.kv_heads
        ));
    }
    Ok(())
}
