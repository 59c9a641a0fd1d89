//! The same answer, bit for bit, when prefixes come back from a disk: after evictions, restarts, and damage to the files.
//!
//! `ANTEFIX_CASES=400 cargo test --release -p antefix-conformance --test tiers -- --nocapture` runs the long version.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use antefix_conformance::{Answer, Traffic, engine, tiny};
use antefix_engine::{Budget, CacheOptions, Engine, Event, Job, Keep, RawJob, identity};
use antefix_kernels::cpu::Cpu;
use antefix_kv::BlockName;
use antefix_kv::disk::{Directory, DiskTier, Limits};
use antefix_kv::tiers::{Tier, TierError, TierStats, Tiers};
use antefix_models::decoder::Model;
use antefix_models::spec::Arch;
use antefix_models::testing::Rng;
use antefix_models::tokenizer::Tokenizer;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

fn below(dir: &Path, model: &Arc<Model>, limits: Limits) -> CacheOptions {
    let identity = identity(model).unwrap();
    let fingerprint = identity.fingerprint();
    let dir = dir.to_owned();
    let open =
        move || -> Vec<Box<dyn Tier>> { vec![Box::new(DiskTier::open(&dir, &identity, limits).unwrap())] };
    let tiers = Tiers::start(open, 64 << 20).unwrap();
    assert!(tiers.wait_open(PATIENCE));
    CacheOptions {
        below: Some((fingerprint, Arc::new(tiers))),
        ..CacheOptions::default()
    }
}

fn bits(answer: &Answer) -> Vec<(u32, Vec<u32>)> {
    answer
        .iter()
        .map(|(t, l)| (*t, l.iter().map(|x| x.to_bits()).collect()))
        .collect()
}

/// Whatever a disk or a careless hand may do to a file of the cache.
fn harm(rng: &mut Rng, dir: &Path) {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    files.retain(|f| !f.ends_with("LOCK"));
    if files.is_empty() {
        return;
    }
    let mut below = |n: usize| (rng.bits() % n.max(1) as u64) as usize;
    let file = &files[below(files.len())];
    let mut bytes = fs::read(file).unwrap();
    let at = below(bytes.len());
    match below(7) {
        0 => return fs::remove_file(file).unwrap(),
        1 => bytes.truncate(at),
        2 if !bytes.is_empty() => bytes[at] ^= 1 << below(8),
        3 => bytes[at..].fill(0),
        4 => bytes.rotate_left(at),
        5 => {
            let other = fs::read(&files[below(files.len())]).unwrap();
            bytes = other;
        }
        _ => bytes.extend((0..100).map(|i| i as u8)),
    }
    fs::write(file, bytes).unwrap();
}

