//! The hooks of one running sequence, and the rows of a step that they concern.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::captured::Captured;
use super::plan::{EditOp, HookPlan, Op, OpKind, salted};
use super::site::Site;
use crate::readout::{AttentionView, HeadReading};

/// Code at a site, for methods that data cannot describe. One value follows one sequence; it may be called from another thread
/// each step. After a panic in a step the rows of that step are computed again: who only reads may see them twice.
pub trait Hook: Send {
    /// [`Site::bit`]s of the sites of `layer` that it wants to see; layer `L` stands for what comes after the layers.
    fn wants(&self, layer: usize) -> u32;

    /// Names the change it makes, or `None` if it only reads: sequences share cached prefixes only when they agree here.
    fn fingerprint(&self) -> Option<u64>;

    /// Sees the rows `[at.rows, at.width]` of its sequence in this step, and may change them. Called after the edits of the plan.
    fn at(&mut self, at: &At<'_>, rows: &mut [f32]);

    /// What it has to tell of the rows that it saw, when their sequence has ended; most have nothing to tell.
    fn told(&mut self) -> Option<Told> {
        None
    }
}

/// Named values of rows, most of them 0 and left out: what a hook tells of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// What it is, such as `features`.
    pub name: String,
    /// The layer that was looked at.
    pub layer: usize,
    /// The site.
    pub site: Site,
    /// Rows by position, ascending: numbers and their values.
    pub rows: Vec<(u32, Vec<(u32, f32)>)>,
    /// Rows that were not kept because there were too many.
    pub dropped: usize,
}

/// Where a hook stands.
pub struct At<'a> {
    /// The layer; `L` for what comes after the layers.
    pub layer: usize,
    /// The site.
    pub site: Site,
    /// Number of rows.
    pub rows: usize,
    /// Values of a row.
    pub width: usize,
    /// Token of the first row; the others follow.
    pub pos0: u32,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Queries and keys, at [`Site::Z`].
    pub attention: Option<AttentionView<'a>>,
}

/// A plan at work on one sequence.
pub struct Observer {
    plan: Arc<HookPlan>,
    prompt: AtomicU32,
    cap: usize,
    run: Mutex<Run>,
}

struct Run {
    captured: Vec<Captured>,
    /// Of each probe of the plan.
    readings: Vec<Vec<HeadReading>>,
    bytes: usize,
    dropped: usize,
    hooks: Vec<Box<dyn Hook>>,
}

impl Observer {
    /// Follows a sequence whose prompt has `prompt` tokens, and keeps at most `cap` bytes of captured values.
    pub fn new(plan: Arc<HookPlan>, prompt: usize, cap: usize) -> Self {
        let run = Run {
            captured: plan.empty_captures(),
            readings: vec![Vec::new(); plan.probes().len()],
            bytes: 0,
            dropped: 0,
            hooks: Vec::new(),
        };
        Self {
            plan,
            prompt: AtomicU32::new(prompt as u32),
            cap,
            run: Mutex::new(run),
        }
    }

    /// Adds code.
    #[must_use]
    pub fn with(mut self, hook: Box<dyn Hook>) -> Self {
        self.run
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .hooks
            .push(hook);
        self
    }

    /// Adds code to an observer that others hold, too.
    pub fn add(&self, hook: Box<dyn Hook>) {
        self.lock().hooks.push(hook);
    }

    /// From now on the prompt has `prompt` tokens: for who rewrites prompts, before anything is computed.
    pub fn set_prompt(&self, prompt: usize) {
        self.prompt.store(prompt as u32, Ordering::Relaxed);
    }

    fn prompt(&self) -> u32 {
        self.prompt.load(Ordering::Relaxed)
    }

    /// The plan.
    pub fn plan(&self) -> &HookPlan {
        &self.plan
    }

    /// The salt under which the pages of this sequence may be shared: that of its plan and of its hooks.
    pub fn salted(&self, salt: u64) -> u64 {
        let start = self.plan.salted(salt);
        let run = self.lock();
        let marks = run.hooks.iter().filter_map(|h| h.fingerprint());
        marks.fold(start, |salt, mark| salted(salt, mark.max(1)))
    }

    /// Bytes that it keeps at most.
    pub fn cap(&self) -> usize {
        self.cap
    }

    /// Whether rows may be computed twice: captures and readings of rows replace the old ones, sums over rows do not, and code that
    /// changes activations may count what it sees.
    pub fn may_repeat(&self) -> bool {
        let sums = self.plan.probes().iter().any(|p| p.read.columns);
        !sums && self.lock().hooks.iter().all(|h| h.fingerprint().is_none())
    }

