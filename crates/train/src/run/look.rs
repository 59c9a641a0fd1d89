//! Looks at held-out data while a run goes.

use serde_json::json;

use super::data::{Items, Part, problems, prompt_tokens};
use super::driver::Run;
use super::steps::preference;
use crate::error::TrainError;
use crate::ops::{self, Judged};
use crate::prefix_grouper::{
    LanguageModel, PreferenceReport, Sampling, Scored, Task, Verifiable, preference_report,
};

/// Names and values.
type Figures = Vec<(String, f64)>;

impl Run<'_> {
    /// Held-out figures, which are written down: mean reward of one response each for policies, loss and margin for preferences, and
    /// cross-entropy and accuracy for all else.
    pub(super) fn look(&mut self, step: u64) -> Result<Figures, TrainError> {
        let mut figures = match (
            self.data.task().cloned(),
            self.sampling(),
            preference(self.recipe),
        ) {
            (Some(task), Some(sampling), _) => self.rewards(&task, sampling)?,
            (_, _, Some(_)) => self.preferences()?,
            _ => self.predictions()?,
        };
        let n = self.recipe.train.eval_items;
        let served = &self.recipe.train.served;
        let mut lines: Vec<usize> = figures.iter().map(|_| n).collect();
        if served.items > 0 {
            figures.extend(self.served(self.held_out(served.items), served.format)?);
            lines.resize(figures.len(), served.items);
        }
        for ((name, value), n) in figures.iter().zip(lines) {
            self.metrics.line(&json!({
                "t": "eval", "seed": self.recipe.seed, "step": step, "name": name, "value": value, "n": n,
            }))?;
        }
        Ok(figures)
    }

    fn held_out(&self, n: usize) -> Items {
        self.data
            .items(self.recipe.seed, Part::HeldOut, 0, n, &self.tokens)
    }

    fn rewards(&self, task: &Task, sampling: Sampling) -> Result<Figures, TrainError> {
        let n = self.recipe.train.eval_items;
        let problems = problems(task, self.recipe.seed, Part::HeldOut, 0, n);
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
        Ok(vec![("reward".to_string(), sum / n as f64)])
    }

    fn preferences(&self) -> Result<Figures, TrainError> {
        let (Some(preference), Items::Prompted(pairs)) = (
            preference(self.recipe),
            self.held_out(self.recipe.train.eval_items),
        ) else {
            return Ok(Vec::new());
        };
        let mut report = PreferenceReport::default();
        for part in pairs.chunks(self.micro()) {
            report += preference_report(&self.model, self.reference(), part, preference, pairs.len())?;
        }
        let figures = [
            ("preference loss", report.loss),
            ("reward margin", report.margin),
            ("preference accuracy", report.accuracy),
        ];
        Ok(match pairs.is_empty() {
            true => Vec::new(),
            false => figures.map(|(name, value)| (name.to_string(), value)).into(),
        })
    }

    /// How the model predicts each scored token.
    pub(super) fn judge(&self, scored: &Scored) -> Result<Vec<Judged>, TrainError> {
        let hidden = self.model.hidden(&scored.batch)?.detach();
        let hidden = ops::embed(&hidden, &scored.rows, 1.0)?;
        Ok(ops::judge(&hidden, self.model.output(), &scored.targets)?)
    }

    /// Cross-entropy, share of scored tokens that are the likeliest, and share of answers of which every token is.
    fn predictions(&self) -> Result<Figures, TrainError> {
        let (mut sum, mut count, mut right) = (0.0, 0.0, 0.0);
        let (mut answers, mut whole) = (0.0, 0.0);
        for part in self.held_out(self.recipe.train.eval_items).split(self.micro()) {
            let scored = part.pack()?;
            let judged = self.judge(&scored)?;
            let rows = scored.owners.iter().zip(&judged).collect::<Vec<_>>();
            for answer in rows.chunk_by(|a, b| a.0 == b.0) {
                answers += 1.0;
                whole += f64::from(u8::from(answer.iter().all(|(_, j)| j.right)));
            }
            sum -= judged.iter().map(|j| j.log_prob).sum::<f64>();
            right += judged.iter().map(|j| f64::from(u8::from(j.right))).sum::<f64>();
            count += judged.len() as f64;
        }
        let mut figures = Vec::new();
        if count > 0.0 {
            figures.push(("cross-entropy".to_string(), sum / count));
            figures.push(("accuracy".to_string(), right / count));
            if self.data.has_answers() {
                figures.push(("answers".to_string(), whole / answers));
            }
        }
        Ok(figures)
    }
}
