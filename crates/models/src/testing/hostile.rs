//! Files that nobody should trust, up to 1 MiB each: seeds of the fuzzers, and what the tests of this crate and of the command
//! refuse. A finding of a fuzzer becomes a line here.

use serde_json::json;

use super::{GgufBuilder, Meta, safetensors_bytes, tiny_builder, tiny_config, tiny_gguf, tiny_tensors};
use crate::spec::Arch;

/// A name and a file.
pub type Named = (String, Vec<u8>);

/// Room for a file of almost 1 MiB.
const LARGE: usize = 1_000_000;

fn named<T: Into<Vec<u8>>, const N: usize>(files: [(&str, T); N]) -> Vec<Named> {
    files.map(|(name, bytes)| (name.to_owned(), bytes.into())).into()
}

/// GGUF files that are no models.
pub fn gguf() -> Vec<Named> {
    let b = GgufBuilder::default;
    let with = |key: &str, value: Meta| tiny_builder(Arch::Llama, 1).replace(key, value).build();
    let tensor = |dims: &[u64]| b().tensor("x", dims, 0, vec![0; 128]).build();
    let small = || b().meta("k", Meta::U32(7)).tensor("x", &[32], 0, vec![0; 128]);
    let at_offset = |offset: u64| {
        let mut bytes = small().build();
        let dim = bytes
            .iter()
            .rposition(|&byte| byte == 32)
            .expect("the dimension is there");
        bytes[dim + 12..dim + 20].copy_from_slice(&offset.to_le_bytes());
        bytes
    };
    let counts = |tensors: u64, entries: u64| {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(tensors.to_le_bytes());
        out.extend(entries.to_le_bytes());
        out.resize(256, 0);
        out
    };
    let array = |kind: u32, count: u64| {
        let value = Meta::Raw(9, [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat());
        b().meta("k", value).build()
    };
    let nest = |levels| {
        [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()]
            .concat()
            .repeat(levels)
    };
    let whole = tiny_gguf(Arch::Llama, 1);
    let keys = (0..50_000).fold(b(), |b, i| b.meta(&format!("{i:x}"), Meta::Raw(0, vec![0])));
    let tensors = (0..14_000).fold(b(), |b, i| b.tensor(&format!("{i:x}"), &[1], 0, vec![0; 4]));
    let one = |kind: u32, bytes: usize| {
        let mut value = kind.to_le_bytes().to_vec();
        value.extend(((bytes / 8) as u64).to_le_bytes());
        value.resize(12 + bytes, 0);
        with("llama.block_count", Meta::Raw(9, value))
    };
    let mut files = named([
        ("empty", Vec::new()),
        ("wrong-magic", [b"GGML", &whole[4..]].concat()),
        ("overflow-product", tensor(&[1 << 40, 1 << 40])),
        ("overflow-bytes", tensor(&[1 << 62, 1, 1, 1])),
        ("span-outside", at_offset(1 << 40)),
        ("span-overflow", at_offset(u64::MAX - 31)),
        ("zero-alignment", with("general.alignment", Meta::U32(0))),
        ("count-tensors", counts(1 << 60, 0)),
        ("count-metadata", counts(0, 1 << 60)),
        ("count-numbers", array(4, 1 << 60)),
        ("count-strings", array(8, 1 << 60)),
        ("count-arrays", array(9, 1 << 60)),
        (
            "string-2-60",
            b().meta("k", Meta::Raw(8, (1u64 << 60).to_le_bytes().into()))
                .build(),
        ),
        ("deep-nesting", b().meta("k", Meta::Raw(9, nest(80_000))).build()),
        ("many-keys", keys.build()),
        ("many-tensors", tensors.build()),
        ("numbers-for-a-size", one(10, 600_000)),
        ("strings-for-a-size", one(8, 600_000)),
        (
            "layers",
            with("llama.block_count", Meta::Raw(10, u64::MAX.to_le_bytes().into())),
        ),
        ("layers-1024", with("llama.block_count", Meta::U32(1024))),
        ("context-0", with("llama.context_length", Meta::U32(0))),
        (
            "long-name",
            with("general.architecture", Meta::Str("\u{1b}[2J\n".repeat(100_000))),
        ),
        (
            "long-tensor-name",
            b().tensor(&"\u{7}x".repeat(30_000), &[0], 0, vec![]).build(),
        ),
    ]);
    files.extend(
        [3, 24, 40, 100, 5_000, whole.len() / 2, whole.len() - 1]
            .map(|len| (format!("truncated-{len}"), whole[..len].to_vec())),
    );
    files
}

/// A safetensors file with this header.
fn safetensors_file(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.resize(out.len() + data, 0);
    out
}

/// Safetensors files that are none.
pub fn safetensors() -> Vec<Named> {
    let one = |dtype: &str, shape: &str, span: &str| {
        let header = format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{span}}}}}"#);
        safetensors_file(&header, 16)
    };
    let good = one("F32", "[4]", "[0,16]");
    let repeated = |open: &str, item: &str, close: &str| {
        let items = item.repeat((LARGE - open.len()) / item.len());
        safetensors_file(&format!("{open}{items}{close}"), 0)
    };
    named([
        ("empty", Vec::new()),
        ("truncated", good[..30].to_vec()),
        ("truncated-data", good[..good.len() - 1].to_vec()),
        ("length-2-60", [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat()),
        ("span-outside", one("F32", "[4]", "[16,32]")),
        ("span-backwards", one("F32", "[4]", "[16,0]")),
        ("span-overflow", one("U8", "[4]", "[18446744073709551612,0]")),
        (
            "overflow-product",
            one("F32", "[4611686018427387904,4]", "[0,16]"),
        ),
        ("unknown-type", one("F99", "[4]", "[0,16]")),
        ("no-json", safetensors_file("\u{0}\u{1}", 8)),
        ("deep-nesting", repeated("", "[", "")),
        ("deep-names", repeated("{\"x\":", "{\"x\":", "")),
        (
            "long-shape",
            repeated(
                r#"{"x":{"dtype":"F32","shape":["#,
                "1,",
                r#"1],"data_offsets":[0,9]}}"#,
            ),
        ),
        (
            "metadata",
            repeated(r#"{"__metadata__":{"#, r#""":"","#, r#""":""},"x":1}"#),
        ),
        ("wrong-magic", b"GGUFGGUFGGUFGGUF".to_vec()),
    ])
}

/// Files of a folder, by name, that is no model: a good one but for one file.
pub fn folders() -> Vec<(String, Vec<Named>)> {
    let arch = Arch::Llama;
    let with = folder_with;
    let config = |key: &str, value: serde_json::Value| {
        let mut config = tiny_config(arch);
        config[key] = value;
        config.to_string().into_bytes()
    };
    let mut cases = vec![
        with("config-nested", "config.json", b"[".repeat(LARGE)),
        with("config-objects", "config.json", b"{\"a\":".repeat(LARGE / 5)),
        with(
            "config-numbers",
            "config.json",
            [&b"["[..], &b"0,".repeat(LARGE / 2), b"0]"].concat(),
        ),
        with(
            "config-maps",
            "config.json",
            [&b"["[..], &b"{\"\":0},".repeat(LARGE / 7), b"0]"].concat(),
        ),
        with(
            "config-layers",
            "config.json",
            config("num_hidden_layers", json!(1u64 << 60)),
        ),
        with(
            "config-types",
            "config.json",
            config(
                "text_config",
                json!({"sliding_window": 9, "layer_types": vec![0; LARGE / 2]}),
            ),
        ),
        with(
            "config-name",
            "config.json",
            config("model_type", json!("\u{1b}[2J\n".repeat(LARGE / 20))),
        ),
        with("index-nested", "model.safetensors.index.json", b"[".repeat(LARGE)),
        with(
            "index-outside",
            "model.safetensors.index.json",
            br#"{"weight_map":{"x":"../x.safetensors"}}"#.to_vec(),
        ),
        with(
            "index-parts",
            "model.safetensors.index.json",
            {
                let map: serde_json::Map<_, _> = (0..20_000)
                    .map(|i| (i.to_string(), json!(format!("{i}.safetensors"))))
                    .collect();
                json!({ "weight_map": map })
            }
            .to_string()
            .into_bytes(),
        ),
    ];
    let files = safetensors().into_iter();
    cases.extend(files.map(|(name, bytes)| with(&format!("tensors-{name}"), "model.safetensors", bytes)));
    let files = tokenizer_jsons().into_iter();
    cases.extend(files.map(|(name, bytes)| with(&format!("tokenizer-{name}"), "tokenizer.json", bytes)));
    cases
}

/// Models in GGUF files whose tokenizer's tables do not hold together.
pub fn tables() -> Vec<Named> {
    let bpe = || tiny_builder(Arch::Llama, 1);
    let spm = || tiny_builder(Arch::Gemma3, 1);
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let strs = |texts: &[&str]| Meta::Strs(texts.iter().map(|text| (*text).to_owned()).collect());
    let with = |builder: GgufBuilder, name: &str, value: Meta| builder.replace(&key(name), value).build();
    let special = |text: String| {
        let tokens = Meta::Strs(vec![text, "a".into()]);
        with(
            spm().replace(&key("token_type"), Meta::I32s(vec![4, 1])),
            "tokens",
            tokens,
        )
    };
    named([
        ("no-tokens", with(bpe(), "tokens", strs(&[]))),
        ("no-table", bpe().without(&key("tokens")).build()),
        ("tokens-of-numbers", with(bpe(), "tokens", Meta::I32s(vec![1; 9]))),
        ("merge-of-nothing", with(bpe(), "merges", strs(&["a ~~~"]))),
        ("merge-without-space", with(bpe(), "merges", strs(&["aa"]))),
        ("merge-empty", with(bpe(), "merges", strs(&[""]))),
        (
            "merges-of-numbers",
            with(bpe(), "merges", Meta::I32s(vec![0; 200_000])),
        ),
        (
            "merges-empty",
            with(bpe(), "merges", Meta::Strs(vec![String::new(); 90_000])),
        ),
        ("scores-none", spm().without(&key("scores")).build()),
        ("scores-short", with(spm(), "scores", Meta::F32s(vec![0.0]))),
        (
            "scores-many",
            with(spm(), "scores", Meta::F32s(vec![f32::NAN; 200_000])),
        ),
        ("begin-outside", with(bpe(), "bos_token_id", Meta::U32(u32::MAX))),
        ("end-outside", with(bpe(), "eos_token_id", Meta::U64(1 << 60))),
        (
            "unknown-kind",
            with(bpe(), "model", Meta::Str("\n".repeat(500_000))),
        ),
        ("unknown-pre", with(bpe(), "pre", Meta::Str("x".repeat(500_000)))),
        ("long-special", special("\u{2581}".repeat(200_000))),
    ])
}

/// A `tokenizer.json` that is in order.
pub fn tokenizer_json() -> serde_json::Value {
    let vocab: serde_json::Map<_, _> = ["a", "b", "ab", "\u{120}a", "<s>"]
        .iter()
        .zip(0u32..)
        .map(|(text, id)| ((*text).to_owned(), id.into()))
        .collect();
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 4, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+|\\p{L}+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]},
    })
}

