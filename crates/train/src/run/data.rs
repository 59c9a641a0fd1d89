//! What a step learns from: a pure function of the seed and the step, so that a resumed run goes on where it stopped.

mod chat;
mod shards;
mod synthetic;

use std::path::{Path, PathBuf};

use antefix_models::files::ModelFiles;
use antefix_models::template::ChatTemplate;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

pub use self::shards::RawIds;
pub use self::synthetic::Synthetic;
use super::model::{Tokens, Trained};
use super::recipe::{RawData, RawModel, Recipe};
use crate::error::TrainError;
use crate::prefix_grouper::{
    Form, LanguageModel, Marked, Problem, Prompted, Scored, Task, Verifiable, pack, pack_marked,
    pack_sequences,
};
use crate::random::Stream;

/// Files larger than this are refused rather than read into memory, bytes.
const LARGEST: u64 = 1 << 30;

/// Items of a step.
pub(super) enum Items {
    /// Whole sequences.
    Sequences(Vec<Vec<u32>>),
    /// Sequences of which some tokens are scored.
    Marked(Vec<Marked>),
    /// Prompts with responses.
    Prompted(Vec<Prompted>),
}

impl Items {
    /// In pieces of `size`.
    pub(super) fn split(self, size: usize) -> Vec<Self> {
        fn pieces<T: Clone>(all: &[T], size: usize, wrap: impl Fn(Vec<T>) -> Items) -> Vec<Items> {
            all.chunks(size).map(|c| wrap(c.to_vec())).collect()
        }
        match self {
            Self::Sequences(all) => pieces(&all, size, Self::Sequences),
            Self::Marked(all) => pieces(&all, size, Self::Marked),
            Self::Prompted(all) => pieces(&all, size, Self::Prompted),
        }
    }

    /// As a packed batch; responses stand behind one prompt.
    pub(super) fn pack(&self) -> Result<Scored, TrainError> {
        match self {
            Self::Sequences(sequences) => pack_sequences(sequences),
            Self::Marked(sequences) => pack_marked(sequences),
            Self::Prompted(items) => pack(items, Form::Grouped),
        }
    }
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
    Marked {
        items: Vec<Marked>,
        train: usize,
        /// Sequences that were longer than `data.seq`.
        cut: usize,
    },
    Prompted {
        items: Vec<Prompted>,
        train: usize,
    },
    Task(Task),
    Synthetic(Synthetic),
}

#[derive(Deserialize)]
struct Line {
    prompt: String,
    response: Option<String>,
    #[serde(default)]
    responses: Vec<String>,
}

