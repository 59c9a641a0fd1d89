//! Who gets a step, and how much of it: forced tokens, tenants and priorities.

use std::sync::Arc;

use antefix_conformance::tiny;
use antefix_engine::{
    Beside, BoxedConstraint, Budget, Constraint, ConstraintFailed, Engine, Event, Job, Options, RawJob, SeqId,
};
use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;

/// Leaves a choice at every eighth token; the seven after it follow from how far the answer is.
#[derive(Clone, Default)]
struct Eighth(u32);

impl Constraint for Eighth {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintFailed> {
        for (token, logit) in logits.iter_mut().enumerate() {
            if !(40..200).contains(&token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn commit(&mut self, _: u32) -> Result<(), ConstraintFailed> {
        self.0 += 1;
        Ok(())
    }

    fn is_done(&self) -> bool {
        false
    }

    fn forced(&mut self) -> Vec<u32> {
        let start = 40 + self.0;
        self.0 += 7;
        (start..start + 7).collect()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

fn engine(kv_tokens: usize, beside_decode: Beside) -> Engine {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let sizes = antefix_kv::Pool::new(model.kv_shape(), 0);
    let options = Options {
        kv_bytes: sizes.bytes_for(kv_tokens),
        context: 4096,
        budget: Budget {
            rows: 64,
            beside_decode,
        },
    };
    Engine::new(Arc::clone(&model), tokenizer, options)
}

fn submit(engine: &mut Engine, raw: RawJob) -> SeqId {
    let job = Job::new(raw, engine.model().spec().vocab, engine.context()).expect("a valid job");
    engine.submit(job).expect("it fits")
}

fn forced(want_logprobs: bool) -> RawJob {
    RawJob {
        tokens: (20..40).collect(),
        max_tokens: Some(64),
        constraint: Some(BoxedConstraint(Box::new(Eighth::default()))),
        want_logprobs,
        ..RawJob::default()
    }
}

fn tokens_of(events: &[Event], whose: SeqId) -> Vec<u32> {
    let token = |e: &Event| match e {
        Event::Token { id, token, .. } if *id == whose => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

#[test]
fn forced_tokens_take_no_step_of_their_own() {
    let run = |want_logprobs| {
        let mut engine = engine(400, Beside::Rows(16));
        let id = submit(&mut engine, forced(want_logprobs));
        let (mut events, mut steps) = (Vec::new(), 0);
        while !engine.is_idle() {
            engine.step(&mut events).unwrap();
            steps += 1;
        }
        (tokens_of(&events, id), steps)
    };
    // Log-probabilities are to be told of every token, so each is computed in a step of its own.
    let (slow, fast) = (run(true), run(false));
    assert_eq!(slow.0.len(), 64);
    assert_eq!(slow.0, fast.0);
    assert_eq!((slow.1, fast.1), (64, 8));
}

#[test]
fn forced_tokens_do_not_wait_behind_a_prompt() {
    let mut engine = engine(3000, Beside::Rows(1));
    let id = submit(&mut engine, forced(false));
    let mut events = Vec::new();
    engine.step(&mut events).unwrap();
    submit(
        &mut engine,
        RawJob {
            tokens: vec![50; 1000],
            max_tokens: Some(1),
            ..RawJob::default()
        },
    );
    for step in 2..=8 {
        engine.step(&mut events).unwrap();
        assert_eq!(tokens_of(&events, id).len(), step * 8);
    }
}

#[test]
fn the_urgent_go_first_and_tenants_take_turns() {
    // Room for one at a time.
    let mut engine = engine(220, Beside::Factor(3.0));
    let mut ask = |tenant, priority| {
        submit(
            &mut engine,
            RawJob {
                tokens: (20..84).collect(),
                max_tokens: Some(64),
                ignore_eos: true,
                no_cache: true,
                tenant,
                priority,
                ..RawJob::default()
            },
        )
    };
    let greedy = [ask(1, 0), ask(1, 0), ask(1, 0)];
    let modest = ask(2, 0);
    let urgent = ask(1, -1);
    let mut ended = Vec::new();
    for event in engine.run().unwrap() {
        if let Event::End { id, .. } = event {
            ended.push(id);
        }
    }
    assert_eq!(ended, [urgent, modest, greedy[0], greedy[1], greedy[2]]);
}
