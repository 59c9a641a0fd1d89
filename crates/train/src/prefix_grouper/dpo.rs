//! Direct preference optimisation (Rafailov et al., arXiv 2305.18290) on shared prompts: the chosen and the rejected response stand behind one
//! prompt, which is computed once.
//!
//! With `d = (logp(chosen) - logp(rejected))`, sums over tokens, and `d_ref` the same under the reference, `z = beta (d - d_ref)`, and the loss
//! of a pair is `-(1 - e) log sigma(z) - e log sigma(-z)`: `e` is the share of pairs that are labelled the wrong way round (Mitchell's
//! conservative DPO); 0 is the paper's equation 7.

use std::sync::Arc;

use candle_core::Result;
#[cfg(test)]
use candle_core::Tensor;

use super::layout::{Form, Prompted, Scored, pack};
use super::step::{LanguageModel, score};
use crate::error::TrainError;
use crate::ops;
use crate::ops::node::{Arg, Op, Output, Scalar, apply, ensure};
use crate::optim::Grads;

/// The objective.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preference {
    /// Factor on the difference of log-probabilities.
    pub beta: f64,
    /// `e`, from 0 to 0.5.
    pub label_smoothing: f64,
}

/// Figures over pairs; means.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PreferenceReport {
    /// The objective's loss.
    pub loss: f64,
    /// `z`: reward of the chosen less that of the rejected.
    pub margin: f64,
    /// Share of pairs with `z > 0`.
    pub accuracy: f64,
    /// `beta (logp - ref)` of the chosen and of the rejected.
    pub rewards: [f64; 2],
    /// Rows computed, forward and backward; a sum.
    pub rows: usize,
}

impl Preference {
    /// `[loss, d loss / d z]` of a pair.
    fn pair(self, z: f64) -> [f64; 2] {
        // ln(1 + e^x), without overflow.
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        let e = self.label_smoothing;
        let sigma = (-softplus(-z)).exp();
        [
            (1.0 - e) * softplus(-z) + e * softplus(z),
            e * sigma - (1.0 - e) * (-softplus(z)).exp(),
        ]
    }
}

/// What a batch of pairs is scored by.
#[derive(Debug, Clone)]
struct Pairs {
    preference: Preference,
    /// Pair and response (0 chosen, 1 rejected) of each token, `[N]`.
    owners: Arc<Vec<[usize; 2]>>,
    /// Log-probabilities of both responses under the reference, `[P]`; zeros without one.
    reference: Vec<[f64; 2]>,
    /// Pairs of the whole step, which may be more than these.
    of: usize,
}

/// Sums over the tokens of each response, `[P]`.
fn sums(values: impl Iterator<Item = f64>, owners: &[[usize; 2]], pairs: usize) -> Vec<[f64; 2]> {
    let mut out = vec![[0.0; 2]; pairs];
    for (value, &[i, j]) in values.zip(owners) {
        out[i][j] += value;
    }
    out
}

impl Pairs {
    fn margins(&self, logp: &[[f64; 2]]) -> Vec<f64> {
        let gain = |l: &[f64; 2], r: &[f64; 2], j: usize| l[j] - r[j];
        logp.iter()
            .zip(&self.reference)
            .map(|(l, r)| self.preference.beta * (gain(l, r, 0) - gain(l, r, 1)))
            .collect()
    }

    fn report(&self, logp: &[[f64; 2]]) -> PreferenceReport {
        let mut out = PreferenceReport::default();
        let n = self.of as f64;
        for ((z, l), r) in self.margins(logp).into_iter().zip(logp).zip(&self.reference) {
            out.loss += self.preference.pair(z)[0] / n;
            out.margin += z / n;
            out.accuracy += f64::from(u8::from(z > 0.0)) / n;
            for j in 0..2 {
                out.rewards[j] += self.preference.beta * (l[j] - r[j]) / n;
            }
        }
        out
    }
}

impl Op for Pairs {
    /// Gradient by each token's log-probability, `[N]`.
    type Saved<T: Scalar> = Vec<T>;

    const NAME: &'static str = "preferences";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Vec<T>>> {
        let n = args[0].data.len();
        ensure(n == self.owners.len(), || {
            format!("{n} log-probabilities of {} tokens", self.owners.len())
        })?;
        let logp = sums(
            args[0].data.iter().map(|x| x.f64()),
            &self.owners,
            self.reference.len(),
        );
        let pairs: Vec<[f64; 2]> = self
            .margins(&logp)
            .into_iter()
            .map(|z| self.preference.pair(z))
            .collect();
        let weight = 1.0 / self.of as f64;
        let slope = |&[i, j]: &[usize; 2]| {
            let sign = if j == 0 { 1.0 } else { -1.0 };
            T::of(sign * weight * self.preference.beta * pairs[i][1])
        };
        Ok(Output {
            data: vec![T::of(weight * pairs.iter().map(|p| p[0]).sum::<f64>())],
            dims: Vec::new(),
            saved: self.owners.iter().map(slope).collect(),
        })
    }

    fn backward<T: Scalar>(
        &self,
        _: &[Arg<'_, T>],
        _: &[bool],
        saved: &Vec<T>,
        _: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        Ok(vec![Some(saved.iter().map(|&s| s * grad[0]).collect())])
    }
}

