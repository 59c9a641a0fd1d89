//! Norms of rows.

use antefix_kernels::grad;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::node::{Arg, Op, Output, Scalar, apply, ensure};

/// Rows a task takes; partial gradients of the weights are one a task, summed in order.
const ROWS: usize = 64;

/// `y = x w / sqrt(mean(x^2) + eps)` over the last dimension; `w: [d]`.
///
/// # Errors
/// When `w` is of another width.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    apply(RmsNorm { eps }, &[x, weight])
}

/// `y = (x - mean) / sqrt(variance + eps) w + b` over the last dimension; `w, b: [d]`.
///
/// # Errors
/// When `w` or `b` is of another width.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    apply(LayerNorm { eps }, &[x, weight, bias])
}

fn width<T>(args: &[Arg<'_, T>]) -> Result<usize> {
    let [_, d] = args[0].matrix();
    ensure(d > 0 && args[1..].iter().all(|w| w.data.len() == d), || {
        format!("a norm of rows of {d} with weights of {:?}", args[1].dims)
    })?;
    Ok(d)
}

/// The sum of partial gradients, in order.
fn sum<T: Scalar>(parts: impl Iterator<Item = Vec<T>>, len: usize) -> Vec<T> {
    parts.fold(vec![T::zero(); len], |mut sum, part| {
        grad::add_scaled(&mut sum, T::one(), &part);
        sum
    })
}

struct RmsNorm {
    eps: f64,
}

impl Op for RmsNorm {
    /// `1 / rms` of each row.
    type Saved<T: Scalar> = Vec<T>;

    const NAME: &'static str = "RMS norm";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Vec<T>>> {
        let d = width(args)?;
        let x = args[0].data;
        let (mut data, mut saved) = (vec![T::zero(); x.len()], vec![T::zero(); x.len() / d]);
        data.par_chunks_mut(d * ROWS)
            .zip(x.par_chunks(d * ROWS).zip(saved.par_chunks_mut(ROWS)))
            .for_each(|(out, (x, saved))| {
                for ((out, x), saved) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(saved) {
                    *saved = grad::rms_norm(x, args[1].data, T::of(self.eps), out);
                }
            });
        Ok(Output {
            data,
            dims: args[0].dims.to_vec(),
            saved,
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        saved: &Vec<T>,
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let d = width(args)?;
        let x = args[0].data;
        let mut dx = vec![T::zero(); x.len()];
        let parts: Vec<Vec<T>> = dx
            .par_chunks_mut(d * ROWS)
            .zip(
                x.par_chunks(d * ROWS)
                    .zip(grad.par_chunks(d * ROWS))
                    .zip(saved.par_chunks(ROWS)),
            )
            .map(|(dx, ((x, dy), inverse))| {
                let mut dw = vec![T::zero(); d];
                for (((dx, x), dy), &inverse) in dx
                    .chunks_exact_mut(d)
                    .zip(x.chunks_exact(d))
                    .zip(dy.chunks_exact(d))
                    .zip(inverse)
                {
                    grad::rms_norm_back(x, args[1].data, inverse, dy, dx, &mut dw);
                }
                dw
            })
            .collect();
        Ok(vec![Some(dx), wants[1].then(|| sum(parts.into_iter(), d))])
    }
}

struct LayerNorm {
    eps: f64,
}

impl Op for LayerNorm {
    /// Mean and inverse deviation of each row.
    type Saved<T: Scalar> = Vec<[T; 2]>;

    const NAME: &'static str = "layer norm";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Vec<[T; 2]>>> {
        let d = width(args)?;
        let x = args[0].data;
        let (mut data, mut saved) = (vec![T::zero(); x.len()], vec![[T::zero(); 2]; x.len() / d]);
        data.par_chunks_mut(d * ROWS)
            .zip(x.par_chunks(d * ROWS).zip(saved.par_chunks_mut(ROWS)))
            .for_each(|(out, (x, saved))| {
                for ((out, x), saved) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(saved) {
                    *saved = grad::layer_norm(x, args[1].data, args[2].data, T::of(self.eps), out);
                }
            });
        Ok(Output {
            data,
            dims: args[0].dims.to_vec(),
            saved,
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        saved: &Vec<[T; 2]>,
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let d = width(args)?;
        let x = args[0].data;
        let mut dx = vec![T::zero(); x.len()];
        let parts: Vec<[Vec<T>; 2]> = dx
            .par_chunks_mut(d * ROWS)
            .zip(
                x.par_chunks(d * ROWS)
                    .zip(grad.par_chunks(d * ROWS))
                    .zip(saved.par_chunks(ROWS)),
            )
            .map(|(dx, ((x, dy), stats))| {
                let [mut dw, mut db] = [vec![T::zero(); d], vec![T::zero(); d]];
                for (((dx, x), dy), &stats) in dx
                    .chunks_exact_mut(d)
                    .zip(x.chunks_exact(d))
                    .zip(dy.chunks_exact(d))
                    .zip(stats)
                {
                    grad::layer_norm_back(x, args[1].data, stats, dy, dx, &mut dw, &mut db);
                }
                [dw, db]
            })
            .collect();
        let (dw, db): (Vec<_>, Vec<_>) = parts.into_iter().map(|[w, b]| (w, b)).unzip();
        Ok(vec![
            Some(dx),
            wants[1].then(|| sum(dw.into_iter(), d)),
            wants[2].then(|| sum(db.into_iter(), d)),
        ])
    }
}
