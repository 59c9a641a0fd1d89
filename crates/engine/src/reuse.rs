//! Prompts made of chunks: finds or computes the chunks of a prompt and makes them its context (papers `ape`, `cacheblend`).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use antefix_attention::{ChunkUse, Extra};
use antefix_kv::{
    ChunkError, ChunkKey, ChunkStore, ChunkText, Context, Group, KvError, Policy, Pool, SegRef, Segment,
    SeqKv, SeqState,
};
use antefix_models::decoder::{Blend, EncodeError, Input, Model, Scratch};
use antefix_state::PAGE_ROWS;

/// The policy under which chunks are stored: computed alone, at the positions right behind their prefix. All users of chunks share it.
const ALONE: &str = "alone";

/// Rows of a question that are computed in one step.
const STEP_ROWS: usize = 512;

/// Why a prompt cannot be made out of chunks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReuseError {
    /// Nothing stands before the first document.
    #[error(
        "documents cannot be reused without anything in front of them\nhint: use a chat template, a system message or the model's first token"
    )]
    NoPrefix,
    /// Nothing stands behind the last document.
    #[error("a question must follow the documents")]
    NoQuestion,
    /// The documents are not ascending, disjoint parts of the prompt.
    #[error("documents must be disjoint, ascending parts of a prompt of {tokens} tokens")]
    Places {
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// The model could not run, or there is no room.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// No room.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// What was computed ahead could not be kept.
    #[error(transparent)]
    Keep(#[from] ChunkError),
}

/// Where the rows of a prompt came from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Provenance {
    /// Tokens before the first document.
    pub prefix: usize,
    /// Document tokens whose rows were found.
    pub found: usize,
    /// Document tokens whose rows had to be computed.
    pub encoded: usize,
    /// Rows behind the prefix whose keys and values were computed for this request, summed over the layers.
    pub fresh_rows: usize,
    /// What ordinary prefill of the same rows would have computed, summed over the layers.
    pub all_rows: usize,
}

/// What computes and keeps chunks.
pub struct Library<'a> {
    /// The model.
    pub model: &'a Model,
    /// Where rows lie.
    pub pool: &'a mut Pool,
    /// The chunks.
    pub chunks: &'a mut ChunkStore,
    /// Buffers.
    pub scratch: &'a mut Scratch,
}

/// A prompt cut at its documents. What stands between two documents belongs to the first of them.
struct Cut<'t> {
    prefix: &'t [u32],
    chunks: Vec<&'t [u32]>,
    question: &'t [u32],
}

impl<'t> Cut<'t> {
    fn new(tokens: &'t [u32], documents: &[Range<usize>]) -> Result<Self, ReuseError> {
        let (Some(first), Some(last)) = (documents.first(), documents.last()) else {
            return Err(ReuseError::Places { tokens: tokens.len() });
        };
        let ascend = documents.windows(2).all(|w| w[0].end <= w[1].start);
        let whole = documents.iter().all(|d| d.start < d.end) && last.end <= tokens.len();
        if !ascend || !whole {
            return Err(ReuseError::Places { tokens: tokens.len() });
        }
        if first.start == 0 {
            return Err(ReuseError::NoPrefix);
        }
        if last.end == tokens.len() {
            return Err(ReuseError::NoQuestion);
        }
        let ends = documents.iter().skip(1).map(|d| d.start).chain([last.end]);
        Ok(Self {
            prefix: &tokens[..first.start],
            chunks: documents
                .iter()
                .zip(ends)
                .map(|(d, end)| &tokens[d.start..end])
                .collect(),
            question: &tokens[last.end..],
        })
    }
}

