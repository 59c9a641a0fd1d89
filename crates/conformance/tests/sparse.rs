//! Every planner of prompts and of drawn tokens in company: behind cached prefixes, in steps, beside dense requests, under memory
//! pressure, with every cache policy, with tokens that a constraint forces. Always the bits that the request gets alone on a cold engine.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use antefix_attention::method::{Axis, Card, Chosen, Kind, Knobs, Method, Profiles, Program, Rig, Value};
use antefix_conformance::{Answer, tiny};
use antefix_engine::{
    Beside, BoxedConstraint, Budget, CacheOptions, Constraint, ConstraintFailed, Engine, Event, JobError,
    MethodReport, Options, RawJob, SeqId, Usage, identity,
};
use antefix_kernels::cpu::Cpu;
use antefix_kv::disk::{DiskTier, Limits};
use antefix_kv::tiers::{Tier, Tiers};
use antefix_models::decoder::Model;
use antefix_models::spec::Arch;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::ALL;
use antefix_papers::heads::{HeadProfile, KIND};
use antefix_state::PAGE_ROWS;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

/// A model without windows, and one with windows in every other layer.
const ARCHS: [Arch; 2] = [Arch::Llama, Arch::Gemma3];

/// A model with a profile of its heads.
struct Bench {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    profiles: TempDir,
}

impl Bench {
    fn new(arch: Arch) -> Self {
        let (model, tokenizer) = tiny(arch, Cpu::best(), 2);
        let profiles = TempDir::new().unwrap();
        let profile = HeadProfile::made_up(&model.facts(), 5);
        std::fs::create_dir(profiles.path().join(KIND)).unwrap();
        let file = profiles.path().join(KIND).join("default.json");
        std::fs::write(file, serde_json::to_vec(&profile).unwrap()).unwrap();
        Self {
            model,
            tokenizer,
            profiles,
        }
    }

    /// With room for `tokens` tokens.
    fn engine(&self, tokens: usize, budget: Budget) -> Engine {
        self.engine_beside(0, tokens, budget)
    }

    /// The same, with `beside` more bytes.
    fn engine_beside(&self, beside: usize, tokens: usize, budget: Budget) -> Engine {
        let sizes = antefix_kv::Pool::new(self.model.kv_shape(), 0);
        let options = Options {
            kv_bytes: sizes.bytes_for(tokens) + beside,
            context: usize::MAX,
            budget,
        };
        Engine::new(Arc::clone(&self.model), Arc::clone(&self.tokenizer), options)
    }

    fn roomy(&self, rows: usize) -> Engine {
        self.engine(1 << 16, budget(rows))
    }

    /// Pairs of a layer without a window and a KV head.
    fn runs(&self) -> usize {
        let full = |layer: &usize| self.model.geometry(*layer).window.is_none();
        (0..self.model.spec().layers).filter(full).count() * self.model.kv_shape().kv_heads
    }

    /// Bytes of the copies that the planner of drawn tokens keeps at most, in a sequence of fewer than 1,024 `tokens`: of a quarter of them, in
    /// whole pages.
    fn copies(&self, program: &Program, tokens: usize) -> usize {
        let repeated = program.decode_planner().map_or(0, |p| p.repeated(tokens));
        let pages = repeated.min(tokens / 4).div_ceil(PAGE_ROWS);
        pages * self.runs() * self.model.kv_shape().page_bytes()
    }

