//! Stores that keep blocks, lose them, damage them, are slow or are not there.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;

use antefix_kv::Identity;
use tempfile::TempDir;

use super::*;

const SALT: u64 = 3;

fn chain(fingerprint: Fingerprint, salt: u64, blocks: u32) -> Vec<BlockName> {
    let mut parent = fingerprint.root(salt);
    let mut next = |n: u32| {
        let block = BlockName {
            parent,
            salt,
            tokens: std::array::from_fn(|i| n * 40 + i as u32),
        };
        parent = block.key();
        block
    };
    (0..blocks).map(&mut next).collect()
}

fn fingerprint(n: u8) -> Fingerprint {
    let identity = Identity {
        model: [n; 32],
        layout: String::new(),
    };
    identity.fingerprint()
}

fn config(uri: &str) -> RemoteConfig {
    RemoteConfig {
        uri: uri.into(),
        timeout_ms: 2000,
        options: BTreeMap::new(),
    }
}

fn open(uri: &str, model: u8) -> Remote {
    Remote::open(&config(uri), fingerprint(model)).unwrap()
}

fn payload(n: usize) -> Vec<u8> {
    vec![n as u8; 5000 + n]
}

/// What every store must do, whoever opens it (`open(model)`); four blocks of model 1 are in it then.
fn keeps_blocks(open: &dyn Fn(u8) -> Remote) {
    let mut tier = open(1);
    let blocks = chain(fingerprint(1), SALT, 4);
    let mut out = Vec::new();
    for (n, block) in blocks.iter().enumerate() {
        assert!(!tier.get(block, &mut out));
        tier.put(block, &payload(n)).unwrap();
        tier.put(block, b"a second time is none").unwrap();
    }
    assert_eq!((tier.stats().hits, tier.stats().misses), (0, 4));
    drop(tier);
    let mut again = open(1);
    for (n, block) in blocks.iter().enumerate() {
        assert!(again.get(block, &mut out), "block {n} after a restart");
        assert_eq!(out, payload(n));
    }
    let stats = again.stats();
    assert_eq!((stats.hits, stats.misses, stats.bad, stats.off), (4, 0, 0, None));
    assert_eq!(stats.bytes_read, (0..4).map(|n| 5000 + n).sum::<u64>());
    for other in chain(fingerprint(1), SALT + 1, 4) {
        assert!(!again.get(&other, &mut out), "another tenant");
    }
    for other in chain(fingerprint(2), SALT, 4) {
        assert!(!open(2).get(&other, &mut out), "another model");
    }
}

#[test]
fn a_folder_keeps_blocks() {
    let dir = TempDir::new().unwrap();
    let uri = format!("fs://{}", dir.path().display());
    keeps_blocks(&|model| open(&uri, model));
    assert_eq!(open(&uri, 1).stats().name, "fs");
}

#[test]
fn memory_keeps_blocks() {
    // One store, opened again and again: a new one would be empty.
    let store = Operator::new(opendal::services::Memory::default()).unwrap();
    let patience = Duration::from_secs(2);
    keeps_blocks(&|model| Remote::of(store.clone(), patience, fingerprint(model)).unwrap());
}

#[test]
fn damage_is_a_miss_and_is_mended_by_the_next_one_who_stores() {
    let dir = TempDir::new().unwrap();
    let uri = format!("fs://{}", dir.path().display());
    keeps_blocks(&|model| open(&uri, model));
    let mut tier = open(&uri, 1);
    let blocks = chain(fingerprint(1), SALT, 4);
    let file = |block: &BlockName| -> PathBuf { dir.path().join(Remote::path(block)) };
    let stranger = &chain(fingerprint(2), SALT, 1)[0];
    let tenant = &chain(fingerprint(1), SALT + 1, 1)[0];
    let whole = std::fs::read(file(&blocks[0])).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    let mut torn = whole.clone();
    torn[whole.len() / 2..].fill(0);
    let other = std::fs::read(file(&blocks[1])).unwrap();
    let theirs = object::seal(stranger, fingerprint(2).root(SALT), b"of another model");
    let another = object::seal(tenant, fingerprint(1).root(SALT + 1), b"of another tenant");
    let damages: [(&str, &[u8]); 8] = [
        ("truncated", &whole[..whole.len() - 1]),
        ("empty", b""),
        ("flipped", &flipped),
        ("torn", &torn),
        ("another block", &other),
        ("another model", &theirs),
        ("another tenant", &another),
        ("no object", b"somebody else's file"),
    ];
    let mut out = b"untouched".to_vec();
    for (n, (what, bytes)) in damages.into_iter().enumerate() {
        std::fs::write(file(&blocks[0]), bytes).unwrap();
        assert!(!tier.get(&blocks[0], &mut out), "{what}");
        assert_eq!(
            (tier.stats().bad, out.as_slice()),
            (n as u64 + 1, &b"untouched"[..]),
            "{what}"
        );
        assert!(
            !file(&blocks[0]).exists(),
            "{what}: it makes room for a whole one"
        );
        tier.put(&blocks[0], &payload(0)).unwrap();
        assert!(tier.get(&blocks[0], &mut out), "{what}");
        assert_eq!(out, payload(0));
        out = b"untouched".to_vec();
    }
    std::fs::remove_file(file(&blocks[2])).unwrap();
    assert!(!tier.get(&blocks[2], &mut out), "missing");
    assert_eq!(tier.stats().bad, 8, "what is not there is not damaged");
    assert!(tier.get(&blocks[3], &mut out), "the others are as they were");
}

