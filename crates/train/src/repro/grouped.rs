//! prefix_grouper: gradients and time of a training step on G responses behind one prompt, grouped beside repeated.

use std::time::Instant;

use antefix_lab::median;
use antefix_models::files::ModelFiles;
use antefix_papers::repro::{Judgement, LabError, Outcome, Scale, Verdict};
use serde_json::json;

use super::{Ground, failed};
use crate::error::TrainError;
use crate::model::{Decoder, LoraSpec, Train};
use crate::ops::{self, RowLoss};
use crate::optim::{AdamW, Grads, RawAdamW};
use crate::prefix_grouper::{Form, Prompted, Scored, pack, pack_sequences};
use crate::random::Stream;

/// How a prompt and its responses are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The prompt once.
    Grouped,
    /// The prompt before each response.
    Repeated,
    /// One sequence, prompt and responses one after the other, with nothing of the grouping: what one response is compared with.
    Plain,
}

impl Way {
    /// The way of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Grouped, Self::Repeated, Self::Plain]
            .into_iter()
            .find(|way| way.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grouped => "grouped",
            Self::Repeated => "repeated",
            Self::Plain => "plain",
        }
    }
}

/// A step that was timed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Forward, backward and update, seconds.
    pub seconds: f64,
    /// Rows that went through the layers.
    pub rows: usize,
}

/// A model in training on random tokens.
pub struct Trial {
    model: Decoder,
    optimiser: AdamW,
    vocab: usize,
    steps: u64,
}

impl Trial {
    /// LoRA of rank 8 on queries and values, or everything.
    ///
    /// # Errors
    /// When the model cannot be trained.
    pub fn new(files: &ModelFiles, everything: bool) -> Result<Self, TrainError> {
        let train = match everything {
            true => Train::All,
            false => Train::Lora(LoraSpec::default()),
        };
        let model = Decoder::load(files, &train, 1)?;
        Ok(Self {
            optimiser: AdamW::new(RawAdamW::default(), model.params())?,
            model,
            vocab: files.spec().vocab,
            steps: 0,
        })
    }

    /// A prompt of `prefix` random tokens and `group` responses of `length`, another one for every `number`.
    pub fn item(&self, (group, prefix, length): (usize, usize, usize), number: u64) -> Prompted {
        let mut stream = Stream::at(1, "tokens", number);
        let mut tokens = |n: usize| -> Vec<u32> { (0..n).map(|_| stream.below(self.vocab) as u32).collect() };
        Prompted {
            prefix: tokens(prefix),
            responses: (0..group).map(|_| tokens(length)).collect(),
        }
    }

    /// Gradients of the mean cross-entropy of the responses, and the rows that they took.
    ///
    /// # Errors
    /// When something does not fit.
    pub fn gradients(&self, item: &Prompted, way: Way) -> Result<(Grads, usize), TrainError> {
        let scored: Scored = match way {
            Way::Grouped => pack(std::slice::from_ref(item), Form::Grouped)?,
            Way::Repeated => pack(std::slice::from_ref(item), Form::Repeated)?,
            Way::Plain => {
                let whole = [item.prefix.clone(), item.responses.concat()].concat();
                let mut scored = pack_sequences(&[whole])?;
                let first = item.prefix.len() - 1;
                scored.rows = scored.rows[first..].to_vec().into();
                scored.targets = scored.targets[first..].to_vec().into();
                scored
            }
        };
        let n = scored.targets.len();
        let hidden = ops::embed(&self.model.hidden(&scored.batch)?, &scored.rows, 1.0)?;
        let weights = RowLoss::CrossEntropy(vec![1.0 / n as f64; n].into());
        let loss = ops::token_loss(&hidden, self.model.output(), &scored.targets, 1.0, weights)?;
        let mut grads = Grads::default();
        grads.add(self.model.params(), &loss)?;
        Ok((grads, scored.batch.packing.rows()))
    }

    /// One step.
    ///
    /// # Errors
    /// As [`Trial::gradients`].
    pub fn step(&mut self, sizes: (usize, usize, usize), way: Way) -> Result<Step, TrainError> {
        let item = self.item(sizes, self.steps);
        self.steps += 1;
        let start = Instant::now();
        let (grads, rows) = self.gradients(&item, way)?;
        self.optimiser.step(self.model.params(), &grads, 1.0)?;
        Ok(Step {
            seconds: start.elapsed().as_secs_f64(),
            rows,
        })
    }

    /// Distance of the gradients of both forms in the same place, as a share of their norm.
    ///
    /// # Errors
    /// As [`Trial::gradients`].
    pub fn difference(&self, sizes: (usize, usize, usize)) -> Result<f64, TrainError> {
        let item = self.item(sizes, u64::MAX);
        let [(a, _), (b, _)] = [
            self.gradients(&item, Way::Grouped)?,
            self.gradients(&item, Way::Repeated)?,
        ];
        let pairs = a.sums().iter().flatten().zip(b.sums().iter().flatten());
        let apart: f64 = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
        Ok(apart.sqrt() / b.norm().max(f64::MIN_POSITIVE))
    }
}