    /// The methods, with settings under which they leave something out of a short text.
    fn program(&self, methods: &[&'static dyn Method]) -> Arc<Program> {
        let chosen: Vec<Chosen> = methods
            .iter()
            .map(|&method| Chosen {
                method,
                knobs: small(method.card()),
            })
            .collect();
        let profiles = Profiles::named_in(vec![self.profiles.path().to_owned()]);
        let program = Rig::assemble(&self.model.facts(), &profiles, &chosen);
        Arc::new(program.unwrap_or_else(|e| panic!("{e}")))
    }

    /// What the request brings on an engine of its own, in one step where that goes.
    fn alone(&self, raw: &RawJob) -> Outcome {
        run(&mut self.roomy(4096), &[(0, raw.clone())]).remove(0)
    }
}

/// For an answer of `answer` tokens to a prompt of `tokens` tokens.
fn request(seed: u32, tokens: usize, answer: usize, program: Option<&Arc<Program>>) -> RawJob {
    RawJob {
        tokens: text(seed, tokens),
        max_tokens: Some(answer),
        ignore_eos: true,
        want_logits: true,
        program: program.cloned(),
        ..RawJob::default()
    }
}

fn budget(rows: usize) -> Budget {
    Budget {
        rows,
        beside_decode: Beside::Rows(rows.div_ceil(3)),
    }
}

fn text(seed: u32, tokens: usize) -> Vec<u32> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        3 + x % 200
    };
    (0..tokens).map(|_| next()).collect()
}

fn on(axis: Axis) -> Vec<&'static dyn Method> {
    let all = ALL.iter().copied();
    all.filter(|m| m.card().axis == axis).collect()
}

/// Settings with few keys, small blocks and no dense layers.
fn small(card: &'static Card) -> Knobs {
    let mut given = BTreeMap::new();
    for knob in card.knobs {
        let value = match (knob.name, knob.kind) {
            ("block" | "stride", Kind::Choice(_)) => Value::Text("32".into()),
            ("keep", Kind::Int { .. }) => Value::Int(2),
            ("chunk" | "step", Kind::Int { .. }) => Value::Int(1),
            ("dense_layers" | "start", Kind::Int { .. }) => Value::Int(0),
            ("budget", Kind::Int { .. }) => Value::Int(48),
            (
                "least" | "min_budget" | "top_k" | "window" | "vertical" | "slash" | "rows",
                Kind::Int { max, .. },
            ) => Value::Int(max.min(16)),
            ("sinks" | "local" | "buffer" | "every" | "query_stride", Kind::Int { .. }) => Value::Int(8),
            ("share" | "gamma" | "tau", Kind::Float { .. }) if card.axis != Axis::Kv => Value::Float(0.3),
            ("theta", Kind::Float { .. }) => Value::Float(0.0),
            ("correct_every", Kind::Int { .. }) => Value::Int(12),
            ("dense_tail", Kind::Bool) => Value::Bool(false),
            ("always", Kind::Bool) => Value::Bool(true),
            _ => continue,
        };
        given.insert(knob.name.to_string(), value);
    }
    Knobs::new(card, &given).unwrap_or_else(|e| panic!("{e}"))
}

/// What became of a request.
#[derive(Default)]
struct Outcome {
    answer: Answer,
    usage: Usage,
    report: Option<Box<MethodReport>>,
}

impl Outcome {
    fn bits(&self) -> Vec<(u32, Vec<u32>)> {
        let one = |(token, logits): &(u32, Vec<f32>)| (*token, logits.iter().map(|x| x.to_bits()).collect());
        self.answer.iter().map(one).collect()
    }

    fn densities(&self) -> (Option<f64>, Option<f64>) {
        let plan = self.report.as_ref().and_then(|r| r.plan).expect("it was planned");
        (plan.density, plan.decode_density)
    }
}

/// Runs requests that arrive at these steps; outcomes in their order.
fn run(engine: &mut Engine, arrivals: &[(usize, RawJob)]) -> Vec<Outcome> {
    run_watched(engine, arrivals, |_| {})
}

/// The same, calling `watch` after every step.
fn run_watched(
    engine: &mut Engine,
    arrivals: &[(usize, RawJob)],
    mut watch: impl FnMut(&Engine),
) -> Vec<Outcome> {
    let mut ids: Vec<Option<SeqId>> = vec![None; arrivals.len()];
    let mut out: Vec<Outcome> = arrivals.iter().map(|_| Outcome::default()).collect();
    let (mut events, mut step) = (Vec::new(), 0);
    while ids.iter().any(Option::is_none) || !engine.is_idle() {
        for (slot, (at, raw)) in ids.iter_mut().zip(arrivals) {
            if slot.is_none() && *at <= step {
                let job = engine.job(raw.clone()).expect("valid");
                *slot = Some(engine.submit(job).expect("it fits"));
            }
        }
        engine.step(&mut events).expect("the engine runs");
        step += 1;
        watch(engine);
        for event in events.drain(..) {
            let which = |id| ids.iter().position(|&x| x == Some(id)).expect("one of ours");
            match event {
                Event::Token {
                    id, token, logits, ..
                } => out[which(id)].answer.push((token, logits.unwrap_or_default())),
                Event::End {
                    id, usage, method, ..
                } => {
                    let at = which(id);
                    (out[at].usage, out[at].report) = (usage, method);
                }
                _ => {}
            }
        }
    }
    out
}

