//! Runs tasks on a model with a method and says what came out, cell by cell.

mod belief;
mod report;
mod run;

use antefix_engine::EngineError;
use serde::{Deserialize, Serialize};

pub use belief::{BeliefError, Cell, KlRow, beliefs};
pub use report::{html, table};
pub use run::{Answer, Runner, Setting, method_name};

use crate::tasks::{Kit, Task, TaskError};

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Tasks, in order.
    pub tasks: Vec<Task>,
    /// Prompt lengths in tokens.
    pub lengths: Vec<usize>,
    /// Where facts stand, 0..=1; tasks without a place run once a length.
    pub depths: Vec<f64>,
    /// Samples of each cell.
    pub samples: usize,
    /// Decides needles, filler and places. Sample `i` of a cell is the same for every method.
    pub seed: u64,
}

impl Plan {
    /// A plan for each cell: what is run cell by cell keeps only the prompts of one ([`Setting::kept_prompts`]).
    pub fn cells(&self) -> Vec<Self> {
        let of = |&(task, length, depth): &(Task, usize, Option<f64>)| Self {
            tasks: vec![task],
            lengths: vec![length],
            depths: depth.into_iter().collect(),
            ..self.clone()
        };
        self.places().iter().map(of).collect()
    }

    /// Task, length and depth of each cell; no depth for tasks without a place.
    fn places(&self) -> Vec<(Task, usize, Option<f64>)> {
        let lengths = |&task: &Task| self.lengths.iter().map(move |&length| (task, length));
        let depths = |(task, length): (Task, usize)| {
            let depths = match task.has_depth() {
                true => self.depths.iter().copied().map(Some).collect(),
                false => vec![None],
            };
            depths.into_iter().map(move |depth| (task, length, depth))
        };
        self.tasks.iter().flat_map(lengths).flat_map(depths).collect()
    }
}

/// One sample and what became of it: the unit in which runs are stored and resumed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the task.
    pub task: String,
    /// The method with its settings; `dense` without one.
    pub method: String,
    /// The model.
    pub model: String,
    /// Length asked for.
    pub length: usize,
    /// Place of the fact; nothing for tasks without one.
    pub depth: Option<f64>,
    /// Seed of the run.
    pub seed: u64,
    /// Number of the sample in its cell.
    pub sample: usize,
    /// Fraction of the answers found.
    pub score: f64,
    /// Fraction of the keys and values that were kept (bytes), 1 for dense.
    pub kept: f64,
    /// Seconds to the first token.
    pub ttft_s: f64,
    /// What was expected.
    pub answers: Vec<String>,
    /// What the model said.
    pub text: String,
}

impl Record {
    /// Whether `other` is the same question.
    fn is(&self, other: &Key<'_>) -> bool {
        self.task == other.task
            && self.method == other.method
            && self.model == other.model
            && self.length == other.length
            && self.depth == other.depth
            && self.seed == other.seed
            && self.sample == other.sample
    }
}

struct Key<'a> {
    task: &'a str,
    method: &'a str,
    model: &'a str,
    length: usize,
    depth: Option<f64>,
    seed: u64,
    sample: usize,
}

/// A line of `antefix eval --json`: the samples of one cell together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the task.
    pub task: String,
    /// The method with its settings.
    pub method: String,
    /// Prompt length in tokens.
    pub length: usize,
    /// Place of the fact.
    pub depth: Option<f64>,
    /// Samples.
    pub n: usize,
    /// Mean score, 0..=1.
    pub accuracy: f64,
    /// Mean kept fraction.
    pub kept: f64,
    /// Median seconds to the first token; in tables, not in JSON.
    #[serde(skip)]
    pub ttft_s: f64,
}

/// Why an evaluation stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A task does not fit its length.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// A prompt does not fit the model.
    #[error(transparent)]
    Job(#[from] antefix_engine::JobError),
    /// The model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A record could not be stored.
    #[error("results cannot be written")]
    Store(#[source] std::io::Error),
}

/// Means over `records`, one row a cell, in the order in which cells first occur.
pub fn rows(records: &[Record]) -> Vec<Row> {
    let mut cells: Vec<Vec<&Record>> = Vec::new();
    for r in records {
        let same = |c: &&mut Vec<&Record>| {
            let first = c[0];
            (first.task == r.task && first.method == r.method && first.model == r.model)
                && (first.length == r.length && first.depth == r.depth)
        };
        match cells.iter_mut().find(same) {
            Some(cell) => cell.push(r),
            None => cells.push(vec![r]),
        }
    }
    let mean = |cell: &[&Record], of: fn(&Record) -> f64| {
        cell.iter().map(|r| of(r)).sum::<f64>() / cell.len() as f64
    };
    cells
        .iter()
        .map(|cell| Row {
            task: cell[0].task.clone(),
            method: cell[0].method.clone(),
            length: cell[0].length,
            depth: cell[0].depth,
            n: cell.len(),
            accuracy: mean(cell, |r| r.score),
            kept: mean(cell, |r| r.kept),
            ttft_s: crate::median(&cell.iter().map(|r| r.ttft_s).collect::<Vec<_>>()),
        })
        .collect()
}

/// Progress of an evaluation.
pub enum Step<'a> {
    /// A sample was answered, or found among the earlier records.
    Sample {
        /// Samples done.
        done: usize,
        /// Samples in all.
        all: usize,
        /// The sample; `new` ones are to be stored.
        record: &'a Record,
        /// Whether it was computed now.
        new: bool,
    },
    /// All samples of a cell are there.
    Cell(&'a Row),
}

/// The seed of sample `i` of a run with `seed`: streams far apart for the samples of all seeds.
pub fn sample_seed(seed: u64, i: usize) -> u64 {
    seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(i as u64)
}

/// Runs every cell of `plan`. Samples in `earlier` are taken over instead of being computed again.
///
/// # Errors
/// When a task does not fit, the model fails or `hear` cannot store a record; what was heard until then is complete.
pub fn run(
    plan: &Plan,
    kit: &Kit<'_>,
    runner: &mut Runner,
    earlier: &[Record],
    mut hear: impl FnMut(Step<'_>) -> std::io::Result<()>,
) -> Result<Vec<Row>, EvalError> {
    let cells = plan.places();
    let all = cells.len() * plan.samples;
    let (mut done, mut out) = (0, Vec::new());
    for (task, length, depth) in cells {
        let mut cell = Vec::with_capacity(plan.samples);
        for i in 0..plan.samples {
            let key = Key {
                task: task.name(),
                method: &runner.method(),
                model: runner.model_name(),
                length,
                depth,
                seed: plan.seed,
                sample: i,
            };
            let found = earlier.iter().find(|r| r.is(&key)).cloned();
            let new = found.is_none();
            let record = match found {
                Some(record) => record,
                None => {
                    let seed = sample_seed(plan.seed, i);
                    let sample = task.sample(kit, length, depth.unwrap_or(0.5), seed)?;
                    let answer = runner.ask(&sample)?;
                    Record {
                        task: task.name().into(),
                        method: runner.method(),
                        model: runner.model_name().into(),
                        length,
                        depth,
                        seed: plan.seed,
                        sample: i,
                        score: sample.mark(&answer.text),
                        kept: answer.kept,
                        ttft_s: answer.ttft_s,
                        answers: sample.answers,
                        text: answer.text,
                    }
                }
            };
            done += 1;
            hear(Step::Sample {
                done,
                all,
                record: &record,
                new,
            })
            .map_err(EvalError::Store)?;
            cell.push(record);
        }
        for row in rows(&cell) {
            hear(Step::Cell(&row)).map_err(EvalError::Store)?;
            out.push(row);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
