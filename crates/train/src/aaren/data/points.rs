//! Point processes whose likelihood is known: the truth that a model's NLL is held against.

/// A sequence of events and what the process itself thinks of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Points {
    /// Times since the event before, the first since 0.
    pub dt: Vec<f64>,
    /// `-ln p(dt_i | all before)` under the process, nats.
    pub nll: Vec<f64>,
}

/// An inhomogeneous Poisson process with rate `base (1 + swing sin(2 pi t / period))`.
#[derive(Debug, Clone, Copy)]
pub struct SinProcess {
    /// Mean rate, events a unit of time.
    pub base: f64,
    /// 0 to 1.
    pub swing: f64,
    /// Units of time.
    pub period: f64,
}

impl SinProcess {
    fn rate(&self, t: f64) -> f64 {
        self.base * (1.0 + self.swing * (std::f64::consts::TAU * t / self.period).sin())
    }

    /// Integral of the rate from 0 to `t`.
    fn mass(&self, t: f64) -> f64 {
        let w = std::f64::consts::TAU / self.period;
        self.base * (t + self.swing * (1.0 - (w * t).cos()) / w)
    }

    /// `n` events from time 0 on, by thinning.
    pub fn sample(&self, n: usize, rng: &mut fastrand::Rng) -> Points {
        let most = self.base * (1.0 + self.swing);
        let (mut t, mut last) = (0.0, 0.0);
        let mut points = Points {
            dt: Vec::with_capacity(n),
            nll: Vec::with_capacity(n),
        };
        while points.dt.len() < n {
            t += exponential(rng) / most;
            if rng.f64() * most < self.rate(t) {
                points.dt.push(t - last);
                points
                    .nll
                    .push(self.mass(t) - self.mass(last) - self.rate(t).ln());
                last = t;
            }
        }
        points
    }
}

/// A self-exciting process: `base` and, after each event, `jump e^(-fade age)` more.
#[derive(Debug, Clone, Copy)]
pub struct Hawkes {
    /// Rate without events.
    pub base: f64,
    /// Rate that an event adds.
    pub jump: f64,
    /// Speed at which it fades; above `jump`, or events never end.
    pub fade: f64,
}

impl Hawkes {
    /// `n` events from time 0 on, by thinning (Ogata).
    pub fn sample(&self, n: usize, rng: &mut fastrand::Rng) -> Points {
        let mut points = Points {
            dt: Vec::with_capacity(n),
            nll: Vec::with_capacity(n),
        };
        // The excitement right behind the last event.
        let mut excited = 0.0;
        while points.dt.len() < n {
            let mut dt = 0.0;
            loop {
                let most = self.base + excited * (-self.fade * dt).exp();
                dt += exponential(rng) / most;
                if rng.f64() * most < self.base + excited * (-self.fade * dt).exp() {
                    break;
                }
            }
            let left = excited * (-self.fade * dt).exp();
            let mass = self.base * dt + (excited - left) / self.fade;
            points.dt.push(dt);
            points.nll.push(mass - (self.base + left).ln());
            excited = left + self.jump;
        }
        points
    }
}

fn exponential(rng: &mut fastrand::Rng) -> f64 {
    -(1.0 - rng.f64()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Under its own process, the compensated times `mass(dt)` are exponential of mean 1.
    fn assert_exponential(masses: &[f64]) {
        let n = masses.len() as f64;
        let mean = masses.iter().sum::<f64>() / n;
        let square = masses.iter().map(|m| m * m).sum::<f64>() / n;
        assert!((mean - 1.0).abs() < 0.03, "mean {mean}");
        assert!((square - 2.0).abs() < 0.15, "second moment {square}");
    }

    #[test]
    fn thinned_sin_events_follow_their_rate() {
        let process = SinProcess {
            base: 1.0,
            swing: 0.9,
            period: 10.0,
        };
        let points = process.sample(20_000, &mut fastrand::Rng::with_seed(1));
        let (mut t, mut masses) = (0.0, Vec::new());
        for (dt, nll) in points.dt.iter().zip(&points.nll) {
            masses.push(process.mass(t + dt) - process.mass(t));
            t += dt;
            assert!((nll - (masses[masses.len() - 1] - process.rate(t).ln())).abs() < 1e-6);
        }
        assert_exponential(&masses);
    }

    #[test]
    fn hawkes_events_follow_their_rate() {
        let process = Hawkes {
            base: 0.3,
            jump: 0.8,
            fade: 1.2,
        };
        let points = process.sample(20_000, &mut fastrand::Rng::with_seed(2));
        let mut t = 0.0;
        let mut times: Vec<f64> = Vec::new();
        let mut masses = Vec::new();
        for (i, (dt, nll)) in points.dt.iter().zip(&points.nll).enumerate() {
            let now = t + dt;
            // From the definition, over the last events (older ones have faded).
            let recent = &times[i.saturating_sub(200)..];
            let rate = process.base
                + recent
                    .iter()
                    .map(|s| process.jump * (-process.fade * (now - s)).exp())
                    .sum::<f64>();
            let mass = process.base * dt
                + recent
                    .iter()
                    .map(|s| {
                        let fade = |t: f64| (-process.fade * (t - s)).exp();
                        process.jump / process.fade * (fade(t) - fade(now))
                    })
                    .sum::<f64>();
            assert!((nll - (mass - rate.ln())).abs() < 1e-6, "event {i}");
            masses.push(mass);
            t = now;
            times.push(now);
        }
        assert_exponential(&masses);
    }
}
