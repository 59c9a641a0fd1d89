//! Contexts against softmax written out in f64, and the laws of kvpress section 9.9.

use std::sync::Arc;

use antefix_kernels::ops::RopeStyle;
use antefix_kv::{
    Edit, Fold as FoldRows, Group, HeadEdit, Kind, KvDtype, KvShape, LayerEdit, Policy, SegmentBuilder,
    SeqState,
};
use proptest::prelude::*;

use super::*;
use crate::{Extra, Scratch, SeqRows, Sharing, attend};

const HEADS: usize = 6;
const HK: usize = 2;
const D: usize = 16;
const SHAPE: KvShape = KvShape {
    layers: 1,
    kv_heads: HK,
    dim: D,
    dtype: KvDtype::F32,
};
const PLAIN: Geometry = Geometry {
    heads: HEADS,
    kv_heads: HK,
    dim: D,
    scale: 0.25,
    softcap: None,
    window: None,
};

fn frequencies() -> Vec<f32> {
    (0..D / 2)
        .map(|i| 1e4f32.powf(-2.0 * i as f32 / D as f32))
        .collect()
}

fn rope() -> Rope {
    Rope::new(&frequencies(), RopeStyle::Neox)
}

/// Numbers in [-1, 1) out of a seed.
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Self {
        let mut noise = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            noise.next();
        }
        noise
    }

    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn row(&mut self) -> Vec<f32> {
        (0..D).map(|_| self.next() * 2.0).collect()
    }

    /// A number in `[0, n)`.
    fn below(&mut self, n: usize) -> usize {
        ((self.next() + 1.0) * 0.5 * n as f32) as usize % n.max(1)
    }
}

/// A key before rotation, where it stands for its reader, its log-weight, and whether it is seen wherever the query stands.
#[derive(Clone)]
struct Key {
    k: Vec<f32>,
    v: Vec<f32>,
    position: i64,
    bias: f32,
    always: bool,
}

/// A group as the formula sees it: keys of each KV head.
struct NaiveGroup {
    temperature: f64,
    lse_scale: f64,
    keys: [Vec<Key>; HK],
}

fn turned(x: &[f32], by: i64) -> Vec<f64> {
    let half = D / 2;
    let mut out = vec![0.0; D];
    for (i, f) in frequencies().into_iter().enumerate() {
        let (sin, cos) = (by as f64 * f64::from(f)).sin_cos();
        let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
        (out[i], out[i + half]) = (a * cos - b * sin, a * sin + b * cos);
    }
    out
}

/// Output of one query head: merge of the groups' softmaxes, written out.
fn naive(geometry: &Geometry, q: &[f32], pos: u32, head: usize, groups: &[NaiveGroup]) -> Vec<f64> {
    let q = turned(q, i64::from(pos));
    let mut parts: Vec<(f64, Vec<f64>)> = Vec::new();
    for group in groups {
        let mut scored: Vec<(f64, &[f32])> = Vec::new();
        for key in &group.keys[head / (HEADS / HK)] {
            let behind = i64::from(pos) - key.position;
            let inside = behind >= 0 && geometry.window.is_none_or(|w| behind < i64::from(w));
            if !inside && !key.always {
                continue;
            }
            let k = turned(&key.k, key.position);
            let mut s = f64::from(geometry.scale) * q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>();
            if let Some(cap) = geometry.softcap.map(f64::from) {
                s = cap * (s / cap).tanh();
            }
            scored.push((s / group.temperature + f64::from(key.bias), &key.v));
        }
        let top = scored.iter().map(|s| s.0).fold(f64::NEG_INFINITY, f64::max);
        if top == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = scored.iter().map(|s| (s.0 - top).exp()).sum();
        let out = (0..D)
            .map(|d| {
                scored
                    .iter()
                    .map(|(s, v)| (s - top).exp() * f64::from(v[d]))
                    .sum::<f64>()
                    / sum
            })
            .collect();
        parts.push((group.lse_scale * (top + sum.ln()), out));
    }
    let top = parts.iter().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = parts.iter().map(|p| (p.0 - top).exp()).sum();
    (0..D)
        .map(|d| parts.iter().map(|(l, o)| (l - top).exp() * o[d]).sum::<f64>() / sum)
        .collect()
}

