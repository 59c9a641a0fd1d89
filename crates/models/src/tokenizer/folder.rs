//! `tokenizer.json`: checked here, then run by the `tokenizers` crate.
//!
//! The crate believes its file: a padding of 2^60 tokens is allocated, replacements in a row grow a text without end, prefixes of
//! words panic. So it gets the model, the normalizer and the pre-tokenizer alone, once these have been looked at; special tokens
//! are found by our own code, as with GGUF files.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use super::TokenizerError;
use super::vocab::{Class, Vocab, unmap_bytes, unmap_table};
use crate::error::shown;

/// The largest `tokenizer.json` that is read: real ones have up to 40 MB.
const MAX_BYTES: u64 = 256 << 20;
/// The largest part of it, the model and the added tokens aside: real ones have up to 2 kB.
const MAX_PART: usize = 64 << 10;
/// Steps of a normalizer or pre-tokenizer: real ones have up to a dozen, and each walks the whole text.
const MAX_STEPS: usize = 64;
/// Regular expressions of one part, and the longest: each may take 10 MB once compiled.
const MAX_PATTERNS: usize = 6;
const MAX_PATTERN: usize = 2 << 10;
/// How many times longer all replacements together may make a text.
const MAX_GROWTH: usize = 64;
/// Ids that no token has, beside as many as there are tokens.
const MAX_HOLES: usize = 1 << 16;

type Inner = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

pub(super) struct Folder {
    inner: Inner,
}

pub(super) struct Parts {
    pub(super) folder: Folder,
    pub(super) vocab: Vocab,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) add_bos: bool,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// What decides whether a model can be run.
#[derive(Deserialize)]
struct ModelOutline {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    let len = std::fs::metadata(file)
        .map_err(|e| format!("cannot be read: {e}"))?
        .len();
    if len > MAX_BYTES {
        return Err(format!("has {len} bytes, at most {MAX_BYTES} are read"));
    }
    std::fs::read(file).map_err(|e| format!("cannot be read: {e}"))
}

pub(super) fn open(dir: &Path) -> Result<Parts, TokenizerError> {
    let file = dir.join("tokenizer.json");
    let parts = read(&file).and_then(|bytes| parse(&bytes, &dir.join("tokenizer_config.json")));
    parts.map_err(|what| TokenizerError::Json { file, what })
}

fn parse(bytes: &[u8], config: &Path) -> Result<Parts, String> {
    let json: Value =
        serde_json::from_slice(bytes).map_err(|e| format!("is no JSON: {}", shown(&e.to_string())))?;
    check_model(&part("model", &json["model"])?)?;
    let mut inner = Inner::new(part("model", &json["model"])?);
    if let Some(value) = steps("normalizer", &json)? {
        inner.with_normalizer(Some(part::<NormalizerWrapper>("normalizer", value)?));
    }
    if let Some(value) = steps("pre_tokenizer", &json)? {
        inner.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>("pre_tokenizer", value)?));
    }
    let first = small("post_processor", &json)?.and_then(first_special);
    let byte_level = small("decoder", &json)?.is_some_and(|value| value.to_string().contains("ByteLevel"));
    let added: Option<Vec<Added>> = part("added_tokens", &json["added_tokens"])?;
    let vocab = Tokens::new(&inner, added.unwrap_or_default())?.vocab(byte_level)?;

    let config: Value = read(config)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    let named = |key: &str| {
        let token = &config[key];
        let text = token.as_str().or_else(|| token["content"].as_str())?;
        vocab.find(text.as_bytes())
    };
    let (bos, eos) = (named("bos_token"), named("eos_token"));
    // Without a word on it: whether the post-processor puts it there.
    let add_bos = config["add_bos_token"]
        .as_bool()
        .unwrap_or_else(|| bos.is_some() && first.and_then(|text| vocab.find(text.as_bytes())) == bos);
    Ok(Parts {
        folder: Folder { inner },
        vocab,
        bos,
        eos,
        add_bos,
    })
}

