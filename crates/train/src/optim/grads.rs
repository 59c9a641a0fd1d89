//! Gradients of a step, summed over micro-batches in index order.

use antefix_kernels::grad;
use candle_core::Tensor;
use candle_core::backprop::GradStore;

use crate::error::TrainError;
use crate::model::Params;

/// One vector for each variable, in the order of [`Params::variables`]; empty until the variable has had a gradient.
#[derive(Debug, Default)]
pub struct Grads {
    sums: Vec<Vec<f32>>,
}

impl Grads {
    /// Runs backward from `loss` and adds what each variable gets.
    ///
    /// # Errors
    /// When an operator has no backward.
    pub fn add(&mut self, params: &Params, loss: &Tensor) -> Result<(), TrainError> {
        params.aside().clear();
        let store = loss.backward()?;
        self.add_store(params, &store)
    }

    /// Adds what a backward pass gave, and what it left of recomputed parts.
    ///
    /// # Errors
    /// When a gradient is not of f32.
    pub fn add_store(&mut self, params: &Params, store: &GradStore) -> Result<(), TrainError> {
        self.sums.resize_with(params.variables().count(), Vec::new);
        for ((_, var), sum) in params.variables().zip(&mut self.sums) {
            let inside = params.aside().take(var);
            for tensor in store.get(var).into_iter().chain(&inside) {
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                if sum.is_empty() {
                    *sum = values;
                } else {
                    grad::add_scaled(sum, 1.0, &values);
                }
            }
        }
        Ok(())
    }

    /// The sums, empty for variables without a gradient.
    pub fn sums(&self) -> &[Vec<f32>] {
        &self.sums
    }

    /// The same, for hooks that edit gradients before the step.
    pub fn sums_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.sums
    }

    /// The Euclidean norm over all variables, in f64.
    pub fn norm(&self) -> f64 {
        self.sums.iter().map(|g| grad::squares(g)).sum::<f64>().sqrt()
    }

    /// Names of variables whose gradient is missing or all zeros.
    pub fn silent<'a>(&self, params: &'a Params) -> Vec<&'a str> {
        let quiet = |i: usize| self.sums.get(i).is_none_or(|g| g.iter().all(|&x| x == 0.0));
        params
            .variables()
            .enumerate()
            .filter(|(i, _)| quiet(*i))
            .map(|(_, (name, _))| name)
            .collect()
    }
}
