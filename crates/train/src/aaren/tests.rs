//! Networks: every variable gets a gradient, inference is training's forward, runs learn and repeat.

use antefix_papers::aaren::{Config, Mixer, Model, Norm, Scratch, Session, Task};
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use super::Net;
use super::data::{Hawkes, Quality, TsFile, multi_sine};
use super::tasks::{Classify, Control, Events, Forecast};
use super::train::{Plan, Problem, train};
use crate::TrainError;
use crate::optim::{AdamW, RawAdamW};

fn config(mixer: Mixer, norm: Norm, task: Task) -> Config {
    Config {
        mixer,
        width: 16,
        heads: 2,
        layers: 2,
        ffn: 24,
        norm,
        decay: 0.0,
        task,
    }
}

fn classes() -> Classify {
    let mut text = "@classLabel true rise fall\n@data\n".to_owned();
    let mut rng = fastrand::Rng::with_seed(1);
    for i in 0..60 {
        let n = rng.usize(5..12);
        let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
        let column: Vec<String> = (0..n)
            .map(|t| format!("{:.3}", sign * t as f64 + rng.f64()))
            .collect();
        text += &format!("{0}:{0}:{1}\n", column.join(","), ["rise", "fall"][i % 2]);
    }
    let file = TsFile::parse(&text).unwrap();
    Classify::new(file.clone(), file).unwrap()
}

fn events(marked: bool) -> Events {
    let process = Hawkes {
        base: 0.3,
        jump: 0.8,
        fade: 1.2,
    };
    let mut rng = fastrand::Rng::with_seed(2);
    let mut some = |n: usize| (0..n).map(|_| process.sample(12, &mut rng)).collect();
    let events = Events::new(some(8), some(4), some(4), 3).unwrap();
    match marked {
        true => events
            .with_marks(4, vec![(0..12).map(|i| i % 4).collect(); 8])
            .unwrap(),
        false => events,
    }
}

fn problems() -> Vec<Box<dyn Problem>> {
    let mut rng = fastrand::Rng::with_seed(3);
    let series = multi_sine(300, &[12.0], 0.1, &mut rng);
    vec![
        Box::new(classes()),
        Box::new(Forecast::new(&series, 20, 5).unwrap()),
        Box::new(events(true)),
        Box::new(events(false)),
        Box::new(Control::new(Quality::Medium, 20, 2, &mut rng).unwrap()),
    ]
}

#[test]
fn every_variable_of_every_model_gets_a_gradient() {
    for problem in problems() {
        for mixer in [Mixer::Aaren, Mixer::Attention] {
            for norm in [Norm::Pre, Norm::Post] {
                let net = Net::new(&config(mixer, norm, problem.task()), 1, DType::F32).unwrap();
                let items: Vec<usize> = (0..8).collect();
                let loss = problem
                    .loss(&net, &items, &mut fastrand::Rng::with_seed(1))
                    .unwrap();
                let grads = loss.backward().unwrap();
                for (name, var) in net.params().variables() {
                    let grad = grads
                        .get(var)
                        .unwrap_or_else(|| panic!("`{name}` gets no gradient"));
                    let grad = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let size = grad.iter().fold(0.0f32, |a, g| a.max(g.abs()));
                    assert!(size.is_finite());
                    // One number added to all scores changes no softmax: the gradient of key biases is zero but for rounding.
                    match name.ends_with(".k.bias") {
                        true => assert!(size < 1e-4, "`{name}`: {size}"),
                        false => assert!(size > 1e-9, "`{name}` of {mixer:?}, {norm:?}: {size}"),
                    }
                }
            }
        }
    }
}

#[test]
fn gradients_of_a_whole_network_are_slopes() {
    let problem = Forecast::new(
        &multi_sine(100, &[9.0], 0.1, &mut fastrand::Rng::with_seed(4)),
        6,
        2,
    )
    .unwrap();
    for (mixer, norm) in [
        (Mixer::Aaren, Norm::Pre),
        (Mixer::Aaren, Norm::Post),
        (Mixer::Attention, Norm::Pre),
    ] {
        let net = Net::new(&config(mixer, norm, problem.task()), 2, DType::F64).unwrap();
        let x = Tensor::from_vec(
            crate::ops::tests::numbers(2 * 5 * 16, 8),
            (2, 5, 16),
            &Device::Cpu,
        )
        .unwrap();
        let loss = |net: &Net| crate::ops::tests::weigh(&net.forward(&x).unwrap()).unwrap();
        let grads = loss(&net).backward().unwrap();
        for (name, var) in net
            .params()
            .variables()
            .filter(|(n, _)| n.starts_with("layers.0"))
        {
            let grad = grads
                .get(var)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap();
            let at = var.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for i in [0, at.len() / 2, at.len() - 1] {
                let value = |h: f64| {
                    let mut moved = at.clone();
                    moved[i] += h;
                    let moved = Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap();
                    var.set(&moved).unwrap();
                    loss(&net).to_scalar::<f64>().unwrap()
                };
                let slope = (value(1e-5) - value(-1e-5)) / 2e-5;
                value(0.0);
                let tol = 1e-6 * slope.abs().max(1.0);
                assert!(
                    (slope - grad[i]).abs() < tol,
                    "`{name}` {i}: {} for {slope}",
                    grad[i]
                );
            }
        }
    }
}

