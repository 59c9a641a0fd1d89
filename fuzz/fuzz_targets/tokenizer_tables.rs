//! Any vocabulary tables, as GGUF metadata or as `tokenizer.json`: an error, or a tokenizer that keeps its promises.
//!
//! The input is a GGUF file, a `tokenizer.json` (behind a zero byte its `tokenizer_config.json`), or else what the tables in a
//! valid GGUF file are made of.
#![no_main]

use std::{fs, path::PathBuf, sync::OnceLock};

use antefix_models::{
    gguf::Gguf,
    testing::{GgufBuilder, Meta},
    tokenizer::{Specials, StreamDecoder, Tokenizer},
};
use libfuzzer_sys::{
    arbitrary::{self, Arbitrary, Unstructured},
    fuzz_target,
};

#[derive(Debug, Arbitrary)]
struct Tables<'a> {
    /// Which kind of tokenizer, and which pre-tokenizer.
    kind: u8,
    /// Bytes that get a token, as bits; without them most texts have no tokens.
    all_bytes: bool,
    types: Vec<u8>,
    scores: Vec<f32>,
    merges: Vec<(u8, u8)>,
    raw_merges: Vec<&'a str>,
    ids: [Option<u32>; 3],
    flags: [Option<bool>; 2],
    tokens: Vec<&'a str>,
    ask: Vec<u32>,
    text: &'a [u8],
}

fn tables_file(tables: &Tables<'_>) -> Vec<u8> {
    let byte_level = tables.kind % 8 != 0;
    let pre = ["default", "gpt-2", "smollm", "qwen2", "llama-bpe", "llama3", ""][usize::from(tables.kind) / 8 % 7];
    let mut tokens: Vec<String> = tables.tokens.iter().map(|t| (*t).to_owned()).collect();
    let mut types: Vec<i32> = tables.types.iter().map(|t| i32::from(t % 8)).collect();
    let first = tokens.len();
    if tables.all_bytes {
        // A character for each byte, as in byte-level vocabularies, or hexadecimal ones.
        types.resize(first, 1);
        let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let mut next = 0x100;
        for b in 0..=255u8 {
            if byte_level && printable(b) {
                tokens.push(char::from(b).to_string());
            } else if byte_level {
                tokens.extend(char::from_u32(next).map(String::from));
                next += 1;
            } else {
                tokens.push(format!("<0x{b:02X}>"));
            }
            types.push(if byte_level { 1 } else { 6 });
        }
    }
    let mut merges: Vec<String> = tables.raw_merges.iter().map(|m| (*m).to_owned()).collect();
    for &(l, r) in &tables.merges {
        if tokens.is_empty() {
            break;
        }
        let side = |i: u8| tokens[usize::from(i) * 7919 % tokens.len()].clone();
        let (l, r) = (side(l), side(r));
        tokens.push(format!("{l}{r}"));
        merges.push(format!("{l} {r}"));
    }
    let mut scores = tables.scores.clone();
    if tables.kind & 0x80 == 0 {
        scores.resize(tokens.len(), -1.0);
    }
    let mut out = GgufBuilder::default()
        .meta("tokenizer.ggml.model", Meta::Str(if byte_level { "gpt2" } else { "llama" }.into()))
        .meta("tokenizer.ggml.pre", Meta::Str(pre.into()))
        .meta("tokenizer.ggml.tokens", Meta::Strs(tokens))
        .meta("tokenizer.ggml.token_type", Meta::I32s(types))
        .meta("tokenizer.ggml.merges", Meta::Strs(merges))
        .meta("tokenizer.ggml.scores", Meta::F32s(scores));
    for (name, id) in ["bos", "eos", "eot"].into_iter().zip(tables.ids) {
        if let Some(id) = id {
            out = out.meta(&format!("tokenizer.ggml.{name}_token_id"), Meta::U32(id % 1024));
        }
    }
    for (name, flag) in ["add_bos_token", "add_space_prefix"].into_iter().zip(tables.flags) {
        if let Some(flag) = flag {
            out = out.meta(&format!("tokenizer.ggml.{name}"), Meta::Bool(flag));
        }
    }
    out.build()
}

