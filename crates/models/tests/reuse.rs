//! Chunks computed alone, prompts mended out of them (paper `cacheblend`, section 6.1), and cut caches, on tiny models in f32.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::path::Path;
use std::sync::Arc;

use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::ops;
use antefix_kernels::team::Team;
use antefix_kv::{
    Context, Edit, Group, Hidden, Kind, LayerEdit, Policy, Pool, SegRef, Segment, SeqKv, SeqState,
};
use antefix_models::decoder::{Blend, Blended, Deviation, Extra, Input, Model, Scratch};
use antefix_models::files::ModelFiles;
use antefix_models::gguf::Gguf;
use antefix_models::spec::{Arch, RopeStyle};
use antefix_models::testing::tiny_gguf;

const ARCHS: [Arch; 3] = [Arch::Llama, Arch::Qwen2, Arch::Gemma3];

struct Bench {
    model: Model,
    pool: Pool,
    scratch: Scratch,
}

impl Bench {
    fn new(arch: Arch) -> Self {
        let gguf = Gguf::parse(tiny_gguf(arch, 11)).unwrap();
        let files = ModelFiles::from_gguf(gguf, Path::new("tiny.gguf")).unwrap();
        let team = Arc::new(Team::new(2));
        let model = Model::load(files, Cpu::from_env().unwrap(), team, Precision::F32).unwrap();
        Self {
            pool: Pool::new(model.kv_shape(), 1 << 28),
            model,
            scratch: Scratch::default(),
        }
    }

    fn used(&self) -> usize {
        self.pool.stats().bytes_used
    }

    /// Logits of the last of `tokens`, behind a context or nothing.
    fn logits(&mut self, base: u32, context: Option<&Context>, tokens: &[u32]) -> Vec<f32> {
        let mut tail = SeqKv::new(self.pool.shape());
        self.pool.reserve(&mut tail, tokens.len()).unwrap();
        let extra = Extra {
            pos_base: base,
            context,
            ..Extra::default()
        };
        let logits = self.step(tokens, &tail, extra);
        self.pool.release(tail);
        logits
    }

    fn step(&mut self, tokens: &[u32], tail: &SeqKv, extra: Extra<'_>) -> Vec<f32> {
        let input = Input {
            tokens,
            kv: tail,
            logits: 1,
            drawn: false,
            extra,
        };
        let mut logits = Vec::new();
        self.model
            .forward(&mut self.pool, &[input], &mut self.scratch, &mut logits)
            .unwrap();
        logits
    }

    fn release(&mut self, refs: impl IntoIterator<Item = SegRef>) {
        for r in refs {
            r.segment.release(&mut self.pool);
        }
    }
}

/// Prefix, chunks and question of a prompt.
struct Prompt {
    prefix: Vec<u32>,
    chunks: Vec<Vec<u32>>,
    question: Vec<u32>,
}

impl Prompt {
    fn new(sizes: &[usize]) -> Self {
        let text = |n: usize, seed: usize| (0..n).map(|i| ((i * 37 + seed * 101) % 250) as u32).collect();
        Self {
            prefix: text(9, 1),
            chunks: sizes.iter().enumerate().map(|(i, &n)| text(n, i + 2)).collect(),
            question: text(7, 99),
        }
    }

    fn all(&self) -> Vec<u32> {
        [&self.prefix[..], &self.chunks.concat(), &self.question].concat()
    }

    fn base(&self) -> u32 {
        (self.all().len() - self.question.len()) as u32
    }

    /// The prefix and each chunk encoded behind it, at its place in this prompt.
    fn place(&self, bench: &mut Bench) -> (Vec<SegRef>, Vec<SegRef>) {
        let Bench { model, pool, scratch } = bench;
        let prefix = model.encode_prefix(pool, &self.prefix, scratch).unwrap();
        let texts: Vec<&[u32]> = self.chunks.iter().map(Vec::as_slice).collect();
        let made = model.encode_chunks(pool, &prefix, &texts, scratch).unwrap();
        let mut delta = 0;
        let mut chunks = Vec::new();
        for segment in made {
            let n = segment.tokens().len() as i32;
            chunks.push(SegRef::at(segment, delta));
            delta += n;
        }
        (vec![SegRef::new(prefix)], chunks)
    }

