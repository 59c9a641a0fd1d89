//! Streams through fresh networks: speed does not depend on the weights.

use std::time::Instant;

use antefix_papers::aaren::{Config, EventError, Mixer, Model, Norm, Scratch, Session, Task};
use antefix_papers::repro::mean;
use candle_core::DType;
use serde_json::json;

use crate::aaren::Net;

/// Width 64, 4 heads, 2 layers: a model of events without marks.
///
/// # Errors
/// Never with these sizes.
pub fn model(mixer: Mixer) -> Result<Model, String> {
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
pub fn r_squared(times: &[f64]) -> f64 {
    let sums: Vec<f64> = times
        .iter()
        .scan(0.0, |sum, t| {
            *sum += t;
            Some(*sum)
        })
        .collect();
    let n = sums.len() as f64;
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

/// Seconds of the layers alone for each of `steps` events, from the start.
pub fn layers(model: &Model, steps: usize) -> Vec<f64> {
    let (mut state, mut scratch) = (model.start(), Scratch::default());
    let mut rng = fastrand::Rng::with_seed(5);
    let mut x = vec![0.0; model.config().width];
    (0..steps)
        .map(|_| {
            x.iter_mut().for_each(|x| *x = rng.f32() - 0.5);
            let start = Instant::now();
            model.forward(&mut x, &mut state, &mut scratch);
            start.elapsed().as_secs_f64()
        })
        .collect()
}

/// Seconds of each of `events` random events, from the JSON line to the prediction. `seen` hears the number of events behind each.
///
/// # Errors
/// When the session refuses an event.
pub fn feed(
    session: &mut Session<'_>,
    events: usize,
    mut seen: impl FnMut(usize, &Session<'_>),
) -> Result<Vec<f64>, EventError> {
    let mut rng = fastrand::Rng::with_seed(6);
    let mut times = Vec::with_capacity(events);
    for i in 1..=events {
        let line = json!({"dt": 0.01 - (1.0 - rng.f64()).ln()}).to_string();
        let start = Instant::now();
        session.feed(&line)?;
        times.push(start.elapsed().as_secs_f64());
        seen(i, session);
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_slows_down_is_no_line() {
        let even = vec![1.0; 100];
        let slower: Vec<f64> = (0..100).map(f64::from).collect();
        assert!(r_squared(&even) > 0.9999);
        assert!(r_squared(&slower) < 0.96);
    }
}
