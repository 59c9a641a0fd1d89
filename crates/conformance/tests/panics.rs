//! A sequence that panics in a step fails alone: the others get the bits that they get without it, and no page is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use antefix_attention::hooks::{At, Cells, Hook, HookPlan, HookSpec, Observer, Probe, Site, Sources};
use antefix_attention::method::{
    Axis, CachePolicy, Card, Chosen, Knobs, LayerEdit, LayerView, Method, Paper, Profiles, Rig, RigError,
    Sight,
};
use antefix_attention::readout::Reads;
use antefix_conformance::tiny;
use antefix_engine::{Budget, Done, Engine, Event, Options, Pooling, RawJob};
use antefix_kernels::cpu::Cpu;
use antefix_models::decoder::Model;
use antefix_models::spec::Arch;
use antefix_models::testing::Rng;

/// Panics at token `at`, the first `times` times; `edits`: it says that it changes what it sees.
struct Mine {
    at: u32,
    times: Arc<AtomicUsize>,
    edits: bool,
}

impl Hook for Mine {
    fn wants(&self, layer: usize) -> u32 {
        match layer {
            1 => Site::ResidMid.bit(),
            _ => 0,
        }
    }

    fn fingerprint(&self) -> Option<u64> {
        self.edits.then_some(1)
    }

    fn at(&mut self, at: &At<'_>, _: &mut [f32]) {
        let here = (at.pos0..at.pos0 + at.rows as u32).contains(&self.at);
        let left = self.times.load(Ordering::Relaxed);
        if here && left > 0 {
            self.times.store(left - 1, Ordering::Relaxed);
            panic!("a panic that was put here");
        }
    }
}

fn observer(model: &Model, spec: &HookSpec, prompt: usize) -> Observer {
    let plan = HookPlan::compile(spec, model.hook_shape(), &Sources::default()).expect("it fits");
    Observer::new(Arc::new(plan), prompt, 1 << 20)
}

/// Greedy requests that share the start of their prompts, each with 9 tokens of answer.
fn requests(count: usize, vocab: usize) -> Vec<RawJob> {
    let mut rng = Rng(3);
    let mut some = |n: usize| -> Vec<u32> { (0..n).map(|_| (rng.bits() % vocab as u64) as u32).collect() };
    let shared = some(50);
    let request = |i: usize| RawJob {
        tokens: [&shared[..], &some(5 + 7 * i)].concat(),
        max_tokens: Some(9),
        ignore_eos: true,
        want_logits: true,
        ..RawJob::default()
    };
    (0..count).map(request).collect()
}

fn fresh(arch: Arch) -> Engine {
    let (model, tokenizer) = tiny(arch, Cpu::best(), 2);
    let options = Options {
        kv_bytes: 8 << 20,
        context: 1024,
        budget: Budget::default(),
    };
    Engine::new(model, tokenizer, options)
}

