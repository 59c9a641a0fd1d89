//! What every method has to keep, whatever it does. One line in the tests of a method runs all of it:
//!
//! ```ignore
//! #[test]
//! fn it_conforms() {
//!     antefix_conformance::method::check(&super::FlexPrefill);
//! }
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use antefix_attention::method::{
    self, Axis, Card, Chosen, Facts, Kind, Knobs, Method, Need, Profiles, Program, RawChoice, Rig, RigError,
    Value,
};
use antefix_engine::{Beside, Budget, Engine, Event, Options, RawJob};
use antefix_kernels::cpu::Cpu;
use antefix_models::decoder::Model;
use antefix_models::spec::Arch;
use antefix_models::tokenizer::Tokenizer;

pub use antefix_models::testing::Rng;

use crate::{Answer, Traffic, engine, tiny};

/// Runs the whole suite on one method.
///
/// # Panics
/// With what is wrong.
pub fn check(method: &'static dyn Method) {
    check_with(method, &[]);
}

/// The same, with settings that are tried beside random ones: for methods that need a profile, or whose interesting settings chance
/// does not find.
///
/// # Panics
/// With what is wrong.
pub fn check_with(method: &'static dyn Method, settings: &[&str]) {
    check_profiled(method, None, settings);
}

/// The same for a method that needs a profile: the one of its presets is there for each model that it is tried on.
///
/// # Panics
/// With what is wrong.
pub fn check_profiled(method: &'static dyn Method, profile: Option<Profile<'_>>, settings: &[&str]) {
    let card = method.card();
    card_and_page_are_complete(card);
    knobs_keep_their_ranges(card);
    installing_never_panics(method);
    let subject = Subject { method, profile };
    let given: Vec<Knobs> = settings
        .iter()
        .map(|text| {
            let raw = RawChoice::parse(&format!("{},{text}", card.name));
            raw.and_then(|raw| Knobs::new(card, &raw.knobs))
                .unwrap_or_else(|e| panic!("{e}"))
        })
        .collect();
    neutral_settings_change_no_bit(&subject);
    answers_do_not_depend_on_cache_company_or_chunks(&subject, &given);
}

/// A profile of any model: its kind, and the file that the preset names.
#[derive(Clone, Copy)]
pub struct Profile<'a> {
    /// The kind, as its folder is called.
    pub kind: &'a str,
    /// The file's name, such as `default.json`.
    pub file: &'a str,
    /// What is in it for a model.
    pub bytes: &'a dyn Fn(&Facts) -> Vec<u8>,
}

/// A method under test.
struct Subject<'a> {
    method: &'static dyn Method,
    profile: Option<Profile<'a>>,
}

impl Subject<'_> {
    /// A program of the method on a model, or nothing if the settings do not fit it.
    fn program(&self, model: &Model, knobs: Knobs) -> Option<Arc<Program>> {
        let facts = model.facts();
        let folder = tempfile::tempdir().expect("a folder for tests");
        if let Some(profile) = self.profile {
            let folder = folder.path().join(profile.kind);
            std::fs::create_dir(&folder).expect("a folder for tests");
            let bytes = (profile.bytes)(&facts);
            std::fs::write(folder.join(profile.file), bytes).expect("a file for tests");
        }
        let profiles = Profiles::named_in(vec![folder.path().to_owned()]);
        let method = self.method;
        let program = Rig::assemble(&facts, &profiles, &[Chosen { method, knobs }]);
        program.ok().map(Arc::new)
    }
}

/// The card is in order, and the page can be made from the module documentation: all that is asked of what always runs, whose exactness
/// the invariance tests show.
///
/// # Panics
/// With what is wrong.
pub fn card_and_page_are_complete(card: &'static Card) {
    let faults = card.faults();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(card.source);
    let source = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    method::page(card, &source).unwrap_or_else(|e| panic!("{e}"));
}

