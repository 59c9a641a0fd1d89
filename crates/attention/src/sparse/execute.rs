//! The fold of a planned block over the pages that it reads.
//!
//! Per partition of 1,024 positions: first the pages that are read in place, ascending, with a bit for every key; then the keys of pages
//! of which few are read, packed into pages of their own, ascending. Which page goes which way follows from the plan alone, and a page
//! without a kept key costs nothing. A plan that keeps everything reads every page in place: the bits of dense attention.

use std::ops::Range;

use antefix_kernels::attend::{self as kernel, AttendScratch, Page, PageMut, StateMut, StateRef, View};
use antefix_kv::KvDtype;
use antefix_state::plan::{Cover, Plan, Unit};
use antefix_state::{PAGE_ROWS, PARTITION};

use super::Stretch;
use crate::attend::{Ctx, Worker};

/// Most query rows (tokens x heads of a group) of a task: keys that are packed serve all of them.
const TASK_ROWS: usize = 512;

/// A page of which more keys are read than these is read in place. Copying a key costs about a tenth of what a page costs 64 rows.
const PACKED: u32 = 8;

const PARTITION_PAGES: usize = PARTITION / PAGE_ROWS;

/// The rows of a stretch in pieces for one task each: inside a block of the plan, at most [`TASK_ROWS`] rows of `group` heads.
///
/// `pos0` is the position of the sequence's first row in the step.
pub(crate) fn pieces(stretch: &Stretch, pos0: usize, group: usize) -> Vec<Range<usize>> {
    let block = stretch.plan.units.iter().find_map(|cover| match cover {
        Cover::Dense => None,
        Cover::Sparse(rows) => Some(rows.block as usize),
    });
    let Range { start, end } = stretch.tokens;
    let most = (TASK_ROWS / group).max(1);
    let (mut out, mut from) = (Vec::new(), start);
    while from < end {
        let at = pos0 + from;
        let border = block.map_or(end, |b| ((at / b + 1) * b - pos0).min(end));
        let parts = (border - from).div_ceil(most);
        let step = (border - from).div_ceil(parts);
        out.extend((from..border).step_by(step).map(|f| f..(f + step).min(border)));
        from = border;
    }
    out
}

/// Keys copied out of pages of which few are read.
#[derive(Default)]
pub(crate) struct Scratch {
    k16: Vec<u16>,
    v16: Vec<u16>,
    k32: Vec<f32>,
    v32: Vec<f32>,
    /// Keys copied so far.
    count: usize,
    all: Vec<(u32, u32)>,
    /// The state of one head of a group: `m`, `l`, `acc`.
    one: [Vec<f32>; 3],
}

/// What the rows of one unit read, and how they see it.
struct Reads<'a> {
    seq: usize,
    head: usize,
    /// Position of the first query of the block: keys before it are seen by all of its rows.
    first_query: usize,
    /// One past the last key of any row.
    last: usize,
    /// A number a page, a bit a key.
    bits: &'a [u32],
}

