//! What heads are good for: answers with the best heads switched off against as many others (paper `retrieval_heads`, section 2.4).

use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Sources};
use antefix_papers::heads::{HeadTest, Ranked};
use antefix_papers::retrieval_heads::mask::{Mask, mask};
use antefix_papers::retrieval_heads::score::rouge1_recall;
use serde::Serialize;

use super::needles::{answer, prefilled};
use super::{HeadsError, NeedleRuns, Subject};
use crate::plot::{self, Curve, PlotError};
use crate::tasks::NEEDLES;

/// Heads that random draws leave out (the paper's pool of best heads), as a part of all heads.
const POOL: f64 = 0.1;

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
    pub mode: Mask,
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
        masks.push((point("top", 0, heads), mask(&pairs(top), curve.mode)));
        // With no head off, one run says it all.
        for draw in 0..if heads == 0 { 0 } else { curve.draws } {
            let mut rng =
                fastrand::Rng::with_seed(curve.runs.seed ^ ((draw as u64 + 1) << 40) ^ heads as u64);
            let mut others = ranking[pool.min(ranking.len())..].to_vec();
            rng.shuffle(&mut others);
            others.truncate(heads);
            masks.push((point("random", draw, heads), mask(&pairs(&others), curve.mode)));
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

/// A picture of the experiment, SVG: recall against the number of heads switched off, for the best heads and for the mean, the lowest and the
/// highest of the random draws.
///
/// # Errors
/// When it cannot be drawn.
pub fn mask_plot(title: &str, points: &[MaskPoint]) -> Result<String, PlotError> {
    let mut counts: Vec<usize> = points.iter().map(|p| p.heads).collect();
    counts.sort_unstable();
    counts.dedup();
    // With no head off, the one run belongs to every curve.
    let recalls = |which: &str, heads: usize| -> Vec<f64> {
        let mine = points
            .iter()
            .filter(|p| p.heads == heads && (p.which == which || heads == 0));
        mine.map(|p| p.recall).collect()
    };
    let curve = |name: &str, which: &str, of: fn(&[f64]) -> f64| Curve {
        name: name.into(),
        points: counts
            .iter()
            .map(|&n| (n as f64, of(&recalls(which, n))))
            .collect(),
    };
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let lowest = |x: &[f64]| x.iter().copied().fold(f64::NAN, f64::min);
    let highest = |x: &[f64]| x.iter().copied().fold(f64::NAN, f64::max);
    let all = [
        curve("best heads", "top", mean),
        curve("random heads, mean", "random", mean),
        curve("random heads, lowest draw", "random", lowest),
        curve("random heads, highest draw", "random", highest),
    ];
    plot::curves(title, ("heads switched off", "needle recall"), &all)
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

fn pairs(heads: &[Ranked]) -> Vec<(usize, usize)> {
    heads.iter().map(|h| (h.layer, h.head)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plot_has_the_best_and_the_span_of_the_draws() {
        let at = |which, draw, heads, recall| MaskPoint {
            recall,
            ..point(which, draw, heads)
        };
        let points = [
            at("top", 0, 0, 0.9),
            at("top", 0, 4, 0.2),
            at("random", 0, 4, 0.7),
            at("random", 1, 4, 0.9),
        ];
        let svg = mask_plot("tiny", &points).unwrap();
        // Four curves of two points each.
        assert_eq!(svg.matches("<circle").count(), 8);
        assert!(svg.contains("best heads") && svg.contains("highest draw"));
    }
}
