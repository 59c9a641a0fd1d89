//! One step of the model over a batch of rows.

use antefix_attention::hooks::{Site, Watch};
use antefix_attention::readout::AttentionView;
use antefix_attention::{Angles, AttendError, Extra, Scratch as AttendScratch, SeqRows, Sharing, attend};
use antefix_kernels::matmul::{Acts, Gated, Matrix, gated, matmul, matmul_append, matmul_many};
use antefix_kernels::ops::{self, Rope};
use antefix_kernels::quant;
use antefix_kv::{Pool, SeqKv};

use super::Model;
use super::weights::Layer;
use crate::error::LoadError;
use crate::role::Role;
use crate::spec::Act;

/// Rows of one sequence in a step.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// Tokens at positions `extra.pos_base + kv.len()..`; at least one.
    pub tokens: &'a [u32],
    /// The sequence's pages, with room reserved for the tokens. Its length grows only when the caller commits.
    pub kv: &'a SeqKv,
    /// Of how many of the last rows logits (or [`Model::hidden`]'s vectors) are wanted: 0 (in the middle of a prompt), 1, or all.
    pub logits: usize,
    /// Whether the model drew these tokens, rather than being given them. Prompts have many rows and may be computed in an arithmetic that
    /// is fast for those ([`Model::tells_drawn_apart`]); which one it is must not depend on how many rows a step happens to have.
    pub drawn: bool,
    /// What is special about the sequence; the default is an ordinary one.
    pub extra: Extra<'a>,
}

/// Why a step could not run. Nothing was committed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// A token that the model does not have.
    #[error("token {token} is not in the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The embedding could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Inputs with given tokens before some with drawn ones.
    #[error("sequences whose tokens were drawn come first in a step")]
    Order,
    /// A mistake of shapes.
    #[error(transparent)]
    Attend(#[from] AttendError),
}

/// Buffers of a step, reused from step to step.
#[derive(Default)]
pub struct Scratch {
    pub(super) x: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) z: Vec<f32>,
    up: Vec<f32>,
    gated: Acts,
    pub(super) out: Vec<f32>,
    pub(super) acts: Acts,
    pub(super) attend: AttendScratch,
    positions: Vec<u32>,
}

impl Scratch {
    /// Time that attention took since it was last asked, planning included.
    pub fn take_attention_time(&mut self) -> std::time::Duration {
        std::mem::take(&mut self.attend.spent)
    }
}

/// Turns rows of heads to their positions, each with the angles of its sequence.
struct Turn<'a> {
    layer: usize,
    dim: usize,
    own: &'a Rope,
    /// One a row; empty when all rows use the model's own.
    angles: &'a [Option<&'a Angles>],
    positions: &'a [u32],
}

