//! Tasks whose answers a program can check, and rewards for them.

use serde::{Deserialize, Serialize};

use crate::random::Stream;

/// A prompt and how its answers are judged.
pub trait Verifiable: Send + Sync {
    /// The prompt of a problem, bytes of ASCII.
    fn prompt(&self, stream: &mut Stream) -> Problem;

    /// Reward of an answer, from 0 to 1.
    fn reward(&self, problem: &Problem, answer: &str) -> f64;
}

/// One problem with its right answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What the model is given.
    pub prompt: String,
    /// What it should say.
    pub answer: String,
}

/// The built-in tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Task {
    /// Sums of two numbers of so many digits, behind `shots` solved ones.
    Arithmetic {
        /// Digits of each number.
        digits: usize,
        /// Solved problems before the asked one.
        shots: usize,
    },
    /// The k-th of `items` words.
    Copy {
        /// Length of the list.
        items: usize,
    },
    /// A JSON object with the asked keys: any that parses and has them, half of the reward for one that only parses.
    Json {
        /// Number of keys.
        keys: usize,
    },
    /// A tiny function given by examples: the answer is its value at a point.
    Function {
        /// Examples given.
        examples: usize,
    },
    /// A number hidden in text that says nothing (Mohtashami and Jaggi, arXiv 2305.16300): the answer is the number.
    Passkey {
        /// Digits of the number.
        digits: usize,
        /// Sentences that say nothing.
        filler: usize,
    },
}

/// Why a task cannot be set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`task.{field}` is {value}; it is from {least} to {limit}")]
pub struct TaskError {
    field: &'static str,
    value: usize,
    least: usize,
    limit: usize,
}

impl Task {
    /// # Errors
    /// A number out of its range.
    pub fn check(&self) -> Result<(), TaskError> {
        let ranges = match *self {
            Self::Arithmetic { digits, shots } => vec![("digits", digits, 1, 9), ("shots", shots, 0, 256)],
            Self::Copy { items } => vec![("items", items, 1, 1024)],
            Self::Json { keys } => vec![("keys", keys, 1, 16)],
            Self::Function { examples } => vec![("examples", examples, 1, 256)],
            Self::Passkey { digits, filler } => {
                vec![("digits", digits, 1, 18), ("filler", filler, 0, 1 << 16)]
            }
        };
        match ranges
            .into_iter()
            .find(|&(_, value, low, high)| value < low || value > high)
        {
            Some((field, value, least, limit)) => Err(TaskError {
                field,
                value,
                least,
                limit,
            }),
            None => Ok(()),
        }
    }
}

/// What hides a pass key.
const FILLER: [&str; 5] = [
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
];

const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz";

fn word(stream: &mut Stream, letters: usize) -> String {
    (0..letters)
        .map(|_| char::from(LETTERS[stream.below(26)]))
        .collect()
}

impl Verifiable for Task {
    fn prompt(&self, stream: &mut Stream) -> Problem {
        match *self {
            Self::Arithmetic { digits, shots } => {
                let limit = 10usize.pow(digits as u32);
                let mut prompt = String::new();
                for _ in 0..shots {
                    let (a, b) = (stream.below(limit), stream.below(limit));
                    prompt += &format!("{a}+{b}={}\n", a + b);
                }
                let (a, b) = (stream.below(limit), stream.below(limit));
                Problem {
                    prompt: format!("{prompt}{a}+{b}="),
                    answer: (a + b).to_string(),
                }
            }
            Self::Copy { items } => {
                let list: Vec<String> = (0..items).map(|_| word(stream, 2)).collect();
                let k = stream.below(items);
                #[expect(clippy::format_collect, reason = "a few short lines")]
                let lines: String = list
                    .iter()
                    .enumerate()
                    .map(|(i, w)| format!("{i}:{w} "))
                    .collect();
                Problem {
                    prompt: format!("{lines}?{k}:"),
                    answer: list[k].clone(),
                }
            }
            Self::Json { keys } => {
                let names: Vec<String> = (0..keys).map(|_| word(stream, 3)).collect();
                let answer: Vec<String> = names.iter().map(|n| format!("\"{n}\":0")).collect();
                Problem {
                    prompt: format!("{}=", names.join(",")),
                    answer: format!("{{{}}}", answer.join(",")),
                }
            }
            Self::Function { examples } => {
                let (a, b) = (stream.below(5), stream.below(10));
                let f = |x: usize| a * x + b;
                let mut prompt = String::new();
                for _ in 0..examples {
                    let x = stream.below(10);
                    prompt += &format!("f({x})={}\n", f(x));
                }
                let x = stream.below(10);
                Problem {
                    prompt: format!("{prompt}f({x})="),
                    answer: f(x).to_string(),
                }
            }
            Self::Passkey { digits, filler } => {
                let key: String = (0..digits)
                    .map(|_| char::from(b'0' + stream.below(10) as u8))
                    .collect();
                let mut sentences: Vec<String> = FILLER
                    .iter()
                    .cycle()
                    .take(filler)
                    .map(ToString::to_string)
                    .collect();
                let hidden = format!("The pass key is {key}. Remember it. {key} is the pass key.");
                sentences.insert(stream.below(filler + 1), hidden);
                Problem {
                    prompt: format!("{} What is the pass key? The pass key is", sentences.join(" ")),
                    answer: format!(" {key}"),
                }
            }
        }
    }

    fn reward(&self, problem: &Problem, answer: &str) -> f64 {
        let right = |ok: bool| f64::from(u8::from(ok));
        match self {
            Self::Json { .. } => {
                match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(answer) {
                    Err(_) => 0.0,
                    Ok(found) => {
                        let asked = problem.prompt.trim_end_matches('=').split(',');
                        0.5 + 0.5 * right(asked.into_iter().all(|key| found.contains_key(key)))
                    }
                }
            }
            _ => right(answer.trim() == problem.answer.trim()),
        }
    }
}
