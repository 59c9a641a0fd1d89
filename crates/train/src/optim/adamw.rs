//! AdamW (Loshchilov and Hutter), one fused pass a tensor, f32, with groups by name.

use antefix_kernels::grad::{AdamStep, adam_step};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::grads::Grads;
use crate::error::TrainError;
use crate::model::Params;

/// Elements a task takes.
const PIECE: usize = 1 << 15;

/// What a recipe says of the optimiser.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawAdamW {
    /// Learning rate before the schedule's factor.
    pub lr: f64,
    /// Decays of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay. Norms, biases and other vectors have none unless a group says so.
    pub decay: f64,
    /// Gradients are scaled down to this norm; 0 leaves them.
    pub clip: f64,
    /// Groups with settings of their own; the first that matches counts.
    pub group: Vec<RawGroup>,
}

impl Default for RawAdamW {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            betas: [0.9, 0.95],
            eps: 1e-8,
            decay: 0.1,
            clip: 1.0,
            group: Vec::new(),
        }
    }
}

/// Settings of parameters whose names match.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawGroup {
    /// Pattern of names: `*` stands for anything.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Learning rate, if another.
    pub lr: Option<f64>,
    /// Decay, if another.
    pub decay: Option<f64>,
}

/// Learning rate and decay of one variable.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupRule {
    /// Before the schedule's factor.
    pub lr: f64,
    /// Decoupled.
    pub decay: f64,
}

/// Does `name` match `pattern`, in which `*` stands for anything?
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or("");
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

/// First and second moments of one variable, `[n]` each.
#[derive(Debug, Clone, Default)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

/// The optimiser and its state.
#[derive(Debug)]
pub struct AdamW {
    raw: RawAdamW,
    rules: Vec<GroupRule>,
    moments: Vec<Moments>,
    step: u64,
}

impl AdamW {
    /// # Errors
    /// [`TrainError::Recipe`] when a number makes no sense or a group matches nothing.
    pub fn new(raw: RawAdamW, params: &Params) -> Result<Self, TrainError> {
        let bad = |name: &str, value: f64, want: &str| {
            Err(TrainError::Recipe(format!(
                "`optim.{name}` is {value}; it is {want}"
            )))
        };
        let rates = raw.group.iter().filter_map(|g| g.lr).chain([raw.lr]);
        for lr in rates {
            if !(lr.is_finite() && lr >= 0.0) {
                return bad("lr", lr, "a number from 0");
            }
        }
        let decays = raw.group.iter().filter_map(|g| g.decay).chain([raw.decay]);
        for decay in decays {
            if !(0.0..=1.0).contains(&decay) {
                return bad("decay", decay, "from 0 to 1");
            }
        }
        for beta in raw.betas {
            if !(0.0..1.0).contains(&beta) {
                return bad("betas", beta, "from 0, below 1");
            }
        }
        if !(raw.eps.is_finite() && raw.eps > 0.0) {
            return bad("eps", raw.eps, "above 0");
        }
        if !(raw.clip.is_finite() && raw.clip >= 0.0) {
            return bad("clip", raw.clip, "a norm, or 0 for none");
        }
        let names = || params.variables().map(|(name, _)| name);
        if let Some(idle) = raw
            .group
            .iter()
            .find(|g| !names().any(|n| matches(&g.pattern, n)))
        {
            return Err(TrainError::Recipe(format!(
                "`optim.group`: no trained parameter matches `{}`; the first ones are {}",
                idle.pattern,
                names().take(4).collect::<Vec<_>>().join(", ")
            )));
        }
        let rules = params
            .variables()
            .map(|(name, var)| {
                let group = raw.group.iter().find(|g| matches(&g.pattern, name));
                let matrix = var.rank() > 1;
                GroupRule {
                    lr: group.and_then(|g| g.lr).unwrap_or(raw.lr),
                    decay: group
                        .and_then(|g| g.decay)
                        .unwrap_or(if matrix { raw.decay } else { 0.0 }),
                }
            })
            .collect();
        let moments = params
            .variables()
            .map(|(_, v)| Moments {
                first: vec![0.0; v.elem_count()],
                second: vec![0.0; v.elem_count()],
            })
            .collect();
        Ok(Self {
            raw,
            rules,
            moments,
            step: 0,
        })
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Learning rate and decay of each variable, in order.
    pub fn rules(&self) -> &[GroupRule] {
        &self.rules
    }

    /// One step: `factor` is the schedule's. Gives the norm of the gradients before clipping. Variables without a gradient stay as they are.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn step(&mut self, params: &Params, grads: &Grads, factor: f64) -> Result<f64, TrainError> {
        let norm = grads.norm();
        let clip = match self.raw.clip {
            limit if limit > 0.0 && norm > limit => limit / norm,
            _ => 1.0,
        };
        self.step += 1;
        let [b1, b2] = self.raw.betas;
        let t = self.step as f64;
        let [c1, c2] = [1.0 - b1.powf(t), 1.0 - b2.powf(t)];
        let all = params
            .variables()
            .zip(grads.sums())
            .zip(self.rules.iter().zip(&mut self.moments));
        for (((_, var), sum), (rule, moments)) in all {
            if sum.is_empty() {
                continue;
            }
            let lr = rule.lr * factor;
            let step = AdamStep {
                rate: (lr / c1) as f32,
                second_correction: (1.0 / c2.sqrt()) as f32,
                beta1: b1 as f32,
                beta2: b2 as f32,
                eps: self.raw.eps as f32,
                keep: (1.0 - lr * rule.decay) as f32,
                grad_scale: clip as f32,
            };
            let mut value = var.flatten_all()?.to_vec1::<f32>()?;
            value
                .par_chunks_mut(PIECE)
                .zip(
                    moments
                        .first
                        .par_chunks_mut(PIECE)
                        .zip(moments.second.par_chunks_mut(PIECE)),
                )
                .zip(sum.par_chunks(PIECE))
                .for_each(|((value, (first, second)), grad)| adam_step(step, value, first, second, grad));
            var.set(&Tensor::from_vec(value, var.shape(), &Device::Cpu)?)?;
        }
        Ok(norm)
    }

