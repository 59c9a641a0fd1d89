//! aaren: tasks with a Transformer twin of equal size, and a stream that keeps its size and its speed.

use std::time::Instant;

use antefix_papers::aaren::{Config, LayerState, Mixer, Model, Norm, Scratch, Session, Task};
use antefix_papers::repro::{Judgement, LabError, Outcome, Scale, Verdict, mean};
use candle_core::DType;
use serde_json::{Value, json};

use super::{Ground, failed, median};
use crate::aaren::data::{Hawkes, Points, Quality, SinProcess, multi_sine};
use crate::aaren::tasks::{Control, Events, Forecast};
use crate::aaren::{Net, Plan, Problem, train};

/// A task, and what is asked of it.
struct Arm {
    name: &'static str,
    problem: Box<dyn Problem>,
    /// Width, heads, layers, feed-forward.
    size: [usize; 4],
    plan: Plan,
    /// The figure of the report, and whether a larger one is better.
    figure: (&'static str, bool),
}

fn sequences(
    n: [usize; 3],
    seed: u64,
    mut one: impl FnMut(usize, &mut fastrand::Rng) -> Points,
) -> [Vec<Points>; 3] {
    let mut rng = fastrand::Rng::with_seed(seed);
    n.map(|n| (0..n).map(|_| one(64, &mut rng)).collect())
}

/// The tasks that need no file: two of events, one of forecasting, one of control.
fn arms(scale: Scale) -> Result<Vec<Arm>, String> {
    let plan = |epochs: usize, patience: usize| Plan {
        epochs,
        batch: 32,
        lr: 1e-3,
        decay: 1e-2,
        patience,
        seed: 0,
    };
    let split = scale.pick([128, 64, 64], [512, 128, 256]);
    let epochs = scale.pick((5, 5), (40, 10));
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
    let mut arms = Vec::new();
    for (name, [train, validation, test]) in [
        ("sin", sequences(split, 11, |n, rng| sin.sample(n, rng))),
        ("hawkes", sequences(split, 12, |n, rng| hawkes.sample(n, rng))),
    ] {
        arms.push(Arm {
            name,
            problem: Box::new(Events::new(train, validation, test, 16)?),
            size: [64, 4, 2, 128],
            plan: plan(epochs.0, epochs.1),
            figure: ("nll", false),
        });
    }
    let series = multi_sine(
        scale.pick(1500, 4000),
        &[24.0, 37.0, 168.0],
        0.3,
        &mut fastrand::Rng::with_seed(13),
    );
    arms.push(Arm {
        name: "multi_sine",
        problem: Box::new(Forecast::new(&series, 96, 24)?),
        size: [64, 8, 2, 128],
        plan: plan(scale.pick(1, 8), 4),
        figure: ("mse", false),
    });
    let mut rng = fastrand::Rng::with_seed(14);
    arms.push(Arm {
        name: "pendulum_medium",
        problem: Box::new(Control::new(
            Quality::Medium,
            scale.pick(40, 400),
            scale.pick(10, 100),
            &mut rng,
        )?),
        size: [64, 4, 2, 128],
        plan: plan(scale.pick(3, 40), 40),
        figure: ("score", true),
    });
    Ok(arms)
}

/// A task's figure, ours and the twin's.
#[derive(Debug, Clone, Copy)]
struct Pair {
    ours: f64,
    twin: f64,
    larger_is_better: bool,
}

impl Pair {
    /// Share by which ours is worse.
    fn worse(&self) -> f64 {
        let gap = match self.larger_is_better {
            true => self.twin - self.ours,
            false => self.ours - self.twin,
        };
        gap / self.twin.abs().max(f64::MIN_POSITIVE)
    }
}

/// What a stream came to.
#[derive(Debug, Clone, Copy)]
struct Streamed {
    /// Share of the variance of the cumulative time that a line explains.
    r2: f64,
    /// Whether the state kept its size.
    constant: bool,
    /// How many times as fast an event is as with the twin, behind as many others.
    ratio: f64,
    /// The ratio that is asked for.
    want: f64,
}

pub(super) fn run(_: &Ground<'_>, scale: Scale) -> Result<Outcome, LabError> {
    let seeds = scale.pick(1, 3);
    let mut rows: Vec<Value> = Vec::new();
    let mut tasks = Vec::new();
    for arm in arms(scale).map_err(failed)? {
        let mut figures = [Vec::new(), Vec::new()];
        for (slot, mixer) in figures.iter_mut().zip([Mixer::Aaren, Mixer::Attention]) {
            let [width, heads, layers, ffn] = arm.size;
            let config = Config {
                mixer,
                width,
                heads,
                layers,
                ffn,
                norm: Norm::Pre,
                decay: 0.0,
                task: arm.problem.task(),
            };
            for seed in 1..=seeds {
                let report = train(&*arm.problem, &config, Plan { seed, ..arm.plan }).map_err(failed)?;
                let figure = report.figures.iter().find(|f| f.0 == arm.figure.0).map(|f| f.1);
                let figure = figure.ok_or_else(|| failed(format!("{} has no {}", arm.name, arm.figure.0)))?;
                slot.push(figure);
                rows.push(json!({
                    "task": arm.name, "mixer": format!("{mixer:?}").to_lowercase(), "seed": seed, arm.figure.0: figure,
                    "parameters": config.parameters(), "epochs": report.epochs, "seconds": report.seconds,
                }));
            }
        }
        let [ours, twin] = figures.map(mean);
        tasks.push(Pair {
            ours,
            twin,
            larger_is_better: arm.figure.1,
        });
    }
    let (events, depth, want) = scale.pick((5_000, 2_048, 2.0), (100_000, 16_384, 20.0));
    let streamed = stream(events, depth, want).map_err(failed)?;
    rows.push(json!({
        "what": "stream", "events": events, "r2": streamed.r2, "constant": streamed.constant, "depth": depth, "ratio": streamed.ratio,
    }));
    let within = tasks.iter().filter(|t| t.worse() <= NEAR).count();
    Ok(Outcome {
        unit: "how many times as fast an event is as with a Transformer twin, behind as many others; beside it: what is asked",
        measured: streamed.ratio,
        baseline: want,
        scale: format!("4 tasks, {seeds} seeds, a stream of {events} events, the twin at {depth}"),
        judgement: judge(&tasks, within, &streamed),
        rows,
    })
}

/// Share by which a figure may be worse than the twin's.
const NEAR: f64 = 0.05;

fn judge(tasks: &[Pair], within: usize, s: &Streamed) -> Judgement {
    let streams = s.constant && s.r2 >= 0.99 && s.ratio >= s.want;
    let verdict = match streams {
        true if within == tasks.len() => Verdict::Reproduced,
        true if 2 * within >= tasks.len() => Verdict::Partly,
        _ => Verdict::Not,
    };
    Judgement {
        verdict,
        why: format!(
            "{within} of {} tasks within 5 % of the twin; the stream is {} with R^2 {:.4}, {:.1} times the twin ({} asked)",
            tasks.len(),
            if s.constant {
                "constant in memory"
            } else {
                "growing"
            },
            s.r2,
            s.ratio,
            s.want
        ),
    }
}

fn model(mixer: Mixer) -> Result<Model, String> {
    let config = Config {
        mixer,
        width: 64,
        heads: 4,
        layers: 2,
        ffn: 128,
        norm: Norm::Pre,
        decay: 0.0,
        task: Task::Events {
            marks: 0,
            components: 16,
            log_mean: 0.0,
            log_std: 1.0,
        },
    };
    let net = Net::new(&config, 1, DType::F32).map_err(|e| e.to_string())?;
    let bytes = net.export().map_err(|e| e.to_string())?;
    Model::read(&bytes).map_err(|e| e.to_string())
}

/// Share of the variance of cumulative time that a straight line in the number of events explains.
fn r_squared(times: &[f64]) -> f64 {
    let n = times.len() as f64;
    let mut sum = 0.0;
    let sums: Vec<f64> = times
        .iter()
        .map(|t| {
            sum += t;
            sum
        })
        .collect();
    let (mx, my) = ((n - 1.0) / 2.0, mean(sums.iter().copied()));
    let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
    for (i, y) in sums.iter().enumerate() {
        let (dx, dy) = (i as f64 - mx, y - my);
        xx += dx * dx;
        xy += dx * dy;
        yy += dy * dy;
    }
    xy * xy / (xx * yy)
}

/// Seconds of the layers alone for each of `steps` events, from the start, and the bytes of state behind the last.
fn layers(model: &Model, steps: usize) -> (Vec<f64>, usize) {
    let (mut state, mut scratch) = (model.start(), Scratch::default());
    let mut x = vec![0.1; model.config().width];
    let times = (0..steps)
        .map(|_| {
            x.fill(0.1);
            let start = Instant::now();
            model.forward(&mut x, &mut state, &mut scratch);
            start.elapsed().as_secs_f64()
        })
        .collect();
    (times, state.iter().map(LayerState::bytes).sum())
}

fn stream(events: usize, depth: usize, want: f64) -> Result<Streamed, String> {
    /// Events around a place whose median counts.
    const AROUND: usize = 200;
    let (aaren, twin) = (model(Mixer::Aaren)?, model(Mixer::Attention)?);
    let mut session = Session::new(&aaren);
    let mut rng = fastrand::Rng::with_seed(6);
    let mut times = Vec::with_capacity(events);
    let mut sizes = Vec::new();
    for i in 0..events {
        let line = json!({"dt": 0.01 - (1.0 - rng.f64()).ln()}).to_string();
        let start = Instant::now();
        session.feed(&line).map_err(|e| e.to_string())?;
        times.push(start.elapsed().as_secs_f64());
        if i == 0 || i + 1 == events {
            sizes.push(session.state().bytes());
        }
    }
    let (ours, _) = layers(&aaren, depth);
    let (theirs, _) = layers(&twin, depth);
    let last = |times: &[f64]| median(&times[times.len().saturating_sub(AROUND)..]);
    Ok(Streamed {
        r2: r_squared(&times),
        constant: sizes.windows(2).all(|w| w[0] == w[1]),
        ratio: last(&theirs) / last(&ours),
        want,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worse_has_a_direction() {
        let task = |ours, twin, larger_is_better| Pair {
            ours,
            twin,
            larger_is_better,
        };
        assert!((task(1.1, 1.0, false).worse() - 0.1).abs() < 1e-12);
        assert!((task(90.0, 100.0, true).worse() - 0.1).abs() < 1e-12);
        assert!(task(0.5, 1.0, false).worse() < 0.0);
        assert!((task(-1.0, -2.0, false).worse() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_stream_that_slows_down_is_no_line() {
        let even = vec![1.0; 100];
        let slower: Vec<f64> = (0..100).map(f64::from).collect();
        assert!(r_squared(&even) > 0.9999);
        assert!(r_squared(&slower) < 0.96);
    }

    #[test]
    fn the_stream_decides_first() {
        let good = Streamed {
            r2: 0.999,
            constant: true,
            ratio: 30.0,
            want: 20.0,
        };
        let near = Pair {
            ours: 1.0,
            twin: 1.0,
            larger_is_better: false,
        };
        let verdict = |within, s: Streamed| judge(&[near; 4], within, &s).verdict;
        assert_eq!(verdict(4, good), Verdict::Reproduced);
        assert_eq!(verdict(2, good), Verdict::Partly);
        assert_eq!(verdict(1, good), Verdict::Not);
        assert_eq!(verdict(4, Streamed { ratio: 10.0, ..good }), Verdict::Not);
        assert_eq!(
            verdict(
                4,
                Streamed {
                    constant: false,
                    ..good
                }
            ),
            Verdict::Not
        );
    }
}