/// What one request brought: tokens with the bits of their logits, its vector's bits, how it ended.
#[derive(Debug, PartialEq, Default)]
struct Brought {
    drawn: Vec<(u32, Vec<u32>)>,
    pooled: Vec<u32>,
    done: Option<Done>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Runs `jobs` together, then counts the pages that are still held.
fn run(engine: &mut Engine, jobs: Vec<RawJob>) -> Vec<Brought> {
    let submit = |raw| {
        let job = engine.job(raw).expect("valid");
        engine.submit(job).expect("it fits")
    };
    let ids: Vec<_> = jobs.into_iter().map(submit).collect();
    let mut brought: Vec<Brought> = ids.iter().map(|_| Brought::default()).collect();
    for event in engine.run().expect("no step fails as a whole") {
        let (Event::Prompt { id, .. }
        | Event::Pooled { id, .. }
        | Event::Token { id, .. }
        | Event::End { id, .. }) = &event;
        let one = &mut brought[ids.iter().position(|x| x == id).expect("one of ours")];
        match event {
            Event::Token { token, logits, .. } => {
                one.drawn.push((token, bits(&logits.unwrap_or_default())));
            }
            Event::Pooled { vector, .. } => one.pooled = bits(&vector),
            Event::End { done, .. } => one.done = Some(done),
            Event::Prompt { .. } => {}
        }
    }
    engine.clear_cache();
    assert_eq!(engine.pool().stats().bytes_used, 0, "pages are lost");
    brought
}

fn alone(arch: Arch, jobs: &[RawJob]) -> Vec<Brought> {
    let one = |raw: &RawJob| run(&mut fresh(arch), vec![raw.clone()]).remove(0);
    jobs.iter().map(one).collect()
}

/// Adds a hook that panics to the request, which probes and edits as said.
fn mine(model: &Model, raw: &mut RawJob, at: usize, times: usize, (spec, edits): (&HookSpec, bool)) {
    let hook = Mine {
        at: at as u32,
        times: Arc::new(AtomicUsize::new(times)),
        edits,
    };
    raw.hooks = Some(Arc::new(
        observer(model, spec, raw.tokens.len()).with(Box::new(hook)),
    ));
}

#[test]
fn whoever_panics_fails_alone_in_a_prompt_or_an_answer() {
    for arch in [Arch::Llama, Arch::Gemma3] {
        for behind in [-20, 4] {
            let mut engine = fresh(arch);
            let model = Arc::clone(engine.model());
            let mut jobs = requests(5, model.spec().vocab);
            let want = alone(arch, &jobs);
            let at = jobs[2].tokens.len().saturating_add_signed(behind);
            mine(
                &model,
                &mut jobs[2],
                at,
                usize::MAX,
                (&HookSpec::default(), false),
            );
            let got = run(&mut engine, jobs);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                match i {
                    2 => {
                        assert_eq!(got.done, Some(Done::Failed));
                        assert!(want.drawn.starts_with(&got.drawn), "it was right until then");
                        assert_eq!(got.drawn.is_empty(), behind < 0);
                    }
                    _ => assert!(got == want, "{arch:?}, {behind}, request {i}"),
                }
            }
            assert_eq!(engine.load().panicked, 1);
        }
    }
}

#[test]
fn a_panic_that_does_not_come_back_costs_nobody_anything() {
    let mut engine = fresh(Arch::Llama);
    let model = Arc::clone(engine.model());
    let mut jobs = requests(4, model.spec().vocab);
    let want = alone(Arch::Llama, &jobs);
    let at = jobs[1].tokens.len() + 3;
    mine(&model, &mut jobs[1], at, 1, (&HookSpec::default(), false));
    assert!(run(&mut engine, jobs) == want);
    assert_eq!(engine.load().panicked, 0);
}

#[test]
fn hooks_that_count_what_they_see_are_not_shown_it_twice() {
    let mut engine = fresh(Arch::Llama);
    let model = Arc::clone(engine.model());
    let mut jobs = requests(4, model.spec().vocab);
    let want = alone(Arch::Llama, &jobs);
    let columns = HookSpec {
        probes: vec![Probe {
            id: String::new(),
            layers: None,
            heads: None,
            positions: Cells::all(Site::Z).positions,
            read: Reads {
                columns: true,
                ..Reads::default()
            },
        }],
        ..HookSpec::default()
    };
    let ends: Vec<usize> = jobs.iter().map(|j| j.tokens.len()).collect();
    // One that panics once; two beside it that never do, but whose counts a second look would spoil.
    mine(
        &model,
        &mut jobs[0],
        ends[0] + 3,
        1,
        (&HookSpec::default(), false),
    );
    mine(&model, &mut jobs[1], 0, 0, (&columns, false));
    mine(&model, &mut jobs[2], 0, 0, (&HookSpec::default(), true));
    let got = run(&mut engine, jobs);
    assert!(got[0] == want[0] && got[3] == want[3]);
    assert_eq!(got[1].done, Some(Done::Failed));
    assert_eq!(got[2].done, Some(Done::Failed));
}

