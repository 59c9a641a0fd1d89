use antefix_kernels::cpu::Cpu;
use antefix_models::gguf::Gguf;
use antefix_models::spec::Arch;
use antefix_models::testing::tiny_gguf;

use super::*;

/// The tokenizer of the tiny model: mostly bytes, so that texts are several times as long as on a real one.
fn tokenizer() -> Tokenizer {
    let _ = Cpu::best();
    Tokenizer::from_gguf(&Gguf::parse(tiny_gguf(Arch::Llama, 3)).expect("valid")).expect("has tables")
}

fn kit<'a>(tokenizer: &'a Tokenizer, prose: &'a Prose) -> Kit<'a> {
    Kit {
        tokenizer,
        prose,
        digits: 5,
        shots: 0,
    }
}

#[test]
fn every_task_fits_its_length_and_is_decided_by_its_seed() {
    let (tokenizer, prose) = (tokenizer(), Prose::Generated);
    let kit = kit(&tokenizer, &prose);
    for task in Task::ALL {
        for length in [3000, 6001] {
            let sample = task.sample(&kit, length, 0.5, 9).expect("long enough");
            let used = sample.context.len() + sample.question.len();
            assert!(
                used <= length && used * 10 > length * 8,
                "{}: {used} of {length}",
                task.name()
            );
            assert_eq!(sample, task.sample(&kit, length, 0.5, 9).expect("as before"));
            assert_ne!(
                sample,
                task.sample(&kit, length, 0.5, 10).expect("as before"),
                "{}",
                task.name()
            );
        }
        assert_eq!(
            task.sample(&kit, 20, 0.5, 9),
            Err(TaskError::Short {
                task: task.name(),
                length: 20
            })
        );
        assert_eq!(task.name().parse::<Task>(), Ok(task));
    }
}

#[test]
fn facts_stand_where_they_are_said_to() {
    let (tokenizer, prose) = (tokenizer(), Prose::Generated);
    let kit = kit(&tokenizer, &prose);
    for depth in [0.0, 0.3, 1.0] {
        let s = Task::Needle.sample(&kit, 5000, depth, 4).expect("long enough");
        let fact = tokenizer.decode(&s.context[s.facts[0].clone()]);
        assert!(fact.contains(&s.answers[0]) && fact.ends_with('.'), "{fact}");
        let at = s.facts[0].start as f64 / s.context.len() as f64;
        assert!((at - depth).abs() < 0.08, "asked for {depth}, is at {at}");
        // Nowhere else.
        let mut rest = s.context.clone();
        rest.drain(s.facts[0].clone());
        assert_eq!(s.mark(&tokenizer.decode(&rest)), 0.0);
    }
    let s = Task::TwoHop.sample(&kit, 4000, 0.0, 4).expect("long enough");
    let facts: Vec<String> = s
        .facts
        .iter()
        .map(|f| tokenizer.decode(&s.context[f.clone()]))
        .collect();
    assert!(
        facts[0].contains("owner") && facts[1].contains(&s.answers[0]),
        "{facts:?}"
    );
    let s = Task::NeedleValues
        .sample(&kit, 5000, 0.5, 4)
        .expect("long enough");
    assert_eq!((s.facts.len(), s.answers.len()), (4, 4));
    let s = Task::Variables.sample(&kit, 5000, 0.5, 4).expect("long enough");
    assert_eq!(s.facts.len(), 4);
}

#[test]
fn answers_are_marked_by_what_they_contain() {
    let s = Sample {
        context: Vec::new(),
        question: Vec::new(),
        answers: vec!["Oak".into(), "elm".into()],
        max_tokens: 1,
        facts: Vec::new(),
        parts: Vec::new(),
    };
    assert_eq!(s.mark("an OAK stood there"), 0.5);
    assert_eq!(s.mark("elm, oak"), 1.0);
    assert_eq!(s.mark(""), 0.0);
}

#[test]
fn a_text_of_ones_own_wraps_around() {
    let tokenizer = tokenizer();
    let prose = Prose::Text("One is first. Two is next! And three?".into());
    let sentences = prose.sentences(&tokenizer, 400, &mut fastrand::Rng::with_seed(1));
    assert!(sentences.len() > 6);
    let text: String = sentences.iter().map(|s| tokenizer.decode(s)).collect();
    assert!(text.contains("And three? One is first."), "{text}");
    assert!(
        Prose::Text(String::new())
            .sentences(&tokenizer, 400, &mut fastrand::Rng::with_seed(1))
            .is_empty()
    );
}

#[test]
fn needles_for_heads_mark_their_answers() {
    let (tokenizer, prose) = (tokenizer(), Prose::Generated);
    let kit = kit(&tokenizer, &prose);
    for needle in &NEEDLES {
        for depth in [0.0, 0.6, 1.0] {
            let s = needle_run(&kit, needle, 3000, depth, 2).expect("long enough");
            let answer = s.facts[0].clone();
            assert_eq!(tokenizer.decode(&s.context[answer.clone()]).trim(), needle.answer);
            let text = tokenizer.decode(&s.context);
            assert_eq!(text.matches(needle.answer).count(), 1, "it is there once: {text}");
            // Within a needle and a sentence of the depth, and as long as asked for but for a sentence.
            let at = answer.start as f64 / s.context.len() as f64;
            assert!((at - depth).abs() < 0.1, "asked for {depth}, is at {at}");
            let tokens = s.context.len() + s.question.len();
            assert!((2800..=3000).contains(&tokens), "{tokens}");
            assert_eq!(needle_run(&kit, needle, 3000, depth, 2).as_ref(), Some(&s));
        }
    }
}

#[test]
fn examples_share_documents_of_the_size_asked_for() {
    let (tokenizer, prose) = (tokenizer(), Prose::Generated);
    let alone = kit(&tokenizer, &prose);
    let grouped = Kit { shots: 400, ..alone };
    let of = |kit: &Kit<'_>| Task::ManyShot.sample(kit, 4000, 0.5, 9).expect("long enough");
    let (alone, grouped) = (of(&alone), of(&grouped));
    assert_eq!(alone.context, grouped.context, "only the borders differ");
    let labels = |s: &Sample| -> Vec<usize> {
        let texts = s.parts.iter().map(|p| tokenizer.decode(&s.context[p.clone()]));
        texts.map(|t| t.matches("\nLabel: ").count()).collect()
    };
    assert!(labels(&alone).iter().all(|&n| n == 1));
    let grouped_labels = labels(&grouped);
    assert!(grouped_labels.len() >= 10 && grouped_labels[..9].iter().all(|&n| n > 2));
    assert_eq!(grouped_labels.iter().sum::<usize>(), alone.parts.len());
    for s in [alone, grouped] {
        let mut at = s.parts[0].start;
        assert!(at > 0, "something stands in front of the first");
        for part in s.documents() {
            assert!(part.start == at && part.len() <= 400);
            at = part.end;
        }
        assert_eq!(at, s.context.len());
    }
    let needle = Task::Needle.sample(&kit(&tokenizer, &prose), 3000, 0.5, 9);
    let needle = needle.expect("long enough");
    let whole = needle.documents();
    assert_eq!((whole.len(), whole[0].clone()), (1, 1..needle.context.len()));
}
