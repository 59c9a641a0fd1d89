//! The vocabulary: bytes of each token in one buffer, and the way back through a hash table of ids.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::TokenizerError;
use crate::gguf::Gguf;

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Normal,
    Control,
    UserDefined,
    Byte,
    Unused,
}

/// Tokens by id and by bytes.
pub(super) struct Vocab {
    buffer: Vec<u8>,
    /// Token `i` is `buffer[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
    classes: Vec<Class>,
    table: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// The token of each single byte.
    byte_tokens: [Option<u32>; 256],
}

impl Vocab {
    /// Collects tokens; of equal ones the first is found by its bytes.
    pub(super) fn new(tokens: impl Iterator<Item = (Vec<u8>, Class)>) -> Option<Self> {
        let mut vocab = Self {
            buffer: Vec::new(),
            ends: Vec::new(),
            classes: Vec::new(),
            table: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            byte_tokens: [None; 256],
        };
        for (bytes, class) in tokens {
            vocab.buffer.extend_from_slice(&bytes);
            vocab.ends.push(u32::try_from(vocab.buffer.len()).ok()?);
            vocab.classes.push(class);
        }
        let mut table = HashTable::with_capacity(vocab.len());
        for id in 0..vocab.len() as u32 {
            let bytes = vocab.bytes(id);
            let hash = vocab.hasher.hash_one(bytes);
            if table.find(hash, |&other| vocab.bytes(other) == bytes).is_none() {
                table.insert_unique(hash, id, |&id| vocab.hasher.hash_one(vocab.bytes(id)));
            }
        }
        vocab.table = table;
        Some(vocab)
    }

    pub(super) fn from_gguf(gguf: &Gguf, byte_level: bool) -> Result<Self, TokenizerError> {
        let key = "tokenizer.ggml.tokens";
        let bad = |what: &str| TokenizerError::Key {
            key,
            what: what.to_string(),
        };
        let tokens = gguf
            .array(key)
            .and_then(|a| a.strs())
            .ok_or_else(|| bad("is missing or no list of strings"))?;
        let types: Option<Vec<i64>> = gguf
            .array("tokenizer.ggml.token_type")
            .and_then(|a| a.i64s())
            .map(Iterator::collect);
        let mut types = types.into_iter().flatten();
        let unmap = unmap_table();
        let mut vocab = Self::new(tokens.map(|text| {
            let class = match types.next() {
                Some(3) => Class::Control,
                Some(4) => Class::UserDefined,
                Some(5) => Class::Unused,
                Some(6) => Class::Byte,
                _ => Class::Normal,
            };
            let mapped = byte_level && class == Class::Normal;
            let bytes = if mapped { unmap_bytes(text, &unmap) } else { None };
            (bytes.unwrap_or_else(|| text.to_vec()), class)
        }))
        .ok_or_else(|| bad("holds more than 4 GiB of text"))?;
        if vocab.len() == 0 {
            return Err(bad("is empty"));
        }
        for b in 0..=255u8 {
            vocab.byte_tokens[b as usize] = match byte_level {
                true => vocab.find(&[b]),
                false => vocab.find(format!("<0x{b:02X}>").as_bytes()),
            };
        }
        Ok(vocab)
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of a token; nothing for ids that do not exist.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.buffer[start as usize..end as usize]
    }

    pub(super) fn class(&self, id: u32) -> Class {
        self.classes.get(id as usize).copied().unwrap_or(Class::Unused)
    }

    pub(super) fn find(&self, bytes: &[u8]) -> Option<u32> {
        self.table
            .find(self.hasher.hash_one(bytes), |&id| self.bytes(id) == bytes)
            .copied()
    }

    /// The token of one byte.
    pub(super) fn byte(&self, byte: u8) -> Option<u32> {
        self.byte_tokens[byte as usize]
    }

    pub(super) fn set_byte(&mut self, byte: u8, id: Option<u32>) {
        self.byte_tokens[byte as usize] = id;
    }
}

/// GPT-2's printable stand-in of each byte: Latin-1 letters stand for themselves, the rest for U+0100 and up.
fn stand_in(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or('\u{100}')
}

/// From stand-ins (below U+0144) back to bytes.
pub(super) fn unmap_table() -> [Option<u8>; 0x144] {
    let mut table = [None; 0x144];
    for b in 0..=255u8 {
        if let Some(slot) = table.get_mut(stand_in(b) as usize) {
            *slot = Some(b);
        }
    }
    table
}

/// The bytes that a byte-level token stands for, or nothing if a character is no stand-in.
pub(super) fn unmap_bytes(text: &[u8], table: &[Option<u8>; 0x144]) -> Option<Vec<u8>> {
    std::str::from_utf8(text)
        .ok()?
        .chars()
        .map(|c| table.get(c as usize).copied().flatten())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_stand_in_and_comes_back() {
        let table = unmap_table();
        for b in 0..=255u8 {
            assert_eq!(
                unmap_bytes(stand_in(b).to_string().as_bytes(), &table),
                Some(vec![b])
            );
        }
        assert_eq!((stand_in(b' '), stand_in(b'\n')), ('Ġ', 'Ċ'));
        assert_eq!(unmap_bytes("日".as_bytes(), &table), None);
    }
}
