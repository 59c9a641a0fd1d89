//! The planner of one sequence at work.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use antefix_kernels::attend::PageLayout;
use antefix_kernels::ops::Rope;
use antefix_kernels::{cpu::Cpu, team::Team};
use antefix_kv::Pool;
use antefix_state::PAGE_ROWS;
use antefix_state::plan::{Plan, Unit};

use super::copies::Copies;
use super::view::{PlanView, Summaries};
use crate::attend::{Geometry, lock};
use crate::method::{DecodePlanner, DecodeSteps, Planner, Program};
use crate::readout::AttentionView;
use crate::sharing::SeqRows;

/// A sequence that is attended by plans.
#[derive(Debug)]
pub struct Planning {
    /// For the rows of its prompt; `None`: they are dense.
    planner: Option<Arc<dyn Planner>>,
    /// For drawn rows; `None`: they are dense.
    decode: Option<(Arc<dyn DecodePlanner>, Mutex<Box<dyn DecodeSteps>>)>,
    /// Tokens from here on were drawn.
    prompt: usize,
    summaries: Summaries,
    /// What drawn rows read again and again, by layer and KV head.
    copies: Mutex<HashMap<(usize, usize), Arc<Mutex<Copies>>>>,
    given: Tally,
    drawn: Tally,
    nanos: AtomicU64,
    record: Option<Record>,
}

/// What is kept of the plans for whoever wants to see them.
#[derive(Debug, Default)]
struct Record {
    plans: Mutex<Vec<Planned>>,
    /// Rows of a stretch whose recall is measured, while attention stays dense; `None`: plans are executed, and nothing is measured.
    watched: Option<usize>,
}

/// Pairs of queries and keys that plans kept, and that there were.
#[derive(Debug, Default)]
struct Tally {
    kept: AtomicU64,
    all: AtomicU64,
}

impl Tally {
    fn add(&self, (kept, all): (u64, u64)) {
        self.kept.fetch_add(kept, Ordering::Relaxed);
        self.all.fetch_add(all, Ordering::Relaxed);
    }

    fn density(&self) -> Option<f64> {
        let all = self.all.load(Ordering::Relaxed);
        (all > 0).then(|| self.kept.load(Ordering::Relaxed) as f64 / all as f64)
    }
}

/// A plan that was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// Its layer.
    pub layer: usize,
    /// Positions of the rows that it is for.
    pub queries: Range<u32>,
    /// The plan.
    pub plan: Plan,
    /// Mean share of the weights of dense attention that the kept keys have, over heads and some rows, if it was measured.
    pub recall: Option<f64>,
}

/// Mean share of the weights of dense attention that `plan` keeps of the rows of `view`, over all heads and `rows` rows in equal distances.
pub fn recall(view: &PlanView<'_>, plan: &Plan, rows: usize) -> f64 {
    view.recall(plan, rows)
}

/// Rows of a sequence in a step, and their plan in one layer.
pub(crate) struct Stretch {
    /// Counted from the sequence's first row in the step.
    pub(crate) tokens: Range<usize>,
    pub(crate) plan: Plan,
}

impl Planning {
    /// The planning of a sequence whose first `prompt` tokens are its prompt.
    pub fn new(
        planner: Option<Arc<dyn Planner>>,
        decode: Option<Arc<dyn DecodePlanner>>,
        prompt: usize,
    ) -> Self {
        let given = planner.iter().flat_map(|p| p.summaries());
        let kinds = given.chain(decode.iter().flat_map(|p| p.summaries()));
        let summaries = Summaries::of_kinds(kinds);
        let begin = |planner: Arc<dyn DecodePlanner>| {
            let steps = planner.start();
            (planner, Mutex::new(steps))
        };
        Self {
            planner,
            decode: decode.map(begin),
            prompt,
            summaries,
            copies: Mutex::default(),
            given: Tally::default(),
            drawn: Tally::default(),
            nanos: AtomicU64::new(0),
            record: None,
        }
    }

    /// The planning that `program` asks for; `None` if it leaves all rows dense.
    pub fn of(program: &Program, prompt: usize) -> Option<Self> {
        let (planner, decode) = (program.planner().cloned(), program.decode_planner().cloned());
        (planner.is_some() || decode.is_some()).then(|| Self::new(planner, decode, prompt))
    }

    /// The same, keeping every plan for [`Planning::take_plans`].
    #[must_use]
    pub fn recording(mut self) -> Self {
        self.record = Some(Record::default());
        self
    }

    /// The same, but attention stays dense, and the recall of each plan is measured on `rows` rows of its stretch.
    #[must_use]
    pub fn watching(mut self, rows: usize) -> Self {
        self.record = Some(Record {
            watched: Some(rows),
            ..Record::default()
        });
        self
    }

    /// Rows of the prompt that are planned together; `None` if they are dense.
    pub fn grain(&self) -> Option<usize> {
        Some(self.planner.as_ref()?.grain().get())
    }

    /// How many rows of the prompt behind its first `at` a step computes that was meant to compute `rows` of `left`: whole stretches.
    pub fn whole(&self, at: usize, rows: usize, left: usize) -> usize {
        let grain = self.grain().unwrap_or(1);
        ((at + rows).next_multiple_of(grain) - at).min(left)
    }

    /// Whether the rows of a step that end at `end` are planned.
    pub(crate) fn covers(&self, end: usize) -> bool {
        match end <= self.prompt {
            true => self.planner.is_some(),
            false => self.decode.is_some(),
        }
    }

    /// Kept (query, key) pairs of the prompt over causal ones, in the layers that were planned; `None` if nothing was.
    pub fn density(&self) -> Option<f64> {
        self.given.density()
    }

