//! Selective recompute: a prompt made of chunks that were computed alone is mended layer by layer (paper `cacheblend`, section 3.6).
//!
//! Layer 0's keys and values depend on the token alone and are never recomputed; its attention runs for every row, which gives all
//! rows their layer-1 input. From layer 1 on only some chunk rows go on: fresh keys and values replace the stored ones for the rows
//! that are still being computed, and those whose stored ones were most wrong stay for the next layer. The rows behind the chunks
//! (the question) always go on. Every row sees exactly the keys at positions up to its own. Nobody observes a mended prompt: rows that
//! are not computed have no activations.

use std::sync::Arc;

use antefix_attention::hooks::{Site, Watch};
use antefix_attention::{Deviation, Extra, Reader, SeqRows, Sharing, attend, attend_context};
use antefix_kernels::matmul::{Matrix, matmul, matmul_many};
use antefix_kernels::ops;
use antefix_kv::{
    Context, Group, Hidden, Kind, KvError, Policy, Pool, SegRef, Segment, SegmentBuilder, SeqKv,
};
use antefix_state::PAGE_ROWS;

use super::Model;
use super::encode::EncodeError;
use super::forward::{ForwardError, Scratch};

/// A prompt to be mended.
#[derive(Clone, Copy)]
pub struct Blend<'a> {
    /// Exact rows in front, such as a system prompt: used as they are.
    pub settled: &'a [SegRef],
    /// The chunks behind them, each at its place, ascending.
    pub chunks: &'a [SegRef],
    /// What follows the chunks; computed in full. At least one token.
    pub tokens: &'a [u32],
    /// Its pages, empty and reserved; committed by the caller.
    pub tail: &'a SeqKv,
    /// Position of the first of `tokens`.
    pub base: u32,
    /// Of how many of the last rows logits are wanted.
    pub logits: usize,
    /// `keep[l]`: chunk rows that go on behind the selection of layer `l`; the entry of layer 0 means nothing. Where it is not less than
    /// what is there, nothing is measured.
    pub keep: &'a [usize],
    /// How rows are chosen.
    pub deviation: Deviation,
    /// In whose name the mended rows are approximate.
    pub policy: &'a Policy,
}

/// A mended prompt.
#[derive(Debug)]
pub struct Blended {
    /// What the sequence attends from now on, besides its tail: settled rows, chunks with holes, and the rows that fill them.
    pub context: Context,
    /// Rows whose keys and values were computed in each layer, `[L]`; those of the question included.
    pub rows: Vec<usize>,
    /// Positions of the chunk rows that went on behind each layer's selection, `[L]`; empty for layer 0.
    pub chosen: Vec<Vec<u32>>,
}

/// A chunk row that is being computed.
#[derive(Clone, Copy)]
struct Candidate {
    /// Its chunk and its row there.
    chunk: usize,
    row: usize,
    position: u32,
}

/// What grows from layer to layer.
struct Run<'a> {
    blend: &'a Blend<'a>,
    candidates: Vec<Candidate>,
    positions: Vec<u32>,
    hidden: Vec<Hidden>,
    overlays: Vec<Arc<Segment>>,
    rows: Vec<usize>,
    chosen: Vec<Vec<u32>>,
}

impl Model {
    /// Mends `blend` and appends the logits of its last rows to `logits`.
    ///
    /// # Errors
    /// When a token is unknown or there is no room for the fresh rows; nothing stays behind but the tail's rows.
    ///
    /// # Panics
    /// When a chunk is no text at consecutive positions, or `keep` has no entry for each layer.
    pub fn blend(
        &self,
        pool: &mut Pool,
        blend: &Blend<'_>,
        scratch: &mut Scratch,
        logits: &mut Vec<f32>,
    ) -> Result<Blended, EncodeError> {
        let spec = self.spec();
        assert_eq!(blend.keep.len(), spec.layers, "a count for each layer");
        let mut candidates = Vec::new();
        let mut tokens = Vec::new();
        for (chunk, r) in blend.chunks.iter().enumerate() {
            let run = r.segment.run(0, 0);
            assert_eq!(run.len(), r.segment.tokens().len(), "a chunk has a row a token");
            tokens.extend_from_slice(r.segment.tokens());
            candidates.extend((0..run.len()).map(|row| Candidate {
                chunk,
                row,
                position: run.positions().at(row).wrapping_add_signed(r.delta),
            }));
        }
        tokens.extend_from_slice(blend.tokens);
        self.embed(&tokens, &mut scratch.x)?;
        let mut run = Run {
            blend,
            candidates,
            positions: Vec::new(),
            hidden: vec![Hidden::none(spec.layers); blend.chunks.len()],
            overlays: Vec::new(),
            rows: Vec::new(),
            chosen: Vec::new(),
        };
        scratch.acts.set_int8_rows(Some(0));
        for l in 0..spec.layers {
            if let Err(error) = self.blend_layer(l, pool, &mut run, scratch) {
                run.overlays.into_iter().for_each(|s| s.release(pool));
                return Err(error);
            }
        }
        self.logits(&Watch::default(), scratch, logits);
        Ok(run.finish(pool))
    }

