//! Attention of one layer for a whole batch: a fold of states over pages, in the order that the bitwise promise fixes.
//!
//! Every row folds the pages it sees in ascending absolute position into one state per partition of 1,024 positions, and its
//! partition states merge in ascending order. Who else is in the batch decides only which rows stand in a tile together.

use std::sync::Mutex;

use antefix_kernels::attend::{self as kernel, AttendScratch, StateMut, StateRef, View};
use antefix_kernels::{cpu::Cpu, ops::Rope, team::Team};
use antefix_kv::{Context, Pool};
use antefix_state::{PAGE_ROWS, PARTITION};

use crate::context::{self, Layer, Reader};
use crate::sharing::{Group, SeqRows, Sharing};
use crate::sparse::{self, Stretch};

/// Query rows (tokens x heads of a group) of one block of a long sequence: the accumulator and the page stay in L2.
pub(crate) const BLOCK_ROWS: usize = 192;

/// Shapes and rules of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Geometry {
    /// Query heads `Hq`, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads `Hk`.
    pub kv_heads: usize,
    /// Head dimension `D`.
    pub dim: usize,
    /// Factor of `q . k`.
    pub scale: f32,
    /// `cap * tanh(s / cap)` on every score.
    pub softcap: Option<f32>,
    /// A key at `t` is visible to a query at `p` only if `p - t < window`.
    pub window: Option<u32>,
}

impl Geometry {
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Positions `[lo, hi)` that a query at `pos` sees.
    pub(crate) fn visible(&self, pos: u32) -> (u32, u32) {
        (self.window.map_or(0, |w| (pos + 1).saturating_sub(w)), pos + 1)
    }
}

/// Why a batch cannot be attended: shapes that do not fit, always a mistake of the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttendError {
    /// A buffer has the wrong length.
    #[error("attention: `{what}` has {got} values, {want} are needed")]
    Shape {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The right length.
        want: usize,
    },
}

/// Buffers that live from call to call. Contents mean nothing between calls.
#[derive(Default)]
pub struct Scratch {
    /// Time that [`attend`] took so far, planning included.
    pub spent: std::time::Duration,
    m: Vec<f32>,
    l: Vec<f32>,
    acc: Vec<f32>,
    workers: Vec<Worker>,
}

#[derive(Default)]
pub(crate) struct Worker {
    pub(crate) q: Vec<f32>,
    pub(crate) visible: Vec<(u32, u32)>,
    pub(crate) m: Vec<f32>,
    pub(crate) l: Vec<f32>,
    pub(crate) acc: Vec<f32>,
    pub(crate) kernel: AttendScratch,
    pub(crate) sparse: sparse::Scratch,
}

/// Buffers of the threads at work: a task takes one and gives it back.
struct Workers(Mutex<Vec<Worker>>);

impl Workers {
    fn take(&self) -> Worker {
        lock(&self.0).pop().unwrap_or_default()
    }

    fn give_back(&self, worker: Worker) {
        lock(&self.0).push(worker);
    }
}

/// What one task computes: states of `rows * group` query rows of one KV head.
enum Work<'a> {
    /// Some rows of a group of the sharing tree, inside one partition.
    Group(&'a Group, std::ops::Range<usize>),
    /// Tokens `[from, to)` of the sequence, over all its keys.
    Block { seq: usize, from: usize, to: usize },
    /// The same inside one block of a plan.
    Planned {
        seq: usize,
        from: usize,
        to: usize,
        stretch: &'a Stretch,
    },
}

struct Task<'a> {
    head: usize,
    work: Work<'a>,
    state: StateMut<'a>,
}

/// Where the states of one query row of one head lie: `parts` states, `stride` rows apart, from `at`.
#[derive(Clone, Copy, Default)]
struct Place {
    at: usize,
    head_stride: usize,
    part_stride: usize,
    parts: (usize, usize),
}

