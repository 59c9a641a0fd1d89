//! The three models used during development, if they are there.
use std::path::PathBuf;

use antefix_models::files::{ModelFiles, Role};

fn model(name: &str) -> Option<PathBuf> {
    let dirs = [
        std::env::var_os("ANTEFIX_TEST_MODELS").map(PathBuf::from),
        Some(PathBuf::from("/tmp/models")),
    ];
    let found = dirs
        .into_iter()
        .flatten()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: no {name} in ANTEFIX_TEST_MODELS or /tmp/models");
    }
    found
}

#[test]
fn published_files_open_and_are_what_their_cards_say() {
    // (file, layers, d_model, Hq, Hk, D, vocab, tied)
    let mut prints = Vec::new();
    let cases = [
        ("smollm2-135m-q4_1.gguf", 30, 576, 9, 3, 64, 49_152, true),
        (
            "qwen2.5-coder-0.5b-q4_k_m.gguf",
            24,
            896,
            14,
            2,
            64,
            151_936,
            false,
        ),
        ("gemma-3-270m-q4_k_m.gguf", 18, 640, 4, 1, 256, 262_144, true),
    ];
    for (name, layers, d_model, heads, kv_heads, head_dim, vocab, tied) in cases {
        let Some(path) = model(name) else { continue };
        let files = ModelFiles::open(&path).unwrap();
        let s = files.spec();
        let got = (
            s.layers, s.d_model, s.heads, s.kv_heads, s.head_dim, s.vocab, s.tied,
        );
        assert_eq!(
            got,
            (layers, d_model, heads, kv_heads, head_dim, vocab, tied),
            "{name}"
        );
        let bytes: usize = Role::all(layers)
            .filter_map(|role| files.tensor(role).unwrap())
            .map(|t| t.bytes.len())
            .sum();
        let len = files.gguf().unwrap().file_len();
        assert!(
            bytes < len && bytes > len * 9 / 10,
            "{name}: {bytes} of {len} bytes are tensors"
        );
        let print = files.fingerprint();
        files.drop_pages();
        assert_eq!(files.fingerprint(), print, "{name}: pages come back as they were");
        prints.push(print);
    }
    let n = prints.len();
    prints.sort_unstable();
    prints.dedup();
    assert_eq!(prints.len(), n, "different models, different fingerprints");
}

#[test]
fn gemma_has_one_global_layer_in_six() {
    let Some(path) = model("gemma-3-270m-q4_k_m.gguf") else {
        return;
    };
    let files = ModelFiles::open(&path).unwrap();
    let s = files.spec();
    let global: Vec<usize> = (0..18).filter(|&l| s.layer_kinds[l].window.is_none()).collect();
    assert_eq!(global, [5, 11, 17]);
    assert_eq!(s.layer_kinds[0].window, Some(512));
    assert_eq!(
        (
            s.ropes[s.layer_kinds[5].rope].base,
            s.ropes[s.layer_kinds[0].rope].base
        ),
        (1e6, 1e4)
    );
}
