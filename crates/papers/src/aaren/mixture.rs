//! Mixtures of log-normals for the time to the next event (4.05).

/// Bounds of `ln(sigma)`, in units of the normalised logarithm: a component is neither a spike nor flat (sigma at most 3).
pub const LOG_SIGMA: (f64, f64) = (-5.0, 1.098_612_288_668_11);

const HALF_LN_TAU: f64 = 0.918_938_533_204_672_7;

/// A mixture over `z = (ln dt - log_mean) / log_std`.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    /// `(ln pi, mu, sigma)` of each component.
    parts: Vec<(f64, f64, f64)>,
    log_mean: f64,
    log_std: f64,
}

impl Mixture {
    /// From a head's outputs, `[3 K]`: logits of the weights, means, logarithms of the deviations.
    pub fn new(head: &[f32], log_mean: f64, log_std: f64) -> Self {
        let k = head.len() / 3;
        let (logits, rest) = head.split_at(k);
        let m = logits.iter().fold(f64::NEG_INFINITY, |m, x| m.max(f64::from(*x)));
        let lse = m + logits.iter().map(|x| (f64::from(*x) - m).exp()).sum::<f64>().ln();
        let part = |i: usize| {
            let sigma = f64::from(rest[k + i]).clamp(LOG_SIGMA.0, LOG_SIGMA.1).exp();
            (f64::from(logits[i]) - lse, f64::from(rest[i]), sigma)
        };
        Self {
            parts: (0..k).map(part).collect(),
            log_mean,
            log_std,
        }
    }

    /// `-ln p(dt)`, nats, the Jacobian of the logarithm included.
    pub fn nll(&self, dt: f64) -> f64 {
        let z = (dt.ln() - self.log_mean) / self.log_std;
        let logs: Vec<f64> = self
            .parts
            .iter()
            .map(|(pi, mu, sigma)| pi - 0.5 * ((z - mu) / sigma).powi(2) - sigma.ln() - HALF_LN_TAU)
            .collect();
        let m = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_p = m + logs.iter().map(|x| (x - m).exp()).sum::<f64>().ln();
        self.log_std.ln() + dt.ln() - log_p
    }

    /// The mean time, at most the largest number. Means of wide log-normals explode: read the median beside it.
    pub fn mean(&self) -> f64 {
        let part = |(pi, mu, sigma): &(f64, f64, f64)| {
            let (mu, sigma) = (self.log_mean + self.log_std * mu, self.log_std * sigma);
            (pi + mu + 0.5 * sigma * sigma).exp()
        };
        self.parts.iter().map(part).sum::<f64>().min(f64::MAX)
    }

    /// The time before which the next event comes with probability `p`, by bisection.
    pub fn quantile(&self, p: f64) -> f64 {
        let edge = |sign: f64| {
            let far = self.parts.iter().map(|(_, mu, sigma)| sign * mu + 9.0 * sigma);
            sign * far.fold(0.0, f64::max)
        };
        let (mut lo, mut hi) = (edge(-1.0), edge(1.0));
        for _ in 0..60 {
            let mid = 0.5 * (lo + hi);
            let mass = |(pi, mu, sigma): &(f64, f64, f64)| pi.exp() * normal_cdf((mid - mu) / sigma);
            if self.parts.iter().map(mass).sum::<f64>() < p {
                lo = mid;
            } else {
                hi = mid;
            }
        }
        let log = self.log_mean + self.log_std * 0.5 * (lo + hi);
        log.exp().min(f64::MAX)
    }
}

/// Distribution function of the standard normal, within 1.5e-7 (Abramowitz and Stegun, 7.1.26).
fn normal_cdf(x: f64) -> f64 {
    let y = x.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * y);
    let poly = t
        * (0.254_829_592
            + t * (-0.284_496_736 + t * (1.421_413_741 + t * (-1.453_152_027 + t * 1.061_405_429))));
    let half_tail = 0.5 * poly * (-y * y).exp();
    if x > 0.0 { 1.0 - half_tail } else { half_tail }
}