fn pairs(
    scored: &Scored,
    reference: Option<&dyn LanguageModel>,
    items: &[Prompted],
    preference: Preference,
    of: usize,
) -> std::result::Result<Pairs, TrainError> {
    if let Some(odd) = items.iter().find(|item| item.responses.len() != 2) {
        return Err(TrainError::Unsupported(format!(
            "a preference has a chosen and a rejected response, not {}",
            odd.responses.len()
        )));
    }
    let reference = match reference {
        Some(model) => sums(
            score(model, scored, 1.0)?.into_iter(),
            &scored.owners,
            items.len(),
        ),
        None => vec![[0.0; 2]; items.len()],
    };
    Ok(Pairs {
        preference,
        owners: Arc::new(scored.owners.clone()),
        reference,
        of,
    })
}

/// Computes the loss of `items` - prompts with a chosen and a rejected response, in this order - and adds its gradient to `grads`. `of` is how
/// many pairs the step has in all: reports and gradients of its parts are summed. Without a reference its log-probabilities are zero.
///
/// # Errors
/// Items with other than two responses, empty ones, and tensor operations that fail.
pub fn preference_step(
    model: &dyn LanguageModel,
    reference: Option<&dyn LanguageModel>,
    items: &[Prompted],
    preference: Preference,
    of: usize,
    form: Form,
    grads: &mut Grads,
) -> std::result::Result<PreferenceReport, TrainError> {
    let scored = pack(items, form)?;
    let pairs = pairs(&scored, reference, items, preference, of)?;
    let hidden = ops::embed(&model.hidden(&scored.batch)?, &scored.rows, 1.0)?;
    let logp = ops::log_probs(&hidden, model.output(), &scored.targets, 1.0)?;
    let values = logp.to_vec1::<f32>()?;
    let report = pairs.report(&sums(
        values.into_iter().map(f64::from),
        &scored.owners,
        items.len(),
    ));
    grads.add(model.params(), &apply(pairs, &[&logp])?)?;
    Ok(PreferenceReport {
        rows: scored.batch.packing.rows(),
        ..report
    })
}

/// The figures of [`preference_step`] without a gradient.
///
/// # Errors
/// As there.
pub fn preference_report(
    model: &dyn LanguageModel,
    reference: Option<&dyn LanguageModel>,
    items: &[Prompted],
    preference: Preference,
    of: usize,
) -> std::result::Result<PreferenceReport, TrainError> {
    let scored = pack(items, Form::Grouped)?;
    let logp = sums(
        score(model, &scored, 1.0)?.into_iter(),
        &scored.owners,
        items.len(),
    );
    let report = pairs(&scored, reference, items, preference, of)?.report(&logp);
    Ok(PreferenceReport {
        rows: scored.batch.packing.rows(),
        ..report
    })
}

impl std::ops::AddAssign for PreferenceReport {
    /// Parts of one step.
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.margin += other.margin;
        self.accuracy += other.accuracy;
        self.rewards[0] += other.rewards[0];
        self.rewards[1] += other.rewards[1];
        self.rows += other.rows;
    }
}