fn part<'a, T: Deserialize<'a>>(name: &str, value: &'a Value) -> Result<T, String> {
    T::deserialize(value)
        .map_err(|e| format!("has a `{name}` that cannot be read: {}", shown(&e.to_string())))
}

/// A part that is there and small.
fn small<'a>(name: &str, json: &'a Value) -> Result<Option<&'a Value>, String> {
    let value = &json[name];
    let len = size(value);
    if len > MAX_PART {
        return Err(format!(
            "has a `{name}` of {len} values and characters, at most {MAX_PART} are possible"
        ));
    }
    Ok(Some(value).filter(|value| !value.is_null()))
}

/// Values and bytes of text.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => 1 + text.len(),
        Value::Array(items) => 1 + items.iter().map(size).sum::<usize>(),
        Value::Object(items) => {
            1 + items
                .iter()
                .map(|(key, item)| key.len() + size(item))
                .sum::<usize>()
        }
        _ => 1,
    }
}

fn check_model(model: &ModelOutline) -> Result<(), String> {
    // Files written before there was a type have none; they are BPE as well, or have no merges.
    if let Some(kind) = model.kind.as_deref().filter(|kind| *kind != "BPE") {
        let kind = shown(kind);
        return Err(format!(
            "has a model of type `{kind}`, which is not supported\nhint: supported is BPE"
        ));
    }
    let some = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if some(&model.continuing_subword_prefix) || some(&model.end_of_word_suffix) {
        return Err("has prefixes or suffixes of words, which are not supported".into());
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err("has a model with dropout, which gives a text other tokens each time".into());
    }
    Ok(())
}

/// A normalizer or pre-tokenizer, of which every step is known and bounded.
fn steps<'a>(name: &str, json: &'a Value) -> Result<Option<&'a Value>, String> {
    let Some(whole) = small(name, json)? else {
        return Ok(None);
    };
    let list = match name {
        "normalizer" => "normalizers",
        _ => "pretokenizers",
    };
    let one = std::slice::from_ref(whole);
    let steps = match whole["type"] == "Sequence" {
        true => whole[list].as_array().map_or(one, Vec::as_slice),
        false => one,
    };
    if steps.len() > MAX_STEPS {
        return Err(format!(
            "has a `{name}` of {} steps, at most {MAX_STEPS} are supported",
            steps.len()
        ));
    }
    let (mut patterns, mut growth) = (0, 1usize);
    for step in steps {
        let known = step["type"].as_str().is_some_and(|kind| is_known(name, kind));
        if !known {
            let kind = shown(&step["type"].to_string());
            return Err(format!(
                "has a `{name}` with a step of type {kind}, which is not supported"
            ));
        }
        let regex = step["pattern"]["Regex"].as_str();
        patterns += usize::from(regex.is_some());
        if patterns > MAX_PATTERNS || regex.is_some_and(|regex| regex.len() > MAX_PATTERN) {
            return Err(format!(
                "has a `{name}` with more than {MAX_PATTERNS} patterns, or one of more than {MAX_PATTERN} bytes"
            ));
        }
        // A pattern may match the empty string between all characters.
        let content = step["content"].as_str().map_or(0, str::len);
        let text = step["pattern"]["String"].as_str().map_or(0, str::len);
        growth = growth.saturating_mul(if text == 0 {
            content + 1
        } else {
            content.div_ceil(text).max(1)
        });
        if growth > MAX_GROWTH {
            return Err(format!(
                "has a `{name}` that may make a text more than {MAX_GROWTH} times longer"
            ));
        }
    }
    Ok(Some(whole))
}

/// The steps that tokenizers of supported models are made of.
fn is_known(name: &str, kind: &str) -> bool {
    match name {
        "normalizer" => matches!(
            kind,
            "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "Strip" | "StripAccents" | "Prepend" | "Replace"
        ),
        _ => matches!(
            kind,
            "ByteLevel" | "Split" | "Digits" | "Metaspace" | "Punctuation" | "Whitespace" | "WhitespaceSplit"
        ),
    }
}

