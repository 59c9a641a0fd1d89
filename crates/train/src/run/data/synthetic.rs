//! Problems of bare tokens: what an architecture can learn to look up, without a tokenizer in the way.

use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::prefix_grouper::Marked;
use crate::random::Stream;

/// The built-in problems. Only answers are scored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Synthetic {
    /// Multi-query associative recall (Arora et al., arXiv 2312.04927): `pairs` keys with their values, then every key once more, each followed
    /// by its value, which is scored. Keys are the lower half of the tokens, values the upper; token 0 is neither. Distances from the pairs to
    /// the questions follow the paper's power law; what stands between the questions is drawn from the values.
    Mqar {
        /// Tokens there are.
        vocab: usize,
        /// Key-value pairs.
        pairs: usize,
        /// Tokens of a sequence, even, `4 pairs` or more.
        length: usize,
    },
    /// `length` random tokens, token 0, and the same tokens again, which are scored.
    Copy {
        /// Tokens there are.
        vocab: usize,
        /// Tokens to copy.
        length: usize,
    },
    /// An induction head's problem (Fu et al., arXiv 2212.14052): token 0 stands once among random tokens and again at the end; the token that
    /// followed it is scored.
    Induction {
        /// Tokens there are.
        vocab: usize,
        /// Tokens of a sequence, the scored one not counted.
        length: usize,
    },
}

/// Exponent of the distances' power law, as in the paper's own data: `gap ^ (POWER - 1)`.
const POWER: f64 = 0.01;

/// The most tokens of a sequence.
const LONGEST: usize = 1 << 16;

impl Synthetic {
    /// Tokens there are: a model has at least as many.
    pub fn vocab(&self) -> usize {
        let (Self::Mqar { vocab, .. } | Self::Copy { vocab, .. } | Self::Induction { vocab, .. }) = self;
        *vocab
    }

    /// Tokens of a sequence.
    pub fn tokens(&self) -> usize {
        match *self {
            Self::Mqar { length, .. } => length,
            Self::Copy { length, .. } => 2 * length + 1,
            Self::Induction { length, .. } => length + 1,
        }
    }

    /// # Errors
    /// [`TrainError::Recipe`] for a number out of its range.
    pub fn check(&self) -> Result<(), TrainError> {
        let ranged =
            |key: &str, value: usize, least: usize, most: usize| match (least..=most).contains(&value) {
                true => Ok(()),
                false => Err(TrainError::Recipe(format!(
                    "`data.task.{key}` is {value}; it is from {least} to {most}"
                ))),
            };
        match *self {
            Self::Mqar { vocab, pairs, length } => {
                ranged("vocab", vocab, 4, 1 << 20)?;
                ranged("length", length, 4, LONGEST)?;
                ranged("pairs", pairs, 1, (length / 4).min(vocab / 2 - 1))?;
                if !length.is_multiple_of(2) {
                    return Err(TrainError::Recipe(format!(
                        "`data.task.length` is {length}; it is even"
                    )));
                }
                Ok(())
            }
            Self::Copy { vocab, length } => {
                ranged("vocab", vocab, 3, 1 << 20)?;
                ranged("length", length, 1, LONGEST)
            }
            Self::Induction { vocab, length } => {
                ranged("vocab", vocab, 3, 1 << 20)?;
                ranged("length", length, 3, LONGEST)
            }
        }
    }

    /// One problem with its answers.
    pub fn problem(&self, stream: &mut Stream) -> Marked {
        match *self {
            Self::Mqar { vocab, pairs, length } => mqar(vocab, pairs, length, stream),
            Self::Copy { vocab, length } => {
                let item: Vec<u32> = (0..length).map(|_| other(vocab, stream)).collect();
                Marked {
                    tokens: item
                        .iter()
                        .copied()
                        .chain([0])
                        .chain(item.iter().copied())
                        .collect(),
                    scored: (0..2 * length + 1).map(|t| t > length).collect(),
                }
            }
            Self::Induction { vocab, length } => {
                let mut tokens: Vec<u32> = (0..length + 1).map(|_| other(vocab, stream)).collect();
                // Behind it and before the last token 0 stands at least the token to find.
                let at = stream.below(length - 2);
                tokens[at] = 0;
                tokens[length - 1] = 0;
                tokens[length] = tokens[at + 1];
                Marked {
                    scored: (0..=length).map(|t| t == length).collect(),
                    tokens,
                }
            }
        }
    }
}

/// Any token but 0.
fn other(vocab: usize, stream: &mut Stream) -> u32 {
    1 + stream.below(vocab - 1) as u32
}

/// `n` different numbers below `all`, in random order.
fn different(n: usize, all: usize, stream: &mut Stream) -> Vec<usize> {
    let mut pool: Vec<usize> = (0..all).collect();
    for i in 0..n {
        pool.swap(i, i + stream.below(all - i));
    }
    pool.truncate(n);
    pool
}