#[test]
fn answers_do_not_depend_on_what_a_disk_brings_back() {
    let cases: usize = std::env::var("ANTEFIX_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(24);
    let (mut requests, mut loaded, mut stored, mut bad) = (0, 0, 0, 0);
    for (nth, arch) in [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3]
        .into_iter()
        .enumerate()
    {
        let (model, tokenizer) = tiny(arch, Cpu::best(), 1);
        let mut rng = Rng(arch as u64 + 100);
        for case in 0..cases.div_ceil(4) {
            let dir = TempDir::new().unwrap();
            let vocab = model.spec().vocab;
            let block = model.kv_shape().block_bytes() as u64 + 400;
            let limits = Limits {
                segment: 3 * block,
                ..Limits::new(if case % 3 == 0 { 12 * block } else { 1 << 26 })
            };
            let mut rounds = [Traffic::random(&mut rng, vocab), Traffic::random(&mut rng, vocab)];
            rounds.sort_by_key(|r| std::cmp::Reverse(r.longest()));
            let cold: Vec<Vec<Answer>> = rounds.iter().map(|r| alone(r, &model, &tokenizer)).collect();
            let start =
                || engine(&model, &tokenizer, &rounds[0]).with_cache(below(dir.path(), &model, limits));
            let mut busy = start();
            for (turn, which) in [0, 1, 0, 1, 0, 0].into_iter().enumerate() {
                let answers = rounds[which].run(&mut busy).unwrap();
                for (i, answer) in answers.iter().enumerate() {
                    requests += 1;
                    assert!(
                        bits(answer) == bits(&cold[which][i]),
                        "{arch:?}, case {case}, turn {turn}: {:?}",
                        rounds[which].arrivals[i].1
                    );
                }
                match (turn + case + nth) % 3 {
                    // Only the memory forgets.
                    0 => {
                        busy.store_cache(PATIENCE);
                        busy.clear_cache();
                    }
                    // A restart; every second time somebody has been at the files.
                    1 => {
                        busy.store_cache(PATIENCE);
                        (loaded, stored, bad) = count(&busy, loaded, stored, bad);
                        drop(busy);
                        if case % 2 == 1 {
                            harm(&mut rng, dir.path());
                        }
                        busy = start();
                    }
                    _ => {}
                }
            }
            (loaded, stored, bad) = count(&busy, loaded, stored, bad);
            busy.clear_cache();
            assert_eq!(busy.pool().stats().bytes_used, 0, "no page is lost");
        }
    }
    assert!(
        loaded > 0 && stored > 0,
        "nothing ever came back: {loaded}, {stored}"
    );
    eprintln!(
        "{cases} cases, {requests} requests, {stored} bytes stored, {loaded} blocks came back, {bad} were damaged: 0 differences"
    );
}

fn count(engine: &Engine, loaded: u64, stored: u64, bad: u64) -> (u64, u64, u64) {
    let stats = engine.cache_stats();
    let disk = &stats.below.unwrap().tiers[0];
    (
        loaded + stats.loaded.iter().sum::<u64>(),
        stored + disk.bytes_written,
        bad + disk.bad,
    )
}

fn alone(traffic: &Traffic, model: &Arc<Model>, tokenizer: &Arc<Tokenizer>) -> Vec<Answer> {
    let one = |(_, raw): &(usize, RawJob)| {
        let single = Traffic {
            arrivals: vec![(0, raw.clone())],
            budget: Budget::default(),
        };
        let mut answers = single.run(&mut engine(model, tokenizer, &single)).unwrap();
        answers.remove(0)
    };
    traffic.arrivals.iter().map(one).collect()
}

fn ask(engine: &mut Engine, tokens: &[u32], keep: Keep) -> antefix_engine::Usage {
    let raw = RawJob {
        tokens: tokens.to_vec(),
        max_tokens: Some(1),
        keep,
        ..RawJob::default()
    };
    let job = Job::new(raw, engine.model().spec().vocab, engine.context()).unwrap();
    engine.submit(job).unwrap();
    let events = engine.run().unwrap();
    let usage = events.iter().find_map(|e| match e {
        Event::End { usage, .. } => Some(*usage),
        _ => None,
    });
    usage.unwrap()
}

fn roomy(model: &Arc<Model>, tokenizer: &Arc<Tokenizer>) -> Engine {
    let options = antefix_engine::Options {
        kv_bytes: 4 << 20,
        context: 512,
        budget: Budget::default(),
    };
    Engine::new(Arc::clone(model), Arc::clone(tokenizer), options)
}

#[test]
fn usage_tells_memory_and_disk_apart_and_a_foreign_model_finds_nothing() {
    let dir = TempDir::new().unwrap();
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let limits = Limits::new(1 << 26);
    let tokens: Vec<u32> = (0..200).map(|i| 3 + i * 7 % 250).collect();
    let of = |u: antefix_engine::Usage| (u.cached_tokens, u.loaded_tokens);
    let mut first = roomy(&model, &tokenizer).with_cache(below(dir.path(), &model, limits));
    assert_eq!(of(ask(&mut first, &tokens, Keep::default())), (0, 0));
    assert_eq!(of(ask(&mut first, &tokens, Keep::default())), (192, 0));
    assert!(first.store_cache(PATIENCE));
    drop(first);
    let mut second = roomy(&model, &tokenizer).with_cache(below(dir.path(), &model, limits));
    let seen = second.whereabouts(&tokens, 0);
    assert_eq!((seen.ram, seen.below), (0, 192));
    assert_eq!(
        second.whereabouts(&tokens, 1).below,
        0,
        "another tenant finds nothing"
    );
    assert_eq!(of(ask(&mut second, &tokens[..100], Keep::default())), (96, 96));
    assert_eq!(of(ask(&mut second, &tokens, Keep::default())), (192, 96));
    drop(second);
    let (other, tokenizer) = tiny(Arch::Qwen2, Cpu::best(), 1);
    let mut foreign = roomy(&other, &tokenizer).with_cache(below(dir.path(), &other, limits));
    assert_eq!(of(ask(&mut foreign, &tokens, Keep::default())), (0, 0));
}

/// A disk as slow as a store far away.
struct Far(DiskTier);

impl Tier for Far {
    fn put(&mut self, block: &BlockName, payload: &[u8]) -> Result<(), TierError> {
        Tier::put(&mut self.0, block, payload)
    }
    fn get(&mut self, block: &BlockName, payload: &mut Vec<u8>) -> bool {
        std::thread::sleep(Duration::from_millis(400));
        Tier::get(&mut self.0, block, payload)
    }
    fn flush(&mut self) -> Result<(), TierError> {
        Tier::flush(&mut self.0)
    }
    fn clear(&mut self) -> Result<(), TierError> {
        Tier::clear(&mut self.0)
    }
    fn stats(&self) -> TierStats {
        Tier::stats(&self.0)
    }
    fn directory(&self) -> Option<Directory> {
        None // it would have to ask
    }
}

#[test]
fn a_slow_store_brings_a_part_and_the_rest_is_computed() {
    let dir = TempDir::new().unwrap();
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let tokens: Vec<u32> = (0..490).map(|i| 3 + i * 7 % 250).collect();
    let limits = Limits::new(1 << 26);
    let mut first = roomy(&model, &tokenizer).with_cache(below(dir.path(), &model, limits));
    ask(&mut first, &tokens, Keep::default());
    assert!(first.store_cache(PATIENCE));
    drop(first);
    let identity = identity(&model).unwrap();
    let fingerprint = identity.fingerprint();
    let path = dir.path().to_owned();
    let far = move || -> Vec<Box<dyn Tier>> {
        vec![Box::new(Far(DiskTier::open(&path, &identity, limits).unwrap()))]
    };
    let tiers = Tiers::start(far, 64 << 20).unwrap();
    assert!(tiers.wait_open(PATIENCE));
    let mut second = roomy(&model, &tokenizer).with_cache(CacheOptions {
        below: Some((fingerprint, Arc::new(tiers))),
        ..CacheOptions::default()
    });
    let began = Instant::now();
    let usage = ask(&mut second, &tokens, Keep::default());
    // All 15 blocks would have taken 6 s.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!((32..480).contains(&usage.loaded_tokens), "{usage:?}");
}

#[test]
fn short_lived_blocks_never_reach_the_disk_and_expire_in_memory() {
    let dir = TempDir::new().unwrap();
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let mut engine = roomy(&model, &tokenizer).with_cache(below(dir.path(), &model, Limits::new(1 << 26)));
    let tokens: Vec<u32> = (0..100).map(|i| 3 + i * 5 % 250).collect();
    let minutes = |n| Keep {
        ttl: Some(Duration::from_mins(n)),
        ..Keep::default()
    };
    ask(&mut engine, &tokens, minutes(5));
    engine.advance_cache(Duration::from_mins(4));
    assert_eq!(ask(&mut engine, &tokens, minutes(5)).cached_tokens, 96);
    engine.advance_cache(Duration::from_mins(4));
    assert_eq!(engine.cached(&tokens, 0), 96, "its use has prolonged it");
    engine.advance_cache(Duration::from_mins(2));
    assert_eq!(engine.cached(&tokens, 0), 0);
    engine.store_cache(PATIENCE);
    let stored = |e: &Engine| e.cache_stats().below.unwrap().tiers[0].bytes_written;
    assert_eq!(stored(&engine), 0);
    ask(&mut engine, &tokens, minutes(24 * 60));
    assert!(engine.store_cache(PATIENCE));
    assert!(stored(&engine) > 0);
}

#[test]
fn pins_outlast_pressure_and_leave_room_for_the_longest_request() {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let block = model.kv_shape().block_bytes();
    let options = antefix_engine::Options {
        kv_bytes: 12 * block,
        context: 224,
        budget: Budget::default(),
    };
    let mut engine = Engine::new(Arc::clone(&model), Arc::clone(&tokenizer), options);
    let prompt = |x: u32, n: u32| -> Vec<u32> { (0..n).map(|i| 3 + (i * x) % 250).collect() };
    let pinned = prompt(7, 100);
    ask(&mut engine, &pinned, Keep::default());
    assert_eq!(engine.pin(&pinned, 0), Ok(96));
    for x in 11..20 {
        ask(&mut engine, &prompt(x, 220), Keep::default());
    }
    assert_eq!(engine.cached(&pinned, 0), 96);
    let more = prompt(19, 220);
    let error = engine.pin(&more, 0).unwrap_err();
    assert_eq!(
        (error.free, error.asked),
        (block, engine.cached(&more, 0) / 32 * block)
    );
    assert_eq!(engine.unpin(&pinned, 0), 96);
    for x in 21..30 {
        ask(&mut engine, &prompt(x, 220), Keep::default());
    }
    assert_eq!(engine.cached(&pinned, 0), 0);
}

#[test]
fn the_cache_keeps_to_its_own_limit() {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let block = model.kv_shape().block_bytes();
    let options = CacheOptions {
        bytes: Some(4 * block),
        ..CacheOptions::default()
    };
    let mut engine = roomy(&model, &tokenizer).with_cache(options);
    for x in 1..6 {
        let tokens: Vec<u32> = (0..150).map(|i| 3 + i * x % 250).collect();
        ask(&mut engine, &tokens, Keep::default());
        engine.tend_cache();
        assert_eq!(engine.cache_stats().blocks, 4);
        assert_eq!(engine.pool().stats().bytes_used, 4 * block);
    }
}
