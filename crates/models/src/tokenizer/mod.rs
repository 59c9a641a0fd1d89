//! Text to token ids and back, from the tables of a GGUF file or from a `tokenizer.json`.
//!
//! GGUF tables are run by our own byte-level BPE and SentencePiece code, because they come from files that nobody vouches for and
//! have to load in milliseconds; `tokenizer.json` goes to the `tokenizers` crate.

mod bpe;
mod folder;
mod split;
mod spm;
mod stream;
mod vocab;

use std::path::Path;

use aho_corasick::{AhoCorasick, MatchKind};

pub use stream::StreamDecoder;
use vocab::{Class, Vocab};

use crate::error::shown;
use crate::files::ModelFiles;
use crate::gguf::Gguf;

/// Why there is no tokenizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum TokenizerError {
    #[error("the model has no tokenizer: `{key}` {what}")]
    Key { key: &'static str, what: String },
    #[error(
        "tokenizer kind `{kind}` is not supported\nhint: supported are `gpt2` (byte-level BPE) and `llama` (SentencePiece)"
    )]
    Kind { kind: String },
    #[error("pre-tokenizer `{pre}` is not supported\nhint: supported are {}", split::Pre::NAMES.join(", "))]
    Pre { pre: String },
    #[error("merge {index} is not two tokens of the vocabulary")]
    Merge { index: usize },
    #[error("special token {id} has {bytes} bytes, at most {MAX_SPECIAL} are possible")]
    LongSpecial { id: u32, bytes: usize },
    #[error("the special tokens have {bytes} bytes together, at most {MAX_SPECIALS} are possible")]
    Specials { bytes: usize },
    #[error("{}: {what}", .file.display())]
    Json { file: std::path::PathBuf, what: String },
}

/// Whether the text may name control tokens such as `<|im_start|>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// Yes: it comes from a template or from the user's own raw prompt.
    Parse,
    /// No: they are ordinary text.
    Plain,
}

enum Kind {
    Bpe(bpe::Bpe),
    Spm(spm::Spm),
    Folder(Box<folder::Folder>),
}

/// A tokenizer with its special tokens.
pub struct Tokenizer {
    vocab: Vocab,
    kind: Kind,
    /// Control and user-defined tokens / user-defined tokens only, leftmost-longest.
    with_control: Option<Matcher>,
    without_control: Option<Matcher>,
    bos: Option<u32>,
    eos: Option<u32>,
    ends: Vec<u32>,
    add_bos: bool,
}

/// Bytes of the longest special token, and of all of them. Real ones have up to 93 (a run of spaces in Gemma's) and 75,000.
/// An automaton takes a kilobyte a byte for up to 100 tokens, some 40 bytes a byte for more.
const MAX_SPECIAL: usize = 128;
const MAX_SPECIALS: usize = 256 << 10;

struct Matcher {
    patterns: AhoCorasick,
    ids: Vec<u32>,
}

impl Matcher {
    fn new(tokens: Vec<(Vec<u8>, u32)>) -> Result<Option<Self>, TokenizerError> {
        if tokens.is_empty() {
            return Ok(None);
        }
        if let Some((text, id)) = tokens.iter().find(|(text, _)| text.len() > MAX_SPECIAL) {
            let bytes = text.len();
            return Err(TokenizerError::LongSpecial { id: *id, bytes });
        }
        let bytes = tokens.iter().map(|(text, _)| text.len()).sum();
        if bytes > MAX_SPECIALS {
            return Err(TokenizerError::Specials { bytes });
        }
        let (texts, ids): (Vec<_>, Vec<_>) = tokens.into_iter().unzip();
        let patterns = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|_| TokenizerError::Specials { bytes })?;
        Ok(Some(Self { patterns, ids }))
    }

    /// Calls `plain(text, whether it is the start)` and `token(id)` on the pieces of `text` in order.
    fn split<T>(
        this: Option<&Self>,
        text: &str,
        out: &mut T,
        plain: impl Fn(&mut T, &str, bool),
        token: impl Fn(&mut T, u32),
    ) {
        let mut from = 0;
        if let Some(matcher) = this {
            for m in matcher.patterns.find_iter(text) {
                plain(out, &text[from..m.start()], from == 0);
                token(out, matcher.ids[m.pattern().as_usize()]);
                from = m.end();
            }
        }
        plain(out, &text[from..], from == 0);
    }
}

