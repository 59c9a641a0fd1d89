//! The scheduler: a pure function from what the sequences need to what the next step computes.

use crate::pace::{Pace, Work};

/// Identity of a submitted request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// What the scheduler knows of one running sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqView {
    /// Which one.
    pub id: SeqId,
    /// Tokens known but not yet computed: the rest of the prompt, or the token drawn last and those that follow from it.
    pub pending: usize,
    /// Tokens computed.
    pub keys: usize,
    /// Whether it writes its answer: then its pending tokens are few and run in every step.
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
    /// Decoding sequences first, then prompts.
    pub parts: Vec<Part>,
}

/// How much of a step prompts may have while somebody decodes: it bounds the wait between two tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Beside {
    /// This many rows.
    Rows(usize),
    /// As many rows as make the step take at most this many times what the decoding sequences alone would take, by the [`Pace`]
    /// of past steps; always 1 row at least, so that prompts move on. With several prompts that is what each of them may add, up to 3 of
    /// them: several people wait, and short chunks pay again and again for what a step with any rows of a prompt costs.
    Factor(f64),
}

/// The most prompts that count in [`Beside::Factor`].
const CROWD: usize = 3;

/// Limits of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// Rows of a step in all. Decoding sequences always run; prompts share what is left.
    pub rows: usize,
    /// What prompts may have of it in a step in which somebody decodes.
    pub beside_decode: Beside,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            rows: 512,
            beside_decode: Beside::Factor(3.0),
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

/// Chooses the next step: every decoding sequence, then chunks of prompts. The oldest prompt has half of the room, the rest goes
/// to the prompts that are done soonest: a long one neither waits for ever nor keeps many short ones waiting.
pub fn schedule(seqs: &[SeqView], budget: Budget, pace: &Pace) -> Batch {
    let mut batch = Batch::default();
    let mut work = Work::default();
    for s in seqs.iter().filter(|s| s.decoding && s.pending > 0) {
        batch.parts.push(Part {
            id: s.id,
            tokens: s.pending,
        });
        work.add(s.pending, s.keys, true);
    }
    let mut prompts: Vec<SeqView> = seqs
        .iter()
        .filter(|s| !s.decoding && s.pending > 0)
        .copied()
        .collect();
    let Some(&oldest) = prompts.first() else {
        return batch;
    };
    let mut room = Room::new(&work, prompts.len(), budget, pace);
    let first = room.take(&oldest, if prompts.len() > 1 { 0.5 } else { 1.0 });
    prompts[0].pending -= first;
    prompts[0].keys += first;
    prompts.sort_by_key(|s| s.pending); // stable: of equals the older first
    for s in prompts {
        let own = if s.id == oldest.id { first } else { 0 };
        let tokens = own + room.take(&s, 1.0);
        if tokens > 0 {
            batch.parts.push(Part { id: s.id, tokens });
        }
    }
    batch
}

/// What prompts may still have of a step.
struct Room<'a> {
    rows: usize,
    /// Seconds, where they count.
    seconds: Option<f64>,
    pace: &'a Pace,
    /// Whether any prompt has got a row.
    any: bool,
}

impl<'a> Room<'a> {
    /// Of `prompts` prompts beside `decoding`.
    fn new(decoding: &Work, prompts: usize, budget: Budget, pace: &'a Pace) -> Self {
        let left = budget.rows.saturating_sub(decoding.decode_rows);
        let (rows, seconds) = match budget.beside_decode {
            _ if decoding.decode_rows == 0 => (budget.rows.max(1), None),
            Beside::Rows(rows) => (left.min(rows), None),
            Beside::Factor(factor) => (
                left.max(1),
                Some((factor - 1.0).max(0.0) * prompts.min(CROWD) as f64 * pace.seconds(decoding)),
            ),
        };
        Self {
            rows,
            seconds,
            pace,
            any: false,
        }
    }

