//! The laws of hooks: who only looks changes nothing, an edit that puts back what was there changes nothing, and an edit
//! touches nobody else - bit for bit, on every architecture.

use std::sync::Arc;

use antefix_attention::hooks::{
    Action, Capture, Captured, Cells, Edit, FromRun, HookPlan, HookSpec, Observer, Per, Positions, Probe,
    Set, Site, Sources,
};
use antefix_attention::readout::{Group, Reads};
use antefix_conformance::{Traffic, engine, tiny};
use antefix_engine::{Budget, Engine, Event, Job, RawJob, Session};
use antefix_kernels::cpu::Cpu;
use antefix_models::decoder::Model;
use antefix_models::spec::Arch;
use antefix_models::testing::Rng;

const ARCHS: [Arch; 4] = [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3];
const CAP: usize = 64 << 20;

fn prompt(seed: u64, tokens: usize, vocab: usize) -> Vec<u32> {
    let mut rng = Rng(seed);
    (0..tokens).map(|_| (rng.bits() % vocab as u64) as u32).collect()
}

fn observer(model: &Model, spec: &HookSpec, sources: &Sources, prompt: usize) -> Arc<Observer> {
    let plan = HookPlan::compile(spec, model.hook_shape(), sources).expect("it fits");
    Arc::new(Observer::new(Arc::new(plan), prompt, CAP))
}

/// Bits of all logits of `tokens` in chunks of `chunk`, and what was captured.
fn run(
    model: &Arc<Model>,
    tokens: &[u32],
    chunk: usize,
    hooks: Option<(&HookSpec, &Sources)>,
) -> (Vec<u32>, Vec<Captured>) {
    let hooks = hooks.map(|(spec, sources)| observer(model, spec, sources, tokens.len()));
    let mut session = Session::new(Arc::clone(model), tokens.len(), chunk);
    session.observe(hooks.clone());
    let mut logits = Vec::new();
    session
        .feed(tokens, tokens.len(), &mut logits)
        .expect("valid tokens");
    let bits = logits.iter().map(|x| x.to_bits()).collect();
    (bits, hooks.map_or_else(Vec::new, |h| h.take()))
}

fn capture_all() -> HookSpec {
    HookSpec {
        captures: Site::ALL.map(|s| Capture::of(Cells::all(s))).into(),
        ..HookSpec::default()
    }
}

fn set_from(site: Site, layer: Option<usize>) -> Edit {
    Edit {
        at: match layer {
            Some(layer) => Cells::layer(site, layer),
            None => Cells::all(site),
        },
        action: Action::Set(Set::From(FromRun {
            capture: String::new(),
            shift: 0,
        })),
    }
}

#[test]
fn looking_changes_no_bit_and_chunks_do_not_matter() {
    for arch in ARCHS {
        let (model, _) = tiny(arch, Cpu::best(), 2);
        let tokens = prompt(1, 45, model.spec().vocab);
        let plain = run(&model, &tokens, 64, None).0;
        let nothing = Sources::default();
        assert_eq!(
            run(&model, &tokens, 64, Some((&HookSpec::default(), &nothing))).0,
            plain
        );
        let (bits, whole) = run(&model, &tokens, 64, Some((&capture_all(), &nothing)));
        assert!(bits == plain, "{arch:?}");
        let (bits, chunked) = run(&model, &tokens, 7, Some((&capture_all(), &nothing)));
        assert!(bits == plain && whole == chunked, "{arch:?}");
        let per_layer = Site::ALL.iter().filter(|s| s.per() == Per::Layer).count();
        assert_eq!(whole.len(), per_layer * model.spec().layers + 3);
        assert!(whole.iter().all(|c| c.positions.len() == tokens.len()));
    }
}

