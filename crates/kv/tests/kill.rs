//! The disk tier under SIGKILL: a child writes blocks and says which are stored for good, the parent kills it at random points.
//!
//! `ANTEFIX_KILLS=1000 cargo test --release -p antefix-kv --test kill -- --nocapture` runs the long version.
#![allow(clippy::unwrap_used, reason = "a test may")]
#![cfg(unix)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use antefix_kv::disk::{DiskTier, Limits};
use antefix_kv::{BlockTokens, Identity};
use tempfile::TempDir;

/// Set for the child: the folder, and the number of its first block.
const DIR: &str = "ANTEFIX_KILL_DIR";
const FIRST: &str = "ANTEFIX_KILL_FIRST";
/// Blocks that one child writes at most.
const ROUND: u32 = 10_000;

fn open(dir: &Path) -> DiskTier {
    let identity = Identity {
        model: [1; 32],
        layout: "kill".into(),
    };
    let limits = Limits {
        segment: 200 << 10,
        ..Limits::new(1 << 40)
    };
    DiskTier::open(dir, &identity, limits).unwrap()
}

fn tokens(n: u32) -> BlockTokens {
    std::array::from_fn(|i| n.wrapping_mul(31).wrapping_add(i as u32))
}

/// 1 to 40 KB that depend on `n`.
fn payload(n: u32) -> Vec<u8> {
    let mut x = u64::from(n) | 1 << 40;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let len = 1000 + next() as usize % 40_000;
    (0..len).map(|_| next() as u8).collect()
}

/// The child. Without its folder it is no child, and the test is the other one.
#[test]
fn writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let first: u32 = std::env::var(FIRST).unwrap().parse().unwrap();
    let mut tier = open(Path::new(&dir));
    let root = tier.root(0);
    let mut out = std::io::stdout();
    for n in first..first + ROUND {
        tier.put(root, 0, &tokens(n), &payload(n)).unwrap();
        if n % 3 == 0 {
            tier.flush().unwrap();
            writeln!(out, "\nstored {n}").unwrap();
            out.flush().unwrap();
        }
    }
}

/// Kills a child after `after` of its reports and `pause`; the last block that it has reported.
fn kill_one(dir: &Path, first: u32, after: usize, pause: Duration) -> Option<u32> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "writes_until_it_is_killed",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(DIR, dir)
        .env(FIRST, first.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let stored = |line: String| line.strip_prefix("stored ").map(|n| n.parse::<u32>().unwrap());
    let mut last = None;
    let mut reports = lines.by_ref().map_while(Result::ok).filter_map(stored);
    for n in reports.by_ref().take(after) {
        last = Some(n);
    }
    std::thread::sleep(pause);
    child.kill().unwrap();
    // What was still in the pipe has been promised as well.
    if let Some(n) = reports.last() {
        last = Some(n);
    }
    assert!(!child.wait().unwrap().success(), "it was killed, not done");
    last
}

#[test]
fn nothing_that_was_stored_is_lost_and_nothing_is_wrong() {
    let kills: u32 = std::env::var("ANTEFIX_KILLS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(200);
    let dir = TempDir::new().unwrap();
    let (mut promised, mut torn) = (0, 0);
    let mut rng = 88_172_645_463_325_252_u64;
    let mut below = |n: u64| {
        rng ^= rng << 13;
        rng ^= rng >> 7;
        rng ^= rng << 17;
        rng % n
    };
    let (mut out, mut kept) = (Vec::new(), Vec::new());
    for round in 0..kills {
        let first = round * ROUND;
        let pause = Duration::from_micros(below(3000));
        let last = kill_one(dir.path(), first, below(12) as usize, pause);
        let mut tier = open(dir.path());
        let root = tier.root(0);
        let mut check = |n: u32, must: bool| {
            let found = tier.get(root, 0, &tokens(n), &mut out).is_some();
            assert!(found || !must, "round {round}: block {n} was stored and is gone");
            assert!(
                !found || out == payload(n),
                "round {round}: block {n} is not what was written"
            );
        };
        for n in first..=last.unwrap_or(first) {
            check(n, last.is_some());
            promised += u32::from(last.is_some());
        }
        // What nobody has promised may be there or not.
        (1..20).for_each(|n| check(last.unwrap_or(first) + n, false));
        assert_eq!(tier.stats().bad, 0, "a torn block is not even remembered");
        torn += tier.verify().unwrap().bad.len();
        kept.extend(last.map(|last| first..=last));
        if round % 8 == 7 {
            // What was promised outlives all later deaths as well. Then from the beginning, so that the folder stays small.
            for n in kept.drain(..).flatten() {
                let found = tier.get(root, 0, &tokens(n), &mut out).is_some();
                assert!(
                    found && out == payload(n),
                    "round {round}: block {n} was lost later"
                );
            }
            tier.clear().unwrap();
        }
    }
    assert!(promised > 0);
    eprintln!(
        "{kills} kills, {promised} blocks were promised, {torn} torn places were left behind: 0 lost, 0 wrong"
    );
}
