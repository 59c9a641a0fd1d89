//! What a model thinks of right answers under methods, beside dense attention: probability, KL divergence, most likely token.

use std::sync::Arc;

use antefix_attention::method::{Answer, Ask, Host, HostError, Program, Prompt, Told};
use antefix_engine::log_softmax_at;
use antefix_papers::repro::{Belief, mean};
use serde::{Deserialize, Serialize};

use super::sample_seed;
use crate::host::EngineHost;
use crate::reuse::distance;
use crate::tasks::{Kit, Sample, Task, TaskError};

/// Tokens of an answer that are looked at.
const ANSWER: usize = 16;

/// Questions of one cell.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    /// The task.
    pub task: Task,
    /// Tokens of a prompt.
    pub length: usize,
    /// Where the fact stands, 0 to 1.
    pub depth: f64,
    /// Questions.
    pub samples: usize,
    /// Decides the questions; they are those of [`super::run`].
    pub seed: u64,
    /// A cache policy decides before it has seen the question.
    pub question_after_cut: bool,
}

/// Why there are no beliefs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BeliefError {
    /// The task does not fit its length.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// The prompt does not fit the model, or the model failed.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Beliefs under each program, one a question; dense attention for `None`.
///
/// # Errors
/// When the task does not fit, or the model fails.
pub fn beliefs(
    host: &mut EngineHost,
    kit: &Kit<'_>,
    cell: &Cell,
    programs: &[Option<Arc<Program>>],
) -> Result<Vec<Vec<Belief>>, BeliefError> {
    let mut out = vec![Vec::with_capacity(cell.samples); programs.len()];
    for i in 0..cell.samples {
        let seed = sample_seed(cell.seed, i);
        let sample = cell.task.sample(kit, cell.length, cell.depth, seed)?;
        let mut ask = question(host, &sample, cell.question_after_cut);
        let dense = host.ask(&ask)?;
        for (program, out) in programs.iter().zip(&mut out) {
            ask.program.clone_from(program);
            let told = match program {
                Some(_) => host.ask(&ask)?,
                None => dense.clone(),
            };
            out.push(belief(&told, &dense));
        }
    }
    Ok(out)
}

/// The right answer to `sample`, whatever the model thinks of it.
fn question(host: &EngineHost, sample: &Sample, question_after_cut: bool) -> Ask {
    let mut answer = host.encode(&format!(" {}", sample.answers[0]));
    answer.truncate(ANSWER);
    Ask {
        prompt: Prompt {
            tokens: sample.prompt(),
            documents: sample.documents(),
        },
        answer: Answer::Given(answer),
        logits: true,
        // Methods that start from the dense prompt find its pages: the same bits, and a prompt is computed once for all of them.
        fresh: false,
        question_after_cut,
        ..Ask::default()
    }
}

fn belief(told: &Told, dense: &Told) -> Belief {
    let log_p = told.tokens.iter().zip(&told.logits);
    let log_p = mean(log_p.map(|(&token, row)| f64::from(log_softmax_at(row, token))));
    let vocab = dense.logits.first().map_or(1, Vec::len);
    let (kl, top1) = distance(&dense.logits.concat(), &told.logits.concat(), vocab);
    Belief {
        log_p,
        kl,
        top1,
        kept: told.kept,
    }
}

/// A line of `antefix eval kl --json`: how far a method's answers to needle questions are from dense attention's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KlRow {
    /// Always `kl`.
    pub task: String,
    /// The method with its settings.
    pub method: String,
    /// Prompt length in tokens.
    pub length: usize,
    /// Place of the fact.
    pub depth: f64,
    /// Questions.
    pub n: usize,
    /// Mean KL divergence from dense attention at the tokens of the right answer, nats.
    pub kl: f64,
    /// Share of these tokens with the same most likely token.
    pub top1: f64,
    /// Mean log-probability of these tokens, nats.
    pub log_p: f64,
    /// Mean kept fraction.
    pub kept: f64,
}

impl KlRow {
    /// The row of a cell.
    pub fn new(method: &str, cell: &Cell, beliefs: &[Belief]) -> Self {
        let of = |f: fn(&Belief) -> f64| mean(beliefs.iter().map(f));
        Self {
            task: "kl".into(),
            method: method.into(),
            length: cell.length,
            depth: cell.depth,
            n: beliefs.len(),
            kl: of(|b| b.kl),
            top1: of(|b| b.top1),
            log_p: of(|b| b.log_p),
            kept: of(|b| b.kept),
        }
    }
}
