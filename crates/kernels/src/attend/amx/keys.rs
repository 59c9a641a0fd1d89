//! Scores: the tile products of queries and keys, step by step beside other work.

use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::ops::Range;

use super::{CHUNK, HALF, LINE, Line, Operand, RowTile, Scores};
use crate::attend::Page;

/// One page or two that follow each other in what a tile of rows sees.
pub(super) struct Pair(Operand, Option<Operand>);

impl Pair {
    pub(super) fn take<'a>(pages: &mut impl Iterator<Item = &'a Operand>) -> Option<Self> {
        let first = *pages.next()?;
        Some(Self(first, pages.next().copied()))
    }

    pub(super) fn len(&self) -> usize {
        1 + usize::from(self.1.is_some())
    }

    pub(super) fn pages(&self) -> impl Iterator<Item = &Operand> {
        std::iter::once(&self.0).chain(&self.1)
    }

    fn last(&self) -> &Operand {
        self.1.as_ref().unwrap_or(&self.0)
    }
}

/// Tile products of one tile of rows with the keys of a pair of pages, under way: sums in tiles 0..=3, one for each half page.
///
/// The compiler never uses tiles, so they keep their contents from one step to the next.
pub(super) struct Products {
    /// Left tile of the step at hand.
    q: *const Line,
    /// Rows.
    n: usize,
    /// Right tiles of the step at hand, one for each page.
    k: [*const u16; 2],
    /// Whether there are two pages, and whether the second is next.
    two: bool,
    second: bool,
    /// Whether the low part of the queries is next.
    low: bool,
    /// From the lower half of a page of keys to the upper.
    half: usize,
    step: usize,
    steps: usize,
    /// Lines of keys, and of values, of a page ahead that each step asks for.
    lines: usize,
    /// Keys and values of pages that come later.
    ahead: [Option<(*const u16, *const u16)>; 2],
    /// Whether they are to come into the first cache, or just into the second.
    near: bool,
    /// Progress towards the next step, in `1 / over` steps.
    credit: usize,
    over: usize,
    stored: bool,
}

impl Products {
    /// Spreads the steps over `calls` calls of [`Self::pace`].
    pub(super) fn over(mut self, calls: usize) -> Self {
        self.over = calls;
        self
    }

    #[inline]
    pub(super) fn pace(&mut self) {
        self.credit += self.steps;
        while self.credit >= self.over && self.step < self.steps {
            self.credit -= self.over;
            self.advance();
        }
    }

    /// One step: 32 dimensions of one part of the queries (high or low) with both halves of a page.
    #[inline]
    fn advance(&mut self) {
        let (q, k, half) = (self.q, self.k[usize::from(self.second)], self.half * 2);
        // SAFETY: the tiles are configured and zeroed; `q` and `k` are inside of the packed queries and of the page.
        unsafe {
            if !self.second {
                asm!(
                    "tileloadd tmm4, [{q} + {line} * 1]",
                    "tileloadd tmm6, [{k} + {line} * 1]",
                    "add {k}, {half}",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{k} + {line} * 1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    q = in(reg) q,
                    k = inout(reg) k => _,
                    half = in(reg) half,
                    line = in(reg) LINE,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, readonly),
                );
            } else {
                asm!(
                    "tileloadd tmm6, [{k} + {line} * 1]",
                    "add {k}, {half}",
                    "tdpbf16ps tmm2, tmm4, tmm6",
                    "tileloadd tmm7, [{k} + {line} * 1]",
                    "tdpbf16ps tmm3, tmm4, tmm7",
                    k = inout(reg) k => _,
                    half = in(reg) half,
                    line = in(reg) LINE,
                    out("tmm2") _, out("tmm3") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, readonly),
                );
            }
        }
        for &(k, v) in self.ahead.iter().flatten() {
            for line in self.step * self.lines..(self.step + 1) * self.lines {
                let (k, v) = (k.wrapping_add(line * CHUNK), v.wrapping_add(line * CHUNK));
                // SAFETY: asking for memory reads nothing.
                unsafe {
                    if self.near {
                        _mm_prefetch::<_MM_HINT_T0>(k.cast());
                        _mm_prefetch::<_MM_HINT_T0>(v.cast());
                    } else {
                        _mm_prefetch::<_MM_HINT_T1>(k.cast());
                        _mm_prefetch::<_MM_HINT_T1>(v.cast());
                    }
                }
            }
        }
        self.step += 1;
        self.second = self.two && !self.second;
        if !self.second {
            self.q = self.q.wrapping_add(self.n);
            // The low part of the queries meets the same keys, the next dimensions meet the next.
            if self.low {
                self.k = self.k.map(|k| k.wrapping_add(HALF * CHUNK));
            }
            self.low = !self.low;
        }
    }

    /// Takes the steps that are left and stores the scores, once.
    pub(super) fn finish(&mut self, into: &mut Scores) {
        if std::mem::replace(&mut self.stored, true) {
            return;
        }
        while self.step < self.steps {
            self.advance();
        }
        // SAFETY: `into` takes four tiles of 16 lines.
        unsafe {
            asm!(
                "tilestored [{s} + {line} * 1], tmm0",
                "tilestored [{s} + {line} * 1 + 1024], tmm1",
                s = in(reg) into.as_mut_ptr(),
                line = in(reg) LINE,
                options(nostack, preserves_flags),
            );
            if self.two {
                asm!(
                    "tilestored [{s} + {line} * 1 + 2048], tmm2",
                    "tilestored [{s} + {line} * 1 + 3072], tmm3",
                    s = in(reg) into.as_mut_ptr(),
                    line = in(reg) LINE,
                    options(nostack, preserves_flags),
                );
            }
        }
    }
}

impl RowTile<'_> {
    /// The products of the rows with the keys of a pair of pages, to be computed step by step. Alone, a tile of rows asks for the two
    /// pages after those; else for the next two of its share of the coming batch, into the second cache: the first one is full.
    pub(super) fn products(&self, pair: &Pair, share: &mut Range<usize>) -> Products {
        let dim = self.call.dim;
        let alone = self.n == self.call.visible.len();
        let mut after = pair.last().index + 1..self.open.len();
        let pages = if alone { &mut after } else { share };
        let ahead = [pages.next(), pages.next()].map(|i| match self.call.pages[self.open[i?]].page {
            Page::Bf16 { k, v } => Some((k.as_ptr(), v.as_ptr())),
            Page::F32 { .. } => None,
        });
        // SAFETY: the tiles are configured, and nobody else uses them before the products are finished.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, nomem, preserves_flags),
            );
        }
        Products {
            q: self.q.as_ptr(),
            n: self.n,
            k: [pair.0.k, pair.1.map_or(pair.0.k, |page| page.k)],
            two: pair.len() == 2,
            second: false,
            low: false,
            half: HALF * dim,
            step: 0,
            steps: dim / HALF * pair.len(),
            lines: dim / (dim / HALF * pair.len()),
            ahead,
            near: alone,
            credit: 0,
            over: 1,
            stored: false,
        }
    }
}
