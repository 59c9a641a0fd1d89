//! Token ids of the three real vocabularies against those of Hugging Face `tokenizers`.

use antefix_models::files::ModelFiles;
use antefix_models::tokenizer::{Specials, Tokenizer};
use std::path::Path;

/// Token ids of `transformers`, see tools/golden. Needs the real vocabularies.
#[test]
fn ids_equal_those_of_transformers() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokens");
    let Ok(strings) = std::fs::read_to_string(golden.join("strings.jsonl")) else {
        panic!("tests/golden/tokens/strings.jsonl is part of the repository");
    };
    let strings: Vec<String> = strings
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert!(strings.len() >= 5000);
    for alias in ["smollm2", "qwen2.5-coder-0.5b", "gemma3-270m"] {
        let Some(path) = antefix_models::testing::model(alias) else {
            eprintln!("{alias} is not on this machine: not compared (antefix models pull {alias})");
            continue;
        };
        let files = ModelFiles::open(&path).unwrap();
        let t = Tokenizer::open(&files).unwrap();
        let ids = std::fs::read_to_string(golden.join(format!("{alias}.jsonl"))).unwrap();
        let mut wrong = 0;
        for (text, ids) in strings.iter().zip(ids.lines()) {
            let want: Vec<u32> = serde_json::from_str(ids).unwrap();
            let got = t.encode(text, Specials::Parse);
            if got != want {
                wrong += 1;
                if wrong <= 10 {
                    eprintln!("{alias}: {text:?}\n  got  {got:?}\n  want {want:?}");
                }
            }
        }
        assert_eq!(wrong, 0, "{alias}: of {} strings", strings.len());
        eprintln!("{alias}: {} strings compared", strings.len());
    }
}
