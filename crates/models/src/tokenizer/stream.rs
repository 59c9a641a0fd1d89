//! Tokens to text as they come, never half a character.

use super::Tokenizer;

/// Holds back the bytes of an unfinished character.
#[derive(Debug, Clone, Default)]
pub struct StreamDecoder {
    held: Vec<u8>,
}

impl StreamDecoder {
    /// Nothing held.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a token in; returns the text that is certain now, if any. Control tokens have none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Option<String> {
        if !tokenizer.is_special(id) {
            self.held.extend(tokenizer.token_bytes(id));
        }
        self.take()
    }

    /// Bytes that will never become valid UTF-8 come out as U+FFFD; an unfinished character stays.
    fn take(&mut self) -> Option<String> {
        let mut text = String::new();
        let mut rest: &[u8] = &self.held;
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = tail;
                    let Some(bad) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        let rest = rest.to_vec();
        self.held = rest;
        (!text.is_empty()).then_some(text)
    }

    /// The end: whatever is held, with U+FFFD for what is not a character.
    pub fn flush(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}
