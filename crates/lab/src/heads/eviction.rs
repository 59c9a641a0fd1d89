//! What eviction costs each layer (paper `compresskv`, section 3.3): how far the outputs of its heads are off when they read a cut cache.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use antefix_attention::hooks::{At, Hook, HookPlan, HookSpec, Observer, Site, Sources};
use antefix_attention::readout::AttentionView;
use antefix_engine::Session;
use antefix_papers::compresskv::best;
use antefix_papers::heads::{HeadTest, spearman};
use antefix_papers::kv_baselines::window::{Smoothing, keep, mean};
use antefix_papers::retrieval_heads::score::NoRuns;
use antefix_state::PAGE_ROWS;

use super::needles::{NeedleRuns, STEPS, answer};
use super::{HeadsError, Subject};

/// How the cache is cut for the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Rows that a layer keeps of the prompt, the window included.
    pub budget: usize,
    /// Last queries of the prompt that vote, and stay.
    pub window: usize,
    /// Neighbours over which votes are smoothed.
    pub kernel: usize,
    /// Heads of each layer that vote.
    pub heads: usize,
}

impl Cut {
    /// The paper's.
    pub const PAPER: Self = Self {
        budget: 32,
        window: 8,
        kernel: 5,
        heads: 4,
    };
}

/// What one run brought.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Errors {
    /// For each layer, the sum over the rows of the answer.
    pub(super) sums: Vec<f64>,
    /// Rows of the answer.
    pub(super) rows: usize,
    /// A layer: rows that it keeps of the prompt, once its window is read.
    pub(super) kept: Vec<Vec<u32>>,
}

/// Compares, in every row of the answer, the outputs of the heads with those that the rows kept of the prompt would give. Changes nothing.
pub(super) struct Evict {
    cut: Cut,
    prompt: usize,
    /// The heads of each layer that vote; none in layers with a window.
    voters: Vec<Vec<usize>>,
    /// A layer: the votes of its voters so far, `[voters][prompt - window]`.
    votes: Vec<Vec<Vec<f32>>>,
    errors: Arc<Mutex<Errors>>,
}

impl Evict {
    pub(super) fn new(cut: Cut, prompt: usize, voters: Vec<Vec<usize>>, errors: Arc<Mutex<Errors>>) -> Self {
        let past = prompt - cut.window;
        *lock(&errors) = Errors {
            sums: vec![0.0; voters.len()],
            rows: 0,
            kept: vec![Vec::new(); voters.len()],
        };
        Self {
            cut,
            prompt,
            votes: voters.iter().map(|v| vec![vec![0.0; past]; v.len()]).collect(),
            voters,
            errors,
        }
    }

    /// Rows `rows` of the step are of the window: they vote, and the last one decides.
    fn vote(&mut self, view: &AttentionView<'_>, rows: &[usize]) {
        let votes = &mut self.votes[view.layer];
        for (&head, sums) in self.voters[view.layer].iter().zip(votes.iter_mut()) {
            view.each_row(head, rows, &mut |_, row| {
                for (pos, sum) in (0..).zip(sums.iter_mut()) {
                    *sum += row.at(pos);
                }
            });
        }
        let last = rows.last().map(|&r| view.pos0 as usize + r + 1);
        if last == Some(self.prompt) {
            let smooth = |sums: &Vec<f32>| Smoothing::Mean.over(sums, self.cut.kernel);
            let scores: Vec<Vec<f32>> = votes.iter().map(smooth).collect();
            lock(&self.errors).kept[view.layer] = keep(&mean(&scores), self.prompt, self.cut.budget);
        }
    }

