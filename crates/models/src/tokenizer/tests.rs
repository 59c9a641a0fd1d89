use super::*;
use crate::spec::Arch;
use crate::testing::{Meta, tiny_builder};

fn tiny(arch: Arch) -> Tokenizer {
    let gguf = Gguf::parse(tiny_builder(arch, 1).build()).unwrap();
    Tokenizer::from_gguf(&gguf).unwrap()
}

#[test]
fn every_text_comes_back() {
    for arch in [Arch::Llama, Arch::Qwen2, Arch::Gemma3] {
        let t = tiny(arch);
        for text in ["", "Hello, world", "naïve 日本 🙂", "a\n\n  b\t", "1234"] {
            let ids = t.encode(text, Specials::Plain);
            assert_eq!(t.decode(&ids), text, "{arch:?}: {ids:?}");
        }
        let bytes = b"ab\xff\xfe\xe2\x82cd";
        assert_eq!(t.decode_bytes(&t.encode_bytes(bytes, Specials::Plain)), bytes);
    }
}

#[test]
fn streams_never_split_a_character() {
    let t = tiny(Arch::Qwen2);
    let text = "é🙂日x";
    let mut stream = StreamDecoder::new();
    let mut seen = String::new();
    for id in t.encode(text, Specials::Plain) {
        if let Some(piece) = stream.push(&t, id) {
            assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{piece:?}");
            seen += &piece;
        }
    }
    assert_eq!(seen + &stream.flush(), text);
    // A byte that starts nothing comes out at once, an unfinished character at the end.
    let mut stream = StreamDecoder::new();
    let ids = t.encode_bytes(b"\xffa\xe2\x82", Specials::Plain);
    let out: String = ids.iter().filter_map(|&id| stream.push(&t, id)).collect();
    assert_eq!((out.as_str(), stream.flush().as_str()), ("\u{fffd}a", "\u{fffd}"));
}

#[test]
fn parts_of_characters_are_shown_as_bytes() {
    let t = tiny(Arch::Qwen2);
    let shown = |text: &[u8]| -> String {
        let ids = t.encode_bytes(text, Specials::Plain);
        ids.iter().map(|&id| t.shown(id)).collect()
    };
    assert_eq!(shown("ab 1".as_bytes()), "ab 1");
    assert_eq!(shown(b"a\xff\xe2\x82"), "a<0xFF><0xE2><0x82>");
}

#[test]
fn control_tokens_are_text_unless_parsing_is_allowed() {
    let t = tiny(Arch::Qwen2);
    let control = (0..t.vocab_size() as u32).find(|&id| t.is_special(id)).unwrap();
    let name = t.decode(&[control]);
    assert_eq!(t.encode(&name, Specials::Parse), [control]);
    let plain = t.encode(&name, Specials::Plain);
    assert!(!plain.contains(&control) && t.decode(&plain) == name, "{plain:?}");
}

#[test]
fn broken_tables_are_errors() {
    let check = |key: &str, value: Meta, want: &str| {
        let gguf = Gguf::parse(tiny_builder(Arch::Qwen2, 1).replace(key, value).build()).unwrap();
        let error = Tokenizer::from_gguf(&gguf)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains(want), "{key}: {error:?}");
    };
    check("tokenizer.ggml.model", Meta::Str("wordpiece".into()), "wordpiece");
    check("tokenizer.ggml.pre", Meta::Str("martian".into()), "martian");
    check(
        "tokenizer.ggml.merges",
        Meta::Strs(vec!["nospace".into()]),
        "merge 0",
    );
    check("tokenizer.ggml.bos_token_id", Meta::U32(1 << 30), "vocabulary");
    check("tokenizer.ggml.tokens", Meta::Strs(vec![]), "empty");
}

#[test]
fn runs_of_spaces_in_a_folder_stand_for_spaces() {
    let mut json = crate::testing::hostile::tokenizer_json();
    json["decoder"] = serde_json::Value::Null;
    let run = serde_json::json!({"id": 5, "content": "\u{2581}\u{2581}"});
    json["added_tokens"].as_array_mut().unwrap().push(run);
    let dir = std::env::temp_dir().join(format!("antefix-runs-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::from_folder(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let ids = tokenizer.encode("a  b<s>", Specials::Parse);
    assert_eq!(ids, [0, 5, 1, 4]);
    assert_eq!(tokenizer.decode(&ids), "a  b<s>");
    // The name of a special token in plain text is text.
    assert!(!tokenizer.encode("<s>", Specials::Plain).contains(&4));
}
