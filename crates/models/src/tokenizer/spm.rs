//! SentencePiece's BPE: characters merge to the neighbour pair whose token has the best score; what is left over becomes bytes.

use std::cmp::Ordering;

use super::bpe::merge;
use super::vocab::{Class, Vocab};
use super::{Matcher, TokenizerError};
use crate::gguf::Gguf;

/// The stand-in of a space.
const SPACE: char = '\u{2581}';

pub(super) struct Spm {
    scores: Vec<f32>,
    add_space_prefix: bool,
    /// User-defined tokens with stand-ins of spaces, such as Gemma's runs: found after spaces have become stand-ins.
    runs: Option<Matcher>,
}

/// Best score first. NaN scores come last.
#[derive(Clone, Copy)]
struct Rank(f32);

impl PartialEq for Rank {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Rank {}
impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.total_cmp(&self.0)
    }
}

impl Spm {
    pub(super) fn from_gguf(gguf: &Gguf, vocab: &Vocab) -> Result<Self, TokenizerError> {
        let key = "tokenizer.ggml.scores";
        let scores: Vec<f32> = gguf
            .array(key)
            .and_then(|a| a.f32s())
            .map(Iterator::collect)
            .ok_or_else(|| TokenizerError::Key {
                key,
                what: "is missing or no list of numbers".into(),
            })?;
        if scores.len() != vocab.len() {
            let what = format!("has {} entries, the vocabulary {}", scores.len(), vocab.len());
            return Err(TokenizerError::Key { key, what });
        }
        let add_space_prefix = gguf.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
        let runs = (0..vocab.len() as u32)
            .filter(|&id| vocab.class(id) == Class::UserDefined)
            .filter_map(|id| Some((stand_ins(std::str::from_utf8(vocab.bytes(id)).ok()?), id)))
            .filter(|(text, _)| text.contains(SPACE))
            .map(|(text, id)| (text.into_bytes(), id))
            .collect();
        Ok(Self {
            scores,
            add_space_prefix,
            runs: Matcher::new(runs)?,
        })
    }

    pub(super) fn encode(&self, vocab: &Vocab, text: &str, at_start: bool, out: &mut Vec<u32>) {
        let mut spaced = String::with_capacity(text.len() + 8);
        if at_start && self.add_space_prefix {
            spaced.push(SPACE);
        }
        spaced.push_str(&stand_ins(text));
        let plain = |out: &mut Vec<u32>, text: &str, _| self.merge(vocab, text, out);
        Matcher::split(self.runs.as_ref(), &spaced, out, plain, Vec::push);
    }

    /// Merges a text without spaces.
    fn merge(&self, vocab: &Vocab, spaced: &str, out: &mut Vec<u32>) {
        // Symbols are ids of tokens, or of characters without a token: those are numbered behind the vocabulary.
        let known = vocab.len() as u32;
        let mut strangers: Vec<char> = Vec::new();
        let mut buffer = [0; 4];
        let symbols: Vec<u32> = spaced
            .chars()
            .map(|c| {
                vocab
                    .find(c.encode_utf8(&mut buffer).as_bytes())
                    .unwrap_or_else(|| {
                        strangers.push(c);
                        known + strangers.len() as u32 - 1
                    })
            })
            .collect();
        let mut joined = Vec::new();
        let mut merged = Vec::new();
        let joined = std::cell::RefCell::new(&mut joined);
        merge(
            symbols,
            |l, r| {
                if l >= known || r >= known {
                    return None;
                }
                let mut joined = joined.borrow_mut();
                joined.clear();
                joined.extend_from_slice(vocab.bytes(l));
                joined.extend_from_slice(vocab.bytes(r));
                let id = vocab.find(&joined)?;
                Some((Rank(self.scores[id as usize]), id))
            },
            &mut merged,
        );
        for id in merged {
            match id.checked_sub(known) {
                None => out.push(id),
                Some(stranger) => {
                    let c = strangers[stranger as usize];
                    out.extend(c.encode_utf8(&mut buffer).bytes().filter_map(|b| vocab.byte(b)));
                }
            }
        }
    }
}

/// The text with stand-ins for its spaces. Converters write tokens of this text either way.
pub(super) fn stand_ins(text: &str) -> String {
    text.replace(' ', "\u{2581}")
}

/// The text of a token with real spaces.
pub(super) fn spaces(token: &[u8]) -> Vec<u8> {
    match std::str::from_utf8(token) {
        Ok(text) => text.replace(SPACE, " ").into_bytes(),
        Err(_) => token.to_vec(),
    }
}

/// The bytes of a token: a byte token is that byte.
pub(super) fn token_bytes(vocab: &Vocab, id: u32) -> Vec<u8> {
    let text = vocab.bytes(id);
    let byte = (vocab.class(id) == Class::Byte)
        .then(|| {
            std::str::from_utf8(text)
                .ok()?
                .strip_prefix("<0x")?
                .strip_suffix('>')
        })
        .flatten()
        .and_then(|hex| u8::from_str_radix(hex, 16).ok());
    byte.map_or_else(|| spaces(text), |b| vec![b])
}