impl Library<'_> {
    /// Starts a sequence over `tokens`, whose `documents` are taken from the store or computed for it, and computes what follows them
    /// except for the last `leave` tokens.
    ///
    /// # Errors
    /// When the documents do not fit the prompt, the model fails or there is no room; then nothing is held but what the store keeps.
    pub fn start(
        &mut self,
        tokens: &[u32],
        documents: &[Range<usize>],
        (how, policy): (&dyn ChunkUse, &Policy),
        salt: u64,
        leave: usize,
    ) -> Result<(SeqState, Provenance), ReuseError> {
        let cut = Cut::new(tokens, documents)?;
        let question = &cut.question[..cut.question.len() - leave.min(cut.question.len())];
        let mut provenance = Provenance {
            prefix: cut.prefix.len(),
            ..Provenance::default()
        };
        let prefix = self.prefix(cut.prefix, salt)?;
        let chunks = match self.chunks(&prefix, &cut, salt, &mut provenance) {
            Ok(chunks) => chunks,
            Err(error) => {
                prefix.release(self.pool);
                return Err(error);
            }
        };
        let sizes: Vec<usize> = cut.chunks.iter().map(|c| c.len()).collect();
        let layout = how.layout(cut.prefix.len(), &sizes);
        let settled = SegRef::new(prefix);
        let mut refs: Vec<SegRef> = chunks
            .into_iter()
            .zip(&layout.deltas)
            .map(|(segment, &delta)| SegRef::at(segment, delta))
            .collect();
        // Chunks at the same place fold in an order of their own: the caller's changes no bit.
        refs.sort_by(|a, b| (a.delta, a.segment.tokens()).cmp(&(b.delta, b.segment.tokens())));
        let layers = self.pool.shape().layers;
        let rows = sizes.iter().sum::<usize>();
        provenance.all_rows = layers * (rows + question.len());
        let mend = how
            .mend(layers, rows)
            .filter(|m| m.keep.iter().skip(1).any(|&k| k > 0));
        let mut tail = SeqKv::new(self.pool.shape());
        let need =
            self.pool.bytes_for(question.len()) + mend.as_ref().map_or(0, |_| self.pool.bytes_for(rows));
        self.chunks.evict(self.pool, need);
        let reserved = self.pool.reserve(&mut tail, question.len());
        let done = reserved.map_err(ReuseError::from).and_then(|()| match mend {
            None => {
                let context = Context {
                    groups: groups(&settled, &refs, layout.temperature, layout.lse_scale),
                };
                provenance.fresh_rows = layers * question.len();
                self.read(&context, layout.next, question, &mut tail)?;
                Ok(context)
            }
            Some(mend) => {
                let blend = Blend {
                    settled: std::slice::from_ref(&settled),
                    chunks: &refs,
                    tokens: question,
                    tail: &tail,
                    base: layout.next,
                    logits: 0,
                    keep: &mend.keep,
                    deviation: mend.deviation,
                    policy,
                };
                let made = self
                    .model
                    .blend(self.pool, &blend, self.scratch, &mut Vec::new())?;
                tail.commit(question.len());
                provenance.fresh_rows = made.rows.iter().sum();
                Ok(made.context)
            }
        });
        // The context has handles of its own.
        for r in refs.into_iter().chain([settled]) {
            r.segment.release(self.pool);
        }
        match done {
            Ok(context) => Ok((
                SeqState {
                    tail,
                    base: layout.next,
                    before: tokens.len() - cut.question.len(),
                    context,
                },
                provenance,
            )),
            Err(error) => {
                self.pool.release(tail);
                Err(error)
            }
        }
    }

    /// Computes the documents of a corpus ahead, each behind `prefix`, and writes them to the store's folder if it has one. Those that are
    /// there already cost nothing.
    ///
    /// # Errors
    /// When the model fails or there is no room.
    pub fn ingest(
        &mut self,
        prefix: &[u32],
        documents: &[&[u32]],
        salt: u64,
    ) -> Result<Provenance, ReuseError> {
        let front = self.prefix(prefix, salt)?;
        let mut provenance = Provenance {
            prefix: prefix.len(),
            ..Provenance::default()
        };
        let mut result = Ok(());
        for &document in documents.iter().filter(|d| !d.is_empty()) {
            let cut = Cut {
                prefix,
                chunks: vec![document],
                question: &[],
            };
            result = self.chunks(&front, &cut, salt, &mut provenance).and_then(|made| {
                made.into_iter().for_each(|s| s.release(self.pool));
                Ok(self.chunks.flush(self.pool)?)
            });
            if result.is_err() {
                break;
            }
        }
        front.release(self.pool);
        result.map(|()| provenance)
    }

    /// Bytes that [`Library::start`] will take: chunks that are not in memory, rows that are computed again, and the rest of the prompt.
    pub fn need(
        &mut self,
        tokens: &[u32],
        documents: &[Range<usize>],
        how: &dyn ChunkUse,
        salt: u64,
    ) -> usize {
        let Ok(cut) = Cut::new(tokens, documents) else {
            return 0;
        };
        let missing = |tokens: &&[u32]| {
            let text = ChunkText {
                prefix: cut.prefix,
                tokens,
            };
            !self.chunks.contains(self.chunks.key(ALONE, salt, text))
        };
        let new: usize = cut
            .chunks
            .iter()
            .copied()
            .filter(missing)
            .map(|c| self.pool.bytes_for(c.len()))
            .sum();
        let rows: usize = cut.chunks.iter().map(|c| c.len()).sum();
        let mended = how.mend(self.pool.shape().layers, rows).map_or(0, |mend| {
            // Layer 1 computes all rows, each later layer those that the one before has kept.
            let kept: usize = rows + mend.keep.iter().skip(1).sum::<usize>();
            let pages = kept.div_ceil(PAGE_ROWS) + mend.keep.len();
            pages * self.pool.shape().kv_heads * self.pool.shape().page_bytes()
        });
        new + mended
            + self
                .pool
                .bytes_for(cut.prefix.len() + cut.question.len() + 3 * PAGE_ROWS)
    }

    fn prefix(&mut self, tokens: &[u32], salt: u64) -> Result<Arc<Segment>, ReuseError> {
        let text = ChunkText { prefix: &[], tokens };
        let key = self.chunks.key(ALONE, salt, text);
        if let Some(segment) = self.chunks.get(self.pool, key, text) {
            return Ok(segment);
        }
        self.chunks
            .evict(self.pool, self.pool.bytes_for(tokens.len() + PAGE_ROWS));
        let segment = self.model.encode_prefix(self.pool, tokens, self.scratch)?;
        self.chunks.insert(self.pool, key, &[], segment.clone());
        Ok(segment)
    }

    /// The chunks of a prompt, found or computed; equal ones once.
    fn chunks(
        &mut self,
        prefix: &Arc<Segment>,
        cut: &Cut<'_>,
        salt: u64,
        provenance: &mut Provenance,
    ) -> Result<Vec<Arc<Segment>>, ReuseError> {
        let text = |tokens| ChunkText {
            prefix: cut.prefix,
            tokens,
        };
        let mut found: Vec<Option<Arc<Segment>>> = Vec::new();
        let mut missing: Vec<(ChunkKey, &[u32])> = Vec::new();
        for &tokens in &cut.chunks {
            let key = self.chunks.key(ALONE, salt, text(tokens));
            let hit = self.chunks.get(self.pool, key, text(tokens));
            match hit {
                Some(_) => provenance.found += tokens.len(),
                None if missing.iter().all(|m| m.0 != key) => missing.push((key, tokens)),
                None => {}
            }
            found.push(hit);
        }
        let texts: Vec<&[u32]> = missing.iter().map(|m| m.1).collect();
        let need: usize = texts.iter().map(|t| self.pool.bytes_for(t.len())).sum();
        self.chunks.evict(self.pool, need);
        let made = match self.model.encode_chunks(self.pool, prefix, &texts, self.scratch) {
            Ok(made) => made,
            Err(error) => {
                found.into_iter().flatten().for_each(|s| s.release(self.pool));
                return Err(error.into());
            }
        };
        provenance.encoded += texts.iter().map(|t| t.len()).sum::<usize>();
        let mut new: HashMap<&[u32], Arc<Segment>> = HashMap::new();
        for ((key, tokens), segment) in missing.into_iter().zip(made) {
            self.chunks.insert(self.pool, key, cut.prefix, segment.clone());
            new.insert(tokens, segment);
        }
        let all = found
            .into_iter()
            .zip(&cut.chunks)
            .map(|(hit, tokens)| hit.unwrap_or_else(|| new[tokens].clone()))
            .collect();
        new.into_values().for_each(|s| s.release(self.pool));
        Ok(all)
    }

    /// Computes `tokens` behind `context`.
    fn read(
        &mut self,
        context: &Context,
        base: u32,
        tokens: &[u32],
        tail: &mut SeqKv,
    ) -> Result<(), ReuseError> {
        for step in tokens.chunks(STEP_ROWS) {
            let input = Input {
                tokens: step,
                kv: tail,
                logits: 0,
                drawn: false,
                extra: Extra {
                    pos_base: base,
                    context: Some(context),
                    ..Extra::default()
                },
            };
            self.model
                .forward(self.pool, &[input], self.scratch, &mut Vec::new())
                .map_err(EncodeError::from)?;
            tail.commit(step.len());
        }
        Ok(())
    }
}

/// The prefix as the sequence's own, and the chunks in one group of their own if a temperature or power holds there.
fn groups(settled: &SegRef, chunks: &[SegRef], temperature: f32, lse_scale: f32) -> Vec<Group> {
    let of_chunks = Group {
        temperature,
        lse_scale,
        refs: chunks.to_vec(),
    };
    vec![of_chunks, Group::plain(vec![settled.clone()])]
}
