//! What a step learns from: a pure function of the seed and the step, so that a resumed run goes on where it stopped.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::model::Tokens;
use super::recipe::{RawData, Recipe};
use crate::error::TrainError;
use crate::prefix_grouper::{Problem, Prompted, Task, Verifiable};
use crate::random::Stream;

/// Files larger than this are refused rather than read into memory, bytes.
const LARGEST: u64 = 1 << 30;

/// Items of a step.
pub(super) enum Items {
    /// Whole sequences.
    Sequences(Vec<Vec<u32>>),
    /// Prompts with responses.
    Prompted(Vec<Prompted>),
}

/// Which part of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Train,
    HeldOut,
}

pub(super) enum Data {
    Text {
        tokens: Vec<u32>,
        seq: usize,
        /// Windows of the training part; the others are held out.
        train: usize,
        windows: usize,
    },
    Prompted {
        items: Vec<Prompted>,
        train: usize,
    },
    Task(Task),
}

#[derive(Deserialize)]
struct Line {
    prompt: String,
    response: Option<String>,
    #[serde(default)]
    responses: Vec<String>,
}

fn read(file: &Path) -> Result<Vec<u8>, TrainError> {
    let len = std::fs::metadata(file).map_err(TrainError::io(file))?.len();
    if len > LARGEST {
        return Err(TrainError::file(
            file,
            format!("{len} bytes are more than {LARGEST}"),
        ));
    }
    std::fs::read(file).map_err(TrainError::io(file))
}

/// Files of a folder, or the file itself, in order of their names.
fn files(path: &Path) -> Result<Vec<PathBuf>, TrainError> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(TrainError::io(path))? {
        let entry = entry.map_err(TrainError::io(path))?.path();
        if entry.is_file() {
            found.push(entry);
        }
    }
    found.sort();
    Ok(found)
}

impl Data {
    pub(super) fn open(recipe: &Recipe, tokens: &Tokens) -> Result<Self, TrainError> {
        match &recipe.data {
            RawData::Text {
                files: paths,
                seq,
                val,
                ..
            } => {
                let mut ids = Vec::new();
                for path in paths {
                    for file in files(path)? {
                        ids.extend(tokens.encode(&String::from_utf8_lossy(&read(&file)?)));
                        ids.push(tokens.end());
                    }
                }
                let windows = ids.len().saturating_sub(1) / seq;
                let train = windows - (windows as f64 * val).ceil() as usize;
                if train == 0 {
                    return Err(TrainError::Recipe(format!(
                        "`data.files` have {} tokens: not one window of `data.seq` {seq} to learn from",
                        ids.len()
                    )));
                }
                Ok(Self::Text {
                    tokens: ids,
                    seq: *seq,
                    train,
                    windows,
                })
            }
            RawData::JsonLines { file, val, .. } => {
                let text = read(file)?;
                let mut items = Vec::new();
                for (n, line) in text.split(|&b| b == b'\n').enumerate() {
                    if line.iter().all(u8::is_ascii_whitespace) {
                        continue;
                    }
                    let bad = |what: String| TrainError::file(file, format!("line {}: {what}", n + 1));
                    let line: Line = serde_json::from_slice(line).map_err(|e| bad(e.to_string()))?;
                    let responses: Vec<_> = line.response.into_iter().chain(line.responses).collect();
                    if line.prompt.is_empty() || responses.is_empty() {
                        return Err(bad("a prompt and at least one response are needed".into()));
                    }
                    items.push(prompted(
                        tokens,
                        &line.prompt,
                        responses.iter().map(String::as_str),
                    ));
                }
                let train = items.len() - (items.len() as f64 * val).ceil() as usize;
                if train == 0 {
                    return Err(TrainError::file(file, "no line to learn from"));
                }
                Ok(Self::Prompted { items, train })
            }
            RawData::Task { task, .. } => Ok(Self::Task(task.clone())),
        }
    }

    /// Items `from .. from + n` of the order in which the run meets them.
    pub(super) fn items(&self, seed: u64, part: Part, from: u64, n: usize, tokens: &Tokens) -> Items {
        match self {
            Self::Text {
                tokens: ids,
                seq,
                train,
                windows,
            } => {
                let picks = picks(seed, part, from, n, *train, *windows);
                let window = |at: usize| ids[at * seq..(at + 1) * seq + 1].to_vec();
                Items::Sequences(picks.into_iter().map(window).collect())
            }
            Self::Prompted { items, train } => {
                let picks = picks(seed, part, from, n, *train, items.len());
                Items::Prompted(picks.into_iter().map(|at| items[at].clone()).collect())
            }
            Self::Task(task) => {
                let problems = problems(task, seed, part, from, n);
                let item = |p: &Problem| prompted(tokens, &p.prompt, [p.answer.as_str()].into_iter());
                Items::Prompted(problems.iter().map(item).collect())
            }
        }
    }

    pub(super) fn task(&self) -> Option<&Task> {
        match self {
            Self::Task(task) => Some(task),
            _ => None,
        }
    }
}

/// Problems of a task; held-out ones come from another stream.
pub(super) fn problems(task: &Task, seed: u64, part: Part, from: u64, n: usize) -> Vec<Problem> {
    let name = match part {
        Part::Train => "problem",
        Part::HeldOut => "held-out problem",
    };
    (from..from + n as u64)
        .map(|i| task.prompt(&mut Stream::at(seed, name, i)))
        .collect()
}

pub(super) fn prompt_tokens(tokens: &Tokens, prompt: &str) -> Vec<u32> {
    tokens.begin().into_iter().chain(tokens.encode(prompt)).collect()
}

fn prompted<'a>(tokens: &Tokens, prompt: &str, responses: impl Iterator<Item = &'a str>) -> Prompted {
    Prompted {
        prefix: prompt_tokens(tokens, prompt),
        responses: responses
            .map(|r| tokens.encode(r).into_iter().chain([tokens.end()]).collect())
            .collect(),
    }
}

/// Which of `all` items, of which the first `train` are for training: each once in an epoch, in an order of the epoch's own.
fn picks(seed: u64, part: Part, from: u64, n: usize, train: usize, all: usize) -> Vec<usize> {
    let (first, len) = match part {
        Part::Train => (0, train),
        Part::HeldOut => (train, all - train),
    };
    if len == 0 {
        return Vec::new();
    }
    if part == Part::HeldOut {
        return (first..first + len.min(n)).collect();
    }
    let mut order: (u64, Vec<usize>) = (u64::MAX, Vec::new());
    (from..from + n as u64)
        .map(|i| {
            let epoch = i / len as u64;
            if order.0 != epoch {
                order = (epoch, (0..len).collect());
                Stream::at(seed, "epoch", epoch).shuffle(&mut order.1);
            }
            first + order.1[(i % len as u64) as usize]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_comes_once_an_epoch_whatever_the_step() {
        let all = picks(3, Part::Train, 0, 40, 10, 12);
        for epoch in all.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..10));
        }
        assert_ne!(all[..10], all[10..20]);
        let in_steps: Vec<usize> = (0..10)
            .flat_map(|s| picks(3, Part::Train, s * 4, 4, 10, 12))
            .collect();
        assert_eq!(all, in_steps);
        assert_eq!(picks(3, Part::HeldOut, 0, 5, 10, 12), vec![10, 11]);
    }
}
