//! The seam of reused text: how chunks that were computed alone become the context of a prompt.
//!
//! A policy returns data: where each chunk stands, under which temperature and power it is attended, and which of its rows are
//! computed again. The engine finds or computes the chunks and does what the data say.

use std::fmt::Debug;

/// Decides how chunks are used. Same sizes, same decision.
pub trait ChunkUse: Send + Sync + Debug {
    /// Where chunks of `chunks` tokens stand behind a prefix of `prefix` tokens.
    fn layout(&self, prefix: usize, chunks: &[usize]) -> ChunkLayout;

    /// Which of `rows` chunk rows are computed again on a model of `layers` layers; `None`: none.
    fn mend(&self, layers: usize, rows: usize) -> Option<Mend>;
}

/// Places of chunks.
#[derive(Debug, Clone, PartialEq)]
pub struct ChunkLayout {
    /// How far each chunk is moved from where it was computed, right behind the prefix.
    pub deltas: Vec<i32>,
    /// Position of the first token behind the chunks.
    pub next: u32,
    /// Divides the scores of all chunk rows.
    pub temperature: f32,
    /// Multiplies the log-sum-exp of all chunk rows together.
    pub lse_scale: f32,
}

impl ChunkLayout {
    /// One chunk after the other, as in an ordinary prompt.
    pub fn in_line(prefix: usize, chunks: &[usize]) -> Self {
        let mut at = 0;
        let deltas = chunks
            .iter()
            .map(|&n| {
                at += n;
                (at - n) as i32
            })
            .collect();
        Self {
            deltas,
            next: (prefix + at) as u32,
            temperature: 1.0,
            lse_scale: 1.0,
        }
    }

    /// All chunks at the same positions, right behind the prefix.
    pub fn side_by_side(prefix: usize, chunks: &[usize], temperature: f32, lse_scale: f32) -> Self {
        Self {
            deltas: vec![0; chunks.len()],
            next: (prefix + chunks.iter().max().copied().unwrap_or(0)) as u32,
            temperature,
            lse_scale,
        }
    }
}

/// Which chunk rows are computed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mend {
    /// Rows that go on behind the selection of each layer, `[L]`, not increasing; layer 0 selects nothing.
    pub keep: Vec<usize>,
    /// How they are chosen.
    pub deviation: Deviation,
}

/// How wrong a stored row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deviation {
    /// Squared distance of the values: the code of paper `cacheblend`.
    Values,
    /// Squared distance of the rotated keys: LMCache.
    Keys,
    /// Both.
    Both,
    /// A number that depends on the seed and the position: the baseline that knows nothing.
    Random(u64),
    /// The earlier in its chunk, the more: the baseline that measures nothing.
    First,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_stand_in_line_or_side_by_side() {
        let line = ChunkLayout::in_line(10, &[5, 0, 7]);
        assert_eq!((line.deltas, line.next), (vec![0, 5, 5], 22));
        let side = ChunkLayout::side_by_side(10, &[5, 0, 7], 0.9, 0.8);
        assert_eq!((side.deltas, side.next), (vec![0; 3], 17));
        assert_eq!(ChunkLayout::side_by_side(10, &[], 1.0, 1.0).next, 10);
    }
}