    /// The moments by name, for a checkpoint: `NAME.m`, `NAME.v`.
    pub fn state<'a>(&'a self, params: &'a Params) -> impl Iterator<Item = (String, &'a [f32])> {
        params.variables().zip(&self.moments).flat_map(|((name, _), m)| {
            [
                (format!("{name}.m"), m.first.as_slice()),
                (format!("{name}.v"), m.second.as_slice()),
            ]
        })
    }

    /// Takes a checkpoint's moments; `get` finds a tensor by name.
    ///
    /// # Errors
    /// The name of a tensor that is missing or has another size.
    pub fn restore(
        &mut self,
        params: &Params,
        steps: u64,
        mut get: impl FnMut(&str) -> Option<Vec<f32>>,
    ) -> Result<(), String> {
        for ((name, _), moments) in params.variables().zip(&mut self.moments) {
            for (half, into) in [("m", &mut moments.first), ("v", &mut moments.second)] {
                let name = format!("{name}.{half}");
                match get(&name) {
                    Some(values) if values.len() == into.len() => *into = values,
                    _ => return Err(name),
                }
            }
        }
        self.step = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Init;

    #[test]
    fn patterns_match_whole_names() {
        assert!(matches("*", "a.b"));
        assert!(matches("cond.*", "cond.x"));
        assert!(matches("*.bias", "a.bias"));
        assert!(matches("a*c*e", "abcde"));
        assert!(!matches("a", "ab"));
        assert!(!matches("b*", "ab"));
        assert!(!matches("a*c", "acb"));
    }

    /// 100 steps against the formulas of the paper (algorithm 2), in f64.
    #[test]
    fn a_hundred_steps_are_those_of_the_paper() {
        let mut params = Params::default();
        params.fresh("w", &[3, 2], Init::Normal(1.0), 1).unwrap();
        params.fresh("b", &[2], Init::Constant(0.5), 1).unwrap();
        let raw = RawAdamW {
            lr: 0.01,
            decay: 0.1,
            clip: 0.0,
            ..RawAdamW::default()
        };
        let mut optimiser = AdamW::new(raw, &params).unwrap();
        let values = |params: &Params| -> Vec<Vec<f64>> {
            let flat = |v: &candle_core::Var| v.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            params
                .variables()
                .map(|(_, v)| flat(v).into_iter().map(f64::from).collect())
                .collect()
        };
        let mut want = values(&params);
        let mut state: Vec<Vec<[f64; 2]>> = want.iter().map(|w| vec![[0.0; 2]; w.len()]).collect();
        for step in 1..=100 {
            let mut grads = Grads::default();
            // A bowl: the gradient is the value minus 3.
            let loss = params
                .variables()
                .map(|(_, v)| {
                    ((v.as_tensor() - 3.0).unwrap().sqr().unwrap() * 0.5)
                        .unwrap()
                        .sum_all()
                        .unwrap()
                })
                .reduce(|a, b| (a + b).unwrap())
                .unwrap();
            let at = values(&params);
            grads.add(&params, &loss).unwrap();
            assert!(grads.silent(&params).is_empty());
            optimiser.step(&params, &grads, 1.0).unwrap();
            for (k, (w, decay)) in want.iter_mut().zip([0.1, 0.0]).enumerate() {
                for (i, x) in w.iter_mut().enumerate() {
                    let g = at[k][i] - 3.0;
                    let s = &mut state[k][i];
                    s[0] = 0.9 * s[0] + 0.1 * g;
                    s[1] = 0.95 * s[1] + 0.05 * g * g;
                    let m = s[0] / (1.0 - 0.9f64.powi(step));
                    let v = s[1] / (1.0 - 0.95f64.powi(step));
                    *x -= 0.01 * (m / (v.sqrt() + 1e-8) + decay * *x);
                }
            }
        }
        for (got, want) in values(&params).iter().flatten().zip(want.iter().flatten()) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let mut params = Params::default();
        params.fresh("w", &[3, 2], Init::Normal(1.0), 1).unwrap();
        let with = |change: &dyn Fn(&mut RawAdamW)| {
            let mut raw = RawAdamW::default();
            change(&mut raw);
            AdamW::new(raw, &params)
        };
        assert!(with(&|_| {}).is_ok());
        assert!(with(&|r| r.lr = f64::NAN).is_err());
        assert!(with(&|r| r.betas[1] = 1.0).is_err());
        assert!(with(&|r| r.decay = 2.0).is_err());
        assert!(with(&|r| r.clip = -1.0).is_err());
        let group = RawGroup {
            pattern: "cond.*".into(),
            lr: None,
            decay: None,
        };
        assert!(with(&|r| r.group = vec![group.clone()]).is_err());
    }
}