#[test]
fn what_is_captured_is_what_the_model_computes() {
    for arch in ARCHS {
        let (model, _) = tiny(arch, Cpu::best(), 1);
        let tokens = prompt(2, 20, model.spec().vocab);
        let (bits, got) = run(&model, &tokens, 64, Some((&capture_all(), &Sources::default())));
        let find = |site: Site, layer: usize| {
            got.iter()
                .find(|c| c.site == site && c.layer == layer)
                .unwrap()
                .to_f32()
        };
        let sum = |a: Vec<f32>, b: Vec<f32>| -> Vec<f32> { a.iter().zip(&b).map(|(a, b)| a + b).collect() };
        for l in 0..model.spec().layers {
            assert_eq!(
                sum(find(Site::ResidPre, l), find(Site::AttnOut, l)),
                find(Site::ResidMid, l)
            );
            assert_eq!(
                sum(find(Site::ResidMid, l), find(Site::MlpOut, l)),
                find(Site::ResidPost, l)
            );
            let before = if l == 0 {
                find(Site::Embed, 0)
            } else {
                find(Site::ResidPost, l - 1)
            };
            assert_eq!(before, find(Site::ResidPre, l));
        }
        let logits: Vec<u32> = find(Site::Logits, 0).iter().map(|x| x.to_bits()).collect();
        assert_eq!(logits, bits);
    }
}

#[test]
fn putting_back_what_was_there_changes_no_bit_at_any_site() {
    for arch in ARCHS {
        let (model, _) = tiny(arch, Cpu::best(), 1);
        let tokens = prompt(3, 37, model.spec().vocab);
        let (plain, got) = run(&model, &tokens, 16, Some((&capture_all(), &Sources::default())));
        let mut sources = Sources::default();
        sources.add(got);
        for site in Site::ALL {
            let spec = HookSpec {
                edits: vec![set_from(site, None)],
                ..HookSpec::default()
            };
            assert!(
                run(&model, &tokens, 16, Some((&spec, &sources))).0 == plain,
                "{arch:?} {site}"
            );
        }
    }
}

#[test]
fn a_patched_first_residual_is_the_other_prompt() {
    for arch in ARCHS {
        let (model, _) = tiny(arch, Cpu::best(), 1);
        let vocab = model.spec().vocab;
        let (one, other) = (prompt(4, 33, vocab), prompt(5, 33, vocab));
        let (want, got) = run(&model, &other, 64, Some((&capture_all(), &Sources::default())));
        let mut sources = Sources::default();
        sources.add(got);
        let spec = HookSpec {
            edits: vec![set_from(Site::ResidPre, Some(0))],
            ..HookSpec::default()
        };
        assert_ne!(run(&model, &one, 64, None).0, want);
        assert!(
            run(&model, &one, 64, Some((&spec, &sources))).0 == want,
            "{arch:?}"
        );
        // The last stream decides the logits alone.
        let last = model.spec().layers - 1;
        let spec = HookSpec {
            edits: vec![set_from(Site::ResidPost, Some(last))],
            ..HookSpec::default()
        };
        assert!(
            run(&model, &one, 64, Some((&spec, &sources))).0 == want,
            "{arch:?}"
        );
    }
}

#[test]
fn an_edit_changes_its_layer_and_those_above() {
    let (model, _) = tiny(Arch::Qwen2, Cpu::best(), 1);
    let tokens = prompt(6, 24, model.spec().vocab);
    let (plain, before) = run(&model, &tokens, 64, Some((&capture_all(), &Sources::default())));
    let edited = model.spec().layers - 1;
    let spec = HookSpec {
        edits: vec![Edit {
            at: Cells::layer(Site::Z, edited).at(Positions::Range(10, 24)),
            action: Action::Scale(0.0),
        }],
        ..capture_all()
    };
    let (bits, after) = run(&model, &tokens, 64, Some((&spec, &Sources::default())));
    assert_ne!(bits, plain);
    for (b, a) in before.iter().zip(&after) {
        let above = b.layer > edited
            || matches!(b.site, Site::FinalNorm | Site::Logits)
            || (b.layer == edited && b.site >= Site::Z && b.site.per() == Per::Layer);
        if !above {
            assert_eq!(b, a, "{}", b.name());
        }
        for pos in 0..10 {
            assert_eq!(b.row(pos), a.row(pos), "{} before the edited tokens", b.name());
        }
        if b.site == Site::Z && b.layer == edited {
            assert!(a.row(10).unwrap().iter().all(|&x| x == 0.0));
        }
    }
}