impl Turn<'_> {
    fn angles(&self, row: usize) -> Option<&Angles> {
        self.angles.get(row).copied().flatten()
    }

    fn key(&self, r: usize, row: &mut [f32]) {
        let rope = self
            .angles(r)
            .and_then(|a| a.rope(self.layer))
            .unwrap_or(self.own);
        rope.apply(row, self.dim, self.positions[r]);
    }

    /// As a key, and scaled: the factor belongs to the query.
    fn query(&self, r: usize, row: &mut [f32]) {
        self.key(r, row);
        let scale = self
            .angles(r)
            .map_or(1.0, |a| a.scale(self.layer, self.positions[r]));
        if scale != 1.0 {
            row.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

impl Model {
    /// Runs the tokens of all inputs through the model, writes their keys and values into `pool` and appends the logits of the
    /// rows that asked for them to `logits` (`[rows, vocab]`, in the order of the inputs).
    ///
    /// # Errors
    /// On a token outside the vocabulary. Positions must have been reserved.
    pub fn forward(
        &self,
        pool: &mut Pool,
        inputs: &[Input<'_>],
        scratch: &mut Scratch,
        logits: &mut Vec<f32>,
    ) -> Result<(), ForwardError> {
        let watch = self.layers(pool, inputs, scratch, self.spec().layers)?;
        self.logits(&watch, scratch, logits);
        Ok(())
    }

    /// As [`Model::forward`], but appends what the output matrix would be applied to: the rows after the last norm,
    /// `[rows, d_model]`.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn hidden(
        &self,
        pool: &mut Pool,
        inputs: &[Input<'_>],
        scratch: &mut Scratch,
        hidden: &mut Vec<f32>,
    ) -> Result<(), ForwardError> {
        let watch = self.layers(pool, inputs, scratch, self.spec().layers)?;
        if scratch.x.is_empty() {
            return Ok(());
        }
        let spec = self.spec();
        self.norm(&scratch.x, &self.weights.output_norm, &mut scratch.normed);
        if watch.wants(spec.layers, Site::FinalNorm) {
            watch.at(spec.layers, Site::FinalNorm, &mut scratch.normed, spec.d_model);
        }
        hidden.extend_from_slice(&scratch.normed);
        Ok(())
    }

    /// Runs only the first `depth` layers (at least 1), for hooks that want nothing behind them. Keys and values of later layers stay
    /// unwritten: what follows these tokens cannot be computed.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn first_layers(
        &self,
        pool: &mut Pool,
        inputs: &[Input<'_>],
        scratch: &mut Scratch,
        depth: usize,
    ) -> Result<(), ForwardError> {
        self.layers(pool, inputs, scratch, depth).map(|_| ())
    }

    /// Leaves the wanted rows of the residual stream behind `depth` layers in `scratch.x`.
    fn layers<'a>(
        &self,
        pool: &mut Pool,
        inputs: &[Input<'a>],
        scratch: &mut Scratch,
        depth: usize,
    ) -> Result<Watch<'a>, ForwardError> {
        let spec = self.spec();
        let rows: usize = inputs.iter().map(|i| i.tokens.len()).sum();
        if rows == 0 {
            scratch.x.clear();
            return Ok(Watch::of(spec.layers, std::iter::empty()));
        }
        let mut seqs = Vec::with_capacity(inputs.len());
        let mut first = 0;
        scratch.positions.clear();
        for i in inputs {
            let pos0 = i.kv.len() as u32;
            scratch
                .positions
                .extend((i.extra.pos_base + pos0..).take(i.tokens.len()));
            seqs.push(SeqRows {
                kv: i.kv,
                first,
                rows: i.tokens.len(),
                pos0,
                extra: i.extra,
            });
            first += i.tokens.len();
        }
        let sharing = Sharing::of(&seqs);
        let tokens: Vec<u32> = inputs.iter().flat_map(|i| i.tokens).copied().collect();
        let observed = inputs.iter().map(|i| {
            (
                i.extra.hooks,
                i.tokens.len(),
                i.extra.pos_base + i.kv.len() as u32,
            )
        });
        let mut watch = Watch::of(spec.layers, observed);
        self.embed(&tokens, &mut scratch.x)?;
        if watch.wants(0, Site::Embed) {
            watch.at(0, Site::Embed, &mut scratch.x, spec.d_model);
        }
        let last = depth.clamp(1, spec.layers) - 1;
        let mut rows: Vec<usize> = inputs.iter().map(|i| i.tokens.len()).collect();
        if !inputs.is_sorted_by_key(|i| !i.drawn) {
            return Err(ForwardError::Order);
        }
        let drawn = inputs.iter().take_while(|i| i.drawn).count();
        scratch.acts.set_int8_rows(Some(rows[..drawn].iter().sum()));
        let wanted = |i: usize| inputs[i].logits.min(inputs[i].tokens.len());
        for l in 0..=last {
            self.attention(l, pool, (&seqs, &sharing), &watch, scratch)?;
            // Rows that nobody reads from the last layer on would be computed in vain.
            if l == last {
                let late = [Site::MlpPost, Site::MlpOut, Site::ResidPost];
                self.keep(&mut rows, &mut watch, scratch, |watch, i, rows| {
                    match watch.wants_any(i, l, &late) {
                        true => rows,
                        false => wanted(i),
                    }
                });
                scratch.acts.set_int8_rows(Some(rows[..drawn].iter().sum()));
            }
            if !scratch.x.is_empty() {
                self.feed_forward(l, &watch, scratch);
            }
        }
        self.keep(&mut rows, &mut watch, scratch, |_, i, _| wanted(i));
        Ok(watch)
    }

    pub(super) fn embed(&self, tokens: &[u32], x: &mut Vec<f32>) -> Result<(), ForwardError> {
        let spec = self.spec();
        let d = spec.d_model;
        let table = self
            .files
            .tensor(Role::TokenEmbd)?
            .ok_or_else(|| self.files.missing(Role::TokenEmbd))?;
        let row_bytes = table.bytes.len() / table.rows;
        x.clear();
        for &token in tokens {
            if token as usize >= table.rows {
                return Err(ForwardError::Token {
                    token,
                    vocab: table.rows,
                });
            }
            let at = x.len();
            x.resize(at + d, 0.0);
            let row = &table.bytes[token as usize * row_bytes..][..row_bytes];
            quant::dequantise(table.format, row, &mut x[at..])
                .map_err(|source| self.files.bad_tensor(Role::TokenEmbd, source))?;
        }
        if spec.embed_scale != 1.0 {
            x.iter_mut().for_each(|x| *x *= spec.embed_scale);
        }
        Ok(())
    }

    fn attention(
        &self,
        l: usize,
        pool: &mut Pool,
        (seqs, sharing): (&[SeqRows<'_>], &Sharing),
        watch: &Watch<'_>,
        s: &mut Scratch,
    ) -> Result<(), ForwardError> {
        let (spec, layer) = (self.spec(), &self.weights.layers[l]);
        let (rows, dim) = (s.x.len() / spec.d_model, spec.head_dim);
        let (q_width, kv_width) = (spec.heads * dim, spec.kv_heads * dim);
        if watch.wants(l, Site::ResidPre) {
            watch.at(l, Site::ResidPre, &mut s.x, spec.d_model);
        }
        self.norm_acts(&s.x, &layer.attn_norm, &mut s.acts);
        s.q.resize(rows * q_width, 0.0);
        s.k.resize(rows * kv_width, 0.0);
        s.v.resize(rows * kv_width, 0.0);
        let [wq, wk, wv] = &layer.qkv;
        let mut products: [(&Matrix, &mut [f32]); 3] = [(wq, &mut s.q), (wk, &mut s.k), (wv, &mut s.v)];
        matmul_many(self.cpu, &self.team, &mut s.acts, &mut products);
        for (bias, y) in layer.qkv_bias.iter().zip([&mut s.q, &mut s.k, &mut s.v]) {
            if let Some(bias) = bias {
                self.per_row(y, bias.len(), |_, row| ops::add(row, bias));
            }
        }
        for (site, y, width) in [
            (Site::Q, &mut s.q, q_width),
            (Site::K, &mut s.k, kv_width),
            (Site::V, &mut s.v, kv_width),
        ] {
            if watch.wants(l, site) {
                watch.at(l, site, y, width);
            }
        }
        if let Some([q_norm, k_norm]) = &layer.qk_norm {
            self.norm_in_place(&mut s.q, q_norm);
            self.norm_in_place(&mut s.k, k_norm);
        }
        let rope = &self.ropes[spec.layer_kinds[l].rope];
        let turn = Turn {
            layer: l,
            dim,
            own: rope,
            angles: &angles_of(seqs),
            positions: &s.positions,
        };
        self.per_row(&mut s.q, q_width, |r, row| turn.query(r, row));
        self.per_row(&mut s.k, kv_width, |r, row| turn.key(r, row));
        for (site, y, width) in [(Site::RotQ, &mut s.q, q_width), (Site::RotK, &mut s.k, kv_width)] {
            if watch.wants(l, site) {
                watch.at(l, site, y, width);
            }
        }
        for seq in seqs {
            let span = seq.first * kv_width..(seq.first + seq.rows) * kv_width;
            pool.write(seq.kv, l, seq.pos0 as usize, &s.k[span.clone()], &s.v[span]);
        }
        s.z.resize(rows * q_width, 0.0);
        let geometry = self.geometry(l);
        attend(
            (self.cpu, &self.team),
            pool,
            (l, rope),
            &geometry,
            (seqs, sharing),
            &s.q,
            &mut s.z,
            &mut s.attend,
        )?;
        if watch.wants(l, Site::Z) {
            let (pool, q): (&Pool, _) = (pool, &s.q);
            watch.at_heads(l, &mut s.z, q_width, &|seq, rows| AttentionView {
                run: (self.cpu, &self.team),
                pool,
                kv: seqs[seq].kv,
                base: seqs[seq].extra.pos_base,
                layer: l,
                geometry,
                q: &q[rows.start * q_width..rows.end * q_width],
                pos0: seqs[seq].extra.pos_base + seqs[seq].pos0,
                // What stands before or beside the sequence's own pages is not in them; a planned row does not attend to all of them.
                exact: seqs[seq].extra.is_bare() && seqs[seq].extra.planning.is_none(),
            });
        }
        s.acts.swap(&mut s.z, rows, q_width);
        self.project(&layer.attn_out, &mut s.acts, &mut s.out);
        self.add_back(
            layer.attn_post_norm.as_deref(),
            (watch, l, [Site::AttnOut, Site::ResidMid]),
            s,
        );
        Ok(())
    }

    pub(super) fn feed_forward(&self, l: usize, watch: &Watch<'_>, s: &mut Scratch) {
        let (spec, layer): (_, &Layer) = (self.spec(), &self.weights.layers[l]);
        self.norm_acts(&s.x, &layer.ffn_norm, &mut s.acts);
        let [gate, up] = &layer.gate_up;
        let looked_at = watch.wants(l, Site::MlpPost);
        let what = Gated {
            gate,
            up,
            f: match spec.act {
                Act::Silu => ops::silu_mul,
                Act::GeluTanh => ops::gelu_tanh_mul,
            },
            next: (!looked_at && layer.down.is_quantised()).then_some(&layer.down),
        };
        gated(self.cpu, &self.team, &mut s.acts, what, &mut s.up, &mut s.gated);
        if looked_at {
            watch.at(l, Site::MlpPost, s.gated.x_mut(), spec.d_ff);
        }
        self.project(&layer.down, &mut s.gated, &mut s.out);
        self.add_back(
            layer.ffn_post_norm.as_deref(),
            (watch, l, [Site::MlpOut, Site::ResidPost]),
            s,
        );
    }

    /// `x += out`, through the post-norm where the architecture has one. Hooks see what is added, and the sum.
    pub(super) fn add_back(
        &self,
        post_norm: Option<&[f32]>,
        (watch, l, [added, sum]): (&Watch<'_>, usize, [Site; 2]),
        s: &mut Scratch,
    ) {
        let d = self.spec().d_model;
        let out = match post_norm {
            Some(w) => {
                self.norm(&s.out, w, &mut s.normed);
                &mut s.normed
            }
            None => &mut s.out,
        };
        if watch.wants(l, added) {
            watch.at(l, added, out, d);
        }
        self.per_row(&mut s.x, d, |r, row| ops::add(row, &out[r * d..][..d]));
        if watch.wants(l, sum) {
            watch.at(l, sum, &mut s.x, d);
        }
    }

    /// Of the `rows[i]` residual rows of each sequence, keeps the last `keep(i, rows[i])`.
    fn keep(
        &self,
        rows: &mut [usize],
        watch: &mut Watch<'_>,
        s: &mut Scratch,
        keep: impl Fn(&Watch<'_>, usize, usize) -> usize,
    ) {
        let d = self.spec().d_model;
        let (mut from, mut to) = (0, 0);
        for (i, rows) in rows.iter_mut().enumerate() {
            let kept = keep(watch, i, *rows);
            let start = from + *rows - kept;
            s.x.copy_within(start * d..(start + kept) * d, to * d);
            to += kept;
            from += *rows;
            *rows = kept;
        }
        s.x.truncate(to * d);
        watch.narrow(rows);
    }

    pub(super) fn logits(&self, watch: &Watch<'_>, s: &mut Scratch, logits: &mut Vec<f32>) {
        let spec = self.spec();
        let rows = s.x.len() / spec.d_model;
        if rows == 0 {
            return;
        }
        // Few rows get this far, and a vocabulary is wide: one arithmetic for all of them.
        s.acts.set_int8_rows(None);
        self.norm_acts(&s.x, &self.weights.output_norm, &mut s.acts);
        if watch.wants(spec.layers, Site::FinalNorm) {
            watch.at(spec.layers, Site::FinalNorm, s.acts.x_mut(), spec.d_model);
        }
        let at = logits.len();
        matmul_append(self.cpu, &self.team, &mut s.acts, &self.weights.output, logits);
        if let Some(cap) = spec.final_softcap {
            self.per_row(&mut logits[at..], spec.vocab, |_, row| ops::softcap(row, cap));
        }
        if watch.wants(spec.layers, Site::Logits) {
            watch.at(spec.layers, Site::Logits, &mut logits[at..], spec.vocab);
        }
    }

    pub(super) fn project(&self, w: &Matrix, acts: &mut Acts, out: &mut Vec<f32>) {
        out.resize(acts.rows() * w.n(), 0.0);
        matmul(self.cpu, &self.team, acts, w, out);
    }

    /// Loads `acts` with the norms of `x`.
    pub(super) fn norm_acts(&self, x: &[f32], w: &[f32], acts: &mut Acts) {
        let (eps, width) = (self.spec().norm_eps, w.len());
        acts.fill(&self.team, x.len() / width, width, &|r, row| {
            ops::rms_norm(&x[r * width..][..width], w, eps, row);
        });
    }

    pub(super) fn norm(&self, x: &[f32], w: &[f32], out: &mut Vec<f32>) {
        out.resize(x.len(), 0.0);
        let (eps, width) = (self.spec().norm_eps, w.len());
        self.per_row(out, width, |r, row| {
            ops::rms_norm(&x[r * width..][..width], w, eps, row)
        });
    }

    /// Norms every `w.len()` values of `x`: the heads of q and k.
    pub(super) fn norm_in_place(&self, x: &mut [f32], w: &[f32]) {
        let (eps, width) = (self.spec().norm_eps, w.len());
        self.per_row(x, width, |_, row| ops::rms_norm_in_place(row, w, eps));
    }

    /// Calls `f(row index, row)` on every row of `width` values, by the team when there are many.
    pub(super) fn per_row(&self, x: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        self.team.per_row(x, width, &f);
    }
}

/// The angles of every row; nothing when all use the model's own.
fn angles_of<'a>(seqs: &[SeqRows<'a>]) -> Vec<Option<&'a Angles>> {
    match seqs.iter().any(|s| s.extra.angles.is_some()) {
        false => Vec::new(),
        true => seqs
            .iter()
            .flat_map(|s| std::iter::repeat_n(s.extra.angles, s.rows))
            .collect(),
    }
}
