//! The loop: steps, looks at held-out data, checkpoints.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use antefix_models::files::ModelFiles;
use serde_json::json;

use super::checkpoint::Checkpoint;
use super::data::Data;
use super::metrics::Metrics;
use super::model::{Tokens, Trained, build};
use super::recipe::{RawObjective, RawReference, Recipe};
use super::report;
use super::steps::{policy, preference};
use crate::error::TrainError;
use crate::model::Decoder;
use crate::optim::{AdamW, Schedule};
use crate::prefix_grouper::{LanguageModel, PreferenceReport, StepReport};

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Loss of the last one.
    pub loss: f64,
    /// Mean reward, for policies.
    pub reward: Option<f64>,
    /// Rows of the last step over its seconds.
    pub tokens_s: f64,
    /// Norm of its gradient before clipping.
    pub grad_norm: f64,
}

/// What a run looks at while it goes.
pub struct Watch<'a> {
    /// Set from outside: the run saves and ends.
    pub stop: &'a AtomicBool,
    /// Called after every step.
    pub progress: &'a mut dyn FnMut(Progress),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Steps done.
    pub step: u64,
    /// All of them, rather than stopped from outside.
    pub complete: bool,
    /// The last checkpoint.
    pub checkpoint: Checkpoint,
    /// Held-out figures at the end, by name.
    pub held_out: Vec<(String, f64)>,
}

/// A run in progress.
pub(super) struct Run<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) model: Trained,
    /// The model at the start, if the objective compares with it.
    pub(super) reference: Option<Trained>,
    pub(super) tokens: Tokens,
    pub(super) data: Data,
    pub(super) schedule: Schedule,
    pub(super) optimiser: AdamW,
    pub(super) metrics: Metrics,
}

/// What else an objective tells of a step.
#[derive(Clone, Copy)]
pub(super) enum Figures {
    None,
    Policy(StepReport),
    Preference(PreferenceReport),
}

/// Figures of one step.
pub(super) struct Step {
    pub(super) loss: f64,
    pub(super) norm: f64,
    pub(super) rows: usize,
    pub(super) figures: Figures,
}

impl Step {
    fn reward(&self) -> Option<f64> {
        match self.figures {
            Figures::Policy(p) => Some(p.reward),
            Figures::Preference(_) | Figures::None => None,
        }
    }
}

/// Trains what `recipe` says, in the folder `out`; goes on from the newest checkpoint there if `resume`.
///
/// # Errors
/// [`TrainError`]; checkpoints written before stay as they are.
pub fn train(recipe: &Recipe, out: &Path, resume: bool, watch: &mut Watch<'_>) -> Result<Finish, TrainError> {
    std::fs::create_dir_all(out).map_err(TrainError::io(out))?;
    let found = Checkpoint::latest(out)?;
    if found.is_some() && !resume {
        return Err(TrainError::Recipe(format!(
            "{} has a run already\nhint: go on with --resume, or give another folder with --out",
            out.display()
        )));
    }
    let (model, tokens) = build(recipe)?;
    let data = Data::open(recipe, &tokens, &model)?;
    let mut optimiser = AdamW::new(recipe.optim.clone(), model.params())?;
    let mut start = 0;
    let reference = match &recipe.objective {
        RawObjective::Grpo { .. } if policy(recipe).is_some_and(|p| p.beta > 0.0) => {
            Some(frozen(recipe, &model)?)
        }
        RawObjective::Dpo {
            reference: RawReference::Start,
            ..
        } => Some(frozen(recipe, &model)?),
        _ => None,
    };
    if let Some(checkpoint) = &found {
        checkpoint.restore(model.params(), &mut optimiser)?;
        start = checkpoint.step;
    }
    let file = out.join("recipe.toml");
    std::fs::write(&file, recipe.to_toml()?).map_err(TrainError::io(&file))?;
    let mut run = Run {
        recipe,
        reference,
        tokens,
        data,
        schedule: Schedule::new(recipe.schedule.clone(), recipe.train.steps)?,
        optimiser,
        metrics: Metrics::open(&out.join("metrics.jsonl"), start)?,
        model,
    };
    let [trained, all] = run.model.params().counts();
    run.metrics.line(&json!({
        "t": if start == 0 { "run" } else { "event" }, "kind": "start", "from": start, "recipe": recipe.recipe, "seed": recipe.seed,
        "trained": trained, "parameters": all, "threads": rayon::current_num_threads(), "data": run.data.facts(),
    }))?;
    run.go(start, out, watch)
}