/// The special token that a post-processor puts in front.
fn first_special(processor: &Value) -> Option<&str> {
    match processor["type"].as_str()? {
        "TemplateProcessing" => processor["single"][0]["SpecialToken"]["id"].as_str(),
        "Sequence" => processor["processors"].as_array()?.iter().find_map(first_special),
        "RobertaProcessing" | "BertProcessing" => processor["cls"][0].as_str(),
        _ => None,
    }
}

/// The text of every id.
struct Tokens {
    texts: Vec<Option<String>>,
    added: Vec<Added>,
}

impl Tokens {
    fn new(inner: &Inner, mut added: Vec<Added>) -> Result<Self, String> {
        let words = inner.get_model().get_vocab();
        // The model's own number of a token counts.
        for token in &mut added {
            token.id = words.get(&token.content).copied().unwrap_or(token.id);
        }
        let ids = words.values().copied().chain(added.iter().map(|token| token.id));
        let count = ids.max().map_or(0, |id| id as usize + 1);
        let tokens = words.len() + added.len();
        if count > tokens * 2 + MAX_HOLES {
            return Err(format!("has {tokens} tokens with ids up to {}", count - 1));
        }
        let mut texts = vec![None; count];
        for (text, id) in words {
            if texts[id as usize].replace(text).is_some() {
                return Err(format!("has two tokens with id {id}"));
            }
        }
        for token in &added {
            match &mut texts[token.id as usize] {
                Some(text) if *text != token.content => {
                    return Err(format!("has two tokens with id {}", token.id));
                }
                slot => *slot = Some(token.content.clone()),
            }
        }
        Ok(Self { texts, added })
    }

    fn vocab(self, byte_level: bool) -> Result<Vocab, String> {
        let mut classes = vec![Class::Normal; self.texts.len()];
        for token in &self.added {
            let class = if token.special {
                Class::Control
            } else {
                Class::UserDefined
            };
            classes[token.id as usize] = class;
        }
        let byte_ids: Vec<Option<u32>> = match byte_level {
            true => Vec::new(),
            false => byte_ids(&self.texts),
        };
        let unmap = unmap_table();
        let tokens = self.texts.into_iter().zip(classes).map(|(text, class)| {
            let text = text.unwrap_or_default();
            let bytes = match class {
                Class::Normal if byte_level => unmap_bytes(text.as_bytes(), &unmap),
                Class::Normal => Some(
                    hex_byte(&text).map_or_else(|| text.replace('\u{2581}', " ").into_bytes(), |b| vec![b]),
                ),
                // Runs of spaces, such as Gemma's, are written with their stand-ins; as in GGUF files they stand for spaces.
                Class::UserDefined if !byte_level => Some(text.replace('\u{2581}', " ").into_bytes()),
                _ => None,
            };
            (bytes.unwrap_or_else(|| text.into_bytes()), class)
        });
        let mut vocab = Vocab::new(tokens).ok_or("holds more than 4 GiB of text")?;
        for b in 0..=255u8 {
            let id = match byte_level {
                true => vocab.find(&[b]),
                false => byte_ids[b as usize],
            };
            vocab.set_byte(b, id);
        }
        Ok(vocab)
    }
}

/// The byte of a token such as `<0x0A>`.
fn hex_byte(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // The parser would take a sign as well.
    let digits = hex.bytes().all(|b| b.is_ascii_hexdigit());
    digits.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// The token of each byte.
fn byte_ids(texts: &[Option<String>]) -> Vec<Option<u32>> {
    let mut ids = vec![None; 256];
    for (id, text) in (0..).zip(texts) {
        let canonical = |b: &u8| text.as_deref() == Some(format!("<0x{b:02X}>").as_str());
        if let Some(b) = text.as_deref().and_then(hex_byte).filter(canonical) {
            ids[b as usize] = Some(id);
        }
    }
    ids
}

impl Folder {
    /// Special tokens are cut out by the caller, so that plain text never names one.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        if let Ok(encoding) = self.inner.encode_fast(text, false) {
            out.extend_from_slice(encoding.get_ids());
        }
    }
}