/// Sizes (G, L, l) of the paper's kind, and what a step must gain at them.
const FULL: [((usize, usize, usize), f64); 2] = [((8, 1024, 128), 3.5), ((8, 256, 256), 1.4)];
/// The same of a short run.
const FAST: [(usize, usize, usize); 2] = [(8, 256, 32), (8, 64, 64)];
/// Share of the ratio of rows that a short run must gain: what does not shrink with the rows weighs more there.
const FAST_SHARE: f64 = 0.6;
/// The largest difference of gradients, of their norm.
const SAME: f64 = 1e-4;

/// What came of one size.
struct Found {
    sizes: (usize, usize, usize),
    /// Seconds of a step, grouped and repeated: medians.
    seconds: [f64; 2],
    rows: [usize; 2],
    want: f64,
}

impl Found {
    fn gain(&self) -> f64 {
        self.seconds[1] / self.seconds[0]
    }
}

pub(super) fn run(ground: &Ground<'_>, scale: Scale) -> Result<Outcome, LabError> {
    let files = ground.subject()?.model.files();
    let mut trial = Trial::new(files, false).map_err(failed)?;
    let share = |(g, l, r): (usize, usize, usize)| FAST_SHARE * (g * (l + r)) as f64 / (l + g * r) as f64;
    let cells: Vec<_> = scale.pick(FAST.map(|sizes| (sizes, share(sizes))).to_vec(), FULL.to_vec());
    let pairs = scale.pick(1, 3);
    let mut found = Vec::new();
    for (sizes, want) in cells {
        let mut times = [Vec::new(), Vec::new()];
        let mut rows = [0; 2];
        for pair in 0..=pairs {
            for (i, way) in [Way::Grouped, Way::Repeated].into_iter().enumerate() {
                let step = trial.step(sizes, way).map_err(failed)?;
                rows[i] = step.rows;
                // The first of each finds cold memory.
                if pair > 0 {
                    times[i].push(step.seconds);
                }
            }
        }
        found.push(Found {
            sizes,
            seconds: [median(&times[0]), median(&times[1])],
            rows,
            want,
        });
    }
    // After a few steps: the first gradient of a LoRA's A is zero.
    let difference = trial.difference(found[0].sizes).map_err(failed)?;
    let mut all: Vec<_> = found
        .iter()
        .map(|f| {
            let (group, prefix, length) = f.sizes;
            json!({
                "G": group, "L": prefix, "l": length, "grouped_s": f.seconds[0], "repeated_s": f.seconds[1], "gain": f.gain(),
                "rows_grouped": f.rows[0], "rows_repeated": f.rows[1], "asked": f.want,
            })
        })
        .collect();
    all.push(json!({"gradient_difference": difference}));
    Ok(Outcome {
        unit: "seconds of a step (forward, backward, update) at the largest prompt",
        measured: found[0].seconds[0],
        baseline: found[0].seconds[1],
        scale: format!(
            "LoRA of rank 8 on q and v, sizes (G, L, l) {}, {pairs} pairs in turns",
            found
                .iter()
                .map(|f| format!("{:?}", f.sizes))
                .collect::<Vec<_>>()
                .join(" and ")
        ),
        judgement: judge(&found, difference),
        rows: all,
    })
}

fn judge(found: &[Found], difference: f64) -> Judgement {
    let same = difference <= SAME;
    let verdict = match same {
        true if found.iter().all(|f| f.gain() >= f.want) => Verdict::Reproduced,
        true if found.iter().all(|f| f.gain() > 1.0) => Verdict::Partly,
        _ => Verdict::Not,
    };
    let gains: Vec<String> = found
        .iter()
        .map(|f| format!("{:.2} at {:?} ({:.2} asked)", f.gain(), f.sizes, f.want))
        .collect();
    Judgement {
        verdict,
        why: format!(
            "a step is {} times as fast; gradients differ by {difference:.1e} of their norm",
            gains.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(gain: f64) -> Vec<Found> {
        vec![Found {
            sizes: (8, 1024, 128),
            seconds: [1.0, gain],
            rows: [1, 1],
            want: 3.5,
        }]
    }

    #[test]
    fn speed_counts_only_with_the_same_gradients() {
        let verdict = |gain, difference| judge(&found(gain), difference).verdict;
        assert_eq!(verdict(3.6, 1e-6), Verdict::Reproduced);
        assert_eq!(verdict(2.0, 1e-6), Verdict::Partly);
        assert_eq!(verdict(0.9, 1e-6), Verdict::Not);
        assert_eq!(verdict(9.0, 1e-3), Verdict::Not);
        assert_eq!(verdict(9.0, f64::NAN), Verdict::Not);
    }
}
