//! Whoever reads shared rows reads the same ones while others who share them are cut, rolled back, ended, or evicted from the tree
//! (the paper notes on kvpress, section 9.9: concurrent readers under eviction). Steps of an engine come one after the other, so any
//! interleaving of them is a sequence of the operations below.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::sync::Arc;

use antefix_kv::{
    Context, Edit, Fold, Group, HeadEdit, Kind, KvDtype, KvShape, LayerEdit, PageId, Policy, Pool, Radix,
    SegRef, Segment, SeqKv, SeqState,
};

const SHAPE: KvShape = KvShape {
    layers: 2,
    kv_heads: 2,
    dim: 16,
    dtype: KvDtype::F32,
};
const RUNS: usize = SHAPE.layers * SHAPE.kv_heads;
/// Tokens with which all sequences begin.
const SHARED: u32 = 96;
const PAGE: usize = 32;

/// Numbers out of a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((self.0 >> 33) % n.max(1) as u64) as usize
    }
}

/// What is stored for a token in a run: it tells both.
fn value(token: u32, run: usize) -> f32 {
    (token * RUNS as u32 + run as u32) as f32
}

fn write(pool: &mut Pool, seq: &mut SeqKv, tokens: &[u32]) {
    for &token in tokens {
        for layer in 0..SHAPE.layers {
            let heads = (0..SHAPE.kv_heads).map(|head| value(token, layer * SHAPE.kv_heads + head));
            let row: Vec<f32> = heads.flat_map(|x| [x; SHAPE.dim]).collect();
            pool.write(seq, layer, seq.len(), &row, &row);
        }
        seq.commit(1);
    }
}

fn stored(pool: &Pool, (page, row): (PageId, usize)) -> f32 {
    let page = pool.page(page);
    let x = page.key(SHAPE.dim, row, 5);
    assert_eq!(x, page.value(SHAPE.dim, row, 11));
    x
}

/// A sequence, and its rows as a plain list would have them.
struct Reader {
    state: SeqState,
    tokens: Vec<u32>,
    /// `[L * Hk]`: position and token of each row.
    rows: Vec<Vec<(u32, u32)>>,
}

impl Reader {
    fn new(state: SeqState, tokens: Vec<u32>) -> Self {
        let row = |(i, &t): (usize, &u32)| (i as u32, t);
        let rows = vec![tokens.iter().enumerate().map(row).collect(); RUNS];
        Self { state, tokens, rows }
    }

    fn append(&mut self, pool: &mut Pool, n: usize, next: &mut u32) -> bool {
        if pool.reserve(&mut self.state.tail, n).is_err() {
            return false;
        }
        for _ in 0..n {
            let at = self.state.next_pos();
            let common = at < SHARED && self.tokens.iter().enumerate().all(|(i, &t)| i as u32 == t);
            let token = if common { at } else { *next };
            *next += u32::from(!common);
            write(pool, &mut self.state.tail, &[token]);
            self.tokens.push(token);
            self.rows.iter_mut().for_each(|rows| rows.push((at, token)));
        }
        true
    }

    /// Drops random rows of some heads. Returns whether rows went that somebody else holds, too.
    fn cut(&mut self, pool: &mut Pool, dice: &mut Dice) -> bool {
        let shared = (0..RUNS).any(|run| {
            let rows = self.state.own_rows(run / SHAPE.kv_heads, run % SHAPE.kv_heads);
            rows.iter().any(|r| pool.owners(r.place.0) > 1)
        });
        let mut kept = self.rows.clone();
        let mut layers = Vec::new();
        for layer in 0..SHAPE.layers {
            if dice.below(4) == 0 {
                layers.push(LayerEdit::KeepAll);
                continue;
            }
            let one_in = 1 + dice.below(5);
            let heads = (0..SHAPE.kv_heads).map(|head| {
                let rows = &mut kept[layer * SHAPE.kv_heads + head];
                let keep: Vec<u32> = (0..rows.len() as u32)
                    .filter(|_| dice.below(one_in) == 0)
                    .collect();
                *rows = keep.iter().map(|&k| rows[k as usize]).collect();
                HeadEdit {
                    keep,
                    fold: Fold::Drop,
                }
            });
            layers.push(LayerEdit::Heads(heads.collect()));
        }
        let edit = Edit {
            policy: Policy::new("test"),
            layers,
        };
        let done = self.state.apply(pool, &edit).is_ok();
        if done {
            self.rows = kept;
        }
        done && shared
    }

