//! Losses of the tasks (4.05), composed of candle's operators: they are small beside the layers.

use antefix_papers::aaren::mixture::LOG_SIGMA;
use candle_core::{D, Result, Tensor};

const HALF_LN_TAU: f64 = 0.918_938_533_204_672_7;

/// `ln softmax` over the last dimension.
fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let lse = centred.exp()?.sum_keepdim(D::Minus1)?.log()?;
    centred.broadcast_sub(&lse)
}

/// `-ln p` of the target class of each row: logits `[R, C]`, targets `[R]` (u32); `[R]`, nats.
///
/// # Errors
/// When the sizes do not fit or a target is no class.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    log_softmax(logits)?
        .gather(&targets.unsqueeze(1)?, 1)?
        .squeeze(1)?
        .neg()
}

/// `-ln p(z)` of each row under a mixture of normals, [`antefix_papers::aaren::mixture::Mixture`] without the Jacobian: head `[R, 3 K]`,
/// normalised logarithms of times `z: [R]`; `[R]`, nats.
///
/// # Errors
/// When the sizes do not fit.
pub fn mixture_nll(head: &Tensor, z: &Tensor) -> Result<Tensor> {
    let k = head.dim(1)? / 3;
    let log_pi = log_softmax(&head.narrow(1, 0, k)?)?;
    let mu = head.narrow(1, k, k)?;
    let log_sigma = head.narrow(1, 2 * k, k)?.clamp(LOG_SIGMA.0, LOG_SIGMA.1)?;
    let scaled = mu
        .neg()?
        .broadcast_add(&z.unsqueeze(1)?)?
        .mul(&log_sigma.neg()?.exp()?)?;
    let logs = ((log_pi - (scaled.sqr()? * 0.5)?)? - log_sigma)?;
    let max = logs.max_keepdim(1)?.detach();
    let sum = logs.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()?;
    (sum + max)?.squeeze(1)?.neg()? + HALF_LN_TAU
}

/// The mean of `x: [R]` over the rows whose weight is not 0: `sum w x / sum w`.
///
/// # Errors
/// When the sizes differ.
pub fn weighted_mean(x: &Tensor, weights: &[f32]) -> Result<Tensor> {
    let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
    let w = Tensor::new(weights, x.device())?.to_dtype(x.dtype())?;
    (x * w)?.sum_all()? / total.max(1e-12)
}

/// Means over the time of each sequence's own tokens: `x: [B, N, d]`, lengths; `[B, d]`.
///
/// # Errors
/// When the sizes do not fit.
pub fn masked_mean(x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let (b, n, _) = x.dims3()?;
    let weights: Vec<f32> = lengths
        .iter()
        .flat_map(|&len| (0..n).map(move |i| if i < len { 1.0 / len as f32 } else { 0.0 }))
        .collect();
    let weights = Tensor::from_vec(weights, (b, n, 1), x.device())?.to_dtype(x.dtype())?;
    x.broadcast_mul(&weights)?.sum(1)
}

/// Mean of squared differences a row: `[R, c]` twice; `[R]`.
///
/// # Errors
/// When the sizes differ.
pub fn squared_error(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    (x - target)?.sqr()?.mean(D::Minus1)
}

#[cfg(test)]
mod tests {
    use antefix_papers::aaren::mixture::Mixture;
    use candle_core::Device;

    use super::*;
    use crate::ops::tests::{check, numbers, var, weigh};

    #[test]
    fn gradients_are_slopes() {
        let z = Tensor::from_vec(numbers(5, 3), 5, &Device::Cpu).unwrap();
        check(&[var(&[5, 12], 1)], |t| {
            weigh(&mixture_nll(&t[0], &z.to_dtype(t[0].dtype())?)?)
        });
        let classes = Tensor::new(&[0u32, 3, 2, 2, 1], &Device::Cpu).unwrap();
        check(&[var(&[5, 4], 2)], |t| weigh(&cross_entropy(&t[0], &classes)?));
        check(&[var(&[2, 5, 3], 4)], |t| weigh(&masked_mean(&t[0], &[5, 2])?));
    }

    #[test]
    fn the_mixture_is_that_of_inference() {
        let head: Vec<f32> = numbers(12, 7).iter().map(|x| *x as f32).collect();
        for dt in [0.01f64, 0.7, 30.0] {
            let (mean, std) = (-0.4, 1.3);
            let want = Mixture::new(&head, mean, std).nll(dt);
            let z = ((dt.ln() - mean) / std) as f32;
            let (head, z) = (
                Tensor::new(&head[..], &Device::Cpu)
                    .unwrap()
                    .unsqueeze(0)
                    .unwrap(),
                Tensor::new(&[z], &Device::Cpu).unwrap(),
            );
            let got = mixture_nll(&head, &z).unwrap().to_vec1::<f32>().unwrap()[0];
            let got = f64::from(got) + std.ln() + dt.ln();
            assert!((got - want).abs() < 1e-4, "{got} {want}");
        }
    }
}
