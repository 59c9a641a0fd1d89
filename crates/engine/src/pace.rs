//! What a step costs: a small model of its time, corrected by every step that ran.
//!
//! The scheduler asks it how many rows of a prompt fit beside the decoding sequences. It never touches results: whatever the chunks
//! are, the bits are the same.
//!
//! A step without prompts takes `step + row * rows + pair * pairs` seconds, `pairs` counting each row with each key it reads. A
//! chunk of a prompt adds `row * rows + pair * pairs + key * keys`: its rows, its attention, and the keys that it reads once however
//! many rows it has; and the first one `chunk`, what it costs to have any: weights that are unpacked for prompts alone. Both sums have coefficients of their own, because many rows of one sequence are cheaper than one row of many.

use antefix_models::decoder::Model;

/// What a step computes, in the units of the cost model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Rows of decoding sequences.
    pub decode_rows: usize,
    /// For each of those rows the keys before it, summed.
    pub decode_pairs: usize,
    /// Rows of prompts.
    pub prompt_rows: usize,
    /// For each of those rows the keys before it, summed.
    pub prompt_pairs: usize,
    /// For each chunk the keys before it, summed.
    pub prompt_keys: usize,
}

impl Work {
    /// Adds `rows` rows of a sequence that has `keys` computed tokens.
    pub fn add(&mut self, rows: usize, keys: usize, decoding: bool) {
        let pairs = rows * keys + rows * rows / 2;
        if decoding {
            self.decode_rows += rows;
            self.decode_pairs += pairs;
        } else {
            self.prompt_rows += rows;
            self.prompt_pairs += pairs;
            self.prompt_keys += keys;
        }
    }

    fn alone(&self) -> [f64; 3] {
        [1.0, self.decode_rows as f64, self.decode_pairs as f64]
    }

    fn chunk(&self) -> [f64; 4] {
        [
            1.0,
            self.prompt_rows as f64,
            self.prompt_pairs as f64,
            self.prompt_keys as f64,
        ]
    }
}

/// Rows of a chunk before any chunk was measured: enough to measure one, too few to hurt.
const FIRST_ROWS: usize = 8;

/// Part of the room that a chunk may fill: the model predicts the mean, and it is the slow steps that people notice.
const ROOM_USED: f64 = 0.9;

/// The times of past steps, as coefficients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    alone: Coefficients<3>,
    chunk: Coefficients<4>,
}

impl Pace {
    /// A guess for a model with `weights` weights that are multiplied a row, and `attention` products for a row and a key, in all
    /// layers together. `apart`: prompts are multiplied in an arithmetic of their own. Steps correct it.
    pub fn new(weights: usize, attention: usize, apart: bool) -> Self {
        // Seconds: weights arrive at 30 GB/s, a core or two multiply 2e11 times a second, keys are two bytes wide.
        let (weights, attention) = (weights as f64, attention as f64);
        let row = weights * 5e-12;
        let pair = attention * 5e-12;
        Self {
            alone: Coefficients::new([weights * 3e-11, row, pair]),
            chunk: match apart {
                true => Coefficients::new([weights * 6e-11, row * 0.5, pair, pair]),
                false => Coefficients::new([weights * 1e-13, row, pair, pair]),
            },
        }
    }

    /// The guess for `model`.
    pub fn of(model: &Model) -> Self {
        let spec = model.spec();
        let attention = spec.d_model * (2 * spec.q_dim() + 2 * spec.kv_dim());
        let weights = spec.layers * (attention + 3 * spec.d_model * spec.d_ff) + spec.d_model * spec.vocab;
        Self::new(weights, spec.layers * 2 * spec.q_dim(), model.tells_drawn_apart())
    }

    /// Predicted seconds of a step.
    pub fn seconds(&self, work: &Work) -> f64 {
        let chunk = match work.prompt_rows {
            0 => 0.0,
            _ => self.chunk.sum(work.chunk()),
        };
        self.alone.sum(work.alone()) + chunk
    }

