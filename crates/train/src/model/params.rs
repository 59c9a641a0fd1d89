//! Named parameters: trained ones are variables of the tape, frozen ones are not and cost no gradient, no moment.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};

use super::recompute::Aside;
use crate::error::TrainError;
use crate::random::Stream;

/// How a fresh parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal numbers of this deviation.
    Normal(f64),
    /// All the same.
    Constant(f64),
}

#[derive(Debug)]
struct Param {
    name: String,
    tensor: Tensor,
    var: Option<Var>,
}

/// All parameters of a model, in the order they were made.
#[derive(Debug, Default)]
pub struct Params {
    list: Vec<Param>,
    index: HashMap<String, usize>,
    /// Factors of low-rank parts, by the name of the first half.
    scales: HashMap<String, f64>,
    aside: Aside,
}

impl Params {
    fn add(&mut self, name: &str, tensor: Tensor, var: Option<Var>) -> Result<Tensor, TrainError> {
        if self.index.contains_key(name) {
            return Err(TrainError::Unsupported(format!(
                "two parameters are called `{name}`"
            )));
        }
        self.index.insert(name.to_string(), self.list.len());
        self.list.push(Param {
            name: name.to_string(),
            tensor: tensor.clone(),
            var,
        });
        Ok(tensor)
    }

    /// A parameter that is trained.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn trained(&mut self, name: &str, value: Tensor) -> Result<Tensor, TrainError> {
        let var = Var::from_tensor(&value)?;
        self.aside.know(&var);
        self.add(name, var.as_tensor().clone(), Some(var))
    }

    /// A parameter that stays as it is.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn frozen(&mut self, name: &str, value: &Tensor) -> Result<Tensor, TrainError> {
        self.add(name, value.detach(), None)
    }

    /// A trained parameter that starts from nothing. Its first values depend on `seed` and `name` alone, so that models which share names
    /// share them, whatever else they have.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn fresh(&mut self, name: &str, dims: &[usize], init: Init, seed: u64) -> Result<Tensor, TrainError> {
        let n = dims.iter().product();
        let values: Vec<f32> = match init {
            Init::Constant(c) => vec![c as f32; n],
            Init::Normal(deviation) => {
                let mut stream = Stream::of(seed, name);
                (0..n).map(|_| (stream.normal() * deviation) as f32).collect()
            }
        };
        self.trained(name, Tensor::from_vec(values, dims, &Device::Cpu)?)
    }

    /// Where gradients of recomputed parts wait.
    pub(crate) fn aside(&self) -> &Aside {
        &self.aside
    }

    pub(super) fn note_scale(&mut self, name: &str, scale: f64) {
        self.scales.insert(name.to_string(), scale);
    }

    pub(super) fn scale(&self, name: &str) -> Option<f64> {
        self.scales.get(name).copied()
    }

    /// The variables, with their names, in order.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.list
            .iter()
            .filter_map(|p| Some((p.name.as_str(), p.var.as_ref()?)))
    }

    /// Every parameter, in order.
    pub fn all(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.list.iter().map(|p| (p.name.as_str(), &p.tensor))
    }

    /// One by name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.index.get(name).map(|&i| &self.list[i].tensor)
    }

    /// How many numbers are trained, and how many there are.
    pub fn counts(&self) -> [usize; 2] {
        let trained = self.variables().map(|(_, v)| v.elem_count()).sum();
        [trained, self.list.iter().map(|p| p.tensor.elem_count()).sum()]
    }

    /// Overwrites a trained parameter.
    ///
    /// # Errors
    /// When there is none of that name, or its shape is another.
    pub fn set(&self, name: &str, value: &Tensor) -> Result<(), TrainError> {
        let var = self
            .index
            .get(name)
            .and_then(|&i| self.list[i].var.as_ref())
            .ok_or_else(|| TrainError::Unsupported(format!("no parameter `{name}` is trained")))?;
        if var.shape() != value.shape() {
            return Err(TrainError::Unsupported(format!(
                "`{name}` is {:?}, not {:?}",
                var.dims(),
                value.dims()
            )));
        }
        Ok(var.set(&value.to_dtype(DType::F32)?)?)
    }
}