fn below(dir: &Path, model: &Arc<Model>) -> CacheOptions {
    let identity = identity(model).unwrap();
    let fingerprint = identity.fingerprint();
    let dir = dir.to_owned();
    let limits = Limits::new(1 << 26);
    let open =
        move || -> Vec<Box<dyn Tier>> { vec![Box::new(DiskTier::open(&dir, &identity, limits).unwrap())] };
    let tiers = Tiers::start(open, 64 << 20).unwrap();
    assert!(tiers.wait_open(PATIENCE));
    CacheOptions {
        below: Some((fingerprint, Arc::new(tiers))),
        ..CacheOptions::default()
    }
}

/// A prompt that begins as another one did: its prefix comes out of the memory, back from the disk, and back after a restart.
#[test]
fn a_cached_prefix_changes_no_bit_of_a_planned_prompt_wherever_it_comes_from() {
    let decode = on(Axis::Decode);
    for arch in ARCHS {
        let bench = Bench::new(arch);
        for (i, &planner) in on(Axis::Prefill).iter().enumerate() {
            let name = planner.card().name;
            let program = bench.program(&[planner, decode[i % decode.len()]]);
            let first = request(1, 701, 3, Some(&program));
            let mut second = first.clone();
            second.max_tokens = Some(12);
            second.tokens.truncate(640);
            second.tokens.extend(text(2, 61));
            let cold = bench.alone(&second);
            let (density, decode_density) = cold.densities();
            assert!(density < Some(0.95) && density > Some(0.0), "{name}: {density:?}");
            assert!(decode_density < Some(0.95), "{name}: {decode_density:?}");

            // Whole stretches in whole pages.
            let grain = program.planner().unwrap().grain().get();
            let whole = |tokens: usize| tokens / grain.max(PAGE_ROWS) * grain.max(PAGE_ROWS);
            assert!(grain.is_power_of_two());
            let dir = TempDir::new().unwrap();
            let start = || bench.roomy(100).with_cache(below(dir.path(), &bench.model));
            let mut engine = start();
            let ask = |engine: &mut Engine, raw: &RawJob| run(engine, &[(0, raw.clone())]).remove(0);
            ask(&mut engine, &first);
            let memory = ask(&mut engine, &second);
            let found = |o: &Outcome| (o.usage.cached_tokens, o.usage.loaded_tokens);
            assert_eq!(found(&memory), (whole(640), 0), "{arch:?}, {name}");
            assert!(memory.bits() == cold.bits(), "{arch:?}, {name}: from memory");
            assert!(engine.store_cache(PATIENCE));
            engine.clear_cache();
            let disk = ask(&mut engine, &second);
            assert_eq!(found(&disk), (whole(672), whole(672)), "{arch:?}, {name}");
            assert!(disk.bits() == cold.bits(), "{arch:?}, {name}: from the disk");
            drop(engine);
            let mut engine = start();
            let restarted = ask(&mut engine, &second);
            assert_eq!(found(&restarted), (whole(672), whole(672)), "{arch:?}, {name}");
            assert!(
                restarted.bits() == cold.bits(),
                "{arch:?}, {name}: after a restart"
            );
            // Nobody else finds it.
            let dense = request(1, 701, 1, None);
            assert_eq!(found(&ask(&mut engine, &dense)), (0, 0), "{arch:?}, {name}");
        }
    }
}

