use antefix_conformance::tiny;
use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;
use antefix_papers::repro::{Claim, HeadSearch, Judgement, Lab, Quiz};
use antefix_papers::{REPROS, claims};
use serde_json::json;

use super::*;
use crate::heads::Subject;
use crate::tasks::Prose;

fn bench() -> Bench {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let subject = Subject {
        model,
        tokenizer,
        name: "tiny-random".into(),
        sha256: String::new(),
    };
    Bench::new(subject, Prose::Generated)
}

fn made(run: fn(&mut dyn Lab, Scale) -> Result<Outcome, LabError>) -> Repro {
    Repro {
        claim: Claim {
            slug: "made",
            says: "It is so.",
            source: "Here.",
            rule: "By looking.",
            model: "smollm2",
            fast_model: "smollm2",
        },
        run,
    }
}

#[test]
fn a_line_has_the_keys_of_the_interface() {
    let repro = made(|_, _| {
        Ok(Outcome {
            unit: "share",
            measured: 0.5,
            baseline: 0.25,
            scale: "one".into(),
            judgement: Judgement {
                verdict: Verdict::Partly,
                why: "half".into(),
            },
            rows: vec![json!({"a": 1})],
        })
    });
    let (line, rows) = reproduce(&repro, &mut bench(), Scale::Fast, "here").unwrap();
    let line = serde_json::to_string(&line).unwrap();
    let start = r#"{"slug":"made","claim":"It is so. (Here)","measured":0.5,"baseline":0.25,"verdict":"partly","why":"half; short run","#;
    assert!(line.starts_with(start), "{line}");
    assert_eq!(rows, [json!({"a": 1})]);
}

#[test]
fn a_model_that_cannot_is_no_failure_and_a_failure_is_one() {
    let cannot = made(|_, _| Err(LabError::Model("it does not answer".into())));
    let (line, _) = reproduce(&cannot, &mut bench(), Scale::Full, "here").unwrap();
    assert_eq!((line.verdict.as_str(), line.measured), ("not", None));
    assert!(line.why.contains("it does not answer"));
    let broken = made(|_, _| Err(LabError::Failed("no room".into())));
    assert!(reproduce(&broken, &mut bench(), Scale::Full, "here").is_err());
}

/// A random model answers nothing: only speed and distance can be judged.
const JUDGED: [&str; 7] = [
    "ape",
    "cacheblend",
    "dhsa",
    "flexprefill",
    "hip_attention",
    "hydragen",
    "jrt",
];

#[test]
fn every_reproduction_comes_to_a_verdict_on_a_random_model() {
    let mut bench = bench();
    for repro in REPROS {
        let (line, rows) = reproduce(repro, &mut bench, Scale::Fast, "here").unwrap();
        assert!(["reproduced", "partly", "not"].contains(&line.verdict.as_str()));
        assert!(!line.why.is_empty() && line.model == "tiny-random", "{line:?}");
        let judged = JUDGED.contains(&repro.claim.slug);
        assert_eq!(line.measured.is_none(), rows.is_empty(), "{line:?}");
        assert!(!judged || line.measured.is_some(), "{line:?}");
    }
}

#[test]
fn dense_believes_what_dense_believes() {
    let mut bench = bench();
    let quiz = Quiz {
        task: "needle",
        length: 300,
        depths: &[0.0, 1.0],
        samples: 1,
        digits: 3,
        seed: 2,
        question_after_cut: false,
        reuse_prompts: false,
    };
    let ways: [&[&str]; 2] = [&[], &["streaming_llm,sinks=4,budget=36"]];
    let found = bench.beliefs(&quiz, &ways).unwrap();
    assert_eq!((found.len(), found[0].len(), found[1].len()), (2, 2, 2));
    for (dense, cut) in found[0].iter().zip(&found[1]) {
        assert_eq!((dense.kl, dense.top1, dense.kept), (0.0, 1.0, 1.0));
        assert!(cut.kl > 0.0 && cut.kept < 0.5 && cut.log_p < 0.0, "{cut:?}");
    }
    let recalls = bench.recall(&quiz, &ways).unwrap();
    assert_eq!((recalls[0].n, recalls[0].kept), (2, 1.0));
    assert!(recalls[1].kept < 0.5);
}