    /// Rows that were not kept because the limit was reached.
    pub fn dropped(&self) -> usize {
        self.lock().dropped
    }

    /// What was captured so far; nothing of it is left behind.
    pub fn take(&self) -> Vec<Captured> {
        let mut run = self.lock();
        run.bytes = 0;
        std::mem::replace(&mut run.captured, self.plan.empty_captures())
    }

    /// What the probes have read so far, by their ids, heads by layer; nothing of it is left behind.
    pub fn take_readings(&self) -> Vec<(String, Vec<HeadReading>)> {
        let mut run = self.lock();
        let probes = self.plan.probes();
        let taken = std::mem::replace(&mut run.readings, vec![Vec::new(); probes.len()]);
        probes.iter().map(|p| p.id.clone()).zip(taken).collect()
    }

    /// What the hooks have to tell, in their order; nothing of it is left behind.
    pub fn take_told(&self) -> Vec<Told> {
        self.lock().hooks.iter_mut().filter_map(|h| h.told()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mask(&self, layer: usize) -> u32 {
        let hooks = self.lock().hooks.iter().fold(0, |mask, h| mask | h.wants(layer));
        self.plan.mask(layer) | hooks
    }

    fn at(&self, at: &At<'_>, rows: &mut [f32]) {
        let mut run = self.lock();
        for op in self.plan.ops(at.layer, at.site) {
            for (r, row) in rows.chunks_exact_mut(at.width).enumerate() {
                let pos = at.pos0 + r as u32;
                if op.positions.contains(pos, at.prompt) {
                    match &op.kind {
                        OpKind::Edit(edit) => edit.apply(op, pos, row),
                        OpKind::Capture(slot) => run.keep(*slot, self.cap, op, pos, row),
                    }
                }
            }
        }
        if let Some(view) = &at.attention {
            run.probe(self, view);
        }
        for hook in &mut run.hooks {
            if hook.wants(at.layer) & at.site.bit() != 0 {
                hook.at(at, rows);
            }
        }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer")
            .field("prompt", &self.prompt())
            .field("cap", &self.cap)
            .finish_non_exhaustive()
    }
}

impl Run {
    fn probe(&mut self, observer: &Observer, view: &AttentionView<'_>) {
        for (probe, readings) in observer.plan.probes().iter().zip(&mut self.readings) {
            if !probe.layers.contains(&view.layer) {
                continue;
            }
            let chosen = |r: &usize| probe.positions.contains(view.pos0 + *r as u32, observer.prompt());
            let mut rows: Vec<usize> = (0..view.rows()).filter(chosen).collect();
            let keys = view.pos0.saturating_sub(view.base) as usize + view.rows();
            let room = observer.cap.saturating_sub(self.bytes);
            let fit = probe.read.rows_within(room / probe.heads.len().max(1), keys);
            self.dropped += rows.len().saturating_sub(fit);
            rows.truncate(fit);
            if rows.is_empty() {
                continue;
            }
            for reading in view.read(&probe.heads, &rows, &probe.read) {
                self.bytes += reading.bytes();
                match readings
                    .iter_mut()
                    .find(|r| (r.layer, r.head) == (reading.layer, reading.head))
                {
                    Some(known) => known.merge(reading),
                    None => readings.push(reading),
                }
            }
        }
    }

    fn keep(&mut self, slot: usize, cap: usize, op: &Op, pos: u32, row: &[f32]) {
        let to = &mut self.captured[slot];
        let known = to.positions.binary_search(&pos).is_ok();
        if !known && self.bytes + to.row_bytes() > cap {
            self.dropped += 1;
            return;
        }
        let values = op.columns.iter().flat_map(|c| row[c.clone()].iter().copied());
        self.bytes += to.put(pos, values);
    }
}

impl EditOp {
    fn apply(&self, op: &Op, pos: u32, row: &mut [f32]) {
        match self {
            EditOp::Scale(factor) => op.cells(row).for_each(|x| *x *= factor),
            EditOp::SetRow(values) => op.cells(row).zip(values).for_each(|(x, v)| *x = *v),
            EditOp::AddRow(values) => op.cells(row).zip(values).for_each(|(x, v)| *x += v),
            EditOp::SetFrom(from, shift) => {
                if let Some(values) = row_of(from, pos, *shift) {
                    op.cells(row).zip(values).for_each(|(x, v)| *x = v);
                }
            }
            EditOp::AddFrom(from, shift, alpha) => {
                if let Some(values) = row_of(from, pos, *shift) {
                    op.cells(row).zip(values).for_each(|(x, v)| *x += alpha * v);
                }
            }
        }
    }
}

fn row_of(from: &Captured, pos: u32, shift: i64) -> Option<Vec<f32>> {
    from.row(u32::try_from(i64::from(pos).checked_sub(shift)?).ok()?)
}

impl Op {
    fn cells<'a>(&'a self, row: &'a mut [f32]) -> impl Iterator<Item = &'a mut f32> {
        let mut rest = row;
        let mut at = 0;
        self.columns.iter().flat_map(move |c| {
            let (_, tail) = std::mem::take(&mut rest).split_at_mut(c.start - at);
            let (piece, tail) = tail.split_at_mut(c.len());
            rest = tail;
            at = c.end;
            piece
        })
    }
}

/// The rows of a step that belong to observed sequences.
#[derive(Default)]
pub struct Watch<'a> {
    spans: Vec<Span<'a>>,
    /// `[L + 1]`, or nothing if nobody observes.
    mask: Vec<u32>,
}

struct Span<'a> {
    /// Number of the sequence in the step.
    seq: usize,
    observer: &'a Observer,
    first: usize,
    rows: usize,
    pos0: u32,
}

