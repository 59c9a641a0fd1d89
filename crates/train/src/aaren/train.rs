//! One run: epochs of shuffled batches, a learning rate that warms up and falls, the weights that were best on validation data.

use std::time::Instant;

use antefix_papers::aaren::{Config, Task};
use candle_core::{DType, Result, Tensor};

use super::net::Net;
use crate::TrainError;
use crate::optim::{AdamW, Grads, RawAdamW};
use crate::random::Stream;

/// What is learned: data with a loss and figures.
pub trait Problem {
    /// Inputs and outputs, and what they are normalised by.
    fn task(&self) -> Task;

    /// Items of the training data.
    fn items(&self) -> usize;

    /// The mean loss over some items.
    ///
    /// # Errors
    /// When the network is of another task.
    fn loss(&self, net: &Net, items: &[usize], rng: &mut fastrand::Rng) -> Result<Tensor>;

    /// A figure of the validation data that should be small.
    ///
    /// # Errors
    /// When the network is of another task.
    fn validate(&self, net: &Net) -> Result<f64>;

    /// Figures of the test data, by name.
    ///
    /// # Errors
    /// When the network is of another task.
    fn test(&self, net: &Net) -> Result<Vec<(String, f64)>>;
}

/// How it is learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Most passes over the data.
    pub epochs: usize,
    /// Items of a step.
    pub batch: usize,
    /// The highest learning rate.
    pub lr: f64,
    /// Weight decay of matrices.
    pub decay: f64,
    /// Passes without a better validation figure before the run ends.
    pub patience: usize,
    /// Decides initial values, order and dropout.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// The network with its best weights.
    pub net: Net,
    /// Its figures on the test data.
    pub figures: Vec<(String, f64)>,
    /// Its validation figure.
    pub best: f64,
    /// Passes that were made.
    pub epochs: usize,
    /// Steps that were made.
    pub steps: usize,
    /// The loss of each pass.
    pub losses: Vec<f64>,
    /// Seconds of training, validation included.
    pub seconds: f64,
}

/// Gradients are cut to this norm.
const CLIP: f64 = 1.0;
/// Share of the steps in which the rate rises.
const WARM_UP: f64 = 0.05;
/// Share of the highest rate at the end.
const FLOOR: f64 = 0.05;

/// Trains a fresh network. The figures are those of the weights that were best on the validation data, so the test data decide nothing.
///
/// # Errors
/// When the configuration is of another task, the plan is empty, or the run diverges.
pub fn train(problem: &dyn Problem, config: &Config, plan: Plan) -> std::result::Result<Report, TrainError> {
    if plan.epochs == 0 || plan.batch == 0 || problem.items() == 0 {
        return Err(TrainError::Recipe(format!(
            "nothing to train: {plan:?}, {} items",
            problem.items()
        )));
    }
    if config.task != problem.task() {
        return Err(TrainError::Recipe(
            "the configuration is of another task than the data".into(),
        ));
    }
    let start = Instant::now();
    let net = Net::new(config, plan.seed, DType::F32)?;
    let settings = RawAdamW {
        lr: plan.lr,
        betas: [0.9, 0.999],
        decay: plan.decay,
        clip: CLIP,
        ..RawAdamW::default()
    };
    let mut adam = AdamW::new(settings, net.params())?;
    let total = (plan.epochs * problem.items().div_ceil(plan.batch)) as f64;
    let (mut best, mut best_at, mut kept) = (f64::INFINITY, 0, net.tensors()?);
    let (mut losses, mut steps) = (Vec::new(), 0usize);
    for epoch in 0..plan.epochs {
        let mut rng = fastrand::Rng::with_seed(Stream::at(plan.seed, "epoch", epoch as u64).bits());
        let mut order: Vec<usize> = (0..problem.items()).collect();
        rng.shuffle(&mut order);
        let mut sum = 0.0;
        for items in order.chunks(plan.batch) {
            let loss = problem.loss(&net, items, &mut rng)?;
            let at = steps as f64 / total;
            let rate = match at < WARM_UP {
                true => (at + 1.0 / total) / WARM_UP,
                false => {
                    let way = (at - WARM_UP) / (1.0 - WARM_UP);
                    FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + (std::f64::consts::PI * way).cos())
                }
            };
            let value = f64::from(loss.to_scalar::<f32>()?);
            if !value.is_finite() {
                return Err(TrainError::Diverged {
                    step: steps as u64,
                    loss: value,
                });
            }
            let mut grads = Grads::default();
            grads.add(net.params(), &loss)?;
            adam.step(net.params(), &grads, rate.min(1.0))?;
            sum += value * items.len() as f64;
            steps += 1;
        }
        losses.push(sum / problem.items() as f64);
        let found = problem.validate(&net)?;
        if found < best {
            (best, best_at, kept) = (found, epoch, net.tensors()?);
        } else if epoch - best_at >= plan.patience {
            break;
        }
    }
    net.restore(&kept)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Report {
        figures: problem.test(&net)?,
        net,
        best,
        epochs: losses.len(),
        steps,
        losses,
        seconds,
    })
}