/// A pool, the rotation, and what is needed to write keys that both sides know.
struct World {
    pool: Pool,
    rope: Rope,
    noise: Noise,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            pool: Pool::new(SHAPE, 1 << 26),
            rope: rope(),
            noise: Noise::new(seed),
        }
    }

    fn key(&mut self, position: i64, bias: f32, always: bool) -> Key {
        Key {
            k: self.noise.row(),
            v: self.noise.row(),
            position,
            bias,
            always,
        }
    }

    /// A segment with these keys, whose positions are those of its frame.
    fn segment(&mut self, heads: &[Vec<Key>; HK]) -> Arc<Segment> {
        let mut builder = SegmentBuilder::new(SHAPE);
        let sizes = [heads[0].len(), heads[1].len()];
        builder.reserve_heads(&mut self.pool, 0, &sizes).unwrap();
        for (head, keys) in heads.iter().enumerate() {
            for key in keys {
                let mut k = key.k.clone();
                self.rope.apply(&mut k, D, key.position as u32);
                builder.push(
                    &mut self.pool,
                    (0, head),
                    (key.position as u32, key.bias),
                    &k,
                    &key.v,
                );
            }
        }
        builder.seal(&mut self.pool, Vec::new(), Kind::Approx(Policy::new("test")))
    }

    /// Appends keys at the next positions of a tail and returns them.
    fn append(&mut self, state: &mut SeqState, n: usize) -> [Vec<Key>; HK] {
        let from = i64::from(state.next_pos());
        let mut make = || {
            (0..n as i64)
                .map(|i| self.key(from + i, 0.0, false))
                .collect::<Vec<_>>()
        };
        let heads = [make(), make()];
        self.write(state, &heads);
        heads
    }

    fn write(&mut self, state: &mut SeqState, heads: &[Vec<Key>; HK]) {
        let n = heads[0].len();
        self.pool.reserve(&mut state.tail, n).unwrap();
        for i in 0..n {
            let (mut k, mut v) = (Vec::new(), Vec::new());
            for keys in heads {
                let mut row = keys[i].k.clone();
                self.rope.apply(&mut row, D, keys[i].position as u32);
                k.extend(row);
                v.extend(&keys[i].v);
            }
            self.pool.write(&state.tail, 0, state.tail.len(), &k, &v);
            state.tail.commit(1);
        }
    }

    /// A random reference, and its keys as its reader sees them.
    fn reference(&mut self) -> (SegRef, [Vec<Key>; HK]) {
        let most = if self.noise.below(8) == 0 { 1200 } else { 90 };
        let (affine, biased, always) = (
            self.noise.below(2) == 0,
            self.noise.below(3) == 0,
            self.noise.below(5) == 0,
        );
        let heads: [Vec<Key>; HK] = std::array::from_fn(|_| {
            let mut position = self.noise.below(20) as i64;
            (0..self.noise.below(most))
                .map(|_| {
                    position += if affine { 1 } else { self.noise.below(4) as i64 };
                    let bias = match biased && self.noise.below(6) == 0 {
                        true => self.noise.next() * 3.0,
                        false => 0.0,
                    };
                    self.key(position, bias, always)
                })
                .collect()
        });
        let mut r = SegRef::new(self.segment(&heads));
        r.delta = self.noise.below(60) as i32 - 30;
        if always {
            r.rule = Rule::AllVisible;
        }
        let mut seen = heads;
        if self.noise.below(2) == 0 {
            let mut hidden = Hidden::none(1);
            let rows = seen[0].len().max(seen[1].len());
            let gone: Vec<bool> = (0..rows).map(|_| self.noise.below(5) == 0).collect();
            (0..rows).filter(|&i| gone[i]).for_each(|i| hidden.hide(0, i));
            for keys in &mut seen {
                let mut i = 0;
                keys.retain(|_| {
                    i += 1;
                    !gone[i - 1]
                });
            }
            r.hidden = Some(Arc::new(hidden));
        }
        let move_by = i64::from(r.delta);
        seen.iter_mut().flatten().for_each(|k| k.position += move_by);
        (r, seen)
    }

    /// A random context with its groups written out.
    fn context(&mut self) -> (Context, Vec<NaiveGroup>) {
        let (mut context, mut naive) = (Context::default(), Vec::new());
        for _ in 0..self.noise.below(4) {
            let plain = self.noise.below(2) == 0;
            let mut knob = || {
                if plain {
                    1.0
                } else {
                    0.75 + self.noise.next() * 0.45
                }
            };
            let (temperature, lse_scale) = (knob(), knob());
            let mut group = Group {
                temperature,
                lse_scale,
                refs: Vec::new(),
            };
            let mut keys: [Vec<Key>; HK] = Default::default();
            for _ in 0..self.noise.below(4) {
                let (r, seen) = self.reference();
                group.refs.push(r);
                keys.iter_mut().zip(seen).for_each(|(all, more)| all.extend(more));
            }
            context.groups.push(group);
            naive.push(NaiveGroup {
                temperature: f64::from(temperature),
                lse_scale: f64::from(lse_scale),
                keys,
            });
        }
        (context, naive)
    }
}