/// The ends of every range are taken, and what lies behind them is refused.
fn knobs_keep_their_ranges(card: &'static Card) {
    let set = |knob: &str, value: Value| Knobs::new(card, &BTreeMap::from([(knob.to_string(), value)]));
    for knob in card.knobs {
        match knob.kind {
            Kind::Int { min, max } => {
                for ok in [min, max] {
                    assert!(set(knob.name, Value::Int(ok)).is_ok(), "{}: {ok}", knob.name);
                }
                for bad in [min.checked_sub(1), max.checked_add(1)].into_iter().flatten() {
                    assert!(set(knob.name, Value::Int(bad)).is_err(), "{}: {bad}", knob.name);
                }
            }
            Kind::Float { .. } => {
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    assert!(set(knob.name, Value::Float(bad)).is_err(), "{}: {bad}", knob.name);
                }
            }
            Kind::Choice(words) => {
                for word in words {
                    assert!(
                        set(knob.name, Value::Text((*word).into())).is_ok(),
                        "{}: {word}",
                        knob.name
                    );
                }
                assert!(set(knob.name, Value::Text("no such word".into())).is_err());
            }
            Kind::Bool | Kind::Profile | Kind::Text => {}
        }
    }
}

/// Random settings from the ranges of `card`.
pub fn random_knobs(card: &'static Card, rng: &mut Rng) -> Knobs {
    let mut given = BTreeMap::new();
    for knob in card.knobs {
        let bits = rng.bits();
        let value = match knob.kind {
            Kind::Int { min, max } => {
                // Small numbers as often as the whole range.
                let span = (max as i128 - min as i128 + 1) as u128;
                let span = if bits.is_multiple_of(2) {
                    span.min(64)
                } else {
                    span
                };
                Value::Int((min as i128 + (u128::from(bits / 2) % span) as i128) as i64)
            }
            Kind::Float { min, max } => {
                let end = |bound: std::ops::Bound<f64>, open: f64| match bound {
                    std::ops::Bound::Included(x) => x,
                    std::ops::Bound::Excluded(x) => x + open,
                    std::ops::Bound::Unbounded => open * 1e6,
                };
                let (lo, hi) = (end(min, 1e-6), end(max, -1e-6));
                Value::Float(lo + (hi - lo) * (bits % 1001) as f64 / 1000.0)
            }
            Kind::Bool => Value::Bool(bits.is_multiple_of(2)),
            Kind::Choice(words) => Value::Text(words[bits as usize % words.len()].into()),
            Kind::Profile | Kind::Text => continue,
        };
        given.insert(knob.name.to_string(), value);
    }
    Knobs::new(card, &given).unwrap_or_else(|e| panic!("values from the ranges: {e}"))
}

/// The defaults fit the example model, or say which profile they lack; random settings install or are refused with words.
fn installing_never_panics(method: &'static dyn Method) {
    let (facts, profiles) = (Facts::example(), Profiles::default());
    let install = |knobs: Knobs| Rig::assemble(&facts, &profiles, &[Chosen { method, knobs }]);
    match install(Knobs::defaults(method.card())) {
        Ok(program) => assert_eq!(program.name(), method.card().name),
        Err(RigError::Profile { .. }) if !method.card().needs.is_empty() => {}
        Err(error) => panic!("the defaults cannot be installed: {error}"),
    }
    let mut rng = Rng(7);
    for _ in 0..200 {
        let knobs = random_knobs(method.card(), &mut rng);
        let text = knobs.to_string();
        let again = RawChoice::parse(&text).and_then(|raw| Knobs::new(method.card(), &raw.knobs));
        assert_eq!(again.as_ref(), Ok(&knobs), "{text} is not read as it is written");
        if let Err(error) = install(knobs) {
            assert!(error.to_string().contains(method.card().name), "{error}");
        }
    }
}

/// Puts two documents into a prompt that is long enough.
fn with_documents(raw: &mut RawJob) {
    let n = raw.tokens.len();
    if n >= 8 {
        raw.documents = vec![1..n / 3, n / 3 + 1..n - 2];
    }
}