/// Texts of tokens that end an answer, beside the one the file names.
const ENDS: [&str; 6] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|eom_id|>",
];

impl Tokenizer {
    /// The tokenizer of a model file or folder.
    ///
    /// # Errors
    /// When there is none or its tables do not fit together.
    pub fn open(files: &ModelFiles) -> Result<Self, TokenizerError> {
        match files.gguf() {
            Some(gguf) => Self::from_gguf(gguf),
            None => Self::from_folder(files.dir()),
        }
    }

    /// From `tokenizer.ggml.*`.
    ///
    /// # Errors
    /// When keys are missing or do not fit together.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TokenizerError> {
        let missing = |key| TokenizerError::Key {
            key,
            what: "is missing or has another type".into(),
        };
        let kind = gguf
            .str("tokenizer.ggml.model")
            .ok_or_else(|| missing("tokenizer.ggml.model"))?;
        let byte_level = match kind {
            "gpt2" => true,
            "llama" => false,
            other => {
                return Err(TokenizerError::Kind { kind: shown(other) });
            }
        };
        let vocab = Vocab::from_gguf(gguf, byte_level)?;
        let kind = if byte_level {
            let pre = gguf.str("tokenizer.ggml.pre").unwrap_or("default");
            let pre = split::Pre::from_name(pre).ok_or_else(|| TokenizerError::Pre { pre: shown(pre) })?;
            Kind::Bpe(bpe::Bpe::from_gguf(gguf, &vocab, pre)?)
        } else {
            Kind::Spm(spm::Spm::from_gguf(gguf, &vocab)?)
        };
        let id = |key: &'static str| -> Result<Option<u32>, TokenizerError> {
            match gguf.u64(key) {
                None => Ok(None),
                Some(id) if (id as usize) < vocab.len() => Ok(Some(id as u32)),
                Some(id) => Err(TokenizerError::Key {
                    key,
                    what: format!("is {id}, the vocabulary has {} tokens", vocab.len()),
                }),
            }
        };
        let bos = id("tokenizer.ggml.bos_token_id")?;
        let eos = id("tokenizer.ggml.eos_token_id")?;
        let eot = id("tokenizer.ggml.eot_token_id")?;
        // SentencePiece models expect their begin token unless told otherwise; byte-level ones do not.
        let add_bos = gguf.bool("tokenizer.ggml.add_bos_token").unwrap_or(!byte_level);
        Self::assemble(vocab, kind, (bos, eos, eot), add_bos)
    }

    /// From `tokenizer.json` and `tokenizer_config.json` in `dir`.
    ///
    /// # Errors
    /// When the file is missing or broken.
    pub fn from_folder(dir: &Path) -> Result<Self, TokenizerError> {
        let folder::Parts {
            folder,
            vocab,
            bos,
            eos,
            add_bos,
        } = folder::open(dir)?;
        Self::assemble(vocab, Kind::Folder(Box::new(folder)), (bos, eos, None), add_bos)
    }

    fn assemble(
        vocab: Vocab,
        kind: Kind,
        (bos, eos, eot): (Option<u32>, Option<u32>, Option<u32>),
        add_bos: bool,
    ) -> Result<Self, TokenizerError> {
        let spm = matches!(kind, Kind::Spm(_));
        let texts = |want: &dyn Fn(Class) -> bool| -> Vec<(Vec<u8>, u32)> {
            (0..vocab.len() as u32)
                .filter(|&id| want(vocab.class(id)) && !vocab.bytes(id).is_empty())
                .map(|id| match std::str::from_utf8(vocab.bytes(id)) {
                    Ok(text) if spm => (spm::stand_ins(text).into_bytes(), id),
                    _ => (vocab.bytes(id).to_vec(), id),
                })
                .collect()
        };
        let user = texts(&|c| c == Class::UserDefined);
        let all = texts(&|c| matches!(c, Class::UserDefined | Class::Control));
        let mut ends: Vec<u32> = [eos, eot].into_iter().flatten().collect();
        ends.extend(
            ENDS.iter()
                .filter_map(|t| vocab.find(t.as_bytes()))
                .filter(|&id| vocab.class(id) == Class::Control),
        );
        ends.sort_unstable();
        ends.dedup();
        Ok(Self {
            with_control: Matcher::new(all)?,
            without_control: Matcher::new(user)?,
            vocab,
            kind,
            bos,
            eos,
            ends,
            add_bos,
        })
    }

    /// Token ids of `text`. No begin token is added.
    pub fn encode(&self, text: &str, specials: Specials) -> Vec<u32> {
        let mut out = Vec::new();
        self.encode_into(text, specials, &mut out);
        out
    }

    /// Token ids of bytes that need not be UTF-8: what is not becomes byte tokens, where the vocabulary has them.
    pub fn encode_bytes(&self, bytes: &[u8], specials: Specials) -> Vec<u32> {
        let mut out = Vec::new();
        for chunk in bytes.utf8_chunks() {
            self.encode_into(chunk.valid(), specials, &mut out);
            out.extend(chunk.invalid().iter().filter_map(|&b| self.vocab.byte(b)));
        }
        out
    }

    /// The text as a prompt: with the begin token, if the model wants one and the text does not start with it.
    pub fn encode_prompt(&self, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        if let Some(bos) = self.bos.filter(|_| self.add_bos) {
            out.push(bos);
        }
        let mut rest = self.encode(text, Specials::Parse);
        if !out.is_empty() && rest.first() == self.bos.as_ref() {
            rest.remove(0);
        }
        out.append(&mut rest);
        out
    }

    fn encode_into(&self, text: &str, specials: Specials, out: &mut Vec<u32>) {
        let matcher = match specials {
            Specials::Parse => &self.with_control,
            Specials::Plain => &self.without_control,
        };
        let plain = |out: &mut Vec<u32>, text: &str, at_start| self.encode_plain(text, at_start, out);
        Matcher::split(matcher.as_ref(), text, out, plain, Vec::push);
    }

    fn encode_plain(&self, text: &str, at_start: bool, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        match &self.kind {
            Kind::Bpe(bpe) => bpe.encode(&self.vocab, text, out),
            Kind::Spm(spm) => spm.encode(&self.vocab, text, at_start, out),
            Kind::Folder(folder) => folder.encode(text, out),
        }
    }

    /// The bytes that a token stands for; control tokens by their name, unknown ids by nothing.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.kind {
            Kind::Spm(_) if self.vocab.class(id) != Class::Control => spm::token_bytes(&self.vocab, id),
            _ => self.vocab.bytes(id).to_vec(),
        }
    }

    /// The bytes of a sequence of tokens.
    pub fn decode_bytes(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|&id| self.token_bytes(id)).collect()
    }

    /// The text of a sequence of tokens; what is not UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(ids)).into_owned()
    }

    /// One token to look at: bytes that are no whole character are written as `<0xE4>`.
    pub fn shown(&self, id: u32) -> String {
        let mut text = String::new();
        for chunk in self.token_bytes(id).utf8_chunks() {
            text += chunk.valid();
            text.extend(chunk.invalid().iter().map(|b| format!("<0x{b:02X}>")));
        }
        text
    }

    /// Whether a token is for control, not for text.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocab.class(id) == Class::Control
    }

    /// Whether a token ends an answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// The begin-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-text token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether prompts start with [`Tokenizer::bos`].
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }
}

#[cfg(test)]
mod tests;
