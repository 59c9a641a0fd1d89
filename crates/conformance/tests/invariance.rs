//! The same answer, bit for bit, whatever is cached and whoever else is in the batch.
//!
//! `ANTEFIX_CASES=2000 cargo test --release -p antefix-conformance -- --nocapture` runs the long version.

use std::sync::Arc;

use antefix_conformance::{Traffic, engine, tiny};
use antefix_engine::{Budget, Engine, Event, Job, Options, Pooling, RawJob, SeqId};
use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;
use antefix_models::testing::Rng;

#[test]
fn answers_do_not_depend_on_cache_company_chunks_or_threads() {
    let cases: usize = std::env::var("ANTEFIX_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(160);
    let (mut requests, mut tokens, mut preempted) = (0, 0, 0);
    for arch in [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3] {
        let alone = tiny(arch, Cpu::best(), 1);
        let together = [tiny(arch, Cpu::best(), 1), tiny(arch, Cpu::best(), 2)];
        let mut rng = Rng(arch as u64 + 1);
        for case in 0..cases.div_ceil(4) {
            let vocab = alone.0.spec().vocab;
            let (model, tokenizer) = &together[case % 2];
            // Two rounds on one engine: the second finds what the first left in the cache.
            let make = if case % 4 == 3 {
                Traffic::long
            } else {
                Traffic::random
            };
            let mut rounds = [make(&mut rng, vocab), make(&mut rng, vocab)];
            rounds.sort_by_key(|r| std::cmp::Reverse(r.longest()));
            let mut busy = engine(model, tokenizer, &rounds[0]);
            for round in [&rounds[0], &rounds[1], &rounds[0]] {
                let answers = round.run(&mut busy).unwrap();
                for ((_, raw), answer) in round.arrivals.iter().zip(&answers) {
                    let single = Traffic {
                        arrivals: vec![(0, raw.clone())],
                        budget: Budget::default(),
                    };
                    let want = single.run(&mut engine(&alone.0, &alone.1, &single)).unwrap();
                    requests += 1;
                    tokens += answer.len();
                    let bits = |a: &[(u32, Vec<f32>)]| -> Vec<(u32, Vec<u32>)> {
                        a.iter()
                            .map(|(t, l)| (*t, l.iter().map(|x| x.to_bits()).collect()))
                            .collect()
                    };
                    assert!(bits(answer) == bits(&want[0]), "{arch:?}, case {case}: {raw:?}");
                    assert_eq!(answer.len(), raw.max_tokens.unwrap());
                }
            }
            preempted += busy.load().preempted;
            busy.clear_cache();
            assert_eq!(busy.pool().stats().bytes_used, 0, "no page is lost");
        }
    }
    assert!(
        preempted > 0,
        "no sequence ever lost its memory: the cases are too easy"
    );
    eprintln!(
        "{cases} cases, {requests} requests, {tokens} tokens compared bit for bit, {preempted} sequences preempted: 0 differences"
    );
}

#[test]
fn a_cancelled_request_gives_its_pages_back() {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let mut rng = Rng(5);
    let traffic = Traffic::random(&mut rng, model.spec().vocab);
    let mut engine = engine(&model, &tokenizer, &traffic);
    let mut events = Vec::new();
    let ids: Vec<_> = traffic
        .arrivals
        .iter()
        .map(|(_, raw)| {
            let job = engine.job(raw.clone()).unwrap();
            engine.submit(job).unwrap()
        })
        .collect();
    engine.step(&mut events).unwrap();
    ids.into_iter().for_each(|id| engine.cancel(id, &mut events));
    assert!(engine.is_idle());
    engine.clear_cache();
    assert_eq!(engine.pool().stats().bytes_used, 0);
}

/// The vectors of `prompts` (tokens, how they are pooled), computed together after each other's prefixes were cached.
fn vectors(engine: &mut Engine, prompts: &[(Vec<u32>, Pooling)]) -> Vec<Vec<u32>> {
    let vocab = engine.model().spec().vocab;
    let ids: Vec<SeqId> = prompts
        .iter()
        .map(|(tokens, pooling)| {
            let raw = RawJob {
                tokens: tokens.clone(),
                pooling: Some(*pooling),
                ..RawJob::default()
            };
            let job = Job::new(raw, vocab, engine.context()).expect("valid");
            engine.submit(job).expect("it fits")
        })
        .collect();
    let events = engine.run().expect("the model runs");
    let vector = |id| {
        let mine = events.iter().find_map(|e| match e {
            Event::Pooled { id: i, vector } if *i == id => Some(vector),
            _ => None,
        });
        mine.expect("one a job").iter().map(|x| x.to_bits()).collect()
    };
    ids.into_iter().map(vector).collect()
}

#[test]
fn vectors_do_not_depend_on_cache_company_or_chunks() {
    let (model, tokenizer) = tiny(Arch::Gemma3, Cpu::best(), 1);
    let options = |rows| Options {
        kv_bytes: 8 << 20,
        context: 512,
        budget: Budget {
            rows,
            ..Budget::default()
        },
    };
    let new = |rows| Engine::new(Arc::clone(&model), Arc::clone(&tokenizer), options(rows));
    let prompt = |n: u32| (0..n).map(|i| (i * 7 + 3) % 50).collect::<Vec<u32>>();
    let prompts: Vec<_> = [1, 31, 32, 33, 100, 200]
        .into_iter()
        .flat_map(|n| [(prompt(n), Pooling::Mean), (prompt(n), Pooling::Last)])
        .collect();
    let mut busy = new(48);
    let together = vectors(&mut busy, &prompts);
    let cached = vectors(&mut busy, &prompts);
    for (i, one) in prompts.iter().enumerate() {
        let alone = vectors(&mut new(1000), std::slice::from_ref(one));
        assert_eq!(together[i], alone[0], "{i}");
        assert_eq!(cached[i], alone[0], "{i}, from the cache");
    }
    assert_ne!(together[10], together[11], "a mean is not the last");
    assert_eq!(together[0], together[1], "of one token it is");
}
