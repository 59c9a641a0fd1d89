//! Forecasting: after every value the next `horizon` ones. Values are normalised by the training data, not by each window, so that a stream
//! is the same function as a window.

use antefix_papers::aaren::{Scale, Task};
use candle_core::{Device, Result, Tensor};

use super::{TEST_BATCH, places};
use crate::aaren::loss::squared_error;
use crate::aaren::net::Net;
use crate::aaren::train::Problem;

/// One series of one channel, cut in time: seven tenths to learn, one to validate, two to test.
#[derive(Debug)]
pub struct Forecast {
    window: usize,
    horizon: usize,
    scale: Scale,
    /// Normalised values.
    values: Vec<f32>,
    /// Ends of training and validation data.
    cuts: [usize; 2],
}

impl Forecast {
    /// Windows of `window` values, and `horizon` values to say.
    ///
    /// # Errors
    /// When a part of the series is shorter than a window and its horizon.
    pub fn new(values: &[f32], window: usize, horizon: usize) -> std::result::Result<Self, String> {
        let cuts = [values.len() * 7 / 10, values.len() * 8 / 10];
        let least = (values.len() - cuts[1]).min(cuts[1] - cuts[0]);
        if window == 0 || horizon == 0 || least < horizon || cuts[0] < window + horizon {
            return Err(format!(
                "{} values are too few for windows of {window} and {horizon} more",
                values.len()
            ));
        }
        let scale = Scale::of(&values[..cuts[0]], 1);
        Ok(Self {
            window,
            horizon,
            values: scale.apply(values),
            scale,
            cuts,
        })
    }

    /// Predictions, `[B N, horizon]`, of windows by their starts, and what came.
    fn run(&self, net: &Net, starts: &[usize]) -> Result<[Tensor; 2]> {
        let (n, h) = (self.window, self.horizon);
        let x = starts.iter().flat_map(|&s| self.values[s..s + n].to_vec());
        let x = Tensor::from_vec(x.collect::<Vec<f32>>(), (starts.len(), n, 1), &Device::Cpu)?;
        let x = net
            .linear("embed", &x)?
            .broadcast_add(&places(n, net.config().width)?)?;
        let d = net.config().width;
        let out = net.forward(&x)?.reshape((starts.len() * n, d))?;
        let next = starts
            .iter()
            .flat_map(|&s| (0..n).flat_map(move |i| self.values[s + i + 1..s + i + 1 + h].to_vec()));
        let next = Tensor::from_vec(next.collect::<Vec<f32>>(), (starts.len() * n, h), &Device::Cpu)?;
        Ok([net.linear("head", &out)?, next])
    }

    /// Mean squared and absolute error at the ends of windows whose horizons lie in a part of the series.
    fn score(&self, net: &Net, part: std::ops::Range<usize>, every: usize) -> Result<[f64; 2]> {
        let starts: Vec<usize> = (part.start..=part.end - self.horizon)
            .step_by(every)
            .map(|at| at - self.window)
            .collect();
        let mut sums = [0.0; 2];
        for batch in starts.chunks(TEST_BATCH) {
            let [said, came] = self.run(net, batch)?;
            let last = |t: Tensor| -> Result<Tensor> {
                t.reshape((batch.len(), self.window, self.horizon))?
                    .narrow(1, self.window - 1, 1)
            };
            let difference = (last(said)? - last(came)?)?;
            sums[0] += f64::from(difference.sqr()?.sum_all()?.to_scalar::<f32>()?);
            sums[1] += f64::from(difference.abs()?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(sums.map(|s| s / (starts.len() * self.horizon) as f64))
    }

    /// Mean squared error, in normalised units, of saying the last value again, on the test data.
    pub fn naive(&self) -> f64 {
        let ends = self.cuts[1]..=self.values.len() - self.horizon;
        let squares = ends.clone().map(|at| {
            let next = &self.values[at..at + self.horizon];
            let last = self.values[at - 1];
            next.iter().map(|x| f64::from(x - last).powi(2)).sum::<f64>() / self.horizon as f64
        });
        squares.sum::<f64>() / ends.count() as f64
    }
}

impl Problem for Forecast {
    fn task(&self) -> Task {
        Task::Forecast {
            channels: 1,
            horizon: self.horizon,
            scale: self.scale.clone(),
        }
    }

    fn items(&self) -> usize {
        self.cuts[0] - self.window - self.horizon + 1
    }

    fn loss(&self, net: &Net, items: &[usize], _: &mut fastrand::Rng) -> Result<Tensor> {
        let [said, came] = self.run(net, items)?;
        squared_error(&said, &came)?.mean_all()
    }

    fn validate(&self, net: &Net) -> Result<f64> {
        Ok(self.score(net, self.cuts[0]..self.cuts[1], 3)?[0])
    }

    fn test(&self, net: &Net) -> Result<Vec<(String, f64)>> {
        let [mse, mae] = self.score(net, self.cuts[1]..self.values.len(), 1)?;
        Ok(vec![
            ("mse".into(), mse),
            ("mae".into(), mae),
            ("naive_mse".into(), self.naive()),
        ])
    }
}
