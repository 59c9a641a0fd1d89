//! Packed rows of prompts and responses, and which rows predict which tokens (sections 2 and 3.4).

use std::sync::Arc;

use crate::error::TrainError;
use crate::model::Batch;
use crate::ops::{Group, Packing, PackingError};

/// A prompt and the responses to it, token ids. A response has its end token, if it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompted {
    /// `L` tokens.
    pub prefix: Vec<u32>,
    /// `l_j` tokens each, none empty.
    pub responses: Vec<Vec<u32>>,
}

/// How responses meet their prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The prompt once, the responses behind it: Prefix Grouper.
    Grouped,
    /// The prompt again before each response: what it is measured against.
    Repeated,
}

/// A packed batch and its scored rows. Both forms list the same tokens in the same order.
#[derive(Debug, Clone)]
pub struct Scored {
    /// `R` rows.
    pub batch: Batch,
    /// The row that predicts each scored token, `[N]`. The last row of a prompt stands here once for each response: its gradient is their sum.
    pub rows: Arc<Vec<u32>>,
    /// The scored tokens, `[N]`.
    pub targets: Arc<Vec<u32>>,
    /// Prompt and response of each, `[N]`.
    pub owners: Vec<[usize; 2]>,
}

/// Packs prompts and responses; every token of every response is scored.
///
/// # Errors
/// [`PackingError::Empty`] for an empty prompt or response.
pub fn pack(items: &[Prompted], form: Form) -> Result<Scored, TrainError> {
    let empty = |group, what| TrainError::Packing(PackingError::Empty { group, what });
    let (mut tokens, mut groups) = (Vec::new(), Vec::new());
    let (mut rows, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
    for (i, item) in items.iter().enumerate() {
        if item.prefix.is_empty() {
            return Err(empty(i, "prefix"));
        }
        if item.responses.iter().any(Vec::is_empty) {
            return Err(empty(i, "response"));
        }
        let start = tokens.len();
        if form == Form::Grouped {
            tokens.extend(&item.prefix);
            groups.push(Group {
                prefix: item.prefix.len(),
                responses: item.responses.iter().map(Vec::len).collect(),
            });
        }
        for (j, response) in item.responses.iter().enumerate() {
            let boundary = match form {
                Form::Grouped => start + item.prefix.len() - 1,
                Form::Repeated => {
                    tokens.extend(&item.prefix);
                    groups.push(Group {
                        prefix: item.prefix.len() + response.len(),
                        responses: Vec::new(),
                    });
                    tokens.len() - 1
                }
            };
            rows.push(boundary as u32);
            rows.extend((tokens.len()..tokens.len() + response.len() - 1).map(|r| r as u32));
            targets.extend(response);
            owners.extend(response.iter().map(|_| [i, j]));
            tokens.extend(response);
        }
    }
    Ok(Scored {
        batch: Batch {
            tokens: Arc::new(tokens),
            packing: Arc::new(Packing::grouped(&groups)?),
        },
        rows: Arc::new(rows),
        targets: Arc::new(targets),
        owners,
    })
}

/// A sequence of which some tokens are scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// `T` tokens.
    pub tokens: Vec<u32>,
    /// `[T]`; the first token is never scored, nothing predicts it.
    pub scored: Vec<bool>,
}

/// Packs plain sequences; every token but the first of each is scored.
///
/// # Errors
/// [`PackingError::Empty`] for an empty sequence.
pub fn pack_sequences(sequences: &[Vec<u32>]) -> Result<Scored, TrainError> {
    causal(sequences.iter().map(Vec::as_slice), |_, _| true)
}

/// Packs sequences of which only the marked tokens are scored.
///
/// # Errors
/// [`PackingError::Empty`] for an empty sequence.
pub fn pack_marked(sequences: &[Marked]) -> Result<Scored, TrainError> {
    let tokens = sequences.iter().map(|s| s.tokens.as_slice());
    causal(tokens, |i, t| sequences[i].scored.get(t) == Some(&true))
}

/// Sequences one after the other; token `t > 0` of sequence `i` is scored if `wanted(i, t)`.
fn causal<'a>(
    sequences: impl Iterator<Item = &'a [u32]> + Clone,
    wanted: impl Fn(usize, usize) -> bool,
) -> Result<Scored, TrainError> {
    let lengths: Vec<usize> = sequences.clone().map(<[u32]>::len).collect();
    let packing = Packing::causal(&lengths)?;
    let (mut tokens, mut rows, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (i, sequence) in sequences.enumerate() {
        for (t, &token) in sequence.iter().enumerate().skip(1) {
            if wanted(i, t) {
                rows.push((tokens.len() + t - 1) as u32);
                targets.push(token);
                owners.push([i, 0]);
            }
        }
        tokens.extend(sequence);
    }
    Ok(Scored {
        batch: Batch {
            tokens: Arc::new(tokens),
            packing: Arc::new(packing),
        },
        rows: Arc::new(rows),
        targets: Arc::new(targets),
        owners,
    })
}