    fn blend_layer(
        &self,
        l: usize,
        pool: &mut Pool,
        run: &mut Run<'_>,
        s: &mut Scratch,
    ) -> Result<(), EncodeError> {
        let spec = self.spec();
        let fresh = run.blend.tokens.len();
        if fresh == 0 && run.candidates.is_empty() {
            run.rows.push(0);
            if l > 0 {
                run.chosen.push(Vec::new());
            }
            return Ok(());
        }
        self.fresh_rows(l, run, s);
        let mut replaced = 0;
        if l > 0 {
            replaced = run.candidates.len();
            let keep = self.select(l, pool, run, s);
            self.overlay(l, pool, run, s)?;
            run.keep(keep, spec.d_model, spec.heads * spec.head_dim, s);
        }
        let kv_width = spec.kv_heads * spec.head_dim;
        let from = replaced * kv_width;
        pool.write(run.blend.tail, l, 0, &s.k[from..], &s.v[from..]);
        self.blend_attention(l, pool, run, s)?;
        if l + 1 == spec.layers {
            let wanted = run.blend.logits.min(fresh) * spec.d_model;
            let rows = s.x.len();
            s.x.copy_within(rows - wanted.., 0);
            s.x.truncate(wanted);
        }
        self.feed_forward_blocks(l, s);
        Ok(())
    }

    /// Queries of all rows, and keys and values of those that have none stored: in layer 0 the question's, else everybody's.
    fn fresh_rows(&self, l: usize, run: &mut Run<'_>, s: &mut Scratch) {
        let (spec, layer) = (self.spec(), &self.weights.layers[l]);
        let dim = spec.head_dim;
        let (q_width, kv_width) = (spec.heads * dim, spec.kv_heads * dim);
        run.positions.clear();
        run.positions.extend(run.candidates.iter().map(|c| c.position));
        run.positions
            .extend((run.blend.base..).take(run.blend.tokens.len()));
        let rows = run.positions.len();
        let stored = if l == 0 { run.candidates.len() } else { 0 };
        run.rows.push(rows - stored);
        self.norm(&s.x, &layer.attn_norm, &mut s.normed);
        s.q.resize(rows * q_width, 0.0);
        s.k.resize((rows - stored) * kv_width, 0.0);
        s.v.resize((rows - stored) * kv_width, 0.0);
        let [wq, wk, wv] = &layer.qkv;
        if stored > 0 {
            s.acts.load(&s.normed, rows, spec.d_model);
            matmul(self.cpu, &self.team, &mut s.acts, wq, &mut s.q);
            s.acts
                .load(&s.normed[stored * spec.d_model..], rows - stored, spec.d_model);
            let mut products: [(&Matrix, &mut [f32]); 2] = [(wk, &mut s.k), (wv, &mut s.v)];
            matmul_many(self.cpu, &self.team, &mut s.acts, &mut products);
        } else {
            s.acts.load(&s.normed, rows, spec.d_model);
            let mut products: [(&Matrix, &mut [f32]); 3] = [(wq, &mut s.q), (wk, &mut s.k), (wv, &mut s.v)];
            matmul_many(self.cpu, &self.team, &mut s.acts, &mut products);
        }
        for (bias, y) in layer.qkv_bias.iter().zip([&mut s.q, &mut s.k, &mut s.v]) {
            if let Some(bias) = bias {
                self.per_row(y, bias.len(), |_, row| ops::add(row, bias));
            }
        }
        if let Some([q_norm, k_norm]) = &layer.qk_norm {
            self.norm_in_place(&mut s.q, q_norm);
            self.norm_in_place(&mut s.k, k_norm);
        }
        let rope = self.rope(l);
        let positions = &run.positions;
        self.per_row(&mut s.q, q_width, |r, row| rope.apply(row, dim, positions[r]));
        self.per_row(&mut s.k, kv_width, |r, row| {
            rope.apply(row, dim, positions[stored + r])
        });
    }

