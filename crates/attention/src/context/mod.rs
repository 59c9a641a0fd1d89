//! Attention over what a sequence has besides its own tail: shared segments in groups (kv's [`Context`]).
//!
//! A row folds the runs of its references one by one, each in partitions of 1,024 rows of the run; partition states merge in
//! ascending order into the group's state, the group's power is applied once, and groups merge in their order. The query moves to
//! the segment, not the keys to the query: it is rotated by `-delta` for each reference. Which rows stand in a tile together
//! depends on the batch; what a row gets does not.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use antefix_kernels::attend::{self as kernel, AttendScratch, StateMut, StateRef, View};
use antefix_kernels::{cpu::Cpu, ops::Rope, team::Team};
use antefix_kv::{Context, HeadRun, Hidden, Pool, Rule, SegRef, Segment};
use antefix_state::{PAGE_ROWS, PARTITION};

use crate::attend::{AttendError, BLOCK_ROWS, Geometry, Splitter, lock};
use crate::sharing::OWN_BLOCKS_FROM;

/// Rows of a batch that attend one context.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// What they attend.
    pub context: &'a Context,
    /// Rows of the batch, `first..first + positions.len()`.
    pub first: usize,
    /// Where each of them stands, ascending.
    pub positions: &'a [u32],
}

/// A layer as the context sees it.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) index: usize,
    pub(crate) rope: &'a Rope,
    pub(crate) geometry: &'a Geometry,
}

/// States of the rows that have a context, `[Hk][slot][group]`; `slots[row]` is the slot of a batch row.
#[derive(Default)]
pub(crate) struct Folded {
    slots: Vec<Option<usize>>,
    count: usize,
    m: Vec<f32>,
    l: Vec<f32>,
    acc: Vec<f32>,
}

impl Folded {
    /// The states of the `group` query heads of `row`'s KV head `head`, if the row has a context.
    pub(crate) fn state(&self, row: usize, head: usize, group: usize, dim: usize) -> Option<StateRef<'_>> {
        let slot = self.slots.get(row).copied().flatten()?;
        let at = (head * self.count + slot) * group;
        Some(StateRef {
            m: &self.m[at..at + group],
            l: &self.l[at..at + group],
            acc: &self.acc[at * dim..(at + group) * dim],
        })
    }
}

/// Attends rows that have a context and no tail: `q: [R, Hq, D]` (rotated, unscaled) to `out: [R, Hq, D]`, where `R` counts the rows
/// of all readers.
///
/// # Errors
/// When `q` or `out` is not `[R, Hq, D]`.
pub fn attend_context(
    (cpu, team): (Cpu, &Team),
    pool: &Pool,
    (index, rope): (usize, &Rope),
    geometry: &Geometry,
    readers: &[Reader<'_>],
    q: &[f32],
    out: &mut [f32],
) -> Result<(), AttendError> {
    let rows = readers
        .iter()
        .map(|r| r.first + r.positions.len())
        .max()
        .unwrap_or(0);
    let want = rows * geometry.heads * geometry.dim;
    for (what, got) in [("q", q.len()), ("out", out.len())] {
        if got != want {
            return Err(AttendError::Shape { what, got, want });
        }
    }
    let layer = Layer {
        index,
        rope,
        geometry,
    };
    let folded = fold((cpu, team), pool, layer, readers, q);
    let group = geometry.heads / geometry.kv_heads;
    let width = geometry.heads * geometry.dim;
    team.per_row(out, width, &|row, out: &mut [f32]| {
        for (head, o) in out.chunks_exact_mut(group * geometry.dim).enumerate() {
            match folded.state(row, head, group, geometry.dim) {
                Some(state) => kernel::finish(&state, o),
                None => o.fill(0.0),
            }
        }
    });
    Ok(())
}

/// Rows of the batch that read the same segment with the same rows hidden, under the same temperature.
struct Item<'a> {
    segment: &'a Segment,
    hidden: Option<&'a Hidden>,
    temperature: f32,
    rows: Vec<ItemRow>,
    /// Where its states begin: `[head][partition][row][group]`, with as many partitions as the head has.
    base: usize,
}

