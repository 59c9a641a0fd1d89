//! Copying single keys and values out of their pages: what sparse plans read of pages that hold little for them.

use std::ops::Range;

use antefix_state::PAGE_ROWS;

use super::page::{k_bf16_at, k_f32_at, v_bf16_at};
use super::{Page, PageMut};

/// Keys side by side in a page.
const HALF: usize = PAGE_ROWS / 2;

impl PageMut<'_> {
    /// Copies the rows `rows` of another page of the same layout into as many from `row` on.
    ///
    /// # Panics
    /// When a row is not below 32 or the layouts differ.
    pub fn copy_rows(&mut self, row: usize, from: &Page<'_>, rows: Range<usize>) {
        self.copy_keys(row, from, rows.clone());
        match (self, from) {
            (PageMut::Bf16 { v, .. }, Page::Bf16 { v: fv, .. }) => {
                let dim = v.len() / PAGE_ROWS;
                let pairs =
                    row.is_multiple_of(2) && rows.start.is_multiple_of(2) && rows.len().is_multiple_of(2);
                if pairs {
                    let n = rows.len() * dim;
                    v[v_bf16_at(dim, row, 0)..][..n]
                        .copy_from_slice(&fv[v_bf16_at(dim, rows.start, 0)..][..n]);
                    return;
                }
                for (to, from) in (row..).zip(rows) {
                    let line = v[v_bf16_at(dim, to, 0)..].iter_mut().step_by(2).take(dim);
                    line.zip(fv[v_bf16_at(dim, from, 0)..].iter().step_by(2))
                        .for_each(|(to, from)| *to = *from);
                }
            }
            (PageMut::F32 { v, .. }, Page::F32 { v: fv, .. }) => {
                let dim = v.len() / PAGE_ROWS;
                v[row * dim..][..rows.len() * dim].copy_from_slice(&fv[rows.start * dim..rows.end * dim]);
            }
            _ => unreachable!("pages of one pool have one layout"),
        }
    }

    /// The same of the keys alone: the page's values are not touched, and need not be there.
    ///
    /// # Panics
    /// As [`PageMut::copy_rows`].
    pub fn copy_keys(&mut self, row: usize, from: &Page<'_>, rows: Range<usize>) {
        assert!(
            row + rows.len() <= PAGE_ROWS && rows.end <= PAGE_ROWS,
            "rows of a page"
        );
        let (mut to, mut at) = (row, rows.start);
        while at < rows.end {
            // Keys of half a page stand side by side.
            let n = (rows.end - at).min(HALF - at % HALF).min(HALF - to % HALF);
            self.copy_side_by_side(to, from, at, n);
            (to, at) = (to + n, at + n);
        }
    }

    /// Copies `n` keys that lie in one half of a page into one half.
    fn copy_side_by_side(&mut self, row: usize, from: &Page<'_>, from_row: usize, n: usize) {
        match (self, from) {
            (PageMut::Bf16 { k, .. }, Page::Bf16 { k: fk, .. }) => {
                let dim = k.len() / PAGE_ROWS;
                let lines = k[k_bf16_at(dim, row, 0)..].chunks_mut(2 * HALF).take(dim / 2);
                for (to, from) in lines.zip(fk[k_bf16_at(dim, from_row, 0)..].chunks(2 * HALF)) {
                    to[..2 * n].copy_from_slice(&from[..2 * n]);
                }
            }
            (PageMut::F32 { k, .. }, Page::F32 { k: fk, .. }) => {
                let dim = k.len() / PAGE_ROWS;
                let lines = k[k_f32_at(dim, row, 0)..].chunks_mut(HALF).take(dim);
                for (to, from) in lines.zip(fk[k_f32_at(dim, from_row, 0)..].chunks(HALF)) {
                    to[..n].copy_from_slice(&from[..n]);
                }
            }
            _ => unreachable!("pages of one pool have one layout"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_copied_alone_and_whole() {
        const DIM: usize = 48;
        let value = |row: usize, d: usize| (row * DIM + d) as f32 / 8.0;
        let row = |row: usize| -> Vec<f32> { (0..DIM).map(|d| value(row, d)).collect() };
        let n = PAGE_ROWS * DIM;
        let (mut k, mut v, mut to_k, mut to_v) = (vec![0u16; n], vec![0; n], vec![0; n], vec![0; n]);
        let (mut k32, mut v32) = (vec![0.0; n], vec![0.0; n]);
        let (mut to_k32, mut to_v32) = (vec![0.0; n], vec![0.0; n]);
        for r in 0..PAGE_ROWS {
            PageMut::Bf16 { k: &mut k, v: &mut v }.write_row(r, &row(r), &row(r));
            PageMut::F32 {
                k: &mut k32,
                v: &mut v32,
            }
            .write_row(r, &row(r), &row(r));
        }
        // Single ones, and runs within halves, over their border, from even to odd rows, of odd numbers.
        let runs = [
            (0, 17, 1),
            (17, 3, 1),
            (31, 31, 1),
            (2, 16, 1),
            (8, 24, 8),
            (20, 10, 12),
            (0, 3, 5),
            (6, 0, 3),
        ];
        for (to, from, n) in runs {
            for (part, part32) in [(&mut to_k, &mut to_k32), (&mut to_v, &mut to_v32)] {
                part.fill(0);
                part32.fill(0.0);
            }
            let page = Page::Bf16 { k: &k, v: &v };
            PageMut::Bf16 {
                k: &mut to_k,
                v: &mut to_v,
            }
            .copy_rows(to, &page, from..from + n);
            PageMut::F32 {
                k: &mut to_k32,
                v: &mut to_v32,
            }
            .copy_rows(to, &Page::F32 { k: &k32, v: &v32 }, from..from + n);
            let copied = [
                Page::Bf16 { k: &to_k, v: &to_v },
                Page::F32 {
                    k: &to_k32,
                    v: &to_v32,
                },
            ];
            for (copy, page) in copied.iter().zip([page, Page::F32 { k: &k32, v: &v32 }]) {
                for (r, d) in (0..PAGE_ROWS).flat_map(|r| (0..DIM).map(move |d| (r, d))) {
                    // Rows that nobody copied are as they were.
                    let want = match (to..to + n).contains(&r) {
                        true => [page.key(DIM, r - to + from, d), page.value(DIM, r - to + from, d)],
                        false => [0.0; 2],
                    };
                    assert_eq!(
                        [copy.key(DIM, r, d), copy.value(DIM, r, d)],
                        want,
                        "{to} {from} {n}: {r}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_key_is_copied_without_its_value() {
        const DIM: usize = 16;
        let n = PAGE_ROWS * DIM;
        let row: Vec<f32> = (0..DIM).map(|d| d as f32).collect();
        let (mut k, mut v, mut to) = (vec![0u16; n], vec![0; n], vec![0; n]);
        PageMut::Bf16 { k: &mut k, v: &mut v }.write_row(20, &row, &row);
        let page = Page::Bf16 { k: &k, v: &v };
        let mut copy = PageMut::Bf16 {
            k: &mut to,
            v: &mut [],
        };
        copy.copy_keys(3, &page, 20..21);
        let copy = Page::Bf16 { k: &to, v: &v };
        for (d, want) in row.iter().enumerate() {
            assert_eq!(copy.key(DIM, 3, d), *want);
            assert_eq!(copy.key(DIM, 4, d), 0.0);
        }
    }
}