fn mqar(vocab: usize, pairs: usize, length: usize, stream: &mut Stream) -> Marked {
    let half = vocab / 2;
    let value = |stream: &mut Stream| (half + stream.below(vocab - half)) as u32;
    let keys: Vec<u32> = different(pairs, half - 1, stream)
        .into_iter()
        .map(|k| 1 + k as u32)
        .collect();
    let values: Vec<u32> = keys.iter().map(|_| value(stream)).collect();
    let mut tokens: Vec<u32> = keys.iter().zip(&values).flat_map(|(&k, &v)| [k, v]).collect();
    let asked = tokens.len();
    tokens.extend((asked..length).map(|_| value(stream)));
    let mut scored = vec![false; length];
    // Places drawn without replacement, by weight: those with the largest u^(1/w) (Efraimidis and Spirakis), compared as logarithms.
    let mut places: Vec<(f64, usize)> = (0..(length - asked) / 2)
        .map(|place| {
            let weight = ((place + 1) as f64).powf(POWER - 1.0);
            ((1.0 - stream.unit()).ln() / weight, place)
        })
        .collect();
    places.sort_by(|a, b| b.0.total_cmp(&a.0));
    for ((key, value), (_, place)) in keys.iter().zip(&values).zip(places) {
        let at = asked + 2 * place;
        tokens[at] = *key;
        tokens[at + 1] = *value;
        scored[at + 1] = true;
    }
    Marked { tokens, scored }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(task: &Synthetic) -> Vec<Marked> {
        task.check().unwrap();
        (0..200)
            .map(|i| task.problem(&mut Stream::at(1, "p", i)))
            .collect()
    }

    /// What a reader of the sequence alone would answer at `t`.
    fn found(tokens: &[u32], t: usize) -> u32 {
        let asked = tokens[t - 1];
        let first = tokens.iter().position(|&x| x == asked).unwrap();
        tokens[first + 1]
    }

    #[test]
    fn answers_stand_in_their_sequences() {
        let tasks = [
            Synthetic::Mqar {
                vocab: 32,
                pairs: 5,
                length: 40,
            },
            Synthetic::Induction {
                vocab: 16,
                length: 20,
            },
        ];
        for task in tasks {
            let answers = match task {
                Synthetic::Mqar { pairs, .. } => pairs,
                _ => 1,
            };
            for problem in problems(&task) {
                assert_eq!(problem.tokens.len(), task.tokens());
                assert_eq!(problem.scored.len(), task.tokens());
                assert!(problem.tokens.iter().all(|&t| (t as usize) < task.vocab()));
                assert_eq!(problem.scored.iter().filter(|&&s| s).count(), answers);
                for t in (0..task.tokens()).filter(|&t| problem.scored[t]) {
                    let asked = problem.tokens[t - 1];
                    let seen = problem.tokens.iter().filter(|&&x| x == asked).count();
                    assert_eq!(seen, 2, "a key stands once before it is asked: {task:?}");
                    assert_eq!(problem.tokens[t], found(&problem.tokens, t), "{task:?}");
                }
            }
        }
    }

    #[test]
    fn a_copy_is_the_same_tokens_again() {
        for problem in problems(&Synthetic::Copy { vocab: 8, length: 6 }) {
            let (first, second) = problem.tokens.split_at(7);
            assert_eq!((&first[..6], first[6]), (second, 0));
            assert_eq!(problem.scored, (0..13).map(|t| t > 6).collect::<Vec<_>>());
        }
    }

    /// The power law: near questions are asked more often, and far ones sometimes.
    #[test]
    fn questions_come_near_and_far() {
        let task = Synthetic::Mqar {
            vocab: 64,
            pairs: 2,
            length: 132,
        };
        let places: Vec<usize> = problems(&task)
            .iter()
            .flat_map(|p| (4..132).filter(|&t| p.scored[t]).collect::<Vec<_>>())
            .collect();
        let near = places.iter().filter(|&&t| t < 20).count();
        let far = places.iter().filter(|&&t| t >= 68).count();
        // Of sum g^-0.99 over 64 places, the first eight have 0.56 and the last 32 have 0.15 (one draw; two without replacement are flatter).
        assert!(near > places.len() / 3, "{near} of {}", places.len());
        assert!(far > places.len() / 20 && far < places.len() / 3, "{far}");
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let mqar = |vocab, pairs, length| Synthetic::Mqar { vocab, pairs, length }.check();
        assert!(mqar(16, 7, 28).is_ok());
        for (vocab, pairs, length) in [
            (16, 8, 64),
            (16, 7, 26),
            (16, 1, 27),
            (2, 1, 8),
            (16, 0, 8),
            (16, 1, 1 << 40),
        ] {
            let error = mqar(vocab, pairs, length).unwrap_err().to_string();
            assert!(error.contains("data.task."), "{error}");
        }
        assert!(Synthetic::Copy { vocab: 2, length: 4 }.check().is_err());
        assert!(Synthetic::Induction { vocab: 8, length: 2 }.check().is_err());
        assert!(problems(&Synthetic::Induction { vocab: 3, length: 3 }).len() == 200);
    }
}
