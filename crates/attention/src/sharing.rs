//! Which sequences of a batch share which pages: the tree along which [`crate::attend`] batches its rows (paper `hydragen`,
//! section 3.3, for any depth and fan-out).
//!
//! Sharing is found, not declared: two sequences share a page when their tables name the same page. Rows are ordered so that
//! every node of the tree owns one interval of them.

use std::ops::Range;

use antefix_kv::{PageId, SeqKv};
use antefix_state::{PAGE_ROWS, PARTITION};

use crate::extra::Extra;
use crate::sparse::Planning;

/// Pages of a partition.
const PARTITION_PAGES: usize = PARTITION / PAGE_ROWS;

/// From this many rows on a sequence is attended in blocks of its own rows, walking all its keys; below it joins the tree.
pub(crate) const OWN_BLOCKS_FROM: usize = 16;

/// Fewest query rows of a piece of a group: three tiles cost more than reading their pages.
const LEAST_PIECE: usize = 48;

/// The rows of one sequence in a batch.
#[derive(Clone, Copy)]
pub struct SeqRows<'a> {
    /// Its key/value pages; keys up to `pos0 + rows` are written before attention runs.
    pub kv: &'a SeqKv,
    /// Its first row in the batch.
    pub first: usize,
    /// Number of rows.
    pub rows: usize,
    /// Place of its first row among the rows of `kv`; the others follow. Its position is `extra.pos_base + pos0`.
    pub pos0: u32,
    /// What it brings beyond its pages.
    pub extra: Extra<'a>,
}

impl SeqRows<'_> {
    /// Keys that its last row sees.
    pub(crate) fn keys(&self) -> usize {
        self.pos0 as usize + self.rows
    }

    fn pages(&self) -> usize {
        self.keys().div_ceil(PAGE_ROWS)
    }

    /// What plans these rows, if they stand behind nothing but their own pages.
    pub(crate) fn planning(&self) -> Option<&Planning> {
        self.extra
            .planning
            .filter(|p| self.extra.is_bare() && p.covers(self.keys()))
    }

    /// Whether it is attended in blocks of its own rows.
    pub(crate) fn stands_alone(&self) -> bool {
        self.rows >= OWN_BLOCKS_FROM
    }

    fn tree_rows(&self) -> impl Iterator<Item = TreeRow> + use<> {
        let (first, pos0) = (self.first, self.pos0);
        (0..self.rows).map(move |r| TreeRow {
            batch_row: first + r,
            pos: pos0 + r as u32,
        })
    }
}

/// Pages `pages` of the sequence `owner`, read by the tree rows `rows`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) owner: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) pages: Range<usize>,
}

/// The nodes of one partition that hang together: a parent precedes its children, so folding them in order gives every row
/// its pages in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) partition: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) nodes: Vec<Node>,
}

impl Group {
    /// Pages times rows that read them: the work of one head.
    fn work(&self) -> usize {
        self.nodes.iter().map(|n| n.rows.len() * n.pages.len()).sum()
    }
}

/// A row of the tree: its row in the batch and its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TreeRow {
    pub(crate) batch_row: usize,
    pub(crate) pos: u32,
}

/// The plan of work of one batch, the same for all layers where no short sequence reads by a plan.
#[derive(Debug, Clone, Default)]
pub struct Sharing {
    /// Rows of short sequences in depth-first order.
    pub(crate) tree: Vec<TreeRow>,
    /// By partition, ascending.
    pub(crate) groups: Vec<Group>,
    /// Sequences that are attended in blocks of their own rows.
    pub(crate) own: Vec<usize>,
}

