//! One question after the other on an engine of its own.

use std::sync::Arc;
use std::time::Instant;

use antefix_engine::{Budget, Engine, Event, Job, Options, RawJob};
use antefix_kv::Pool;
use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;

use super::EvalError;
use crate::tasks::Sample;

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Text.
    pub text: String,
    /// Seconds to the first token.
    pub ttft_s: f64,
    /// Fraction of the keys and values that were kept (bytes).
    pub kept: f64,
}

/// A model with a method, ready to be asked. Answers are greedy and do not depend on earlier questions.
pub struct Runner {
    engine: Engine,
    name: String,
    method: String,
}

impl Runner {
    /// A runner for prompts with answers of up to `context` tokens.
    pub fn new(model: &Arc<Model>, tokenizer: &Arc<Tokenizer>, name: &str, context: usize) -> Self {
        let sizes = Pool::new(model.kv_shape(), 0);
        let options = Options {
            kv_bytes: sizes.bytes_for(context + 64),
            context,
            budget: Budget::default(),
        };
        Self {
            engine: Engine::new(Arc::clone(model), Arc::clone(tokenizer), options),
            name: name.to_string(),
            method: "dense".to_string(),
        }
    }

    /// The method with its settings.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The model's name.
    pub fn model_name(&self) -> &str {
        &self.name
    }

    /// Asks one question.
    ///
    /// # Errors
    /// When the prompt does not fit the model, or the model fails.
    pub fn ask(&mut self, sample: &Sample) -> Result<Answer, EvalError> {
        let raw = RawJob {
            tokens: sample.prompt(),
            max_tokens: Some(sample.max_tokens),
            no_cache: true,
            ..RawJob::default()
        };
        let job = Job::new(raw, self.engine.model().spec().vocab, self.engine.context())?;
        let start = Instant::now();
        self.engine.submit(job)?;
        let (mut text, mut ttft_s) = (String::new(), None);
        let mut events = Vec::new();
        while !self.engine.is_idle() {
            self.engine.step(&mut events)?;
            for event in events.drain(..) {
                match event {
                    Event::Token { text: piece, .. } => {
                        ttft_s.get_or_insert_with(|| start.elapsed().as_secs_f64());
                        text.push_str(&piece);
                    }
                    Event::End { text: rest, .. } => text.push_str(&rest),
                    Event::Prompt { .. } => {}
                }
            }
        }
        Ok(Answer {
            text,
            ttft_s: ttft_s.unwrap_or_else(|| start.elapsed().as_secs_f64()),
            kept: 1.0,
        })
    }
}