impl<'a> Watch<'a> {
    /// Finds the observed ones among the sequences of a step: observer, rows and position of the first row, in the order of rows.
    pub fn of(layers: usize, seqs: impl IntoIterator<Item = (Option<&'a Observer>, usize, u32)>) -> Self {
        let mut watch = Self::default();
        let mut first = 0;
        for (seq, (observer, rows, pos0)) in seqs.into_iter().enumerate() {
            if let Some(observer) = observer {
                watch.mask.resize(layers + 1, 0);
                for (layer, mask) in watch.mask.iter_mut().enumerate() {
                    *mask |= observer.mask(layer);
                }
                watch.spans.push(Span {
                    seq,
                    observer,
                    first,
                    rows,
                    pos0,
                });
            }
            first += rows;
        }
        watch
    }

    /// Whether anybody looks at `site` of `layer`: one test.
    #[inline]
    pub fn wants(&self, layer: usize, site: Site) -> bool {
        self.mask.get(layer).is_some_and(|m| m & site.bit() != 0)
    }

    /// Whether sequence `seq` looks at any of `sites` of `layer`.
    pub fn wants_any(&self, seq: usize, layer: usize, sites: &[Site]) -> bool {
        let bits = sites.iter().fold(0, |bits, s| bits | s.bit());
        let mut spans = self.spans.iter().filter(|s| s.seq == seq);
        spans.any(|s| s.observer.mask(layer) & bits != 0)
    }

    /// From here on the step has only the last `kept[i]` rows of each sequence.
    ///
    /// # Panics
    /// When a sequence would have more rows than before.
    pub fn narrow(&mut self, kept: &[usize]) {
        for span in &mut self.spans {
            let rows = kept[span.seq];
            span.first = kept[..span.seq].iter().sum();
            assert!(rows <= span.rows, "rows are only ever left out");
            span.pos0 += (span.rows - rows) as u32;
            span.rows = rows;
        }
    }

    /// Applies the hooks of `site` to `data: [R, width]`.
    #[cold]
    #[inline(never)]
    pub fn at(&self, layer: usize, site: Site, data: &mut [f32], width: usize) {
        self.visit(layer, site, data, width, &|_| None);
    }

    /// The same at [`Site::Z`], where hooks can ask what attention did. `view` makes the view of a sequence out of its number
    /// and its rows.
    #[cold]
    #[inline(never)]
    pub fn at_heads<'v>(
        &self,
        layer: usize,
        z: &mut [f32],
        width: usize,
        view: &dyn Fn(usize, std::ops::Range<usize>) -> AttentionView<'v>,
    ) {
        self.visit(layer, Site::Z, z, width, &|s| {
            Some(view(s.seq, s.first..s.first + s.rows))
        });
    }

    fn visit<'v>(
        &self,
        layer: usize,
        site: Site,
        data: &mut [f32],
        width: usize,
        view: &dyn Fn(&Span<'_>) -> Option<AttentionView<'v>>,
    ) {
        for span in self.spans.iter().filter(|s| s.rows > 0) {
            let rows = &mut data[span.first * width..(span.first + span.rows) * width];
            let at = At {
                layer,
                site,
                rows: span.rows,
                width,
                pos0: span.pos0,
                prompt: span.observer.prompt(),
                attention: view(span),
            };
            span.observer.at(&at, rows);
        }
    }
}
