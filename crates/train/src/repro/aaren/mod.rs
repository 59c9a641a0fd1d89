//! aaren: tasks with a Transformer twin of equal size, and a stream that keeps its size and its speed.

pub mod arms;
pub mod stream;

use antefix_lab::median;
use antefix_papers::aaren::{Mixer, Session};
use antefix_papers::repro::{Judgement, LabError, Outcome, Scale, Verdict, mean};
use serde_json::{Value, json};

use super::{Ground, failed};
use crate::aaren::{Plan, train};
use stream::{feed, layers, model, r_squared};

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
    for arm in arms::all(scale).map_err(failed)? {
        let mut figures = [Vec::new(), Vec::new()];
        for (slot, mixer) in figures.iter_mut().zip([Mixer::Aaren, Mixer::Attention]) {
            let config = arm.config(mixer);
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
    let streamed = streamed(events, depth, want).map_err(failed)?;
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

fn streamed(events: usize, depth: usize, want: f64) -> Result<Streamed, String> {
    /// Events around a place whose median counts.
    const AROUND: usize = 200;
    let (aaren, twin) = (model(Mixer::Aaren)?, model(Mixer::Attention)?);
    let mut sizes = Vec::new();
    let times = feed(&mut Session::new(&aaren), events, |i, session| {
        if i == 1 || i == events {
            sizes.push(session.state().bytes());
        }
    })
    .map_err(|e| e.to_string())?;
    let last = |times: &[f64]| median(&times[times.len().saturating_sub(AROUND)..]);
    Ok(Streamed {
        r2: r_squared(&times),
        constant: sizes.windows(2).all(|w| w[0] == w[1]),
        ratio: last(&layers(&twin, depth)) / last(&layers(&aaren, depth)),
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
