//! All prefixes at once, forward and backward, as a node of the tape.
//!
//! Backward (3.5) keeps `lse` alone besides arguments and result, and runs once from the last token to the first:
//! `R_i = do_i + e^(lse_i - lse_{i+1}) R_{i+1}`, `r_i` likewise of `do_i . o_i`, `p_i = e^(s_i - lse_i)`, `dv_i = p_i R_i`,
//! `ds_i = p_i (R_i . v_i - r_i)`. The factor is at most 1, since `lse` never falls (with a decay: by no more than the decay).

use antefix_kernels::grad;
use antefix_papers::aaren::Prefix;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::ops::Scalar;
use crate::ops::node::{Arg, Op, Output, apply, ensure};

/// `o [B, N, H D]`: attention of a constant query over every prefix. Scores `s: [B, N, H]`, values `v: [B, N, H D]`; `decay` is subtracted
/// from the logarithm of every weight a token.
///
/// # Errors
/// When the sizes do not fit together.
pub fn scan(s: &Tensor, v: &Tensor, decay: f64) -> Result<Tensor> {
    apply(Scan { decay }, &[s, v])
}

struct Scan {
    decay: f64,
}

#[derive(Clone, Copy)]
struct Size {
    tokens: usize,
    heads: usize,
    dim: usize,
}