#[test]
fn the_steps_of_a_planned_prompt_change_no_bit() {
    let decode = on(Axis::Decode);
    for arch in ARCHS {
        let bench = Bench::new(arch);
        for (i, &planner) in on(Axis::Prefill).iter().enumerate() {
            let program = bench.program(&[planner, decode[(i + 1) % decode.len()]]);
            let raw = request(3, 333, 8, Some(&program));
            let whole = bench.alone(&raw);
            for rows in [1, 47, 200] {
                let cut = run(&mut bench.roomy(rows), &[(0, raw.clone())]).remove(0);
                assert!(
                    cut.bits() == whole.bits() && cut.densities() == whole.densities(),
                    "{arch:?}, {}, steps of {rows}",
                    planner.card().name
                );
            }
        }
    }
}

/// Dense requests draw while planned prompts are computed, and are computed while planned ones draw; some begin alike.
#[test]
fn company_changes_no_bit_of_dense_or_planned_requests() {
    let (prefill, decode) = (on(Axis::Prefill), on(Axis::Decode));
    for arch in ARCHS {
        let bench = Bench::new(arch);
        for (i, &planner) in prefill.iter().enumerate() {
            let one = bench.program(&[planner, decode[i % decode.len()]]);
            let other = bench.program(&[prefill[(i + 1) % prefill.len()], decode[(i + 1) % decode.len()]]);
            let arrivals = [
                (0, request(5, 40, 70, None)),
                (2, request(6, 300, 30, Some(&one))),
                (4, request(6, 300, 25, None)),
                (5, request(6, 290, 20, Some(&other))),
                (12, request(7, 200, 20, None)),
                (13, request(6, 300, 10, Some(&one))),
            ];
            let (mut both, mut engine) = (0, bench.roomy(60));
            let together = run_watched(&mut engine, &arrivals, |e| both = both.max(e.load().running));
            assert!(both >= 4, "at most {both} ran beside each other");
            for (which, ((_, raw), got)) in arrivals.iter().zip(&together).enumerate() {
                assert!(
                    got.bits() == bench.alone(raw).bits(),
                    "{arch:?}, {}, request {which}",
                    planner.card().name
                );
            }
            engine.clear_cache();
            assert_eq!(engine.pool().stats().bytes_used, 0, "nothing is left behind");
        }
    }
}

/// Requests that lose their memory while they draw compute what they have drawn again, many rows a step.
#[test]
fn who_loses_its_memory_while_it_draws_goes_on_with_the_same_bits() {
    let prefill = on(Axis::Prefill);
    for arch in ARCHS {
        let bench = Bench::new(arch);
        for (i, &planner) in on(Axis::Decode).iter().enumerate() {
            let name = planner.card().name;
            for both in [false, true] {
                let program = match both {
                    true => bench.program(&[prefill[i], planner]),
                    false => bench.program(&[planner]),
                };
                let arrivals: Vec<(usize, RawJob)> = (0..3)
                    .map(|n| (n, request(20 + n as u32, 150, 170, Some(&program))))
                    .collect();
                // Two requests begin to draw, and do not both come to the end.
                let beside = 2 * bench.copies(&program, 320);
                let mut engine = bench.engine_beside(beside, 576, budget(64));
                let (mut drawing, mut before) = (0, BTreeMap::new());
                let together = run_watched(&mut engine, &arrivals, |engine| {
                    let now: BTreeMap<SeqId, usize> =
                        engine.running().map(|(id, tokens)| (id, tokens.len())).collect();
                    let lost = |(id, tokens): (&SeqId, &usize)| {
                        let drawn = *tokens > 150 && *tokens < 319;
                        usize::from(drawn && !now.contains_key(id))
                    };
                    drawing += before.iter().map(lost).sum::<usize>();
                    before = now;
                });
                assert!(
                    drawing > 0,
                    "{arch:?}, {name}: nobody lost its memory while it drew"
                );
                for ((_, raw), got) in arrivals.iter().zip(&together) {
                    let want = bench.alone(raw);
                    assert!(want.densities().1 < Some(0.95), "{name}");
                    assert!(got.bits() == want.bits(), "{arch:?}, {name}");
                }
            }
        }
    }
}

