//! A stream of 100,000 events: is the time linear, the state constant, and how far is a Transformer twin with a cache of keys?
//!
//! `cargo run --release -p antefix-train --example aaren_stream -- [--events 100000] [--depth 16384]`
//!
//! Speed does not depend on the weights, so the networks are fresh. Both run on one thread; the twin reads f32 pages with the engine's
//! attention kernel. `forward` is the layers alone, `feed` is everything from the JSON line to the prediction. One JSON object a line.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use std::time::Instant;

use antefix_papers::aaren::{Config, LayerState, Mixer, Model, Norm, Scratch, Session, Task};
use antefix_train::aaren::Net;
use candle_core::DType;
use serde_json::json;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn model(mixer: Mixer) -> Fallible<Model> {
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
    Ok(Model::read(&Net::new(&config, 1, DType::F32)?.export()?)?)
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Share of the variance of cumulative time that a straight line in the number of events explains.
fn r_squared(times: &[f64]) -> f64 {
    let sums: Vec<f64> = times
        .iter()
        .scan(0.0, |sum, t| {
            *sum += t;
            Some(*sum)
        })
        .collect();
    let n = sums.len() as f64;
    let (mx, my) = ((n - 1.0) / 2.0, sums.iter().sum::<f64>() / n);
    let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
    for (i, y) in sums.iter().enumerate() {
        let (dx, dy) = (i as f64 - mx, y - my);
        xx += dx * dx;
        xy += dx * dy;
        yy += dy * dy;
    }
    xy * xy / (xx * yy)
}

/// Seconds of each step of the layers alone, from the start.
fn forward(model: &Model, steps: usize) -> Vec<f64> {
    let (mut state, mut scratch) = (model.start(), Scratch::default());
    let d = model.config().width;
    let mut rng = fastrand::Rng::with_seed(5);
    let mut x = vec![0.0; d];
    (0..steps)
        .map(|_| {
            x.iter_mut().for_each(|x| *x = rng.f32() - 0.5);
            let start = Instant::now();
            model.forward(&mut x, &mut state, &mut scratch);
            start.elapsed().as_secs_f64()
        })
        .collect()
}

fn main() -> Fallible<()> {
    let (mut events, mut depth) = (100_000usize, 16_384usize);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or(format!("`{word}` needs a value"))?.parse()?;
        match word.as_str() {
            "--events" => events = value,
            "--depth" => depth = value,
            _ => return Err(format!("`{word}` is not understood").into()),
        }
    }
    const NEAR: usize = 500;
    if events < 10_000 || depth < 10 * NEAR || depth > events {
        return Err("at least 10000 events, and a depth of 5000 to that".into());
    }
    let [aaren, twin] = [model(Mixer::Aaren)?, model(Mixer::Attention)?];
    forward(&aaren, 2_000);

    // Everything, from the line to the prediction.
    let mut session = Session::new(&aaren);
    let mut rng = fastrand::Rng::with_seed(6);
    let (mut times, mut bytes) = (Vec::with_capacity(events), Vec::new());
    for i in 0..events {
        let line = json!({"dt": 0.01 - (1.0 - rng.f64()).ln()}).to_string();
        let start = Instant::now();
        session.feed(&line)?;
        times.push(start.elapsed().as_secs_f64());
        if [1, 10, 1_000, events].contains(&(i + 1)) {
            bytes.push(json!({"events": i + 1, "bytes": session.state().bytes(), "layer": session.state().layer_bytes().max()}));
        }
    }
    println!(
        "{}",
        json!({
            "what": "feed", "mixer": "aaren", "events": events, "seconds": times.iter().sum::<f64>(), "r2": r_squared(&times),
            "us_near_100": 1e6 * median(&times[100..100 + NEAR]), "us_at_end": 1e6 * median(&times[events - NEAR..]), "state": bytes,
            "saved_bytes": session.save()?.len(),
        })
    );
    let ours = forward(&aaren, events);
    println!(
        "{}",
        json!({
            "what": "forward", "mixer": "aaren", "events": events, "seconds": ours.iter().sum::<f64>(), "r2": r_squared(&ours),
            "us_near_100": 1e6 * median(&ours[100..100 + NEAR]), "us_at_end": 1e6 * median(&ours[events - NEAR..]),
        })
    );
    let theirs = forward(&twin, depth);
    let (a, b) = (
        median(&ours[depth - NEAR..depth]),
        median(&theirs[depth - NEAR..]),
    );
    println!(
        "{}",
        json!({
            "what": "forward", "mixer": "transformer", "events": depth, "seconds": theirs.iter().sum::<f64>(), "r2": r_squared(&theirs),
            "us_near_100": 1e6 * median(&theirs[100..100 + NEAR]), "us_at_depth": 1e6 * b,
        })
    );
    let mut state = twin.start();
    for block in vec![0.1; depth * 64].chunks_mut(512 * 64) {
        twin.forward(block, &mut state, &mut Scratch::default());
    }
    let held: usize = state.iter().map(LayerState::bytes).sum();
    println!(
        "{}",
        json!({
            "what": "ratio", "depth": depth, "forward": b / a, "cumulative": theirs.iter().sum::<f64>() / ours[..depth].iter().sum::<f64>(),
            "twin_state_bytes": held,
        })
    );
    Ok(())
}