    fn blend(
        &self,
        bench: &mut Bench,
        (settled, chunks): (&[SegRef], &[SegRef]),
        keep: &[usize],
        deviation: Deviation,
    ) -> (Blended, SeqKv, Vec<f32>) {
        let mut tail = SeqKv::new(bench.pool.shape());
        bench.pool.reserve(&mut tail, self.question.len()).unwrap();
        let blend = Blend {
            settled,
            chunks,
            tokens: &self.question,
            tail: &tail,
            base: self.base(),
            logits: 1,
            keep,
            deviation,
            policy: &Policy::new("cacheblend"),
        };
        let mut logits = Vec::new();
        let done = bench
            .model
            .blend(&mut bench.pool, &blend, &mut bench.scratch, &mut logits)
            .unwrap();
        tail.commit(self.question.len());
        (done, tail, logits)
    }
}

fn assert_near(got: &[f32], want: &[f32], within: f32, what: &str) {
    let off = |(a, b): (&f32, &f32)| (a - b).abs();
    let worst = got.iter().zip(want).map(off).fold(0.0f32, f32::max);
    assert!(
        got.len() == want.len() && worst <= within,
        "{what}: off by {worst}"
    );
}

/// Rows of head 0 of a segment's layer as stored, with their positions.
fn rows(bench: &Bench, segment: &Segment, layer: usize) -> Vec<(u32, Vec<f32>)> {
    let run = segment.run(layer, 0);
    let dim = bench.pool.shape().dim;
    (0..run.len())
        .map(|i| {
            let page = bench.pool.page(run.page_ids()[i / 32]);
            let row = (0..dim).flat_map(|d| [page.key(dim, i % 32, d), page.value(dim, i % 32, d)]);
            (run.positions().at(i), row.collect())
        })
        .collect()
}

/// The rows that were computed again: the last reference of a mended context.
fn fresh(bench: &Bench, done: &Blended, layer: usize) -> Vec<(u32, Vec<f32>)> {
    let last = done.context.refs().last().unwrap();
    rows(bench, &last.segment, layer)
}

#[test]
fn a_chunk_right_behind_its_prefix_is_the_ordinary_prompt() {
    for arch in ARCHS {
        let mut bench = Bench::new(arch);
        let prompt = Prompt::new(&[70]);
        let want = bench.logits(0, None, &prompt.all());
        let (settled, chunks) = prompt.place(&mut bench);
        let context = Context {
            groups: vec![Group::plain(settled.iter().chain(&chunks).cloned().collect())],
        };
        let got = bench.logits(prompt.base(), Some(&context), &prompt.question);
        assert_near(&got, &want, 2e-4, "chunk behind its prefix");
        // Nothing was wrong with it, so mending any share of it changes nothing.
        let keep = vec![11; bench.model.spec().layers];
        let (done, tail, got) = prompt.blend(&mut bench, (&settled, &chunks), &keep, Deviation::Values);
        assert_near(&got, &want, 2e-4, "mended chunk behind its prefix");
        done.context.release(&mut bench.pool);
        bench.pool.release(tail);
        context.release(&mut bench.pool);
        bench.release(settled.into_iter().chain(chunks));
        assert_eq!(bench.used(), 0);
    }
}