/// The last `rows` rows of each sequence attend together. Queries are made from the seed of the sequence and the position.
fn run(
    world: &World,
    geometry: &Geometry,
    threads: usize,
    seqs: &[(&SeqState, usize, u64)],
) -> Vec<Vec<f32>> {
    let (mut rows, mut q) = (Vec::new(), Vec::new());
    let mut first = 0;
    for &(state, n, seed) in seqs {
        let pos0 = (state.tail.len() - n) as u32;
        rows.push(SeqRows {
            kv: &state.tail,
            first,
            rows: n,
            pos0,
            extra: Extra::of(state),
        });
        first += n;
        for i in 0..n as u32 {
            let pos = state.base + pos0 + i;
            let mut row = query(seed, pos);
            world.rope.apply(&mut row, D, pos);
            q.extend(row);
        }
    }
    let mut out = vec![f32::NAN; q.len()];
    attend(
        (Cpu::from_env().unwrap(), &Team::new(threads)),
        &world.pool,
        (0, &world.rope),
        geometry,
        (&rows, &Sharing::of(&rows)),
        &q,
        &mut out,
        &mut Scratch::default(),
    )
    .unwrap();
    out.chunks(HEADS * D).map(<[f32]>::to_vec).collect()
}

fn query(seed: u64, pos: u32) -> Vec<f32> {
    let mut noise = Noise::new(seed * 7919 + u64::from(pos));
    (0..HEADS * D).map(|_| noise.next() * 2.0).collect()
}

