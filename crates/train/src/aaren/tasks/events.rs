//! Event forecasting: after every event the density of the time to the next one, and its mark.

use antefix_papers::aaren::Task;
use antefix_papers::aaren::config::{sinusoid, time_features};
use antefix_papers::aaren::mixture::Mixture;
use candle_core::{DType, Device, Result, Tensor};

use super::TEST_BATCH;
use crate::aaren::data::Points;
use crate::aaren::loss::{cross_entropy, mixture_nll};
use crate::aaren::net::Net;
use crate::aaren::train::Problem;

/// Sequences of equally many events of one process.
#[derive(Debug)]
pub struct Events {
    components: usize,
    marks: usize,
    log_mean: f64,
    log_std: f64,
    train: Vec<Points>,
    validation: Vec<Points>,
    test: Vec<Points>,
    /// Marks of the training sequences, where there are some.
    train_marks: Vec<Vec<u32>>,
}

impl Events {
    /// Unmarked sequences for training, validation and test, and a mixture of `components`.
    ///
    /// # Errors
    /// When there are no sequences of two events or more, or they differ in length.
    pub fn new(
        train: Vec<Points>,
        validation: Vec<Points>,
        test: Vec<Points>,
        components: usize,
    ) -> std::result::Result<Self, String> {
        let n = train.first().map_or(0, |p| p.dt.len());
        let all = || train.iter().chain(&validation).chain(&test);
        let lists = [&train, &validation, &test];
        if n < 2 || lists.iter().any(|l| l.is_empty()) || all().any(|p| p.dt.len() != n) {
            return Err("sequences must be there, of equal length, with two events or more".into());
        }
        if all().flat_map(|p| &p.dt).any(|dt| !(*dt > 0.0 && dt.is_finite())) {
            return Err("times between events must be above 0".into());
        }
        let logs: Vec<f64> = train.iter().flat_map(|p| &p.dt).map(|dt| dt.ln()).collect();
        let log_mean = logs.iter().sum::<f64>() / logs.len() as f64;
        let square = logs.iter().map(|x| (x - log_mean).powi(2)).sum::<f64>() / logs.len() as f64;
        Ok(Self {
            components,
            marks: 0,
            log_mean,
            log_std: square.sqrt().max(1e-6),
            train,
            validation,
            test,
            train_marks: Vec::new(),
        })
    }

    /// The same with marks of the training sequences, each below `marks`; figures stay those of the times.
    ///
    /// # Errors
    /// When the marks do not fit the sequences.
    pub fn with_marks(mut self, marks: usize, of: Vec<Vec<u32>>) -> std::result::Result<Self, String> {
        let fits = of.len() == self.train.len()
            && of.iter().zip(&self.train).all(|(m, p)| m.len() == p.dt.len())
            && of.iter().flatten().all(|m| (*m as usize) < marks);
        if !fits {
            return Err(format!("each training event needs a mark below {marks}"));
        }
        (self.marks, self.train_marks) = (marks, of);
        Ok(self)
    }

    /// The same under another normalisation, such as that of the data a network was trained on.
    #[must_use]
    pub fn with_scale(mut self, log_mean: f64, log_std: f64) -> Self {
        (self.log_mean, self.log_std) = (log_mean, log_std);
        self
    }

    /// Outputs after each event but the last of each sequence, `[B (N - 1), d]`.
    fn outputs(&self, net: &Net, batch: &[&Points], marks: Option<&[&Vec<u32>]>) -> Result<Tensor> {
        let (n, d) = (batch[0].dt.len() - 1, net.config().width);
        let (mut x, mut at) = (Vec::new(), vec![0.0; batch.len() * n * d]);
        for (points, at) in batch.iter().zip(at.chunks_exact_mut(n * d)) {
            let mut t = 0.0;
            for (dt, at) in points.dt.iter().zip(at.chunks_exact_mut(d)) {
                t += dt;
                x.extend(time_features(*dt, self.log_mean, self.log_std));
                sinusoid(t / self.log_mean.exp(), d, at);
            }
        }
        let x = Tensor::from_vec(x, (batch.len(), n, 2), &Device::Cpu)?;
        let at = Tensor::from_vec(at, (batch.len(), n, d), &Device::Cpu)?;
        let mut x = (net.linear("embed", &x)? + at)?;
        if let Some(marks) = marks {
            let rows = marks.iter().flat_map(|m| m[..n].to_vec()).collect();
            x = (x + net.rows("embed_mark", rows)?.reshape((batch.len(), n, d))?)?;
        }
        net.forward(&x)?.reshape((batch.len() * n, d))
    }

