//! The search on a small random model.

use antefix_attention::method::find;
use antefix_conformance::tiny;
use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;
use antefix_papers::ALL;

use super::*;

fn method(name: &str) -> &'static dyn Method {
    ALL.iter()
        .copied()
        .find(|m| m.card().name == name)
        .expect("it is there")
}

fn knobs(text: &str) -> Knobs {
    let raw = RawChoice::parse(text).expect("well written");
    Knobs::new(find(ALL, &raw.name).expect("it is there").card(), &raw.knobs).expect("in range")
}

fn prompts(n: usize) -> Vec<Vec<u32>> {
    let prompt = |p: usize| {
        (0..500 + 40 * p)
            .map(|i| (i * (7 + p) + i * i % 13) as u32 % 200)
            .collect()
    };
    (0..n).map(prompt).collect()
}

fn task(start: &str, dial: Dial, target: Target) -> Task {
    Task {
        target,
        dials: vec![dial],
        start: knobs(start),
        held_out: 0.25,
        closeness: Closeness {
            stretches: 3,
            rows: 3,
            seed: 5,
        },
    }
}

const WINDOW: Dial = Dial {
    knob: "window",
    from: 8.0,
    to: 512.0,
};

fn run(name: &str, task: &Task, n: usize) -> (Result<Tuned, TuneError>, Vec<Tried>) {
    let (model, _) = tiny(Arch::Llama, Cpu::best(), 2);
    let mut heard = Vec::new();
    let done = tune(
        (&model, method(name)),
        &prompts(n),
        task,
        (&Profiles::default(), &|| ()),
        &mut |tried| heard.push(tried.clone()),
    );
    (done, heard)
}

#[test]
fn a_prefill_method_meets_its_target_on_prompts_it_never_saw() {
    let start = "a_shape,block=32,sinks=4";
    for target in [Target::Recall(0.7), Target::Budget(0.4), Target::Kl(0.05)] {
        let task = task(start, WINDOW, target);
        let (done, heard) = run("a_shape", &task, 4);
        let tuned = done.unwrap_or_else(|e| panic!("{target:?}: {e} {heard:?}"));
        assert!(
            target.met(&tuned.verdict.figures) && tuned.held_out == 1,
            "{tuned:?}"
        );
        let last = heard.last().expect("tried");
        assert_eq!((last.stage, &last.knobs), ("held-out", &tuned.knobs));
        // Fewer keys were tried, and did not meet it, or more did not fit.
        let tried = heard.iter().filter(|t| t.stage != "held-out");
        let missed = tried.filter(|t| t.figures.kl.is_some() || !matches!(target, Target::Kl(_)));
        assert!(missed.clone().any(|t| !target.met(&t.figures)), "{heard:?}");
        // Again, the same.
        let (again, heard_again) = run("a_shape", &task, 4);
        assert_eq!((again.expect("as before"), heard_again), (tuned, heard));
    }
}

#[test]
fn a_decode_method_is_judged_by_the_last_tokens() {
    let share = Dial {
        knob: "share",
        from: 0.02,
        to: 1.0,
    };
    let target = Target::Recall(0.8);
    let (done, heard) = run("quest", &task("quest,least=8,dense_layers=0", share, target), 2);
    let tuned = done.expect("all keys are enough");
    assert!(target.met(&tuned.verdict.figures), "{tuned:?}");
    assert!(
        heard
            .iter()
            .any(|t| t.figures.density < 0.1 && t.figures.recall < 0.8),
        "{heard:?}"
    );
    // What is read is what is looked at: the same plans, executed, have the density that was foretold.
    assert!(tuned.verdict.figures.kl.is_some_and(|kl| kl >= 0.0));
}

#[test]
fn what_cannot_be_met_is_said() {
    let few = Dial { to: 16.0, ..WINDOW };
    let (done, heard) = run(
        "a_shape",
        &task("a_shape,block=32,sinks=0", few, Target::Recall(0.99)),
        3,
    );
    assert!(
        matches!(done, Err(TuneError::Unmet { method: "a_shape" })),
        "{done:?}"
    );
    assert!(!heard.is_empty());
    let (done, _) = run("a_shape", &task("a_shape", WINDOW, Target::Recall(0.5)), 1);
    assert!(matches!(done, Err(TuneError::Few(1))), "{done:?}");
    let (done, _) = run(
        "streaming_llm",
        &{
            let budget = Dial {
                knob: "budget",
                from: 16.0,
                to: 64.0,
            };
            task("streaming_llm", budget, Target::Recall(0.5))
        },
        2,
    );
    let error = done.expect_err("it plans nothing").to_string();
    assert!(error.contains("`streaming_llm` chooses no keys"), "{error}");
}

/// Looking at settings side by side is looking at each alone, and what is measured over all stretches is what a run keeps.
#[test]
fn densities_are_those_of_a_run() {
    let (model, _) = tiny(Arch::Gemma3, Cpu::best(), 2);
    let settings = [
        "a_shape,block=32,window=8",
        "a_shape,block=32,window=64",
        "a_shape,block=64,window=64",
    ];
    let settings = settings.map(knobs);
    let closeness = Closeness {
        stretches: usize::MAX,
        rows: 2,
        seed: 0,
    };
    let profiles = Profiles::default();
    let tokens = prompts(1);
    let judge = || {
        Judge::new(
            &model,
            method("a_shape"),
            tokens.clone(),
            closeness,
            (&profiles, &|| ()),
        )
    };
    let together = judge().look(&settings).expect("it runs");
    for (knobs, figures) in settings.iter().zip(together) {
        assert_eq!(
            judge().look(std::slice::from_ref(knobs)).expect("it runs"),
            [figures]
        );
        let chosen = antefix_attention::method::Chosen {
            method: method("a_shape"),
            knobs: knobs.clone(),
        };
        let program = antefix_attention::method::Rig::assemble(&model.facts(), &profiles, &[chosen]);
        let program = Arc::new(program.expect("it fits"));
        let mut rows = Vec::new();
        crate::sparse::compare(&model, &tokens[0], &[program], 2, |row| rows.push(row)).expect("it runs");
        assert!(
            (rows[1].density - figures.density).abs() < 1e-9,
            "{rows:?} {figures:?}"
        );
        let recall = rows[1].recall.expect("measured");
        assert!((recall - figures.recall).abs() < 1e-9, "{rows:?} {figures:?}");
    }
}

#[test]
fn lengths_make_an_octave_and_settings_are_written_without_defaults() {
    assert_eq!(band([16_000].into_iter()), (8192, 16_384));
    assert_eq!(band([16_384, 40_000].into_iter()), (16_384, 65_536));
    assert_eq!(band([64].into_iter()), (64, 128));
    assert_eq!(written(&knobs("flexprefill")).to_string(), "flexprefill");
    assert_eq!(
        written(&knobs("flexprefill,gamma=0.9,tau=0.1")).to_string(),
        "flexprefill,gamma=0.9"
    );
}