#[test]
fn a_chunk_that_is_turned_to_its_place_has_the_first_layers_keys_of_that_place() {
    // Layer 0 knows nothing of what stands before a token: only angles differ, those of the layer's own base.
    for arch in ARCHS {
        let mut bench = Bench::new(arch);
        let prompt = Prompt::new(&[40, 33, 64]);
        let mut tail = SeqKv::new(bench.pool.shape());
        bench.pool.reserve(&mut tail, prompt.all().len()).unwrap();
        bench.step(&prompt.all(), &tail, Extra::default());
        tail.commit(prompt.all().len());
        let n = tail.len();
        let whole = Segment::of_tail(&mut bench.pool, tail, 0, prompt.all(), Kind::Exact);
        assert_eq!(whole.rows(), n);
        let (settled, chunks) = prompt.place(&mut bench);
        let spec = bench.model.spec();
        let rope = &spec.ropes[spec.layer_kinds[0].rope];
        let style = match rope.style {
            RopeStyle::Neox => ops::RopeStyle::Neox,
            RopeStyle::Interleaved => ops::RopeStyle::Interleaved,
        };
        let rope = ops::Rope::new(&rope.frequencies(), style);
        let want = rows(&bench, &whole, 0);
        let mut moved = 0.0f32;
        for chunk in &chunks {
            for (position, stored) in rows(&bench, &chunk.segment, 0) {
                let (mut key, value): (Vec<f32>, Vec<f32>) =
                    stored.chunks_exact(2).map(|kv| (kv[0], kv[1])).unzip();
                let before = key.clone();
                rope.turn(&mut key, spec.head_dim, chunk.delta);
                moved = key
                    .iter()
                    .zip(&before)
                    .map(|(a, b)| (a - b).abs())
                    .fold(moved, f32::max);
                let at = position as i32 + chunk.delta;
                let (_, want) = &want[at as usize];
                let (want_key, want_value): (Vec<f32>, Vec<f32>) =
                    want.chunks_exact(2).map(|kv| (kv[0], kv[1])).unzip();
                assert_near(&key, &want_key, 1e-5, "the turned key");
                assert_near(&value, &want_value, 1e-5, "the value");
            }
        }
        assert!(moved > 0.01, "{arch:?}: turning meant nothing");
        whole.release(&mut bench.pool);
        bench.release(settled.into_iter().chain(chunks));
        assert_eq!(bench.used(), 0);
    }
}

#[test]
fn mending_every_row_is_ordinary_prefill_for_any_order_of_chunks() {
    for arch in ARCHS {
        let mut bench = Bench::new(arch);
        for sizes in [[40, 33, 64], [64, 40, 33]] {
            let prompt = Prompt::new(&sizes);
            let want = bench.logits(0, None, &prompt.all());
            let (settled, chunks) = prompt.place(&mut bench);
            let keep = vec![usize::MAX; bench.model.spec().layers];
            let (done, tail, got) = prompt.blend(&mut bench, (&settled, &chunks), &keep, Deviation::Values);
            assert_near(&got, &want, 2e-4, "all rows");
            // And the next token, read out of the mended cache.
            let mut state = SeqState {
                tail,
                base: prompt.base(),
                before: prompt.base() as usize,
                context: done.context,
            };
            bench.pool.reserve(&mut state.tail, 1).unwrap();
            let got = bench.step(&[5], &state.tail, Extra::of(&state));
            let want = bench.logits(0, None, &[prompt.all(), vec![5]].concat());
            assert_near(&got, &want, 2e-4, "the token after");
            state.release(&mut bench.pool);
            bench.release(settled.into_iter().chain(chunks));
            assert_eq!(bench.used(), 0, "nothing is left behind");
        }
    }
}

