//! Chunks of text computed alone: what `ape` and `cacheblend` reuse.

use std::sync::Arc;

use antefix_attention::Extra;
use antefix_kv::{Context, Group, Kind, KvError, Pool, SegRef, Segment, SeqKv};

use super::Model;
use super::forward::{ForwardError, Input, Scratch};

/// Rows of one step: enough for the matrix products to be efficient.
const STEP_ROWS: usize = 512;

/// Why a text could not be computed ahead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The model could not run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// No room for the rows.
    #[error(transparent)]
    Kv(#[from] KvError),
}

impl Model {
    /// Computes `tokens` at positions from 0, as any prompt: what chunks are encoded behind.
    ///
    /// # Errors
    /// When a token is unknown or there is no room; nothing stays behind.
    pub fn encode_prefix(
        &self,
        pool: &mut Pool,
        tokens: &[u32],
        scratch: &mut Scratch,
    ) -> Result<Arc<Segment>, EncodeError> {
        let nothing = Context::default();
        let mut made = self.encode(pool, &nothing, 0, &[tokens], scratch)?;
        Ok(made.remove(0))
    }

    /// Computes each chunk behind `prefix` alone, at the positions that follow it, as if the others did not exist. A segment a chunk,
    /// without the prefix's rows.
    ///
    /// Each chunk gets the same bits whatever stands beside it.
    ///
    /// # Errors
    /// As [`Model::encode_prefix`].
    pub fn encode_chunks(
        &self,
        pool: &mut Pool,
        prefix: &Arc<Segment>,
        chunks: &[&[u32]],
        scratch: &mut Scratch,
    ) -> Result<Vec<Arc<Segment>>, EncodeError> {
        let behind = Context {
            groups: vec![Group::plain(vec![SegRef::new(prefix.clone())])],
        };
        let made = self.encode(pool, &behind, prefix.end(), chunks, scratch);
        behind.release(pool);
        made
    }

    fn encode(
        &self,
        pool: &mut Pool,
        behind: &Context,
        start: u32,
        chunks: &[&[u32]],
        scratch: &mut Scratch,
    ) -> Result<Vec<Arc<Segment>>, EncodeError> {
        let mut tails: Vec<SeqKv> = chunks.iter().map(|_| SeqKv::new(pool.shape())).collect();
        let ran = self.run_tails(pool, (behind, start), chunks, &mut tails, scratch);
        if let Err(error) = ran {
            tails.into_iter().for_each(|t| pool.release(t));
            return Err(error);
        }
        Ok(tails
            .into_iter()
            .zip(chunks)
            .map(|(tail, tokens)| Segment::of_tail(pool, tail, start, tokens.to_vec(), Kind::Exact))
            .collect())
    }

    /// Runs the rows of all chunks, as many in a step as are efficient.
    fn run_tails(
        &self,
        pool: &mut Pool,
        (behind, start): (&Context, u32),
        chunks: &[&[u32]],
        tails: &mut [SeqKv],
        scratch: &mut Scratch,
    ) -> Result<(), EncodeError> {
        for (tail, chunk) in tails.iter_mut().zip(chunks) {
            pool.reserve(tail, chunk.len())?;
        }
        loop {
            let mut left = STEP_ROWS;
            let mut parts = Vec::new();
            for (i, chunk) in chunks.iter().enumerate() {
                let rows = (chunk.len() - tails[i].len()).min(left);
                left -= rows;
                if rows > 0 {
                    parts.push((i, rows));
                }
            }
            if parts.is_empty() {
                return Ok(());
            }
            let inputs: Vec<Input<'_>> = parts
                .iter()
                .map(|&(i, rows)| Input {
                    tokens: &chunks[i][tails[i].len()..][..rows],
                    kv: &tails[i],
                    logits: 0,
                    drawn: false,
                    extra: Extra {
                        pos_base: start,
                        context: Some(behind),
                        ..Extra::default()
                    },
                })
                .collect();
            self.forward(pool, &inputs, scratch, &mut Vec::new())?;
            drop(inputs);
            parts.into_iter().for_each(|(i, rows)| tails[i].commit(rows));
        }
    }
}