#[derive(Deserialize)]
struct Preference {
    prompt: String,
    chosen: String,
    rejected: String,
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

/// What `each` makes of every line of a file that is not blank.
fn lines<L: DeserializeOwned, T>(
    file: &Path,
    mut each: impl FnMut(L) -> Result<T, String>,
) -> Result<Vec<T>, TrainError> {
    let text = read(file)?;
    let mut out = Vec::new();
    for (n, line) in text.split(|&b| b == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let item = serde_json::from_slice(line)
            .map_err(|e| e.to_string())
            .and_then(&mut each);
        out.push(item.map_err(|what| TrainError::file(file, format!("line {}: {what}", n + 1)))?);
    }
    Ok(out)
}

/// How many of `all` items are for training: what `val` leaves, one at least, if there are any.
fn training(all: usize, val: f64) -> Option<usize> {
    let held_out = (all as f64 * val).ceil() as usize;
    (all > 0).then(|| (all - held_out).max(1))
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

/// The template of a file, or else of the base model.
fn template(recipe: &Recipe, own: Option<&Path>, tokens: &Tokens) -> Result<ChatTemplate, TrainError> {
    let (bos, eos) = tokens.marks();
    let found = match (own, &recipe.model) {
        (Some(file), _) => {
            let source = std::fs::read_to_string(file).map_err(TrainError::io(file))?;
            ChatTemplate::new(&source, &bos, &eos).map(Some)
        }
        (None, RawModel::Base { path, .. }) => ChatTemplate::open(&ModelFiles::open(path)?, &bos, &eos),
        (None, _) => Ok(None),
    };
    let bad = |what: String| TrainError::Recipe(format!("`data.source` is \"chat\": {what}"));
    found.map_err(|e| bad(e.to_string()))?.ok_or_else(|| {
        bad("the model has no chat template\nhint: name one, a Jinja file, as `data.template`".into())
    })
}

impl Data {
    pub(super) fn open(recipe: &Recipe, tokens: &Tokens, model: &Trained) -> Result<Self, TrainError> {
        let vocab = model.output().dim(0)?;
        let empty = |file: &Path| TrainError::file(file, "no line to learn from");
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
                Self::windows(ids, *seq, *val)
            }
            RawData::Tokens {
                files: paths,
                seq,
                val,
                ids: width,
            } => {
                let mut ids = Vec::new();
                for path in paths {
                    for file in files(path)? {
                        ids.extend(shards::tokens(&file, *width, vocab)?);
                    }
                }
                Self::windows(ids, *seq, *val)
            }
            RawData::JsonLines { file, val, .. } => {
                let items = lines(file, |line: Line| {
                    let responses: Vec<_> = line.response.into_iter().chain(line.responses).collect();
                    if line.prompt.is_empty() || responses.is_empty() {
                        return Err("a prompt and at least one response are needed".into());
                    }
                    Ok(prompted(
                        tokens,
                        &line.prompt,
                        responses.iter().map(String::as_str),
                    ))
                })?;
                let train = training(items.len(), *val).ok_or_else(|| empty(file))?;
                Ok(Self::Prompted { items, train })
            }
            RawData::Preferences { file, val, .. } => {
                let items = lines(file, |line: Preference| {
                    if line.prompt.is_empty() || line.chosen == line.rejected {
                        return Err("a prompt and two different responses are needed".into());
                    }
                    let pair = [line.chosen.as_str(), line.rejected.as_str()];
                    Ok(prompted(tokens, &line.prompt, pair.into_iter()))
                })?;
                let train = training(items.len(), *val).ok_or_else(|| empty(file))?;
                Ok(Self::Prompted { items, train })
            }
            RawData::Chat {
                file,
                seq,
                val,
                template: own,
                ..
            } => {
                let template = template(recipe, own.as_deref(), tokens)?;
                let mut items =
                    lines(file, |line: chat::Conversation| line.sequences(&template, tokens))?.concat();
                let mut cut = 0;
                for item in &mut items {
                    cut += usize::from(item.tokens.len() > *seq);
                    item.tokens.truncate(*seq);
                    item.scored.truncate(*seq);
                }
                items.retain(|item| item.scored.iter().skip(1).any(|&s| s));
                let train = training(items.len(), *val).ok_or_else(|| empty(file))?;
                Ok(Self::Marked { items, train, cut })
            }
            RawData::Task { task, .. } => Ok(Self::Task(task.clone())),
            RawData::Synthetic { task } => {
                if task.vocab() > vocab {
                    return Err(TrainError::Recipe(format!(
                        "`data.task.vocab` is {}; the model has {vocab} tokens",
                        task.vocab()
                    )));
                }
                Ok(Self::Synthetic(task.clone()))
            }
        }
    }

    fn windows(ids: Vec<u32>, seq: usize, val: f64) -> Result<Self, TrainError> {
        let windows = ids.len().saturating_sub(1) / seq;
        match training(windows, val) {
            Some(train) => Ok(Self::Text {
                tokens: ids,
                seq,
                train,
                windows,
            }),
            None => Err(TrainError::Recipe(format!(
                "`data.files` have {} tokens: not one window of `data.seq` {seq} to learn from",
                ids.len()
            ))),
        }
    }

    /// How much there is, for the first line of the metrics; nothing for what is made up.
    pub(super) fn facts(&self) -> serde_json::Value {
        match self {
            Self::Text {
                tokens,
                train,
                windows,
                ..
            } => json!({"tokens": tokens.len(), "train": train, "held_out": windows - train}),
            Self::Marked { items, train, cut } => {
                json!({"train": train, "held_out": items.len() - train, "cut": cut})
            }
            Self::Prompted { items, train } => json!({"train": train, "held_out": items.len() - train}),
            Self::Task(_) | Self::Synthetic(_) => json!(null),
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
            Self::Marked { items, train, .. } => {
                let picks = picks(seed, part, from, n, *train, items.len());
                Items::Marked(picks.into_iter().map(|at| items[at].clone()).collect())
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
            Self::Synthetic(task) => {
                let streams = streams(seed, part, from, n);
                Items::Marked(streams.map(|mut s| task.problem(&mut s)).collect())
            }
        }
    }

    /// Its items are answers to something, right or wrong as a whole.
    pub(super) fn has_answers(&self) -> bool {
        matches!(self, Self::Prompted { .. } | Self::Task(_) | Self::Synthetic(_))
    }

    pub(super) fn task(&self) -> Option<&Task> {
        match self {
            Self::Task(task) => Some(task),
            _ => None,
        }
    }
}

/// A stream for each made-up item; held-out ones have others.
fn streams(seed: u64, part: Part, from: u64, n: usize) -> impl Iterator<Item = Stream> {
    let name = match part {
        Part::Train => "problem",
        Part::HeldOut => "held-out problem",
    };
    (from..from + n as u64).map(move |i| Stream::at(seed, name, i))
}

/// Problems of a task; held-out ones come from another stream.
pub(super) fn problems(task: &Task, seed: u64, part: Part, from: u64, n: usize) -> Vec<Problem> {
    streams(seed, part, from, n)
        .map(|mut s| task.prompt(&mut s))
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
