//! Broken and hostile GGUF files: each gives an error that names what is wrong, none panics or allocates wildly.
use antefix_models::{
    error::LoadError,
    files::{ModelFiles, Role},
    gguf::{Gguf, GgufError},
    safetensors::check_header,
    spec::Arch,
    template::{ChatTemplate, Message},
    testing::{GgufBuilder, Meta, Rng, hostile, tiny_builder, tiny_gguf, tiny_spec},
    tokenizer::{Specials, Tokenizer},
};

const ARCHS: [Arch; 4] = [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3];

fn load(bytes: Vec<u8>) -> Result<ModelFiles, LoadError> {
    let path = "hostile.gguf";
    let gguf = Gguf::parse(bytes).map_err(|error| LoadError::Gguf {
        file: path.into(),
        error,
    })?;
    ModelFiles::from_gguf(gguf, path.as_ref())
}

/// Loading fails, and the message has all of `parts`.
#[track_caller]
fn refuses(bytes: Vec<u8>, parts: &[&str]) {
    let message = load(bytes).expect_err("this file should be refused").to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

fn small() -> GgufBuilder {
    GgufBuilder::default()
        .meta("a.number", Meta::U32(7))
        .meta("a.list", Meta::Strs(vec!["one".into(), "two".into()]))
        .tensor("x", &[32, 2], 8, vec![1; 68])
        .tensor("y", &[3], 0, vec![0; 12])
}

fn with_version(version: u32) -> GgufBuilder {
    let mut builder = small();
    builder.version = version;
    builder
}

/// Header with these counts and nothing else, padded with zeros.
fn header(tensors: u64, entries: u64) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(tensors.to_le_bytes());
    out.extend(entries.to_le_bytes());
    out.resize(4096, 0);
    out
}

#[test]
fn tiny_models_are_what_their_description_says() {
    for arch in ARCHS {
        let files = load(tiny_gguf(arch, 1)).unwrap();
        assert_eq!(*files.spec(), tiny_spec(arch));
        for role in Role::all(files.spec().layers) {
            assert_eq!(
                files.tensor(role).unwrap().is_some(),
                role.shape(files.spec()).is_some(),
                "{role:?}"
            );
        }
        assert_ne!(
            files.fingerprint(),
            load(tiny_gguf(arch, 2)).unwrap().fingerprint()
        );
        let tokens = files.gguf().unwrap().array("tokenizer.ggml.tokens").unwrap();
        assert_eq!(tokens.strs().unwrap().count(), files.spec().vocab);
    }
}

#[test]
fn a_small_file_reads_back() {
    let mut builder = small();
    builder.alignment = 64;
    let gguf = Gguf::parse(builder.build()).unwrap();
    assert_eq!(gguf.u64("a.number"), Some(7));
    let list: Vec<&[u8]> = gguf.array("a.list").unwrap().strs().unwrap().collect();
    assert_eq!(list, [b"one", b"two"]);
    let x = gguf.tensor("x").unwrap();
    assert_eq!(
        (x.dims(), x.ggml_type, x.bytes),
        (&[32, 2][..], 8, &[1u8; 68][..])
    );
    assert!(gguf.tensor("z").is_none() && gguf.get("a.numbe").is_none());
    assert_eq!(
        gguf.keys().collect::<Vec<_>>(),
        ["a.list", "a.number", "general.alignment"]
    );
}

#[test]
fn every_truncation_of_a_small_file_is_an_error() {
    let bytes = small().build();
    for len in 0..bytes.len() {
        let error = Gguf::parse(&bytes[..len]).expect_err("truncated");
        assert!(!error.to_string().is_empty());
    }
    Gguf::parse(bytes).unwrap();
}

