//! The tasks that need no file: events of two processes, forecasting, control of a pendulum.

use antefix_papers::aaren::{Config, Mixer, Norm};
use antefix_papers::repro::Scale;

use crate::aaren::data::{Hawkes, Points, Quality, SinProcess, multi_sine};
use crate::aaren::tasks::{Control, Events, Forecast};
use crate::aaren::{Plan, Problem};

/// A task, and how it is trained.
pub struct Arm {
    /// Its name.
    pub name: String,
    /// The task.
    pub problem: Box<dyn Problem>,
    /// Width, heads, layers, feed-forward.
    pub size: [usize; 4],
    /// How long and how fast.
    pub plan: Plan,
    /// The figure of the report that counts, and whether a larger one is better.
    pub figure: (&'static str, bool),
}

impl Arm {
    /// A network for it, ours or the twin.
    pub fn config(&self, mixer: Mixer) -> Config {
        let [width, heads, layers, ffn] = self.size;
        Config {
            mixer,
            width,
            heads,
            layers,
            ffn,
            norm: Norm::Pre,
            decay: 0.0,
            task: self.problem.task(),
        }
    }
}

fn plan(epochs: usize, patience: usize) -> Plan {
    Plan {
        epochs,
        batch: 32,
        lr: 1e-3,
        decay: 1e-2,
        patience,
        seed: 0,
    }
}

fn sequences(
    n: [usize; 3],
    seed: u64,
    mut one: impl FnMut(usize, &mut fastrand::Rng) -> Points,
) -> [Vec<Points>; 3] {
    let mut rng = fastrand::Rng::with_seed(seed);
    n.map(|n| (0..n).map(|_| one(64, &mut rng)).collect())
}

/// Events of a process whose rate swings, and of one that excites itself.
///
/// # Errors
/// Never with these sizes.
pub fn events(scale: Scale) -> Result<[Arm; 2], String> {
    let split = scale.pick([128, 64, 64], [512, 128, 256]);
    let (epochs, patience) = scale.pick((5, 5), (40, 10));
    let sin = SinProcess {
        base: 1.0,
        swing: 0.9,
        period: 10.0,
    };
    let hawkes = Hawkes {
        base: 0.3,
        jump: 0.8,
        fade: 1.2,
    };
    let arm = |name: &str, [train, validation, test]: [Vec<Points>; 3]| -> Result<Arm, String> {
        Ok(Arm {
            name: name.into(),
            problem: Box::new(Events::new(train, validation, test, 16)?),
            size: [64, 4, 2, 128],
            plan: plan(epochs, patience),
            figure: ("nll", false),
        })
    };
    Ok([
        arm("sin", sequences(split, 11, |n, rng| sin.sample(n, rng)))?,
        arm("hawkes", sequences(split, 12, |n, rng| hawkes.sample(n, rng)))?,
    ])
}

/// Three sines and noise: 24 values behind 96.
///
/// # Errors
/// Never with these sizes.
pub fn forecast(scale: Scale) -> Result<Arm, String> {
    let series = multi_sine(
        scale.pick(1500, 4000),
        &[24.0, 37.0, 168.0],
        0.3,
        &mut fastrand::Rng::with_seed(13),
    );
    Ok(Arm {
        name: "multi_sine".into(),
        problem: Box::new(Forecast::new(&series, 96, 24)?),
        size: [64, 8, 2, 128],
        plan: plan(scale.pick(1, 24), 8),
        figure: ("mse", false),
    })
}

/// A pendulum, from episodes of this quality.
///
/// # Errors
/// Never with these sizes.
pub fn control(quality: Quality, scale: Scale) -> Result<Arm, String> {
    let (episodes, starts) = scale.pick((40, 10), (400, 100));
    let mut rng = fastrand::Rng::with_seed(14);
    Ok(Arm {
        name: format!("pendulum_{}", quality.name()),
        problem: Box::new(Control::new(quality, episodes, starts, &mut rng)?),
        size: [64, 4, 2, 128],
        plan: plan(scale.pick(3, 40), 40),
        figure: ("score", true),
    })
}

/// One of each kind, and both processes.
///
/// # Errors
/// Never with these sizes.
pub fn all(scale: Scale) -> Result<Vec<Arm>, String> {
    let [sin, hawkes] = events(scale)?;
    Ok(vec![
        sin,
        hawkes,
        forecast(scale)?,
        control(Quality::Medium, scale)?,
    ])
}
