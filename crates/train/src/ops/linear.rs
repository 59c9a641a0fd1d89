//! Products with weights: `y = x W^T (+ b)`, and the same with a low-rank part beside frozen weights.

use antefix_kernels::dense::{Mat, MatMut, Sum, Threads, product};
use antefix_kernels::grad;
use candle_core::{Result, Tensor};

use super::node::{Arg, Frozen, Op, Output, Scalar, apply, ensure};

/// `y [.., n] = x [.., k] W^T (+ b)`, `W: [n, k]`, `b: [n]`.
///
/// # Errors
/// When the sizes do not fit together.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !weight.track_op() && bias.is_none() {
        return apply(
            Fixed {
                weight: Frozen::new(weight)?,
            },
            &[x],
        );
    }
    match bias {
        Some(bias) => apply(Linear, &[x, weight, bias]),
        None => apply(Linear, &[x, weight]),
    }
}

/// LoRA: `y = x W^T (+ b) + scale (x A^T) B^T`, with `W: [n, k]` and `b` frozen, `A: [r, k]`, `B: [n, r]`, `scale = alpha / r`.
///
/// # Errors
/// When the sizes do not fit together.
pub fn lora(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let op = Lora {
        weight: Frozen::new(weight)?,
        bias: bias.map(Frozen::new).transpose()?,
        scale,
    };
    apply(op, &[x, a, b])
}

/// `x W^T` into a fresh vector; `x: [rows, k]`, `w: [n, k]`.
pub(super) fn times_transposed<T: Scalar>(x: &[T], w: &[T], [rows, k, n]: [usize; 3]) -> Vec<T> {
    let mut y = vec![T::zero(); rows * n];
    product(
        MatMut::new(&mut y, rows, n),
        Sum::Replace,
        T::one(),
        Mat::new(x, rows, k),
        Mat::new(w, n, k).t(),
        Threads::Pool,
    );
    y
}

/// `dx (+)= dy W`; `dy: [rows, n]`, `w: [n, k]`, `dx: [rows, k]`.
pub(super) fn input_grad<T: Scalar>(dx: &mut [T], sum: Sum, dy: &[T], w: &[T], [rows, k, n]: [usize; 3]) {
    product(
        MatMut::new(dx, rows, k),
        sum,
        T::one(),
        Mat::new(dy, rows, n),
        Mat::new(w, n, k),
        Threads::Pool,
    );
}

/// `dy^T x`: `[n, k]`.
pub(super) fn weight_grad<T: Scalar>(dy: &[T], x: &[T], [rows, k, n]: [usize; 3]) -> Vec<T> {
    let mut dw = vec![T::zero(); n * k];
    product(
        MatMut::new(&mut dw, n, k),
        Sum::Replace,
        T::one(),
        Mat::new(dy, rows, n).t(),
        Mat::new(x, rows, k),
        Threads::Pool,
    );
    dw
}

fn add_bias<T: Scalar>(y: &mut [T], bias: &[T]) {
    for row in y.chunks_exact_mut(bias.len()) {
        grad::add_scaled(row, T::one(), bias);
    }
}

fn with_last(dims: &[usize], n: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(last) = dims.last_mut() {
        *last = n;
    }
    dims
}

fn sizes<T>(x: &Arg<'_, T>, weight: &[usize], name: &str) -> Result<[usize; 3]> {
    let [rows, k] = x.matrix();
    ensure(weight.len() == 2 && weight[1] == k, || {
        format!("{name}: weights {weight:?} do not take rows of {k}")
    })?;
    Ok([rows, k, weight[0]])
}

struct Linear;

impl Op for Linear {
    type Saved<T: Scalar> = ();

