//! Readers under eviction: requests that read a shared prefix or shared documents, while others that share them are cut by every cache
//! policy, cancelled and preempted, and the tree forgets prefixes. No reader's bits change and no page is lost.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod settings;

use std::collections::HashMap;
use std::sync::Arc;

use antefix_attention::method::{Axis, Chosen, Knobs, Method, Profiles, Program, RawChoice, Rig};
use antefix_conformance::tiny;
use antefix_engine::{Beside, Budget, Engine, Event, Options, RawJob, SeqId};
use antefix_kernels::cpu::Cpu;
use antefix_kv::Pool;
use antefix_models::decoder::Model;
use antefix_models::spec::Arch;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::ALL;
use antefix_papers::heads::{HeadProfile, KIND};

const PREFIX: usize = 7 * 32;
/// Tokens that a reader's answer has: it reads on while the others come and go.
const ANSWER: usize = 110;

/// Drawn tokens with the bits of their logits.
type Answer = Vec<(u32, Vec<u32>)>;

struct World {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    profiles: Profiles,
    _folder: tempfile::TempDir,
}

impl World {
    fn new(arch: Arch) -> Self {
        let (model, tokenizer) = tiny(arch, Cpu::best(), 2);
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(KIND)).unwrap();
        let profile = serde_json::to_string(&HeadProfile::made_up(&model.facts(), 5)).unwrap();
        std::fs::write(folder.path().join(KIND).join("default.json"), profile).unwrap();
        Self {
            model,
            tokenizer,
            profiles: Profiles::named_in(vec![folder.path().to_owned()]),
            _folder: folder,
        }
    }

    fn engine(&self, tokens: usize, rows: usize) -> Engine {
        let sizes = Pool::new(self.model.kv_shape(), 0);
        let options = Options {
            kv_bytes: sizes.bytes_for(tokens),
            context: 1024,
            budget: Budget {
                rows,
                beside_decode: Beside::Rows(rows),
            },
        };
        Engine::new(Arc::clone(&self.model), Arc::clone(&self.tokenizer), options)
    }

    /// `method` with settings that cut on a short prompt, as often as it can.
    fn program(&self, method: &'static dyn Method) -> Arc<Program> {
        let card = method.card();
        let often = [
            ("budget", "40"),
            ("window", "8"),
            ("buffer", "16"),
            ("every", "1"),
        ];
        let text = settings::with(card, &often);
        let raw = RawChoice::parse(&text).unwrap();
        let knobs = Knobs::new(card, &raw.knobs).unwrap();
        Arc::new(Rig::assemble(&self.model.facts(), &self.profiles, &[Chosen { method, knobs }]).unwrap())
    }
}

/// What a request is there for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    /// Must keep its bits.
    Reader,
    /// Its cache is cut while readers read; it must keep its bits, too.
    Cut,
    /// The same, but it is cancelled in the middle of its answer.
    Leaver,
    /// Fills the memory with prefixes that nobody asks for again.
    Churn,
}

struct Guest {
    role: Role,
    at: usize,
    raw: RawJob,
}

fn text(n: usize, seed: usize) -> Vec<u32> {
    (0..n)
        .map(|i| ((i * 37 + seed * 101 + i * i % 7) % 250) as u32)
        .collect()
}

fn job(tokens: Vec<u32>, answer: usize) -> RawJob {
    RawJob {
        tokens,
        max_tokens: Some(answer),
        ignore_eos: true,
        want_logits: true,
        ..RawJob::default()
    }
}

/// A prompt behind the prefix that all share.
fn shared(n: usize, seed: usize, answer: usize) -> RawJob {
    job([text(PREFIX, 0), text(n, seed)].concat(), answer)
}

impl World {
    fn guests(&self, seed: usize) -> Vec<Guest> {
        let mut guests = Vec::new();
        let mut come = |role, at, raw| guests.push(Guest { role, at, raw });
        come(Role::Reader, 0, shared(5, 1, ANSWER));
        for (i, tail) in [9, 40].into_iter().enumerate() {
            come(Role::Reader, 8, shared(tail + seed, 2 + i, ANSWER));
        }
        let ape = ALL.iter().find(|m| m.card().name == "ape").unwrap();
        for question in [12, 20] {
            let documents = [20..80, 80..125];
            let tokens = [text(125, 7), text(question, 8)].concat();
            come(
                Role::Reader,
                9,
                RawJob {
                    documents: documents.to_vec(),
                    program: Some(self.program(*ape)),
                    ..job(tokens, ANSWER)
                },
            );
        }
        let policies = ALL.iter().filter(|m| m.card().axis == Axis::Kv);
        for (i, method) in policies.enumerate() {
            let at = 12 + 4 * i + seed;
            for (role, tail) in [(Role::Cut, 3), (Role::Leaver, 6)] {
                let raw = RawJob {
                    program: Some(self.program(*method)),
                    ..shared(tail, 20 + i, 12)
                };
                come(role, at, raw);
            }
        }
        for i in 0..40 {
            come(Role::Churn, 10 + 2 * i, job(text(70, 100 + i), 1));
        }
        guests
    }