#[test]
fn the_sets_are_nested_and_as_large_as_the_schedule_says() {
    let mut bench = Bench::new(Arch::Qwen2);
    let prompt = Prompt::new(&[50, 50]);
    let layers = bench.model.spec().layers;
    let (settled, chunks) = prompt.place(&mut bench);
    let stored = |bench: &Bench| -> Vec<_> { chunks.iter().map(|c| rows(bench, &c.segment, 1)).collect() };
    let before = stored(&bench);
    let keep: Vec<usize> = (0..layers).map(|l| 30usize.saturating_sub(7 * l)).collect();
    for deviation in [
        Deviation::Values,
        Deviation::Keys,
        Deviation::Both,
        Deviation::Random(3),
        Deviation::First,
    ] {
        let (done, tail, _) = prompt.blend(&mut bench, (&settled, &chunks), &keep, deviation);
        let question = prompt.question.len();
        assert_eq!(done.rows[0], question, "layer 0 computes no key of a chunk");
        assert_eq!(done.rows[1], question + 100, "layer 1 computes all of them");
        for l in 1..layers {
            let last = l + 1 == layers;
            assert_eq!(
                done.chosen[l].len(),
                if last { 0 } else { keep[l] },
                "{deviation:?}"
            );
            if l > 1 {
                assert_eq!(done.rows[l], question + done.chosen[l - 1].len());
                assert!(done.chosen[l].iter().all(|p| done.chosen[l - 1].contains(p)));
                let filled: Vec<u32> = fresh(&bench, &done, l).iter().map(|r| r.0).collect();
                assert_eq!(
                    filled,
                    done.chosen[l - 1],
                    "fresh rows stand where they were computed"
                );
            }
        }
        if deviation == Deviation::First {
            let first = (0..keep[1] as u32 / 2).flat_map(|i| [9 + i, 59 + i]);
            assert!(first.into_iter().all(|p| done.chosen[1].contains(&p)));
        }
        if deviation == Deviation::Values {
            // Brute force: the values in `rows` are the odd entries.
            let fresh = fresh(&bench, &done, 1);
            let old = before.iter().flatten();
            let mut off: Vec<(f32, u32)> = fresh
                .iter()
                .zip(old)
                .map(|(a, b)| {
                    let values = a.1.iter().zip(&b.1).skip(1).step_by(2);
                    (values.map(|(x, y)| (x - y) * (x - y)).sum::<f32>(), a.0)
                })
                .collect();
            off.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let mut want: Vec<u32> = off[..keep[1]].iter().map(|o| o.1).collect();
            want.sort_unstable();
            assert_eq!(done.chosen[1], want);
        }
        done.context.release(&mut bench.pool);
        bench.pool.release(tail);
    }
    assert_eq!(before, stored(&bench), "chunks are shared and never written");
    bench.release(settled.into_iter().chain(chunks));
    assert_eq!(bench.used(), 0);
}

#[test]
fn a_prompt_may_end_with_its_documents() {
    let mut bench = Bench::new(Arch::Qwen2);
    let mut prompt = Prompt::new(&[50, 20]);
    prompt.question.clear();
    let (settled, chunks) = prompt.place(&mut bench);
    for keep in [0, 5, 1000] {
        let keep = vec![keep; bench.model.spec().layers];
        let (done, tail, logits) = prompt.blend(&mut bench, (&settled, &chunks), &keep, Deviation::Values);
        assert!(logits.is_empty());
        assert_eq!((done.rows.len(), done.chosen.len()), (keep.len(), keep.len()));
        done.context.release(&mut bench.pool);
        bench.pool.release(tail);
    }
    bench.release(settled.into_iter().chain(chunks));
    assert_eq!(bench.used(), 0);
}

#[test]
fn no_row_sees_a_later_token() {
    // The official code aligns the causal mask of the gathered queries to the right: each sees hundreds of future keys (3.5 a).
    for arch in ARCHS {
        let mut bench = Bench::new(arch);
        let layers = bench.model.spec().layers;
        let run = |bench: &mut Bench, prompt: &Prompt| {
            let (settled, chunks) = prompt.place(bench);
            // A choice that does not depend on the tokens.
            let keep = vec![25; layers];
            let (done, tail, _) = prompt.blend(bench, (&settled, &chunks), &keep, Deviation::Random(1));
            let rows: Vec<_> = (1..layers).map(|l| fresh(bench, &done, l)).collect();
            done.context.release(&mut bench.pool);
            bench.pool.release(tail);
            bench.release(settled.into_iter().chain(chunks));
            rows
        };
        let mut prompt = Prompt::new(&[40, 40]);
        let before = run(&mut bench, &prompt);
        prompt.chunks[1][20] += 1;
        let after = run(&mut bench, &prompt);
        let changed = 9 + 40 + 20;
        for (before, after) in before.iter().zip(&after) {
            let mut later = false;
            for (a, b) in before.iter().zip(after) {
                assert_eq!(a.0, b.0);
                if a.0 < changed {
                    assert_eq!(a.1, b.1, "row {} saw token {changed}", a.0);
                } else {
                    later |= a.1 != b.1;
                }
            }
            assert!(later, "somebody sees the changed token");
        }
    }
}

