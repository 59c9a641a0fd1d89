//! What heads are good for: answers with the best heads switched off against as many others (paper `retrieval_heads`, section 2.4).

use std::str::FromStr;
use std::sync::Arc;

use antefix_attention::hooks::{
    Action, Cells, Edit, HookPlan, HookSpec, Observer, Positions, Set, Site, Sources,
};
use antefix_papers::heads::{HeadTest, Ranked};
use antefix_papers::retrieval_heads::score::rouge1_recall;
use serde::Serialize;

use super::needles::{answer, prefilled};
use super::{HeadsError, NeedleRuns, Subject};
use crate::tasks::NEEDLES;

/// Heads that random draws leave out (the paper's pool of best heads), as a part of all heads.
const POOL: f64 = 0.1;

/// How a head is switched off while the answer is written. The prompt is computed with all heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskMode {
    /// Its query is 0: it reads all keys evenly, as in the paper's program.
    Uniform,
    /// Its output is 0.
    Zero,
}

impl FromStr for MaskMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "uniform" => Ok(Self::Uniform),
            "zero" => Ok(Self::Zero),
            _ => Err(format!("`{name}` is no mask\nhint: uniform or zero")),
        }
    }
}

/// A masking experiment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MaskCurve {
    /// Prompts; another seed than the detection's.
    pub runs: NeedleRuns,
    /// Numbers of heads to switch off.
    pub counts: Vec<usize>,
    /// Random draws for each number.
    pub draws: usize,
    /// How.
    pub mode: MaskMode,
}

/// Recall under one mask over all prompts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MaskPoint {
    /// `top` or `random`.
    pub which: &'static str,
    /// Number of the draw; 0 for `top`.
    pub draw: usize,
    /// Heads switched off.
    pub heads: usize,
    /// Prompts.
    pub prompts: usize,
    /// Mean ROUGE-1 recall.
    pub recall: f64,
    /// Recall of each prompt.
    pub each: Vec<f64>,
}

/// The edits that switch `heads` off.
pub(super) fn mask(heads: &[Ranked], mode: MaskMode) -> HookSpec {
    let edit = |h: &Ranked| {
        let (site, action) = match mode {
            MaskMode::Uniform => (Site::RotQ, Action::Set(Set::Zero)),
            MaskMode::Zero => (Site::Z, Action::Scale(0.0)),
        };
        Edit {
            at: Cells::head(site, h.layer, h.head).at(Positions::Answer),
            action,
        }
    };
    HookSpec {
        edits: heads.iter().map(edit).collect(),
        ..HookSpec::default()
    }
}

/// Runs the experiment with the ranking of `test`; `progress` is told the number of prompts done.
///
/// # Errors
/// When the model fails or a length is impossible.
pub fn masking(
    subject: &Subject,
    test: &HeadTest,
    curve: &MaskCurve,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<MaskPoint>, HeadsError> {
    let ranking = test.ranking();
    let pool =
        ((ranking.len() as f64 * POOL).ceil() as usize).max(curve.counts.iter().copied().max().unwrap_or(0));
    let mut masks: Vec<(MaskPoint, HookSpec)> = Vec::new();
    for &heads in &curve.counts {
        let top = &ranking[..heads.min(ranking.len())];
        masks.push((point("top", 0, heads), mask(top, curve.mode)));
        // With no head off, one run says it all.
        for draw in 0..if heads == 0 { 0 } else { curve.draws } {
            let mut rng =
                fastrand::Rng::with_seed(curve.runs.seed ^ ((draw as u64 + 1) << 40) ^ heads as u64);
            let mut others = ranking[pool.min(ranking.len())..].to_vec();
            rng.shuffle(&mut others);
            others.truncate(heads);
            masks.push((point("random", draw, heads), mask(&others, curve.mode)));
        }
    }
    for run in 0..curve.runs.runs {
        let question = curve.runs.question(subject, run)?;
        let prompt = &question.prompt;
        let mut session = prefilled(subject, prompt)?;
        for (point, spec) in &mut masks {
            let plan = HookPlan::compile(spec, subject.model.hook_shape(), &Sources::default())?;
            let observer = Arc::new(Observer::new(Arc::new(plan), prompt.len(), 0));
            let output = answer(&mut session, subject, prompt, Some(observer))?;
            let text = subject.tokenizer.decode(&output);
            point
                .each
                .push(rouge1_recall(NEEDLES[question.needle].answer, &text));
        }
        progress(run + 1);
    }
    let mean = |mut p: MaskPoint| {
        p.prompts = p.each.len();
        p.recall = p.each.iter().sum::<f64>() / p.prompts.max(1) as f64;
        p
    };
    Ok(masks.into_iter().map(|(p, _)| mean(p)).collect())
}

fn point(which: &'static str, draw: usize, heads: usize) -> MaskPoint {
    MaskPoint {
        which,
        draw,
        heads,
        prompts: 0,
        recall: 0.0,
        each: Vec::new(),
    }
}