impl Sharing {
    /// Finds the sharing of a batch.
    pub fn of(seqs: &[SeqRows<'_>]) -> Self {
        Self::but_for(seqs, |_| false)
    }

    /// The same in a layer where the sequences `planned` read keys of their own choice, and so share no reads.
    pub(crate) fn but_for(seqs: &[SeqRows<'_>], planned: impl Fn(usize) -> bool) -> Self {
        let (own, mut short): (Vec<usize>, Vec<usize>) = (0..seqs.len())
            .filter(|&i| seqs[i].rows > 0)
            .partition(|&i| seqs[i].stands_alone() || planned(i));
        let table = |i: usize| -> &[PageId] { &seqs[i].kv.pages(0, 0)[..seqs[i].pages()] };
        short.sort_by(|&a, &b| table(a).cmp(table(b)).then(a.cmp(&b)));

        let mut tree = Vec::new();
        let mut starts = Vec::with_capacity(short.len() + 1);
        for &i in &short {
            starts.push(tree.len());
            tree.extend(seqs[i].tree_rows());
        }
        starts.push(tree.len());

        let longest = short.iter().map(|&i| table(i).len()).max().unwrap_or(0);
        let mut groups = Vec::new();
        for partition in 0..longest.div_ceil(PARTITION_PAGES) {
            let first = partition * PARTITION_PAGES;
            let last = first + PARTITION_PAGES;
            for members in runs(&short, 0..short.len(), first, &table) {
                let mut nodes = Vec::new();
                split(&short, members.clone(), first, last, &table, &starts, &mut nodes);
                groups.push(Group {
                    partition,
                    rows: starts[members.start]..starts[members.end],
                    nodes,
                });
            }
        }
        Self { tree, groups, own }
    }

    /// The rows of each group in pieces, so that `threads` threads find enough to do when `heads` heads share out the groups.
    ///
    /// A piece keeps at least [`LEAST_PIECE`] query rows, `fold` of them a row: each piece reads the pages again.
    pub(crate) fn pieces(&self, threads: usize, heads: usize, fold: usize) -> Vec<(&Group, Range<usize>)> {
        let total = heads * self.groups.iter().map(Group::work).sum::<usize>();
        let share = (total / (4 * threads)).max(1);
        let mut out = Vec::with_capacity(self.groups.len());
        for g in &self.groups {
            let most = (g.rows.len() * fold / LEAST_PIECE).max(1);
            let pieces = if threads == 1 {
                1
            } else {
                g.work().div_ceil(share).clamp(1, most)
            };
            let step = g.rows.len().div_ceil(pieces);
            out.extend(
                g.rows
                    .clone()
                    .step_by(step)
                    .map(|from| (g, from..g.rows.end.min(from + step))),
            );
        }
        out
    }

    /// The same work sequence by sequence, as if no page were shared: what sharing is measured against. The results are the same bits.
    pub fn apart(seqs: &[SeqRows<'_>]) -> Self {
        let together = Self::of(seqs);
        let mut alone = Self {
            own: together.own,
            ..Self::default()
        };
        let mut groups = Vec::new();
        for (i, s) in seqs
            .iter()
            .enumerate()
            .filter(|(_, s)| s.rows > 0 && !s.stands_alone())
        {
            let start = alone.tree.len();
            alone.tree.extend(s.tree_rows());
            for from in (0..s.pages()).step_by(PARTITION_PAGES) {
                let rows = start..alone.tree.len();
                let node = Node {
                    owner: i,
                    rows: rows.clone(),
                    pages: from..s.pages().min(from + PARTITION_PAGES),
                };
                groups.push(Group {
                    partition: from / PARTITION_PAGES,
                    rows,
                    nodes: vec![node],
                });
            }
        }
        // By partition, and within one by row.
        groups.sort_by_key(|g| (g.partition, g.rows.start));
        alone.groups = groups;
        alone
    }

    /// `(pages read, pages read if nothing were shared)` for the rows in the tree, one layer and head.
    pub fn pages_read(&self) -> (usize, usize) {
        let (mut read, mut alone) = (0, 0);
        for node in self.groups.iter().flat_map(|g| &g.nodes) {
            read += node.pages.len();
            alone += node.pages.len() * node.rows.len();
        }
        (read, alone)
    }
}

/// Maximal runs of `members` (indices into `short`) whose page `at` is the same page; members without that page are left out.
fn runs<'a>(
    short: &[usize],
    members: Range<usize>,
    at: usize,
    table: &impl Fn(usize) -> &'a [PageId],
) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    let mut previous = None;
    for k in members {
        let page = table(short[k]).get(at);
        match (page, out.last_mut()) {
            (None, _) => {}
            (Some(_), Some(run)) if previous == page && run.end == k => run.end = k + 1,
            (Some(_), _) => out.push(k..k + 1),
        }
        previous = page;
    }
    out
}

/// Walks down from page `at` of a run that shares it, emitting one node per stretch of shared pages.
fn split<'a>(
    short: &[usize],
    members: Range<usize>,
    at: usize,
    last: usize,
    table: &impl Fn(usize) -> &'a [PageId],
    starts: &[usize],
    nodes: &mut Vec<Node>,
) {
    let owner = short[members.start];
    let mut end = at + 1;
    while end < last {
        let page = table(owner).get(end);
        if page.is_none() || members.clone().any(|k| table(short[k]).get(end) != page) {
            break;
        }
        end += 1;
    }
    nodes.push(Node {
        owner,
        rows: starts[members.start]..starts[members.end],
        pages: at..end,
    });
    if end < last {
        for run in runs(short, members, end, table) {
            split(short, run, end, last, table, starts, nodes);
        }
    }
}
