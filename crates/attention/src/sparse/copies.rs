//! Keys and values that stand alone in their pages, side by side in pages of their own.

use antefix_kernels::attend::{Page, PageMut, View};
use antefix_kv::KvDtype;
use antefix_state::{PAGE_ROWS, PARTITION};

use super::execute::PACKED;

/// Keys and values copied out of pages of which few are read.
#[derive(Debug, Default)]
pub(super) struct Packed {
    k16: Vec<u16>,
    v16: Vec<u16>,
    k32: Vec<f32>,
    v32: Vec<f32>,
    /// Keys copied so far.
    count: usize,
}

impl Packed {
    /// Begins again with the rows of these pages. Room is made for as many as they are, no more.
    pub(super) fn fill<'a>(&mut self, dim: usize, views: impl Iterator<Item = View<'a>> + Clone) {
        let keys: usize = views.clone().map(|view| view.rows.count_ones() as usize).sum();
        let values = keys.next_multiple_of(PAGE_ROWS) * dim;
        self.count = 0;
        for view in views {
            match view.page {
                Page::Bf16 { .. } => {
                    grow(&mut self.k16, values, 0);
                    grow(&mut self.v16, values, 0);
                }
                Page::F32 { .. } => {
                    grow(&mut self.k32, values, 0.0);
                    grow(&mut self.v32, values, 0.0);
                }
            }
            self.push_all(dim, &view);
        }
    }

    /// Copies the keys that are read of a page.
    fn push_all(&mut self, dim: usize, view: &View<'_>) {
        let mut left = u64::from(view.rows);
        while left != 0 {
            let from = left.trailing_zeros() as usize;
            let mut rows = from..from + (left >> from).trailing_ones() as usize;
            left &= u64::MAX << rows.end;
            // Into the next page where one is full.
            while !rows.is_empty() {
                let n = rows.len().min(PAGE_ROWS - self.count % PAGE_ROWS);
                self.push_within(dim, &view.page, rows.start..rows.start + n);
                rows.start += n;
            }
        }
    }

    /// Copies rows side by side.
    fn push_within(&mut self, dim: usize, from: &Page<'_>, rows: std::ops::Range<usize>) {
        let part = PAGE_ROWS * dim;
        let (page, row) = (self.count / PAGE_ROWS, self.count % PAGE_ROWS);
        let span = page * part..(page + 1) * part;
        let mut to = match from {
            Page::Bf16 { .. } => PageMut::Bf16 {
                k: &mut self.k16[span.clone()],
                v: &mut self.v16[span],
            },
            Page::F32 { .. } => PageMut::F32 {
                k: &mut self.k32[span.clone()],
                v: &mut self.v32[span],
            },
        };
        self.count += rows.len();
        to.copy_rows(row, from, rows);
    }

    /// Appends the pages of the copied keys.
    pub(super) fn views<'a>(&'a self, dim: usize, dtype: KvDtype, out: &mut Vec<View<'a>>) {
        let part = PAGE_ROWS * dim;
        out.extend((0..self.count.div_ceil(PAGE_ROWS)).map(|page| {
            let span = page * part..(page + 1) * part;
            let keys = PAGE_ROWS.min(self.count - page * PAGE_ROWS);
            View {
                page: match dtype {
                    KvDtype::Bf16 => Page::Bf16 {
                        k: &self.k16[span.clone()],
                        v: &self.v16[span],
                    },
                    KvDtype::F32 => Page::F32 {
                        k: &self.k32[span.clone()],
                        v: &self.v32[span],
                    },
                },
                rows: u32::MAX >> (PAGE_ROWS - keys),
            }
        }));
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.k16[..])
            + size_of_val(&self.v16[..])
            + size_of_val(&self.k32[..])
            + size_of_val(&self.v32[..])
    }
}

/// At least `len` values.
fn grow<T: Copy>(values: &mut Vec<T>, len: usize, zero: T) {
    if values.len() < len {
        values.reserve_exact(len - values.len());
        values.resize(len, zero);
    }
}

/// What drawn rows of a sequence read again and again of one layer and KV head, copied once: by partition of a plan.
#[derive(Debug, Default)]
pub(super) struct Copies(Vec<Copied>);

/// The copies of one partition.
#[derive(Debug, Default)]
pub(super) struct Copied {
    /// Pages, ascending, and their rows that were copied.
    rows: Vec<(usize, u32)>,
    packed: Packed,
}

impl Copies {
    /// Partition `i`.
    pub(super) fn part(&mut self, i: usize) -> &mut Copied {
        if self.0.len() <= i {
            self.0.resize_with(i + 1, Copied::default);
        }
        &mut self.0[i]
    }

    /// Forgets all partitions that hold keys at or behind position `len`: others may come there.
    pub(super) fn truncate(&mut self, len: usize) {
        self.0.retain(|part| {
            part.rows
                .last()
                .is_none_or(|&(page, _)| (page + 1) * PAGE_ROWS <= len)
        });
    }

    /// Bytes of the copies.
    pub(super) fn bytes(&self) -> usize {
        self.0.iter().map(|part| part.packed.bytes()).sum()
    }

    /// Rows that copies take at most when `keys` of `tokens` keys are read: few of a page are copied, and each partition may end with a
    /// page that is not full.
    pub(super) fn rows_for(keys: usize, tokens: usize) -> usize {
        match keys.min(tokens * PACKED as usize / PAGE_ROWS) {
            0 => 0,
            keys => keys.next_multiple_of(PAGE_ROWS) + tokens / PARTITION * PAGE_ROWS,
        }
    }
}

impl Copied {
    /// Copies of the given rows of pages, made unless they are there.
    pub(super) fn of<'a>(
        &mut self,
        dim: usize,
        rows: impl Iterator<Item = (usize, u32)> + Clone,
        view: impl Fn(usize) -> View<'a>,
    ) -> &Packed {
        if !self.rows.iter().copied().eq(rows.clone()) {
            self.rows = rows.clone().collect();
            self.packed.fill(dim, rows.map(|(page, _)| view(page)));
        }
        &self.packed
    }
}