/// One row of an item.
#[derive(Clone, Copy)]
struct ItemRow {
    batch_row: usize,
    at: Seat,
}

/// How a query stands to a reference.
#[derive(Clone, Copy)]
struct Seat {
    /// The query's position in the segment's frame.
    frame: i64,
    delta: i32,
    rule: Rule,
}

impl Seat {
    fn new(r: &SegRef, pos: u32) -> Self {
        Self {
            frame: i64::from(pos) - i64::from(r.delta),
            delta: r.delta,
            rule: r.rule,
        }
    }

    /// Rows `[lo, hi)` of `run` that the query sees.
    fn visible(self, run: &HeadRun, window: Option<u32>) -> (u32, u32) {
        match self.rule {
            Rule::AllVisible => (0, run.len() as u32),
            Rule::ByPosition => (
                window.map_or(0, |w| run.rows_before(self.frame + 1 - i64::from(w))),
                run.rows_before(self.frame + 1),
            ),
        }
    }
}

/// Buffers of one task.
#[derive(Default)]
struct Worker {
    q: Vec<f32>,
    visible: Vec<(u32, u32)>,
    clipped: Vec<(u32, u32)>,
    part: Buffers,
    span: Buffers,
    group: Buffers,
    kernel: AttendScratch,
}

#[derive(Default)]
struct Buffers {
    m: Vec<f32>,
    l: Vec<f32>,
    acc: Vec<f32>,
}

impl Buffers {
    fn reset(&mut self, rows: usize, dim: usize) -> StateMut<'_> {
        self.m.resize(rows, 0.0);
        self.l.resize(rows, 0.0);
        self.acc.resize(rows * dim, 0.0);
        let mut state = self.as_mut();
        kernel::reset(&mut state);
        state
    }

    fn as_mut(&mut self) -> StateMut<'_> {
        StateMut {
            m: &mut self.m,
            l: &mut self.l,
            acc: &mut self.acc,
        }
    }

    fn as_ref(&self) -> StateRef<'_> {
        StateRef {
            m: &self.m,
            l: &self.l,
            acc: &self.acc,
        }
    }
}

/// Where the states of one reference of one row begin.
#[derive(Clone, Copy)]
struct Found {
    item: usize,
    row: usize,
}

/// Folds the contexts of all readers.
pub(crate) fn fold(
    (cpu, team): (Cpu, &Team),
    pool: &Pool,
    layer: Layer<'_>,
    readers: &[Reader<'_>],
    q: &[f32],
) -> Folded {
    let fold = Fold {
        cpu,
        pool,
        layer,
        q,
        group: layer.geometry.heads / layer.geometry.kv_heads,
    };
    let (few, many): (Vec<&Reader<'_>>, Vec<&Reader<'_>>) =
        readers.iter().partition(|r| r.positions.len() < OWN_BLOCKS_FROM);
    let (items, found, states) = fold.items(team, &few);
    fold.rows(team, (&few, &many), (&items, &found, &states))
}

struct Fold<'a> {
    cpu: Cpu,
    pool: &'a Pool,
    layer: Layer<'a>,
    q: &'a [f32],
    /// Query heads of a KV head.
    group: usize,
}

