//! Answers as the start of the next turn: found in the cache or not, the same bits.

use std::sync::Arc;

use antefix_conformance::tiny;
use antefix_engine::{Budget, Engine, Event, Options, RawJob, Usage};
use antefix_kernels::cpu::{Cpu, Path};
use antefix_models::spec::Arch;

fn engine(cpu: Cpu) -> Engine {
    let (model, tokenizer) = tiny(Arch::Llama, cpu, 2);
    // If this fails, none of these tests sees prompts in bf16.
    assert_eq!(model.tells_drawn_apart(), cpu.path() == Path::Amx);
    let sizes = antefix_kv::Pool::new(model.kv_shape(), 0);
    let options = Options {
        kv_bytes: sizes.bytes_for(4096),
        context: 2048,
        budget: Budget::default(),
    };
    Engine::new(Arc::clone(&model), tokenizer, options)
}

/// The tokens drawn after `tokens`, the bits of their logits, and what it cost.
fn answer(engine: &mut Engine, tokens: &[u32], n: usize) -> (Vec<u32>, Vec<u32>, Usage) {
    let raw = RawJob {
        tokens: tokens.to_vec(),
        max_tokens: Some(n),
        ignore_eos: true,
        want_logits: true,
        ..RawJob::default()
    };
    let job = engine.job(raw).expect("a valid job");
    engine.submit(job).expect("it fits");
    let (mut drawn, mut bits, mut used) = (Vec::new(), Vec::new(), Usage::default());
    for event in engine.run().expect("it runs") {
        match event {
            Event::Token { token, logits, .. } => {
                drawn.push(token);
                bits.extend(logits.expect("asked for").iter().map(|l| l.to_bits()));
            }
            Event::End { usage, .. } => used = usage,
            _ => {}
        }
    }
    (drawn, bits, used)
}

#[test]
fn the_next_turn_finds_the_answer_and_has_the_bits_of_a_cold_engine() {
    for cpu in Cpu::available() {
        let mut warm = engine(cpu);
        let prompt: Vec<u32> = (0..50).map(|i| 30 + i * 7 % 150).collect();
        let (said, ..) = answer(&mut warm, &prompt, 100);
        let next: Vec<u32> = prompt.iter().chain(&said).copied().chain(40..60).collect();
        // Before it had the time, only the prompt can be there on some paths; the bits are the same.
        let (_, early, _) = answer(&mut warm, &next[..next.len() - 1], 4);
        let (_, cold, _) = answer(&mut engine(cpu), &next[..next.len() - 1], 4);
        assert!(early == cold, "{}: too early", cpu.path());

        let mut warm = engine(cpu);
        answer(&mut warm, &prompt, 100);
        warm.keep_answers();
        let (_, kept, usage) = answer(&mut warm, &next, 40);
        let (_, cold, _) = answer(&mut engine(cpu), &next, 40);
        assert!(kept == cold, "{}: after its answer was kept", cpu.path());
        // The last token drawn was never computed: 149 of 150, four whole blocks.
        assert_eq!(usage.cached_tokens, 128, "{}", cpu.path());
        warm.keep_answers();
        let held = warm.radix().blocks() * warm.pool().shape().block_bytes();
        assert_eq!(
            warm.pool().stats().bytes_used,
            held,
            "nobody but the cache holds pages"
        );
    }
}
