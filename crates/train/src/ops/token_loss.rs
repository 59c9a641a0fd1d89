//! The output matrix and what stands behind it, without ever holding the logits of all rows.
//!
//! [`token_loss`] sums a loss that each row makes of its target's log-probability, and computes the gradients in the same pass, chunk by chunk of
//! rows; [`log_probs`] gives the log-probabilities themselves and computes each chunk's logits again in backward. Cross-entropy is
//! [`RowLoss::CrossEntropy`]; objectives of policies bring their own rule. [`judge`] only looks.

use std::sync::Arc;

use antefix_kernels::dense::{Mat, MatMut, Sum, Threads, product};
use antefix_kernels::grad;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::node::{Arg, Op, Output, Scalar, apply, ensure};

/// Logits held at a time, elements: 32 MB of f32.
const CHUNK: usize = 1 << 23;

/// What a row contributes to the loss, and its derivative, as functions of the target's log-probability.
#[derive(Clone)]
pub enum RowLoss {
    /// `-w_r logp_r`; `[N]`.
    CrossEntropy(Arc<Vec<f64>>),
    /// `(r, logp) -> (loss, d loss / d logp)`
    Rule(Arc<dyn Fn(usize, f64) -> (f64, f64) + Send + Sync>),
}

impl RowLoss {
    fn at(&self, row: usize, log_prob: f64) -> (f64, f64) {
        match self {
            Self::CrossEntropy(weights) => (-weights[row] * log_prob, -weights[row]),
            Self::Rule(rule) => rule(row, log_prob),
        }
    }
}

/// `sum_r loss_r(logp_r)` as a scalar, `logp_r = log softmax(h_r W^T / temperature)[targets_r]`; `h: [N, d]`, `W: [V, d]`.
///
/// # Errors
/// When the sizes do not fit together or a target is not below `V`.
pub fn token_loss(
    h: &Tensor,
    weight: &Tensor,
    targets: &Arc<Vec<u32>>,
    temperature: f64,
    loss: RowLoss,
) -> Result<Tensor> {
    let grads = [h.track_op(), weight.track_op()];
    apply(
        TokenLoss {
            targets: targets.clone(),
            temperature,
            loss,
            grads,
        },
        &[h, weight],
    )
}

/// `[N]`: `log softmax(h_r W^T / temperature)[targets_r]`.
///
/// # Errors
/// When the sizes do not fit together or a target is not below `V`.
pub fn log_probs(h: &Tensor, weight: &Tensor, targets: &Arc<Vec<u32>>, temperature: f64) -> Result<Tensor> {
    apply(
        LogProbs {
            targets: targets.clone(),
            temperature,
        },
        &[h, weight],
    )
}

/// How one target was predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judged {
    /// `log softmax(h W^T)[target]`
    pub log_prob: f64,
    /// The token with the largest logit; of equal ones the first.
    pub likeliest: u32,
    /// That is the target.
    pub right: bool,
}

