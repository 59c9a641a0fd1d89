//! Answers, computed once more as a prompt would be.
//!
//! On some CPUs what is computed of a drawn token differs in its last bits from what would have been computed had it been given
//! ([`Model::tells_drawn_apart`]). A cached answer would then change the next turn's. So answers are computed again when nothing else is
//! to be done, and kept as the start of the next turn's prompt: whether they were found there or not, its bits are the same.

use std::collections::VecDeque;

use antefix_kv::{Keep, Pool, SeqKv};
use antefix_models::decoder::{Extra, ForwardError, Input, Model, Scratch};
use antefix_state::PAGE_ROWS;

use crate::cache::Cache;

/// Answers that wait; beyond that the oldest is given up.
const MOST: usize = 64;
/// Rows computed at a time: a request that arrives meanwhile waits for them.
const ROWS: usize = 64;

/// A finished text.
struct Text {
    tokens: Vec<u32>,
    salt: u64,
    keep: Keep,
}

/// Texts to be computed again, the newest first: its next turn comes soonest.
#[derive(Default)]
pub(crate) struct Again {
    waiting: VecDeque<Text>,
    now: Option<(Text, SeqKv)>,
}

impl Again {
    /// Notes a text, the first `prompt` tokens of which are cached as given ones.
    pub(crate) fn note(&mut self, tokens: &[u32], prompt: usize, salt: u64, keep: Keep) {
        let whole = tokens.len() / PAGE_ROWS * PAGE_ROWS;
        if whole <= prompt {
            return;
        }
        self.waiting.push_front(Text {
            tokens: tokens[..whole].to_vec(),
            salt,
            keep,
        });
        self.waiting.truncate(MOST);
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.now.is_none()
    }

    /// Computes some rows. A text for which there is no free memory is given up, as is one that the model fails on.
    pub(crate) fn work(
        &mut self,
        model: &Model,
        (pool, cache): (&mut Pool, &mut Cache),
        scratch: &mut Scratch,
    ) -> Result<(), ForwardError> {
        let Some((text, mut kv)) = self.now.take().or_else(|| {
            let text = self.waiting.pop_front()?;
            let kv = cache.lookup(pool, &text.tokens, text.salt);
            Some((text, kv))
        }) else {
            return Ok(());
        };
        let from = kv.len();
        let rows = (text.tokens.len() - from).min(ROWS);
        if rows > 0 && pool.reserve(&mut kv, rows).is_err() {
            pool.release(kv);
            return Ok(());
        }
        if rows > 0 {
            let input = Input {
                tokens: &text.tokens[from..from + rows],
                kv: &kv,
                logits: 0,
                drawn: false,
                extra: Extra::default(),
            };
            if let Err(error) = model.forward(pool, &[input], scratch, &mut Vec::new()) {
                pool.release(kv);
                return Err(error);
            }
            kv.commit(rows);
        }
        self.now = Some((text, kv));
        if from + rows == self.now.as_ref().map_or(0, |(text, _)| text.tokens.len()) {
            self.put_away(pool, cache);
        }
        Ok(())
    }

    /// Stops in the middle of a text: what is done of it is kept, the rest waits. Others need the memory.
    pub(crate) fn pause(&mut self, pool: &mut Pool, cache: &mut Cache) {
        if let Some(text) = self.put_away(pool, cache) {
            self.waiting.push_front(text);
        }
    }

    /// Caches what is done of the current text, and returns it if that is not all.
    fn put_away(&mut self, pool: &mut Pool, cache: &mut Cache) -> Option<Text> {
        let (text, kv) = self.now.take()?;
        let done = kv.len();
        cache.insert(pool, &text.tokens[..done], text.salt, &kv, text.keep);
        pool.release(kv);
        (done < text.tokens.len()).then_some(text)
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self, pool: &mut Pool) {
        self.waiting.clear();
        if let Some((_, kv)) = self.now.take() {
            pool.release(kv);
        }
    }
}