#[test]
fn prompts_are_computed_densely_and_under_planners_within_the_context() {
    let mut bench = bench();
    let (all, some) = ("hip_attention,top_k=1048576", "a_shape,block=32,window=32");
    let found = bench.prefill(200, 2, &[&[all], &[some]]).unwrap();
    assert_eq!(
        found.iter().map(|p| &p.method).collect::<Vec<_>>(),
        ["dense", all, some]
    );
    for same in &found[..2] {
        assert_eq!(
            (same.length, same.density, same.kl, same.top1),
            (200, 1.0, 0.0, 1.0)
        );
        assert!((same.recall - 1.0).abs() < 1e-6, "{same:?}");
    }
    assert!(
        found[2].density < 0.7 && found[2].recall < 1.0 && found[2].kl > 0.0,
        "{found:?}"
    );
    let mut refused = |length, way: &[&str]| bench.prefill(length, 1, &[way]).unwrap_err();
    assert!(matches!(refused(1 << 20, &["a_shape"]), LabError::Model(_)));
    assert!(refused(200, &["quest"]).to_string().contains("`quest`"));
    assert!(refused(200, &[]).to_string().contains("dense"));
}

#[test]
fn tokens_are_drawn_densely_and_under_planners_for_every_batch() {
    let mut bench = bench();
    let (all, some) = (
        "quest,least=1048576",
        "a_shape_decode,least=32,share=0.01,dense_layers=0",
    );
    let found = bench.drawn(300, 4, &[1, 2], &[&[all], &[some]]).unwrap();
    let names: Vec<_> = found.iter().map(|d| (d.method.as_str(), d.batch)).collect();
    let ways = ["dense", all, some];
    assert_eq!(names, [ways.map(|w| (w, 1)), ways.map(|w| (w, 2))].concat());
    for same in [&found[0], &found[1], &found[4]] {
        assert_eq!((same.density, same.kl, same.top1), (1.0, 0.0, 1.0));
        assert!(same.length <= 300 - 4 && same.length > 200, "{same:?}");
    }
    assert!(found[2].density < 0.5 && found[2].kl > 0.0, "{found:?}");
    assert!(matches!(
        bench.drawn(1 << 20, 4, &[1], &[]),
        Err(LabError::Model(_))
    ));
    assert!(bench.drawn(300, 4, &[1], &[&["a_shape"]]).is_err());
}

#[test]
fn what_heads_do_is_measured_once_and_kept_for_methods() {
    let mut bench = bench();
    let search = |kind| HeadSearch {
        kind,
        runs: 1,
        lengths: &[32],
        seed: 1,
    };
    let first = bench.heads(&search("induction")).unwrap();
    assert_eq!(first, bench.heads(&search("induction")).unwrap());
    bench.heads(&search("echo")).unwrap();
    let quiz = Quiz {
        task: "needle",
        length: 300,
        depths: &[0.5],
        samples: 1,
        digits: 3,
        seed: 2,
        question_after_cut: true,
        reuse_prompts: false,
    };
    let razor = "razor_attention,buffer=32,fraction=0,profile=repro";
    assert!(bench.recall(&quiz, &[&[razor]]).unwrap()[0].kept < 1.0);
    let folder = bench.folder().to_path_buf();
    assert!(folder.is_dir());
    drop(bench);
    assert!(!folder.exists());
}

#[test]
fn the_page_has_every_claim_and_the_last_figures() {
    let line = |model: &str, measured: f64| Line {
        slug: "hydragen".into(),
        claim: "c".into(),
        measured: Some(measured),
        baseline: None,
        verdict: "not".into(),
        why: "so".into(),
        unit: "things".into(),
        scale: "one".into(),
        fast: true,
        model: model.into(),
        machine: "here".into(),
        seconds: 1.0,
    };
    let mut lines = vec![line("b", 1.0)];
    replace(&mut lines, line("a", 2.0));
    replace(&mut lines, line("b", 0.012_345));
    assert_eq!(lines, [line("a", 2.0), line("b", 0.012_345)]);
    let text: String = lines
        .iter()
        .map(|l| serde_json::to_string(l).unwrap() + "\n")
        .collect();
    assert_eq!(read(&text).unwrap(), lines);
    assert!(read("{}\n").unwrap_err().starts_with("line 1"));
    let page = page(&claims(), &lines);
    assert!(
        claims()
            .iter()
            .all(|c| page.contains(c.says) && page.contains(c.rule))
    );
    assert!(
        page.contains("| b | short: one | 0.01235 | - | **not** | so (here, 1 s) |"),
        "{page}"
    );
    assert!(page.contains("Not run yet."));
}