/// How each target is predicted, `[N]`, without a gradient; `h: [N, d]`, `W: [V, d]`, f32.
///
/// # Errors
/// When the sizes do not fit together or a target is not below `V`.
pub fn judge(h: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<Vec<Judged>> {
    let (h_data, w_data) = (
        h.flatten_all()?.to_vec1::<f32>()?,
        weight.flatten_all()?.to_vec1::<f32>()?,
    );
    let args = [(&h_data, h), (&w_data, weight)].map(|(data, t)| Arg { data, dims: t.dims() });
    let size = sizes(&args, targets)?;
    let mut out = Vec::with_capacity(targets.len());
    each_chunk(&h_data, &w_data, size, 1.0, |first, logits| {
        let judged: Vec<Judged> = logits
            .par_chunks_exact(size[2])
            .enumerate()
            .map(|(i, logits)| {
                let target = targets[first + i] as usize;
                let best = logits.iter().enumerate().fold(
                    0,
                    |best, (at, x)| {
                        if *x > logits[best] { at } else { best }
                    },
                );
                Judged {
                    log_prob: f64::from(logits[target] - grad::log_sum_exp(logits)),
                    likeliest: best as u32,
                    right: best == target,
                }
            })
            .collect();
        out.extend(judged);
    });
    Ok(out)
}

/// `[N, d, V]`
fn sizes<T>(args: &[Arg<'_, T>], targets: &[u32]) -> Result<[usize; 3]> {
    let [n, d] = args[0].matrix();
    let [vocab, width] = args[1].matrix();
    ensure(width == d && targets.len() == n && vocab > 0, || {
        format!(
            "{} targets for hidden rows {:?} and an output matrix {:?}",
            targets.len(),
            args[0].dims,
            args[1].dims
        )
    })?;
    if let Some(odd) = targets.iter().find(|&&t| t as usize >= vocab) {
        ensure(false, || {
            format!("target {odd} is not one of the model's {vocab}")
        })?;
    }
    Ok([n, d, vocab])
}

/// Calls `f(first row, logits [rows, V])` for each chunk of rows, in order.
fn each_chunk<T: Scalar>(
    h: &[T],
    w: &[T],
    [n, d, vocab]: [usize; 3],
    temperature: f64,
    mut f: impl FnMut(usize, &mut [T]),
) {
    let rows = (CHUNK / vocab).clamp(1, n.max(1));
    let mut logits = vec![T::zero(); rows * vocab];
    for (i, h) in h.chunks(rows * d).enumerate() {
        let m = h.len() / d;
        let logits = &mut logits[..m * vocab];
        product(
            MatMut::new(logits, m, vocab),
            Sum::Replace,
            T::of(1.0 / temperature),
            Mat::new(h, m, d),
            Mat::new(w, vocab, d).t(),
            Threads::Pool,
        );
        f(i * rows, logits);
    }
}

/// From logits to `c (onehot - softmax)`, in place.
fn logits_back<T: Scalar>(logits: &mut [T], lse: T, target: u32, c: T) {
    grad::exp_minus(logits, lse, -c);
    logits[target as usize] += c;
}

struct TokenLoss {
    targets: Arc<Vec<u32>>,
    temperature: f64,
    loss: RowLoss,
    /// Whether the gradients of `h` and `W` are wanted.
    grads: [bool; 2],
}

impl Op for TokenLoss {
    /// Gradients of `h` and `W`, for an upstream gradient of 1; empty if not wanted.
    type Saved<T: Scalar> = [Vec<T>; 2];

    const NAME: &'static str = "token loss";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, [Vec<T>; 2]>> {
        let size = sizes(args, &self.targets)?;
        let [_, d, vocab] = size;
        let len = |wanted: bool, len: usize| if wanted { len } else { 0 };
        let mut dh = vec![T::zero(); len(self.grads[0], args[0].data.len())];
        let mut dw = vec![T::zero(); len(self.grads[1], args[1].data.len())];
        let mut total = 0.0;
        each_chunk(
            args[0].data,
            args[1].data,
            size,
            self.temperature,
            |first, logits| {
                let losses: Vec<f64> = logits
                    .par_chunks_exact_mut(vocab)
                    .enumerate()
                    .map(|(i, logits)| {
                        let target = self.targets[first + i];
                        let lse = grad::log_sum_exp(logits);
                        let (loss, slope) = self.loss.at(first + i, (logits[target as usize] - lse).f64());
                        if self.grads != [false; 2] {
                            logits_back(logits, lse, target, T::of(slope / self.temperature));
                        }
                        loss
                    })
                    .collect();
                total += losses.iter().sum::<f64>();
                let m = losses.len();
                let dlogits = Mat::new(logits, m, vocab);
                if self.grads[0] {
                    let out = MatMut::new(&mut dh[first * d..], m, d);
                    product(
                        out,
                        Sum::Replace,
                        T::one(),
                        dlogits,
                        Mat::new(args[1].data, vocab, d),
                        Threads::Pool,
                    );
                }
                if self.grads[1] {
                    let h = Mat::new(&args[0].data[first * d..], m, d);
                    product(
                        MatMut::new(&mut dw, vocab, d),
                        Sum::Add,
                        T::one(),
                        dlogits.t(),
                        h,
                        Threads::Pool,
                    );
                }
            },
        );
        Ok(Output {
            data: vec![T::of(total)],
            dims: Vec::new(),
            saved: [dh, dw],
        })
    }

    fn backward<T: Scalar>(
        &self,
        _: &[Arg<'_, T>],
        wants: &[bool],
        saved: &[Vec<T>; 2],
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        Ok(saved
            .iter()
            .zip(wants)
            .map(|(saved, wanted)| {
                wanted.then(|| {
                    let mut out = saved.clone();
                    if grad[0] != T::one() {
                        grad::scale(&mut out, grad[0]);
                    }
                    out
                })
            })
            .collect())
    }
}

struct LogProbs {
    targets: Arc<Vec<u32>>,
    temperature: f64,
}

impl Op for LogProbs {
    /// Log-sum-exp of each row's logits, `[N]`.
    type Saved<T: Scalar> = Vec<T>;

    const NAME: &'static str = "log-probabilities";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Vec<T>>> {
        let size = sizes(args, &self.targets)?;
        let (mut data, mut saved) = (Vec::new(), Vec::new());
        each_chunk(
            args[0].data,
            args[1].data,
            size,
            self.temperature,
            |first, logits| {
                let rows: Vec<(T, T)> = logits
                    .par_chunks_exact(size[2])
                    .enumerate()
                    .map(|(i, logits)| {
                        let lse = grad::log_sum_exp(logits);
                        (logits[self.targets[first + i] as usize] - lse, lse)
                    })
                    .collect();
                data.extend(rows.iter().map(|r| r.0));
                saved.extend(rows.iter().map(|r| r.1));
            },
        );
        Ok(Output {
            dims: vec![data.len()],
            data,
            saved,
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        lse: &Vec<T>,
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let size = sizes(args, &self.targets)?;
        let [_, d, vocab] = size;
        let mut dh = wants[0].then(|| vec![T::zero(); args[0].data.len()]);
        let mut dw = wants[1].then(|| vec![T::zero(); args[1].data.len()]);
        each_chunk(
            args[0].data,
            args[1].data,
            size,
            self.temperature,
            |first, logits| {
                logits
                    .par_chunks_exact_mut(vocab)
                    .enumerate()
                    .for_each(|(i, logits)| {
                        let row = first + i;
                        logits_back(
                            logits,
                            lse[row],
                            self.targets[row],
                            grad[row] / T::of(self.temperature),
                        );
                    });
                let m = logits.len() / vocab;
                let dlogits = Mat::new(logits, m, vocab);
                if let Some(dh) = &mut dh {
                    let out = MatMut::new(&mut dh[first * d..], m, d);
                    product(
                        out,
                        Sum::Replace,
                        T::one(),
                        dlogits,
                        Mat::new(args[1].data, vocab, d),
                        Threads::Pool,
                    );
                }
                if let Some(dw) = &mut dw {
                    let h = Mat::new(&args[0].data[first * d..], m, d);
                    product(
                        MatMut::new(dw, vocab, d),
                        Sum::Add,
                        T::one(),
                        dlogits.t(),
                        h,
                        Threads::Pool,
                    );
                }
            },
        );
        Ok(vec![dh, dw])
    }
}