/// A folder of this process, in memory where there is such a place.
fn folder(tokenizer: &[u8], config: &[u8]) -> Option<Tokenizer> {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let shm = PathBuf::from("/dev/shm");
        let base = if shm.is_dir() { shm } else { std::env::temp_dir() };
        let dir = base.join(format!("antefix-fuzz-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder for the inputs");
        dir
    });
    fs::write(dir.join("tokenizer.json"), tokenizer).expect("written");
    fs::write(dir.join("tokenizer_config.json"), config).expect("written");
    Tokenizer::from_folder(dir).ok()
}

/// What the API promises of every tokenizer.
fn check(tokenizer: &Tokenizer, text: &[u8], ask: &[u32]) {
    let size = tokenizer.vocab_size();
    let lossy = String::from_utf8_lossy(text);
    for specials in [Specials::Plain, Specials::Parse] {
        for ids in [tokenizer.encode(&lossy, specials), tokenizer.encode_bytes(text, specials)] {
            assert!(ids.iter().all(|&id| (id as usize) < size), "ids are of the vocabulary");
            let pieces: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
            assert_eq!(pieces, tokenizer.decode_bytes(&ids));
            assert_eq!(String::from_utf8_lossy(&pieces), tokenizer.decode(&ids));
        }
    }
    if std::str::from_utf8(text).is_ok() {
        let ids = tokenizer.encode(&lossy, Specials::Parse);
        assert_eq!(ids, tokenizer.encode_bytes(text, Specials::Parse), "valid text is text either way");
    }
    tokenizer.encode_prompt(&lossy);
    // A stream says what decoding at once says of the same tokens, control tokens left out.
    let ids: Vec<u32> = tokenizer.encode_bytes(text, Specials::Parse).into_iter().chain(ask.iter().copied()).collect();
    let shown: Vec<u32> = ids.iter().copied().filter(|&id| !tokenizer.is_special(id)).collect();
    let mut stream = StreamDecoder::new();
    let mut seen: String = ids.iter().filter_map(|&id| stream.push(tokenizer, id)).collect();
    seen += &stream.flush();
    assert_eq!(seen, tokenizer.decode(&shown));
    for id in tokenizer.bos().into_iter().chain(tokenizer.eos()) {
        assert!((id as usize) < size);
        tokenizer.is_end(id);
    }
}

/// Where the tables have a token for every byte and nothing else can match, text comes back as it was.
fn round_trip(tables: &Tables<'_>, tokenizer: &Tokenizer) {
    let plain = tables.tokens.is_empty() && tables.raw_merges.is_empty() && tables.all_bytes;
    // SentencePiece may put a space in front; NFC (qwen2) changes text.
    if plain && tables.kind % 8 != 0 && tables.kind / 8 % 7 != 3 && !tables.types.iter().any(|t| *t != 1) {
        let ids = tokenizer.encode_bytes(tables.text, Specials::Plain);
        assert_eq!(tokenizer.decode_bytes(&ids), tables.text);
    }
}

const TEXT: &[u8] = "Hello,  world\n\n 12345 don't \u{e9}\u{301}日本🙂 <|im_end|>\t<s>\u{2581}x".as_bytes();

fuzz_target!(|bytes: &[u8]| {
    if bytes.starts_with(b"GGUF") {
        let tokenizer = Gguf::parse(bytes).ok().and_then(|gguf| Tokenizer::from_gguf(&gguf).ok());
        if let Some(tokenizer) = tokenizer {
            check(&tokenizer, TEXT, &[0, 1, u32::MAX]);
        }
    } else if bytes.starts_with(b"{") {
        let cut = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        if let Some(tokenizer) = folder(&bytes[..cut], &bytes[(cut + 1).min(bytes.len())..]) {
            check(&tokenizer, TEXT, &[0, 1, u32::MAX]);
        }
    } else if let Ok(tables) = Tables::arbitrary_take_rest(Unstructured::new(bytes)) {
        let gguf = Gguf::parse(tables_file(&tables)).expect("the builder writes valid files");
        if let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) {
            check(&tokenizer, tables.text, &tables.ask);
            round_trip(&tables, &tokenizer);
        }
    }
});