/// Greedy answers of 12 tokens with the logits of each, all requests together on `engine`.
fn answers(engine: &mut Engine, jobs: Vec<RawJob>) -> Vec<Vec<Vec<f32>>> {
    let ids: Vec<_> = jobs
        .into_iter()
        .map(|raw| {
            engine
                .submit(Job::new(raw, engine.model().spec().vocab, engine.context()).expect("valid"))
                .expect("it fits")
        })
        .collect();
    let mut out = vec![Vec::new(); ids.len()];
    for event in engine.run().expect("it runs") {
        if let Event::Token {
            id,
            logits: Some(logits),
            ..
        } = event
        {
            out[ids.iter().position(|&i| i == id).expect("one of ours")].push(logits);
        }
    }
    out
}

fn job(tokens: &[u32], hooks: Option<Arc<Observer>>) -> RawJob {
    RawJob {
        tokens: tokens.to_vec(),
        max_tokens: Some(12),
        ignore_eos: true,
        want_logits: true,
        hooks,
        ..RawJob::default()
    }
}

fn fresh(model: &Arc<Model>, tokenizer: &Arc<antefix_models::tokenizer::Tokenizer>) -> Engine {
    let traffic = Traffic {
        arrivals: vec![(0, job(&[0; 600], None))],
        budget: Budget::default(),
    };
    engine(model, tokenizer, &traffic)
}

#[test]
fn edited_runs_stand_apart_from_their_neighbours_and_from_the_cache() {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 2);
    let vocab = model.spec().vocab;
    let shared = prompt(7, 96, vocab);
    let scale = |factor: f32| HookSpec {
        edits: vec![Edit {
            at: Cells::layer(Site::ResidMid, 0),
            action: Action::Scale(factor),
        }],
        ..HookSpec::default()
    };
    let hooks = |spec: &HookSpec| Some(observer(&model, spec, &Sources::default(), shared.len()));
    let specs = [None, Some(scale(0.5)), Some(scale(-1.0)), Some(capture_all())];
    let alone: Vec<_> = specs
        .iter()
        .map(|spec| {
            let hooks = spec.as_ref().and_then(&hooks);
            answers(&mut fresh(&model, &tokenizer), vec![job(&shared, hooks)]).remove(0)
        })
        .collect();
    assert_eq!(alone[0], alone[3]);
    assert!(alone[0] != alone[1] && alone[1] != alone[2]);
    // All together, three rounds on one engine: the later ones find the pages of the earlier ones.
    let mut busy = fresh(&model, &tokenizer);
    for round in 0..3 {
        let observers: Vec<_> = specs.iter().map(|s| s.as_ref().and_then(&hooks)).collect();
        let jobs = observers.iter().map(|h| job(&shared, h.clone())).collect();
        assert!(answers(&mut busy, jobs) == alone, "round {round}");
        let got = observers[3].as_ref().unwrap().take();
        let rows = |site: Site| got.iter().find(|c| c.site == site).unwrap().positions.len();
        // The prompt and all but the last token of the answer.
        assert_eq!(
            rows(Site::ResidPre),
            shared.len() + 11,
            "a cached prompt is computed again"
        );
        assert_eq!(rows(Site::Logits), 12, "only rows whose logits are asked for");
    }
    let salt = observers_salt(&model, &scale(0.5), shared.len());
    assert!(
        busy.cached(&shared, salt) > 0,
        "edited pages are shared with those of the same edits"
    );
    assert!(busy.cached(&shared, 0) > 0);
    assert_eq!(
        busy.cached(&shared, observers_salt(&model, &scale(0.25), shared.len())),
        0
    );
}

fn observers_salt(model: &Model, spec: &HookSpec, prompt: usize) -> u64 {
    observer(model, spec, &Sources::default(), prompt).salted(0)
}

