//! One sequence alone with the model: what measurements use, without scheduler, sampler or prefix cache.

use std::sync::Arc;

use antefix_attention::Angles;
use antefix_attention::hooks::Observer;
use antefix_attention::method::Program;
use antefix_attention::readout::AttentionView;
use antefix_attention::sparse::Planning;
use antefix_kv::{Pool, SeqKv};
use antefix_models::decoder::{Extra, Input, Model, Scratch};

use crate::engine::EngineError;

/// A sequence with a KV pool of its own.
pub struct Session {
    model: Arc<Model>,
    pool: Pool,
    kv: SeqKv,
    scratch: Scratch,
    chunk: usize,
    hooks: Option<Arc<Observer>>,
    angles: Option<Arc<Angles>>,
    planning: Option<Arc<Planning>>,
    depth: Option<usize>,
}

/// Methods that have no meaning for a text that is computed as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{method}` works on prompts and their answers, not on a text that is scored as it is\nhint: use antefix run or antefix eval"
)]
pub struct NotForTexts {
    /// The methods.
    pub method: String,
}

impl Session {
    /// A session that can hold `context` tokens and computes prompts in chunks of `chunk` rows.
    pub fn new(model: Arc<Model>, context: usize, chunk: usize) -> Self {
        let probe = Pool::new(model.kv_shape(), 0);
        let pool = Pool::new(
            model.kv_shape(),
            probe.bytes_for(context + antefix_state::PAGE_ROWS),
        );
        let kv = SeqKv::new(pool.shape());
        Self {
            model,
            pool,
            kv,
            scratch: Scratch::default(),
            chunk: chunk.max(1),
            hooks: None,
            angles: None,
            planning: None,
            depth: None,
        }
    }

    /// From now on the angles and hooks of `program` hold, for texts of up to `tokens` tokens.
    ///
    /// # Errors
    /// When it rewrites prompts, plans what is read, cuts caches or reuses documents.
    pub fn run_under(&mut self, program: &Program, tokens: usize) -> Result<(), NotForTexts> {
        if !program.scores_texts() {
            return Err(NotForTexts {
                method: program.name(),
            });
        }
        self.angles = program.rotation(tokens).map(|r| self.model.angles(r));
        self.hooks = program.observer(tokens, 0).map(Arc::new);
        Ok(())
    }

    /// From now on `planning` chooses the keys that given tokens read; `None` ends that. A stretch of its plans ends with the tokens of
    /// [`Session::feed`].
    pub fn plan(&mut self, planning: Option<Arc<Planning>>) {
        self.planning = planning;
    }

    /// From now on `hooks` read or change the activations; `None` ends that.
    pub fn observe(&mut self, hooks: Option<Arc<Observer>>) {
        self.hooks = hooks;
    }

    /// From now on only the first `layers` layers are computed: enough for hooks that want nothing behind them. There are no logits, and
    /// a text that was begun this way cannot go on with all layers.
    pub fn stop_after(&mut self, layers: Option<usize>) {
        self.depth = layers;
    }

    /// Time that attention took since it was last asked, planning included.
    pub fn take_attention_time(&mut self) -> std::time::Duration {
        self.scratch.take_attention_time()
    }

    /// Tokens computed so far.
    pub fn len(&self) -> usize {
        self.kv.len()
    }

    /// Whether nothing was computed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of KV pages in use.
    pub fn kv_bytes(&self) -> usize {
        self.pool.stats().bytes_used
    }

    /// Forgets everything after the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.pool.truncate(&mut self.kv, len);
        if let Some(planning) = &self.planning {
            planning.truncate(len);
        }
    }

    /// What attention of `layer` reads with the queries `q` (after RoPE, `[rows, Hq, D]`, as captured at `attn.hook_rot_q`) of the
    /// tokens from `pos0` on: any row, after the fact, as long as its keys are in the cache.
    pub fn attention<'a>(&'a self, layer: usize, q: &'a [f32], pos0: u32) -> AttentionView<'a> {
        AttentionView {
            run: (self.model.cpu(), self.model.team()),
            pool: &self.pool,
            kv: &self.kv,
            base: 0,
            layer,
            geometry: self.model.geometry(layer),
            q,
            pos0,
            exact: true,
        }
    }

    /// Computes `tokens` and appends the logits of the last `wanted` of them to `logits`, `[wanted, vocab]`.
    ///
    /// # Errors
    /// When the context is full or a token is not in the vocabulary.
    pub fn feed(&mut self, tokens: &[u32], wanted: usize, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        self.compute(tokens, false, wanted, logits)
    }

    /// As [`Session::feed`], for tokens that the model drew: with the products that an answer is computed with.
    ///
    /// # Errors
    /// As there.
    pub fn feed_drawn(
        &mut self,
        tokens: &[u32],
        wanted: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        self.compute(tokens, true, wanted, logits)
    }

    fn compute(
        &mut self,
        tokens: &[u32],
        drawn: bool,
        wanted: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        self.pool.reserve(&mut self.kv, tokens.len())?;
        let first_wanted = tokens.len() - wanted.min(tokens.len());
        let planning = self.planning.clone().filter(|_| !drawn);
        let mut end = 0;
        while end < tokens.len() {
            let (at, left) = (self.kv.len(), tokens.len() - end);
            let rows = self.chunk.min(left);
            let rows = planning.as_ref().map_or(rows, |p| p.whole(at, rows, left));
            let chunk = &tokens[end..end + rows];
            end += rows;
            let input = Input {
                tokens: chunk,
                kv: &self.kv,
                logits: end.saturating_sub(first_wanted.max(end - chunk.len())),
                drawn,
                extra: Extra {
                    hooks: self.hooks.as_deref(),
                    angles: self.angles.as_deref(),
                    planning: planning.as_deref(),
                    ..Extra::default()
                },
            };
            let (pool, scratch) = (&mut self.pool, &mut self.scratch);
            match self.depth {
                Some(layers) => self.model.first_layers(pool, &[input], scratch, layers)?,
                None => self.model.forward(pool, &[input], scratch, logits)?,
            }
            self.kv.commit(chunk.len());
        }
        Ok(())
    }
}
