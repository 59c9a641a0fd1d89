//! Reproductions run to their end on tiny models; what they find there says nothing.
#![allow(clippy::unwrap_used, reason = "a test may")]

use antefix_conformance::tiny;
use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;
use antefix_papers::TRAINED_CLAIMS;

use super::*;

#[test]
fn every_claim_has_its_run() {
    let runs: Vec<&str> = RUNS.iter().map(|r| r.0).collect();
    let claims: Vec<&str> = TRAINED_CLAIMS.iter().map(|c| c.slug).collect();
    assert_eq!(runs, claims);
}

#[test]
fn they_run_to_their_end_and_fill_their_rows() {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let text: String = (0..60_000u32)
        .map(|i| char::from(b'a' + ((i * i / 7 + i) % 23) as u8))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let subject = Subject {
        model,
        tokenizer,
        name: "tiny".into(),
        sha256: String::new(),
    };
    let ground = Ground {
        model: Some(&subject),
        text: &[&text],
        folder: folder.path(),
    };
    for (slug, run) in RUNS.iter().filter(|r| r.0 != "aaren") {
        let found = run(&ground, Scale::Fast).unwrap_or_else(|e| panic!("{slug}: {e}"));
        assert!(found.measured.is_finite() && found.baseline.is_finite(), "{slug}");
        assert!(
            found.rows.len() > 2 && !found.judgement.why.contains("NaN"),
            "{found:?}"
        );
    }
    let none = Ground {
        model: None,
        text: &[],
        folder: folder.path(),
    };
    assert!(grouped::run(&none, Scale::Fast).is_err());
}