    fn truncate(&mut self, pool: &mut Pool, to: u32) {
        let next = self.state.truncate(pool, to);
        self.tokens.truncate(next as usize);
        self.rows.iter_mut().for_each(|rows| rows.retain(|r| r.0 < next));
    }

    fn check(&self, pool: &Pool, what: &str) {
        for (run, want) in self.rows.iter().enumerate() {
            let got = self.state.own_rows(run / SHAPE.kv_heads, run % SHAPE.kv_heads);
            let got: Vec<_> = got.iter().map(|r| (r.position, stored(pool, r.place))).collect();
            let want: Vec<_> = want.iter().map(|&(pos, t)| (pos, value(t, run))).collect();
            assert!(got == want, "{what}: run {run} reads {got:?} for {want:?}");
        }
    }
}

/// A document that some sequences read besides their own rows.
fn document(pool: &mut Pool) -> Arc<Segment> {
    let mut seq = SeqKv::new(SHAPE);
    pool.reserve(&mut seq, 40).unwrap();
    write(pool, &mut seq, &(5000..5040).collect::<Vec<_>>());
    Segment::of_tail(pool, seq, 0, Vec::new(), Kind::Exact)
}

fn check_document(pool: &Pool, segment: &Segment) {
    for run in 0..RUNS {
        let head = segment.run(run / SHAPE.kv_heads, run % SHAPE.kv_heads);
        for row in 0..head.len() {
            let place = (head.page_ids()[row / PAGE], row % PAGE);
            assert_eq!(stored(pool, place), value(5000 + row as u32, run));
        }
    }
}

#[test]
fn shared_rows_stay_while_those_who_share_them_are_cut_ended_and_evicted() {
    let (mut shared_cuts, mut evicted) = (0, 0);
    for seed in 0..150 {
        let mut dice = Dice(seed * 7919 + 1);
        let mut pool = Pool::new(SHAPE, 24 * SHAPE.block_bytes());
        let mut radix = Radix::new();
        let held = document(&mut pool);
        let mut readers: Vec<Reader> = Vec::new();
        let mut next = 1000;
        for step in 0..120 {
            let at = dice.below(readers.len());
            let what = match dice.below(if readers.is_empty() { 1 } else { 9 }) {
                0 if readers.len() < 6 => {
                    let prompt: Vec<u32> = (0..SHARED).collect();
                    let tail = radix.lookup(&mut pool, &prompt, 0);
                    let tokens = prompt[..tail.len()].to_vec();
                    let mut context = Context::default();
                    if dice.below(2) == 0 {
                        let refs = vec![SegRef::at(held.clone(), 7)];
                        context.groups.push(Group {
                            temperature: 0.9,
                            ..Group::plain(refs)
                        });
                    }
                    let state = SeqState {
                        tail,
                        context,
                        ..SeqState::new(SHAPE)
                    };
                    readers.push(Reader::new(state, tokens));
                    "start"
                }
                1 | 2 => {
                    let n = 1 + dice.below(50);
                    readers[at].append(&mut pool, n, &mut next);
                    "append"
                }
                3 | 4 => {
                    shared_cuts += u32::from(readers[at].cut(&mut pool, &mut dice));
                    "cut"
                }
                5 => {
                    let to = dice.below(140) as u32;
                    readers[at].truncate(&mut pool, to);
                    "truncate"
                }
                6 => {
                    if let Ok(state) = readers[at].state.fork(&mut pool) {
                        let (tokens, rows) = (readers[at].tokens.clone(), readers[at].rows.clone());
                        readers.push(Reader { state, tokens, rows });
                    }
                    "fork"
                }
                7 => {
                    if let Some(exact) = readers[at].state.exact() {
                        radix.insert(&mut pool, &readers[at].tokens, 0, exact);
                    }
                    if dice.below(2) == 0 {
                        readers.swap_remove(at).state.release(&mut pool);
                    }
                    "end"
                }
                _ => {
                    let before = radix.blocks();
                    radix.evict(&mut pool, (1 + dice.below(24)) * SHAPE.block_bytes());
                    evicted += before - radix.blocks();
                    "evict"
                }
            };
            let what = format!("seed {seed}, step {step}, {what}");
            readers.iter().for_each(|r| r.check(&pool, &what));
            check_document(&pool, &held);
        }
        readers.into_iter().for_each(|r| r.state.release(&mut pool));
        radix.clear(&mut pool);
        held.release(&mut pool);
        assert_eq!(pool.stats().bytes_used, 0, "seed {seed}: a page is lost");
    }
    assert!(
        shared_cuts > 100 && evicted > 30,
        "{shared_cuts} cuts of shared rows and {evicted} evicted blocks: too easy"
    );
}
