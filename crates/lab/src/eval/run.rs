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
    /// Tokens of the prompt whose keys and values were there already.
    pub cached_tokens: usize,
}

/// What rows call a program, dense attention for `None`.
pub fn method_name(program: Option<&Program>, question_after_cut: bool) -> String {
    let after = match question_after_cut {
        true => " (question after the cut)",
        false => "",
    };
    program.map_or("dense".into(), |p| p.tag() + after)
}

/// How questions are asked.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// The model's name in records.
    pub name: &'a str,
    /// Tokens of a prompt with its answer at most.
    pub context: usize,
    /// Prompts whose pages are kept, so that a method that starts from the dense prompt finds them: the same answers, but the time to the
    /// first token is that of a cached prompt. 0: each question computes its prompt.
    pub kept_prompts: usize,
    /// A cache policy decides before it sees the question.
    pub question_after_cut: bool,
}

/// A model with methods, ready to be asked. Answers are greedy and do not depend on earlier questions.
pub struct Runner {
    engine: Engine,
    name: String,
    program: Option<Arc<Program>>,
    keeps_prompts: bool,
    question_after_cut: bool,
}

impl Runner {
    /// A runner with room for each of `programs`, dense attention for `None`. It asks under the first until [`Runner::under`].
    pub fn new(
        model: &Arc<Model>,
        tokenizer: &Arc<Tokenizer>,
        setting: &Setting<'_>,
        programs: &[Option<Arc<Program>>],
    ) -> Self {
        let sizes = Pool::new(model.kv_shape(), 0);
        let reuses = programs.iter().flatten().any(|p| p.chunk_use().is_some());
        // A cache policy writes what stays before the rest is freed; documents fill pages of their own; a quarter holds what planners keep
        // of keys.
        let quarters = if reuses { 25 } else { 9 };
        let options = Options {
            kv_bytes: sizes.bytes_for(setting.context + 64) * (quarters + 4 * setting.kept_prompts) / 4
                + sizes.shape().block_bytes(),
            context: setting.context,
            budget: Budget::default(),
        };
        Self {
            engine: Engine::new(Arc::clone(model), Arc::clone(tokenizer), options),
            name: setting.name.to_string(),
            program: programs.first().cloned().flatten(),
            keeps_prompts: setting.kept_prompts > 0,
            question_after_cut: setting.question_after_cut,
        }
    }

    /// Asks under this program from now on.
    pub fn under(&mut self, program: Option<Arc<Program>>) {
        self.program = program;
    }

    /// The method with its settings.
    pub fn method(&self) -> String {
        method_name(self.program.as_deref(), self.question_after_cut)
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
            no_cache: !self.keeps_prompts,
            ..RawJob::default()
        };
        let job = self.engine.job(raw)?;
        let start = Instant::now();
        self.engine.submit(job)?;
        let (mut text, mut ttft_s, mut kept, mut cached_tokens) = (String::new(), None, 1.0, 0);
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
                        text: rest,
                        method,
                        usage,
                        ..
                    } => {
                        text.push_str(&rest);
                        cached_tokens = usage.cached_tokens;
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
            cached_tokens,
        })
    }
}
