//! Several planners that are asked about the same stretches of one text, which is attended densely: what each would keep, in one pass.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::method::{Plan, PlanView, Planner, Summary};
use antefix_attention::sparse::{Planning, recall};

/// How closely recall is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closeness {
    /// Stretches of a prompt that are looked at, at most.
    pub stretches: usize,
    /// Rows of a stretch.
    pub rows: usize,
    /// Decides which stretches.
    pub seed: u64,
}

impl Closeness {
    /// Where the stretches of `grain` rows begin that are looked at in `tokens`: one out of each of as many equal parts.
    fn starts(&self, tokens: usize, grain: usize) -> Vec<u32> {
        let all = tokens.div_ceil(grain);
        let parts = self.stretches.clamp(1, all.max(1));
        let mut rng = fastrand::Rng::with_seed(self.seed);
        let part = |part: usize| -> Range<usize> { part * all / parts..(part + 1) * all / parts };
        (0..parts).map(|p| (rng.usize(part(p)) * grain) as u32).collect()
    }
}

/// Sums over plans.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums {
    recall: f64,
    plans: usize,
    pairs: (u64, u64),
}

impl Sums {
    /// Adds a plan, with its recall on `rows` rows of `view`.
    pub(crate) fn add(&mut self, view: &PlanView<'_>, plan: &Plan, rows: usize) {
        let (kept, all) = plan.pairs(view.queries());
        self.recall += recall(view, plan, rows);
        self.plans += 1;
        self.pairs = (self.pairs.0 + kept, self.pairs.1 + all);
    }

    /// Mean recall; 1 where no layer is planned: everything is kept.
    pub(crate) fn recall(&self) -> f64 {
        match self.plans {
            0 => 1.0,
            n => self.recall / n as f64,
        }
    }

    /// Kept pairs over all; 1 where no layer is planned.
    pub(crate) fn density(&self) -> f64 {
        match self.pairs {
            (_, 0) => 1.0,
            (kept, all) => kept as f64 / all as f64,
        }
    }
}

#[derive(Debug)]
struct Panel {
    planners: Vec<Arc<dyn Planner>>,
    /// Of all of them.
    grain: NonZeroUsize,
    /// Positions at which the stretches begin that are looked at.
    starts: Vec<u32>,
    rows: usize,
    sums: Mutex<Vec<Sums>>,
}

impl Planner for Panel {
    fn grain(&self) -> NonZeroUsize {
        self.grain
    }

    fn summaries(&self) -> Vec<Summary> {
        self.planners
            .iter()
            .flat_map(|planner| planner.summaries())
            .collect()
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        if self.starts.contains(&view.queries().start) {
            let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
            for (planner, sums) in self.planners.iter().zip(sums.iter_mut()) {
                sums.add(view, &planner.plan(view), self.rows);
            }
        }
        view.dense()
    }
}

/// Asks `planners` about a text of `tokens` tokens, which `compute` computes under the planning that it is given. Those that plan the same
/// stretches share a pass.
pub(crate) fn look<E>(
    planners: &[Arc<dyn Planner>],
    tokens: usize,
    closeness: Closeness,
    mut compute: impl FnMut(Planning) -> Result<(), E>,
) -> Result<Vec<Sums>, E> {
    let mut all = vec![Sums::default(); planners.len()];
    let mut by_grain: BTreeMap<NonZeroUsize, Vec<usize>> = BTreeMap::new();
    for (at, planner) in planners.iter().enumerate() {
        by_grain.entry(planner.grain()).or_default().push(at);
    }
    for (grain, members) in by_grain {
        let panel = Arc::new(Panel {
            planners: members.iter().map(|&at| Arc::clone(&planners[at])).collect(),
            grain,
            starts: closeness.starts(tokens, grain.get()),
            rows: closeness.rows,
            sums: Mutex::new(vec![Sums::default(); members.len()]),
        });
        let planner: Arc<dyn Planner> = Arc::clone(&panel) as Arc<dyn Planner>;
        compute(Planning::new(Some(planner), None, usize::MAX))?;
        let sums = panel.sums.lock().unwrap_or_else(PoisonError::into_inner);
        for (&at, sums) in members.iter().zip(sums.iter()) {
            all[at] = *sums;
        }
    }
    Ok(all)
}