    /// The same of drawn tokens.
    pub fn decode_density(&self) -> Option<f64> {
        self.drawn.density()
    }

    /// Time that the planner took.
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }

    /// The plans made so far, by layer within each step; none if they are not recorded.
    pub fn take_plans(&self) -> Vec<Planned> {
        self.record
            .as_ref()
            .map_or_else(Vec::new, |r| std::mem::take(&mut *lock(&r.plans)))
    }

    /// Forgets what was planned and summed up: the sequence begins again.
    pub fn restart(&mut self) {
        self.summaries.clear();
        lock(&self.copies).clear();
        (self.given, self.drawn) = (Tally::default(), Tally::default());
        self.nanos = AtomicU64::new(0);
        if let Some((planner, steps)) = &self.decode {
            *lock(steps) = planner.start();
        }
        self.take_plans();
    }

    /// Bytes at most of what is summed up of the first `tokens` keys and of copies of them, in `runs` pairs of layer and KV head. Tables
    /// around the values are not counted, as those of pages are not.
    pub fn summary_bytes(&self, tokens: usize, runs: usize, layout: PageLayout) -> usize {
        let copied = Copies::rows_for(self.repeated(tokens), tokens) * runs * layout.bytes() / PAGE_ROWS;
        self.summaries.bytes_for(tokens, runs, layout.dim) + copied
    }

    /// Bytes of what is summed up and copied now.
    pub fn summary_bytes_now(&self) -> usize {
        let copied = lock(&self.copies);
        self.summaries.bytes() + copied.values().map(|copies| lock(copies).bytes()).sum::<usize>()
    }

    /// Forgets what was summed up and copied of keys behind the first `len`: others may come.
    pub fn truncate(&self, len: usize) {
        self.summaries.truncate(len);
        lock(&self.copies)
            .values()
            .for_each(|copies| lock(copies).truncate(len));
    }

    fn repeated(&self, tokens: usize) -> usize {
        let planner = self.decode.as_ref().map(|(planner, _)| planner);
        planner.map_or(0, |planner| planner.repeated(tokens))
    }

    /// Where copies are kept for the row at `pos` in one layer and KV head; `None` if it reads nothing again and again.
    pub(super) fn copies(&self, layer: usize, head: usize, pos: usize) -> Option<Arc<Mutex<Copies>>> {
        let some = pos >= self.prompt && self.repeated(pos + 1) > 0;
        some.then(|| Arc::clone(lock(&self.copies).entry((layer, head)).or_default()))
    }

    fn plan(&self, rows: AttentionView<'_>, rope: &Rope) -> Plan {
        let queries = rows.pos0..rows.pos0 + rows.rows() as u32;
        let (layer, geometry) = (rows.layer, rows.geometry);
        let started = Instant::now();
        let view = PlanView {
            rows,
            rope,
            summaries: &self.summaries,
        };
        let (plan, tally) = match (&self.planner, &self.decode) {
            (Some(planner), _) if queries.end as usize <= self.prompt => (planner.plan(&view), &self.given),
            (_, Some((_, steps))) => (lock(steps).plan(&view), &self.drawn),
            _ => unreachable!("rows that nobody plans are not asked for"),
        };
        self.nanos
            .fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        plan.fits(geometry.heads, geometry.kv_heads)
            .and_then(|()| plan.validate(queries.clone()))
            .expect("planners return valid plans");
        tally.add(plan.pairs(queries.clone()));
        // One pass for all heads of a group is faster than one each.
        let plan = match plan.is_dense() {
            true => Plan::dense(Unit::KvGroup, geometry.kv_heads),
            false => plan,
        };
        if let Some(record) = &self.record {
            let recall = record.watched.map(|rows| view.recall(&plan, rows));
            lock(&record.plans).push(Planned {
                layer,
                queries,
                plan: plan.clone(),
                recall,
            });
        }
        plan
    }

    /// Whether plans are only looked at.
    fn only_watches(&self) -> bool {
        self.record.as_ref().is_some_and(|r| r.watched.is_some())
    }
}

/// The plans of one layer for every sequence of a step: one a stretch of its rows, none for a sequence that is attended densely.
pub(crate) fn stretches(
    run: (Cpu, &Team),
    pool: &Pool,
    (layer, rope): (usize, &Rope),
    geometry: &Geometry,
    seqs: &[SeqRows<'_>],
    q: &[f32],
) -> Vec<Vec<Stretch>> {
    let width = geometry.heads * geometry.dim;
    let one = |s: &SeqRows<'_>| {
        let (mut out, mut from) = (Vec::new(), 0);
        let Some(planning) = s.planning().filter(|_| geometry.window.is_none()) else {
            return out;
        };
        while from < s.rows {
            let at = s.pos0 as usize + from;
            // Drawn rows are planned all at once: what each reads is its own matter.
            let drawn = s.keys() > planning.prompt;
            let rows = if drawn { s.rows } else { 1 };
            let to = from + planning.whole(at, rows, s.rows - from);
            let view = AttentionView {
                run,
                pool,
                kv: s.kv,
                base: 0,
                layer,
                geometry: *geometry,
                q: &q[(s.first + from) * width..(s.first + to) * width],
                pos0: at as u32,
                exact: true,
            };
            let plan = planning.plan(view, rope);
            if !planning.only_watches() {
                out.push(Stretch {
                    tokens: from..to,
                    plan,
                });
            }
            from = to;
        }
        // Rows that read everything may share their reads with others.
        if out.iter().all(|stretch| stretch.plan.is_dense()) {
            out.clear();
        }
        out
    };
    seqs.iter().map(one).collect()
}
