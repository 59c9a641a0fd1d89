use std::path::Path;
use std::sync::Arc;

use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::team::Team;
use antefix_models::decoder::Model;
use antefix_models::files::ModelFiles;
use antefix_models::gguf::Gguf;
use antefix_models::spec::Arch;
use antefix_models::testing::tiny_gguf;
use antefix_models::tokenizer::Tokenizer;

use antefix_attention::method::{Answer, Ask, Host, Profiles, Program, Prompt};
use antefix_papers::ALL;

use super::*;
use crate::host::EngineHost;
use crate::tasks::Prose;

fn tiny() -> (Arc<Model>, Arc<Tokenizer>) {
    let gguf = Gguf::parse(tiny_gguf(Arch::Llama, 11)).expect("valid");
    let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf).expect("has tables"));
    let files = ModelFiles::from_gguf(gguf, Path::new("tiny.gguf")).expect("whole");
    let model =
        Model::load(files, Cpu::best(), Arc::new(Team::new(1)), Precision::Fast).expect("known formats");
    (Arc::new(model), tokenizer)
}

fn plan() -> Plan {
    Plan {
        tasks: vec![Task::Needle, Task::Copy],
        lengths: vec![400],
        depths: vec![0.0, 1.0],
        samples: 2,
        seed: 3,
    }
}

fn kit(tokenizer: &Tokenizer) -> Kit<'_> {
    Kit {
        tokenizer,
        prose: &Prose::Generated,
        digits: 4,
        shots: 0,
    }
}

fn runner(
    model: &Arc<Model>,
    tokenizer: &Arc<Tokenizer>,
    kept_prompts: usize,
    programs: &[Option<Arc<Program>>],
) -> Runner {
    let setting = Setting {
        name: "tiny",
        context: 512,
        kept_prompts,
        question_after_cut: false,
    };
    Runner::new(model, tokenizer, &setting, programs)
}

#[test]
fn what_was_stored_is_not_computed_again() {
    let (model, tokenizer) = tiny();
    let kit = kit(&tokenizer);
    let go = |earlier: &[Record]| {
        let mut runner = runner(&model, &tokenizer, 0, &[None]);
        let (mut records, mut computed) = (Vec::new(), 0);
        let rows = run(&plan(), &kit, &mut runner, earlier, |step| {
            if let Step::Sample { record, new, .. } = step {
                records.push(record.clone());
                computed += usize::from(new);
            }
            Ok(())
        })
        .expect("it runs");
        (rows, records, computed)
    };
    let (rows, records, computed) = go(&[]);
    // Two places of the needle and one cell of `copy`.
    assert_eq!((rows.len(), computed), (3, 6));
    let (again, _, computed) = go(&records[..4]);
    assert_eq!(computed, 2);
    let scores = |rows: &[Row]| rows.iter().map(|r| r.accuracy).collect::<Vec<_>>();
    assert_eq!(scores(&again), scores(&rows));
    let other = Record {
        seed: 4,
        ..records[0].clone()
    };
    assert_eq!(go(&[other]).2, 6, "another seed asks other questions");
}

#[test]
fn rows_are_means_of_their_cells() {
    let record = |depth, score| Record {
        task: "needle".into(),
        method: "dense".into(),
        model: "m".into(),
        length: 100,
        depth: Some(depth),
        seed: 0,
        sample: 0,
        score,
        kept: 1.0,
        ttft_s: 0.5,
        answers: Vec::new(),
        text: "<b>".into(),
    };
    let rows = rows(&[record(0.0, 1.0), record(1.0, 0.0), record(0.0, 0.0)]);
    assert_eq!((rows.len(), rows[0].n, rows[0].accuracy), (2, 2, 0.5));
    let page = html("a <title>", &["line".into()], &rows).expect("drawn");
    assert!(page.contains("a &lt;title&gt;") && page.matches("<svg").count() == 2);
    assert!(table(&rows).lines().count() == 3);
}

#[test]
fn a_full_disk_ends_the_run_with_its_reason() {
    let (model, tokenizer) = tiny();
    let kit = kit(&tokenizer);
    let mut runner = runner(&model, &tokenizer, 0, &[None]);
    let full = |_: Step<'_>| Err(std::io::Error::other("no space"));
    assert!(matches!(
        run(&plan(), &kit, &mut runner, &[], full),
        Err(EvalError::Store(_))
    ));
}

#[test]
fn kept_prompts_give_the_answers_of_fresh_ones() {
    let (model, tokenizer) = tiny();
    let host = EngineHost::with_room(&model, &tokenizer, 512, (ALL, Profiles::default()));
    let methods = ["snapkv,budget=64", "quest,least=64", "flexprefill"];
    let mut programs = vec![None];
    programs.extend(methods.map(|m| Some(host.install(&[m]).unwrap())));
    let kit = kit(&tokenizer);
    let samples = [7, 8].map(|seed| Task::Needle.sample(&kit, 400, 0.5, seed).unwrap());
    let (mut fresh, mut kept) = (
        runner(&model, &tokenizer, 0, &programs),
        runner(&model, &tokenizer, 2, &programs),
    );
    for (i, program) in programs.iter().enumerate() {
        fresh.under(program.clone());
        kept.under(program.clone());
        for sample in &samples {
            let (fresh, kept) = (fresh.ask(sample).unwrap(), kept.ask(sample).unwrap());
            assert_eq!((&fresh.text, fresh.kept), (&kept.text, kept.kept), "{i}");
            assert_eq!(fresh.cached_tokens, 0);
            // A sparse prompt is computed by its own method from the start.
            assert_eq!(
                kept.cached_tokens >= 256,
                i == 1 || i == 2,
                "{i}: {}",
                kept.cached_tokens
            );
        }
    }
}

/// What makes `kl` of many policies cheap: a prompt is computed once for all that start from it densely.
#[test]
fn beliefs_from_cached_prompts_are_those_from_fresh_ones() {
    let (model, tokenizer) = tiny();
    let mut host = EngineHost::with_room(&model, &tokenizer, 512, (ALL, Profiles::default()));
    let programs = [
        "snapkv,budget=64",
        "h2o,budget=64",
        "streaming_llm,budget=64",
        "flexprefill",
    ]
    .map(|m| host.install(&[m]).unwrap());
    for question_after_cut in [false, true] {
        let tokens: Vec<u32> = (0..400)
            .map(|t| 3 + (t * 7 + u32::from(question_after_cut)) % 90)
            .collect();
        let mut ask = Ask {
            prompt: Prompt {
                tokens,
                documents: Vec::new(),
            },
            answer: Answer::Given(vec![5, 9, 2]),
            logits: true,
            question_after_cut,
            ..Ask::default()
        };
        host.ask(&ask).unwrap();
        for (i, program) in programs.iter().enumerate() {
            ask.program = Some(program.clone());
            ask.fresh = false;
            let cached = host.ask(&ask).unwrap();
            ask.fresh = true;
            let fresh = host.ask(&ask).unwrap();
            assert_eq!(cached.logits, fresh.logits, "{i}");
            assert_eq!(fresh.cached_tokens, 0);
            // A sparse prompt is computed by its own method from the start.
            let reused = cached.cached_tokens;
            assert!(if i == 3 { reused == 0 } else { reused >= 256 }, "{i}: {reused}");
        }
    }
}
