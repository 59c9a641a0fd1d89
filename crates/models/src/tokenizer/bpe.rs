//! Byte-level BPE: split into pieces, then merge neighbours by rank.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashMap;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use super::split::Pre;
use super::vocab::{Vocab, unmap_bytes, unmap_table};
use super::{Class, TokenizerError};
use crate::gguf::Gguf;

pub(super) struct Bpe {
    pre: Pre,
    /// (left, right) to (rank, result).
    merges: HashMap<(u32, u32), (u32, u32)>,
}

impl Bpe {
    pub(super) fn from_gguf(gguf: &Gguf, vocab: &Vocab, pre: Pre) -> Result<Self, TokenizerError> {
        let key = "tokenizer.ggml.merges";
        let lines = gguf
            .array(key)
            .and_then(|a| a.strs())
            .ok_or_else(|| TokenizerError::Key {
                key,
                what: "is missing or no list of strings".into(),
            })?;
        let unmap = unmap_table();
        let mut merges = HashMap::with_capacity(vocab.len());
        for (index, line) in lines.enumerate() {
            let merge = || {
                // The left part is never empty, so a space at the start belongs to it.
                let space = 1 + line.get(1..)?.iter().position(|&b| b == b' ')?;
                let side = |text: &[u8]| vocab.find(&unmap_bytes(text, &unmap)?);
                let (left, right) = (side(&line[..space])?, side(&line[space + 1..])?);
                let result = vocab.find(&[vocab.bytes(left), vocab.bytes(right)].concat())?;
                Some((left, right, result))
            };
            let (left, right, result) = merge().ok_or(TokenizerError::Merge { index })?;
            let rank = u32::try_from(index).map_err(|_| TokenizerError::Merge { index })?;
            merges.entry((left, right)).or_insert((rank, result));
        }
        Ok(Self { pre, merges })
    }

    pub(super) fn encode(&self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) {
        let normal: String;
        let text = if self.pre.is_nfc() && is_nfc_quick(text.chars()) != IsNormalized::Yes {
            normal = text.nfc().collect();
            &normal
        } else {
            text
        };
        for piece in self.pre.split(text) {
            self.piece(vocab, piece.as_bytes(), out);
        }
    }

    fn piece(&self, vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
        if self.pre.whole_pieces_first()
            && let Some(id) = vocab.find(piece).filter(|&id| vocab.class(id) == Class::Normal)
        {
            out.push(id);
            return;
        }
        let symbols: Vec<u32> = piece.iter().filter_map(|&b| vocab.byte(b)).collect();
        merge(symbols, |l, r| self.merges.get(&(l, r)).copied(), out);
    }
}

/// Merges neighbouring symbols, lowest rank first, ties from the left, until nothing merges. `n log n`.
pub(super) fn merge<R: Ord + Copy>(
    symbols: Vec<u32>,
    rank: impl Fn(u32, u32) -> Option<(R, u32)>,
    out: &mut Vec<u32>,
) {
    const GONE: u32 = u32::MAX;
    let n = symbols.len();
    let mut ids = symbols;
    let mut next: Vec<usize> = (1..=n).collect();
    let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
    let mut heap = BinaryHeap::new();
    let consider = |heap: &mut BinaryHeap<_>, ids: &[u32], left: usize, right: usize| {
        if let Some((rank, result)) = rank(ids[left], ids[right]) {
            heap.push(Reverse((rank, left, right, ids[left], ids[right], result)));
        }
    };
    for i in 1..n {
        consider(&mut heap, &ids, i - 1, i);
    }
    while let Some(Reverse((_, left, right, l, r, result))) = heap.pop() {
        // Either side may have changed since.
        if ids[left] != l || ids[right] != r || next[left] != right {
            continue;
        }
        ids[left] = result;
        ids[right] = GONE;
        next[left] = next[right];
        if next[left] < n {
            previous[next[left]] = left;
            consider(&mut heap, &ids, left, next[left]);
        }
        if previous[left] < n {
            consider(&mut heap, &ids, previous[left], left);
        }
    }
    out.extend(ids.into_iter().filter(|&id| id != GONE));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_rank_merges_first_and_ties_from_the_left() {
        // 1 2 -> 12 (rank 1), 2 3 -> 23 (rank 0), 1 1 -> 11 (rank 2)
        let rank = |l, r| match (l, r) {
            (1, 2) => Some((1, 12)),
            (2, 3) => Some((0, 23)),
            (1, 1) => Some((2, 11)),
            _ => None,
        };
        let run = |s: &[u32]| {
            let mut out = Vec::new();
            merge(s.to_vec(), rank, &mut out);
            out
        };
        assert_eq!(run(&[1, 2, 3]), [1, 23]);
        assert_eq!(run(&[1, 1, 1]), [11, 1]);
        assert_eq!(run(&[]), Vec::<u32>::new());
    }
}
