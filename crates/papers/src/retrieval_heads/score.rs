//! Scores of one run: which heads looked at the token that was written next.

use std::ops::Range;

/// What one head's row read while a token was drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Look {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// The key of the largest weight (ties: the lowest position).
    pub best: usize,
    /// Weight on the answer's span.
    pub mass: f32,
}

/// Scores of every head in one run, `[L * Hq]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RunScore {
    heads: usize,
    /// Classic score: part of the answer's span that the head copied (paper, section 2).
    pub retrieval: Vec<f32>,
    /// Score of semantic retrieval heads: mass on the whole span while a token of the span is written (paper `compresskv`, 3.1).
    pub semantic: Vec<f32>,
}

impl RunScore {
    /// Nothing seen yet.
    pub fn new(layers: usize, heads: usize) -> Self {
        Self {
            heads,
            retrieval: vec![0.0; layers * heads],
            semantic: vec![0.0; layers * heads],
        }
    }

    /// Takes in the step that drew `next` after `prompt` and what was drawn before, with the answer at `span` of the prompt.
    ///
    /// The rows are those of the step that produces `next`: the query is the token before it.
    pub fn step(&mut self, prompt: &[u32], span: Range<usize>, next: u32, looks: &[Look]) {
        let answer = &prompt[span.clone()];
        let times = answer.iter().filter(|&&t| t == next).count() as f32;
        for look in looks {
            let at = look.layer * self.heads + look.head;
            // Section 2.2: the best key stands in the span and holds the token that is written.
            if span.contains(&look.best) && prompt[look.best] == next {
                self.retrieval[at] += 1.0 / answer.len() as f32;
            }
            // compresskv 3.1: once for every place of the token in the span.
            self.semantic[at] += times * look.mass;
        }
    }
}

/// ROUGE-1 recall of `reference` in `output`: lower case, words of letters and digits, repeated words counted as often as in the
/// reference. Words are not stemmed. No words in the reference: 0.
pub fn rouge1_recall(reference: &str, output: &str) -> f64 {
    let words = |text: &str| -> Vec<String> {
        let lower = text.to_lowercase();
        let split = lower.split(|c: char| !c.is_ascii_alphanumeric());
        split.filter(|w| !w.is_empty()).map(str::to_owned).collect()
    };
    let wanted = words(reference);
    let mut have = words(output);
    let hits = wanted
        .iter()
        .filter(|w| match have.iter().position(|h| h == *w) {
            Some(at) => {
                have.swap_remove(at);
                true
            }
            None => false,
        })
        .count();
    hits as f64 / wanted.len().max(1) as f64
}

/// Recall above which a run counts (section 2.2).
pub const ACCEPT: f64 = 0.5;

/// The mean of accepted runs' scores, `[L][Hq]`, and in which part of them a head scored at all.
///
/// # Errors
/// When no run was accepted: then nothing is known of any head.
pub fn mean(runs: &[&[f32]], heads: usize) -> Result<(Vec<Vec<f32>>, Vec<Vec<f32>>), NoRuns> {
    let first = runs.first().ok_or(NoRuns)?;
    let n = runs.len() as f64;
    let column = |f: &dyn Fn(f32) -> f64| -> Vec<Vec<f32>> {
        let cell = |i: usize| (runs.iter().map(|r| f(r[i])).sum::<f64>() / n) as f32;
        let all: Vec<f32> = (0..first.len()).map(cell).collect();
        all.chunks(heads).map(<[f32]>::to_vec).collect()
    };
    let scores = column(&|x| f64::from(x));
    let active = column(&|x| if x > 0.0 { 1.0 } else { 0.0 });
    Ok((scores, active))
}

/// No run was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "in no run the model answered from the text, so no head can be scored\nhint: shorter prompts, or a stronger model"
)]
pub struct NoRuns;