/// A planner of prompts, one of drawn tokens and a cache policy in one request. The policy cuts behind the prompt, and behind a cut
/// attention is dense.
#[test]
fn planners_go_with_every_cache_policy() {
    for (i, &prefill) in on(Axis::Prefill).iter().enumerate() {
        let arch = ARCHS[i % 2];
        let bench = Bench::new(arch);
        let beside = request(10, 50, 12, None);
        let dense = bench.alone(&beside);
        for &decode in &on(Axis::Decode) {
            for &policy in &on(Axis::Kv) {
                let program = bench.program(&[prefill, decode, policy]);
                let name = program.name();
                let raw = request(9, 180, 14, Some(&program));
                let want = bench.alone(&raw);
                let report = want.report.as_ref().unwrap();
                assert!(report.edits > 0 && report.kept < 1.0, "{name}: {report:?}");
                let (density, decode_density) = want.densities();
                assert!(density < Some(0.95) && decode_density.is_none(), "{name}");
                let arrivals = [(0, beside.clone()), (1, raw.clone()), (9, raw)];
                let together = run(&mut bench.roomy(50), &arrivals);
                for got in &together[1..] {
                    assert!(got.bits() == want.bits(), "{arch:?}, {name}");
                }
                assert!(together[0].bits() == dense.bits(), "{arch:?}, beside {name}");
            }
        }
    }
}

/// What planners keep of keys is counted from admission on, by its formula, and given back at the end; what is kept is no more.
#[test]
fn summaries_of_keys_are_counted_and_given_back() {
    let methods: Vec<_> = [on(Axis::Prefill), on(Axis::Decode)].concat();
    let mut keep = Vec::new();
    for arch in ARCHS {
        let bench = Bench::new(arch);
        let (shape, runs) = (bench.model.kv_shape(), bench.runs());
        for &method in &methods {
            let (name, program) = (method.card().name, bench.program(&[method]));
            // 20 full pages and one window of 512 keys, in the prompt as behind the answer.
            let bytes = match name {
                "flexprefill" | "block_topk" => 20 * runs * shape.dim * 4,
                "quest" => 20 * runs * 2 * shape.dim * 4,
                "dhsa" => 32 * (runs * shape.dim + 1) * 4,
                _ => bench.copies(&program, 650),
            };
            let raw = request(50, 640, 10, Some(&program));
            let (mut engine, mut most) = (bench.roomy(64), 0);
            let outcome = run_watched(&mut engine, &[(0, raw)], |engine| {
                let stats = engine.pool().stats();
                let running = if engine.is_idle() { 0 } else { bytes };
                assert_eq!(stats.bytes_aside, running, "{arch:?}, {name}");
                most = most.max(stats.bytes_used);
            });
            let cached = engine.cache_stats().blocks * shape.block_bytes();
            assert_eq!(engine.pool().stats().bytes_used, cached, "{arch:?}, {name}");
            assert_eq!(most, 21 * shape.block_bytes() + bytes, "{arch:?}, {name}");
            let kept = outcome[0].report.as_ref().unwrap().plan.unwrap().summary_bytes;
            match name {
                // Its boundaries may leave fewer chunks than there may be; keys that are found may stand together.
                "dhsa" | "hip_decode" => assert!(kept > 0 && kept <= bytes, "{kept} of {bytes}"),
                _ => assert_eq!(kept, bytes, "{arch:?}, {name}"),
            }
            if bytes > 0 {
                keep.push(name);
            }
        }
    }
    assert_eq!(keep.len(), 10, "{keep:?}");
}

/// A request whose pages fit, but not what its planner keeps beside them, is refused.
#[test]
fn a_request_whose_summaries_do_not_fit_is_refused() {
    let bench = Bench::new(Arch::Llama);
    let quest = on(Axis::Decode).into_iter().find(|m| m.card().name == "quest");
    let program = bench.program(&[quest.unwrap()]);
    let engine = bench.engine(320, budget(64));
    let submit = |tokens: usize| {
        let mut engine = bench.engine(320, budget(64));
        let job = engine.job(request(1, tokens, 10, Some(&program))).unwrap();
        engine.submit(job).map(|_| ())
    };
    let capacity = engine.pool().capacity();
    let asked = capacity + 10 * 2 * 4 * 16 * 4;
    let refused = submit(310).unwrap_err();
    assert_eq!(
        refused,
        JobError::Memory {
            need: asked,
            capacity
        }
    );
    submit(250).unwrap();
}

