//! One step of each objective.

use std::sync::Arc;

use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::team::Team;
use antefix_models::decoder::Model;
use antefix_models::files::ModelFiles;

use super::data::{Items, Part, problems, prompt_tokens};
use super::driver::{Figures, Run, Step};
use super::model::Trained;
use super::recipe::{RawFormat, RawObjective, Recipe};
use super::served::rounded;
use crate::error::TrainError;
use crate::ops::{self, RowLoss};
use crate::optim::Grads;
use crate::prefix_grouper::{
    Form, GroupOutcome, LanguageModel, PolicyLoss, Preference, PreferenceReport, Prompted, Response,
    Sampling, Scored, Task, Verifiable, policy_step, preference_step, rollout,
};

/// Mean importance ratios farther from 1 than this at the first update after a rollout mean that trainer and engine disagree.
const RATIO: f64 = 1e-2;

/// The objective with the recipe's own weight of the KL.
pub(super) fn policy(recipe: &Recipe) -> Option<PolicyLoss> {
    match &recipe.objective {
        RawObjective::Ce | RawObjective::Dpo { .. } => None,
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

/// The objective of preferences, if that is what is trained.
pub(super) fn preference(recipe: &Recipe) -> Option<Preference> {
    match recipe.objective {
        RawObjective::Dpo {
            beta,
            label_smoothing,
            ..
        } => Some(Preference {
            beta,
            label_smoothing,
        }),
        _ => None,
    }
}

/// Prompts once or again for each response.
fn form(repeat_prompts: bool) -> Form {
    match repeat_prompts {
        true => Form::Repeated,
        false => Form::Grouped,
    }
}

impl Run<'_> {
    pub(super) fn micro(&self) -> usize {
        self.recipe.train.micro.unwrap_or(self.recipe.train.batch)
    }

    /// What the policy is compared with.
    pub(super) fn reference(&self) -> Option<&dyn LanguageModel> {
        self.reference.as_ref().map(|r| r as &dyn LanguageModel)
    }

    pub(super) fn cross_entropy(&mut self, step: u64) -> Result<Step, TrainError> {
        let batch = self.recipe.train.batch;
        let from = step * batch as u64;
        let items = self
            .data
            .items(self.recipe.seed, Part::Train, from, batch, &self.tokens);
        let parts: Vec<Scored> = items
            .split(self.micro())
            .iter()
            .map(Items::pack)
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
            figures: Figures::None,
        })
    }

    pub(super) fn preference_step(&mut self, step: u64, preference: Preference) -> Result<Step, TrainError> {
        let batch = self.recipe.train.batch;
        let from = step * batch as u64;
        let repeat = matches!(
            self.recipe.objective,
            RawObjective::Dpo {
                repeat_prompts: true,
                ..
            }
        );
        let items = self
            .data
            .items(self.recipe.seed, Part::Train, from, batch, &self.tokens);
        let (mut grads, mut report) = (Grads::default(), PreferenceReport::default());
        for part in items.split(self.micro()) {
            let Items::Prompted(pairs) = part else {
                return Err(TrainError::Unsupported(
                    "preferences are pairs of responses".into(),
                ));
            };
            report += preference_step(
                &self.model,
                self.reference(),
                &pairs,
                preference,
                batch,
                form(repeat),
                &mut grads,
            )?;
        }
        let norm = self.update(&grads, step, report.loss)?;
        Ok(Step {
            loss: report.loss,
            norm,
            rows: report.rows,
            figures: Figures::Preference(report),
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

    pub(super) fn sampling(&self) -> Option<Sampling> {
        match self.recipe.objective {
            RawObjective::Ce | RawObjective::Dpo { .. } => None,
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

    /// The current weights as the engine runs them, as if written in `format`.
    pub(super) fn engine(&self, format: RawFormat) -> Result<Model, TrainError> {
        let Trained::Decoder(decoder) = &self.model else {
            return Err(TrainError::Unsupported(
                "the engine does not run GPT-like models".into(),
            ));
        };
        let spec = decoder.spec();
        let tensors = decoder
            .tensors()?
            .into_iter()
            .map(|(role, values)| Ok((role, rounded(role, values, spec, format)?)))
            .collect::<Result<_, TrainError>>()?;
        let files = ModelFiles::in_memory(spec.clone(), tensors)?;
        let team = Arc::new(Team::new(rayon::current_num_threads()));
        Ok(Model::load(files, Cpu::best(), team, Precision::F32)?)
    }

    /// Responses of the current weights to each problem's prompt.
    pub(super) fn draw(
        &self,
        prompts: &[Vec<u32>],
        sampling: Sampling,
        name: u64,
    ) -> Result<Vec<Vec<Response>>, TrainError> {
        let engine = self.engine(RawFormat::F32)?;
        rollout(&engine, prompts, sampling, self.recipe.seed, name)
            .map_err(|e| TrainError::Unsupported(format!("responses cannot be drawn: {e}")))
    }

    pub(super) fn policy_step(&mut self, step: u64, loss: PolicyLoss) -> Result<Step, TrainError> {
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
        let mut first = None;
        let (mut rows, mut norm) = (0, 0.0);
        for iteration in 0..iterations {
            let mut grads = Grads::default();
            let reference = self.reference();
            let report = policy_step(
                &self.model,
                reference,
                &outcomes,
                loss,
                temperature,
                form(repeat_prompts),
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
            figures: Figures::Policy(report),
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
    pub(super) fn answer(&self, response: &Response) -> String {
        let kept = response.tokens.len() - usize::from(!response.truncated);
        self.tokens.decode(&response.tokens[..kept])
    }
}
