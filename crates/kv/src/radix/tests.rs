use super::*;
use crate::{KvDtype, KvShape};

const SHAPE: KvShape = KvShape {
    layers: 1,
    kv_heads: 1,
    dim: 16,
    dtype: KvDtype::Bf16,
};

fn cached(pool: &mut Pool, radix: &mut Radix, tokens: &[u32]) {
    let mut seq = SeqKv::new(SHAPE);
    pool.reserve(&mut seq, tokens.len()).unwrap();
    seq.commit(tokens.len());
    radix.insert(pool, tokens, 0, &seq);
    pool.release(seq);
}

#[test]
fn only_whole_blocks_with_equal_tokens_match() {
    let (mut pool, mut radix) = (Pool::new(SHAPE, 1 << 20), Radix::new());
    let tokens: Vec<u32> = (0..100).collect();
    cached(&mut pool, &mut radix, &tokens);
    assert_eq!(radix.matched(&tokens, 0), 96);
    assert_eq!(radix.matched(&tokens[..95], 0), 64);
    let mut other = tokens.clone();
    other[40] = 999;
    assert_eq!(radix.matched(&other, 0), 32);
    assert_eq!(radix.matched(&tokens, 1), 0);
}

#[test]
fn runs_are_the_stretches_between_branches() {
    let (mut pool, mut radix) = (Pool::new(SHAPE, 1 << 20), Radix::new());
    let base: Vec<u32> = (0..96).collect();
    let branch = |x: u32| -> Vec<u32> { base[..64].iter().copied().chain([x; 32]).collect() };
    cached(&mut pool, &mut radix, &branch(7));
    cached(&mut pool, &mut radix, &branch(8));
    let runs = radix.runs(&pool, 0, 100);
    let shape: Vec<_> = runs
        .iter()
        .map(|r| (r.parent.is_some(), r.tokens.len(), r.bytes / SHAPE.page_bytes()))
        .collect();
    assert_eq!(shape, [(false, 64, 2), (true, 32, 1), (true, 32, 1)]);
    assert!(runs[1..].iter().all(|r| r.parent == Some(runs[0].id)));
    assert_eq!(radix.runs(&pool, 0, 1).len(), 1);
    assert!(radix.runs(&pool, 1, 100).is_empty());
}

#[test]
fn the_least_recently_used_leaf_goes_first_and_held_ones_stay() {
    let (mut pool, mut radix) = (Pool::new(SHAPE, 4 * SHAPE.page_bytes()), Radix::new());
    let (a, b): (Vec<u32>, Vec<u32>) = ((0..64).collect(), (100..164).collect());
    cached(&mut pool, &mut radix, &a);
    cached(&mut pool, &mut radix, &b);
    assert_eq!(pool.free_bytes(), 0);
    let held = radix.lookup(&mut pool, &a, 0);
    radix.evict(&mut pool, 1);
    assert_eq!((radix.matched(&a, 0), radix.matched(&b, 0)), (64, 32));
    radix.evict(&mut pool, usize::MAX);
    assert_eq!((radix.matched(&a, 0), radix.matched(&b, 0)), (64, 0));
    pool.release(held);
    radix.evict(&mut pool, usize::MAX);
    assert_eq!((radix.blocks(), pool.stats().bytes_used), (0, 0));
}

#[test]
fn blocks_that_were_computed_again_do_not_hold_the_cached_ones_fast() {
    let (mut pool, mut radix) = (full(8), Radix::new());
    let tokens = prompt(0, 4);
    cached(&mut pool, &mut radix, &tokens[..64]);
    // Two blocks again and two more, which hang below the cached ones.
    let mut again = SeqKv::new(SHAPE);
    pool.reserve(&mut again, 128).unwrap();
    again.commit(128);
    radix.insert(&mut pool, &tokens, 0, &again);
    assert_eq!((radix.blocks(), pool.free_bytes()), (4, 2 * SHAPE.page_bytes()));
    radix.evict(&mut pool, 4 * SHAPE.page_bytes());
    assert_eq!((radix.blocks(), pool.free_bytes()), (0, 4 * SHAPE.page_bytes()));
    // Where all is held nothing would come of it.
    radix.insert(&mut pool, &tokens, 0, &again);
    radix.evict(&mut pool, usize::MAX);
    assert_eq!(radix.matched(&tokens, 0), 128);
    radix.pin(&tokens[..64], 0);
    pool.release(again);
    radix.evict(&mut pool, usize::MAX);
    assert_eq!(radix.matched(&tokens, 0), 64, "pins hold");
}

fn full(blocks: usize) -> Pool {
    Pool::new(SHAPE, blocks * SHAPE.page_bytes())
}

fn prompt(first: u32, blocks: u32) -> Vec<u32> {
    (first..first + blocks * PAGE_ROWS as u32).collect()
}

#[test]
fn an_old_chain_goes_whole_before_the_end_of_a_new_one() {
    let (mut pool, mut radix) = (full(8), Radix::new());
    let (old, new) = (prompt(0, 4), prompt(1000, 4));
    cached(&mut pool, &mut radix, &old);
    cached(&mut pool, &mut radix, &new);
    radix.evict(&mut pool, 3 * SHAPE.page_bytes());
    assert_eq!((radix.matched(&old, 0), radix.matched(&new, 0)), (32, 128));
}

