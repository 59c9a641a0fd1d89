//! Learning rate by step, as a factor.

use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// What a recipe says of the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RawSchedule {
    /// The same at every step, after `warmup` steps of rise.
    Constant {
        /// Steps of linear rise.
        #[serde(default)]
        warmup: u64,
    },
    /// Falls in a straight line to `floor` at the last step.
    Linear {
        /// Steps of linear rise.
        #[serde(default)]
        warmup: u64,
        /// Last factor.
        #[serde(default)]
        floor: f64,
    },
    /// Falls along half a cosine to `floor` at the last step.
    Cosine {
        /// Steps of linear rise.
        #[serde(default)]
        warmup: u64,
        /// Last factor.
        #[serde(default)]
        floor: f64,
    },
}

impl Default for RawSchedule {
    fn default() -> Self {
        Self::Constant { warmup: 0 }
    }
}

/// A schedule over `steps` steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    raw: RawSchedule,
    steps: u64,
}

impl Schedule {
    /// # Errors
    /// When the rise takes more than all steps, or the floor is not in `[0, 1]`.
    pub fn new(raw: RawSchedule, steps: u64) -> Result<Self, TrainError> {
        let (warmup, floor) = match raw {
            RawSchedule::Constant { warmup } => (warmup, 1.0),
            RawSchedule::Linear { warmup, floor } | RawSchedule::Cosine { warmup, floor } => (warmup, floor),
        };
        if warmup > steps {
            return Err(TrainError::Recipe(format!(
                "`schedule.warmup` is {warmup}, of {steps} steps in all"
            )));
        }
        if !(0.0..=1.0).contains(&floor) {
            return Err(TrainError::Recipe(format!(
                "`schedule.floor` is {floor}; it is a factor from 0 to 1"
            )));
        }
        Ok(Self { raw, steps })
    }

    /// Factor on the learning rate of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        let rise = |warmup: u64| (step < warmup).then(|| (step + 1) as f64 / warmup as f64);
        let done = |warmup: u64| {
            let rest = self.steps.saturating_sub(warmup).max(1) as f64;
            (step.saturating_sub(warmup) as f64 / rest).min(1.0)
        };
        match self.raw {
            RawSchedule::Constant { warmup } => rise(warmup).unwrap_or(1.0),
            RawSchedule::Linear { warmup, floor } => {
                rise(warmup).unwrap_or_else(|| floor + (1.0 - floor) * (1.0 - done(warmup)))
            }
            RawSchedule::Cosine { warmup, floor } => rise(warmup).unwrap_or_else(|| {
                floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done(warmup)).cos())
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_rise_and_fall_as_they_say() {
        let at = |raw: RawSchedule, step| Schedule::new(raw, 110).unwrap().at(step);
        let cosine = || RawSchedule::Cosine {
            warmup: 10,
            floor: 0.1,
        };
        assert_eq!(at(cosine(), 0), 0.1);
        assert_eq!(at(cosine(), 9), 1.0);
        assert!((at(cosine(), 60) - 0.55).abs() < 1e-12);
        assert!((at(cosine(), 110) - 0.1).abs() < 1e-12);
        let linear = || RawSchedule::Linear {
            warmup: 10,
            floor: 0.0,
        };
        assert!((at(linear(), 60) - 0.5).abs() < 1e-12);
        assert_eq!(at(RawSchedule::Constant { warmup: 2 }, 0), 0.5);
        assert_eq!(at(RawSchedule::Constant { warmup: 2 }, 100), 1.0);
        assert!(Schedule::new(RawSchedule::Constant { warmup: 111 }, 110).is_err());
        assert!(
            Schedule::new(
                RawSchedule::Linear {
                    warmup: 0,
                    floor: f64::NAN
                },
                110
            )
            .is_err()
        );
    }
}