/// With the card's neutral settings, a request gets the bits of dense attention.
fn neutral_settings_change_no_bit(subject: &Subject<'_>) {
    let card = subject.method.card();
    let Some(neutral) = card.neutral else { return };
    let raw = RawChoice::parse(&format!("{},{neutral}", card.name)).expect("the card is in order");
    let knobs = Knobs::new(card, &raw.knobs).expect("the card is in order");
    for arch in [Arch::Llama, Arch::Gemma3] {
        let (model, tokenizer) = tiny(arch, Cpu::best(), 1);
        let program = subject.program(&model, knobs.clone());
        let program = program.expect("neutral settings fit every model");
        let mut rng = Rng(11);
        for _ in 0..6 {
            let mut dense = Traffic::random(&mut rng, model.spec().vocab);
            dense.arrivals.retain(|(_, raw)| raw.tokens.len() >= 8);
            dense.arrivals.iter_mut().for_each(|(_, raw)| with_documents(raw));
            let mut neutral = dense.clone();
            for (_, raw) in &mut neutral.arrivals {
                raw.program = Some(Arc::clone(&program));
            }
            let run = |traffic: &Traffic| {
                let mut engine = engine(&model, &tokenizer, traffic);
                traffic.run(&mut engine).expect("the engine runs")
            };
            assert!(run(&dense) == run(&neutral), "{neutral:?} is not neutral");
        }
    }
}

/// Requests under the method run with dense ones and with each other, in chunks, out of the cache and preempted: each gets the bits
/// that it gets alone on a cold engine with room for everything.
fn answers_do_not_depend_on_cache_company_or_chunks(subject: &Subject<'_>, given: &[Knobs]) {
    let card = subject.method.card();
    let needs = card.needs.contains(&Need::Documents);
    let (mut under, mut edits, mut preempted) = (0, 0, 0);
    for arch in [Arch::Llama, Arch::Qwen3, Arch::Gemma3] {
        let (model, tokenizer) = tiny(arch, Cpu::best(), 2);
        let mut rng = Rng(arch as u64 + 5);
        for case in 0..12 {
            let make = if case % 4 == 3 {
                Traffic::long
            } else {
                Traffic::random
            };
            let mut traffic = make(&mut rng, model.spec().vocab);
            for (_, raw) in &mut traffic.arrivals {
                let knobs = match rng.bits() as usize % (given.len() + 1) {
                    0 => random_knobs(card, &mut rng),
                    i => given[i - 1].clone(),
                };
                // Four copies of the documents and the answer still fit the tiny models' context.
                let fits = (8..950).contains(&raw.tokens.len());
                let asks = !rng.bits().is_multiple_of(3) && (!needs || fits);
                if asks && let Some(program) = subject.program(&model, knobs) {
                    under += 1;
                    if needs {
                        // Written five times it still has to fit the tiny model.
                        raw.tokens.truncate(700);
                    }
                    with_documents(raw);
                    raw.question_after_cut = rng.bits().is_multiple_of(2);
                    raw.program = Some(program);
                }
            }
            let mut together = engine(&model, &tokenizer, &traffic);
            let rounds: Vec<Vec<Answer>> = (0..2)
                .map(|_| traffic.run(&mut together).expect("the engine runs"))
                .collect();
            for (i, (_, raw)) in traffic.arrivals.iter().enumerate() {
                let (alone, did) = alone(&model, &tokenizer, raw);
                edits += did;
                for (round, got) in rounds.iter().enumerate() {
                    assert!(
                        got[i] == alone,
                        "case {case}, round {round}, request {i}: {raw:?}"
                    );
                }
            }
            preempted += together.load().preempted;
        }
    }
    let name = card.name;
    assert!(under > 0, "{name}: no request ran under it");
    assert!(
        edits > 0 || card.axis != Axis::Kv,
        "{name}: no cache was ever cut"
    );
    eprintln!("{name}: {under} requests, {edits} cuts of a cache, {preempted} requests preempted");
}

