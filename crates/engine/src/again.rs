//! Answers, computed once more as a prompt would be.
//!
//! On some CPUs what is computed of a drawn token differs in its last bits from what would have been computed had it been given
//! ([`Model::tells_drawn_apart`]). A cached answer would then change the next turn's. So answers are computed again when nothing else is
//! to be done, and kept as the start of the next turn's prompt: whether they were found there or not, its bits are the same.

use std::collections::VecDeque;

use antefix_kv::{Keep, Pool};
use antefix_models::decoder::{Extra, ForwardError, Input, Model, Scratch};
use antefix_state::PAGE_ROWS;

use crate::cache::Cache;

/// Answers that wait; beyond that the oldest is given up.
const MOST: usize = 64;
/// Rows computed at a time, whole pages: a request that arrives meanwhile waits for them.
const ROWS: usize = 2 * PAGE_ROWS;

/// A finished text, whole pages of it.
struct Text {
    tokens: Vec<u32>,
    /// How much of it was cached after the last piece of work.
    done: usize,
    salt: u64,
    keep: Keep,
}

/// Texts to be computed again, the newest first: its next turn comes soonest. Between two pieces of work it holds no memory.
#[derive(Default)]
pub(crate) struct Again {
    waiting: VecDeque<Text>,
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
            done: 0,
            salt,
            keep,
        });
        self.waiting.truncate(MOST);
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Computes some rows and caches them. A text is given up when there is no free memory for it, or the cache does not keep it.
    ///
    /// # Errors
    /// As [`Model::forward`]; the text is given up.
    pub(crate) fn work(
        &mut self,
        model: &Model,
        (pool, cache): (&mut Pool, &mut Cache),
        scratch: &mut Scratch,
    ) -> Result<(), ForwardError> {
        let Some(mut text) = self.waiting.pop_front() else {
            return Ok(());
        };
        let mut kv = cache.lookup(pool, &text.tokens, text.salt);
        let from = kv.len();
        let rows = (text.tokens.len() - from).min(ROWS);
        let lost = from < text.done;
        if rows == 0 || lost || pool.reserve(&mut kv, rows).is_err() {
            pool.release(kv);
            return Ok(());
        }
        let input = Input {
            tokens: &text.tokens[from..from + rows],
            kv: &kv,
            logits: 0,
            drawn: false,
            extra: Extra::default(),
        };
        let ran = model.forward(pool, &[input], scratch, &mut Vec::new());
        if ran.is_ok() {
            kv.commit(rows);
            text.done = from + rows;
            cache.insert(pool, &text.tokens[..text.done], text.salt, &kv, text.keep);
            if text.done < text.tokens.len() {
                self.waiting.push_front(text);
            }
        }
        pool.release(kv);
        ran
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_fills_a_page_behind_the_prompt_is_worth_it_and_the_newest_comes_first() {
        let mut again = Again::default();
        again.note(&[7; 60], 40, 0, Keep::default());
        assert!(again.is_done());
        for turn in 0..MOST as u32 + 5 {
            again.note(&[turn; 70], 40, 0, Keep::default());
        }
        assert_eq!(again.waiting.len(), MOST);
        assert_eq!(again.waiting[0].tokens, [MOST as u32 + 4; 64]);
    }
}