#[test]
fn what_stands_beside_a_chunk_does_not_change_it() {
    let mut bench = Bench::new(Arch::Gemma3);
    let prompt = Prompt::new(&[40, 600, 33]);
    let (settled, together) = prompt.place(&mut bench);
    for (chunk, one) in prompt.chunks.iter().zip(&together) {
        let Bench { model, pool, scratch } = &mut bench;
        let alone = model
            .encode_chunks(pool, &settled[0].segment, &[chunk], scratch)
            .unwrap();
        assert_eq!(rows(&bench, &alone[0], 1), rows(&bench, &one.segment, 1));
        alone.into_iter().for_each(|s| s.release(&mut bench.pool));
    }
    bench.release(settled.into_iter().chain(together));
    assert_eq!(bench.used(), 0);
}

/// Rows that were really dropped are rows that nobody sees: the answer stands where it would, and reads the same ones (the notes on kvpress,
/// section 6; `compresskv`, section 6.1).
#[test]
fn a_cut_cache_is_the_whole_one_with_rows_hidden() {
    const N: usize = 150;
    for arch in ARCHS {
        let mut bench = Bench::new(arch);
        let layers = bench.model.spec().layers;
        let prompt: Vec<u32> = (0..N).map(|i| ((i * 37 + 101) % 250) as u32).collect();
        let mut tail = SeqKv::new(bench.pool.shape());
        bench.pool.reserve(&mut tail, N).unwrap();
        bench.step(&prompt, &tail, Extra::default());
        tail.commit(N);
        // In the second layer from the end everything stays.
        let stays = |layer: usize, row: usize| {
            layer + 2 == layers || row < 3 || row + 9 > N || (row * 7 + layer * 3).is_multiple_of(5)
        };
        let mut hidden = Hidden::none(layers);
        for (layer, row) in (0..layers).flat_map(|l| (0..N).map(move |r| (l, r))) {
            if !stays(layer, row) {
                hidden.hide(layer, row);
            }
        }
        let all = Segment::share(&mut bench.pool, &tail, N, 0, prompt.clone(), Kind::Exact);
        let mut seen = SegRef::new(all);
        seen.hidden = Some(Arc::new(hidden));
        let context = Context {
            groups: vec![Group::plain(vec![seen])],
        };
        let mut cut = SeqState {
            tail,
            ..SeqState::new(bench.pool.shape())
        };
        let rows = |layer: usize| (0..N as u32).filter(|&r| stays(layer, r as usize)).collect();
        let edit = Edit {
            policy: Policy::new("test"),
            layers: (0..layers).map(|l| LayerEdit::Rows(rows(l))).collect(),
        };
        cut.apply(&mut bench.pool, &edit).unwrap();
        assert_eq!(
            cut.next_pos() as usize,
            N,
            "the next token stands behind the whole prompt"
        );
        let answer = [5, 77, 31, 8, 120];
        let want = bench.logits(N as u32, Some(&context), &answer);
        let whole = bench.logits(0, None, &[&prompt[..], &answer].concat());
        bench.pool.reserve(&mut cut.tail, answer.len()).unwrap();
        let got = bench.step(&answer, &cut.tail, Extra::of(&cut));
        assert_near(
            &got,
            &want,
            1e-5,
            "rows that are gone against rows that are hidden",
        );
        let off = got.iter().zip(&whole).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f32::max) > 1e-3, "they meant nothing");
        cut.release(&mut bench.pool);
        context.release(&mut bench.pool);
        assert_eq!(bench.used(), 0);
    }
}