/// The answer of one request on an engine of its own, and how often its cache was cut.
fn alone(model: &Arc<Model>, tokenizer: &Arc<Tokenizer>, raw: &RawJob) -> (Answer, usize) {
    let options = Options {
        kv_bytes: 1 << 28,
        context: usize::MAX,
        budget: Budget {
            rows: 4096,
            beside_decode: Beside::Rows(4096),
        },
    };
    let mut engine = Engine::new(Arc::clone(model), Arc::clone(tokenizer), options);
    let job = engine.job(raw.clone()).expect("valid");
    engine.submit(job).expect("it fits");
    let (mut answer, mut edits) = (Answer::new(), 0);
    for event in engine.run().expect("the engine runs") {
        match event {
            Event::Token {
                token,
                logits: Some(logits),
                ..
            } => answer.push((token, logits)),
            Event::End { method, .. } => edits = method.map_or(0, |m| m.edits),
            _ => {}
        }
    }
    (answer, edits)
}

/// The tiny model that pairs of methods are tried on: it has layers with a window and layers without.
pub const PAIRED: Arch = Arch::Gemma3;

/// How two methods get on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pair {
    /// A request under both ran, and came to the same bits twice, the second time out of the cache.
    Works,
    /// They do not go together, and the rig says why.
    Refused(String),
}

/// Installs two methods with settings that do something on a short prompt, and runs a request under both. `profiles` are of the model
/// [`PAIRED`].
///
/// # Panics
/// When they are installed and the request fails, or is not the same twice.
pub fn pair(one: &'static dyn Method, other: &'static dyn Method, profiles: &Profiles) -> Pair {
    let (model, tokenizer) = tiny(PAIRED, Cpu::best(), 2);
    let chosen = [one, other].map(|method| Chosen {
        method,
        knobs: small(method.card()),
    });
    let program = match Rig::assemble(&model.facts(), profiles, &chosen) {
        Ok(program) => Arc::new(program),
        Err(error @ RigError::Profile { .. }) => panic!("{error}"),
        Err(error) => return Pair::Refused(error.to_string()),
    };
    let mut rng = Rng(3);
    let mut raw = RawJob {
        tokens: (0..150)
            .map(|_| rng.bits() as u32 % model.spec().vocab as u32)
            .collect(),
        max_tokens: Some(40),
        ignore_eos: true,
        want_logits: true,
        program: Some(program),
        ..RawJob::default()
    };
    with_documents(&mut raw);
    let (first, _) = alone(&model, &tokenizer, &raw);
    let mut engine = Engine::new(
        Arc::clone(&model),
        Arc::clone(&tokenizer),
        Options {
            kv_bytes: 1 << 28,
            context: usize::MAX,
            budget: Budget {
                rows: 33,
                beside_decode: Beside::Rows(7),
            },
        },
    );
    let traffic = Traffic {
        arrivals: vec![(0, raw.clone()), (60, raw)],
        budget: Budget::default(),
    };
    for answer in traffic.run(&mut engine).expect("the engine runs") {
        assert!(
            answer == first,
            "{} and {}: not the same twice",
            one.card().name,
            other.card().name
        );
    }
    Pair::Works
}

/// The defaults, but for whole numbers in rows or tokens, which are small enough for a short prompt: budgets 48, windows and the like 16,
/// so that a budget holds its window.
fn small(card: &'static Card) -> Knobs {
    let mut given = BTreeMap::new();
    for knob in card.knobs {
        let counts = knob.unit.contains("rows") || knob.unit.contains("tokens");
        if let (Kind::Int { min, max }, true) = (knob.kind, counts)
            && let antefix_attention::method::Preset::Int(default) = knob.default
        {
            let small = if knob.name == "budget" { 48 } else { 16 };
            given.insert(
                knob.name.to_string(),
                Value::Int(default.min(small).clamp(min, max)),
            );
        }
    }
    Knobs::new(card, &given).unwrap_or_else(|e| panic!("values from the ranges: {e}"))
}
