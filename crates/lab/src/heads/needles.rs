//! Retrieval heads: which heads look at the token of the needle that is written next (paper `retrieval_heads`, section 2).

use std::ops::Range;
use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Positions, Probe, Sources};
use antefix_attention::readout::{Group, HeadReading, Reads};
use antefix_engine::{Session, argmax};
use antefix_papers::heads::{HeadTest, spearman};
use antefix_papers::retrieval_heads::score::{ACCEPT, Look, RunScore, mean, rouge1_recall};
use serde::{Deserialize, Serialize};

use super::{HeadsError, Subject};
use crate::tasks::{Kit, NEEDLES, Prose, needle_run};

/// Tokens of an answer at most.
pub(super) const STEPS: usize = 50;
/// Bytes of readings of one run: 50 rows of a thousand heads are far below.
const CAP: usize = 256 << 20;

/// Which runs are made. Needles take turns; lengths and depths are drawn from the seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NeedleRuns {
    /// Prompt lengths, tokens.
    pub lengths: Vec<usize>,
    /// Places of the needle, 0 to 1.
    pub depths: Vec<f64>,
    /// Number of runs.
    pub runs: usize,
    /// Seed of everything.
    pub seed: u64,
}

/// One prompt.
pub(super) struct Question {
    pub(super) needle: usize,
    pub(super) depth: f64,
    pub(super) prompt: Vec<u32>,
    /// The answer's tokens in the prompt.
    pub(super) span: Range<usize>,
}

/// What one run brought.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NeedleRun {
    /// Number of the run.
    pub run: usize,
    /// Which needle.
    pub needle: usize,
    /// Where it stood.
    pub depth: f64,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// What the model wrote.
    pub text: String,
    /// Part of the answer's words in it.
    pub recall: f64,
    /// Whether it counts.
    pub accepted: bool,
    /// Classic score of every head, `[L * Hq]`.
    pub retrieval: Vec<f32>,
    /// Mass on the answer's span, `[L * Hq]`.
    pub semantic: Vec<f32>,
}

impl NeedleRuns {
    pub(super) fn question(&self, subject: &Subject, run: usize) -> Result<Question, HeadsError> {
        let mut rng = fastrand::Rng::with_seed(self.seed ^ ((run as u64 + 1) << 32));
        let needle = run % NEEDLES.len();
        let length = self.lengths[rng.usize(..self.lengths.len())];
        let depth = self.depths[rng.usize(..self.depths.len())];
        subject.check_length(length)?;
        let kit = Kit {
            tokenizer: &subject.tokenizer,
            prose: &Prose::Generated,
            digits: 5,
            shots: 0,
        };
        let context = subject.model.spec().context;
        let sample = needle_run(&kit, &NEEDLES[needle], length, depth, rng.u64(..))
            .ok_or(HeadsError::Length { length, context })?;
        Ok(Question {
            needle,
            depth,
            prompt: sample.prompt(),
            span: sample.facts[0].clone(),
        })
    }
}

/// Decodes greedily after `prompt`, all of which but its last token is in `session`, until a line ends.
pub(super) fn answer(
    session: &mut Session,
    subject: &Subject,
    prompt: &[u32],
    hooks: Option<Arc<Observer>>,
) -> Result<Vec<u32>, HeadsError> {
    session.truncate(prompt.len() - 1);
    session.observe(hooks);
    let (mut next, mut out, mut logits) = (prompt[prompt.len() - 1], Vec::new(), Vec::new());
    while out.len() < STEPS {
        logits.clear();
        match out.is_empty() {
            true => session.feed(&[next], 1, &mut logits)?,
            false => session.feed_drawn(&[next], 1, &mut logits)?,
        }
        next = argmax(&logits);
        if subject.tokenizer.is_end(next) || subject.tokenizer.decode(&[next]).contains('\n') {
            break;
        }
        out.push(next);
    }
    session.observe(None);
    Ok(out)
}

/// A session that has computed all of the prompt but its last token.
pub(super) fn prefilled(subject: &Subject, prompt: &[u32]) -> Result<Session, HeadsError> {
    let mut session = Session::new(Arc::clone(&subject.model), prompt.len() + STEPS, 512);
    session.feed(&prompt[..prompt.len() - 1], 0, &mut Vec::new())?;
    Ok(session)
}

