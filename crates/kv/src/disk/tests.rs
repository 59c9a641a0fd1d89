use std::{collections::HashMap, fs};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn model(name: u8) -> Identity {
    Identity {
        model: [name; 32],
        layout: "2 layers, 1 head".to_owned(),
    }
}

fn open(dir: &TempDir, limits: Limits) -> DiskTier {
    DiskTier::open(dir.path(), &model(1), limits).unwrap()
}

fn tokens(n: u32) -> BlockTokens {
    std::array::from_fn(|i| n * 100 + i as u32)
}

fn payload(n: u32, len: usize) -> Vec<u8> {
    let mut x = u64::from(n) + 1;
    (0..len)
        .map(|_| {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (x >> 56) as u8
        })
        .collect()
}

/// As if the process had died: what waits in memory is gone, nothing is closed in order.
fn crash(mut tier: DiskTier) {
    tier.active = None;
}

fn files_bytes(dir: &TempDir) -> u64 {
    fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().metadata().unwrap().len())
        .sum()
}

#[test]
fn a_hash_that_points_at_another_block_is_no_hit() {
    let dir = TempDir::new().unwrap();
    let mut tier = open(&dir, Limits::new(1 << 20));
    let root = tier.root(7);
    let a = tier.put(root, 7, &tokens(1), &payload(1, 500)).unwrap();
    let b = tier.put(root, 7, &tokens(2), &payload(2, 500)).unwrap();
    // What a collision of keys, or a salt whose hash starts alike, would look like.
    let place = tier.index.get(&b).unwrap();
    tier.index.insert(a, place);
    let mut out = Vec::new();
    assert_eq!(tier.get(root, 7, &tokens(1), &mut out), None);
    tier.flush().unwrap();
    tier.index.insert(a, place);
    assert_eq!(tier.get(root, 7, &tokens(1), &mut out), None);
    assert_eq!(
        tier.get(root, 8, &tokens(2), &mut out),
        None,
        "the salt is compared as well"
    );
    assert_eq!(tier.stats().bad, 2);
}

#[test]
fn old_blocks_are_forgotten_and_a_clock_that_jumps_harms_nothing() {
    let hour = Some(Duration::from_hours(1));
    assert!(!is_expired(1000, 4599, hour));
    assert!(is_expired(1000, 4600, hour));
    assert!(!is_expired(5000, 1000, hour), "from the future: new");
    assert!(!is_expired(0, u32::MAX, None));

    let dir = TempDir::new().unwrap();
    let mut limits = Limits::new(1 << 20);
    let mut tier = open(&dir, limits);
    let root = tier.root(0);
    let key = tier.put(root, 0, &tokens(1), &payload(1, 500)).unwrap();
    let late = Place {
        entry: Entry {
            created: now() - 10,
            ..tier.index.get(&key).unwrap().entry
        },
        ..tier.index.get(&key).unwrap()
    };
    let mut out = Vec::new();
    tier.index.insert(key, late);
    assert_eq!(tier.get(root, 0, &tokens(1), &mut out), Some(key));
    tier.limits.ttl = Some(Duration::from_secs(5));
    assert_eq!(tier.get(root, 0, &tokens(1), &mut out), None);
    assert_eq!(tier.matched(0, &tokens(1)), 0);
    // It can be stored again.
    tier.put(root, 0, &tokens(1), &payload(1, 500)).unwrap();
    assert_eq!(tier.get(root, 0, &tokens(1), &mut out), Some(key));
    drop(tier);
    std::thread::sleep(Duration::from_millis(2100));
    limits.ttl = Some(Duration::from_secs(1));
    let tier = open(&dir, limits);
    assert_eq!(
        (tier.stats().segments, tier.stats().blocks),
        (0, 0),
        "old segments are deleted"
    );
}

#[test]
fn the_order_of_use_survives_a_restart() {
    let dir = TempDir::new().unwrap();
    let limits = Limits {
        segment: 0, // a segment for each block
        ..Limits::new(1 << 20)
    };
    let mut tier = open(&dir, limits);
    let root = tier.root(0);
    for n in 0..4 {
        tier.put(root, 0, &tokens(n), &payload(n, 5000)).unwrap();
    }
    assert_eq!(tier.stats().segments, 4);
    drop(tier);
    // All were used an hour ago; then the first one is used again.
    let past = SystemTime::now() - Duration::from_hours(1);
    for n in 1..=4 {
        let file = File::options()
            .append(true)
            .open(data_path(dir.path(), n))
            .unwrap();
        file.set_modified(past + Duration::from_secs(n)).unwrap();
    }
    let mut out = Vec::new();
    let mut tier = open(&dir, limits);
    assert!(tier.get(root, 0, &tokens(0), &mut out).is_some());
    drop(tier);
    let tier = open(
        &dir,
        Limits {
            capacity: 15_000,
            ..limits
        },
    );
    let kept: Vec<u32> = (0..4).filter(|&n| tier.matched(0, &tokens(n)) > 0).collect();
    assert_eq!(kept, [0, 3]);
}

