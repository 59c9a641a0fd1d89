//! One question after the other on an engine of its own.

use std::sync::Arc;
use std::time::Instant;

use antefix_attention::method::Program;
use antefix_engine::{Budget, Engine, Event, Options, RawJob};
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
    program: Option<Arc<Program>>,
    question_after_cut: bool,
}

impl Runner {
    /// A runner for prompts with answers of up to `context` tokens, under `program`. With `question_after_cut` a cache policy decides
    /// before it sees the question.
    pub fn new(
        model: &Arc<Model>,
        tokenizer: &Arc<Tokenizer>,
        (name, context): (&str, usize),
        program: Option<Arc<Program>>,
        question_after_cut: bool,
    ) -> Self {
        let sizes = Pool::new(model.kv_shape(), 0);
        let reuses = program.as_ref().is_some_and(|p| p.chunk_use().is_some());
        let options = Options {
            // A cache policy writes what stays before the rest is freed; documents fill pages of their own; a quarter holds what planners
            // keep of keys.
            kv_bytes: sizes.bytes_for(context + 64) * if reuses { 25 } else { 9 } / 4
                + sizes.shape().block_bytes(),
            context,
            budget: Budget::default(),
        };
        Self {
            engine: Engine::new(Arc::clone(model), Arc::clone(tokenizer), options),
            name: name.to_string(),
            program,
            question_after_cut,
        }
    }

    /// The method with its settings.
    pub fn method(&self) -> String {
        let after = match self.question_after_cut {
            true => " (question after the cut)",
            false => "",
        };
        self.program.as_ref().map_or("dense".into(), |p| p.tag() + after)
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
            documents: sample.documents(),
            program: self.program.clone(),
            question_after_cut: self.question_after_cut,
            max_tokens: Some(sample.max_tokens),
            no_cache: true,
            ..RawJob::default()
        };
        let job = self.engine.job(raw)?;
        let start = Instant::now();
        self.engine.submit(job)?;
        let (mut text, mut ttft_s, mut kept) = (String::new(), None, 1.0);
        let mut events = Vec::new();
        while !self.engine.is_idle() {
            self.engine.step(&mut events)?;
            for event in events.drain(..) {
                match event {
                    Event::Token { text: piece, .. } => {
                        ttft_s.get_or_insert_with(|| start.elapsed().as_secs_f64());
                        text.push_str(&piece);
                    }
                    Event::End {
                        text: rest, method, ..
                    } => {
                        text.push_str(&rest);
                        kept = method.map_or(1.0, |m| m.kept);
                    }
                    Event::Prompt { .. } | Event::Pooled { .. } => {}
                }
            }
        }
        Ok(Answer {
            text,
            ttft_s: ttft_s.unwrap_or_else(|| start.elapsed().as_secs_f64()),
            kept,
        })
    }
}
