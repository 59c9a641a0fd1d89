//! The planner of one sequence at work.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use antefix_kernels::{cpu::Cpu, team::Team};
use antefix_kv::Pool;
use antefix_state::plan::Plan;

use super::view::{PlanView, Summaries};
use crate::attend::{Geometry, lock};
use crate::method::Planner;
use crate::readout::AttentionView;
use crate::sharing::SeqRows;

/// A sequence whose prompt is attended by plans.
#[derive(Debug)]
pub struct Planning {
    planner: Arc<dyn Planner>,
    /// Tokens from here on were drawn, and are attended densely.
    prompt: usize,
    summaries: Summaries,
    kept: AtomicU64,
    all: AtomicU64,
    nanos: AtomicU64,
    record: Option<Mutex<Vec<Planned>>>,
}

/// A plan that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Its layer.
    pub layer: usize,
    /// Positions of the rows that it is for.
    pub queries: Range<u32>,
    /// The plan.
    pub plan: Plan,
}

/// Rows of a sequence in a step, and their plan in one layer.
pub(crate) struct Stretch {
    /// Counted from the sequence's first row in the step.
    pub(crate) tokens: Range<usize>,
    pub(crate) plan: Plan,
}

impl Planning {
    /// The planning of a sequence whose first `prompt` tokens are its prompt.
    pub fn new(planner: Arc<dyn Planner>, prompt: usize) -> Self {
        Self {
            planner,
            prompt,
            summaries: Summaries::default(),
            kept: AtomicU64::new(0),
            all: AtomicU64::new(0),
            nanos: AtomicU64::new(0),
            record: None,
        }
    }

    /// The same, keeping every plan for [`Planning::take_plans`].
    #[must_use]
    pub fn recording(mut self) -> Self {
        self.record = Some(Mutex::default());
        self
    }

    /// Rows that are planned together.
    pub fn grain(&self) -> usize {
        self.planner.grain().get()
    }

    /// How many rows behind position `at` a step computes that was meant to compute `rows` of `left`: whole stretches.
    pub fn whole(&self, at: usize, rows: usize, left: usize) -> usize {
        ((at + rows).next_multiple_of(self.grain()) - at).min(left)
    }

    /// Whether the rows of a step that end at `end` are planned.
    pub(crate) fn covers(&self, end: usize) -> bool {
        end <= self.prompt
    }

    /// Kept (query, key) pairs over causal ones, in the layers that were planned; `None` if nothing was yet.
    pub fn density(&self) -> Option<f64> {
        let all = self.all.load(Ordering::Relaxed);
        (all > 0).then(|| self.kept.load(Ordering::Relaxed) as f64 / all as f64)
    }

    /// Time that the planner took.
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }

    /// The plans made so far, by layer within each step; none if they are not recorded.
    pub fn take_plans(&self) -> Vec<Planned> {
        self.record
            .as_ref()
            .map_or_else(Vec::new, |r| std::mem::take(&mut *lock(r)))
    }

    /// Forgets what was planned and summed up: the sequence begins again.
    pub fn restart(&mut self) {
        self.summaries = Summaries::default();
        for figure in [&self.kept, &self.all, &self.nanos] {
            figure.store(0, Ordering::Relaxed);
        }
        self.take_plans();
    }

    /// Forgets what was summed up of keys behind the first `len`: others may come.
    pub fn truncate(&self, len: usize) {
        self.summaries.truncate(len);
    }

    fn plan(&self, rows: AttentionView<'_>) -> Plan {
        let queries = rows.pos0..rows.pos0 + rows.rows() as u32;
        let (layer, geometry) = (rows.layer, rows.geometry);
        let started = Instant::now();
        let plan = self.planner.plan(&PlanView {
            rows,
            summaries: &self.summaries,
        });
        self.nanos
            .fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        plan.fits(geometry.heads, geometry.kv_heads)
            .and_then(|()| plan.validate(queries.clone()))
            .expect("planners return valid plans");
        let (kept, all) = plan.pairs(queries.clone());
        self.kept.fetch_add(kept, Ordering::Relaxed);
        self.all.fetch_add(all, Ordering::Relaxed);
        if let Some(record) = &self.record {
            lock(record).push(Planned {
                layer,
                queries,
                plan: plan.clone(),
            });
        }
        plan
    }
}

/// The plans of one layer for every sequence of a step: one a stretch of its rows, none for a sequence that is attended densely.
pub(crate) fn stretches(
    run: (Cpu, &Team),
    pool: &Pool,
    layer: usize,
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
            let to = from + planning.whole(at, 1, s.rows - from);
            let plan = planning.plan(AttentionView {
                run,
                pool,
                kv: s.kv,
                base: 0,
                layer,
                geometry: *geometry,
                q: &q[(s.first + from) * width..(s.first + to) * width],
                pos0: at as u32,
                exact: true,
            });
            out.push(Stretch {
                tokens: from..to,
                plan,
            });
            from = to;
        }
        out
    };
    seqs.iter().map(one).collect()
}
