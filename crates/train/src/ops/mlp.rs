//! Feed-forward parts: the wide middle stays inside one operator.

use antefix_kernels::dense::Sum;
use antefix_kernels::grad::{self, Act};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::linear::{input_grad, times_transposed, weight_grad};
use super::node::{Arg, Op, Output, Scalar, apply, ensure};

/// Elements a task of an element-wise pass takes.
const PIECE: usize = 1 << 14;

/// `h [.., F] = act(x Wg^T) (x Wu^T)`, `Wg, Wu: [F, d]`: the first half of a gated feed-forward part (SwiGLU with [`Act::Silu`]).
///
/// # Errors
/// When the sizes do not fit together.
pub fn glu(act: Act, x: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    apply(Glu { act }, &[x, gate, up])
}

/// `act(gate) up`, element by element.
///
/// # Errors
/// When the sizes differ.
pub fn gated_act(act: Act, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    apply(GatedAct { act }, &[gate, up])
}

/// `y [.., d] = act(x W1^T) W2^T`, `W1: [F, d]`, `W2: [d, F]`: the plain feed-forward part of GPT-2, without biases.
///
/// # Errors
/// When the sizes do not fit together.
pub fn mlp(act: Act, x: &Tensor, first: &Tensor, second: &Tensor) -> Result<Tensor> {
    apply(Mlp { act }, &[x, first, second])
}

fn gate_all<T: Scalar>(act: Act, gate: &[T], up: &[T]) -> Vec<T> {
    let mut out = vec![T::zero(); gate.len()];
    out.par_chunks_mut(PIECE)
        .zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)))
        .for_each(|(out, (gate, up))| grad::gated(act, gate, up, out));
    out
}

fn gate_all_back<T: Scalar>(act: Act, gate: &[T], up: &[T], d: &[T]) -> [Vec<T>; 2] {
    let (mut dgate, mut dup) = (vec![T::zero(); d.len()], vec![T::zero(); d.len()]);
    dgate
        .par_chunks_mut(PIECE)
        .zip(dup.par_chunks_mut(PIECE))
        .zip(
            gate.par_chunks(PIECE)
                .zip(up.par_chunks(PIECE))
                .zip(d.par_chunks(PIECE)),
        )
        .for_each(|((dgate, dup), ((gate, up), d))| grad::gated_back(act, gate, up, d, dgate, dup));
    [dgate, dup]
}

struct GatedAct {
    act: Act,
}

impl Op for GatedAct {
    type Saved<T: Scalar> = ();

    const NAME: &'static str = "gated activation";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, ()>> {
        ensure(args[0].dims == args[1].dims, || {
            format!("a gate of {:?} for values of {:?}", args[0].dims, args[1].dims)
        })?;
        Ok(Output {
            data: gate_all(self.act, args[0].data, args[1].data),
            dims: args[0].dims.to_vec(),
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
        Ok(gate_all_back(self.act, args[0].data, args[1].data, grad)
            .map(Some)
            .into())
    }
}

struct Glu {
    act: Act,
}

fn sizes<T>(x: &Arg<'_, T>, first: &[usize], second: &[usize], turned: bool) -> Result<[usize; 3]> {
    let [rows, d] = x.matrix();
    let wide = first.first().copied().unwrap_or(0);
    let want = if turned { [d, wide] } else { [wide, d] };
    ensure(first == [wide, d] && second == want, || {
        format!("feed-forward weights of {first:?} and {second:?} do not fit rows of {d}")
    })?;
    Ok([rows, d, wide])
}

impl Op for Glu {
    /// `x Wg^T` and `x Wu^T`, `[rows, F]`.
    type Saved<T: Scalar> = [Vec<T>; 2];

    const NAME: &'static str = "gated feed-forward";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, [Vec<T>; 2]>> {
        let size = sizes(&args[0], args[1].dims, args[2].dims, false)?;
        let gate = times_transposed(args[0].data, args[1].data, size);
        let up = times_transposed(args[0].data, args[2].data, size);
        let mut dims = args[0].dims.to_vec();
        if let Some(last) = dims.last_mut() {
            *last = size[2];
        }
        Ok(Output {
            data: gate_all(self.act, &gate, &up),
            dims,
            saved: [gate, up],
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        [gate, up]: &[Vec<T>; 2],
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let size = sizes(&args[0], args[1].dims, args[2].dims, false)?;
        let [dgate, dup] = gate_all_back(self.act, gate, up, grad);
        let dx = wants[0].then(|| {
            let mut dx = vec![T::zero(); args[0].data.len()];
            input_grad(&mut dx, Sum::Replace, &dgate, args[1].data, size);
            input_grad(&mut dx, Sum::Add, &dup, args[2].data, size);
            dx
        });
        Ok(vec![
            dx,
            wants[1].then(|| weight_grad(&dgate, args[0].data, size)),
            wants[2].then(|| weight_grad(&dup, args[0].data, size)),
        ])
    }
}

struct Mlp {
    act: Act,
}

impl Mlp {
    fn middle<T: Scalar>(&self, before: &[T]) -> Vec<T> {
        let mut out = vec![T::zero(); before.len()];
        out.par_chunks_mut(PIECE)
            .zip(before.par_chunks(PIECE))
            .for_each(|(out, x)| grad::act(self.act, x, out));
        out
    }
}

impl Op for Mlp {
    /// `x W1^T`, `[rows, F]`
    type Saved<T: Scalar> = Vec<T>;

    const NAME: &'static str = "feed-forward";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Vec<T>>> {
        let [rows, d, wide] = sizes(&args[0], args[1].dims, args[2].dims, true)?;
        let before = times_transposed(args[0].data, args[1].data, [rows, d, wide]);
        Ok(Output {
            data: times_transposed(&self.middle(&before), args[2].data, [rows, wide, d]),
            dims: args[0].dims.to_vec(),
            saved: before,
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        before: &Vec<T>,
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let [rows, d, wide] = sizes(&args[0], args[1].dims, args[2].dims, true)?;
        let dsecond = wants[2].then(|| weight_grad(grad, &self.middle(before), [rows, wide, d]));
        let mut dmiddle = vec![T::zero(); rows * wide];
        input_grad(&mut dmiddle, Sum::Replace, grad, args[2].data, [rows, wide, d]);
        dmiddle
            .par_chunks_mut(PIECE)
            .zip(before.par_chunks(PIECE))
            .for_each(|(d, x)| grad::act_back(self.act, x, d));
        let dx = wants[0].then(|| {
            let mut dx = vec![T::zero(); rows * d];
            input_grad(&mut dx, Sum::Replace, &dmiddle, args[1].data, [rows, d, wide]);
            dx
        });
        Ok(vec![
            dx,
            wants[1].then(|| weight_grad(&dmiddle, args[0].data, [rows, d, wide])),
            dsecond,
        ])
    }
}
