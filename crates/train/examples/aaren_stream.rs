//! A stream of 100,000 events: is the time linear, the state constant, and how far is a Transformer twin with a cache of keys?
//!
//! `cargo run --release -p antefix-train --example aaren_stream -- [--events 100000] [--depth 16384]`
//!
//! Speed does not depend on the weights, so the networks are fresh. Both run on one thread; the twin reads f32 pages with the engine's
//! attention kernel. `forward` is the layers alone, `feed` is everything from the JSON line to the prediction. One JSON object a line.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use antefix_lab::median;
use antefix_papers::aaren::{LayerState, Mixer, Scratch, Session};
use antefix_train::repro::aaren::stream::{feed, layers, model, r_squared};
use serde_json::json;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

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
    layers(&aaren, 2_000);

    // Everything, from the line to the prediction.
    let mut session = Session::new(&aaren);
    let mut bytes = Vec::new();
    let times = feed(&mut session, events, |i, session| {
        if [1, 10, 1_000, events].contains(&i) {
            bytes.push(json!({"events": i, "bytes": session.state().bytes(), "layer": session.state().layer_bytes().max()}));
        }
    })?;
    println!(
        "{}",
        json!({
            "what": "feed", "mixer": "aaren", "events": events, "seconds": times.iter().sum::<f64>(), "r2": r_squared(&times),
            "us_near_100": 1e6 * median(&times[100..100 + NEAR]), "us_at_end": 1e6 * median(&times[events - NEAR..]), "state": bytes,
            "saved_bytes": session.save()?.len(),
        })
    );
    let ours = layers(&aaren, events);
    println!(
        "{}",
        json!({
            "what": "forward", "mixer": "aaren", "events": events, "seconds": ours.iter().sum::<f64>(), "r2": r_squared(&ours),
            "us_near_100": 1e6 * median(&ours[100..100 + NEAR]), "us_at_end": 1e6 * median(&ours[events - NEAR..]),
        })
    );
    let theirs = layers(&twin, depth);
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
