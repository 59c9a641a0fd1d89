//! The fold of a planned block over the pages that it reads.
//!
//! Kept keys make partitions of 1,024, in whole pages. In a partition come first the pages before the diagonal that are read in place,
//! ascending, with a bit for every key; then the keys of pages of which few are read, packed into pages of their own, ascending; then
//! the pages of the diagonal. All of it follows from the plan alone, and costs are those of the kept keys. A plan that keeps everything
//! has the partitions of positions, and reads every page in place: the bits of dense attention.

use std::ops::Range;

use antefix_kernels::attend::{self as kernel, StateMut, StateRef, View};
use antefix_state::plan::{Cover, Plan, Unit};
use antefix_state::{PAGE_ROWS, PARTITION};

use super::Stretch;
use super::copies::{Copied, Copies, Packed};
use crate::attend::{Ctx, Worker};

/// Most query rows (tokens x heads of a group) of a task: keys that are packed serve all of them.
const TASK_ROWS: usize = 512;

/// A page of which more keys are read than these is read in place. Copying a key costs about a tenth of what a page costs 64 rows.
pub(super) const PACKED: u32 = 8;

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

/// Buffers of a task.
#[derive(Default)]
pub(crate) struct Scratch {
    packed: Packed,
    /// What rows see that see everything.
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
        // Heads that read keys of their own would take turns with the copies of a group.
        let copies = s
            .planning()
            .filter(|_| plan.unit == Unit::KvGroup)
            .and_then(|planning| planning.copies(self.layer, head, at));
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
            // Another row of the sequence may have them in its hands.
            let mut copies = copies.as_ref().and_then(|copies| copies.try_lock().ok());
            self.fold(&reads, copies.as_deref_mut(), state, worker);
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
    fn fold(
        &self,
        reads: &Reads<'_>,
        mut copies: Option<&mut Copies>,
        state: &mut StateMut<'_>,
        worker: &mut Worker,
    ) {
        let dim = self.geometry.dim;
        let rows = worker.visible.len();
        worker.m.resize(rows, 0.0);
        worker.l.resize(rows, 0.0);
        worker.acc.resize(rows * dim, 0.0);
        kernel::reset(state);
        let (mut from, mut part) = (0, 0);
        while let Some(pages) = reads.partition(from) {
            let copied = copies.as_mut().map(|copies| copies.part(part));
            self.partition(reads, pages.clone(), copied, worker);
            part += 1;
            let Worker { m, l, acc, .. } = &*worker;
            kernel::merge(state, &StateRef { m, l, acc });
            from = pages.end;
        }
    }

    /// The states of the worker's queries over the keys that they read of `pages`.
    fn partition(
        &self,
        reads: &Reads<'_>,
        pages: Range<usize>,
        copied: Option<&mut Copied>,
        worker: &mut Worker,
    ) {
        let Worker {
            q,
            visible,
            m,
            l,
            acc,
            kernel: scratch,
            sparse: Scratch { packed, all, .. },
        } = worker;
        let dim = self.geometry.dim;
        let ids = self.seqs[reads.seq].kv.pages(self.layer, reads.head);
        let view = |i: usize| View {
            page: self.pool.page(ids[i]),
            rows: reads.bits[i],
        };
        let diagonal = reads.first_query / PAGE_ROWS;
        let before = pages.start..pages.end.min(diagonal).max(pages.start);
        let rows = before.clone().map(|i| (i, reads.bits[i]));
        let mut views: Vec<_> = rows
            .clone()
            .filter(|(_, bits)| bits.count_ones() > PACKED)
            .map(|(i, _)| view(i))
            .collect();
        let few = rows.filter(|(_, bits)| (1..=PACKED).contains(&bits.count_ones()));
        let packed: &Packed = match copied {
            Some(copied) => copied.of(dim, few, view),
            None => {
                packed.fill(dim, few.map(|(i, _)| view(i)));
                packed
            }
        };
        packed.views(dim, self.pool.shape().dtype, &mut views);
        all.clear();
        all.resize(visible.len(), (0, (views.len() * PAGE_ROWS) as u32));

        let mut part = StateMut { m, l, acc };
        kernel::reset(&mut part);
        let mut attend = |visible: &[(u32, u32)], views: &[View<'_>], first: usize, keys: usize| {
            if views.is_empty() {
                return;
            }
            let softcap = self.geometry.softcap;
            kernel::attend(
                self.cpu,
                dim,
                q,
                visible,
                softcap,
                views,
                first as u32,
                keys as u32,
                &mut part,
                scratch,
            );
        };
        attend(all, &views, 0, views.len() * PAGE_ROWS);
        let views: Vec<_> = (before.end..pages.end).map(view).collect();
        let start = before.end * PAGE_ROWS;
        let end = (pages.end * PAGE_ROWS).min(reads.last);
        attend(visible, &views, start, end - start);
    }
}

impl Reads<'_> {
    /// The next pages from `from` on of which [`PARTITION`] keys are read, or what is left; `None` if nothing is.
    fn partition(&self, from: usize) -> Option<Range<usize>> {
        let start = from + self.bits[from..].iter().position(|&bits| bits != 0)?;
        let mut keys = 0;
        let full = self.bits[start..].iter().position(|bits| {
            keys += bits.count_ones() as usize;
            keys >= PARTITION
        });
        Some(start..full.map_or(self.bits.len(), |i| start + i + 1))
    }
}