#[test]
fn no_flipped_byte_panics() {
    // Every byte of a small file; then a spread over the headers of whole models, through the description as well.
    let bytes = small().build();
    for at in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut broken = bytes.clone();
            broken[at] ^= flip;
            if let Ok(gguf) = Gguf::parse(broken) {
                let _ = gguf.array("a.list").map(|a| a.iter().count());
                let _ = gguf.tensors().map(|t| t.bytes.len()).sum::<usize>();
            }
        }
    }
    let mut rng = Rng(3);
    for arch in ARCHS {
        let bytes = tiny_gguf(arch, 1);
        for _ in 0..300 {
            let mut broken = bytes.clone();
            for _ in 0..=(rng.bits() % 3) {
                let at = rng.bits() as usize % 12_000.min(broken.len());
                broken[at] = rng.bits() as u8;
            }
            let _ = load(broken);
        }
    }
}

#[test]
fn wrong_magic_and_versions() {
    refuses(b"GGML\x03\0\0\0".to_vec(), &["not a GGUF file", "hint:"]);
    for version in [0, 1, 4, 3u32.swap_bytes()] {
        refuses(with_version(version).build(), &["version", &version.to_string()]);
    }
    Gguf::parse(with_version(2).build()).unwrap();
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    for count in [1 << 60, u64::MAX, 1 << 32] {
        refuses(header(0, count), &["metadata count", &count.to_string()]);
        refuses(header(count, 0), &["tensor count", &count.to_string()]);
    }
    for kind in [0u32, 4, 8, 9, 12] {
        let mut array = kind.to_le_bytes().to_vec();
        array.extend((1u64 << 60).to_le_bytes());
        refuses(
            GgufBuilder::default().meta("k", Meta::Raw(9, array)).build(),
            &["array length"],
        );
    }
    let huge = (u64::MAX - 3).to_le_bytes().to_vec();
    refuses(
        GgufBuilder::default().meta("k", Meta::Raw(8, huge)).build(),
        &["truncated: string"],
    );
    let mut name = header(0, 1);
    name[24..32].copy_from_slice(&(1u64 << 40).to_le_bytes());
    refuses(name, &["metadata key", "1099511627776"]);
}

#[test]
fn deep_nesting_does_not_use_up_the_stack() {
    let mut bytes = Vec::new();
    for _ in 0..100_000 {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
    }
    refuses(
        GgufBuilder::default().meta("k", Meta::Raw(9, bytes)).build(),
        &["nested deeper"],
    );
}

#[test]
fn unknown_value_types() {
    refuses(
        GgufBuilder::default()
            .meta("k", Meta::Raw(13, vec![0; 8]))
            .build(),
        &["unknown value type 13"],
    );
    let mut array = u32::MAX.to_le_bytes().to_vec();
    array.extend(0u64.to_le_bytes());
    refuses(
        GgufBuilder::default().meta("k", Meta::Raw(9, array)).build(),
        &["unknown value type"],
    );
}

#[test]
fn alignment_has_to_be_a_power_of_two() {
    for wrong in [0, 3, 48, 1 << 20, u32::MAX] {
        let file = small().meta("general.alignment", Meta::U32(wrong)).build();
        refuses(file, &["general.alignment", &wrong.to_string()]);
    }
    refuses(
        small().meta("general.alignment", Meta::Str("32".into())).build(),
        &["general.alignment"],
    );
}

#[test]
fn tensors_have_to_lie_inside_the_file() {
    let far = |offset: u64| {
        let mut bytes = GgufBuilder::default().tensor("x", &[32], 0, vec![0; 128]).build();
        let at = bytes
            .iter()
            .rposition(|&b| b == 32)
            .expect("the dimension is there")
            + 8
            + 4;
        bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
        bytes
    };
    Gguf::parse(far(0)).unwrap();
    for offset in [32, 1 << 40, u64::MAX - 31] {
        refuses(far(offset), &["`x`", "outside the file"]);
    }
    refuses(far(8), &["`x`", "multiple of the alignment"]);
}