    const NAME: &'static str = "linear";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, ()>> {
        let (x, w) = (&args[0], &args[1]);
        let size = sizes(x, w.dims, Self::NAME)?;
        let mut data = times_transposed(x.data, w.data, size);
        if let Some(bias) = args.get(2) {
            ensure(bias.data.len() == size[2], || {
                format!("linear: a bias of {} for {} outputs", bias.data.len(), size[2])
            })?;
            add_bias(&mut data, bias.data);
        }
        Ok(Output {
            data,
            dims: with_last(x.dims, size[2]),
            saved: (),
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        (): &(),
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let (x, w) = (&args[0], &args[1]);
        let size = sizes(x, w.dims, Self::NAME)?;
        let dx = wants[0].then(|| {
            let mut dx = vec![T::zero(); x.data.len()];
            input_grad(&mut dx, Sum::Replace, grad, w.data, size);
            dx
        });
        let dw = wants[1].then(|| weight_grad(grad, x.data, size));
        let mut grads = vec![dx, dw];
        if args.len() == 3 {
            grads.push(wants[2].then(|| {
                let mut db = vec![T::zero(); size[2]];
                for row in grad.chunks_exact(size[2]) {
                    grad::add_scaled(&mut db, T::one(), row);
                }
                db
            }));
        }
        Ok(grads)
    }
}

/// With weights that are not trained: no gradient of theirs is computed or kept.
struct Fixed {
    weight: Frozen,
}

impl Op for Fixed {
    type Saved<T: Scalar> = ();

    const NAME: &'static str = "linear (frozen)";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, ()>> {
        let size = sizes(&args[0], self.weight.dims(), Self::NAME)?;
        Ok(Output {
            data: self.weight.with(|w| times_transposed(args[0].data, w, size))?,
            dims: with_last(args[0].dims, size[2]),
            saved: (),
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        _: &[bool],
        (): &(),
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let size = sizes(&args[0], self.weight.dims(), Self::NAME)?;
        let mut dx = vec![T::zero(); args[0].data.len()];
        self.weight
            .with(|w| input_grad(&mut dx, Sum::Replace, grad, w, size))?;
        Ok(vec![Some(dx)])
    }
}

struct Lora {
    weight: Frozen,
    bias: Option<Frozen>,
    scale: f64,
}

impl Lora {
    #[expect(clippy::unused_self, reason = "a step of this operator")]
    fn rank<T>(&self, args: &[Arg<'_, T>], [_, k, n]: [usize; 3]) -> Result<usize> {
        let rank = args[1].dims.first().copied().unwrap_or(0);
        ensure(args[1].dims == [rank, k] && args[2].dims == [n, rank], || {
            format!(
                "LoRA: {:?} and {:?} do not stand beside weights of {n} x {k}",
                args[1].dims, args[2].dims
            )
        })?;
        Ok(rank)
    }
}

impl Op for Lora {
    /// `x A^T`, `[rows, r]`
    type Saved<T: Scalar> = Vec<T>;

    const NAME: &'static str = "LoRA";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Vec<T>>> {
        let size = sizes(&args[0], self.weight.dims(), Self::NAME)?;
        let [rows, k, n] = size;
        let rank = self.rank(args, size)?;
        let mut data = self.weight.with(|w| times_transposed(args[0].data, w, size))?;
        if let Some(bias) = &self.bias {
            bias.with(|b| add_bias(&mut data, b))?;
        }
        let inner = times_transposed(args[0].data, args[1].data, [rows, k, rank]);
        product(
            MatMut::new(&mut data, rows, n),
            Sum::Add,
            T::of(self.scale),
            Mat::new(&inner, rows, rank),
            Mat::new(args[2].data, n, rank).t(),
            Threads::Pool,
        );
        Ok(Output {
            data,
            dims: with_last(args[0].dims, n),
            saved: inner,
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        inner: &Vec<T>,
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let size = sizes(&args[0], self.weight.dims(), Self::NAME)?;
        let [rows, k, n] = size;
        let rank = self.rank(args, size)?;
        let scale = T::of(self.scale);
        // d(x A^T) = scale dy B
        let mut dinner = vec![T::zero(); rows * rank];
        product(
            MatMut::new(&mut dinner, rows, rank),
            Sum::Replace,
            scale,
            Mat::new(grad, rows, n),
            Mat::new(args[2].data, n, rank),
            Threads::Pool,
        );
        let dx = match wants[0] {
            true => {
                let mut dx = vec![T::zero(); rows * k];
                self.weight
                    .with(|w| input_grad(&mut dx, Sum::Replace, grad, w, size))?;
                input_grad(&mut dx, Sum::Add, &dinner, args[1].data, [rows, k, rank]);
                Some(dx)
            }
            false => None,
        };
        let da = weight_grad(&dinner, args[0].data, [rows, k, rank]);
        let mut db = weight_grad(grad, inner, [rows, rank, n]);
        grad::scale(&mut db, scale);
        Ok(vec![dx, Some(da), Some(db)])
    }
}