#[test]
fn a_restart_goes_on_with_the_last_segment() {
    let dir = TempDir::new().unwrap();
    for n in 0..20 {
        let mut tier = open(&dir, Limits::new(1 << 20));
        let root = tier.root(0);
        tier.put(root, 0, &tokens(n), &payload(n, 1000)).unwrap();
        if n % 3 == 0 {
            tier.flush().unwrap();
            crash(tier);
        }
    }
    let mut tier = open(&dir, Limits::new(1 << 20));
    assert_eq!((tier.stats().segments, tier.stats().blocks), (1, 20));
    assert_eq!(tier.verify().unwrap().records, 20);
    assert_eq!(tier.verify().unwrap().bad, []);
}

#[derive(Debug, Clone)]
enum Op {
    Put(u32, usize),
    Get(u32),
    Flush,
    Reopen,
    Crash,
    Verify,
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0u32..40, 0usize..3000).prop_map(|(n, len)| Op::Put(n, len)),
        6 => (0u32..40).prop_map(Op::Get),
        2 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
        1 => Just(Op::Verify),
        1 => (0u32..8).prop_map(|n| if n == 0 { Op::Clear } else { Op::Flush }),
    ]
}

/// Runs `ops` beside a map. With room for everything nothing may be lost that was flushed, or not crashed.
fn check(ops: &[Op], limits: Limits, roomy: bool) {
    let dir = TempDir::new().unwrap();
    let mut tier = open(&dir, limits);
    // Block `n` hangs below block `n / 2` of the same salt, so that there are chains.
    let parent_of = |tier: &DiskTier, n: u32| {
        let mut path = vec![n];
        while path[path.len() - 1] > 1 {
            path.push(path[path.len() - 1] / 2);
        }
        let salt = u64::from(n % 3);
        let parents = path[1..].iter().rev();
        (
            salt,
            parents.fold(tier.root(salt), |key, &p| key.child(&tokens(p))),
        )
    };
    // What was stored last, and whether it must be there after a crash.
    let mut known: HashMap<u32, (Vec<u8>, bool)> = HashMap::new();
    let mut out = Vec::new();
    for op in ops {
        match *op {
            Op::Put(n, len) => {
                let (salt, parent) = parent_of(&tier, n);
                let fresh = !tier.contains(&parent.child(&tokens(n)));
                tier.put(parent, salt, &tokens(n), &payload(len as u32, len))
                    .unwrap();
                if fresh {
                    assert!(!roomy || !known.contains_key(&n));
                    known.insert(n, (payload(len as u32, len), false));
                }
            }
            Op::Get(n) => {
                let (salt, parent) = parent_of(&tier, n);
                let found = tier.get(parent, salt, &tokens(n), &mut out).is_some();
                if found {
                    assert_eq!(out, known[&n].0);
                }
                assert!(found || !roomy || !known.contains_key(&n));
                assert_eq!(tier.get(parent, salt + 3, &tokens(n), &mut out), None);
                assert_eq!(tier.counters.bad, 0);
            }
            Op::Flush => {
                tier.flush().unwrap();
                known.values_mut().for_each(|(_, flushed)| *flushed = true);
            }
            Op::Reopen => {
                drop(tier);
                tier = open(&dir, limits);
                known.values_mut().for_each(|(_, flushed)| *flushed = true);
            }
            Op::Crash => {
                crash(tier);
                tier = open(&dir, limits);
                known.retain(|&n, (_, flushed)| {
                    let (_, parent) = parent_of(&tier, n);
                    *flushed || tier.contains(&parent.child(&tokens(n)))
                });
            }
            Op::Verify => assert_eq!(tier.verify().unwrap().bad, []),
            Op::Clear => {
                tier.clear().unwrap();
                known.clear();
                assert_eq!(tier.bytes(), 0);
            }
        }
        assert!(tier.bytes() <= limits.capacity);
        assert!(files_bytes(&dir) <= limits.capacity);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_edits_is_as_a_map(ops in prop::collection::vec(op(), 1..80)) {
        check(&ops, Limits { segment: 8 << 10, ..Limits::new(1 << 20) }, true);
    }

    #[test]
    fn any_sequence_of_edits_stays_below_the_capacity(ops in prop::collection::vec(op(), 1..80)) {
        check(&ops, Limits { segment: 8 << 10, ..Limits::new(20_000) }, false);
    }
}