impl Ctx<'_> {
    /// Attends `tokens` of the sequence, which lie in one block of `plan`.
    pub(crate) fn planned(
        &self,
        seq: usize,
        (tokens, stretch): (Range<usize>, &Stretch),
        head: usize,
        state: &mut StateMut<'_>,
        worker: &mut Worker,
    ) {
        let (group, dim) = (self.geometry.group(), self.geometry.dim);
        let s = &self.seqs[seq];
        let rows = |g: Range<usize>| {
            let token = move |t: usize| (s.first + t, s.pos0 + t as u32);
            (tokens.clone().map(token), g)
        };
        let plan: &Plan = &stretch.plan;
        let queries = s.pos0 + stretch.tokens.start as u32..s.pos0 + stretch.tokens.end as u32;
        let (at, last) = (s.pos0 as usize + tokens.start, s.pos0 as usize + tokens.end);
        let fold = |cover: &Cover, state: &mut StateMut<'_>, worker: &mut Worker| {
            let (bits, first_query) = match cover {
                Cover::Dense => (vec![u32::MAX; last.div_ceil(PAGE_ROWS)], at),
                Cover::Sparse(rows) => {
                    let i = at / rows.block as usize - rows.first_block as usize;
                    (rows.page_bits(i), rows.queries_of(i, &queries).start as usize)
                }
            };
            let reads = Reads {
                seq,
                head,
                first_query,
                last,
                bits: &bits[..last.div_ceil(PAGE_ROWS)],
            };
            self.fold(&reads, state, worker);
        };
        match plan.unit {
            Unit::KvGroup => {
                let (tokens, heads) = rows(0..group);
                self.gather_heads(tokens, head, heads, worker);
                fold(&plan.units[head], state, worker);
            }
            Unit::QueryHead => {
                for g in 0..group {
                    let (tokens, heads) = rows(g..g + 1);
                    self.gather_heads(tokens, head, heads, worker);
                    let n = worker.visible.len();
                    let [mut m, mut l, mut acc] = std::mem::take(&mut worker.sparse.one);
                    m.resize(n, 0.0);
                    l.resize(n, 0.0);
                    acc.resize(n * dim, 0.0);
                    let mut one = StateMut {
                        m: &mut m,
                        l: &mut l,
                        acc: &mut acc,
                    };
                    fold(&plan.units[head * group + g], &mut one, worker);
                    for t in 0..n {
                        let row = t * group + g;
                        state.m[row] = m[t];
                        state.l[row] = l[t];
                        state.acc[row * dim..][..dim].copy_from_slice(&acc[t * dim..][..dim]);
                    }
                    worker.sparse.one = [m, l, acc];
                }
            }
        }
    }

    /// Folds the worker's queries over what they read, partition by partition.
    fn fold(&self, reads: &Reads<'_>, state: &mut StateMut<'_>, worker: &mut Worker) {
        let dim = self.geometry.dim;
        let Worker {
            q,
            visible,
            m,
            l,
            acc,
            kernel,
            sparse,
        } = worker;
        let rows = visible.len();
        m.resize(rows, 0.0);
        l.resize(rows, 0.0);
        acc.resize(rows * dim, 0.0);
        kernel::reset(state);
        for (partition, bits) in reads.bits.chunks(PARTITION_PAGES).enumerate() {
            if bits.iter().all(|&b| b == 0) {
                continue;
            }
            let mut part = StateMut { m, l, acc };
            kernel::reset(&mut part);
            let first = partition * PARTITION_PAGES;
            let queries = (q.as_slice(), visible.as_slice());
            self.in_place(reads, (first, bits), queries, &mut part, kernel);
            self.packed(reads, (first, bits), queries, &mut part, (kernel, sparse));
            kernel::merge(state, &StateRef { m, l, acc });
        }
    }

    /// The pages of a partition that are read where they lie.
    fn in_place(
        &self,
        reads: &Reads<'_>,
        (first, bits): (usize, &[u32]),
        (q, visible): (&[f32], &[(u32, u32)]),
        part: &mut StateMut<'_>,
        scratch: &mut AttendScratch,
    ) {
        let here = |i: &usize| reads.in_place(first + i, bits[*i]);
        let (Some(from), Some(to)) = ((0..bits.len()).find(here), (0..bits.len()).rfind(here)) else {
            return;
        };
        let (views, keys) = self.pages(reads.seq, reads.head, first + from..first + to + 1);
        let views: Vec<View<'_>> = views
            .iter()
            .zip(from..)
            .map(|(view, i)| View {
                page: view.page,
                rows: if here(&i) { bits[i] } else { 0 },
            })
            .collect();
        let start = (first + from) * PAGE_ROWS;
        kernel::attend(
            self.cpu,
            self.geometry.dim,
            q,
            visible,
            self.geometry.softcap,
            &views,
            start as u32,
            keys.min((reads.last - start) as u32),
            part,
            scratch,
        );
    }

    /// The other keys of a partition, copied side by side.
    fn packed(
        &self,
        reads: &Reads<'_>,
        (first, bits): (usize, &[u32]),
        (q, visible): (&[f32], &[(u32, u32)]),
        part: &mut StateMut<'_>,
        (scratch, packed): (&mut AttendScratch, &mut Scratch),
    ) {
        let few = |i: &usize| bits[*i] != 0 && !reads.in_place(first + i, bits[*i]);
        packed.count = 0;
        let dim = self.geometry.dim;
        let pages = self.seqs[reads.seq].kv.pages(self.layer, reads.head);
        for i in (0..bits.len()).filter(few) {
            let page = self.pool.page(pages[first + i]);
            let mut left = bits[i];
            while left != 0 {
                packed.push(dim, &page, left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
        if packed.count == 0 {
            return;
        }
        packed.all.clear();
        packed.all.resize(visible.len(), (0, packed.count as u32));
        kernel::attend(
            self.cpu,
            dim,
            q,
            &packed.all,
            self.geometry.softcap,
            &packed.pages(dim, self.pool.shape().dtype),
            0,
            packed.count as u32,
            part,
            scratch,
        );
    }
}

impl Reads<'_> {
    /// Whether page `page`, of which `bits` are read, is read in place: whether it is worth it, or holds keys that only some rows see.
    fn in_place(&self, page: usize, bits: u32) -> bool {
        bits.count_ones() > PACKED || bits != 0 && (page + 1) * PAGE_ROWS > self.first_query
    }
}

impl Scratch {
    fn push(&mut self, dim: usize, from: &Page<'_>, from_row: usize) {
        let part = PAGE_ROWS * dim;
        let (page, row) = (self.count / PAGE_ROWS, self.count % PAGE_ROWS);
        let (at, end) = (page * part, (page + 1) * part);
        let mut to = match from {
            Page::Bf16 { .. } => {
                grow(&mut self.k16, end, 0);
                grow(&mut self.v16, end, 0);
                PageMut::Bf16 {
                    k: &mut self.k16[at..end],
                    v: &mut self.v16[at..end],
                }
            }
            Page::F32 { .. } => {
                grow(&mut self.k32, end, 0.0);
                grow(&mut self.v32, end, 0.0);
                PageMut::F32 {
                    k: &mut self.k32[at..end],
                    v: &mut self.v32[at..end],
                }
            }
        };
        to.copy_row(row, from, from_row);
        self.count += 1;
    }

    fn pages(&self, dim: usize, dtype: KvDtype) -> Vec<View<'_>> {
        let part = PAGE_ROWS * dim;
        let one = |page: usize| {
            let span = page * part..(page + 1) * part;
            match dtype {
                KvDtype::Bf16 => Page::Bf16 {
                    k: &self.k16[span.clone()],
                    v: &self.v16[span],
                },
                KvDtype::F32 => Page::F32 {
                    k: &self.k32[span.clone()],
                    v: &self.v32[span],
                },
            }
            .into()
        };
        (0..self.count.div_ceil(PAGE_ROWS)).map(one).collect()
    }
}

/// At least `len` values.
fn grow<T: Copy>(values: &mut Vec<T>, len: usize, zero: T) {
    if values.len() < len {
        values.resize(len, zero);
    }
}
