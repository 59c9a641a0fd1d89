//! Control: an action from the return that is asked for and what was seen, by imitation of recorded episodes.

use std::cell::RefCell;

use antefix_papers::aaren::{Model, Scale, Session, Task};
use candle_core::{Device, Result, Tensor};
use serde_json::json;

use super::places;
use crate::aaren::data::{Episode, Pendulum, Quality, expert, random_action};
use crate::aaren::loss::{squared_error, weighted_mean};
use crate::aaren::net::Net;
use crate::aaren::train::Problem;

/// Steps of a training window; half of the batches have whole episodes, so that a stream need not begin again.
const CONTEXT: usize = 20;

/// Recorded episodes of the pendulum.
#[derive(Debug)]
pub struct Control {
    scale: Scale,
    return_scale: f64,
    train: Vec<Episode>,
    validation: Vec<Episode>,
    /// The return that is asked for in tests: the mean of the best tenth of the training episodes.
    pub target: f64,
    /// Mean returns of a random actor and of the expert, on the start states of the test.
    pub anchors: [f64; 2],
    /// Episodes of a test.
    pub rollouts: usize,
}

impl Control {
    /// `n` episodes of one quality, a tenth of them for validation.
    ///
    /// # Errors
    /// When there are too few.
    pub fn new(
        quality: Quality,
        n: usize,
        rollouts: usize,
        rng: &mut fastrand::Rng,
    ) -> std::result::Result<Self, String> {
        if n < 20 || rollouts == 0 {
            return Err(format!(
                "{n} episodes and {rollouts} rollouts: 20 and 1 are the least"
            ));
        }
        let mut train = quality.episodes(n, rng);
        rng.shuffle(&mut train);
        let validation = train.split_off(n - n / 10);
        let states: Vec<f32> = train.iter().flat_map(|e| e.states.clone()).collect();
        let mut scores: Vec<f64> = train.iter().map(Episode::score).collect();
        scores.sort_by(|a, b| b.total_cmp(a));
        let best = &scores[..scores.len().div_ceil(10)];
        let mut control = Self {
            scale: Scale::of(&states, Pendulum::STATES),
            return_scale: scores.iter().map(|s| s.abs()).sum::<f64>() / scores.len() as f64,
            target: best.iter().sum::<f64>() / best.len() as f64,
            train,
            validation,
            anchors: [0.0; 2],
            rollouts,
        };
        control.anchors = [
            control.mean_score(|_| |_: &Pendulum, rng: &mut fastrand::Rng, _: f64| random_action(rng)),
            control.mean_score(|_| |p: &Pendulum, _: &mut fastrand::Rng, _: f64| expert(p)),
        ];
        Ok(control)
    }

    /// Mean return of actors over the test's start states; an actor is told the return still asked for.
    fn mean_score<A: FnMut(&Pendulum, &mut fastrand::Rng, f64) -> f64>(
        &self,
        mut actor: impl FnMut(usize) -> A,
    ) -> f64 {
        let mut sum = 0.0;
        for i in 0..self.rollouts {
            // Start states are the test's alone, the same for every actor.
            let mut rng = fastrand::Rng::with_seed(1_000_000 + i as u64);
            let mut act = actor(i);
            let mut p = Pendulum::start(&mut rng);
            let mut to_go = self.target;
            for _ in 0..Pendulum::STEPS {
                let action = act(&p, &mut rng, to_go);
                let reward = p.step(action);
                to_go -= reward;
                sum += reward;
            }
        }
        sum / self.rollouts as f64
    }

    /// 0 for the random actor, 100 for the expert.
    pub fn normalised(&self, score: f64) -> f64 {
        let [random, expert] = self.anchors;
        100.0 * (score - random) / (expert - random)
    }

    /// Mean return of a model that acts through a stream, which begins again every `renew` steps.
    ///
    /// # Errors
    /// When the model does not answer.
    pub fn act(&self, model: &Model, renew: usize) -> std::result::Result<f64, String> {
        let failed = RefCell::new(None);
        let score = self.mean_score(|_| {
            let mut session = Session::new(model);
            let failed = &failed;
            let mut seen = 0;
            move |p: &Pendulum, _: &mut fastrand::Rng, to_go: f64| {
                if seen == renew {
                    session = Session::new(model);
                    seen = 0;
                }
                seen += 1;
                let event = json!({"state": p.observe(), "return": to_go}).to_string();
                match session.feed(&event) {
                    Ok(said) => said["action"][0].as_f64().unwrap_or(0.0),
                    Err(e) => {
                        *failed.borrow_mut() = Some(e.to_string());
                        0.0
                    }
                }
            }
        });
        failed.into_inner().map_or(Ok(score), Err)
    }

