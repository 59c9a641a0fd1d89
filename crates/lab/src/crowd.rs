//! Sequences that draw tokens together, step by step, on the pages of one pool: what measurements of decoding share.

use std::sync::Arc;
use std::time::Instant;

use antefix_attention::sparse::Planning;
use antefix_engine::EngineError;
use antefix_kv::{KvError, Pool, SeqKv};
use antefix_models::decoder::{Extra, Input, Model, Scratch};
use antefix_state::PAGE_ROWS;

/// Rows of a prompt chunk.
const CHUNK: usize = 512;

/// A model with room for sequences.
pub(crate) struct Crowd<'a> {
    model: &'a Model,
    pub(crate) pool: Pool,
    pub(crate) scratch: Scratch,
}

impl<'a> Crowd<'a> {
    /// Room for `sequences` of `tokens` tokens each.
    pub(crate) fn new(model: &'a Model, tokens: usize, sequences: usize) -> Self {
        let shape = model.kv_shape();
        let one = Pool::new(shape, 0).bytes_for(tokens + PAGE_ROWS);
        Self {
            model,
            pool: Pool::new(shape, one * sequences),
            scratch: Scratch::default(),
        }
    }

    /// A sequence that begins with `tokens`, attended densely.
    pub(crate) fn prefix(&mut self, tokens: &[u32]) -> Result<SeqKv, EngineError> {
        let mut kv = SeqKv::new(self.pool.shape());
        self.pool.reserve(&mut kv, tokens.len())?;
        for chunk in tokens.chunks(CHUNK) {
            let input = Input {
                tokens: chunk,
                kv: &kv,
                logits: 0,
                drawn: false,
                extra: Extra::default(),
            };
            self.model
                .forward(&mut self.pool, &[input], &mut self.scratch, &mut Vec::new())?;
            kv.commit(chunk.len());
        }
        Ok(kv)
    }

    /// The whole pages of `kv` on pages of their own.
    pub(crate) fn copy(&mut self, kv: &SeqKv) -> Result<SeqKv, KvError> {
        let mut copy = SeqKv::new(self.pool.shape());
        let mut bytes = Vec::new();
        for block in 0..kv.len() / PAGE_ROWS {
            self.pool.export_block(kv, block, &mut bytes);
            self.pool.import_block(&mut copy, &bytes)?;
        }
        Ok(copy)
    }

    /// One drawn token of each sequence, planned by its entry of `plannings` where there is one: its logits, `[sequences, vocab]`, and seconds.
    pub(crate) fn step(
        &mut self,
        seqs: &mut [SeqKv],
        tokens: &[u32],
        plannings: &[Arc<Planning>],
    ) -> Result<(Vec<f32>, f64), EngineError> {
        let start = Instant::now();
        for kv in &mut *seqs {
            self.pool.reserve(kv, 1)?;
        }
        let inputs: Vec<Input<'_>> = seqs
            .iter()
            .zip(tokens)
            .enumerate()
            .map(|(i, (kv, token))| Input {
                tokens: std::slice::from_ref(token),
                kv,
                logits: 1,
                drawn: true,
                extra: Extra {
                    planning: plannings.get(i).map(AsRef::as_ref),
                    ..Extra::default()
                },
            })
            .collect();
        let mut logits = Vec::new();
        self.model
            .forward(&mut self.pool, &inputs, &mut self.scratch, &mut logits)?;
        seqs.iter_mut().for_each(|kv| kv.commit(1));
        Ok((logits, start.elapsed().as_secs_f64()))
    }
}