fn one(subject: &Subject, run: usize, question: &Question) -> Result<NeedleRun, HeadsError> {
    let spec = subject.model.spec();
    let Question { prompt, span, .. } = question;
    let read = Reads {
        top: 1,
        mass: vec![Group::Keys(span.start as u32, span.end as u32)],
        ..Reads::default()
    };
    let hooks = HookSpec {
        probes: vec![Probe {
            id: String::new(),
            layers: None,
            heads: None,
            positions: Positions::Answer,
            read,
        }],
        ..HookSpec::default()
    };
    let plan = HookPlan::compile(&hooks, subject.model.hook_shape(), &Sources::default())?;
    let observer = Arc::new(Observer::new(Arc::new(plan), prompt.len(), CAP));
    let mut session = prefilled(subject, prompt)?;
    let output = answer(&mut session, subject, prompt, Some(Arc::clone(&observer)))?;
    let readings: Vec<HeadReading> = observer.take_readings().into_iter().flat_map(|r| r.1).collect();
    let mut score = RunScore::new(spec.layers, spec.heads);
    for (step, &token) in output.iter().enumerate() {
        let looks: Vec<Look> = readings.iter().filter_map(|r| look(r, step)).collect();
        score.step(prompt, span.clone(), token, &looks);
    }
    let text = subject.tokenizer.decode(&output);
    let recall = rouge1_recall(NEEDLES[question.needle].answer, &text);
    Ok(NeedleRun {
        run,
        needle: question.needle,
        depth: question.depth,
        tokens: prompt.len(),
        text,
        recall,
        accepted: recall > ACCEPT,
        retrieval: score.retrieval,
        semantic: score.semantic,
    })
}

/// The row of step `step`: it produces the token that is drawn in that step.
fn look(reading: &HeadReading, step: usize) -> Option<Look> {
    let row = reading.rows.get(step)?;
    Some(Look {
        layer: reading.layer,
        head: reading.head,
        best: row.top.first()?.0 as usize,
        mass: *row.mass.first()?,
    })
}

/// Makes the runs that are not `done` yet, telling each to `each`, and returns the measurements `retrieval` and `semantic`.
///
/// # Errors
/// When the model fails, a length is impossible, `done` are other runs than these, or no run was answered.
pub fn retrieval(
    subject: &Subject,
    runs: &NeedleRuns,
    mut done: Vec<NeedleRun>,
    each: &mut dyn FnMut(&NeedleRun),
) -> Result<[HeadTest; 2], HeadsError> {
    let spec = subject.model.spec();
    done.truncate(runs.runs);
    for (run, known) in done.iter().enumerate() {
        let question = runs.question(subject, run)?;
        let same = (known.run, known.needle, known.depth, known.tokens)
            == (run, question.needle, question.depth, question.prompt.len());
        let heads = spec.layers * spec.heads;
        if !same || known.retrieval.len() != heads || known.semantic.len() != heads {
            return Err(HeadsError::OtherRuns { run });
        }
    }
    for run in done.len()..runs.runs {
        let result = one(subject, run, &runs.question(subject, run)?)?;
        each(&result);
        done.push(result);
    }
    tables(spec.heads, runs, &done)
}

fn tables(heads: usize, runs: &NeedleRuns, done: &[NeedleRun]) -> Result<[HeadTest; 2], HeadsError> {
    let accepted: Vec<&NeedleRun> = done.iter().filter(|r| r.accepted).collect();
    let test = |name: &str, of: fn(&NeedleRun) -> &[f32]| -> Result<HeadTest, HeadsError> {
        let all: Vec<&[f32]> = accepted.iter().map(|r| of(r)).collect();
        let (score, active) = mean(&all, heads)?;
        // Each half has every needle.
        let half = |which: usize| -> Vec<&[f32]> {
            let mine = accepted.iter().filter(|r| r.run / NEEDLES.len() % 2 == which);
            mine.map(|r| of(r)).collect()
        };
        let flat = |runs: &[&[f32]]| mean(runs, heads).map(|(score, _)| score.concat());
        let half_spearman = match (flat(&half(0)), flat(&half(1))) {
            (Ok(a), Ok(b)) => Some(spearman(&a, &b)),
            _ => None,
        };
        Ok(HeadTest {
            name: name.into(),
            what: format!(
                "greedy answers to {} needles in generated prose, up to {STEPS} tokens; recall over {ACCEPT} counts",
                NEEDLES.len()
            ),
            runs: done.len(),
            accepted: accepted.len(),
            tokens: [
                done.iter().map(|r| r.tokens).min().unwrap_or(0),
                done.iter().map(|r| r.tokens).max().unwrap_or(0),
            ],
            seed: runs.seed,
            score,
            active: Some(active),
            half_spearman,
        })
    };
    Ok([
        test("retrieval", |r| &r.retrieval)?,
        test("semantic", |r| &r.semantic)?,
    ])
}