    /// The mean squared error of actions in windows `(episode, first step)` of `steps` steps.
    fn error(&self, net: &Net, windows: &[(&Episode, usize)], steps: usize) -> Result<Tensor> {
        let (b, d) = (windows.len(), net.config().width);
        let part = |f: &dyn Fn(&Episode, usize) -> Vec<f32>, width: usize| {
            let values: Vec<f32> = windows
                .iter()
                .flat_map(|(e, from)| (*from..from + steps).flat_map(|t| f(e, t)))
                .collect();
            Tensor::from_vec(values, (b, steps, width), &Device::Cpu)
        };
        let returns = |e: &Episode, t: usize| {
            let to_go: f64 = e.rewards[t..].iter().sum();
            vec![(to_go / self.return_scale) as f32]
        };
        let states = |e: &Episode, t: usize| self.scale.apply(&e.states[t * 3..][..3]);
        let actions = part(&|e, t| vec![e.actions[t]], 1)?;
        let tokens = Tensor::stack(
            &[
                net.linear("embed_return", &part(&returns, 1)?)?,
                net.linear("embed_state", &part(&states, 3)?)?,
                net.linear("embed_action", &actions)?,
            ],
            2,
        )?; // [B, steps, 3, d]
        let places = places(steps, d)?.reshape((1, steps, 1, d))?;
        let x = tokens.broadcast_add(&places)?.reshape((b, steps * 3, d))?;
        let out = net.forward(&net.norm("embed_norm", &x)?)?;
        let at_state = out
            .reshape((b, steps, 3, d))?
            .narrow(2, 1, 1)?
            .reshape((b * steps, d))?;
        let said = net.linear("head", &at_state.contiguous()?)?.tanh()?;
        let error = squared_error(&said, &actions.reshape((b * steps, 1))?)?;
        weighted_mean(&error, &vec![1.0; b * steps])
    }
}

impl Problem for Control {
    fn task(&self) -> Task {
        Task::Control {
            states: Pendulum::STATES,
            actions: 1,
            scale: self.scale.clone(),
            return_scale: self.return_scale,
        }
    }

    fn items(&self) -> usize {
        self.train.len()
    }

    fn loss(&self, net: &Net, items: &[usize], rng: &mut fastrand::Rng) -> Result<Tensor> {
        let steps = if rng.bool() { CONTEXT } else { Pendulum::STEPS };
        let windows: Vec<(&Episode, usize)> = items
            .iter()
            .map(|&i| (&self.train[i], rng.usize(0..=Pendulum::STEPS - steps)))
            .collect();
        self.error(net, &windows, steps)
    }

    fn validate(&self, net: &Net) -> Result<f64> {
        let windows: Vec<(&Episode, usize)> = self.validation.iter().map(|e| (e, 0)).collect();
        let error = self.error(net, &windows, Pendulum::STEPS)?;
        Ok(f64::from(error.to_scalar::<f32>()?))
    }

    fn test(&self, net: &Net) -> Result<Vec<(String, f64)>> {
        let wrong = |e: &dyn std::fmt::Display| candle_core::Error::Msg(e.to_string());
        let file = net.export().map_err(|e| wrong(&e))?;
        let model = Model::read(&file).map_err(|e| wrong(&e))?;
        let unbounded = self.act(&model, usize::MAX).map_err(|e| wrong(&e))?;
        let renewed = self.act(&model, CONTEXT).map_err(|e| wrong(&e))?;
        let data = self.train.iter().map(Episode::score).sum::<f64>() / self.train.len() as f64;
        Ok(vec![
            ("score".into(), self.normalised(unbounded)),
            ("score_renewed".into(), self.normalised(renewed)),
            ("data_score".into(), self.normalised(data)),
        ])
    }
}