#[test]
fn inference_is_the_forward_of_training() {
    for mixer in [Mixer::Aaren, Mixer::Attention] {
        for norm in [Norm::Pre, Norm::Post] {
            let mut config = config(mixer, norm, classes().task());
            if mixer == Mixer::Aaren {
                config.decay = 0.02;
            }
            let net = Net::new(&config, 5, DType::F32).unwrap();
            let n = 40;
            let x: Vec<f32> = crate::ops::tests::numbers(n * 16, 3)
                .iter()
                .map(|x| *x as f32)
                .collect();
            let want = net
                .forward(&Tensor::from_slice(&x, (1, n, 16), &Device::Cpu).unwrap())
                .unwrap();
            let want = want.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let model = Model::read(&net.export().unwrap()).unwrap();
            let (mut got, mut state) = (x, model.start());
            for token in got.chunks_exact_mut(16) {
                model.forward(token, &mut state, &mut Scratch::default());
            }
            for (a, b) in got.iter().zip(&want) {
                assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a} against {b}");
            }
        }
    }
}

#[test]
fn a_stream_scores_events_as_the_loss_does() {
    let problem = events(false);
    let net = Net::new(&config(Mixer::Aaren, Norm::Pre, problem.task()), 6, DType::F32).unwrap();
    let model = Model::read(&net.export().unwrap()).unwrap();
    let points = Hawkes {
        base: 0.3,
        jump: 0.8,
        fade: 1.2,
    }
    .sample(12, &mut fastrand::Rng::with_seed(7));
    let mut session = Session::new(&model);
    let said: Vec<f64> = points
        .dt
        .iter()
        .filter_map(|dt| session.feed(&json!({"dt": dt}).to_string()).unwrap()["nll"].as_f64())
        .collect();
    assert_eq!(said.len(), 11);
    let alone = Events::new(vec![points.clone()], vec![points.clone()], vec![points], 3).unwrap();
    // The same normalisation, so the same network.
    let Task::Events {
        log_mean, log_std, ..
    } = problem.task()
    else {
        unreachable!()
    };
    let nll = alone.with_scale(log_mean, log_std).validate(&net).unwrap();
    let mean = said.iter().sum::<f64>() / 11.0;
    assert!((mean - nll).abs() < 1e-4, "{mean} against {nll}");
}

#[test]
fn weight_decay_spares_q_tok_norms_and_biases() {
    let net = Net::new(
        &config(Mixer::Aaren, Norm::Pre, events(true).task()),
        1,
        DType::F32,
    )
    .unwrap();
    let adam = AdamW::new(RawAdamW::default(), net.params()).unwrap();
    for ((name, _), rule) in net.params().variables().zip(adam.rules()) {
        let matrix = name.ends_with(".weight") && !name.contains("norm");
        assert_eq!(rule.decay > 0.0, matrix, "{name}");
    }
}

#[test]
fn twins_start_from_the_same_values() {
    let of = |mixer| {
        Net::new(&config(mixer, Norm::Pre, classes().task()), 9, DType::F32)
            .unwrap()
            .tensors()
            .unwrap()
    };
    let (aaren, twin) = (of(Mixer::Aaren), of(Mixer::Attention));
    assert_eq!(aaren.len(), twin.len() + 2);
    assert!(twin.iter().all(|(name, values)| aaren[name] == *values));
}

#[test]
fn a_run_learns_and_repeats_bit_for_bit() {
    let problem = classes();
    let plan = Plan {
        epochs: 12,
        batch: 12,
        lr: 3e-3,
        decay: 1e-2,
        patience: 12,
        seed: 3,
    };
    for mixer in [Mixer::Aaren, Mixer::Attention] {
        let config = config(mixer, Norm::Pre, problem.task());
        let report = train(&problem, &config, plan).unwrap();
        assert!(report.figures[0].1 > 0.95, "{mixer:?}: {:?}", report.figures);
        assert!(report.losses[report.losses.len() - 1] < 0.3 * report.losses[0]);
        let again = train(&problem, &config, plan).unwrap();
        assert_eq!(again.net.tensors().unwrap(), report.net.tensors().unwrap());
    }
}

/// A problem whose loss is no number from the third step on.
struct Diverging(Classify, std::cell::Cell<usize>);

impl Problem for Diverging {
    fn task(&self) -> Task {
        self.0.task()
    }
    fn items(&self) -> usize {
        self.0.items()
    }
    fn loss(&self, net: &Net, items: &[usize], rng: &mut fastrand::Rng) -> candle_core::Result<Tensor> {
        self.1.set(self.1.get() + 1);
        let factor = if self.1.get() > 2 { f64::NAN } else { 1.0 };
        self.0.loss(net, items, rng)? * factor
    }
    fn validate(&self, net: &Net) -> candle_core::Result<f64> {
        self.0.validate(net)
    }
    fn test(&self, net: &Net) -> candle_core::Result<Vec<(String, f64)>> {
        self.0.test(net)
    }
}

#[test]
fn runs_that_diverge_or_have_nothing_to_do_end_in_an_error() {
    let problem = Diverging(classes(), std::cell::Cell::new(0));
    let config = config(Mixer::Aaren, Norm::Pre, problem.task());
    let plan = Plan {
        epochs: 2,
        batch: 8,
        lr: 1e-3,
        decay: 0.0,
        patience: 1,
        seed: 1,
    };
    let error = train(&problem, &config, plan).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 2, .. }), "{error}");
    let error = train(&problem, &config, Plan { batch: 0, ..plan }).unwrap_err();
    assert!(error.to_string().starts_with("nothing to train"), "{error}");
    let error = train(&events(false), &config, plan).unwrap_err();
    assert!(error.to_string().contains("another task"), "{error}");
}
