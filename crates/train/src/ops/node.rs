//! What all operators share: from candle's storages to slices and back.

use std::sync::OnceLock;

use antefix_kernels::dense::Real;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Error, Layout, Result, Shape, Storage,
    Tensor, WithDType,
};

/// Element types of operators.
pub trait Scalar: Real + WithDType {}

impl Scalar for f32 {}
impl Scalar for f64 {}

/// One argument: its elements, row-major, and its sizes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arg<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) dims: &'a [usize],
}

impl<T> Arg<'_, T> {
    /// `[rows, cols]`; what stands before the last dimension is rows.
    pub(crate) fn matrix(&self) -> [usize; 2] {
        let cols = self.dims.last().copied().unwrap_or(1);
        [self.dims.iter().rev().skip(1).product(), cols]
    }
}

/// What forward gives.
pub(crate) struct Output<T, S> {
    pub(crate) data: Vec<T>,
    pub(crate) dims: Vec<usize>,
    /// What backward needs besides arguments and result.
    pub(crate) saved: S,
}

/// An operator of one to three arguments.
pub(crate) trait Op: Send + Sync + 'static {
    /// Kept from forward to backward.
    type Saved<T: Scalar>: Send + Sync + 'static;

    const NAME: &'static str;

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Self::Saved<T>>>;

    /// A gradient for each argument whose `wants` is set, `None` for the others.
    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        wants: &[bool],
        saved: &Self::Saved<T>,
        result: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>>;
}

enum Saved<O: Op> {
    Single(O::Saved<f32>),
    Double(O::Saved<f64>),
}

/// One use of an operator: a node of the tape.
struct Node<O: Op> {
    op: O,
    wants: Vec<bool>,
    saved: OnceLock<Saved<O>>,
}

fn elements<'a, T: Scalar>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let all = storage.as_slice::<T>()?;
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&all[from..to]),
        None => Err(Error::RequiresContiguous {
            op: "custom operator",
        }
        .bt()),
    }
}

impl<O: Op> Node<O> {
    fn forward(&self, args: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        match args[0].0 {
            CpuStorage::F32(_) => self.forward_in::<f32>(args, Saved::Single),
            CpuStorage::F64(_) => self.forward_in::<f64>(args, Saved::Double),
            other => Err(Error::UnsupportedDTypeForOp(other.dtype(), O::NAME).bt()),
        }
    }

    fn forward_in<T: Scalar>(
        &self,
        args: &[(&CpuStorage, &Layout)],
        keep: impl FnOnce(O::Saved<T>) -> Saved<O>,
    ) -> Result<(CpuStorage, Shape)> {
        let args = args
            .iter()
            .map(|(storage, layout)| {
                Ok(Arg {
                    data: elements::<T>(storage, layout)?,
                    dims: layout.dims(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let out = self.op.forward(&args)?;
        // A node is made for one use, so this is the first time.
        let _ = self.saved.set(keep(out.saved));
        Ok((T::to_cpu_storage_owned(out.data), Shape::from(out.dims)))
    }

    fn backward(&self, args: &[&Tensor], result: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let missing = || Error::BackwardNotSupported { op: O::NAME };
        match self.saved.get().ok_or_else(missing)? {
            Saved::Single(saved) => self.backward_in::<f32>(args, saved, result, grad),
            Saved::Double(saved) => self.backward_in::<f64>(args, saved, result, grad),
        }
    }

    fn backward_in<T: Scalar>(
        &self,
        args: &[&Tensor],
        saved: &O::Saved<T>,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let grad = grad.contiguous()?;
        let held: Vec<_> = args
            .iter()
            .chain([&result, &&grad])
            .map(|t| t.storage_and_layout())
            .collect();
        let slices = held
            .iter()
            .map(|(storage, layout)| match &**storage {
                Storage::Cpu(storage) => elements::<T>(storage, layout),
                _ => Err(Error::Msg(format!("{} runs on the CPU only", O::NAME))),
            })
            .collect::<Result<Vec<_>>>()?;
        let views: Vec<_> = args
            .iter()
            .zip(&slices)
            .map(|(t, data)| Arg { data, dims: t.dims() })
            .collect();
        let n = args.len();
        let grads = self
            .op
            .backward(&views, &self.wants, saved, slices[n], slices[n + 1])?;
        grads
            .into_iter()
            .zip(args)
            .map(|(grad, arg)| {
                grad.map(|g| Tensor::from_vec(g, arg.shape(), &Device::Cpu))
                    .transpose()
            })
            .collect()
    }
}

impl<O: Op> CustomOp1 for Node<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s, l)])
    }

    fn bwd(&self, a: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.backward(&[a], result, grad)?.remove(0))
    }
}

impl<O: Op> CustomOp2 for Node<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s1, l1), (s2, l2)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.backward(&[a, b], result, grad)?.into_iter();
        Ok((grads.next().flatten(), grads.next().flatten()))
    }
}

impl<O: Op> CustomOp3 for Node<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.backward(&[a, b, c], result, grad)?.into_iter();
        Ok((
            grads.next().flatten(),
            grads.next().flatten(),
            grads.next().flatten(),
        ))
    }
}

/// Puts an operator on the tape. Arguments are made contiguous; gradients are computed for those that lead to a variable.
pub(crate) fn apply<O: Op>(op: O, args: &[&Tensor]) -> Result<Tensor> {
    let args = args.iter().map(|t| t.contiguous()).collect::<Result<Vec<_>>>()?;
    if let Some(odd) = args.iter().find(|t| t.dtype() != args[0].dtype()) {
        return Err(Error::DTypeMismatchBinaryOp {
            lhs: args[0].dtype(),
            rhs: odd.dtype(),
            op: O::NAME,
        }
        .bt());
    }
    let node = Node {
        op,
        wants: args.iter().map(Tensor::track_op).collect(),
        saved: OnceLock::new(),
    };
    match args.as_slice() {
        [a] => a.apply_op1(node),
        [a, b] => a.apply_op2(b, node),
        [a, b, c] => a.apply_op3(b, c, node),
        _ => Err(Error::Msg(format!("{} takes one to three arguments", O::NAME))),
    }
}

/// A frozen matrix in both element types an operator may be asked for.
#[derive(Debug, Clone)]
pub(crate) struct Frozen(Tensor);

impl Frozen {
    /// # Errors
    /// When the tensor is not on the CPU or not of floats.
    pub(crate) fn new(t: &Tensor) -> Result<Self> {
        match t.dtype() {
            DType::F32 | DType::F64 => Ok(Self(t.detach().contiguous()?)),
            other => Err(Error::UnsupportedDTypeForOp(other, "frozen weights").bt()),
        }
    }

    pub(crate) fn dims(&self) -> &[usize] {
        self.0.dims()
    }

    /// Reads it where it lies.
    pub(crate) fn with<T: Scalar, R>(&self, f: impl FnOnce(&[T]) -> R) -> Result<R> {
        let (storage, layout) = self.0.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok(f(elements::<T>(storage, layout)?)),
            _ => Err(Error::Msg("frozen weights live on the CPU".into())),
        }
    }
}

/// Fails with the sizes unless `ok`.
pub(crate) fn ensure(ok: bool, what: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Msg(what())) }
}
