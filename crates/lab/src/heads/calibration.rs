//! Which heads are worth calibrating (paper `act`, section 3.4): each alone, by what it does to the right answers.

use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Sources};
use antefix_engine::{Session, log_softmax_at};
use antefix_papers::act::calibrate::{Act, Calibration, Mode};
use antefix_papers::act::sinks::Rule;
use antefix_papers::heads::{HeadTest, spearman};
use serde::Serialize;

use super::{HeadsError, Subject};
use crate::tasks::{Kit, Prose, Task};

/// A search over all heads.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Search {
    /// Labelled examples.
    pub examples: usize,
    /// Tokens of each.
    pub length: usize,
    /// Seed of the examples.
    pub seed: u64,
    /// Part of a sink's weight that it keeps.
    pub beta: f32,
}

/// The log-probability of the first token of each example's right answer under `heads[layer]`, calibrated by the whole prompt.
fn right_answers(
    subject: &Subject,
    examples: &[(Vec<u32>, u32)],
    heads: Option<Vec<Vec<usize>>>,
    (rule, beta): (Rule, f32),
) -> Result<Vec<f32>, HeadsError> {
    let longest = examples.iter().map(|e| e.0.len()).max().unwrap_or(0);
    let plan = HookPlan::compile(
        &HookSpec::default(),
        subject.model.hook_shape(),
        &Sources::default(),
    )?;
    let plan = Arc::new(plan);
    // One step a prompt: that is what calibration by the whole prompt needs.
    let mut session = Session::new(Arc::clone(&subject.model), longest, longest);
    let mut out = Vec::with_capacity(examples.len());
    for (prompt, answer) in examples {
        session.truncate(0);
        session.observe(heads.as_ref().map(|heads| {
            let act = Act::new(Calibration {
                heads: heads.clone(),
                rule,
                beta,
                mode: Mode::TwoPass,
            });
            Arc::new(Observer::new(Arc::clone(&plan), prompt.len(), 0).with(Box::new(act)))
        }));
        let mut logits = Vec::new();
        session.feed(prompt, 1, &mut logits)?;
        out.push(log_softmax_at(&logits, *answer));
    }
    Ok(out)
}

/// Calibrates each head alone, but for those of the first two layers and of the last, and tells `progress` of each.
///
/// The score is the mean gain of the right answer's log-probability; it is not significant where the halves of the examples disagree
/// ([`HeadTest::half_spearman`]).
///
/// # Errors
/// When the model fails or the examples do not fit.
pub fn calibration(
    subject: &Subject,
    search: &Search,
    rule: Rule,
    progress: &mut dyn FnMut(usize),
) -> Result<HeadTest, HeadsError> {
    let spec = subject.model.spec();
    let context = spec.context;
    let kit = Kit {
        tokenizer: &subject.tokenizer,
        prose: &Prose::Generated,
        digits: 5,
        shots: 0,
    };
    let examples = (0..search.examples as u64)
        .map(|i| {
            let length = search.length;
            let sample = Task::ManyShot.sample(&kit, length, 0.0, search.seed ^ (i << 20));
            let sample = sample.map_err(|_| HeadsError::Length { length, context })?;
            let answer = subject.tokenizer.encode(
                &format!(" {}", sample.answers[0]),
                antefix_models::tokenizer::Specials::Plain,
            );
            Ok((sample.prompt(), answer.first().copied().unwrap_or(0)))
        })
        .collect::<Result<Vec<_>, HeadsError>>()?;
    let plain = right_answers(subject, &examples, None, (rule, search.beta))?;
    let mut gains = vec![vec![Vec::new(); spec.heads]; spec.layers];
    let mut done = 0;
    for layer in 2..spec.layers.saturating_sub(1) {
        for head in 0..spec.heads {
            let mut heads = vec![Vec::new(); spec.layers];
            heads[layer].push(head);
            let with = right_answers(subject, &examples, Some(heads), (rule, search.beta))?;
            gains[layer][head] = with.iter().zip(&plain).map(|(a, b)| a - b).collect();
            done += 1;
            progress(done);
        }
    }
    let part = |keep: &dyn Fn(usize) -> bool| -> Vec<Vec<f32>> {
        let mean = |g: &Vec<f32>| {
            let mine: Vec<f32> = g
                .iter()
                .enumerate()
                .filter(|(i, _)| keep(*i))
                .map(|(_, &x)| x)
                .collect();
            mine.iter().sum::<f32>() / mine.len().max(1) as f32
        };
        gains.iter().map(|row| row.iter().map(mean).collect()).collect()
    };
    let (even, odd) = (part(&|i| i % 2 == 0), part(&|i| i % 2 == 1));
    Ok(HeadTest {
        name: "act".into(),
        what: format!(
            "gain of the right label's log-probability with this head alone calibrated, beta {}, {rule:?}; many-shot classification",
            search.beta
        ),
        runs: search.examples,
        accepted: search.examples,
        tokens: [search.length; 2],
        seed: search.seed,
        score: part(&|_| true),
        active: None,
        half_spearman: Some(spearman(&even.concat(), &odd.concat())),
    })
}