fn size<T>(args: &[Arg<'_, T>]) -> Result<Size> {
    let (s, v) = (args[0].dims, args[1].dims);
    let fits = s.len() == 3 && v.len() == 3 && s[..2] == v[..2] && s[2] > 0 && v[2] > 0;
    ensure(fits && v[2].is_multiple_of(s[2]) && s[1] > 0, || {
        format!("a scan of scores {s:?} and values {v:?}: they must be [B, N, H] and [B, N, H D]")
    })?;
    Ok(Size {
        tokens: s[1],
        heads: s[2],
        dim: v[2] / s[2],
    })
}

impl Op for Scan {
    /// `lse: [B, N, H]`
    type Saved<T: Scalar> = Vec<f64>;

    const NAME: &'static str = "scan";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Vec<f64>>> {
        let size = size(args)?;
        let (s, v) = (args[0].data, args[1].data);
        let (rows, width) = (size.tokens * size.heads, size.tokens * size.heads * size.dim);
        let (mut data, mut saved) = (vec![T::zero(); v.len()], vec![0.0; s.len()]);
        data.par_chunks_mut(width)
            .zip(saved.par_chunks_mut(rows))
            .zip(s.par_chunks(rows).zip(v.par_chunks(width)))
            .for_each(|((out, lses), (s, v))| {
                Prefix::new(size.heads, size.dim).scan(s, v, self.decay, out, Some(lses));
            });
        Ok(Output {
            data,
            dims: args[1].dims.to_vec(),
            saved,
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        saved: &Vec<f64>,
        result: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let size = size(args)?;
        let (s, v) = (args[0].data, args[1].data);
        let (rows, width) = (size.tokens * size.heads, size.tokens * size.heads * size.dim);
        let (mut ds, mut dv) = (vec![T::zero(); s.len()], vec![T::zero(); v.len()]);
        ds.par_chunks_mut(rows)
            .zip(dv.par_chunks_mut(width))
            .enumerate()
            .for_each(|(b, (ds, dv))| {
                let (rows, width) = (b * rows..(b + 1) * rows, b * width..(b + 1) * width);
                let sequence = Sequence {
                    s: &s[rows.clone()],
                    lse: &saved[rows],
                    v: &v[width.clone()],
                    o: &result[width.clone()],
                    grad: &grad[width],
                };
                sequence.backward(size, self.decay, ds, dv);
            });
        Ok(vec![wants[0].then_some(ds), wants[1].then_some(dv)])
    }
}

/// What backward reads of one sequence.
struct Sequence<'a, T> {
    s: &'a [T],
    lse: &'a [f64],
    v: &'a [T],
    o: &'a [T],
    grad: &'a [T],
}

impl<T: Scalar> Sequence<'_, T> {
    fn backward(&self, size: Size, decay: f64, ds: &mut [T], dv: &mut [T]) {
        let Size { tokens, heads, dim } = size;
        let mut later = vec![T::zero(); heads * dim]; // R_{i+1}
        let mut later_o = vec![0.0f64; heads]; // r_{i+1}
        for i in (0..tokens).rev() {
            for h in 0..heads {
                let (at, span) = (i * heads + h, (i * heads + h) * dim..(i * heads + h + 1) * dim);
                let lse = self.lse[at];
                let carried = match self.lse.get(at + heads) {
                    // A next token that was none, with nothing before it, has no weight to hand on.
                    Some(next) if *next > f64::NEG_INFINITY => (lse - decay - next).exp(),
                    _ => 0.0,
                };
                let grad = &self.grad[span.clone()];
                let r = &mut later[h * dim..(h + 1) * dim];
                grad::scale(r, T::of(carried));
                grad::add_scaled(r, T::one(), grad);
                later_o[h] = carried * later_o[h] + grad::dot(grad, &self.o[span.clone()]).f64();
                let score = self.s[at].f64();
                if score == f64::NEG_INFINITY {
                    continue;
                }
                let p = T::of((score - lse).exp());
                grad::add_scaled(&mut dv[span.clone()], p, r);
                ds[at] = p * (grad::dot(r, &self.v[span]) - T::of(later_o[h]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::tests::{check, numbers, var, weigh};

    #[test]
    fn gradients_are_slopes() {
        for (decay, scale) in [(0.0, 1.0), (0.3, 1.0), (0.0, 8.0)] {
            check(&[var(&[2, 6, 3], 1), var(&[2, 6, 12], 2)], |t| {
                weigh(&scan(&(&t[0] * scale)?, &t[1], decay)?)
            });
        }
    }

    /// Softmax over `[B, H, N, N]` scores with a mask, composed of candle's operators.
    fn dense(s: &Tensor, v: &Tensor, decay: f64) -> Result<Tensor> {
        let (b, n, h) = s.dims3()?;
        let dim = v.dim(2)? / h;
        let mask: Vec<f64> = (0..n * n)
            .map(|i| match (i / n, i % n) {
                (k, i) if i <= k => -decay * (k - i) as f64,
                _ => f64::NEG_INFINITY,
            })
            .collect();
        let mask = Tensor::from_vec(mask, (n, n), &Device::Cpu)?.to_dtype(s.dtype())?;
        let logits = s.transpose(1, 2)?.unsqueeze(2)?.broadcast_add(&mask)?;
        let max = logits.max_keepdim(3)?.detach();
        let weights = logits.broadcast_sub(&max)?.exp()?;
        let p = weights.broadcast_div(&weights.sum_keepdim(3)?)?;
        let v = v.reshape((b, n, h, dim))?.transpose(1, 2)?.contiguous()?;
        p.contiguous()?
            .matmul(&v)?
            .transpose(1, 2)?
            .reshape((b, n, h * dim))
    }

    #[test]
    fn outputs_and_gradients_are_those_of_the_dense_form() {
        for (dtype, tol) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
            for decay in [0.0, 0.05] {
                let of = |dims: &[usize], seed, scale: f64| {
                    let n = dims.iter().product();
                    let x = Tensor::from_vec(numbers(n, seed), dims, &Device::Cpu).unwrap();
                    Var::from_tensor(&(x * scale).unwrap().to_dtype(dtype).unwrap()).unwrap()
                };
                let (s, v) = (of(&[3, 50, 2], 5, 4.0), of(&[3, 50, 10], 6, 1.0));
                let run = |f: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| {
                    let o = f(&s, &v).unwrap();
                    let grads = weigh(&o).unwrap().backward().unwrap();
                    [o, grads.get(&s).unwrap().clone(), grads.get(&v).unwrap().clone()].map(|t| {
                        let t = t.to_dtype(DType::F64).unwrap();
                        t.flatten_all().unwrap().to_vec1::<f64>().unwrap()
                    })
                };
                let ours = run(&|s, v| scan(s, v, decay));
                let dense = run(&|s, v| dense(s, v, decay));
                for (ours, dense) in ours.iter().zip(&dense) {
                    let size = dense.iter().fold(1.0f64, |a, x| a.max(x.abs()));
                    for (a, b) in ours.iter().zip(dense) {
                        assert!((a - b).abs() <= tol * size, "{a} against {b}");
                    }
                }
            }
        }
    }

    #[test]
    fn masked_tokens_get_no_gradient_and_change_none() {
        let (n, hole) = (7, 3);
        let mut scores = numbers(n, 1);
        scores[hole] = f64::NEG_INFINITY;
        scores[0] = f64::NEG_INFINITY; // nothing before it either
        let of = |x: Vec<f64>, dims: (usize, usize, usize)| {
            Var::from_tensor(&Tensor::from_vec(x, dims, &Device::Cpu).unwrap()).unwrap()
        };
        let s = of(scores, (1, n, 1));
        let v = of(numbers(n * 2, 2), (1, n, 2));
        let o = scan(&s, &v, 0.0).unwrap();
        let grads = weigh(&o).unwrap().backward().unwrap();
        let list = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (ds, dv) = (list(grads.get(&s).unwrap()), list(grads.get(&v).unwrap()));
        assert!(
            [ds[0], ds[hole], dv[0], dv[1], dv[2 * hole]]
                .iter()
                .all(|g| *g == 0.0)
        );
        assert!(ds.iter().chain(&dv).all(|g| g.is_finite()) && ds[1] != 0.0 && ds[2] != 0.0);
        assert_eq!(list(&o)[..2], [0.0, 0.0], "no token, no output");
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let t = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
        for (s, v) in [
            (&[1, 3, 2][..], &[1, 3, 3][..]),
            (&[1, 3, 2], &[1, 4, 4]),
            (&[3, 2], &[3, 4]),
            (&[1, 0, 2], &[1, 0, 4]),
        ] {
            assert!(scan(&t(s), &t(v), 0.0).is_err(), "{s:?} {v:?}");
        }
    }
}