/// Attends `q: [R, Hq, D]` (rotated, unscaled) of all sequences over their pages of `layer`, and before them over their contexts,
/// and writes `out: [R, Hq, D]`.
///
/// Keys and values of the rows themselves must already be in the pages.
///
/// # Errors
/// When `q` or `out` is not `[R, Hq, D]`.
pub fn attend(
    (cpu, team): (Cpu, &Team),
    pool: &Pool,
    (layer, rope): (usize, &Rope),
    geometry: &Geometry,
    (seqs, sharing): (&[SeqRows<'_>], &Sharing),
    q: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<(), AttendError> {
    let rows: usize = seqs.iter().map(|s| s.first + s.rows).max().unwrap_or(0);
    let want = rows * geometry.heads * geometry.dim;
    for (what, got) in [("q", q.len()), ("out", out.len())] {
        if got != want {
            return Err(AttendError::Shape { what, got, want });
        }
    }
    if rows == 0 {
        return Ok(());
    }
    let started = std::time::Instant::now();
    let (group, heads, dim) = (geometry.group(), geometry.kv_heads, geometry.dim);
    let plans = sparse::stretches((cpu, team), pool, (layer, rope), geometry, seqs, q);
    let planned = |i: usize| !plans[i].is_empty();
    let others = (0..seqs.len())
        .any(|i| planned(i) && !seqs[i].stands_alone())
        .then(|| Sharing::but_for(seqs, planned));
    let sharing = others.as_ref().unwrap_or(sharing);

    // Where every row's states will lie: first the tree, [partition][head][tree row][g]; then the blocks, [block][head][row][g].
    let tree_rows = sharing.tree.len() * group;
    let partitions = sharing.groups.last().map_or(0, |g| g.partition + 1);
    let mut places = vec![Place::default(); rows];
    for (i, row) in sharing.tree.iter().enumerate() {
        let (lo, hi) = geometry.visible(row.pos);
        places[row.batch_row] = Place {
            at: i * group,
            head_stride: tree_rows,
            part_stride: tree_rows * heads,
            parts: (lo as usize / PARTITION, (hi as usize).div_ceil(PARTITION)),
        };
    }
    let mut total = partitions * heads * tree_rows;
    let tokens = (BLOCK_ROWS / group).max(1);
    let mut blocks = Vec::new();
    for &seq in &sharing.own {
        let s = &seqs[seq];
        let dense = |from: usize| (from, (from + tokens).min(s.rows), None);
        let mut parts: Vec<_> = match plans[seq].is_empty() {
            true => (0..s.rows).step_by(tokens).map(dense).collect(),
            false => Vec::new(),
        };
        for stretch in &plans[seq] {
            let pieces = sparse::pieces(stretch, s.pos0 as usize, group);
            parts.extend(pieces.into_iter().map(|p| (p.start, p.end, Some(stretch))));
        }
        for (from, to, stretch) in parts {
            let head_stride = (to - from) * group;
            for t in from..to {
                places[s.first + t] = Place {
                    at: total + (t - from) * group,
                    head_stride,
                    part_stride: 0,
                    parts: (0, 1),
                };
            }
            blocks.push((seq, from, to, total, stretch));
            total += head_stride * heads;
        }
    }

    let workers = Workers(Mutex::new(std::mem::take(&mut scratch.workers)));
    let Scratch { m, l, acc, .. } = &mut *scratch;
    // The contents are written by the tasks; a state that no task owns is never read.
    m.resize(total, f32::NAN);
    l.resize(total, f32::NAN);
    acc.resize(total * dim, f32::NAN);
    let mut split = Splitter::new(StateMut { m, l, acc }, dim);
    let mut tasks = Vec::new();
    let pieces = sharing.pieces(team.threads(), heads, group);
    for pieces in pieces.chunk_by(|a, b| a.0.partition == b.0.partition) {
        for head in 0..heads {
            let base = (pieces[0].0.partition * heads + head) * tree_rows;
            for (g, rows) in pieces {
                let state = split.take(base + rows.start * group..base + rows.end * group);
                tasks.push(Mutex::new(Some(Task {
                    head,
                    work: Work::Group(g, rows.clone()),
                    state,
                })));
            }
        }
    }
    let tree_tasks = tasks.len();
    for &(seq, from, to, start, stretch) in &blocks {
        for head in 0..heads {
            let rows = (to - from) * group;
            let at = start + head * rows;
            let state = split.take(at..at + rows);
            tasks.push(Mutex::new(Some(Task {
                head,
                work: match stretch {
                    None => Work::Block { seq, from, to },
                    Some(stretch) => Work::Planned {
                        seq,
                        from,
                        to,
                        stretch,
                    },
                },
                state,
            })));
        }
    }
    // The last blocks of a prompt see the most keys: start with them.
    tasks[tree_tasks..].reverse();

    let ctx = Ctx {
        cpu,
        pool,
        layer,
        geometry,
        seqs,
        sharing,
        q,
    };
    team.run(tasks.len(), &|i| {
        if let Some(mut task) = lock(&tasks[i]).take() {
            let mut worker = workers.take();
            match task.work {
                Work::Group(g, rows) => ctx.group(g, rows, task.head, &mut task.state, &mut worker),
                Work::Block { seq, from, to } => {
                    ctx.block(seq, from..to, task.head, &mut task.state, &mut worker)
                }
                Work::Planned {
                    seq,
                    from,
                    to,
                    stretch,
                } => ctx.planned(seq, (from..to, stretch), task.head, &mut task.state, &mut worker),
            }
            workers.give_back(worker);
        }
    });
    drop(tasks);
    scratch.workers = workers
        .0
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);

    let contexts: Vec<(&Context, usize, Vec<u32>)> = seqs
        .iter()
        .filter_map(|s| {
            let context = s.extra.context.filter(|c| !c.is_empty())?;
            let from = s.extra.pos_base + s.pos0;
            Some((context, s.first, (from..from + s.rows as u32).collect()))
        })
        .collect();
    let readers: Vec<Reader<'_>> = contexts
        .iter()
        .map(|(context, first, positions)| Reader {
            context,
            first: *first,
            positions,
        })
        .collect();
    let this = Layer {
        index: layer,
        rope,
        geometry,
    };
    let folded = (!readers.is_empty()).then(|| context::fold((cpu, team), pool, this, &readers, q));

    // Merge context and partitions of every row in ascending order and divide once.
    let all = StateRef {
        m: &scratch.m,
        l: &scratch.l,
        acc: &scratch.acc,
    };
    let width = geometry.heads * dim;
    let chunk = rows.div_ceil(team.threads() * 4).max(1);
    let pieces: Vec<Mutex<&mut [f32]>> = out.chunks_mut(chunk * width).map(Mutex::new).collect();
    team.run(pieces.len(), &|i| {
        let mut piece = lock(&pieces[i]);
        let (mut m, mut l) = (vec![0.0; group], vec![0.0; group]);
        let mut acc = vec![0.0; group * dim];
        for (r, row) in piece.chunks_exact_mut(width).enumerate() {
            let place = places[i * chunk + r];
            for (head, o) in row.chunks_exact_mut(group * dim).enumerate() {
                let mut state = StateMut {
                    m: &mut m,
                    l: &mut l,
                    acc: &mut acc,
                };
                kernel::reset(&mut state);
                let row = i * chunk + r;
                if let Some(context) = folded.as_ref().and_then(|f| f.state(row, head, group, dim)) {
                    kernel::merge(&mut state, &context);
                }
                for part in place.parts.0..place.parts.1 {
                    let at = place.at + head * place.head_stride + part * place.part_stride;
                    let span = at..at + group;
                    let from = StateRef {
                        m: &all.m[span.clone()],
                        l: &all.l[span.clone()],
                        acc: &all.acc[span.start * dim..span.end * dim],
                    };
                    kernel::merge(&mut state, &from);
                }
                kernel::finish(
                    &StateRef {
                        m: &m,
                        l: &l,
                        acc: &acc,
                    },
                    o,
                );
            }
        }
    });
    scratch.spent += started.elapsed();
    Ok(())
}

/// A poisoned lock only says that another task panicked, and the team re-raises that panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Hands out disjoint, ascending pieces of the state buffers.
pub(crate) struct Splitter<'a> {
    m: &'a mut [f32],
    l: &'a mut [f32],
    acc: &'a mut [f32],
    dim: usize,
    at: usize,
}

impl<'a> Splitter<'a> {
    pub(crate) fn new(state: StateMut<'a>, dim: usize) -> Self {
        Self {
            m: state.m,
            l: state.l,
            acc: state.acc,
            dim,
            at: 0,
        }
    }

    pub(crate) fn take(&mut self, span: std::ops::Range<usize>) -> StateMut<'a> {
        let (skip, len) = (span.start - self.at, span.end - span.start);
        self.at = span.end;
        StateMut {
            m: cut(&mut self.m, skip, len),
            l: cut(&mut self.l, skip, len),
            acc: cut(&mut self.acc, skip * self.dim, len * self.dim),
        }
    }
}