impl<'a> Fold<'a> {
    fn run<'s>(&self, segment: &'s Segment, head: usize) -> &'s HeadRun {
        segment.run(self.layer.index, head)
    }

    /// Attends the segments that short readers reference, each once for all rows of the batch that read it.
    fn items(&self, team: &Team, few: &[&Reader<'a>]) -> (Vec<Item<'a>>, Vec<Found>, Buffers) {
        let Geometry { kv_heads, dim, .. } = *self.layer.geometry;
        let mut items: Vec<Item<'a>> = Vec::new();
        let mut found = Vec::new();
        for reader in few {
            for (i, &pos) in reader.positions.iter().enumerate() {
                for group in &reader.context.groups {
                    for r in &group.refs {
                        let item = find(&mut items, r, group.temperature);
                        let rows = &mut items[item].rows;
                        found.push(Found {
                            item,
                            row: rows.len(),
                        });
                        rows.push(ItemRow {
                            batch_row: reader.first + i,
                            at: Seat::new(r, pos),
                        });
                    }
                }
            }
        }
        let mut total = 0;
        for item in &mut items {
            item.base = total;
            let parts: usize = (0..kv_heads).map(|h| parts(self.run(item.segment, h))).sum();
            total += parts * item.rows.len() * self.group;
        }
        let mut states = Buffers {
            m: vec![f32::NAN; total],
            l: vec![f32::NAN; total],
            acc: vec![f32::NAN; total * dim],
        };
        let mut split = Splitter::new(states.as_mut(), dim);
        let mut tasks = Vec::new();
        let block = (BLOCK_ROWS / self.group).max(1);
        for item in &items {
            let mut at = item.base;
            for head in 0..kv_heads {
                for part in 0..parts(self.run(item.segment, head)) {
                    for from in (0..item.rows.len()).step_by(block) {
                        let rows = from..(from + block).min(item.rows.len());
                        let len = rows.len() * self.group;
                        let state = split.take(at..at + len);
                        at += len;
                        tasks.push(Mutex::new(Some((item, head, part, rows, state))));
                    }
                }
            }
        }
        team.run(tasks.len(), &|i| {
            if let Some((item, head, part, rows, mut state)) = lock(&tasks[i]).take() {
                let mut worker = Worker::default();
                self.seat(
                    head,
                    self.run(item.segment, head),
                    item.temperature,
                    item.rows[rows].iter().map(|r| (r.batch_row, r.at)),
                    &mut worker,
                );
                kernel::reset(&mut state);
                self.part(
                    (item.segment, item.hidden),
                    head,
                    part,
                    item.temperature,
                    &mut state,
                    &mut worker,
                );
            }
        });
        drop(tasks);
        (items, found, states)
    }

    /// One state for every row: short readers merge what [`Fold::items`] has found, long ones walk their references in blocks of
    /// their own rows.
    fn rows(
        &self,
        team: &Team,
        (few, many): (&[&Reader<'a>], &[&Reader<'a>]),
        (items, found, states): (&[Item<'a>], &[Found], &Buffers),
    ) -> Folded {
        enum Work<'r, 'a> {
            /// The rows of a short reader; its references begin at this place of `found`.
            Merge(&'r Reader<'a>, usize),
            Block(&'r Reader<'a>, Range<usize>),
        }
        let Geometry { kv_heads, dim, .. } = *self.layer.geometry;
        let last = few.iter().chain(many).map(|r| r.first + r.positions.len()).max();
        let count: usize = few.iter().chain(many).map(|r| r.positions.len()).sum();
        let mut out = Folded {
            slots: vec![None; last.unwrap_or(0)],
            count,
            m: vec![f32::NAN; kv_heads * count * self.group],
            l: vec![f32::NAN; kv_heads * count * self.group],
            acc: vec![f32::NAN; kv_heads * count * self.group * dim],
        };
        let mut slot = 0;
        for reader in few.iter().chain(many) {
            for row in 0..reader.positions.len() {
                out.slots[reader.first + row] = Some(slot);
                slot += 1;
            }
        }
        let mut split = Splitter::new(
            StateMut {
                m: &mut out.m,
                l: &mut out.l,
                acc: &mut out.acc,
            },
            dim,
        );
        let mut tasks = Vec::new();
        let block = (BLOCK_ROWS / self.group).max(1);
        let mut at = 0;
        for head in 0..kv_heads {
            let mut task = |work, rows: usize| {
                let state = split.take(at..at + rows * self.group);
                at += rows * self.group;
                tasks.push(Mutex::new(Some((head, work, state))));
            };
            let mut begin = 0;
            for reader in few {
                task(Work::Merge(reader, begin), reader.positions.len());
                begin += reader.positions.len() * reader.context.refs().count();
            }
            for reader in many {
                for from in (0..reader.positions.len()).step_by(block) {
                    let rows = from..(from + block).min(reader.positions.len());
                    let len = rows.len();
                    task(Work::Block(reader, rows), len);
                }
            }
        }
        team.run(tasks.len(), &|i| {
            if let Some((head, work, mut state)) = lock(&tasks[i]).take() {
                let mut worker = Worker::default();
                match work {
                    Work::Merge(reader, begin) => self.merge(
                        reader,
                        head,
                        (items, &found[begin..], states),
                        &mut state,
                        &mut worker,
                    ),
                    Work::Block(reader, rows) => self.block(reader, rows, head, &mut state, &mut worker),
                }
            }
        });
        drop(tasks);
        out
    }

    /// Merges the partition states of a short reader's rows: partitions into groups, groups into `out`.
    fn merge(
        &self,
        reader: &Reader<'_>,
        head: usize,
        (items, found, states): (&[Item<'_>], &[Found], &Buffers),
        out: &mut StateMut<'_>,
        worker: &mut Worker,
    ) {
        let (dim, size) = (self.layer.geometry.dim, self.group);
        kernel::reset(out);
        let mut found = found.iter();
        for row in 0..reader.positions.len() {
            let mut total = slice(out, row * size..(row + 1) * size, dim);
            for group in &reader.context.groups {
                let mut state = worker.group.reset(size, dim);
                for _ in &group.refs {
                    let Some(&Found { item, row }) = found.next() else {
                        return;
                    };
                    let item = &items[item];
                    let before: usize = (0..head).map(|h| parts(self.run(item.segment, h))).sum();
                    for part in 0..parts(self.run(item.segment, head)) {
                        let at = item.base + ((before + part) * item.rows.len() + row) * size;
                        kernel::merge(
                            &mut state,
                            &StateRef {
                                m: &states.m[at..at + size],
                                l: &states.l[at..at + size],
                                acc: &states.acc[at * dim..(at + size) * dim],
                            },
                        );
                    }
                }
                kernel::power(&mut state, group.lse_scale);
                kernel::merge(&mut total, &worker.group.as_ref());
            }
        }
    }

    /// Rows `rows` of a long reader, over all its references.
    fn block(
        &self,
        reader: &Reader<'_>,
        rows: Range<usize>,
        head: usize,
        out: &mut StateMut<'_>,
        worker: &mut Worker,
    ) {
        let (dim, size) = (self.layer.geometry.dim, rows.len() * self.group);
        kernel::reset(out);
        for group in &reader.context.groups {
            let mut sum = std::mem::take(&mut worker.group);
            sum.reset(size, dim);
            for r in &group.refs {
                let run = self.run(&r.segment, head);
                let seats = rows
                    .clone()
                    .map(|i| (reader.first + i, Seat::new(r, reader.positions[i])));
                self.seat(head, run, group.temperature, seats, worker);
                for part in 0..parts(run) {
                    let mut buffers = std::mem::take(&mut worker.part);
                    let mut state = buffers.reset(size, dim);
                    let hidden = r.hidden.as_deref();
                    self.part(
                        (&r.segment, hidden),
                        head,
                        part,
                        group.temperature,
                        &mut state,
                        worker,
                    );
                    kernel::merge(&mut sum.as_mut(), &buffers.as_ref());
                    worker.part = buffers;
                }
            }
            kernel::power(&mut sum.as_mut(), group.lse_scale);
            kernel::merge(out, &sum.as_ref());
            worker.group = sum;
        }
    }

    /// Copies the queries of `head` for the given rows, moved into the segment's frame and scaled, and finds what they see of `run`.
    fn seat(
        &self,
        head: usize,
        run: &HeadRun,
        temperature: f32,
        rows: impl Iterator<Item = (usize, Seat)>,
        worker: &mut Worker,
    ) {
        let Geometry {
            heads,
            dim,
            scale,
            window,
            ..
        } = *self.layer.geometry;
        worker.q.clear();
        worker.visible.clear();
        for (row, seat) in rows {
            let from = (row * heads + head * self.group) * dim;
            let at = worker.q.len();
            worker.q.extend_from_slice(&self.q[from..from + self.group * dim]);
            let q = &mut worker.q[at..];
            if seat.delta != 0 {
                self.layer.rope.turn(q, dim, -seat.delta);
            }
            q.iter_mut().for_each(|x| *x *= scale / temperature);
            let visible = seat.visible(run, window);
            worker.visible.extend(std::iter::repeat_n(visible, self.group));
        }
    }

    /// Continues `state` with partition `part` of a run, for the queries in `worker`.
    fn part(
        &self,
        (segment, hidden): (&Segment, Option<&Hidden>),
        head: usize,
        part: usize,
        temperature: f32,
        state: &mut StateMut<'_>,
        worker: &mut Worker,
    ) {
        let run = self.run(segment, head);
        let (start, end) = (part * PARTITION, ((part + 1) * PARTITION).min(run.len()));
        let mut at = start as u32;
        for span in run
            .biased()
            .iter()
            .filter(|s| s.from < end as u32 && s.to > start as u32)
        {
            let (from, to) = (span.from.max(start as u32), span.to.min(end as u32));
            self.rows_of((run, hidden), at..from, temperature, state, worker);
            let mut buffers = std::mem::take(&mut worker.span);
            let mut biased = buffers.reset(worker.visible.len(), self.layer.geometry.dim);
            self.rows_of((run, hidden), from..to, temperature, &mut biased, worker);
            kernel::gain(&mut biased, span.bias);
            kernel::merge(state, &buffers.as_ref());
            worker.span = buffers;
            at = to;
        }
        self.rows_of((run, hidden), at..end as u32, temperature, state, worker);
    }

    /// Continues `state` with the rows `span` of a run, all of one partition and without bias.
    fn rows_of(
        &self,
        (run, hidden): (&HeadRun, Option<&Hidden>),
        span: Range<u32>,
        temperature: f32,
        state: &mut StateMut<'_>,
        worker: &mut Worker,
    ) {
        worker.clipped.clear();
        let clip = |v: &(u32, u32)| (v.0.max(span.start), v.1.min(span.end));
        worker.clipped.extend(worker.visible.iter().map(clip));
        let seen = worker.clipped.iter().filter(|v| v.0 < v.1);
        let Some((lo, hi)) = seen.copied().reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))) else {
            return;
        };
        let pages = lo as usize / PAGE_ROWS..(hi as usize).div_ceil(PAGE_ROWS);
        let first = pages.start * PAGE_ROWS;
        let keys = (pages.end * PAGE_ROWS).min(run.len()) - first;
        let views: Vec<View<'_>> = pages
            .map(|p| View {
                page: self.pool.page(run.page_ids()[p]),
                rows: hidden.map_or(u32::MAX, |h| h.open(self.layer.index, p)),
            })
            .collect();
        // softcap(s) / T = (cap / T) tanh((s / T) / (cap / T)), and the queries are divided by T already.
        let softcap = self.layer.geometry.softcap.map(|cap| cap / temperature);
        kernel::attend(
            self.cpu,
            self.layer.geometry.dim,
            &worker.q,
            &worker.clipped,
            softcap,
            &views,
            first as u32,
            keys as u32,
            state,
            &mut worker.kernel,
        );
    }
}

/// Partitions of a run.
fn parts(run: &HeadRun) -> usize {
    run.len().div_ceil(PARTITION)
}

/// The item that `r` belongs to, made if it is the first of its kind.
fn find<'a>(items: &mut Vec<Item<'a>>, r: &'a SegRef, temperature: f32) -> usize {
    let hidden = r.hidden.as_deref();
    let same = |i: &Item<'_>| {
        std::ptr::eq(i.segment, Arc::as_ptr(&r.segment))
            && i.hidden.map(std::ptr::from_ref) == hidden.map(std::ptr::from_ref)
            && i.temperature == temperature
    };
    items.iter().position(same).unwrap_or_else(|| {
        items.push(Item {
            segment: &r.segment,
            hidden,
            temperature,
            rows: Vec::new(),
            base: 0,
        });
        items.len() - 1
    })
}

/// Rows `rows` of a state.
fn slice<'s>(state: &'s mut StateMut<'_>, rows: Range<usize>, dim: usize) -> StateMut<'s> {
    StateMut {
        m: &mut state.m[rows.clone()],
        l: &mut state.l[rows.clone()],
        acc: &mut state.acc[rows.start * dim..rows.end * dim],
    }
}

#[cfg(test)]
mod tests;