fn assert_naive(world: &World, geometry: &Geometry, state: &SeqState, n: usize, groups: &[NaiveGroup]) {
    let got = run(world, geometry, 2, &[(state, n, 5)]);
    for (i, got) in got.iter().enumerate() {
        let pos = state.next_pos() - (n - i) as u32;
        let q = query(5, pos);
        for head in 0..HEADS {
            let want = naive(geometry, &q[head * D..][..D], pos, head, groups);
            for (d, want) in want.iter().enumerate() {
                let got = got[head * D + d];
                assert!(
                    (f64::from(got) - want).abs() < 2e-5,
                    "row {i}, head {head}, dimension {d}: {got} against {want}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_context_is_softmax_written_out(
        seed in any::<u64>(),
        tail in 1usize..70,
        rows in 1usize..30,
        base in 0u32..200,
        cap in prop::option::of(3.0f32..20.0),
        window in prop::option::of(20u32..80),
    ) {
        let geometry = Geometry { softcap: cap, window, ..PLAIN };
        let mut world = World::new(seed);
        let (context, mut groups) = world.context();
        let mut state = SeqState { base, context, ..SeqState::new(SHAPE) };
        let keys = world.append(&mut state, tail);
        groups.push(NaiveGroup { temperature: 1.0, lse_scale: 1.0, keys });
        assert_naive(&world, &geometry, &state, rows.min(tail), &groups);
        state.release(&mut world.pool);
        prop_assert_eq!(world.pool.stats().bytes_used, 0);
    }

    #[test]
    fn what_a_row_gets_does_not_depend_on_the_batch(seed in any::<u64>(), window in prop::option::of(20u32..80)) {
        let geometry = Geometry { window, ..PLAIN };
        let mut world = World::new(seed);
        let (context, _) = world.context();
        let mut states = Vec::new();
        for (i, rows) in [40, 3, 1, 9].into_iter().enumerate() {
            let mut context = context.clone();
            // The same segments at other places.
            context.groups.iter_mut().flat_map(|g| &mut g.refs).for_each(|r| r.delta += i as i32 % 3);
            let mut state = SeqState { base: 50 + i as u32, context, ..SeqState::new(SHAPE) };
            let _keys = world.append(&mut state, rows + 5);
            states.push((state, rows));
        }
        let batch: Vec<_> = states.iter().zip(1..).map(|((s, n), seed)| (s, *n, seed)).collect();
        let together = run(&world, &geometry, 3, &batch);
        let mut at = 0;
        for &(state, n, seed) in &batch {
            let alone = run(&world, &geometry, 1, &[(state, n, seed)]);
            prop_assert_eq!(&together[at..at + n], &alone[..]);
            at += n;
            // The last row by itself: a long sequence walks blocks, a short one the shared items.
            let last = run(&world, &geometry, 1, &[(state, 1, seed)]);
            prop_assert_eq!(&last[0], &alone[n - 1]);
        }
        context.release(&mut world.pool);
        states.into_iter().for_each(|(s, _)| s.release(&mut world.pool));
        prop_assert_eq!(world.pool.stats().bytes_used, 0);
    }

    /// Any split of the rows into segments, groups and tail is dense attention, whatever their frames.
    #[test]
    fn any_split_is_dense(seed in any::<u64>(), n in 40usize..1300, cuts in prop::collection::vec(0.0f64..1.0, 0..5)) {
        let mut world = World::new(seed);
        let mut dense = SeqState::new(SHAPE);
        let keys = world.append(&mut dense, n);
        let mut at: Vec<usize> = cuts.iter().map(|c| (c * (n - 1) as f64) as usize).collect();
        at.sort_unstable();
        let mut split = SeqState::new(SHAPE);
        let mut from = 0;
        for (i, to) in at.into_iter().enumerate() {
            let mut piece = keys.clone().map(|k| k[from..to].to_vec());
            let delta = if i % 2 == 0 { from as i32 } else { from as i32 - 17 };
            piece.iter_mut().flatten().for_each(|k| k.position -= i64::from(delta));
            let r = SegRef::at(world.segment(&piece), delta);
            match split.context.groups.last_mut() {
                Some(group) if i % 3 != 0 => group.refs.push(r),
                _ => split.context.groups.push(Group::plain(vec![r])),
            }
            from = to;
        }
        split.base = from as u32;
        world.write(&mut split, &keys.map(|k| k[from..].to_vec()));
        let rows = 20.min(n - from);
        let want = run(&world, &PLAIN, 2, &[(&dense, rows, 3)]);
        let got = run(&world, &PLAIN, 2, &[(&split, rows, 3)]);
        for (a, b) in got.iter().flatten().zip(want.iter().flatten()) {
            prop_assert!((a - b).abs() < 1e-5, "{} {}", a, b);
        }
        dense.release(&mut world.pool);
        split.release(&mut world.pool);
    }
}

#[test]
fn hidden_rows_and_an_overlay_are_a_rewritten_run() {
    let mut world = World::new(11);
    let mut make = |n: i64| (0..n).map(|i| world.key(i, 0.0, false)).collect::<Vec<_>>();
    let (old, new) = ([make(100), make(100)], [make(100), make(100)]);
    let replaced = |i: usize| i % 7 == 3 || (40..60).contains(&i);
    let mut rewritten = old.clone();
    let mut hidden = Hidden::none(1);
    for i in (0..100).filter(|&i| replaced(i)) {
        hidden.hide(0, i);
        (0..HK).for_each(|h| rewritten[h][i] = new[h][i].clone());
    }
    let overlay = new.map(|k| {
        k.into_iter()
            .enumerate()
            .filter(|(i, _)| replaced(*i))
            .map(|k| k.1)
            .collect()
    });
    let mut chunk = SegRef::new(world.segment(&old));
    chunk.hidden = Some(Arc::new(hidden));
    let mut masked = SeqState::new(SHAPE);
    let refs = vec![chunk, SegRef::new(world.segment(&overlay))];
    masked.context.groups.push(Group::plain(refs));
    let mut whole = SeqState::new(SHAPE);
    let refs = vec![SegRef::new(world.segment(&rewritten))];
    whole.context.groups.push(Group::plain(refs));
    (masked.base, whole.base) = (100, 100);
    let tail = world.append(&mut masked, 3);
    world.write(&mut whole, &tail);
    let want = run(&world, &PLAIN, 1, &[(&whole, 3, 9)]);
    let got = run(&world, &PLAIN, 1, &[(&masked, 3, 9)]);
    for (a, b) in got.iter().flatten().zip(want.iter().flatten()) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn a_compacted_sequence_is_dense_attention_over_the_rows_that_stay() {
    let mut world = World::new(12);
    let mut state = SeqState::new(SHAPE);
    let mut keys = world.append(&mut state, 150);
    let keeps: [Vec<u32>; HK] = [
        (0..150).filter(|i| i % 3 != 1).collect(),
        vec![0, 1, 2, 77, 140, 149],
    ];
    let edit = Edit {
        policy: Policy::new("test"),
        layers: vec![LayerEdit::Heads(
            keeps
                .iter()
                .map(|keep| HeadEdit {
                    keep: keep.clone(),
                    fold: FoldRows::Drop,
                })
                .collect(),
        )],
    };
    state.apply(&mut world.pool, &edit).unwrap();
    for (keys, keep) in keys.iter_mut().zip(&keeps) {
        *keys = keep.iter().map(|&i| keys[i as usize].clone()).collect();
    }
    let more = world.append(&mut state, 4);
    keys.iter_mut().zip(more).for_each(|(k, more)| k.extend(more));
    let groups = [NaiveGroup {
        temperature: 1.0,
        lse_scale: 1.0,
        keys,
    }];
    for window in [None, Some(60)] {
        assert_naive(&world, &Geometry { window, ..PLAIN }, &state, 4, &groups);
    }
    state.release(&mut world.pool);
    assert_eq!(world.pool.stats().bytes_used, 0);
}

#[test]
fn folded_rows_that_were_alike_lose_nothing() {
    // All dropped keys and values are the same: their mean, counted by ln n, is exactly them (paper `razor_attention`, 6.1).
    let mut world = World::new(13);
    let mut state = SeqState::new(SHAPE);
    let mut keys = world.append(&mut state, 4);
    let mut same = world.key(0, 0.0, false);
    // Rows of equal post-rotation keys do not exist at different positions unless the key is zero where it turns.
    same.k.fill(0.0);
    let middle: Vec<Key> = (4..90)
        .map(|p| Key {
            position: p,
            ..same.clone()
        })
        .collect();
    world.write(&mut state, &[middle.clone(), middle.clone()]);
    let last = world.append(&mut state, 10);
    for (all, last) in keys.iter_mut().zip(last) {
        all.extend(middle.iter().cloned().chain(last));
    }
    let head = HeadEdit {
        keep: (0..4).chain(90..100).collect(),
        fold: FoldRows::LnCount,
    };
    let edit = Edit {
        policy: Policy::new("test"),
        layers: vec![LayerEdit::Heads(vec![head; HK])],
    };
    state.apply(&mut world.pool, &edit).unwrap();
    let more = world.append(&mut state, 2);
    keys.iter_mut().zip(more).for_each(|(k, more)| k.extend(more));
    let groups = [NaiveGroup {
        temperature: 1.0,
        lse_scale: 1.0,
        keys,
    }];
    assert_naive(&world, &PLAIN, &state, 2, &groups);
}

#[test]
fn rows_without_a_tail_attend_their_context_alone() {
    let mut world = World::new(14);
    let (r, keys) = loop {
        let (r, keys) = world.reference();
        // Something must be visible to the first row, or there is nothing to compare.
        if r.rule == Rule::AllVisible && keys.iter().all(|k| k.len() > 3) {
            break (r, keys);
        }
        r.segment.release(&mut world.pool);
    };
    let context = Context {
        groups: vec![Group::plain(vec![r])],
    };
    let positions = [3, 40, 41];
    let mut q = Vec::new();
    for &pos in &positions {
        let mut row = query(2, pos);
        world.rope.apply(&mut row, D, pos);
        q.extend(row);
    }
    let mut out = vec![f32::NAN; q.len()];
    let reader = Reader {
        context: &context,
        first: 0,
        positions: &positions,
    };
    let cpu = (Cpu::from_env().unwrap(), &Team::new(2));
    attend_context(
        cpu,
        &world.pool,
        (0, &world.rope),
        &PLAIN,
        &[reader],
        &q,
        &mut out,
    )
    .unwrap();
    let groups = [NaiveGroup {
        temperature: 1.0,
        lse_scale: 1.0,
        keys,
    }];
    for (i, &pos) in positions.iter().enumerate() {
        let q = query(2, pos);
        for head in 0..HEADS {
            let want = naive(&PLAIN, &q[head * D..][..D], pos, head, &groups);
            for (got, want) in out[(i * HEADS + head) * D..].iter().zip(want) {
                assert!((f64::from(*got) - want).abs() < 2e-5, "{got} {want}");
            }
        }
    }
    let short = attend_context(
        cpu,
        &world.pool,
        (0, &world.rope),
        &PLAIN,
        &[reader],
        &q[1..],
        &mut out,
    );
    assert!(matches!(short, Err(AttendError::Shape { what: "q", .. })));
    context.release(&mut world.pool);
}