#[test]
fn sizes_that_overflow() {
    for dims in [&[1 << 40, 1 << 40][..], &[1 << 62, 1, 1, 4], &[1 << 63, 2]] {
        refuses(
            GgufBuilder::default().tensor("x", dims, 0, vec![]).build(),
            &["`x`", "64 bits"],
        );
    }
    refuses(
        GgufBuilder::default().tensor("x", &[1 << 60], 0, vec![]).build(),
        &["`x`", "outside"],
    );
    refuses(
        GgufBuilder::default().tensor("x", &[0, 5], 0, vec![]).build(),
        &["`x`", "empty dimension"],
    );
    refuses(
        GgufBuilder::default().tensor("x", &[], 0, vec![]).build(),
        &["`x`", "0 dimensions"],
    );
    refuses(
        GgufBuilder::default().tensor("x", &[1; 5], 0, vec![0; 4]).build(),
        &["`x`", "5 dimensions"],
    );
    refuses(
        GgufBuilder::default().tensor("x", &[33], 8, vec![0; 68]).build(),
        &["`x`", "multiples of 32"],
    );
    refuses(
        GgufBuilder::default().tensor("x", &[32], 4, vec![0; 68]).build(),
        &["`x`", "unknown type 4"],
    );
}

#[test]
fn duplicates_are_refused() {
    refuses(
        small().meta("a.number", Meta::U32(1)).build(),
        &["`a.number` is there twice"],
    );
    let error = Gguf::parse(small().tensor("x", &[1], 0, vec![0; 4]).build()).unwrap_err();
    assert_eq!(
        error,
        GgufError::Duplicate {
            what: "tensor",
            name: "x".into()
        }
    );
}

#[test]
fn names_have_to_be_text() {
    let mut bytes = small().build();
    let at = bytes.windows(8).position(|w| w == b"a.number").unwrap();
    bytes[at] = 0xff;
    refuses(bytes, &["not UTF-8"]);
}

#[test]
fn descriptions_that_cannot_be_computed_are_refused_by_name() {
    let b = || tiny_builder(Arch::Llama, 1);
    let u = Meta::U32;
    let set = |key: &str, value: Meta| b().replace(&format!("llama.{key}"), value).build();
    refuses(
        b().without("general.architecture").build(),
        &["general.architecture", "missing"],
    );
    let mamba = b()
        .replace("general.architecture", Meta::Str("mamba".into()))
        .build();
    refuses(mamba, &["`mamba`", "hint: supported are llama"]);
    refuses(set("expert_count", u(8)), &["mixture of experts", "hint:"]);
    refuses(
        set("rope.scaling.type", Meta::Str("yarn".into())),
        &["`yarn`", "hint:"],
    );
    refuses(set("block_count", u(0)), &["layers", "0"]);
    refuses(set("block_count", u(u32::MAX)), &["block_count"]);
    refuses(set("block_count", Meta::U64(u64::MAX)), &["block_count"]);
    refuses(
        set("block_count", Meta::F32(2.0)),
        &["llama.block_count", "not a size"],
    );
    refuses(set("block_count", u(3)), &["blk.2", "missing"]);
    refuses(set("block_count", u(1)), &["blk.1", "not supported"]);
    refuses(set("attention.head_count", u(0)), &["heads"]);
    refuses(set("attention.head_count_kv", u(0)), &["key/value heads"]);
    refuses(set("attention.head_count_kv", u(3)), &["multiple"]);
    refuses(set("attention.value_length", u(32)), &["value_length"]);
    refuses(
        set("embedding_length", u(128)),
        &["token_embd.weight", "64", "128"],
    );
    refuses(
        set("feed_forward_length", u(64)),
        &["blk.0.ffn_gate.weight", "[128, 64]", "[64, 64]"],
    );
    refuses(set("rope.freq_base", Meta::F32(f32::NAN)), &["RoPE base"]);
    refuses(set("rope.dimension_count", u(17)), &["RoPE dimensions"]);
    refuses(set("rope.dimension_count", u(32)), &["RoPE dimensions"]);
    // Positive, but frequencies divided by it are infinite.
    refuses(set("rope.scaling.factor", Meta::F32(1e-40)), &["RoPE scaling"]);
    refuses(set("rope.scaling.factor", Meta::F32(-2.0)), &["RoPE scaling"]);
    refuses(
        set("attention.layer_norm_rms_epsilon", Meta::F32(f32::INFINITY)),
        &["epsilon"],
    );
    refuses(set("context_length", u(0)), &["context"]);
    refuses(
        b().without("output_norm.weight").build(),
        &["output_norm.weight", "missing"],
    );
    let bias = b()
        .tensor("blk.1.attn_output.bias", &[64], 0, vec![0; 256])
        .build();
    refuses(bias, &["blk.1.attn_output.bias", "not supported"]);
    let odd = b()
        .without("blk.0.attn_q.weight")
        .tensor("blk.0.attn_q.weight", &[64, 64], 24, vec![0; 4096]);
    refuses(odd.build(), &["blk.0.attn_q.weight", "24", "supported are"]);
    let freqs = |n: usize| {
        b().tensor("rope_freqs.weight", &[n as u64], 0, 1f32.to_le_bytes().repeat(n))
            .build()
    };
    refuses(freqs(7), &["RoPE scaling"]);
    load(freqs(8)).unwrap();
    let tokens = Meta::Strs(vec![String::new(); 1000]);
    refuses(
        b().replace("tokenizer.ggml.tokens", tokens).build(),
        &["tokenizer.ggml.tokens", "1000"],
    );
}