    /// The error of one row of the answer, whose outputs are `z: [Hq * D]`.
    fn error(&self, view: &AttentionView<'_>, r: usize, z: &[f32]) -> f64 {
        let (geometry, kept) = (view.geometry, lock(&self.errors).kept[view.layer].clone());
        let dim = geometry.dim;
        let parts: Vec<Mutex<[f64; 2]>> = (0..geometry.heads).map(|_| Mutex::default()).collect();
        view.run.1.run(geometry.heads, &|head| {
            let whole = &z[head * dim..][..dim];
            let (mut out, mut mass) = (vec![0.0; dim], 0.0);
            let pages = view
                .kv
                .pages(view.layer, head / (geometry.heads / geometry.kv_heads));
            view.each_row(head, &[r], &mut |_, row| {
                for pos in kept.iter().copied().chain(self.prompt as u32..=row.pos) {
                    let (w, at) = (f64::from(row.at(pos)), (pos - view.base) as usize);
                    let page = view.pool.page(pages[at / PAGE_ROWS]);
                    mass += w;
                    for (d, o) in out.iter_mut().enumerate() {
                        *o += w * f64::from(page.value(dim, at % PAGE_ROWS, d));
                    }
                }
            });
            let (mut missed, mut all) = (0.0, 0.0);
            for (o, &x) in out.iter().zip(whole) {
                missed += (o / mass.max(f64::MIN_POSITIVE) - f64::from(x)).powi(2);
                all += f64::from(x).powi(2);
            }
            *lock(&parts[head]) = [missed, all];
        });
        let norm = |of: usize| parts.iter().map(|p| lock(p)[of]).sum::<f64>().sqrt();
        norm(0) / (norm(1) + 1e-5)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hook for Evict {
    fn wants(&self, layer: usize) -> u32 {
        match self.voters.get(layer).is_some_and(|v| !v.is_empty()) {
            true => Site::Z.bit(),
            false => 0,
        }
    }

    fn fingerprint(&self) -> Option<u64> {
        None
    }

    fn at(&mut self, at: &At<'_>, z: &mut [f32]) {
        let Some(view) = &at.attention else { return };
        let place = |r: &usize| at.pos0 as usize + r;
        let rows = 0..at.rows;
        let window: Range<usize> = self.prompt - self.cut.window..self.prompt;
        let voting: Vec<usize> = rows.clone().filter(|r| window.contains(&place(r))).collect();
        if !voting.is_empty() {
            self.vote(view, &voting);
        }
        for r in rows.filter(|r| place(r) >= self.prompt) {
            let error = self.error(view, r, &z[r * at.width..][..at.width]);
            let mut errors = lock(&self.errors);
            errors.sums[at.layer] += error;
            // Every layer that is asked sees the row; the first counts it.
            let first = self.voters.iter().position(|v| !v.is_empty());
            errors.rows += usize::from(first == Some(at.layer));
        }
    }
}

/// Errors of one prompt, while the model answers it with its whole cache.
pub(super) fn one(
    subject: &Subject,
    prompt: &[u32],
    cut: Cut,
    voters: &[Vec<usize>],
) -> Result<Errors, HeadsError> {
    let errors = Arc::new(Mutex::new(Errors::default()));
    let evict = Evict::new(cut, prompt.len(), voters.to_vec(), Arc::clone(&errors));
    let plan = HookPlan::compile(
        &HookSpec::default(),
        subject.model.hook_shape(),
        &Sources::default(),
    )?;
    let observer = Arc::new(Observer::new(Arc::new(plan), prompt.len(), 0).with(Box::new(evict)));
    let mut session = Session::new(Arc::clone(&subject.model), prompt.len() + STEPS, 512);
    let before = prompt.len() - cut.window;
    session.feed(&prompt[..before], 0, &mut Vec::new())?;
    session.observe(Some(Arc::clone(&observer)));
    session.feed(&prompt[before..prompt.len() - 1], 0, &mut Vec::new())?;
    answer(&mut session, subject, prompt, Some(observer))?;
    let errors = lock(&errors).clone();
    Ok(errors)
}

/// The measurement `eviction`: for each layer, in every cell of its row, its part of the errors of all layers, while needles are answered.
/// `semantic` says which heads vote. Layers with a window of their own have none.
///
/// # Errors
/// When the model fails, a length is impossible, or no answer has a second token.
pub fn eviction(
    subject: &Subject,
    runs: &NeedleRuns,
    semantic: &HeadTest,
    cut: Cut,
    done: &mut dyn FnMut(usize),
) -> Result<HeadTest, HeadsError> {
    let spec = subject.model.spec();
    let voters: Vec<Vec<usize>> = (0..spec.layers)
        .map(|l| match spec.layer_kinds[l].window {
            Some(_) => Vec::new(),
            None => best(&semantic.score[l], cut.heads),
        })
        .collect();
    let mut all: Vec<(usize, Errors)> = Vec::new();
    for run in 0..runs.runs {
        let prompt = runs.question(subject, run)?.prompt;
        all.push((prompt.len(), one(subject, &prompt, cut, &voters)?));
        done(run + 1);
    }
    let counted: Vec<&Errors> = all.iter().map(|a| &a.1).filter(|e| e.rows > 0).collect();
    if counted.is_empty() {
        return Err(NoRuns.into());
    }
    let half = |which: usize| shares(counted.iter().copied().skip(which).step_by(2), spec.layers);
    let table = |shares: Vec<f32>| shares.into_iter().map(|e| vec![e; spec.heads]).collect();
    Ok(HeadTest {
        name: "eviction".into(),
        what: format!(
            "greedy answers to needles; error of the heads' outputs with {} rows a layer of which {} are the window, as a share of all layers",
            cut.budget, cut.window
        ),
        runs: all.len(),
        accepted: counted.len(),
        tokens: [
            all.iter().map(|a| a.0).min().unwrap_or(0),
            all.iter().map(|a| a.0).max().unwrap_or(0),
        ],
        seed: runs.seed,
        score: table(shares(counted.iter().copied(), spec.layers)),
        active: None,
        half_spearman: (counted.len() > 1).then(|| spearman(&half(0), &half(1))),
    })
}

/// Each layer's part of the sum of all errors.
fn shares<'a>(runs: impl Iterator<Item = &'a Errors>, layers: usize) -> Vec<f32> {
    let mut sums = vec![0.0; layers];
    for run in runs {
        sums.iter_mut().zip(&run.sums).for_each(|(s, e)| *s += e);
    }
    let all: f64 = sums.iter().sum();
    let share = |e: f64| if all > 0.0 { (e / all) as f32 } else { 0.0 };
    sums.into_iter().map(share).collect()
}