    /// Which candidates go on behind layer `l`, ascending. Behind the last layer nobody needs their rows.
    fn select(&self, l: usize, pool: &Pool, run: &Run<'_>, s: &Scratch) -> Vec<usize> {
        let spec = self.spec();
        if l + 1 == spec.layers {
            return Vec::new();
        }
        let all = run.candidates.len();
        let keep = run.blend.keep[l].min(all);
        if keep == all {
            return (0..all).collect();
        }
        let width = spec.kv_heads * spec.head_dim;
        let mut scores: Vec<f32> = vec![0.0; all];
        self.per_row(&mut scores, 1, |i, score| {
            let span = i * width..(i + 1) * width;
            score[0] = self.deviation(l, pool, run, run.candidates[i], &s.k[span.clone()], &s.v[span]);
        });
        let mut order: Vec<usize> = (0..all).collect();
        // Ties go to the earlier row.
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        order.truncate(keep);
        order.sort_unstable();
        order
    }

    /// How far the stored row of a candidate is from its fresh one, `k, v: [Hk, D]`.
    fn deviation(&self, l: usize, pool: &Pool, run: &Run<'_>, c: Candidate, k: &[f32], v: &[f32]) -> f32 {
        let dim = self.spec().head_dim;
        let chunk = &run.blend.chunks[c.chunk];
        let stored = |head: usize, keys: bool| -> Vec<f32> {
            let id = chunk.segment.run(l, head).page_ids()[c.row / PAGE_ROWS];
            let (page, row) = (pool.page(id), c.row % PAGE_ROWS);
            let cell = |d| match keys {
                true => page.key(dim, row, d),
                false => page.value(dim, row, d),
            };
            let mut out: Vec<f32> = (0..dim).map(cell).collect();
            if keys && chunk.delta != 0 {
                self.rope(l).turn(&mut out, dim, chunk.delta);
            }
            out
        };
        let distance = |fresh: &[f32], keys: bool| -> f32 {
            let heads = fresh.chunks_exact(dim).enumerate();
            heads
                .map(|(head, x)| {
                    let old = stored(head, keys);
                    x.iter().zip(old).map(|(a, b)| (a - b) * (a - b)).sum::<f32>()
                })
                .sum()
        };
        match run.blend.deviation {
            Deviation::Values => distance(v, false),
            Deviation::Keys => distance(k, true),
            Deviation::Both => distance(v, false) + distance(k, true),
            Deviation::Random(seed) => {
                let mut x = (seed ^ u64::from(c.position)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
                (x >> 40) as f32
            }
            Deviation::First => -(c.row as f32),
        }
    }

    /// Puts the candidates' fresh rows of layer `l` in the place of the stored ones.
    fn overlay(&self, l: usize, pool: &mut Pool, run: &mut Run<'_>, s: &Scratch) -> Result<(), KvError> {
        let spec = self.spec();
        let width = run.candidates.len() * spec.kv_heads * spec.head_dim;
        let mut builder = SegmentBuilder::new(pool.shape());
        if let Err(error) = builder.reserve(pool, l, run.candidates.len()) {
            builder.abandon(pool);
            return Err(error);
        }
        let positions = &run.positions[..run.candidates.len()];
        builder.push_rows(pool, l, positions, &s.k[..width], &s.v[..width]);
        let kind = Kind::Approx(run.blend.policy.clone());
        run.overlays.push(builder.seal(pool, Vec::new(), kind));
        for c in &run.candidates {
            run.hidden[c.chunk].hide(l, c.row);
        }
        Ok(())
    }

    fn blend_attention(
        &self,
        l: usize,
        pool: &Pool,
        run: &Run<'_>,
        s: &mut Scratch,
    ) -> Result<(), EncodeError> {
        let (spec, layer) = (self.spec(), &self.weights.layers[l]);
        let q_width = spec.heads * spec.head_dim;
        let (chunk_rows, fresh) = (run.candidates.len(), run.blend.tokens.len());
        if chunk_rows + fresh == 0 {
            return Ok(());
        }
        let context = run.context(run.overlays.last());
        let place = (l, self.rope(l));
        let (geometry, cpu) = (self.geometry(l), (self.cpu, self.team.as_ref()));
        s.z.resize((chunk_rows + fresh) * q_width, 0.0);
        let (q_chunks, q_fresh) = s.q.split_at(chunk_rows * q_width);
        let (z_chunks, z_fresh) = s.z.split_at_mut(chunk_rows * q_width);
        let reader = Reader {
            context: &context,
            first: 0,
            positions: &run.positions[..chunk_rows],
        };
        let tail = [SeqRows {
            kv: run.blend.tail,
            first: 0,
            rows: fresh,
            pos0: 0,
            extra: Extra {
                pos_base: run.blend.base,
                context: Some(&context),
                ..Extra::default()
            },
        }];
        let attended =
            attend_context(cpu, pool, place, &geometry, &[reader], q_chunks, z_chunks).and_then(|()| {
                let sharing = Sharing::of(&tail);
                attend(
                    cpu,
                    pool,
                    place,
                    &geometry,
                    (&tail, &sharing),
                    q_fresh,
                    z_fresh,
                    &mut s.attend,
                )
            });
        attended.map_err(ForwardError::from)?;
        s.acts.swap(&mut s.z, chunk_rows + fresh, q_width);
        self.project(&layer.attn_out, &mut s.acts, &mut s.out);
        let seen = (&Watch::default(), l, [Site::AttnOut, Site::ResidMid]);
        self.add_back(layer.attn_post_norm.as_deref(), seen, s);
        Ok(())
    }

    /// The feed-forward part of a layer, in blocks: a whole prompt's inner rows would take hundreds of megabytes.
    fn feed_forward_blocks(&self, l: usize, s: &mut Scratch) {
        const ROWS: usize = 1024;
        let block = ROWS * self.spec().d_model;
        if s.x.len() <= block {
            if !s.x.is_empty() {
                self.feed_forward(l, &Watch::default(), s);
            }
            return;
        }
        let mut all = std::mem::take(&mut s.x);
        for rows in all.chunks_mut(block) {
            s.x.clear();
            s.x.extend_from_slice(rows);
            self.feed_forward(l, &Watch::default(), s);
            rows.copy_from_slice(&s.x);
        }
        s.x = all;
    }
}

impl Run<'_> {
    /// Goes on with the candidates `keep` (ascending) and the question.
    fn keep(&mut self, keep: Vec<usize>, d_model: usize, q_width: usize, s: &mut Scratch) {
        let all = self.candidates.len();
        let rows = keep.iter().copied().chain(all..all + self.blend.tokens.len());
        let mut count = 0;
        for (to, from) in rows.enumerate() {
            s.x.copy_within(from * d_model..(from + 1) * d_model, to * d_model);
            s.q.copy_within(from * q_width..(from + 1) * q_width, to * q_width);
            self.positions[to] = self.positions[from];
            count = to + 1;
        }
        s.x.truncate(count * d_model);
        s.q.truncate(count * q_width);
        self.positions.truncate(count);
        self.candidates = keep.into_iter().map(|i| self.candidates[i]).collect();
        self.chosen
            .push(self.candidates.iter().map(|c| c.position).collect());
    }

    /// Settled rows, chunks without what is hidden, and what fills the holes. Handles are cloned, not counted: for reading only.
    fn context(&self, overlay: Option<&Arc<Segment>>) -> Context {
        let chunks = self
            .blend
            .chunks
            .iter()
            .zip(&self.hidden)
            .map(|(r, hidden)| SegRef {
                hidden: Some(Arc::new(hidden.clone())),
                ..r.clone()
            });
        let refs = self.blend.settled.iter().cloned().chain(chunks);
        let refs = refs.chain(overlay.cloned().map(SegRef::new)).collect();
        Context {
            groups: vec![Group::plain(refs)],
        }
    }

    fn finish(mut self, pool: &mut Pool) -> Blended {
        let kind = Kind::Approx(self.blend.policy.clone());
        let overlay = Segment::stack(pool, std::mem::take(&mut self.overlays), kind);
        let context = self.context(overlay.as_ref());
        if let Some(overlay) = overlay {
            // The context has a handle of its own.
            overlay.release(pool);
        }
        self.chosen.insert(0, Vec::new());
        Blended {
            context,
            rows: self.rows,
            chosen: self.chosen,
        }
    }
}
