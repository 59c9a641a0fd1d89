//! The [`Host`] over the engine: papers and tasks run real models through it.

use std::sync::Arc;
use std::time::Instant;

use antefix_attention::method::{
    Answer, Ask, Facts, Host, HostError, Method, Profiles, Program, RawMethods, Rig, Told, Trust,
};
use antefix_engine::{
    BoxedConstraint, Budget, Constraint, ConstraintFailed, Done, Engine, Event, Options, RawJob,
};
use antefix_kv::Pool;
use antefix_models::decoder::Model;
use antefix_models::tokenizer::{Specials, Tokenizer};

/// One engine, one request at a time.
pub struct EngineHost {
    engine: Engine,
    facts: Facts,
    methods: &'static [&'static dyn Method],
    profiles: Profiles,
}

impl EngineHost {
    /// A host on `engine` that knows these methods.
    pub fn new(engine: Engine, methods: &'static [&'static dyn Method], profiles: Profiles) -> Self {
        let facts = engine.model().facts();
        Self {
            engine,
            facts,
            methods,
            profiles,
        }
    }

    /// A host on an engine of its own with room for one request of `context` tokens, whatever its methods need.
    pub fn with_room(
        model: &Arc<Model>,
        tokenizer: &Arc<Tokenizer>,
        context: usize,
        (methods, profiles): (&'static [&'static dyn Method], Profiles),
    ) -> Self {
        let sizes = Pool::new(model.kv_shape(), 0);
        let options = Options {
            // A cache policy writes what stays before the rest is freed; a quarter holds what planners keep of keys.
            kv_bytes: sizes.bytes_for(context + 64) * 9 / 4 + sizes.shape().block_bytes(),
            context,
            budget: Budget::default(),
        };
        let engine = Engine::new(Arc::clone(model), Arc::clone(tokenizer), options);
        Self::new(engine, methods, profiles)
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }
}

impl Host for EngineHost {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.engine.tokenizer().encode(text, Specials::Plain)
    }

    fn decode(&self, tokens: &[u32]) -> String {
        self.engine.tokenizer().decode(tokens)
    }

    fn install(&self, methods: &[&str]) -> Result<Arc<Program>, HostError> {
        let mut raw = RawMethods::default();
        for text in methods {
            raw.add(self.methods, text).map_err(words)?;
        }
        let chosen = raw.resolve(self.methods, Trust::Local).map_err(words)?;
        let program = Rig::assemble(&self.facts, &self.profiles, &chosen).map_err(words)?;
        Ok(Arc::new(program))
    }

    fn ask(&mut self, ask: &Ask) -> Result<Told, HostError> {
        let (max_tokens, script) = match &ask.answer {
            Answer::Greedy(n) => (*n, None),
            Answer::Given(tokens) => (tokens.len(), Some(Script::new(tokens))),
        };
        let start = Instant::now();
        let raw = RawJob {
            tokens: ask.prompt.tokens.clone(),
            documents: ask.prompt.documents.clone(),
            program: ask.program.clone(),
            max_tokens: Some(max_tokens),
            want_logits: ask.logits,
            no_cache: ask.fresh,
            question_after_cut: ask.question_after_cut,
            ignore_eos: script.is_some(),
            constraint: script.map(|s| BoxedConstraint(Box::new(s))),
            ..RawJob::default()
        };
        let job = self.engine.job(raw).map_err(words)?;
        self.engine.submit(job).map_err(words)?;
        let mut told = Told {
            kept: 1.0,
            ..Told::default()
        };
        let (mut events, mut first) = (Vec::new(), None);
        while !self.engine.is_idle() {
            self.engine.step(&mut events).map_err(words)?;
            for event in events.drain(..) {
                match event {
                    Event::Prompt { .. } | Event::Pooled { .. } => {}
                    Event::Token { token, logits, .. } => {
                        first.get_or_insert_with(Instant::now);
                        told.tokens.push(token);
                        told.logits.extend(logits);
                    }
                    Event::End {
                        done, usage, method, ..
                    } => {
                        if done == Done::Failed {
                            return Err(HostError("the engine could not go on with the request".into()));
                        }
                        told.prompt_tokens = usage.prompt_tokens;
                        told.cached_tokens = usage.cached_tokens;
                        told.kept = method.map_or(1.0, |m| m.kept);
                    }
                }
            }
        }
        let first = first.unwrap_or_else(Instant::now);
        told.first_token = first - start;
        told.rest = first.elapsed();
        Ok(told)
    }
}

fn words(error: impl std::fmt::Display) -> HostError {
    HostError(error.to_string())
}

/// An answer that is fixed beforehand.
#[derive(Clone)]
struct Script {
    tokens: Arc<[u32]>,
    at: usize,
}

impl Script {
    fn new(tokens: &[u32]) -> Self {
        Self {
            tokens: tokens.into(),
            at: 0,
        }
    }
}

impl Constraint for Script {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintFailed> {
        let next = self.tokens.get(self.at).map(|&t| t as usize);
        let next = next.filter(|&t| t < logits.len());
        let next = next.ok_or_else(|| ConstraintFailed("no token is left".into()))?;
        let kept = logits[next];
        logits.fill(f32::NEG_INFINITY);
        logits[next] = kept;
        Ok(())
    }

    fn commit(&mut self, token: u32) -> Result<(), ConstraintFailed> {
        match self.tokens.get(self.at) {
            Some(&next) if next == token => {
                self.at += 1;
                Ok(())
            }
            _ => Err(ConstraintFailed(format!("token {token} is not the next one"))),
        }
    }

    fn is_done(&self) -> bool {
        self.at == self.tokens.len()
    }

    fn forced(&mut self) -> Vec<u32> {
        Vec::new()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use antefix_attention::method::Prompt;
    use antefix_conformance::tiny;
    use antefix_kernels::cpu::Cpu;
    use antefix_models::spec::Arch;

    fn host() -> EngineHost {
        let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
        EngineHost::with_room(&model, &tokenizer, 400, (&[], Profiles::default()))
    }

    #[test]
    fn a_given_answer_gets_the_logits_that_a_greedy_one_had() {
        let mut host = host();
        let mut ask = Ask {
            prompt: Prompt::plain((5..60).collect()),
            answer: Answer::Greedy(9),
            logits: true,
            ..Ask::default()
        };
        let greedy = host.ask(&ask).unwrap();
        assert!(!greedy.tokens.is_empty() && greedy.logits.len() == greedy.tokens.len());
        assert_eq!((greedy.prompt_tokens, greedy.kept), (55, 1.0));
        ask.answer = Answer::Given(greedy.tokens.clone());
        let given = host.ask(&ask).unwrap();
        assert_eq!((given.tokens, given.logits), (greedy.tokens, greedy.logits));
        assert!(given.cached_tokens > 0);
        ask.fresh = true;
        assert_eq!(host.ask(&ask).unwrap().cached_tokens, 0);
    }

    #[test]
    fn what_cannot_be_asked_is_said_in_words() {
        let mut host = host();
        assert!(
            host.install(&["nothing"])
                .unwrap_err()
                .0
                .contains("no method `nothing`")
        );
        assert!(host.ask(&Ask::default()).unwrap_err().0.contains("empty"));
    }
}
