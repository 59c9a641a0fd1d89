//! The result of an installation: what a request carries.

use std::num::NonZeroUsize;
use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::card::Axis;
use super::hook::HookMaker;
use super::knobs::Knobs;
use super::planner::{DecodePlanner, Planner};
use super::policy::CachePolicy;
use super::prompt::{Prompt, PromptPass, Words};
use super::rotation::{Rotation, Stretch};
use crate::chunk_use::ChunkUse;
use crate::hooks::{HookPlan, Observer};

/// Everything that the methods of a request changed, checked and immutable. The default is dense attention.
#[derive(Debug, Default)]
pub struct Program {
    pub(super) methods: Vec<(Axis, Knobs)>,
    pub(super) exact: bool,
    pub(super) prompt: Vec<Arc<dyn PromptPass>>,
    pub(super) stretch: Stretch,
    pub(super) planner: Option<Arc<dyn Planner>>,
    pub(super) decode_planner: Option<Arc<dyn DecodePlanner>>,
    pub(super) correct_every: Option<NonZeroUsize>,
    pub(super) policy: Option<Arc<dyn CachePolicy>>,
    pub(super) chunks: Option<Arc<dyn ChunkUse>>,
    pub(super) plan: Option<Arc<HookPlan>>,
    pub(super) hooks: Vec<Arc<dyn HookMaker>>,
    /// Sum of the files that its planners were built from; 0: none.
    pub(super) files: u64,
}

impl Program {
    /// The methods and their settings, by axis.
    pub fn methods(&self) -> &[(Axis, Knobs)] {
        &self.methods
    }

    /// Name of the method of `axis`, if there is one.
    pub fn on(&self, axis: Axis) -> Option<&'static str> {
        let found = self.methods.iter().find(|(own, _)| *own == axis);
        found.map(|(_, knobs)| knobs.card().name)
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

    /// Whether it only changes angles and activations, so that a text can be computed as it is and scored token by token: no prompt
    /// is rewritten, no cache cut, no document computed apart from what stands before it.
    pub fn scores_texts(&self) -> bool {
        let plans = self.planner.is_some() || self.decode_planner.is_some();
        self.prompt.is_empty() && self.policy.is_none() && self.chunks.is_none() && !plans
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

    /// What chooses the keys that the rows of a prompt read.
    pub fn planner(&self) -> Option<&Arc<dyn Planner>> {
        self.planner.as_ref()
    }

    /// What chooses the keys that drawn tokens read.
    pub fn decode_planner(&self) -> Option<&Arc<dyn DecodePlanner>> {
        self.decode_planner.as_ref()
    }

    /// Drawn tokens after which their rows are computed again, densely, as if they had been given; `None`: never.
    pub fn correct_every(&self) -> Option<NonZeroUsize> {
        self.correct_every
    }

    /// The salt under which pages of a prompt may be shared: what a planner has touched only with those that it would touch the same
    /// way.
    pub fn salted(&self, salt: u64) -> u64 {
        let prefill = self.methods.iter().find(|(axis, _)| *axis == Axis::Prefill);
        match prefill.filter(|_| self.planner.is_some()) {
            None => salt,
            Some((_, knobs)) => {
                XxHash3_64::oneshot_with_seed(salt ^ self.files, knobs.to_string().as_bytes())
            }
        }
    }

    /// What decides about the cache.
    pub fn policy(&self) -> Option<&Arc<dyn CachePolicy>> {
        self.policy.as_ref()
    }

    /// How documents that were computed before make up the prompt.
    pub fn chunk_use(&self) -> Option<&Arc<dyn ChunkUse>> {
        self.chunks.as_ref()
    }

    /// Whether anything reads or changes activations.
    pub fn has_hooks(&self) -> bool {
        self.plan.is_some()
    }

    /// What its hooks bring to a sequence with a prompt of `prompt` tokens: an observer, or nothing.
    pub fn observer(&self, prompt: usize, cap: usize) -> Option<Observer> {
        let start = Observer::new(Arc::clone(self.plan.as_ref()?), prompt, cap);
        Some(
            self.hooks
                .iter()
                .fold(start, |o, maker| o.with(maker.make(prompt))),
        )
    }

    /// Whether its hooks must see every token, cached or not.
    pub fn sees_all(&self) -> bool {
        self.hooks.iter().any(|maker| maker.sees_all())
    }
}
