//! Gradient checkpointing (Chen et al., arXiv 1604.06174): a part of a model keeps its input only and is computed again when its gradient is
//! wanted. Memory of activations falls from all layers' to one layer's and the inputs of the others, for one more forward pass.
//!
//! A recomputed part is one node of the tape. Its backward runs the part anew with a tape of its own; gradients of parameters inside it are no
//! gradients of the node's argument, so they go aside, and [`crate::optim::Grads::add`] fetches them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor, TensorId, Var};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// What of a forward pass is kept for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// All of it.
    #[default]
    Nothing,
    /// The input of each layer; the layer is computed again.
    Layers,
}

/// Gradients of variables inside recomputed parts, from a backward pass until they are fetched.
#[derive(Debug, Clone, Default)]
pub struct Aside(Arc<Mutex<Gradients>>);

/// By variable; `None` until there is one.
type Gradients = HashMap<TensorId, Option<Tensor>>;

impl Aside {
    fn with<R>(&self, f: impl FnOnce(&mut Gradients) -> R) -> R {
        // A map that a panic left behind is whole: its values are replaced one at a time.
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A variable whose gradients are kept. The tape also has gradients of tensors that are none.
    pub(super) fn know(&self, var: &Var) {
        self.with(|all| all.insert(var.id(), None));
    }

    /// Forgets what a backward pass that nobody asked about has left.
    pub(crate) fn clear(&self) {
        self.with(|all| all.values_mut().for_each(|grad| *grad = None));
    }

    /// The gradient of a variable, once.
    pub(crate) fn take(&self, var: &Var) -> Option<Tensor> {
        self.with(|all| all.get_mut(&var.id()).and_then(Option::take))
    }

    fn add(&self, store: &GradStore) -> Result<()> {
        self.with(|all| {
            for (id, sum) in all {
                let Some(grad) = store.get_id(*id) else { continue };
                *sum = Some(match sum.take() {
                    Some(before) => (before + grad)?,
                    None => grad.clone(),
                });
            }
            Ok(())
        })
    }
}

type Part = dyn Fn(&Tensor) -> std::result::Result<Tensor, TrainError> + Send + Sync;

struct Node {
    part: Box<Part>,
    aside: Aside,
    /// The result, until forward hands it over.
    result: Mutex<Option<Vec<f32>>>,
}

fn failed(error: TrainError) -> Error {
    match error {
        TrainError::Tensor(error) => error,
        other => Error::Msg(other.to_string()),
    }
}

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        "recomputed part"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut held = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        let result = held
            .take()
            .ok_or_else(|| Error::Msg("a node of the tape is used once".into()))?;
        Ok((CpuStorage::F32(result), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let x = Var::from_tensor(&x.detach())?;
        let y = (self.part)(&x).map_err(failed)?;
        // Its gradient is `1 * grad`.
        let mut store = (y * grad)?.sum_all()?.backward()?;
        self.aside.add(&store)?;
        Ok(store.remove(&x))
    }
}

/// `part(x)`, of which only `x` is kept; `part` gives the shape it takes, f32, the same every time.
///
/// # Errors
/// What `part` says.
pub(super) fn recomputed(
    x: &Tensor,
    aside: &Aside,
    part: impl Fn(&Tensor) -> std::result::Result<Tensor, TrainError> + Send + Sync + 'static,
) -> std::result::Result<Tensor, TrainError> {
    let y = part(&x.detach())?;
    if !x.track_op() && !y.track_op() {
        return Ok(y);
    }
    let node = Node {
        part: Box::new(part),
        aside: aside.clone(),
        result: Mutex::new(Some(y.flatten_all()?.to_vec1()?)),
    };
    drop(y);
    // Behind frozen rows a part may still have variables: the tape goes through a leaf whose gradient nobody asks for.
    let x = match x.track_op() {
        true => x.contiguous()?,
        false => Var::from_tensor(x)?.into_inner(),
    };
    Ok(x.apply_op1(node)?)
}
