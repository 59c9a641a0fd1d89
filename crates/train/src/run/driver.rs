//! The loop: steps, looks at held-out data, checkpoints.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::team::Team;
use antefix_models::decoder::Model;
use antefix_models::files::ModelFiles;
use serde_json::json;

use super::checkpoint::Checkpoint;
use super::data::{Data, Items, Part, problems, prompt_tokens};
use super::metrics::{Metrics, resident_mb};
use super::model::{Tokens, Trained, build};
use super::recipe::{RawObjective, Recipe};
use super::report;
use crate::error::TrainError;
use crate::model::Decoder;
use crate::ops::{self, RowLoss};
use crate::optim::{AdamW, Grads, Schedule};
use crate::prefix_grouper::{
    Form, GroupOutcome, LanguageModel, PolicyLoss, Prompted, Response, Sampling, Scored, StepReport, Task,
    Verifiable, pack, pack_sequences, policy_step, rollout,
};

/// Mean importance ratios farther from 1 than this at the first update after a rollout mean that trainer and engine disagree.
const RATIO: f64 = 1e-2;

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

struct Run<'a> {
    recipe: &'a Recipe,
    model: Trained,
    /// The policy at the start, for the KL.
    reference: Option<Decoder>,
    tokens: Tokens,
    data: Data,
    schedule: Schedule,
    optimiser: AdamW,
    metrics: Metrics,
}

/// Figures of one step.
struct Step {
    loss: f64,
    norm: f64,
    rows: usize,
    policy: Option<StepReport>,
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
    let data = Data::open(recipe, &tokens)?;
    let mut optimiser = AdamW::new(recipe.optim.clone(), model.params())?;
    let mut start = 0;
    let reference = match &recipe.objective {
        RawObjective::Grpo { .. } if policy(recipe).is_some_and(|p| p.beta > 0.0) => Some(frozen(&model)?),
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
        "trained": trained, "parameters": all, "threads": rayon::current_num_threads(),
    }))?;
    run.go(start, out, watch)
}

/// The policy at the start: the same numbers, nothing trained.
fn frozen(model: &Trained) -> Result<Decoder, TrainError> {
    match model {
        Trained::Decoder(decoder) => {
            let files = ModelFiles::in_memory(decoder.spec().clone(), decoder.tensors()?)?;
            Decoder::load(&files, &crate::model::Train::Nothing, 0)
        }
        Trained::Gpt(_) => Err(TrainError::Unsupported(
            "a GPT-like model is not drawn from".into(),
        )),
    }
}

