//! Copying single keys and values out of their pages: what sparse plans read of pages that hold little for them.

use antefix_state::PAGE_ROWS;

use super::page::{k_bf16_at, k_f32_at, v_bf16_at};
use super::{Page, PageMut};

/// Keys side by side in a page.
const HALF: usize = PAGE_ROWS / 2;

impl PageMut<'_> {
    /// Copies row `from_row` of another page of the same layout into row `row`.
    ///
    /// # Panics
    /// When a row is not below 32 or the layouts differ.
    pub fn copy_row(&mut self, row: usize, from: &Page<'_>, from_row: usize) {
        self.copy_key(row, from, from_row);
        match (self, from) {
            (PageMut::Bf16 { v, .. }, Page::Bf16 { v: fv, .. }) => {
                let dim = v.len() / PAGE_ROWS;
                let pairs = v[v_bf16_at(dim, row, 0)..].iter_mut().step_by(2).take(dim);
                pairs
                    .zip(fv[v_bf16_at(dim, from_row, 0)..].iter().step_by(2))
                    .for_each(|(to, from)| *to = *from);
            }
            (PageMut::F32 { v, .. }, Page::F32 { v: fv, .. }) => {
                let dim = v.len() / PAGE_ROWS;
                v[row * dim..][..dim].copy_from_slice(&fv[from_row * dim..][..dim]);
            }
            _ => unreachable!("pages of one pool have one layout"),
        }
    }

    /// The same of the key alone: the page's values are not touched, and need not be there.
    ///
    /// # Panics
    /// As [`PageMut::copy_row`].
    pub fn copy_key(&mut self, row: usize, from: &Page<'_>, from_row: usize) {
        assert!(row < PAGE_ROWS && from_row < PAGE_ROWS, "rows of a page");
        match (self, from) {
            (PageMut::Bf16 { k, .. }, Page::Bf16 { k: fk, .. }) => {
                let dim = k.len() / PAGE_ROWS;
                let lines = k[k_bf16_at(dim, row, 0)..].chunks_mut(2 * HALF).take(dim / 2);
                for (to, from) in lines.zip(fk[k_bf16_at(dim, from_row, 0)..].chunks(2 * HALF)) {
                    to[..2].copy_from_slice(&from[..2]);
                }
            }
            (PageMut::F32 { k, .. }, Page::F32 { k: fk, .. }) => {
                let dim = k.len() / PAGE_ROWS;
                let lines = k[k_f32_at(dim, row, 0)..].iter_mut().step_by(HALF).take(dim);
                lines
                    .zip(fk[k_f32_at(dim, from_row, 0)..].iter().step_by(HALF))
                    .for_each(|(to, from)| *to = *from);
            }
            _ => unreachable!("pages of one pool have one layout"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_copied_alone_and_whole() {
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
        for (to, from) in [(0, 17), (17, 3), (31, 31), (2, 16)] {
            let page = Page::Bf16 { k: &k, v: &v };
            PageMut::Bf16 {
                k: &mut to_k,
                v: &mut to_v,
            }
            .copy_row(to, &page, from);
            PageMut::F32 {
                k: &mut to_k32,
                v: &mut to_v32,
            }
            .copy_row(to, &Page::F32 { k: &k32, v: &v32 }, from);
            for d in 0..DIM {
                let copy = Page::Bf16 { k: &to_k, v: &to_v };
                assert_eq!(copy.key(DIM, to, d), page.key(DIM, from, d));
                assert_eq!(copy.value(DIM, to, d), page.value(DIM, from, d));
                let copy = Page::F32 {
                    k: &to_k32,
                    v: &to_v32,
                };
                assert_eq!(copy.key(DIM, to, d), value(from, d));
                assert_eq!(copy.value(DIM, to, d), value(from, d));
            }
        }
        // Rows that nobody copied are as they were.
        let copy = Page::F32 {
            k: &to_k32,
            v: &to_v32,
        };
        assert!((0..DIM).all(|d| copy.key(DIM, 5, d) == 0.0 && copy.value(DIM, 5, d) == 0.0));
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
        copy.copy_key(3, &page, 20);
        let copy = Page::Bf16 { k: &to, v: &v };
        for (d, want) in row.iter().enumerate() {
            assert_eq!(copy.key(DIM, 3, d), *want);
            assert_eq!(copy.key(DIM, 4, d), 0.0);
        }
    }
}
