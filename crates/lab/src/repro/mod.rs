//! Runs reproductions of papers (`antefix_papers::REPROS`) on a model and says what came out.

mod bench;
mod page;
#[cfg(test)]
mod tests;
mod text;

use std::time::Instant;

use antefix_papers::repro::{Claim, LabError, Outcome, Repro, Scale, Verdict};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use bench::Bench;
pub use page::{page, read, replace};
pub use text::words;

/// A line of `antefix repro --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The reproduction.
    pub slug: String,
    /// What the paper says, and where.
    pub claim: String,
    /// The method's figure; nothing if the model cannot do what the experiment asks of it.
    pub measured: Option<f64>,
    /// The same of what it is compared with.
    pub baseline: Option<f64>,
    /// `reproduced`, `partly` or `not`.
    pub verdict: String,
    /// The figures that decided.
    pub why: String,
    /// What `measured` and `baseline` are.
    pub unit: String,
    /// What was run.
    pub scale: String,
    /// Whether it was the short form.
    pub fast: bool,
    /// On which model.
    pub model: String,
    /// On which machine.
    pub machine: String,
    /// How long it took.
    pub seconds: f64,
}

/// Runs `repro`; the line and the rows behind it.
///
/// # Errors
/// When something fails. A model that cannot do what is asked of it is no failure: the line says so.
pub fn reproduce(
    repro: &Repro,
    bench: &mut Bench,
    scale: Scale,
    machine: &str,
) -> Result<(Line, Vec<Value>), LabError> {
    let start = Instant::now();
    let outcome = (repro.run)(bench, scale);
    let ran = Ran {
        scale,
        model: bench.model_name(),
        machine,
        seconds: start.elapsed().as_secs_f64(),
    };
    told(repro.claim, &ran, outcome)
}

/// Where something ran, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Ran<'a> {
    /// Which form.
    pub scale: Scale,
    /// Name of the model.
    pub model: &'a str,
    /// Which machine.
    pub machine: &'a str,
    /// How long it took.
    pub seconds: f64,
}

/// The line of an outcome, and the rows behind it.
///
/// # Errors
/// When the run failed. A model that cannot do what is asked of it is no failure: the line says so.
pub fn told(
    claim: Claim,
    ran: &Ran<'_>,
    outcome: Result<Outcome, LabError>,
) -> Result<(Line, Vec<Value>), LabError> {
    let outcome = match outcome {
        Err(LabError::Model(why)) => Err(why),
        other => Ok(other?),
    };
    let mut line = Line {
        slug: claim.slug.into(),
        claim: format!("{} ({})", claim.says, claim.source.trim_end_matches('.')),
        measured: None,
        baseline: None,
        verdict: Verdict::Not.name().into(),
        why: String::new(),
        unit: String::new(),
        scale: String::new(),
        fast: ran.scale == Scale::Fast,
        model: ran.model.into(),
        machine: ran.machine.into(),
        seconds: ran.seconds,
    };
    match outcome {
        Ok(outcome) => {
            let rows = fill(&mut line, outcome);
            Ok((line, rows))
        }
        Err(why) => {
            line.why = format!("nothing to judge by on this model: {why}");
            Ok((line, Vec::new()))
        }
    }
}

fn fill(line: &mut Line, outcome: Outcome) -> Vec<Value> {
    line.measured = Some(outcome.measured).filter(|x| x.is_finite());
    line.baseline = Some(outcome.baseline).filter(|x| x.is_finite());
    line.verdict = outcome.judgement.verdict.name().into();
    line.why = outcome.judgement.why;
    if line.fast {
        line.why += "; short run";
    }
    line.unit = outcome.unit.into();
    line.scale = outcome.scale;
    outcome.rows
}