#[test]
fn a_capture_that_does_not_insist_takes_what_is_computed() {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let tokens = prompt(8, 80, model.spec().vocab);
    let mut engine = fresh(&model, &tokenizer);
    answers(&mut engine, vec![job(&tokens, None)]);
    let spec = HookSpec {
        captures: vec![Capture::of(Cells::layer(Site::Z, 0))],
        on_hit: antefix_attention::hooks::OnHit::NewOnly,
        ..HookSpec::default()
    };
    let hooks = observer(&model, &spec, &Sources::default(), tokens.len());
    answers(&mut engine, vec![job(&tokens, Some(Arc::clone(&hooks)))]);
    assert_eq!(hooks.take()[0].positions, (64..91).collect::<Vec<u32>>());
}

#[test]
fn probes_read_what_attention_did() {
    for arch in ARCHS {
        let (model, _) = tiny(arch, Cpu::best(), 2);
        let (spec, tokens) = (model.spec().clone(), prompt(9, 41, model.spec().vocab));
        let reads = Reads {
            weights: true,
            top: 2,
            mass: vec![Group::Window(8)],
            columns: true,
            ..Reads::default()
        };
        let probe = |read: &Reads| HookSpec {
            probes: vec![Probe {
                id: "p".into(),
                layers: None,
                heads: None,
                positions: Positions::Range(30, 41),
                read: read.clone(),
            }],
            captures: [Site::Z, Site::V, Site::RotQ]
                .map(|s| Capture::of(Cells::all(s)))
                .into(),
            ..HookSpec::default()
        };
        let plain = run(&model, &tokens, 64, None).0;
        let hooks = observer(&model, &probe(&reads), &Sources::default(), tokens.len());
        let mut session = Session::new(Arc::clone(&model), tokens.len(), 7);
        session.observe(Some(Arc::clone(&hooks)));
        let mut logits = Vec::new();
        session.feed(&tokens, tokens.len(), &mut logits).unwrap();
        assert!(logits.iter().map(|x| x.to_bits()).eq(plain), "a probe only looks");

        let (captured, readings) = (hooks.take(), hooks.take_readings().remove(0).1);
        assert_eq!(readings.len(), spec.layers * spec.heads);
        let find = |site: Site, layer: usize| {
            captured
                .iter()
                .find(|c| c.site == site && c.layer == layer)
                .unwrap()
        };
        let (dim, group) = (spec.head_dim, spec.heads / spec.kv_heads);
        for reading in &readings {
            let (z, v) = (find(Site::Z, reading.layer), find(Site::V, reading.layer));
            assert!(reading.exact && reading.rows.len() == 11);
            for row in &reading.rows {
                let (first, p) = row.weights.as_ref().unwrap();
                assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5);
                // The weights times the values are the head's output (the cache keeps values in 16 bits).
                let z = z.row(row.pos).unwrap();
                for d in 0..dim {
                    let value = |t: u32| v.row(t).unwrap()[reading.head / group * dim + d];
                    let want: f32 = (*first..).zip(p).map(|(t, p)| p * value(t)).sum();
                    let got = z[reading.head * dim + d];
                    assert!(
                        (got - want).abs() < 1e-2 * want.abs().max(1.0),
                        "{arch:?} {got} {want}"
                    );
                }
            }
        }
        // After the fact, out of captured queries and the cache: the same rows.
        for layer in 0..spec.layers {
            let q = find(Site::RotQ, layer).to_f32();
            let heads: Vec<usize> = (0..spec.heads).collect();
            let rows: Vec<usize> = (30..41).collect();
            for (again, then) in session
                .attention(layer, &q, 0)
                .read(&heads, &rows, &reads)
                .iter()
                .zip(readings.iter().filter(|r| r.layer == layer))
            {
                assert_eq!(again.rows, then.rows);
                let (a, b) = (again.columns.as_ref().unwrap(), then.columns.as_ref().unwrap());
                assert_eq!(a.seen, b.seen);
                assert!(a.sums.iter().zip(&b.sums).all(|(a, b)| (a - b).abs() < 1e-9));
            }
        }
    }
}