/// Law of `tidaldecode`: after a correction the cache and the next token's logits are those of a dense prompt of the same tokens.
#[test]
fn corrected_rows_and_the_logits_behind_them_are_those_of_a_dense_prompt() {
    let tidal = on(Axis::Decode)
        .into_iter()
        .find(|m| m.card().name == "tidaldecode");
    for arch in ARCHS {
        let bench = Bench::new(arch);
        let program = bench.program(&[tidal.unwrap()]);
        let raw = request(60, 150, 41, Some(&program));
        let mut engine = bench.roomy(4096);
        let mut outcome = run(&mut engine, &[(0, raw.clone())]).remove(0);
        let plan = outcome.report.as_ref().unwrap().plan.unwrap();
        assert_eq!(plan.corrected, 36);
        assert!(plan.decode_density < Some(0.95));
        let tokens: Vec<u32> = raw
            .tokens
            .iter()
            .chain(outcome.answer.iter().map(|a| &a.0))
            .copied()
            .collect();
        for answered in [11, 12, 23, 24, 35, 36] {
            let mut dense = request(60, 150, 1, None);
            dense.tokens = tokens[..150 + answered].to_vec();
            let want = bench.alone(&dense).bits()[0].1.clone();
            let got: Vec<u32> = outcome.answer[answered].1.iter().map(|x| x.to_bits()).collect();
            assert_eq!(
                got == want,
                answered % 12 == 0,
                "{arch:?}, behind {answered} tokens"
            );
        }
        // What was corrected is found by dense requests, and is what they would have computed.
        let mut next = request(60, 150, 4, None);
        next.tokens = [&tokens[..], &text(61, 20)].concat();
        outcome = run(&mut engine, &[(0, next.clone())]).remove(0);
        assert_eq!(outcome.usage.cached_tokens, (150 + 36) / PAGE_ROWS * PAGE_ROWS);
        assert!(outcome.usage.cached_tokens > 150);
        assert!(outcome.bits() == bench.alone(&next).bits(), "{arch:?}");
    }
}

/// Lets anything come, and after every drawn token forces some that follow from it.
#[derive(Clone, Default)]
struct Chatty {
    due: Vec<u32>,
}

impl Constraint for Chatty {
    fn mask(&mut self, _: &mut [f32]) -> Result<(), ConstraintFailed> {
        Ok(())
    }

    fn commit(&mut self, token: u32) -> Result<(), ConstraintFailed> {
        self.due = (0..token % 4).map(|i| 20 + (token * 7 + i) % 180).collect();
        Ok(())
    }

    fn is_done(&self) -> bool {
        false
    }

    fn forced(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.due)
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// Forced tokens are computed together with the one that was drawn, or, where their logits are to be told, one after the other.
#[test]
fn forced_tokens_read_what_they_would_read_one_by_one() {
    for arch in ARCHS {
        let bench = Bench::new(arch);
        for &planner in &on(Axis::Decode) {
            let program = bench.program(&[planner]);
            for seed in 0..4 {
                let mut apart = request(30 + seed, 150, 60, Some(&program));
                apart.constraint = Some(BoxedConstraint(Box::new(Chatty::default())));
                apart.sampling.temperature = 1.0;
                apart.sampling.seed = u64::from(seed);
                let mut joined = apart.clone();
                joined.want_logits = false;
                let tokens = |raw: &RawJob| -> Vec<u32> {
                    let outcome = bench.alone(raw);
                    assert!(outcome.densities().1 < Some(0.95), "{}", planner.card().name);
                    outcome.answer.iter().map(|a| a.0).collect()
                };
                assert_eq!(
                    tokens(&apart),
                    tokens(&joined),
                    "{arch:?}, {}",
                    planner.card().name
                );
            }
        }
    }
}