/// `tokenizer.json` files that are refused.
pub fn tokenizer_jsons() -> Vec<Named> {
    let with = |path: &str, value: serde_json::Value| {
        let mut json = tokenizer_json();
        *json.pointer_mut(path).expect("the path is there") = value;
        json.to_string()
    };
    let steps = |step: serde_json::Value, times: usize| json!({"type": "Sequence", "normalizers": vec![step.clone(); times], "pretokenizers": vec![step; times]});
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"});
    let between = json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "a".repeat(1000)});
    let split = |regex: &str| {
        json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
        "invert": false})
    };
    let added = |id: u32, content: &str| json!([{"id": id, "content": content, "special": true}]);
    let many: serde_json::Map<_, _> = (0..60_000u32).map(|i| (i.to_string(), 0.into())).collect();
    named([
        ("empty", String::new()),
        ("nothing", "{}".into()),
        ("truncated", tokenizer_json().to_string()[..200].into()),
        ("nested", "{\"a\":".repeat(LARGE / 5)),
        ("nested-model", format!("{{\"model\":{}", "[".repeat(LARGE))),
        ("nested-normalizer", with("/normalizer", json!("[".repeat(1000)))),
        ("numbers", format!("{{\"model\":[{}0]}}", "0,".repeat(LARGE / 2))),
        (
            "maps",
            format!("{{\"model\":[{}0]}}", "{\"\":0},".repeat(LARGE / 7)),
        ),
        ("vocab-numbers", with("/model/vocab", json!(vec![0; LARGE / 2]))),
        ("merges-numbers", with("/model/merges", json!(vec![0; LARGE / 2]))),
        ("merge-of-nothing", with("/model/merges", json!(["a ~"]))),
        ("ids-2-32", with("/model/vocab", json!({"a": u32::MAX}))),
        (
            "ids-far",
            with("/model/vocab", json!({"a": 0, "b": 1, "ab": 4_000_000})),
        ),
        ("ids-twice", with("/model/vocab", many.into())),
        ("added-far", with("/added_tokens", added(u32::MAX, "<x>"))),
        ("added-taken", with("/added_tokens", added(0, "<x>"))),
        ("added-long", with("/added_tokens", added(5, &"x".repeat(LARGE)))),
        ("unigram", with("/model/type", json!("Unigram"))),
        (
            "prefix",
            with(
                "/model",
                json!({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"], "continuing_subword_prefix": "##"}),
            ),
        ),
        (
            "dropout",
            with(
                "/model",
                json!({"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}),
            ),
        ),
        (
            "precompiled",
            with(
                "/normalizer",
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            ),
        ),
        ("growth", with("/normalizer", steps(replace, 30))),
        ("growth-between", with("/normalizer", between)),
        (
            "large-normalizer",
            with("/normalizer", steps(json!({"type": "NFC"}), 30_000)),
        ),
        (
            "many-steps",
            with("/normalizer", steps(json!({"type": "NFC"}), 65)),
        ),
        (
            "no-step",
            with("/pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
        ),
        ("patterns", with("/pre_tokenizer", steps(split("\\w{500}"), 100))),
        (
            "large-pattern",
            with("/pre_tokenizer", split("(((\\w{99}){99}){99}){99}")),
        ),
        (
            "long-pattern",
            with("/pre_tokenizer", split(&"(a|".repeat(20_000))),
        ),
        ("wrong-pattern", with("/pre_tokenizer", split("(("))),
        (
            "post-processor",
            with("/post_processor", json!(vec![0; LARGE / 2])),
        ),
    ])
}

/// Chat templates that end in an error.
pub fn templates() -> Vec<Named> {
    let loops = |inner: &str, times: usize, then: &str| {
        format!(
            "{{% set ns = namespace(x='ab') %}}{{% for i in range({times}) %}}{{% set ns.x = {inner} %}}{{% endfor %}}{then}"
        )
    };
    let shared = |then: &str| loops("[ns.x, ns.x]", 60, then);
    named([
        ("syntax", "{% if %}".to_owned()),
        ("long", "{{ a }}".repeat(100_000)),
        ("nested", "[".repeat(LARGE / 2)),
        ("nested-expression", format!("{{{{ {}", "(".repeat(60_000))),
        ("nested-lists", format!("{{{{ {}", "[".repeat(60_000))),
        ("nested-blocks", "{% if a %}".repeat(6_000)),
        (
            "nested-not",
            format!("{{{{ {}raise_exception('x') }}}}", "not ".repeat(15_000)),
        ),
        (
            "nested-power",
            format!("{{{{ {}raise_exception('x') }}}}", "1**".repeat(20_000)),
        ),
        (
            "nested-minus",
            format!("{{{{ {}raise_exception('x') }}}}", "-".repeat(60_000)),
        ),
        ("nested-filters", format!("{{{{ a{} }}}}", "|f".repeat(30_000))),
        ("nested-attributes", format!("{{{{ a{} }}}}", ".a".repeat(30_000))),
        ("nested-sums", format!("{{{{ a{} }}}}", "+a".repeat(30_000))),
        ("nested-calls", format!("{{{{ a{} }}}}", "()".repeat(30_000))),
        ("refused", "{{ raise_exception('no') }}".into()),
        ("power", "{{ 'x' * 10 ** 9 }}".into()),
        (
            "endless",
            "{% for i in range(100000) %}{% for j in range(100000) %}{{ i }}{% endfor %}{% endfor %}".into(),
        ),
        (
            "range",
            "{% for i in range(10 ** 18) %}{{ i }}{% endfor %}".into(),
        ),
        ("list", "{{ range(10 ** 18) | list | length }}".into()),
        ("doubling", loops("ns.x ~ ns.x", 60, "{{ ns.x | length }}")),
        ("shared-json", shared("{{ ns.x | tojson }}")),
        ("shared-join", shared("{{ ','.join(ns.x) }}")),
        ("shared-text", shared("{{ ns.x }}")),
        ("deep", loops("[[[[ns.x]]]]", 90_000, "")),
        ("deep-text", loops("[[[[ns.x]]]]", 9_000, "{{ ns.x | tojson }}")),
        (
            "macros",
            "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}".into(),
        ),
        ("include", "{% include 'chat' %}{% include 'chat' %}".into()),
        ("width", "{{ '{:>9999999999}'.format(1) }}".into()),
        (
            "replace",
            "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}".into(),
        ),
        ("batch", "{{ [1] | batch(9999999999, 0) | list }}".into()),
    ])
}

/// Models that are in order, with tables as large as 1 MiB allows: they may take memory, but not more than their share.
pub fn large() -> Vec<Named> {
    // Texts whose prefixes differ early, so that an automaton shares nothing.
    let spread = |i: u32| {
        let seed = i.wrapping_mul(0x9e37_79b1).to_le_bytes();
        let text = (0..127).map(|at: usize| char::from(b'A' + seed[at % 4].rotate_left(at as u32 / 4) % 50));
        text.collect::<String>()
    };
    let model = |tokens: Vec<String>, kind: i32| {
        let count = tokens.len();
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        tiny_builder(Arch::Llama, 1)
            .without(&key("merges"))
            .replace(&key("model"), Meta::Str("llama".into()))
            .replace(&key("tokens"), Meta::Strs(tokens))
            .replace(&key("token_type"), Meta::I32s(vec![kind; count]))
            .replace(&key("scores"), Meta::F32s(vec![0.0; count]))
            .without("token_embd.weight")
            .tensor("token_embd.weight", &[64, count as u64], 8, vec![0; count * 68])
            .build()
    };
    named([
        ("special-tokens", model((0..2_000).map(spread).collect(), 4)),
        ("100-special-tokens", model((0..100).map(spread).collect(), 4)),
        (
            "short-special-tokens",
            model((0..7_000).map(|i| format!("{i:x}")).collect(), 3),
        ),
        ("equal-tokens", model(vec!["a".into(); 7_000], 1)),
    ])
}

/// The same for folders.
pub fn large_folders() -> Vec<(String, Vec<Named>)> {
    let words = |from: u32, to: u32| (from..to).map(|id| (format!("{id:x}"), id));
    let mut vocab = tokenizer_json();
    vocab["model"]["vocab"]
        .as_object_mut()
        .expect("a map")
        .extend(words(5, 60_000).map(|(text, id)| (text, json!(id))));
    let mut merges = tokenizer_json();
    merges["model"]["merges"] = json!(vec!["a b"; LARGE / 6]);
    let mut pairs = tokenizer_json();
    pairs["model"]["merges"] = json!(vec![["a", "b"]; LARGE / 10]);
    let mut added = tokenizer_json();
    let tokens: Vec<_> = words(5, 12_000)
        .map(|(content, id)| json!({"id": id, "content": content}))
        .collect();
    added["added_tokens"] = tokens.into();
    let patterns = r"\w{30}|\p{L}{30}";
    let split =
        json!({"type": "Split", "pattern": {"Regex": patterns}, "behavior": "Isolated", "invert": false});
    let mut regex = tokenizer_json();
    regex["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": vec![split; 6]});
    let cases = [
        ("vocab", vocab),
        ("merges", merges),
        ("pairs", pairs),
        ("added", added),
        ("patterns", regex),
    ];
    cases
        .map(|(name, json)| folder_with(name, "tokenizer.json", json.to_string().into_bytes()))
        .into()
}

/// A good folder but for one file.
fn folder_with(case: &str, file: &str, bytes: Vec<u8>) -> (String, Vec<Named>) {
    let arch = Arch::Llama;
    let tensors = tiny_tensors(arch, 1);
    let mut files = named([
        ("config.json", tiny_config(arch).to_string().into_bytes()),
        ("model.safetensors", safetensors_bytes(&tensors, true)),
        ("tokenizer.json", tokenizer_json().to_string().into_bytes()),
    ]);
    files.retain(|(name, _)| name != file);
    files.push((file.to_owned(), bytes));
    (case.to_owned(), files)
}