#[test]
fn vectors_of_prompts_are_mended_like_answers() {
    let mut engine = fresh(Arch::Llama);
    let model = Arc::clone(engine.model());
    let mut jobs = requests(4, model.spec().vocab);
    for (i, raw) in jobs.iter_mut().enumerate() {
        raw.pooling = Some([Pooling::Mean, Pooling::Last][i % 2]);
    }
    let want = alone(Arch::Llama, &jobs);
    mine(
        &model,
        &mut jobs[0],
        10,
        usize::MAX,
        (&HookSpec::default(), false),
    );
    let got = run(&mut engine, jobs);
    assert_eq!(got[0].done, Some(Done::Failed));
    assert!(got[1..] == want[1..] && !want[1].pooled.is_empty());
}

/// A policy that panics when it is asked.
#[derive(Debug)]
struct Undecided;

static CARD: Card = Card {
    name: "undecided",
    title: "Undecided",
    axis: Axis::Kv,
    exact: false,
    summary: "Panics.",
    paper: Paper {
        title: "none",
        authors: "nobody",
        year: 2026,
        reference: "none",
    },
    knobs: &[],
    query_dependent: false,
    needs: &[],
    neutral: None,
    source: file!(),
};

impl Method for Undecided {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, _: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_cache_policy(Arc::new(Undecided))
    }
}

impl CachePolicy for Undecided {
    fn sight(&self, _: usize) -> Option<Sight> {
        Some(Sight { queries: 0 })
    }

    fn every(&self) -> Option<std::num::NonZeroUsize> {
        None
    }

    fn layer(&self, view: &LayerView<'_>) -> LayerEdit {
        assert!(view.layer == 0, "a panic that was put here");
        LayerEdit::KeepAll
    }
}

#[test]
fn a_policy_that_panics_fails_its_request() {
    let mut engine = fresh(Arch::Llama);
    let model = Arc::clone(engine.model());
    let mut jobs = requests(4, model.spec().vocab);
    let want = alone(Arch::Llama, &jobs);
    let chosen = Chosen {
        method: &Undecided,
        knobs: Knobs::defaults(&CARD),
    };
    let program = Rig::assemble(&model.facts(), &Profiles::default(), &[chosen]).expect("it fits");
    jobs[3].program = Some(Arc::new(program));
    let got = run(&mut engine, jobs);
    assert_eq!(got[3].done, Some(Done::Failed));
    assert!(got[..3] == want[..3]);
}

#[test]
fn a_deadline_ends_a_request_wherever_it_is_and_frees_its_pages() {
    // Room for one request: the second stands in line.
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let options = Options {
        kv_bytes: 8 << 20,
        context: 1024,
        budget: Budget::default(),
    };
    let mut engine = Engine::new(Arc::clone(&model), Arc::clone(&tokenizer), options);
    let mut jobs = requests(2, model.spec().vocab);
    let need = engine.pool().bytes_for(jobs[0].tokens.len() + 9);
    engine = Engine::new(
        model,
        tokenizer,
        Options {
            kv_bytes: need * 3 / 2,
            ..options
        },
    );
    let hour = Duration::from_hours(1);
    for raw in &mut jobs {
        raw.deadline = Some(Instant::now() + hour);
        raw.no_cache = true;
    }
    let ids: Vec<_> = jobs
        .into_iter()
        .map(|raw| {
            let job = engine.job(raw).expect("valid");
            engine.submit(job).expect("it fits")
        })
        .collect();
    let mut events = Vec::new();
    for _ in 0..3 {
        engine.step(&mut events).expect("it runs");
    }
    let load = engine.load();
    assert_eq!((load.running, load.waiting), (1, 1));
    assert!(events.iter().any(|e| matches!(e, Event::Token { .. })));
    assert!(!events.iter().any(|e| matches!(e, Event::End { .. })));
    engine.advance_deadlines(hour);
    events.clear();
    engine.step(&mut events).expect("it runs");
    let mut ends = Vec::new();
    for event in &events {
        match event {
            Event::End { id, done, .. } => ends.push((*id, *done)),
            other => panic!("{other:?}"),
        }
    }
    ends.sort_by_key(|e| e.0);
    let want = [
        (ids[0], Done::Deadline { answered: true }),
        (ids[1], Done::Deadline { answered: false }),
    ];
    assert_eq!(ends, want);
    assert!(engine.is_idle());
    assert_eq!(engine.pool().stats().bytes_used, 0);
}