/// The objective with the recipe's own weight of the KL.
fn policy(recipe: &Recipe) -> Option<PolicyLoss> {
    match &recipe.objective {
        RawObjective::Ce => None,
        RawObjective::Grpo {
            variant,
            max_tokens,
            beta,
            ..
        } => {
            let loss = variant.loss(*max_tokens);
            Some(PolicyLoss {
                beta: beta.unwrap_or(loss.beta),
                ..loss
            })
        }
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
                reward: done.policy.map(|p| p.reward),
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
        let mut line = json!({
            "t": "step", "seed": self.recipe.seed, "step": step, "loss": done.loss, "gnorm": done.norm,
            "lr": self.recipe.optim.lr * self.schedule.at(step - 1), "rows": done.rows,
            "tok_s": done.rows as f64 / seconds, "seconds": seconds, "rss_mb": resident_mb(),
        });
        if let (Some(p), Some(into)) = (done.policy, line.as_object_mut()) {
            let more = json!({
                "reward": p.reward, "reward_std": p.reward_std, "flat_groups": p.flat_groups, "length": p.length, "kl": p.kl,
                "k1": p.k1, "clip_low": p.clipped[0], "clip_high": p.clipped[1], "ratio": p.ratio,
            });
            into.extend(more.as_object().cloned().unwrap_or_default());
        }
        self.metrics.line(&line)
    }

    fn step(&mut self, step: u64) -> Result<Step, TrainError> {
        match policy(self.recipe) {
            None => self.cross_entropy(step),
            Some(loss) => self.policy(step, loss),
        }
    }

    #[expect(clippy::unused_self, reason = "beside the other steps of a run")]
    fn pack(&self, items: Items) -> Result<Scored, TrainError> {
        match items {
            Items::Sequences(sequences) => pack_sequences(&sequences),
            Items::Prompted(items) => pack(&items, Form::Grouped),
        }
    }

    fn micro(&self) -> usize {
        self.recipe.train.micro.unwrap_or(self.recipe.train.batch)
    }

    fn cross_entropy(&mut self, step: u64) -> Result<Step, TrainError> {
        let batch = self.recipe.train.batch;
        let from = step * batch as u64;
        let items = self
            .data
            .items(self.recipe.seed, Part::Train, from, batch, &self.tokens);
        let parts: Vec<Scored> = split(items, self.micro())
            .into_iter()
            .map(|p| self.pack(p))
            .collect::<Result<_, _>>()?;
        // The mean is over all tokens of the step, however it is cut.
        let total: usize = parts.iter().map(|p| p.targets.len()).sum();
        let (mut grads, mut loss, mut rows) = (Grads::default(), 0.0, 0);
        for part in &parts {
            let weights = Arc::new(vec![1.0 / total as f64; part.targets.len()]);
            let hidden = ops::embed(&self.model.hidden(&part.batch)?, &part.rows, 1.0)?;
            let value = ops::token_loss(
                &hidden,
                self.model.output(),
                &part.targets,
                1.0,
                RowLoss::CrossEntropy(weights),
            )?;
            grads.add(self.model.params(), &value)?;
            loss += f64::from(value.to_scalar::<f32>()?);
            rows += part.batch.packing.rows();
        }
        let norm = self.update(&grads, step, loss)?;
        Ok(Step {
            loss,
            norm,
            rows,
            policy: None,
        })
    }

    /// One step of the optimiser, unless the loss is of no use.
    fn update(&mut self, grads: &Grads, step: u64, loss: f64) -> Result<f64, TrainError> {
        if !loss.is_finite() || !grads.norm().is_finite() {
            return Ok(f64::NAN);
        }
        self.optimiser
            .step(self.model.params(), grads, self.schedule.at(step))
    }

    fn sampling(&self) -> Option<Sampling> {
        match self.recipe.objective {
            RawObjective::Ce => None,
            RawObjective::Grpo {
                group,
                max_tokens,
                temperature,
                ..
            } => Some(Sampling {
                group,
                max_tokens,
                temperature,
                end: self.tokens.end(),
            }),
        }
    }

    /// Responses of the current weights to each problem's prompt.
    fn draw(
        &self,
        prompts: &[Vec<u32>],
        sampling: Sampling,
        name: u64,
    ) -> Result<Vec<Vec<Response>>, TrainError> {
        let Trained::Decoder(decoder) = &self.model else {
            return Err(TrainError::Unsupported(
                "a GPT-like model is not drawn from".into(),
            ));
        };
        let files = ModelFiles::in_memory(decoder.spec().clone(), decoder.tensors()?)?;
        let team = Arc::new(Team::new(rayon::current_num_threads()));
        let engine = Model::load(files, Cpu::best(), team, Precision::F32)?;
        rollout(&engine, prompts, sampling, self.recipe.seed, name)
            .map_err(|e| TrainError::Unsupported(format!("responses cannot be drawn: {e}")))
    }

    fn policy(&mut self, step: u64, loss: PolicyLoss) -> Result<Step, TrainError> {
        let RawObjective::Grpo {
            iterations,
            mask_truncated,
            repeat_prompts,
            temperature,
            ..
        } = self.recipe.objective
        else {
            return Err(TrainError::Unsupported("this objective draws nothing".into()));
        };
        let (Some(task), Some(sampling)) = (self.data.task().cloned(), self.sampling()) else {
            return Err(TrainError::Unsupported("a policy needs a task".into()));
        };
        let batch = self.recipe.train.batch;
        let from = step * batch as u64;
        let outcomes = self.outcomes(&task, sampling, from, batch, step, mask_truncated)?;
        let form = if repeat_prompts {
            Form::Repeated
        } else {
            Form::Grouped
        };
        let mut first = None;
        let (mut rows, mut norm) = (0, 0.0);
        for iteration in 0..iterations {
            let mut grads = Grads::default();
            let reference = self.reference.as_ref().map(|r| r as &dyn LanguageModel);
            let report = policy_step(
                &self.model,
                reference,
                &outcomes,
                loss,
                temperature,
                form,
                &mut grads,
            )?;
            if iteration == 0 && (report.ratio - 1.0).abs() > RATIO {
                return Err(TrainError::Unsupported(format!(
                    "trainer and engine disagree: the mean importance ratio after a rollout is {}",
                    report.ratio
                )));
            }
            rows += report.rows;
            norm = self.update(&grads, step, report.loss)?;
            first.get_or_insert(report);
        }
        let report = first.unwrap_or_default();
        Ok(Step {
            loss: report.loss,
            norm,
            rows,
            policy: Some(report),
        })
    }

    fn outcomes(
        &self,
        task: &Task,
        sampling: Sampling,
        from: u64,
        n: usize,
        step: u64,
        mask_truncated: bool,
    ) -> Result<Vec<GroupOutcome>, TrainError> {
        let problems = problems(task, self.recipe.seed, Part::Train, from, n);
        let prompts: Vec<Vec<u32>> = problems
            .iter()
            .map(|p| prompt_tokens(&self.tokens, &p.prompt))
            .collect();
        let drawn = self.draw(&prompts, sampling, step)?;
        Ok(problems
            .iter()
            .zip(prompts)
            .zip(drawn)
            .map(|((problem, prefix), group)| GroupOutcome {
                rewards: group
                    .iter()
                    .map(|r| task.reward(problem, &self.answer(r)))
                    .collect(),
                masked: group.iter().map(|r| mask_truncated && r.truncated).collect(),
                old: group.iter().map(|r| r.log_probs.clone()).collect(),
                item: Prompted {
                    prefix,
                    responses: group.into_iter().map(|r| r.tokens).collect(),
                },
            })
            .collect())
    }

    /// What a response says, without its end token.
    fn answer(&self, response: &Response) -> String {
        let kept = response.tokens.len() - usize::from(!response.truncated);
        self.tokens.decode(&response.tokens[..kept])
    }

    /// Looks at held-out data: cross-entropy, and the mean reward of one response each for policies.
    fn look(&mut self, step: u64) -> Result<Vec<(String, f64)>, TrainError> {
        let n = self.recipe.train.eval_items;
        let mut figures = Vec::new();
        match (self.data.task().cloned(), self.sampling()) {
            (Some(task), Some(sampling)) => {
                let problems = problems(&task, self.recipe.seed, Part::HeldOut, 0, n);
                let prompts: Vec<Vec<u32>> = problems
                    .iter()
                    .map(|p| prompt_tokens(&self.tokens, &p.prompt))
                    .collect();
                // The same random numbers at every look.
                let drawn = self.draw(&prompts, Sampling { group: 1, ..sampling }, u64::MAX)?;
                let sum: f64 = problems
                    .iter()
                    .zip(&drawn)
                    .map(|(p, g)| task.reward(p, &self.answer(&g[0])))
                    .sum();
                figures.push(("reward".to_string(), sum / n as f64));
            }
            _ => {
                let items = self
                    .data
                    .items(self.recipe.seed, Part::HeldOut, 0, n, &self.tokens);
                let (mut sum, mut count) = (0.0, 0);
                for part in split(items, self.micro()) {
                    let scored = self.pack(part)?;
                    let hidden = ops::embed(&self.model.hidden(&scored.batch)?.detach(), &scored.rows, 1.0)?;
                    let logp = ops::log_probs(&hidden, &self.model.output().detach(), &scored.targets, 1.0)?;
                    sum -= logp.to_vec1::<f32>()?.iter().map(|&x| f64::from(x)).sum::<f64>();
                    count += scored.targets.len();
                }
                if count > 0 {
                    figures.push(("cross-entropy".to_string(), sum / count as f64));
                }
            }
        }
        for (name, value) in &figures {
            self.metrics.line(&json!({
                "t": "eval", "seed": self.recipe.seed, "step": step, "name": name, "value": value, "n": n,
            }))?;
        }
        Ok(figures)
    }
}

/// Items in pieces of `size`.
fn split(items: Items, size: usize) -> Vec<Items> {
    match items {
        Items::Sequences(all) => all.chunks(size).map(|c| Items::Sequences(c.to_vec())).collect(),
        Items::Prompted(all) => all.chunks(size).map(|c| Items::Prompted(c.to_vec())).collect(),
    }
}
