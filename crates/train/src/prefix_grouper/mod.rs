//! Prefix Grouper (arXiv 2506.05433): train on many responses to a prompt and compute the prompt once, forward and backward; with GRPO and its
//! kin on top.
//!
//! What it does: a prompt and its G responses stand in one packed row; every response attends the prompt and itself. Losses and gradients are
//! those of the prompt repeated G times, at (L + G l) / (G (L + l)) of the rows.
//! When it helps: long prompts, short answers, large groups. With L = l it saves less than a half.
//! Steps: `layout.rs` (section 2 and the boundary row of 3.4), [`crate::ops::attend`] (3.3), `objective.rs` (GRPO, section 4), `rollout.rs`; `dpo.rs` for pairs.
//! Differences from the paper's code: prefix keys are not copied for each response; there is no padding.

mod advantage;
mod dpo;
mod layout;
mod objective;
mod rollout;
mod step;
mod task;

#[cfg(test)]
mod tests;

pub use self::advantage::{Advantage, advantages};
pub use self::dpo::{Preference, PreferenceReport, preference_report, preference_step};
pub use self::layout::{Form, Marked, Prompted, Scored, pack, pack_marked, pack_sequences};
pub use self::objective::{Aggregate, PolicyLoss, RatioLevel, TokenStats, Variant};
pub use self::rollout::{Response, RolloutError, Sampling, rollout};
pub use self::step::{GroupOutcome, LanguageModel, StepReport, policy_step};
pub use self::task::{Problem, Task, TaskError, Verifiable};