    fn alone(&self, raw: &RawJob) -> Answer {
        let mut engine = self.engine(1 << 16, 4096);
        let job = engine.job(raw.clone()).unwrap();
        engine.submit(job).unwrap();
        let mut answer = Answer::new();
        for event in engine.run().unwrap() {
            answer.extend(drawn(event).map(|(_, t)| t));
        }
        answer
    }
}

fn drawn(event: Event) -> Option<(SeqId, (u32, Vec<u32>))> {
    match event {
        Event::Token {
            id,
            token,
            logits: Some(logits),
            ..
        } => Some((id, (token, logits.iter().map(|x| x.to_bits()).collect()))),
        _ => None,
    }
}

/// What happened while a reader ran.
#[derive(Default, Debug)]
struct Seen {
    cuts: usize,
    leavers: usize,
    evicted: usize,
    preempted: u64,
}

fn check(arch: Arch, seed: usize, seen: &mut Seen) {
    let world = World::new(arch);
    // Little more than the readers' own rows.
    let mut engine = world.engine(1300, 64);
    let guests = world.guests(seed);
    let mut ids: HashMap<SeqId, usize> = HashMap::new();
    let mut answers: Vec<Answer> = vec![Answer::new(); guests.len()];
    let mut cached = vec![0; guests.len()];
    let mut ended = vec![false; guests.len()];
    let (mut step, mut events) = (0, Vec::new());
    while ended.contains(&false) {
        for (i, guest) in guests.iter().enumerate().filter(|(_, g)| g.at == step) {
            let job = engine.job(guest.raw.clone()).unwrap();
            ids.insert(engine.submit(job).unwrap(), i);
        }
        let blocks = engine.radix().blocks();
        engine.step(&mut events).unwrap();
        let reading = engine
            .running()
            .any(|(id, _)| guests[ids[&id]].role == Role::Reader);
        seen.evicted += usize::from(reading) * blocks.saturating_sub(engine.radix().blocks());
        // Whoever leaves does so after a few tokens of its answer.
        let leaves = |i: usize| guests[i].role == Role::Leaver && answers[i].len() == 4;
        for (id, _) in ids.iter().filter(|(_, i)| leaves(**i) && !ended[**i]) {
            engine.cancel(*id, &mut events);
            seen.leavers += usize::from(reading);
        }
        for event in std::mem::take(&mut events) {
            if let Event::End {
                id, usage, method, ..
            } = &event
            {
                let i = ids[id];
                (ended[i], cached[i]) = (true, usage.cached_tokens);
                let cuts = method.as_ref().map_or(0, |m| m.edits);
                if guests[i].role == Role::Cut {
                    assert!(cuts > 0, "{method:?} cut nothing");
                    seen.cuts += if reading { cuts } else { 0 };
                }
            } else if let Some((id, token)) = drawn(event) {
                answers[ids[&id]].push(token);
            }
        }
        step += 1;
    }
    seen.preempted += engine.load().preempted;
    assert_eq!(
        &cached[1..3],
        &[PREFIX, PREFIX],
        "they read what the first has computed"
    );
    for ((guest, answer), i) in guests.iter().zip(&answers).zip(0..) {
        let mut want = world.alone(&guest.raw);
        if guest.role == Role::Leaver {
            want.truncate(answer.len());
        }
        assert!(
            *answer == want,
            "{arch:?}, seed {seed}: {:?} {i} has other bits than alone",
            guest.role
        );
    }
    // What is left in the tree is exact, and nothing else is left.
    let late = shared(17, 50, 8);
    let job = engine.job(late.clone()).unwrap();
    engine.submit(job).unwrap();
    let answer: Answer = engine
        .run()
        .unwrap()
        .into_iter()
        .filter_map(drawn)
        .map(|(_, t)| t)
        .collect();
    assert!(
        answer == world.alone(&late),
        "{arch:?}, seed {seed}: the tree is spoilt"
    );
    engine.clear_cache();
    let (used, documents) = (engine.pool().stats().bytes_used, engine.chunks().bytes);
    assert_eq!(used, documents, "{arch:?}, seed {seed}: a page is lost");
}

#[test]
fn readers_keep_their_bits_while_others_are_cut_cancelled_and_evicted() {
    let mut seen = Seen::default();
    for (arch, seed) in [(Arch::Llama, 0), (Arch::Qwen2, 1), (Arch::Gemma3, 2)] {
        check(arch, seed, &mut seen);
    }
    eprintln!("{seen:?}");
    let enough = seen.cuts > 50 && seen.leavers > 10 && seen.evicted > 50 && seen.preempted > 0;
    assert!(enough, "too easy: {seen:?}");
}
