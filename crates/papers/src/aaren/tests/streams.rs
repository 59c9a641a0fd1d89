//! Stacks of layers: streams against whole sequences, the twin against its definition, constant memory.

use serde_json::{Value, json};

use super::{assert_close, normals, rng};
use crate::aaren::config::{Config, Mixer, Norm, Scale, Task};
use crate::aaren::file::{Tensors, write};
use crate::aaren::mixture::Mixture;
use crate::aaren::model::{LayerState, Model, Scratch};
use crate::aaren::stream::{EventError, Session};
use crate::aaren::twin::Cache;

pub(super) fn tasks() -> [Task; 4] {
    let scale = |n: usize| Scale {
        mean: vec![0.5; n],
        std: vec![2.0; n],
    };
    [
        Task::Classify {
            channels: 3,
            classes: vec!["up".into(), "down".into()],
            scale: scale(3),
        },
        Task::Forecast {
            channels: 2,
            horizon: 4,
            scale: scale(2),
        },
        Task::Events {
            marks: 3,
            components: 4,
            log_mean: -0.3,
            log_std: 1.2,
        },
        Task::Control {
            states: 3,
            actions: 1,
            scale: scale(3),
            return_scale: 10.0,
        },
    ]
}

pub(super) fn config(mixer: Mixer, norm: Norm, task: Task) -> Config {
    Config {
        mixer,
        width: 12,
        heads: 3,
        layers: 2,
        ffn: 20,
        norm,
        decay: 0.0,
        task,
    }
}

pub(super) fn tensors(config: &Config, seed: u64) -> Tensors {
    let mut rng = rng(seed);
    let list = config.tensors().into_iter();
    list.map(|(name, shape)| {
        let n: usize = shape.iter().product();
        let values = normals(&mut rng, n, 0.4);
        (name, values)
    })
    .collect()
}

pub(super) fn model(config: &Config, seed: u64) -> Model {
    Model::read(&write(config, &tensors(config, seed)).unwrap()).unwrap()
}

/// Event `i` of a stream of this task.
pub(super) fn event(task: &Task, i: usize) -> Value {
    let x = |c: usize| ((i * 7 + c * 3) as f64 * 0.37).sin();
    match task {
        Task::Classify { channels, .. } | Task::Forecast { channels, .. } => {
            json!({"x": (0..*channels).map(x).collect::<Vec<_>>()})
        }
        Task::Events { marks, .. } => json!({"dt": 0.1 + x(0).abs(), "mark": i % marks}),
        Task::Control { states, .. } => {
            json!({"state": (0..*states).map(x).collect::<Vec<_>>(), "return": 5.0 - 0.1 * i as f64})
        }
    }
}

#[test]
fn one_layer_has_the_parameters_of_the_paper_s_table() {
    let task = Task::Forecast {
        channels: 1,
        horizon: 1,
        scale: Scale {
            mean: vec![0.0],
            std: vec![1.0],
        },
    };
    let mut config = config(Mixer::Attention, Norm::Post, task);
    (config.width, config.heads, config.ffn) = (512, 8, 2048);
    let layers = |config: &Config| -> usize {
        let all = config.tensors().into_iter();
        all.filter(|(name, _)| name.starts_with("layers.0."))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    };
    assert_eq!(layers(&config), 3_152_384);
    config.mixer = Mixer::Aaren;
    assert_eq!(layers(&config), 3_152_896);
}

#[test]
fn blocks_of_any_size_give_the_outputs_of_the_whole_sequence() {
    for mixer in [Mixer::Aaren, Mixer::Attention] {
        for norm in [Norm::Pre, Norm::Post] {
            let mut config = config(mixer, norm, tasks()[1].clone());
            if mixer == Mixer::Aaren && norm == Norm::Pre {
                config.decay = 0.05;
            }
            let model = model(&config, 3);
            let x = normals(&mut rng(4), 150 * 12, 1.0);
            let run = |block: usize| {
                let (mut x, mut state, mut scratch) = (x.clone(), model.start(), Scratch::default());
                for part in x.chunks_mut(block * 12) {
                    model.forward(part, &mut state, &mut scratch);
                }
                x
            };
            let whole = run(150);
            assert!(whole.iter().all(|x| x.is_finite()));
            for block in [1, 2, 7, 64] {
                assert_close("blocks", &run(block), &whole, 1e-5);
            }
        }
    }
}

