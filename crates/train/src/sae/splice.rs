//! What a replacement of head outputs costs the model (paper `attention_sae`, section 3.4): cross-entropy of held-out text as it is,
//! with `z` set to zero, and with `z` replaced by what a dictionary makes of it.

use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::hooks::{At, Hook, HookPlan, HookSpec, Observer, Site, Sources};
use antefix_engine::{EngineError, Session, log_softmax_at};
use antefix_kernels::dense::Threads;
use antefix_models::decoder::Model;
use antefix_papers::attention_sae::Sae;
use serde::Serialize;

use super::baselines::Pca;

/// What stands in the place of `z`.
#[derive(Debug, Clone)]
pub enum Replace {
    /// Nothing does: the model as it is.
    Nothing,
    /// Zeros.
    Zero,
    /// What a dictionary makes of it.
    Sae(Arc<Sae>),
    /// Its projection on the largest principal components.
    Pca(Arc<Pca>),
}

/// Figures of one replacement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Default)]
pub struct Spliced {
    /// Mean negative log-likelihood of the next token, nats, with every position replaced.
    pub ce: f64,
    /// The same where the first position of a row, the begin token, stays as it is.
    pub ce_without_bos: f64,
    /// Mean number of features (of components, for PCA) of a row.
    pub l0: f64,
    /// `1 - squared error / squared distance from the mean row`, begin tokens included.
    pub explained: f64,
    /// The same without begin tokens.
    pub explained_without_bos: f64,
    /// Predicted tokens.
    pub tokens: usize,
}

/// Sums over rows.
#[derive(Debug, Default, Clone)]
struct Sums {
    rows: usize,
    active: usize,
    error: f64,
    mean: Vec<f64>,
    square: f64,
    /// The same without the first position.
    error_rest: f64,
    mean_rest: Vec<f64>,
    square_rest: f64,
    rows_rest: usize,
}

impl Sums {
    fn add(&mut self, first: bool, x: &[f32], y: &[f32]) {
        let error: f64 = x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum();
        let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        let count = |mean: &mut Vec<f64>| {
            mean.resize(x.len(), 0.0);
            mean.iter_mut().zip(x).for_each(|(m, x)| *m += f64::from(*x));
        };
        self.rows += 1;
        self.error += error;
        self.square += square;
        count(&mut self.mean);
        if !first {
            self.rows_rest += 1;
            self.error_rest += error;
            self.square_rest += square;
            count(&mut self.mean_rest);
        }
    }
}

fn explained(error: f64, square: f64, sum: &[f64], rows: usize) -> f64 {
    let n = rows.max(1) as f64;
    let variance = square - sum.iter().map(|s| s * s).sum::<f64>() / n;
    if variance > 0.0 {
        1.0 - error / variance
    } else {
        0.0
    }
}

/// Replaces head outputs of one layer.
struct Splice {
    layer: usize,
    with: Replace,
    spare_first: bool,
    sums: Arc<Mutex<Sums>>,
}

impl Hook for Splice {
    fn wants(&self, layer: usize) -> u32 {
        if layer == self.layer { Site::Z.bit() } else { 0 }
    }

    fn fingerprint(&self) -> Option<u64> {
        // It stands in sessions of its own, whose pages nobody shares.
        None
    }

    fn at(&mut self, at: &At<'_>, rows: &mut [f32]) {
        let mut active = 0;
        let made = match &self.with {
            Replace::Nothing => return,
            Replace::Zero => vec![0.0; rows.len()],
            Replace::Sae(sae) => {
                let codes = sae.encode(rows, Threads::Pool);
                active = codes.ids.len();
                sae.decode(&codes)
            }
            Replace::Pca(pca) => {
                active = pca.rank() * at.rows;
                pca.project(rows)
            }
        };
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.active += active;
        for (r, (x, y)) in rows
            .chunks_exact_mut(at.width)
            .zip(made.chunks_exact(at.width))
            .enumerate()
        {
            let first = at.pos0 == 0 && r == 0;
            sums.add(first, x, y);
            if !(first && self.spare_first) {
                x.copy_from_slice(y);
            }
        }
    }
}

/// Cross-entropy over `rows` of tokens with head outputs of `layer` replaced.
///
/// # Errors
/// When the model fails.
pub fn measure(
    model: &Arc<Model>,
    rows: &[Vec<u32>],
    layer: usize,
    with: &Replace,
    mut progress: impl FnMut(usize),
) -> Result<Spliced, EngineError> {
    let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let vocab = model.spec().vocab;
    let mut out = Spliced::default();
    for spare_first in [false, true] {
        let same = matches!(with, Replace::Nothing);
        if same && spare_first {
            out.ce_without_bos = out.ce;
            continue;
        }
        let sums = Arc::new(Mutex::new(Sums::default()));
        let mut session = Session::new(Arc::clone(model), longest, longest.max(1));
        if !same
            && let Ok(plan) = HookPlan::compile(&HookSpec::default(), model.hook_shape(), &Sources::default())
        {
            let splice = Splice {
                layer,
                with: with.clone(),
                spare_first,
                sums: Arc::clone(&sums),
            };
            let observer = Observer::new(Arc::new(plan), longest, 0).with(Box::new(splice));
            session.observe(Some(Arc::new(observer)));
        }
        let (mut nll, mut count, mut logits) = (0.0, 0, Vec::new());
        for (i, row) in rows.iter().enumerate() {
            session.truncate(0);
            logits.clear();
            session.feed(row, row.len(), &mut logits)?;
            for (logits, next) in logits.chunks_exact(vocab).zip(&row[1..]) {
                nll -= f64::from(log_softmax_at(logits, *next));
                count += 1;
            }
            progress(i + 1);
        }
        let ce = nll / f64::from(count.max(1));
        let s = sums.lock().unwrap_or_else(PoisonError::into_inner);
        match spare_first {
            false => {
                out.ce = ce;
                out.tokens = count as usize;
                out.l0 = s.active as f64 / s.rows.max(1) as f64;
                out.explained = explained(s.error, s.square, &s.mean, s.rows);
                out.explained_without_bos = explained(s.error_rest, s.square_rest, &s.mean_rest, s.rows_rest);
            }
            true => out.ce_without_bos = ce,
        }
    }
    Ok(out)
}

/// `(CE_zero - CE) / (CE_zero - CE_clean)`; 0 where zeros cost nothing.
pub fn recovered(ce: f64, zero: f64, clean: f64) -> f64 {
    if zero == clean {
        0.0
    } else {
        (zero - ce) / (zero - clean)
    }
}