#[test]
fn of_two_blocks_used_alike_the_dearer_one_stays() {
    let cost = RecomputeCost {
        token: 100.0,
        key: 1.0,
    };
    let (mut pool, mut radix) = (full(16), Radix::named(Fingerprint::default(), cost));
    let (long, short) = (prompt(0, 8), prompt(1000, 1));
    cached(&mut pool, &mut radix, &long);
    cached(&mut pool, &mut radix, &short);
    // One tick older, but 224 keys to attend to.
    radix.evict(&mut pool, 8 * SHAPE.page_bytes());
    assert_eq!((radix.matched(&long, 0), radix.matched(&short, 0)), (256, 0));
}

#[test]
fn what_nobody_uses_expires_and_every_use_prolongs() {
    let (mut pool, mut radix) = (full(16), Radix::new());
    let minutes = |n| Some(Duration::from_mins(n));
    let keep = |ttl| Keep {
        ttl,
        ..Keep::default()
    };
    let insert = |radix: &mut Radix, pool: &mut Pool, tokens: &[u32], keep| {
        let mut seq = SeqKv::new(SHAPE);
        pool.reserve(&mut seq, tokens.len()).unwrap();
        seq.commit(tokens.len());
        radix.insert_kept(pool, tokens, 0, &seq, keep);
        pool.release(seq);
    };
    let (a, b) = (prompt(0, 2), prompt(1000, 2));
    insert(&mut radix, &mut pool, &a, keep(minutes(5)));
    insert(&mut radix, &mut pool, &b, keep(minutes(5)));
    radix.advance(Duration::from_mins(4));
    let held = radix.lookup(&mut pool, &a, 0);
    radix.advance(Duration::from_mins(4));
    assert_eq!((radix.matched(&a, 0), radix.matched(&b, 0)), (64, 0));
    // Somebody wants half of it for longer.
    insert(&mut radix, &mut pool, &a[..32], keep(minutes(60)));
    radix.advance(Duration::from_mins(6));
    radix.expire(&mut pool);
    assert_eq!((radix.matched(&a, 0), radix.blocks()), (32, 1));
    // A reader keeps its pages, whatever the tree forgets, and what has expired can come again.
    assert_eq!(held.len(), 64);
    radix.advance(Duration::from_mins(61));
    insert(&mut radix, &mut pool, &a, keep(None));
    radix.advance(Duration::from_hours(1000));
    assert_eq!(radix.matched(&a, 0), 64);
    pool.release(held);
    radix.clear(&mut pool);
    assert_eq!(pool.stats().bytes_used, 0);
}

#[test]
fn pinned_blocks_stay_until_the_last_pin_is_gone() {
    let (mut pool, mut radix) = (full(8), Radix::new());
    let (a, b) = (prompt(0, 2), prompt(1000, 2));
    cached(&mut pool, &mut radix, &a);
    cached(&mut pool, &mut radix, &b);
    assert_eq!(radix.pin(&a, 0), 64);
    assert_eq!((radix.pin(&a[..32], 0), radix.pinned()), (32, 2));
    radix.evict(&mut pool, usize::MAX);
    assert_eq!((radix.matched(&a, 0), radix.matched(&b, 0)), (64, 0));
    assert_eq!((radix.unpin(&a, 0), radix.pinned()), (64, 1));
    radix.evict(&mut pool, usize::MAX);
    assert_eq!(radix.matched(&a, 0), 32);
    assert_eq!((radix.unpin(&a, 0), radix.unpin(&a, 0)), (32, 0));
    radix.evict(&mut pool, usize::MAX);
    assert_eq!((radix.blocks(), radix.pinned()), (0, 0));
}

#[test]
fn a_mark_outweighs_a_little_age() {
    let (mut pool, mut radix) = (full(8), Radix::new());
    let marked = prompt(0, 1);
    let mut seq = SeqKv::new(SHAPE);
    pool.reserve(&mut seq, 32).unwrap();
    seq.commit(32);
    let keep = Keep {
        marked: 1,
        ..Keep::default()
    };
    radix.insert_kept(&mut pool, &marked, 0, &seq, keep);
    pool.release(seq);
    for n in 1..=3 {
        cached(&mut pool, &mut radix, &prompt(n * 1000, 1));
    }
    radix.evict(&mut pool, 6 * SHAPE.page_bytes());
    assert_eq!(radix.matched(&marked, 0), 32);
}

#[test]
fn fresh_blocks_are_offered_once_parents_first_and_those_of_the_memory_alone_never() {
    let (mut pool, mut radix) = (full(8), Radix::new());
    radix.track();
    let a = prompt(0, 3);
    cached(&mut pool, &mut radix, &a);
    let mut seen = Vec::new();
    radix.offer(|name, _| {
        seen.push((name.parent, name.key()));
        seen.len() < 3 // the third is refused
    });
    radix.offer(|name, _| {
        seen.push((name.parent, name.key()));
        true
    });
    let root = Fingerprint::default().root(0);
    assert_eq!(seen[0].0, root);
    assert_eq!(seen[1].0, seen[0].1);
    assert_eq!((seen.len(), seen[2] == seen[3], radix.unoffered()), (4, true, 0));
    assert_eq!(radix.matched_to(&a, 0), (96, seen[3].1));
    let mut seq = radix.lookup(&mut pool, &a, 0);
    pool.reserve(&mut seq, 32).unwrap();
    seq.commit(32);
    let keep = Keep {
        ram_only: true,
        ..Keep::default()
    };
    radix.insert_kept(&mut pool, &prompt(0, 4), 0, &seq, keep);
    pool.release(seq);
    let mut left = 0;
    radix.offer(|_, _| unreachable!("it stays in memory"));
    radix.evict_to(&mut pool, |_, blocks| blocks == 0, |_, _, _| left += 1);
    assert_eq!(left, 3);
}