    /// Gives `s` as many rows as it wants and fit into `share` of what is left; at least 1 to the first that asks.
    fn take(&mut self, s: &SeqView, share: f64) -> usize {
        let mut tokens = s.pending.min((self.rows as f64 * share).ceil() as usize);
        if let Some(seconds) = &mut self.seconds {
            let fits = self.pace.rows_within(*seconds * share, s.keys, !self.any);
            tokens = tokens.min(fits.max(usize::from(!self.any)));
            if tokens > 0 {
                *seconds -= self.pace.chunk_seconds(tokens, s.keys, !self.any);
            }
        }
        self.rows -= tokens;
        self.any |= tokens > 0;
        tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(id: u64, pending: usize, decoding: bool) -> SeqView {
        SeqView {
            id: SeqId(id),
            pending,
            keys: 0,
            decoding,
        }
    }

    fn parts(seqs: &[SeqView]) -> Vec<(u64, usize)> {
        parts_with(seqs, Beside::Rows(16), &Pace::new(1000, 10, false))
    }

    fn parts_with(seqs: &[SeqView], beside_decode: Beside, pace: &Pace) -> Vec<(u64, usize)> {
        let budget = Budget {
            rows: 64,
            beside_decode,
        };
        schedule(seqs, budget, pace)
            .parts
            .iter()
            .map(|p| (p.id.0, p.tokens))
            .collect()
    }

    /// A decoding sequence with 50 keys takes 1 ms, a row of a prompt 0.1 ms.
    fn taught() -> Pace {
        let mut pace = Pace::new(1_000_000, 100, false);
        let mut work = Work::default();
        work.add(1, 50, true);
        pace.learn(&work, 1e-3);
        work.add(4, 0, false);
        pace.learn(&work, 1.4e-3);
        pace
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
    fn a_long_prompt_and_short_ones_share_the_room() {
        let seqs = [view(1, 9000, false), view(2, 40, false), view(3, 20, false)];
        assert_eq!(parts(&seqs), [(3, 20), (2, 12), (1, 32)]);
        // Beside a decoding sequence the room is smaller, its halves are, too.
        let seqs = [view(1, 9000, false), view(2, 1, true), view(3, 5, false)];
        assert_eq!(parts(&seqs), [(2, 1), (3, 5), (1, 11)]);
    }

    #[test]
    fn a_factor_bounds_the_predicted_time() {
        let pace = taught();
        let decode = SeqView {
            keys: 50,
            ..view(2, 1, true)
        };
        let rows = |factor: f64, keys: usize| {
            let prompt = SeqView {
                keys,
                ..view(1, 9000, false)
            };
            let parts = parts_with(&[prompt, decode], Beside::Factor(factor), &pace);
            assert_eq!(parts[0], (2, 1));
            parts[1].1
        };
        assert!((15..=20).contains(&rows(3.0, 0)), "{}", rows(3.0, 0));
        assert!(rows(3.0, 0) > rows(2.0, 0));
        assert!(rows(3.0, 0) > rows(3.0, 20_000), "keys before a chunk count");
        assert_eq!(rows(1.0, 0), 1, "prompts move on, whatever the factor");
        assert_eq!(rows(1e9, 0), 63, "the rows of a step are a limit, too");
    }

    #[test]
    fn each_prompt_has_its_room_up_to_three() {
        let pace = taught();
        let rows = |prompts: u64| -> usize {
            let seqs: Vec<_> = (0..prompts)
                .map(|i| view(i, 9000, false))
                .chain([SeqView {
                    keys: 50,
                    ..view(100, 1, true)
                }])
                .collect();
            let parts = parts_with(&seqs, Beside::Factor(2.0), &pace);
            parts.iter().filter(|p| p.0 < 100).map(|p| p.1).sum()
        };
        let one = rows(1);
        assert!((7..=10).contains(&one), "{one}");
        assert!((3 * one - 3..=3 * one + 3).contains(&rows(3)), "{}", rows(3));
        assert_eq!(rows(20), rows(3), "not without end");
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