/// Asks a store that cannot answer; then it is not even asked for a while. Returns what is said of it.
fn is_left_alone(uri: &str) -> String {
    let mut config = config(uri);
    config.timeout_ms = 200;
    let mut tier = Remote::open(&config, fingerprint(1)).unwrap();
    let block = &chain(fingerprint(1), SALT, 1)[0];
    let mut out = Vec::new();
    let began = Instant::now();
    assert!(!tier.get(block, &mut out));
    assert!(began.elapsed() < Duration::from_secs(2), "patience is short");
    let off = tier.stats().off.expect("it says why");
    let began = Instant::now();
    for _ in 0..1000 {
        assert!(tier.put(block, b"x").is_err());
        assert!(!tier.get(block, &mut out));
    }
    assert!(began.elapsed() < config.patience(), "it is not even asked");
    assert_eq!(tier.stats().off.as_ref(), Some(&off), "and the reason is kept");
    off
}

#[test]
fn a_store_that_nobody_serves_is_left_alone() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    is_left_alone(&format!("redis://{free}"));
}

#[test]
fn a_store_that_is_silent_is_left_alone() {
    // Connections are made by the system and never answered.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let off = is_left_alone(&format!("redis://{}", silent.local_addr().unwrap()));
    assert!(off.contains("no answer within 200 ms"), "{off}");
}

#[test]
fn after_a_pause_it_is_asked_again() {
    let dir = TempDir::new().unwrap();
    let mut tier = open(&format!("fs://{}", dir.path().display()), 1);
    let block = &chain(fingerprint(1), SALT, 1)[0];
    tier.put(block, b"kept").unwrap();
    tier.paused = Some(Instant::now() + PAUSE);
    tier.stats.off = Some("for a test".into());
    let mut out = Vec::new();
    assert!(!tier.get(block, &mut out));
    tier.paused = Some(Instant::now());
    assert!(tier.get(block, &mut out));
    assert_eq!((out.as_slice(), tier.stats().off), (&b"kept"[..], None));
}

#[test]
fn a_store_that_does_not_exist_is_an_error_without_secrets() {
    for uri in ["ftp://somewhere", "nonsense", "redis://"] {
        assert!(Remote::open(&config(uri), fingerprint(1)).is_err(), "{uri}");
    }
    let error = Remote::open(&config("ftp://me:secret@somewhere/x"), fingerprint(1))
        .err()
        .unwrap();
    assert!(!error.to_string().contains("secret"), "{error}");
    assert!(error.to_string().contains("ftp://***@somewhere/x"), "{error}");
}

#[test]
fn s3_takes_its_settings_from_options() {
    let mut config = config("s3://bucket/prefix");
    for (name, value) in [
        ("region", "eu-central-1"),
        ("endpoint", "http://127.0.0.1:9"),
        ("access_key_id", "key"),
        ("secret_access_key", "secret"),
    ] {
        config.options.insert(name.into(), value.into());
    }
    let mut tier = Remote::open(&config, fingerprint(1)).unwrap();
    assert_eq!(tier.stats().name, "s3");
    assert!(!tier.get(&chain(fingerprint(1), SALT, 1)[0], &mut Vec::new()));
    let off = tier.stats().off.expect("nobody listens there");
    assert!(off.contains("127.0.0.1:9"), "it was asked: {off}");
}

/// Against a real server: `ANTEFIX_REMOTE=redis://127.0.0.1:6379/0/test cargo test --release -p antefix-server --features remote-cache
/// a_real_store`. Settings of S3 come from its usual variables. The store must not hold these blocks yet.
#[test]
fn a_real_store_keeps_blocks() {
    match std::env::var("ANTEFIX_REMOTE") {
        Ok(uri) => keeps_blocks(&|model| open(&uri, model)),
        Err(_) => eprintln!("not run: ANTEFIX_REMOTE names no store"),
    }
}
