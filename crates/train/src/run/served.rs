//! Held-out data through the engine, as it would be served.

use std::sync::Arc;

use antefix_engine::log_softmax_at;
use antefix_kernels::quant;
use antefix_lab::logits;
use antefix_models::files::Role;
use antefix_models::spec::ModelSpec;

use super::data::Items;
use super::driver::Run;
use super::recipe::RawFormat;
use crate::error::TrainError;
use crate::prefix_grouper::Marked;

/// Plain sequences; of prompts, each with its first response.
fn sequences(items: Items) -> Vec<Marked> {
    let all = |tokens: Vec<u32>| Marked {
        scored: vec![true; tokens.len()],
        tokens,
    };
    match items {
        Items::Sequences(sequences) => sequences.into_iter().map(all).collect(),
        Items::Marked(marked) => marked,
        Items::Prompted(items) => items
            .into_iter()
            .map(|item| {
                let tokens: Vec<u32> = item.prefix.iter().chain(&item.responses[0]).copied().collect();
                Marked {
                    scored: (0..tokens.len()).map(|t| t >= item.prefix.len()).collect(),
                    tokens,
                }
            })
            .collect(),
    }
}

/// What is left of a matrix when it is written in `format`, as exports write it; vectors and rows that are not whole blocks stay.
pub(super) fn rounded(
    role: Role,
    values: Vec<f32>,
    spec: &ModelSpec,
    format: RawFormat,
) -> Result<Vec<f32>, TrainError> {
    let format = format.format();
    match role.shape(spec) {
        Some([rows, cols]) if rows > 1 && cols.is_multiple_of(format.block_len()) => {
            let failed = || {
                TrainError::Unsupported(format!(
                    "`{}` cannot be written as {}",
                    role.gguf_name(),
                    format.name()
                ))
            };
            let bytes = quant::quantise(format, &values).ok_or_else(failed)?;
            let mut out = vec![0.0; values.len()];
            quant::dequantise(format, &bytes, &mut out).map_err(|_| failed())?;
            Ok(out)
        }
        _ => Ok(values),
    }
}

impl Run<'_> {
    /// Perplexity of held-out data as the engine computes it with weights in `format`, and the share of scored tokens at which its likeliest
    /// token is the trainer's.
    pub(super) fn served(&self, items: Items, format: RawFormat) -> Result<Vec<(String, f64)>, TrainError> {
        let engine = Arc::new(self.engine(format)?);
        let (mut sum, mut same, mut count) = (0.0, 0usize, 0usize);
        for sequence in sequences(items) {
            let tokens = sequence.tokens.clone();
            let scored = Items::Marked(vec![sequence]).pack()?;
            let judged = self.judge(&scored)?;
            let mut next = 0;
            logits::each(&engine, &tokens, |row, logits| {
                if scored.rows.get(next).is_some_and(|&r| r as usize == row) {
                    sum -= f64::from(log_softmax_at(logits, scored.targets[next]));
                    same += usize::from(antefix_engine::argmax(logits) == judged[next].likeliest);
                    next += 1;
                }
            })
            .map_err(|e| TrainError::Unsupported(format!("the engine cannot run the model: {e}")))?;
            count += next;
        }
        Ok(match count {
            0 => Vec::new(),
            n => vec![
                ("served perplexity".to_string(), (sum / n as f64).exp()),
                ("served agreement".to_string(), same as f64 / n as f64),
            ],
        })
    }
}