fn cut<'a>(rest: &mut &'a mut [f32], skip: usize, len: usize) -> &'a mut [f32] {
    let (_, tail) = std::mem::take(rest).split_at_mut(skip);
    let (piece, tail) = tail.split_at_mut(len);
    *rest = tail;
    piece
}

pub(crate) struct Ctx<'a> {
    pub(crate) cpu: Cpu,
    pub(crate) pool: &'a Pool,
    pub(crate) layer: usize,
    pub(crate) geometry: &'a Geometry,
    pub(crate) seqs: &'a [SeqRows<'a>],
    sharing: &'a Sharing,
    q: &'a [f32],
}

impl Ctx<'_> {
    /// Copies the query heads of `head`'s group of the given (batch row, position) pairs, scaled, and their visible ranges.
    fn gather(&self, rows: impl Iterator<Item = (usize, u32)>, head: usize, worker: &mut Worker) {
        self.gather_heads(rows, head, 0..self.geometry.group(), worker);
    }

    /// The same of the heads `of` of the group.
    pub(crate) fn gather_heads(
        &self,
        rows: impl Iterator<Item = (usize, u32)>,
        head: usize,
        of: std::ops::Range<usize>,
        worker: &mut Worker,
    ) {
        let Geometry {
            heads, dim, scale, ..
        } = *self.geometry;
        let group = self.geometry.group();
        worker.q.clear();
        worker.visible.clear();
        for (row, pos) in rows {
            let at = (row * heads + head * group + of.start) * dim;
            worker
                .q
                .extend(self.q[at..at + of.len() * dim].iter().map(|x| x * scale));
            worker
                .visible
                .extend(std::iter::repeat_n(self.geometry.visible(pos), of.len()));
        }
    }

    /// Pages `pages` of `seq` for this layer and head, with the number of keys they hold.
    pub(crate) fn pages(
        &self,
        seq: usize,
        head: usize,
        pages: std::ops::Range<usize>,
    ) -> (Vec<View<'_>>, u32) {
        let s = &self.seqs[seq];
        let keys = (pages.end * PAGE_ROWS).min(s.keys()) - pages.start * PAGE_ROWS;
        let refs = s.kv.pages(self.layer, head)[pages]
            .iter()
            .map(|&id| self.pool.page(id).into())
            .collect();
        (refs, keys as u32)
    }

    /// Folds the nodes of a group for the tree rows `rows`, which are among its rows.
    fn group(
        &self,
        g: &Group,
        rows: std::ops::Range<usize>,
        head: usize,
        state: &mut StateMut<'_>,
        worker: &mut Worker,
    ) {
        let (group, dim) = (self.geometry.group(), self.geometry.dim);
        let tree = &self.sharing.tree[rows.clone()];
        self.gather(tree.iter().map(|r| (r.batch_row, r.pos)), head, worker);
        kernel::reset(state);
        for node in &g.nodes {
            let from = node.rows.start.max(rows.start).min(rows.end);
            let to = node.rows.end.min(rows.end).max(from);
            if from == to {
                continue;
            }
            let (from, to) = ((from - rows.start) * group, (to - rows.start) * group);
            let first = (node.pages.start * PAGE_ROWS) as u32;
            let (pages, keys) = self.pages(node.owner, head, node.pages.clone());
            kernel::attend(
                self.cpu,
                dim,
                &worker.q[from * dim..to * dim],
                &worker.visible[from..to],
                self.geometry.softcap,
                &pages,
                first,
                keys,
                &mut StateMut {
                    m: &mut state.m[from..to],
                    l: &mut state.l[from..to],
                    acc: &mut state.acc[from * dim..to * dim],
                },
                &mut worker.kernel,
            );
        }
    }

    fn block(
        &self,
        seq: usize,
        tokens: std::ops::Range<usize>,
        head: usize,
        state: &mut StateMut<'_>,
        worker: &mut Worker,
    ) {
        let dim = self.geometry.dim;
        let s = &self.seqs[seq];
        let last = s.pos0 as usize + tokens.end;
        let first = self.geometry.visible(s.pos0 + tokens.start as u32).0 as usize;
        self.gather(tokens.map(|t| (s.first + t, s.pos0 + t as u32)), head, worker);
        let rows = worker.visible.len();
        worker.m.resize(rows, 0.0);
        worker.l.resize(rows, 0.0);
        worker.acc.resize(rows * dim, 0.0);
        kernel::reset(state);
        for partition in first / PARTITION..last.div_ceil(PARTITION) {
            let start = (partition * PARTITION).max(first / PAGE_ROWS * PAGE_ROWS);
            let end = ((partition + 1) * PARTITION).min(last);
            let (pages, keys) = self.pages(seq, head, start / PAGE_ROWS..end.div_ceil(PAGE_ROWS));
            let mut part = StateMut {
                m: &mut worker.m,
                l: &mut worker.l,
                acc: &mut worker.acc,
            };
            kernel::reset(&mut part);
            kernel::attend(
                self.cpu,
                dim,
                &worker.q,
                &worker.visible,
                self.geometry.softcap,
                &pages,
                start as u32,
                keys,
                &mut part,
                &mut worker.kernel,
            );
            kernel::merge(
                state,
                &StateRef {
                    m: &worker.m,
                    l: &worker.l,
                    acc: &worker.acc,
                },
            );
        }
    }
}
