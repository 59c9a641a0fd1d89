//! The same answer, bit for bit, whatever is cached and whoever else is in the batch.
//!
//! `ANTEFIX_CASES=2000 cargo test --release -p antefix-conformance -- --nocapture` runs the long version.

use antefix_conformance::{Traffic, engine, tiny};
use antefix_engine::Budget;
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
