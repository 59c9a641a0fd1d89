//! The seam of the cache: which rows of a sequence stay once its prompt is computed.
//!
//! A policy decides layer by layer and returns a [`LayerEdit`]; the cache alone moves rows ([`antefix_kv::SeqState::apply`]).

use std::fmt::Debug;
use std::num::NonZeroUsize;

pub use antefix_kv::{Fold, HeadEdit, LayerEdit};
use antefix_kv::{OwnRow, Pool, SeqState};

use crate::attend::Geometry;

/// What a policy must see before it decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sight {
    /// Queries of this many last rows; prompts whose cached part reaches into them are computed from there on.
    pub queries: usize,
}

/// Decides what the cache keeps. Same view, same decision.
pub trait CachePolicy: Send + Sync + Debug {
    /// What it needs to see of a prompt of `tokens` tokens; `None` leaves such a prompt as it is.
    fn sight(&self, tokens: usize) -> Option<Sight>;

    /// Tokens of the answer after which it decides again; `None`: once, when the prompt is computed.
    fn every(&self) -> Option<NonZeroUsize>;

    /// What stays of one layer.
    fn layer(&self, view: &LayerView<'_>) -> LayerEdit;
}

/// One layer of a sequence whose rows are all computed.
#[derive(Clone, Copy)]
pub struct LayerView<'a> {
    /// Which layer.
    pub layer: usize,
    /// Its shapes and rules.
    pub geometry: &'a Geometry,
    /// Whether nothing was cut before: it stands behind the prompt, or behind the documents, not in the answer.
    pub first_cut: bool,
    /// The position of the next token: all rows stand before it.
    pub next: u32,
    /// Queries of the last rows that were asked for, after RoPE, unscaled: `[W, Hq, D]`. They stand at `next - W..next`.
    pub queries: &'a [f32],
    /// The rows.
    pub state: &'a SeqState,
    /// Where they lie.
    pub pool: &'a Pool,
}

impl LayerView<'_> {
    /// Rows of a KV head, in ascending position. A decision names them by their index here.
    pub fn rows(&self, head: usize) -> Vec<OwnRow> {
        self.state.own_rows(self.layer, head)
    }

    /// Keys of these rows as stored, after RoPE: `[rows, D]`.
    pub fn keys(&self, rows: &[OwnRow]) -> Vec<f32> {
        let dim = self.geometry.dim;
        let one = |r: &OwnRow| {
            let (page, row) = (self.pool.page(r.place.0), r.place.1);
            (0..dim).map(move |d| page.key(dim, row, d))
        };
        rows.iter().flat_map(one).collect()
    }

    /// Values of these rows as stored: `[rows, D]`.
    pub fn values(&self, rows: &[OwnRow]) -> Vec<f32> {
        let dim = self.geometry.dim;
        let one = |r: &OwnRow| {
            let (page, row) = (self.pool.page(r.place.0), r.place.1);
            (0..dim).map(move |d| page.value(dim, row, d))
        };
        rows.iter().flat_map(one).collect()
    }

    /// Query rows that were seen, `W`.
    pub fn seen(&self) -> usize {
        self.queries.len() / (self.geometry.heads * self.geometry.dim)
    }

    /// Attention weights of query head `head` over `rows` of its KV head: `[W, rows]`, each row sums to 1. A key after the query has
    /// weight 0, one outside the layer's window, too.
    ///
    /// `keys` are those of `rows`: see [`LayerView::keys`].
    pub fn weights(&self, head: usize, rows: &[OwnRow], keys: &[f32]) -> Vec<f32> {
        let Geometry {
            heads,
            dim,
            scale,
            softcap,
            window,
            ..
        } = *self.geometry;
        let count = self.seen();
        let mut weights = vec![0.0; count * rows.len()];
        if rows.is_empty() {
            return weights;
        }
        for (w, out) in weights.chunks_exact_mut(rows.len()).enumerate() {
            let pos = self.next - (count - w) as u32;
            let q = &self.queries[(w * heads + head) * dim..][..dim];
            // Rows ascend: those that the query sees are a range.
            let to = rows.partition_point(|r| r.position <= pos);
            let from = window.map_or(0, |n| rows.partition_point(|r| r.position + n <= pos));
            let out = &mut out[from..to];
            for ((s, k), row) in out
                .iter_mut()
                .zip(keys[from * dim..].chunks_exact(dim))
                .zip(&rows[from..])
            {
                let dot: f32 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                let score = dot * scale;
                *s = softcap.map_or(score, |cap| cap * (score / cap).tanh()) + row.bias;
            }
            let m = out.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            out.iter_mut().for_each(|s| *s = (*s - m).exp());
            let l: f32 = out.iter().sum();
            if l > 0.0 {
                out.iter_mut().for_each(|s| *s /= l);
            }
        }
        weights
    }
}
