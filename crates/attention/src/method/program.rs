//! The result of an installation: what a request carries.

use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::card::Axis;
use super::knobs::Knobs;
use super::prompt::{Prompt, PromptPass, Words};
use super::rotation::{Rotation, Stretch};

/// Everything that the methods of a request changed, checked and immutable. The default is dense attention.
#[derive(Debug, Default)]
pub struct Program {
    methods: Vec<(Axis, Knobs)>,
    exact: bool,
    prompt: Vec<Arc<dyn PromptPass>>,
    stretch: Stretch,
}

impl Program {
    pub(super) fn new(
        methods: Vec<(Axis, Knobs)>,
        exact: bool,
        prompt: Vec<Arc<dyn PromptPass>>,
        stretch: Stretch,
    ) -> Self {
        Self {
            methods,
            exact,
            prompt,
            stretch,
        }
    }

    /// The methods and their settings, by axis.
    pub fn methods(&self) -> &[(Axis, Knobs)] {
        &self.methods
    }

    /// Whether nothing was chosen.
    pub fn is_dense(&self) -> bool {
        self.methods.is_empty()
    }

    /// Whether every method in it is exact.
    pub fn is_exact(&self) -> bool {
        self.exact || self.is_dense()
    }

    /// Methods and settings as one text: `streaming_llm,sinks=4,... + jrt,...`; `dense` if there are none.
    pub fn tag(&self) -> String {
        let each: Vec<String> = self.methods.iter().map(|(_, knobs)| knobs.to_string()).collect();
        if each.is_empty() {
            super::DENSE.into()
        } else {
            each.join(" + ")
        }
    }

    /// A number that differs between programs with different tags, the same in every process.
    pub fn fingerprint(&self) -> u64 {
        XxHash3_64::oneshot(self.tag().as_bytes())
    }

    /// Names of the methods: `streaming_llm+jrt`; `dense` if there are none.
    pub fn name(&self) -> String {
        let each: Vec<&str> = self.methods.iter().map(|(_, knobs)| knobs.card().name).collect();
        if each.is_empty() {
            super::DENSE.into()
        } else {
            each.join("+")
        }
    }

    /// What is computed instead of `prompt`.
    pub fn rewrite(&self, prompt: Prompt, words: &dyn Words) -> Prompt {
        self.prompt.iter().fold(prompt, |p, pass| pass.rewrite(p, words))
    }

    /// Angles and scale of a request of up to `tokens` tokens; `None` if they are the model's own.
    pub fn rotation(&self, tokens: usize) -> Option<&Rotation> {
        self.stretch.choose(tokens).filter(|r| !r.is_plain())
    }

    /// Tokens that a request may have at most on a model trained on `context`.
    pub fn context(&self, context: usize) -> usize {
        context.max(self.stretch.limit())
    }
}