    /// Times to the next event of [`Events::outputs`].
    fn next<'a>(batch: &'a [&Points]) -> impl Iterator<Item = f64> + 'a {
        batch.iter().flat_map(|p| p.dt[1..].iter().copied())
    }

    fn nll(&self, net: &Net, outputs: &Tensor, batch: &[&Points]) -> Result<Tensor> {
        let z: Vec<f32> = Self::next(batch)
            .map(|dt| ((dt.ln() - self.log_mean) / self.log_std) as f32)
            .collect();
        let z = Tensor::new(&z[..], &Device::Cpu)?;
        mixture_nll(&net.linear("mixture", outputs)?, &z)
    }

    /// Mean NLL an event, the Jacobian included.
    fn score(&self, net: &Net, data: &[Points]) -> Result<f64> {
        let (mut sum, mut events) = (0.0, 0usize);
        for batch in data.chunks(TEST_BATCH) {
            let batch: Vec<&Points> = batch.iter().collect();
            let outputs = self.outputs(net, &batch, None)?;
            let nll = self.nll(net, &outputs, &batch)?.to_dtype(DType::F64)?;
            sum += nll.sum_all()?.to_scalar::<f64>()?;
            for dt in Self::next(&batch) {
                sum += dt.ln() + self.log_std.ln();
                events += 1;
            }
        }
        Ok(sum / events as f64)
    }
}

impl Problem for Events {
    fn task(&self) -> Task {
        Task::Events {
            marks: self.marks,
            components: self.components,
            log_mean: self.log_mean,
            log_std: self.log_std,
        }
    }

    fn items(&self) -> usize {
        self.train.len()
    }

    fn loss(&self, net: &Net, items: &[usize], _: &mut fastrand::Rng) -> Result<Tensor> {
        let batch: Vec<&Points> = items.iter().map(|&i| &self.train[i]).collect();
        let marks: Option<Vec<&Vec<u32>>> =
            (self.marks > 0).then(|| items.iter().map(|&i| &self.train_marks[i]).collect());
        let outputs = self.outputs(net, &batch, marks.as_deref())?;
        let mut nll = self.nll(net, &outputs, &batch)?;
        if let Some(marks) = marks {
            let next: Vec<u32> = marks.iter().flat_map(|m| m[1..].to_vec()).collect();
            let logits = net.linear("mark", &outputs)?;
            nll = (nll + cross_entropy(&logits, &Tensor::new(&next[..], &Device::Cpu)?)?)?;
        }
        nll.mean_all()
    }

    fn validate(&self, net: &Net) -> Result<f64> {
        self.score(net, &self.validation)
    }

    fn test(&self, net: &Net) -> Result<Vec<(String, f64)>> {
        let truth: Vec<f64> = self.test.iter().flat_map(|p| p.nll[1..].to_vec()).collect();
        let (mut squares, mut events) = (0.0, 0usize);
        for batch in self.test.chunks(TEST_BATCH) {
            let batch: Vec<&Points> = batch.iter().collect();
            let outputs = self.outputs(net, &batch, None)?;
            let heads = net.linear("mixture", &outputs)?.to_vec2::<f32>()?;
            for (head, dt) in heads.iter().zip(Self::next(&batch)) {
                let mean = Mixture::new(head, self.log_mean, self.log_std).mean();
                squares += (mean - dt).powi(2);
                events += 1;
            }
        }
        Ok(vec![
            ("nll".into(), self.score(net, &self.test)?),
            ("true_nll".into(), truth.iter().sum::<f64>() / truth.len() as f64),
            ("rmse".into(), (squares / events as f64).sqrt()),
        ])
    }
}
