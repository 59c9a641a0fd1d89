//! Low-rank adapters: `y = x W^T + (alpha / r) (x A^T) B^T`, under PEFT's names.

use antefix_kernels::dense::{Mat, MatMut, Sum, Threads, product};
use candle_core::Tensor;

use super::params::{Init, Params};
use crate::error::TrainError;

/// Which matrices get an adapter, and of what rank.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// Last part of the names of the modules, as PEFT's `target_modules`: `q_proj`, `v_proj`, ..
    pub modules: Vec<String>,
    /// `r`
    pub rank: usize,
    /// The low-rank product is multiplied by `alpha / r`.
    pub alpha: f64,
}

impl Default for LoraSpec {
    /// Queries and values, as in the paper (Hu et al., arXiv 2106.09685), rank 8, factor 2: what measurements here use.
    fn default() -> Self {
        Self {
            modules: vec!["q_proj".into(), "v_proj".into()],
            rank: 8,
            alpha: 16.0,
        }
    }
}

/// The adapter of one matrix.
#[derive(Debug, Clone)]
pub(super) struct Lora {
    /// `[r, k]`
    pub(super) a: Tensor,
    /// `[n, r]`, zeros at the start
    pub(super) b: Tensor,
    pub(super) scale: f64,
}

/// PEFT's names of the two halves beside the weight `name`.
fn names(name: &str) -> [String; 2] {
    let module = name.trim_end_matches(".weight");
    ["A", "B"].map(|half| format!("base_model.model.{module}.lora_{half}.weight"))
}

impl LoraSpec {
    fn wants(&self, name: &str) -> bool {
        let module = name.trim_end_matches(".weight").rsplit('.').next();
        self.modules.iter().any(|m| Some(m.as_str()) == module)
    }

    /// The adapter beside a weight `[n, k]`, if it gets one.
    pub(super) fn beside(
        &self,
        name: &str,
        weight: &Tensor,
        params: &mut Params,
        seed: u64,
    ) -> Result<Option<Lora>, TrainError> {
        if !self.wants(name) {
            return Ok(None);
        }
        let (n, k) = weight.dims2()?;
        let [a_name, b_name] = names(name);
        // PEFT draws A uniformly with this deviation (Kaiming, a = sqrt 5).
        let a = params.fresh(
            &a_name,
            &[self.rank, k],
            Init::Normal(1.0 / (3.0 * k as f64).sqrt()),
            seed,
        )?;
        let b = params.fresh(&b_name, &[n, self.rank], Init::Constant(0.0), seed)?;
        let scale = self.alpha / self.rank as f64;
        params.note_scale(&a_name, scale);
        Ok(Some(Lora { a, b, scale }))
    }

    /// Fails with the names there are when a module matched nothing.
    pub(super) fn check(&self, params: &Params) -> Result<(), TrainError> {
        let there = |module: &String| {
            params
                .all()
                .any(|(name, _)| name.ends_with(&format!(".{module}.lora_A.weight")))
        };
        match self.modules.iter().find(|m| !there(m)) {
            None if self.rank > 0 && !self.modules.is_empty() => Ok(()),
            None => Err(TrainError::Recipe(
                "an adapter needs a rank of at least 1 and a module to stand beside".into(),
            )),
            Some(module) => Err(TrainError::Recipe(format!(
                "no matrix is called `{module}`; there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
            ))),
        }
    }
}

impl Lora {
    /// The adapter beside the weight `name`, if there is one.
    pub(super) fn of(name: &str, params: &Params) -> Option<Self> {
        let [a, b] = names(name);
        Some(Self {
            scale: params.scale(&a)?,
            a: params.get(&a)?.clone(),
            b: params.get(&b)?.clone(),
        })
    }

    /// `W += scale B A`, `W: [n, k]` row-major.
    pub(super) fn add_to(&self, weight: &mut [f32]) -> Result<(), TrainError> {
        let (rank, k) = self.a.dims2()?;
        let n = self.b.dim(0)?;
        let (a, b) = (
            self.a.flatten_all()?.to_vec1::<f32>()?,
            self.b.flatten_all()?.to_vec1::<f32>()?,
        );
        product(
            MatMut::new(weight, n, k),
            Sum::Add,
            self.scale as f32,
            Mat::new(&b, n, rank),
            Mat::new(&a, rank, k),
            Threads::Pool,
        );
        Ok(())
    }
}