/// An error message that says something, in one paragraph.
#[track_caller]
fn is_clear(name: &str, message: &str) {
    assert!((10..600).contains(&message.len()), "{name}: {message}");
    let lines: Vec<&str> = message.lines().collect();
    assert!(
        lines.len() <= 3 && !message.contains("panicked"),
        "{name}: {message}"
    );
}

#[test]
fn hostile_files_are_clear_errors() {
    for (name, bytes) in hostile::gguf() {
        assert!(bytes.len() <= 1 << 20, "{name}");
        is_clear(&name, &load(bytes).expect_err(&name).to_string());
    }
    for (name, bytes) in hostile::safetensors() {
        is_clear(&name, &check_header(&bytes).expect_err(&name));
    }
    for (name, bytes) in hostile::tables() {
        let files = load(bytes);
        let error = files.map_or_else(
            |error| error.to_string(),
            |files| Tokenizer::open(&files).err().expect(&name).to_string(),
        );
        is_clear(&name, &error);
    }
}

#[test]
fn hostile_folders_are_clear_errors() {
    let dir = std::env::temp_dir().join(format!("antefix-hostile-{}", std::process::id()));
    for (name, files) in hostile::folders() {
        std::fs::create_dir_all(&dir).unwrap();
        for (file, bytes) in files {
            std::fs::write(dir.join(file), bytes).unwrap();
        }
        let error = match ModelFiles::open(&dir) {
            Err(error) => error.to_string(),
            Ok(files) => Tokenizer::open(&files).err().expect(&name).to_string(),
        };
        is_clear(&name, &error);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn hostile_templates_are_clear_errors() {
    for (name, source) in hostile::templates() {
        let start = std::time::Instant::now();
        let source = String::from_utf8(source).unwrap();
        let messages = [Message::new("user", "hi")];
        let error = ChatTemplate::new(&source, "<s>", "</s>")
            .and_then(|t| t.render(&messages, None, true))
            .expect_err(&name);
        is_clear(&name, &error.to_string());
        assert!(start.elapsed().as_secs() < 20, "{name}: {:?}", start.elapsed());
    }
}

#[test]
fn large_tables_that_hold_together_are_read() {
    for (name, bytes) in hostile::large() {
        assert!(bytes.len() <= 1 << 20, "{name}");
        let tokenizer = Tokenizer::open(&load(bytes).expect(&name)).expect(&name);
        let ids = tokenizer.encode("aaaa", Specials::Parse);
        assert!(
            ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()),
            "{name}"
        );
    }
}

#[test]
fn every_truncation_of_a_model_is_an_error() {
    let bytes = tiny_gguf(Arch::Qwen3, 1);
    for len in (0..bytes.len())
        .step_by(bytes.len() / 300)
        .chain([bytes.len() - 1])
    {
        is_clear(
            "truncated",
            &load(bytes[..len].to_vec()).expect_err("truncated").to_string(),
        );
    }
}
