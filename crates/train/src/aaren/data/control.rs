//! A pendulum to be held upright, and episodes of experts of three qualities, after D4RL's Medium, Medium-Replay and Medium-Expert.

use crate::aaren::net::normal;

/// The pendulum: angle from upright (radians) and its speed (radians a second).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pendulum {
    /// Angle, 0 is upright.
    pub angle: f64,
    /// Speed.
    pub speed: f64,
}

/// Seconds of a step.
const DT: f64 = 0.05;
/// Gravity over length.
const PULL: f64 = 9.8;
/// Acceleration of the strongest action.
const PUSH: f64 = 8.0;

impl Pendulum {
    /// Steps of an episode.
    pub const STEPS: usize = 60;
    /// Values of an observation.
    pub const STATES: usize = 3;

    /// Somewhere near upright.
    pub fn start(rng: &mut fastrand::Rng) -> Self {
        Self {
            angle: 0.8 * (2.0 * rng.f64() - 1.0),
            speed: 2.0 * rng.f64() - 1.0,
        }
    }

    /// What a controller sees: sine and cosine of the angle, and the speed.
    pub fn observe(&self) -> [f32; 3] {
        [
            self.angle.sin() as f32,
            self.angle.cos() as f32,
            self.speed as f32,
        ]
    }

    /// Applies an action, cut to -1 to 1, for one step, and gives the reward: at most 0.
    pub fn step(&mut self, action: f64) -> f64 {
        let action = action.clamp(-1.0, 1.0);
        self.speed += DT * (PULL * self.angle.sin() + PUSH * action);
        self.speed = self.speed.clamp(-10.0, 10.0);
        self.angle += DT * self.speed;
        // Around once and back to the same place.
        let turns = (self.angle / std::f64::consts::TAU).round();
        self.angle -= turns * std::f64::consts::TAU;
        -(self.angle.powi(2) + 0.1 * self.speed.powi(2) + 0.01 * action * action) * DT
    }
}

/// The expert: a linear law that holds the pendulum wherever the push can.
pub fn expert(p: &Pendulum) -> f64 {
    (-(3.0 * p.angle + 0.9 * p.speed)).clamp(-1.0, 1.0)
}

/// Any action.
pub fn random_action(rng: &mut fastrand::Rng) -> f64 {
    2.0 * rng.f64() - 1.0
}

/// Who acts in the episodes of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quality {
    /// The expert with noise, and a random action in three of ten steps.
    Medium,
    /// From random to medium, like what is kept while a medium one learns.
    MediumReplay,
    /// One half medium, one half expert.
    MediumExpert,
}

impl Quality {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Medium, Self::MediumReplay, Self::MediumExpert];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Medium => "medium",
            Self::MediumReplay => "medium_replay",
            Self::MediumExpert => "medium_expert",
        }
    }

    /// How far the actor of episode `i` of `n` is from the expert: 0 is the expert, 1 is medium, above are worse, 3.3 is random.
    fn distance(self, i: usize, n: usize) -> f64 {
        match self {
            Self::MediumReplay => 3.3 - 2.3 * i as f64 / n as f64,
            Self::MediumExpert if i.is_multiple_of(2) => 0.0,
            Self::Medium | Self::MediumExpert => 1.0,
        }
    }

    /// `n` episodes.
    pub fn episodes(self, n: usize, rng: &mut fastrand::Rng) -> Vec<Episode> {
        (0..n)
            .map(|i| {
                let far = self.distance(i, n);
                Episode::run(rng, |p, rng| {
                    if rng.f64() < (0.3 * far).min(1.0) {
                        random_action(rng)
                    } else {
                        expert(p) + 0.4 * far * normal(rng)
                    }
                })
            })
            .collect()
    }
}

/// What happened in one episode.
#[derive(Debug, Clone, PartialEq)]
pub struct Episode {
    /// Observations, `[STEPS, 3]`.
    pub states: Vec<f32>,
    /// Actions, cut to -1 to 1, `[STEPS]`.
    pub actions: Vec<f32>,
    /// Rewards, `[STEPS]`.
    pub rewards: Vec<f64>,
}

impl Episode {
    /// Lets `act` act for an episode.
    pub fn run(rng: &mut fastrand::Rng, mut act: impl FnMut(&Pendulum, &mut fastrand::Rng) -> f64) -> Self {
        let mut p = Pendulum::start(rng);
        let mut episode = Self {
            states: Vec::new(),
            actions: Vec::new(),
            rewards: Vec::new(),
        };
        for _ in 0..Pendulum::STEPS {
            episode.states.extend(p.observe());
            let action = act(&p, rng).clamp(-1.0, 1.0);
            episode.actions.push(action as f32);
            episode.rewards.push(p.step(action));
        }
        episode
    }

    /// The sum of all rewards.
    pub fn score(&self) -> f64 {
        self.rewards.iter().sum()
    }

    /// Rewards still to come at each step, `[STEPS]`.
    pub fn returns(&self) -> Vec<f64> {
        let mut to_go = 0.0;
        let mut returns: Vec<f64> = self
            .rewards
            .iter()
            .rev()
            .map(|r| {
                to_go += r;
                to_go
            })
            .collect();
        returns.reverse();
        returns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(episodes: &[Episode]) -> f64 {
        episodes.iter().map(Episode::score).sum::<f64>() / episodes.len() as f64
    }

    #[test]
    fn the_expert_holds_the_pendulum_and_qualities_are_ordered() {
        let mut rng = fastrand::Rng::with_seed(4);
        let by = |f: fn(&Pendulum, &mut fastrand::Rng) -> f64| -> Vec<Episode> {
            let mut rng = fastrand::Rng::with_seed(5);
            (0..100).map(|_| Episode::run(&mut rng, f)).collect()
        };
        let best = mean(&by(|p, _| expert(p)));
        let worst = mean(&by(|_, rng| random_action(rng)));
        let [medium, replay, mixed] = Quality::ALL.map(|q| mean(&q.episodes(200, &mut rng)));
        assert!(
            worst < replay && replay < medium && medium < mixed && mixed < best,
            "{worst} {replay} {medium} {mixed} {best}"
        );
        assert!(best > 0.25 * worst, "a random actor lets it fall: {best} {worst}");
    }

    #[test]
    fn returns_to_go_fall_to_the_last_reward() {
        let episode = Episode::run(&mut fastrand::Rng::with_seed(6), |p, _| expert(p));
        let returns = episode.returns();
        assert!((returns[0] - episode.score()).abs() < 1e-12);
        assert_eq!(returns.last(), episode.rewards.last());
    }
}
