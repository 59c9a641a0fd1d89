//! `tokenizer.json`, through the `tokenizers` crate.

use std::path::{Path, PathBuf};

use super::TokenizerError;
use super::vocab::{Class, Vocab, unmap_bytes, unmap_table};

/// The largest `tokenizer.json` that is read: real ones have up to 40 MB.
const MAX_BYTES: u64 = 256 << 20;

pub(super) struct Folder {
    inner: tokenizers::Tokenizer,
}

pub(super) struct Parts {
    pub(super) folder: Folder,
    pub(super) vocab: Vocab,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) add_bos: bool,
}

fn read(file: PathBuf) -> Result<Vec<u8>, TokenizerError> {
    let bad = |what: String| TokenizerError::Json {
        file: file.clone(),
        what,
    };
    let len = std::fs::metadata(&file)
        .map_err(|e| bad(format!("cannot be read: {e}")))?
        .len();
    if len > MAX_BYTES {
        return Err(bad(format!("has {len} bytes, at most {MAX_BYTES} are read")));
    }
    std::fs::read(&file).map_err(|e| bad(format!("cannot be read: {e}")))
}

pub(super) fn open(dir: &Path) -> Result<Parts, TokenizerError> {
    let file = dir.join("tokenizer.json");
    let bytes = read(file.clone())?;
    let bad = |what: String| TokenizerError::Json {
        file: file.clone(),
        what,
    };
    let json: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|e| bad(format!("is no JSON: {e}")))?;
    let inner =
        tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| bad(format!("is no tokenizer: {e}")))?;
    let byte_level = json["decoder"].to_string().contains("ByteLevel");
    let count = inner
        .get_vocab(true)
        .values()
        .copied()
        .max()
        .map_or(0, |id| id as usize + 1);
    if count > 4 << 20 {
        return Err(bad(format!("has token ids up to {count}")));
    }
    let added = inner.get_added_tokens_decoder();
    let unmap = unmap_table();
    let tokens = (0..count as u32).map(|id| {
        let text = inner.id_to_token(id).unwrap_or_default();
        match added.get(&id) {
            Some(token) if token.special => (text.into_bytes(), Class::Control),
            Some(_) => (text.into_bytes(), Class::UserDefined),
            None if byte_level => {
                let bytes = unmap_bytes(text.as_bytes(), &unmap);
                (bytes.unwrap_or_else(|| text.into_bytes()), Class::Normal)
            }
            None => {
                let hex = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
                let byte = hex.and_then(|h| u8::from_str_radix(h, 16).ok());
                let bytes = byte.map_or_else(|| text.replace('\u{2581}', " ").into_bytes(), |b| vec![b]);
                (bytes, Class::Normal)
            }
        }
    });
    let mut vocab = Vocab::new(tokens).ok_or_else(|| bad("holds more than 4 GiB of text".into()))?;
    for b in 0..=255u8 {
        let id = if byte_level {
            vocab.find(&[b])
        } else {
            inner.token_to_id(&format!("<0x{b:02X}>"))
        };
        vocab.set_byte(b, id);
    }
    let config: serde_json::Value = read(dir.join("tokenizer_config.json"))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    let named = |key: &str| {
        let token = &config[key];
        let text = token.as_str().or_else(|| token["content"].as_str())?;
        inner.token_to_id(text)
    };
    let (bos, eos) = (named("bos_token"), named("eos_token"));
    let add_bos = config["add_bos_token"].as_bool().unwrap_or_else(|| {
        // Without a word on it: whether the post-processor puts it there.
        let first = inner
            .encode("a", true)
            .ok()
            .and_then(|e| e.get_ids().first().copied());
        bos.is_some() && first == bos
    });
    Ok(Parts {
        folder: Folder { inner },
        vocab,
        bos,
        eos,
        add_bos,
    })
}

impl Folder {
    /// Special tokens are cut out by the caller, so that plain text never names one.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        if let Ok(encoding) = self.inner.encode_fast(text, false) {
            out.extend_from_slice(encoding.get_ids());
        }
    }
}