#[test]
fn the_folded_scores_are_those_of_the_query_token() {
    // One layer, one token at a time, from the definition: q = W_q q_tok + b_q, s = q (W_k h + b_k) / sqrt(D).
    let mut config = config(Mixer::Aaren, Norm::Post, tasks()[1].clone());
    config.layers = 1;
    let weights = tensors(&config, 8);
    let model = model(&config, 8);
    let (d, heads, dim) = (12, 3, 4);
    let x = normals(&mut rng(9), 20 * d, 1.0);
    let linear = |name: &str, x: &[f32]| -> Vec<f64> {
        let (w, b) = (
            &weights[&format!("layers.0.{name}.weight")],
            &weights[&format!("layers.0.{name}.bias")],
        );
        (0..b.len())
            .map(|o| {
                let row = &w[o * x.len()..][..x.len()];
                f64::from(b[o])
                    + row
                        .iter()
                        .zip(x)
                        .map(|(w, x)| f64::from(*w) * f64::from(*x))
                        .sum::<f64>()
            })
            .collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f32> {
        let (g, b) = (
            &weights[&format!("layers.0.{name}.weight")],
            &weights[&format!("layers.0.{name}.bias")],
        );
        let mean = x.iter().sum::<f64>() / d as f64;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
        (0..d)
            .map(|i| (((x[i] - mean) / (var + 1e-5).sqrt()) * f64::from(g[i]) + f64::from(b[i])) as f32)
            .collect()
    };
    let q = linear("q", &weights["layers.0.q_tok"]);
    let rows: Vec<&[f32]> = x.chunks_exact(d).collect();
    let keys: Vec<Vec<f64>> = rows.iter().map(|x| linear("k", x)).collect();
    let values: Vec<Vec<f64>> = rows.iter().map(|x| linear("v", x)).collect();
    let mut want = Vec::new();
    for k in 0..rows.len() {
        let mut z = vec![0.0f32; d];
        for h in 0..heads {
            let part = h * dim..(h + 1) * dim;
            let logit = |i: usize| part.clone().map(|c| q[c] * keys[i][c]).sum::<f64>() / (dim as f64).sqrt();
            let m = (0..=k).map(logit).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = (0..=k).map(|i| (logit(i) - m).exp()).sum();
            for c in part.clone() {
                let o: f64 = (0..=k).map(|i| (logit(i) - m).exp() / sum * values[i][c]).sum();
                z[c] = o as f32;
            }
        }
        let add =
            |x: &[f32], y: &[f64]| -> Vec<f64> { x.iter().zip(y).map(|(x, y)| f64::from(*x) + y).collect() };
        let x = norm("norm1", &add(rows[k], &linear("o", &z)));
        let middle: Vec<f32> = linear("ffn1", &x).iter().map(|x| x.max(0.0) as f32).collect();
        want.extend(norm("norm2", &add(&x, &linear("ffn2", &middle))));
    }
    let mut got = x.clone();
    model.forward(&mut got, &mut model.start(), &mut Scratch::default());
    assert_close("layer", &got, &want, 1e-5);
}

#[test]
fn the_twin_s_cache_is_causal_attention() {
    let (heads, dim, n) = (2, 6, 70); // 6: filled up to 16
    let mut rng = rng(5);
    let width = heads * dim;
    let [q, k, v] = [0, 1, 2].map(|_| normals(&mut rng, n * width, 1.0));
    let mut want = vec![0.0f32; n * width];
    for i in 0..n {
        for h in 0..heads {
            let at = |x: &[f32], t: usize, c: usize| f64::from(x[t * width + h * dim + c]);
            let logit = |t: usize| (0..dim).map(|c| at(&q, i, c) * at(&k, t, c)).sum::<f64>();
            let m = (0..=i).map(logit).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = (0..=i).map(|t| (logit(t) - m).exp()).sum();
            for c in 0..dim {
                let o: f64 = (0..=i).map(|t| (logit(t) - m).exp() / sum * at(&v, t, c)).sum();
                want[i * width + h * dim + c] = o as f32;
            }
        }
    }
    for block in [1, 33, 70] {
        let mut cache = Cache::new(heads, dim);
        let mut out = vec![f32::NAN; n * width];
        for from in (0..n).step_by(block) {
            let part = from * width..(from + block).min(n) * width;
            let cpu = antefix_kernels::cpu::Cpu::best();
            cache.attend(
                cpu,
                &q[part.clone()],
                &k[part.clone()],
                &v[part.clone()],
                &mut out[part],
            );
        }
        assert_close("twin", &out, &want, 1e-5);
    }
}

#[test]
fn the_state_of_a_stream_of_100_000_events_has_the_size_it_had_after_the_first() {
    let model = model(&config(Mixer::Aaren, Norm::Pre, tasks()[2].clone()), 1);
    let mut session = Session::new(&model);
    let line = event(&tasks()[2], 1).to_string();
    session.feed(&line).unwrap();
    let (bytes, file) = (session.state().bytes(), session.save().unwrap().len());
    for _ in 1..100_000 {
        session.feed(&line).unwrap();
    }
    assert_eq!(session.state().seen(), 100_000);
    assert_eq!(session.state().bytes(), bytes);
    assert!(session.state().layer_bytes().all(|b| b == 3 * (4 + 2) * 4));
    // The count of events in the header has more digits.
    assert!(session.save().unwrap().len().abs_diff(file) <= 8);
    let LayerState::Aaren(prefix) = &session.state().layers()[0] else {
        panic!("an Aaren layer")
    };
    assert!(prefix.output().iter().all(|x| x.is_finite()));
}

#[test]
fn a_saved_stream_goes_on_with_the_same_bits() {
    for task in tasks() {
        let model = model(&config(Mixer::Aaren, Norm::Post, task.clone()), 2);
        let mut whole = Session::new(&model);
        let said: Vec<String> = (0..30)
            .map(|i| whole.feed(&event(&task, i).to_string()).unwrap().to_string())
            .collect();
        for cut in [0, 1, 13, 29] {
            let mut first = Session::new(&model);
            for i in 0..cut {
                first.feed(&event(&task, i).to_string()).unwrap();
            }
            let saved = first.save().unwrap();
            let mut second = Session::load(&model, &saved).unwrap();
            for (i, said) in said.iter().enumerate().skip(cut) {
                assert_eq!(
                    &second.feed(&event(&task, i).to_string()).unwrap().to_string(),
                    said
                );
            }
        }
        let other = self::model(&config(Mixer::Aaren, Norm::Post, task), 3);
        let error = Session::load(&other, &whole.save().unwrap()).err().unwrap();
        assert!(
            error.to_string().starts_with("`model` in its metadata is"),
            "{error}"
        );
    }
}

#[test]
fn broken_events_are_named_and_change_nothing() {
    let [classify, _, events, control] = tasks();
    let cases = [
        (&classify, "{", "EOF while parsing"),
        (
            &classify,
            "{\"x\": [1, 2]}",
            "`x` has 2 values, this model reads 3",
        ),
        (&classify, "{\"x\": [1, 2, 1e30]}", "`x` is 1000000000000000"),
        (&classify, "{\"x\": [1, 2, 1e999]}", "number out of range"),
        (&classify, "{\"x\": [1, 2, null]}", "invalid type: null"),
        (&classify, "{\"y\": [1, 2, 3]}", "unknown field `y`"),
        (&classify, "", "EOF while parsing"),
        (
            &events,
            "{\"dt\": 0, \"mark\": 1}",
            "`dt` is 0, but must be above 0",
        ),
        (&events, "{\"dt\": -1, \"mark\": 1}", "`dt` is -1"),
        (
            &events,
            "{\"dt\": 1, \"mark\": 3}",
            "`mark` is 3, but must be 0 to 2",
        ),
        (&events, "{\"dt\": 1}", "`mark` is missing"),
        (&control, "{\"state\": [1, 2, 3]}", "missing field `return`"),
        (
            &control,
            "{\"state\": [1, 2, 3], \"return\": 1, \"action\": [1, 2]}",
            "`action` has 2 values",
        ),
    ];
    for (task, line, want) in cases {
        let model = model(&config(Mixer::Aaren, Norm::Pre, task.clone()), 1);
        let mut session = Session::new(&model);
        session.feed(&event(task, 0).to_string()).unwrap();
        let before = session.save().unwrap();
        let error = session.feed(line).unwrap_err().to_string();
        assert!(error.contains(want), "{line}: {error}");
        assert_eq!(session.save().unwrap(), before, "{line} changed the state");
    }
}

#[test]
fn weights_that_overflow_end_in_an_error_and_not_in_nan() {
    let config = config(Mixer::Aaren, Norm::Pre, tasks()[0].clone());
    let mut weights = tensors(&config, 1);
    weights.get_mut("layers.0.ffn2.weight").unwrap().fill(3e38);
    let model = Model::read(&write(&config, &weights).unwrap()).unwrap();
    let mut session = Session::new(&model);
    let before = session.save().unwrap();
    let error = session.feed("{\"x\": [1, 2, 3]}").unwrap_err();
    assert_eq!(error, EventError::Overflow);
    assert_eq!(session.save().unwrap(), before);
}

#[test]
fn predictions_are_probabilities_and_the_twin_answers_too() {
    for mixer in [Mixer::Aaren, Mixer::Attention] {
        for task in tasks() {
            let model = model(&config(mixer, Norm::Post, task.clone()), 6);
            let mut session = Session::new(&model);
            let mut said = Value::Null;
            for i in 0..5 {
                said = session.feed(&event(&task, i).to_string()).unwrap();
            }
            assert_eq!(said["n"], 5);
            let sum = |v: &Value| {
                v.as_array()
                    .unwrap()
                    .iter()
                    .map(|x| x.as_f64().unwrap())
                    .sum::<f64>()
            };
            match task {
                Task::Classify { .. } => assert!((sum(&said["probabilities"]) - 1.0).abs() < 1e-5),
                Task::Forecast { .. } => assert_eq!(said["next"].as_array().unwrap().len(), 4),
                Task::Events { .. } => {
                    assert!((sum(&said["marks"]) - 1.0).abs() < 1e-5);
                    assert!(said["median"].as_f64().unwrap() > 0.0 && said["nll"].is_number());
                }
                Task::Control { .. } => assert!(said["action"][0].as_f64().unwrap().abs() <= 1.0),
            }
            assert_eq!(session.save().is_err(), mixer == Mixer::Attention);
        }
    }
}

#[test]
fn the_density_of_a_mixture_integrates_to_its_distribution() {
    let head = [0.3, -1.0, 0.8, -0.5, 1.5, 0.2, 0.1, -1.0, 0.4];
    let mixture = Mixture::new(&head, -0.4, 1.3);
    let median = mixture.quantile(0.5);
    let (mut mass, mut below, mut mean) = (0.0, 0.0, 0.0);
    let step = 1e-3; // in ln dt
    for i in -20_000..14_000 {
        let dt = (f64::from(i) * step).exp();
        let weight = (-mixture.nll(dt)).exp() * dt * step;
        mass += weight;
        mean += weight * dt;
        if dt < median {
            below += weight;
        }
    }
    assert!((mass - 1.0).abs() < 1e-4, "{mass}");
    assert!((below - 0.5).abs() < 1e-3, "{below}");
    assert!(
        (mean / mixture.mean() - 1.0).abs() < 1e-2,
        "{mean} {}",
        mixture.mean()
    );
}