/// The operator, for tests.
#[cfg(test)]
pub(super) fn loss_of(
    logp: &Tensor,
    owners: &[[usize; 2]],
    reference: &[[f64; 2]],
    preference: Preference,
) -> Result<Tensor> {
    let pairs = Pairs {
        preference,
        owners: Arc::new(owners.to_vec()),
        reference: reference.to_vec(),
        of: reference.len(),
    };
    apply(pairs, &[logp])
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::tests::{model, prompted};
    use super::*;
    use crate::ops::tests::{check, var};
    use antefix_models::spec::Arch;

    const SMOOTH: Preference = Preference {
        beta: 0.3,
        label_smoothing: 0.2,
    };

    /// Two pairs, tokens of responses in any order.
    const OWNERS: [[usize; 2]; 6] = [[0, 0], [0, 0], [0, 1], [1, 0], [1, 1], [1, 1]];
    const REFERENCE: [[f64; 2]; 2] = [[-0.4, -0.9], [-1.0, 0.3]];

    #[test]
    fn the_gradient_is_the_slope() {
        check(&[var(&[6], 5)], |t| loss_of(&t[0], &OWNERS, &REFERENCE, SMOOTH));
        // Far from 0 on both sides, where exponentials overflow if they can.
        for z in [-2000.0, 2000.0] {
            let [loss, slope] = SMOOTH.pair(z);
            let h = 1e-3;
            let near = (SMOOTH.pair(z + h)[0] - SMOOTH.pair(z - h)[0]) / (2.0 * h);
            assert!(
                loss.is_finite() && (slope - near).abs() < 1e-6,
                "{z}: {loss} {slope} {near}"
            );
        }
    }

    /// Equation 7 of the paper, written out.
    #[test]
    fn the_loss_is_the_papers() {
        let values = [-0.5f64, -1.5, -0.2, -2.0, -0.3, -0.1];
        let logp = Var::from_tensor(&Tensor::from_slice(&values, 6, &Device::Cpu).unwrap()).unwrap();
        let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
        let plain = Preference {
            label_smoothing: 0.0,
            ..SMOOTH
        };
        let z = [
            0.3 * ((-2.0 - -0.4) - (-0.2 - -0.9)),
            0.3 * ((-2.0 - -1.0) - (-0.4 - 0.3)),
        ];
        let want = -(sigma(z[0]).ln() + sigma(z[1]).ln()) / 2.0;
        let loss = loss_of(&logp, &OWNERS, &REFERENCE, plain).unwrap();
        assert!((loss.to_scalar::<f64>().unwrap() - want).abs() < 1e-12);
        let flipped = -(sigma(-z[0]).ln() + sigma(-z[1]).ln()) / 2.0;
        let loss = loss_of(&logp, &OWNERS, &REFERENCE, SMOOTH).unwrap();
        assert!((loss.to_scalar::<f64>().unwrap() - (0.8 * want + 0.2 * flipped)).abs() < 1e-12);
    }

    fn pairs() -> Vec<Prompted> {
        vec![
            prompted(12, &[3, 5], 1),
            prompted(8, &[4, 1], 2),
            prompted(1, &[1, 1], 3),
        ]
    }

    #[test]
    fn grouped_and_repeated_pairs_give_the_same_gradients() {
        for arch in [Arch::Llama, Arch::Gemma3] {
            let model = model(arch);
            let mut found = Vec::new();
            for form in [Form::Grouped, Form::Repeated] {
                let mut grads = Grads::default();
                let report = preference_step(&model, None, &pairs(), SMOOTH, 3, form, &mut grads).unwrap();
                found.push((report, grads));
            }
            let (a, b) = (&found[0], &found[1]);
            assert!((a.0.loss - b.0.loss).abs() < 1e-5 * b.0.loss);
            assert!(
                (a.0.margin - b.0.margin).abs() < 1e-4,
                "{} {}",
                a.0.margin,
                b.0.margin
            );
            assert!(a.0.rows < b.0.rows);
            for ((name, _), (a, b)) in model.params().variables().zip(a.1.sums().iter().zip(b.1.sums())) {
                let size = b.iter().map(|x| x * x).sum::<f32>().sqrt();
                let far = a
                    .iter()
                    .zip(b)
                    .map(|(a, b)| (a - b) * (a - b))
                    .sum::<f32>()
                    .sqrt();
                assert!(far <= 1e-4 * size.max(1e-6), "{arch:?} {name}: {far} of {size}");
            }
        }
    }

    /// Parts of a step add up to the step, and looking gives what the step reports.
    #[test]
    fn parts_add_up() {
        let (model, reference) = (model(Arch::Llama), model(Arch::Qwen2));
        let reference = Some(&reference as &dyn LanguageModel);
        let mut whole = Grads::default();
        let all = preference_step(&model, reference, &pairs(), SMOOTH, 3, Form::Grouped, &mut whole).unwrap();
        let (mut grads, mut sum) = (Grads::default(), PreferenceReport::default());
        for pair in &pairs() {
            let pair = std::slice::from_ref(pair);
            sum += preference_step(&model, reference, pair, SMOOTH, 3, Form::Grouped, &mut grads).unwrap();
        }
        assert!((sum.loss - all.loss).abs() < 1e-5 && (sum.margin - all.margin).abs() < 1e-4);
        assert!((grads.norm() - whole.norm()).abs() < 1e-4 * whole.norm());
        let seen = preference_report(&model, reference, &pairs(), SMOOTH, 3).unwrap();
        assert!((seen.loss - all.loss).abs() < 1e-6 && seen.accuracy == all.accuracy);
        assert!(((all.rewards[0] - all.rewards[1]) - all.margin).abs() < 1e-9);
    }

    #[test]
    fn a_preference_is_two_responses() {
        let mut grads = Grads::default();
        let three = [prompted(4, &[1, 2, 3], 1)];
        let error = preference_step(
            &model(Arch::Llama),
            None,
            &three,
            SMOOTH,
            1,
            Form::Grouped,
            &mut grads,
        );
        assert!(error.unwrap_err().to_string().contains("not 3"));
    }
}