    /// Takes in that `work` took `seconds`.
    pub fn learn(&mut self, work: &Work, seconds: f64) {
        if seconds.is_nan() || seconds <= 0.0 {
            return;
        }
        if work.prompt_rows == 0 {
            self.alone.learn(work.alone(), seconds);
        } else if work.decode_rows > 0 {
            // Chunks without company are much longer and cost less a row: they say little about short ones.
            let rest = seconds - self.alone.sum(work.alone());
            self.chunk.learn(work.chunk(), rest.max(seconds * 0.05));
        }
    }

    /// Predicted seconds that `rows` rows of a prompt with `keys` computed tokens add to a step; `first`: it is the step's first chunk.
    pub fn chunk_seconds(&self, rows: usize, keys: usize, first: bool) -> f64 {
        let mut work = Work::default();
        work.add(rows, keys, false);
        let once = if first { 0.0 } else { self.chunk.c[0] };
        self.chunk.sum(work.chunk()) - once
    }

    /// The most rows of a prompt with `keys` computed tokens that add at most `seconds` to a step, with some reserve; may be 0. The `first`
    /// chunk of a step has rows worth half of what it costs to have one, at least: with fewer a prompt would pay that many times.
    pub fn rows_within(&self, seconds: f64, keys: usize, first: bool) -> usize {
        let [once, row, pair, key] = self.chunk.c;
        let keys = keys as f64;
        let left = match first {
            true => (seconds * ROOM_USED - once - key * keys).max(once / 2.0),
            false => seconds * ROOM_USED - key * keys,
        };
        if left <= 0.0 {
            return 0;
        }
        // The root of pair / 2 * n^2 + (row + pair * keys) * n = left, in the form that does not cancel.
        let slope = row + pair * keys;
        let rows = (2.0 * left / (slope + (slope * slope + 2.0 * pair * left).sqrt())) as usize;
        match self.chunk.seen {
            0 => rows.min(FIRST_ROWS),
            _ => rows,
        }
    }
}

/// Prices that are never negative.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Coefficients<const N: usize> {
    c: [f64; N],
    seen: u32,
}

impl<const N: usize> Coefficients<N> {
    fn new(c: [f64; N]) -> Self {
        Self { c, seen: 0 }
    }

    fn sum(&self, amounts: [f64; N]) -> f64 {
        self.c.iter().zip(amounts).map(|(c, x)| c * x).sum()
    }