/// The model at the start: the same numbers, nothing trained.
fn frozen(recipe: &Recipe, model: &Trained) -> Result<Trained, TrainError> {
    match model {
        Trained::Decoder(decoder) => {
            let files = ModelFiles::in_memory(decoder.spec().clone(), decoder.tensors()?)?;
            let train = &crate::model::Train::Nothing;
            Ok(Trained::Decoder(Decoder::load(&files, train, 0)?))
        }
        // It follows from the seed.
        Trained::Gpt(_) => Ok(build(recipe)?.0),
    }
}

impl Run<'_> {
    fn go(&mut self, start: u64, out: &Path, watch: &mut Watch<'_>) -> Result<Finish, TrainError> {
        let every = |n: u64, step: u64| n > 0 && step.is_multiple_of(n);
        let steps = self.recipe.train.steps;
        let mut saved = None;
        let mut held_out = Vec::new();
        let mut step = start;
        while step < steps && !watch.stop.load(Ordering::Relaxed) {
            let clock = Instant::now();
            let done = self.step(step)?;
            let seconds = clock.elapsed().as_secs_f64();
            step += 1;
            if !(done.loss.is_finite()
                && done.norm.is_finite()
                && done.loss.abs() <= self.recipe.train.loss_bound)
            {
                self.metrics
                    .line(&json!({"t": "event", "kind": "diverged", "step": step}))?;
                return Err(TrainError::Diverged {
                    step: step - 1,
                    loss: done.loss,
                });
            }
            self.log(step, &done, seconds)?;
            (watch.progress)(Progress {
                step,
                steps,
                loss: done.loss,
                reward: done.reward(),
                tokens_s: done.rows as f64 / seconds,
                grad_norm: done.norm,
            });
            if every(self.recipe.train.eval_every, step) && step < steps {
                self.look(step)?;
            }
            if every(self.recipe.train.save_every, step) && step < steps {
                saved = Some(Checkpoint::write(
                    out,
                    step,
                    self.model.params(),
                    &self.optimiser,
                )?);
            }
        }
        if step == steps {
            held_out = self.look(step)?;
        }
        let checkpoint = match saved {
            Some(saved) if saved.step == step => saved,
            _ => Checkpoint::write(out, step, self.model.params(), &self.optimiser)?,
        };
        report::write(out)?;
        Ok(Finish {
            step,
            complete: step == steps,
            checkpoint,
            held_out,
        })
    }

    fn log(&mut self, step: u64, done: &Step, seconds: f64) -> Result<(), TrainError> {
        let [resident, peak] = antefix_lab::resident_mb();
        let mut line = json!({
            "t": "step", "seed": self.recipe.seed, "step": step, "loss": done.loss, "gnorm": done.norm,
            "lr": self.recipe.optim.lr * self.schedule.at(step - 1), "rows": done.rows,
            "tok_s": done.rows as f64 / seconds, "seconds": seconds, "rss_mb": resident, "peak_mb": peak,
        });
        let more = match done.figures {
            Figures::None => json!({}),
            Figures::Policy(p) => json!({
                "reward": p.reward, "reward_std": p.reward_std, "flat_groups": p.flat_groups, "length": p.length, "kl": p.kl,
                "k1": p.k1, "clip_low": p.clipped[0], "clip_high": p.clipped[1], "ratio": p.ratio,
            }),
            Figures::Preference(p) => json!({
                "margin": p.margin, "accuracy": p.accuracy, "reward_chosen": p.rewards[0], "reward_rejected": p.rewards[1],
            }),
        };
        if let (Some(into), Some(more)) = (line.as_object_mut(), more.as_object()) {
            into.extend(more.clone());
        }
        self.metrics.line(&line)
    }

    fn step(&mut self, step: u64) -> Result<Step, TrainError> {
        match (policy(self.recipe), preference(self.recipe)) {
            (Some(loss), _) => self.policy_step(step, loss),
            (_, Some(loss)) => self.preference_step(step, loss),
            _ => self.cross_entropy(step),
        }
    }
}
