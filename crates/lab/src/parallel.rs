//! Which temperature and scale suit a model that attends documents side by side (paper `ape`): those that stay closest to one document
//! after the other. No labels are needed, so a user's own prompts will do.

use std::sync::Arc;

use antefix_engine::ReuseError;
use antefix_papers::ape::Parallel;
use antefix_papers::repro::mean;
use serde::Serialize;

use crate::reuse::{Bench, Documents, Way};

/// The official demo's temperature and scale.
const OFFICIAL: (f32, f32) = (0.9, 0.9);
/// Plain parallel encoding.
const PLAIN: (f32, f32) = (1.0, 1.0);

/// A temperature and a scale with what they lose.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Setting {
    /// Temperature.
    #[serde(rename = "T")]
    pub temperature: f32,
    /// Scale.
    #[serde(rename = "S")]
    pub scale: f32,
    /// Mean KL divergence from full prefill, nats.
    pub kl: f64,
}

impl Setting {
    /// As `--method` takes it.
    pub fn method(&self) -> String {
        format!("ape,T={},S={}", self.temperature, self.scale)
    }
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Every setting on the prompts that were searched with.
    pub grid: Vec<Setting>,
    /// The best of these, on the prompts held out.
    pub best: Setting,
    /// The official demo's, on the prompts held out.
    pub official: Setting,
    /// Plain parallel encoding, on the prompts held out.
    pub plain: Setting,
}

/// Tries every one of `temperatures` with every one of `scales` on all `prompts` of even number; judges the best by the others. `progress`
/// is told the number of prompts done.
///
/// # Errors
/// When the model fails or there is no room.
///
/// # Panics
/// With fewer than two prompts, or nothing to try.
pub fn search(
    bench: &mut Bench,
    prompts: &[Documents],
    (temperatures, scales): (&[f32], &[f32]),
    progress: &mut dyn FnMut(usize),
) -> Result<Found, ReuseError> {
    assert!(prompts.len() > 1 && !temperatures.is_empty() && !scales.is_empty());
    let all: Vec<(f32, f32)> = temperatures
        .iter()
        .flat_map(|&t| scales.iter().map(move |&s| (t, s)))
        .collect();
    let mut done = 0;
    let mut tried = |bench: &mut Bench, settings: &[(f32, f32)], odd: usize| {
        let ways: Vec<Way> = settings.iter().map(|&s| way(s)).collect();
        let mut losses = vec![Vec::new(); ways.len()];
        for prompt in prompts.iter().skip(odd).step_by(2) {
            let found = bench.divergences(prompt, &ways)?;
            losses.iter_mut().zip(found).for_each(|(all, kl)| all.push(kl));
            done += 1;
            progress(done);
        }
        let setting = |(&(temperature, scale), losses): (&(f32, f32), Vec<f64>)| Setting {
            temperature,
            scale,
            kl: mean(losses),
        };
        Ok::<_, ReuseError>(settings.iter().zip(losses).map(setting).collect::<Vec<_>>())
    };
    let grid = tried(bench, &all, 0)?;
    let best = grid
        .iter()
        .min_by(|a, b| a.kl.total_cmp(&b.kl))
        .map_or(PLAIN, |s| (s.temperature, s.scale));
    let held_out = tried(bench, &[best, OFFICIAL, PLAIN], 1)?;
    Ok(Found {
        best: held_out[0],
        official: held_out[1],
        plain: held_out[2],
        grid,
    })
}

fn way((temperature, scale): (f32, f32)) -> Way {
    let how = Parallel { temperature, scale };
    Way::Reuse {
        name: format!("ape,T={temperature},S={scale}"),
        how: Arc::new(how),
    }
}

#[cfg(test)]
mod tests {
    use antefix_conformance::tiny;
    use antefix_kernels::cpu::Cpu;
    use antefix_kv::Pool;
    use antefix_models::spec::Arch;

    use super::*;
    use crate::reuse::Sizes;

    #[test]
    fn the_best_of_the_grid_is_judged_by_other_prompts() {
        let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
        let sizes = Sizes {
            documents: 2,
            tokens: 40,
            question: 60,
            answer: 0,
        };
        let prompts: Vec<Documents> = (0..3).map(|i| Documents::made(&tokenizer, sizes, i)).collect();
        let room = Pool::new(model.kv_shape(), 0).bytes_for(600) * 5;
        let fingerprint = antefix_engine::identity(&model).unwrap().fingerprint();
        let mut bench = Bench::new(Arc::clone(&model), room, fingerprint, None);
        let mut done = Vec::new();
        let found = search(&mut bench, &prompts, (&[0.5, 1.0], &[0.5, 1.0, 2.0]), &mut |n| {
            done.push(n)
        })
        .unwrap();
        assert_eq!((found.grid.len(), done), (6, vec![1, 2, 3]));
        let least = found.grid.iter().map(|s| s.kl).fold(f64::INFINITY, f64::min);
        let chosen = found
            .grid
            .iter()
            .find(|s| s.method() == found.best.method())
            .unwrap();
        assert!(chosen.kl == least && least > 0.0);
        // The held-out figures are those of the odd prompt alone.
        let alone = bench.divergences(&prompts[1], &[way(PLAIN)]).unwrap();
        assert_eq!(found.plain.kl, alone[0]);
        assert_eq!(found.official.method(), "ape,T=0.9,S=0.9");
    }

    #[test]
    fn the_order_of_documents_changes_no_bit() {
        let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 2);
        let sizes = Sizes {
            documents: 5,
            tokens: 40,
            question: 60,
            answer: 0,
        };
        let made = Documents::made(&tokenizer, sizes, 4);
        let room = Pool::new(model.kv_shape(), 0).bytes_for(900) * 5;
        let fingerprint = antefix_engine::identity(&model).unwrap().fingerprint();
        let mut bench = Bench::new(Arc::clone(&model), room, fingerprint, None);
        let logits = bench.logits(&way((0.7, 0.6)), &made).unwrap();
        let mut rng = fastrand::Rng::with_seed(9);
        for _ in 0..6 {
            let turned = made.shuffled(&mut rng);
            assert_eq!(bench.logits(&way((0.7, 0.6)), &turned).unwrap(), logits);
        }
        assert_ne!(bench.logits(&way((0.8, 0.6)), &made).unwrap(), logits);
    }
}