    /// Scales each price towards what was paid: the one that makes up most of the bill all the way, the others by their share beside
    /// it. One step moves them by a tenth of the difference (the first ones by more), and takes no more than a factor of two for
    /// true: others use the machine, too.
    fn learn(&mut self, amounts: [f64; N], paid: f64) {
        let bill = self.sum(amounts);
        if bill <= 0.0 {
            return;
        }
        self.seen = self.seen.saturating_add(1);
        let rate = (1.0 / f64::from(self.seen)).max(0.1);
        let limit = if self.seen <= 2 { 32.0 } else { 2.0 };
        let off = (paid / bill).clamp(1.0 / limit, limit);
        let items: Vec<f64> = self.c.iter().zip(amounts).map(|(c, x)| c * x).collect();
        let most = items.iter().copied().fold(0.0, f64::max);
        for (c, item) in self.c.iter_mut().zip(items) {
            // The first bill tells how fast the machine is: that holds for all prices.
            let share = if self.seen == 1 { 1.0 } else { item / most };
            *c *= off.powf(rate * share);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine whose steps take what a formula says, 10 % more or less.
    struct Machine {
        alone: [f64; 3],
        chunk: [f64; 4],
        noise: u64,
    }

    impl Machine {
        fn mean(&self, work: &Work) -> f64 {
            let dot = |c: &[f64], x: &[f64]| -> f64 { c.iter().zip(x).map(|(c, x)| c * x).sum() };
            let chunk = match work.prompt_rows {
                0 => 0.0,
                _ => dot(&self.chunk, &work.chunk()),
            };
            dot(&self.alone, &work.alone()) + chunk
        }

        fn run(&mut self, work: &Work) -> f64 {
            self.noise = self.noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let off = 0.9 + 0.2 * (self.noise >> 40) as f64 / f64::from(1 << 24);
            off * self.mean(work)
        }
    }

    /// Machines ten times as slow and as fast as the guess, one on which keys cost most of all, and one that unpacks weights for prompts.
    fn machines() -> [Machine; 4] {
        let of = |alone, chunk| Machine {
            alone,
            chunk,
            noise: 7,
        };
        [
            of([40e-3, 5e-3, 1e-6], [0.0, 5e-3, 2e-6, 1e-6]),
            of([0.4e-3, 0.05e-3, 1e-8], [0.0, 0.02e-3, 1e-8, 1e-8]),
            of([4e-3, 0.4e-3, 1e-7], [0.0, 0.3e-3, 1e-7, 7e-7]),
            of([4e-3, 0.4e-3, 1e-7], [4e-3, 0.2e-3, 1e-8, 1e-7]),
        ]
    }

    #[test]
    fn chunks_stay_within_the_factor_once_a_few_steps_were_seen() {
        for mut machine in machines() {
            let mut pace = Pace::new(135_000_000, 34_560, machine.chunk[0] > 0.0);
            let idle = |keys: usize| {
                let mut work = Work::default();
                work.add(1, keys, true);
                work
            };
            for i in 0..50 {
                let work = idle(100 + i);
                let took = machine.run(&work);
                pace.learn(&work, took);
            }
            let (mut keys, mut slow, mut steps, mut used) = (0, 0, 0, 0.0);
            while keys < 7168 {
                let mut work = idle(150 + steps);
                let base = pace.seconds(&work);
                let rows = pace.rows_within(2.0 * base, keys, true).max(1);
                work.add(rows, keys, false);
                let took = machine.run(&work);
                pace.learn(&work, took);
                let factor = took / machine.mean(&idle(150 + steps));
                slow += usize::from(factor > 3.3);
                used += factor;
                keys += rows;
                steps += 1;
            }
            assert!(
                slow * 50 <= steps,
                "{slow} of {steps} steps took more than 3.3 times as long"
            );
            // The room is used: a prompt does not crawl where it need not.
            assert!(
                used / steps as f64 > 1.8,
                "steps were only {} times as long",
                used / steps as f64
            );
        }
    }

    #[test]
    fn the_first_chunks_are_short() {
        let mut pace = Pace::new(1, 1, false);
        assert_eq!(pace.rows_within(1.0, 0, true), FIRST_ROWS);
        let mut work = Work::default();
        work.add(1, 0, true);
        work.add(8, 0, false);
        pace.learn(&work, 1e-6);
        assert!(pace.rows_within(1.0, 0, true) > 1000);
        assert_eq!(pace.rows_within(0.0, 0, true), 0);
    }

    #[test]
    fn what_fits_takes_as_long_as_was_asked() {
        let pace = Pace {
            chunk: Coefficients {
                c: [2e-3, 3e-4, 1e-7, 1e-6],
                seen: 9,
            },
            ..Pace::new(1, 1, true)
        };
        for (keys, first) in [(0, true), (100, true), (7000, true), (100, false)] {
            let rows = pace.rows_within(0.02, keys, first);
            assert!(pace.chunk_seconds(rows, keys, first) <= 0.02 * ROOM_USED);
            assert!(pace.chunk_seconds(rows + 2, keys, first) > 0.02 * ROOM_USED);
        }
        // Where not even an empty chunk fits, one that is worth it.
        assert_eq!(pace.rows_within(1e-3, 0, true), 3);
        assert_eq!(pace.rows_within(1e-4, 0, false), 0);
    }

    #[test]
    fn one_slow_step_changes_little() {
        let mut pace = Pace::new(1_000_000, 1000, false);
        let mut work = Work::default();
        work.add(1, 10, true);
        for _ in 0..50 {
            pace.learn(&work, 1e-3);
        }
        let before = pace.seconds(&work);
        pace.learn(&work, 1.0);
        assert!(pace.seconds(&work) < 1.1 * before);
        pace.learn(&work, f64::NAN);
        assert!(pace.seconds(&work).is_finite());
    }
}
