//! The scheduler: a pure function from what the sequences need to what the next step computes.

/// Identity of a submitted request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// What the scheduler knows of one running sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqView {
    /// Which one.
    pub id: SeqId,
    /// Tokens known but not yet computed: the rest of the prompt, or 1 for the token drawn last.
    pub pending: usize,
    /// Whether the prompt is done.
    pub decoding: bool,
}

/// How many tokens of which sequence the next step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Which sequence.
    pub id: SeqId,
    /// Number of its pending tokens, from the front; at least 1.
    pub tokens: usize,
}

/// One step of the model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Decoding sequences first, then prompts in the order of arrival.
    pub parts: Vec<Part>,
}

/// Limits of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Rows of a step in all. Decoding sequences always run; prompts share what is left.
    pub rows: usize,
    /// Rows that prompts may have in a step in which somebody decodes: bounds the wait between two tokens.
    pub prompt_rows_beside_decode: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            rows: 512,
            prompt_rows_beside_decode: 128,
        }
    }
}

/// What admission knows of one waiting request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitView {
    /// Lower goes first.
    pub priority: i32,
    /// Rows that its tenant has used so far.
    pub used: u64,
    /// Order of arrival.
    pub id: SeqId,
}

/// Which waiting request starts next: by priority, then the tenant that has used least, then the oldest.
pub fn next_in_line(waiting: &[WaitView]) -> Option<usize> {
    (0..waiting.len()).min_by_key(|&i| (waiting[i].priority, waiting[i].used, waiting[i].id))
}

/// Chooses the next step: every decoding sequence, then chunks of prompts, oldest first.
pub fn schedule(seqs: &[SeqView], budget: Budget) -> Batch {
    let mut batch = Batch::default();
    let mut decoding = 0;
    for s in seqs.iter().filter(|s| s.decoding && s.pending > 0) {
        batch.parts.push(Part {
            id: s.id,
            tokens: s.pending,
        });
        decoding += s.pending;
    }
    let mut left = if decoding > 0 {
        budget
            .rows
            .saturating_sub(decoding)
            .min(budget.prompt_rows_beside_decode)
    } else {
        budget.rows.max(1)
    };
    for s in seqs.iter().filter(|s| !s.decoding && s.pending > 0) {
        if left == 0 {
            break;
        }
        let tokens = s.pending.min(left);
        left -= tokens;
        batch.parts.push(Part { id: s.id, tokens });
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(id: u64, pending: usize, decoding: bool) -> SeqView {
        SeqView {
            id: SeqId(id),
            pending,
            decoding,
        }
    }

    fn parts(seqs: &[SeqView]) -> Vec<(u64, usize)> {
        let budget = Budget {
            rows: 64,
            prompt_rows_beside_decode: 16,
        };
        schedule(seqs, budget)
            .parts
            .iter()
            .map(|p| (p.id.0, p.tokens))
            .collect()
    }

    #[test]
    fn decoding_comes_first_and_bounds_prompts() {
        assert_eq!(parts(&[view(1, 100, false), view(2, 1, true)]), [(2, 1), (1, 16)]);
    }

    #[test]
    fn prompts_alone_take_the_whole_step_oldest_first() {
        assert_eq!(
            parts(&[view(1, 40, false), view(2, 40, false), view(3, 40, false)]),
            [(1, 40), (2, 24)]
        );
    }

    #[test]
    fn every_decoding_sequence_runs_even_beyond_the_budget() {
        let seqs: Vec<_> = (0..100)
            .map(|i| view(i, 1, true))
            .chain([view(200, 9, false)])
            .collect();
        assert_eq!(parts(&seqs).len(), 100);
    }

    #[test]
    fn priority_goes_before_use_and_use_before_age() {
        let wait = |priority, used, id| WaitView {
            priority,
            used,
            id: SeqId(id),
        };
        let mut line = vec![wait(0, 50, 1), wait(0, 10, 3), wait(0, 10, 2), wait(-1, 99, 4)];
        let mut order = Vec::new();
        while let Some(i) = next_in_line(&line) {
            order.push(line.remove(i).id.0);
        }
        assert_eq!(order, [4, 2, 3, 1]);
    }

    #[test]
    fn nothing_pending_is_an_empty_batch() {
        assert_eq!(parts(&[view(1, 0, true)]), []);
    }
}
