//! Plans that were written down, executed again: what they do to predictions.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{Plan, PlanView, Planner, Program};
use antefix_attention::sparse::{Planned, Planning};
use antefix_models::decoder::Model;
use antefix_state::plan::PlanError;
use serde::Serialize;

use crate::plans::PlansError;
use crate::reuse::distance;
use crate::sparse::{COMPARED, computed};

/// Why plans cannot be executed on a text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// A layer that the model does not have.
    #[error(
        "there is a plan of layer {layer}, the model has {layers} layers\nhint: are these plans of this model?"
    )]
    Layer {
        /// The layer.
        layer: usize,
        /// How many there are.
        layers: usize,
    },
    /// A layer that is never planned.
    #[error("there is a plan of layer {0}, which has a window and stays exact")]
    Window(usize),
    /// A layer without plans.
    #[error("there is no plan of layer {0}\nhint: the plans of all layers without a window are needed")]
    Missing(usize),
    /// Covers of another number of heads.
    #[error("the plan of layer {layer}: {error}, and it has {}\nhint: are these plans of this model?", .error.unit)]
    Heads {
        /// The layer.
        layer: usize,
        /// How many covers there are.
        error: PlanError,
    },
    /// Stretches that do not follow each other as a prompt is computed.
    #[error(
        "layer {layer}: the plan of positions {} to {} stands where that of {} to {} belongs\nhint: the plans of a layer cover the {tokens} tokens of \
         the text in stretches of the same length, the last one perhaps shorter",
        .got.0, .got.1, .want.0, .want.1
    )]
    Stretch {
        /// The layer.
        layer: usize,
        /// Positions of the plan.
        got: (u32, u32),
        /// Positions that belong there.
        want: (u32, u32),
        /// Tokens of the text.
        tokens: usize,
    },
    /// Plans that end early.
    #[error(
        "layer {layer}: the plans end at position {end}, the text has {tokens} tokens\nhint: are these plans of this text?"
    )]
    Short {
        /// The layer.
        layer: usize,
        /// Where they end.
        end: usize,
        /// Tokens of the text.
        tokens: usize,
    },
    /// The method that is compared plans no prompts, or the model failed.
    #[error(transparent)]
    Plans(#[from] PlansError),
}

/// Plans of all layers of one text, as a planner.
#[derive(Debug)]
pub struct Replay {
    grain: NonZeroUsize,
    /// By layer and first position.
    plans: HashMap<(usize, u32), Plan>,
}

impl Replay {
    /// Takes `plans` of a text of `tokens` tokens on `model`; each is valid.
    ///
    /// # Errors
    /// When they are not plans of all layers without a window, of the model's heads, in stretches that follow each other.
    pub fn new(model: &Model, tokens: usize, plans: Vec<Planned>) -> Result<Self, ReplayError> {
        let spec = model.spec();
        let mut by_layer: Vec<Vec<Planned>> = vec![Vec::new(); spec.layers];
        for planned in plans {
            let layer = planned.layer;
            let layers = spec.layers;
            let mine = by_layer
                .get_mut(layer)
                .ok_or(ReplayError::Layer { layer, layers })?;
            if spec.layer_kinds[layer].window.is_some() {
                return Err(ReplayError::Window(layer));
            }
            let heads = |error| ReplayError::Heads { layer, error };
            planned.plan.fits(spec.heads, spec.kv_heads).map_err(heads)?;
            mine.push(planned);
        }
        let whole = (0..spec.layers).filter(|&layer| spec.layer_kinds[layer].window.is_none());
        let (mut grain, mut all) = (None, HashMap::new());
        for layer in whole {
            let mut mine = std::mem::take(&mut by_layer[layer]);
            mine.sort_by_key(|p| p.queries.start);
            let first = mine.first().ok_or(ReplayError::Missing(layer))?;
            let grain = *grain.get_or_insert(first.queries.end.max(1));
            let mut at = 0;
            for planned in mine {
                let (got, end) = (
                    planned.queries.clone(),
                    (at + u64::from(grain)).min(tokens as u64),
                );
                if (u64::from(got.start), u64::from(got.end)) != (at, end) {
                    return Err(ReplayError::Stretch {
                        layer,
                        got: (got.start, got.end),
                        want: (at as u32, end as u32),
                        tokens,
                    });
                }
                at = end;
                all.insert((layer, got.start), planned.plan);
            }
            if at < tokens as u64 {
                let end = at as usize;
                return Err(ReplayError::Short { layer, end, tokens });
            }
        }
        let grain = NonZeroUsize::new(grain.map_or(1, |grain| grain as usize));
        Ok(Self {
            grain: grain.expect("at least 1"),
            plans: all,
        })
    }
}

impl Planner for Replay {
    fn grain(&self) -> NonZeroUsize {
        self.grain
    }

    fn plan(&self, view: &PlanView<'_>) -> Plan {
        let at = (view.rows.layer, view.queries().start);
        self.plans
            .get(&at)
            .expect("every layer and stretch of the text has a plan")
            .clone()
    }
}

/// What replayed plans do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replayed {
    /// Tokens of the text.
    pub tokens: usize,
    /// Kept pairs of query and key over all, in the layers that are planned.
    pub density: f64,
    /// Last positions whose predictions are compared.
    pub compared: usize,
    /// Mean divergence of the predictions from those of dense attention, nats.
    pub kl: f64,
    /// Share of positions with the same most likely token.
    pub top1: f64,
    /// The same from a method that plans the text now; if there is one.
    pub live: Option<Live>,
}

/// The distance from a method that plans for itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Live {
    /// The method with its settings.
    pub method: String,
    /// Whether the logits are the same, bit for bit.
    pub same_bits: bool,
    /// Mean divergence of the predictions, nats.
    pub kl: f64,
    /// Share of positions with the same most likely token.
    pub top1: f64,
}

/// Runs `tokens` under `replay`, densely, and under `program` if there is one.
///
/// # Errors
/// When `program` plans no prompts, or the model fails.
pub fn replay(
    model: &Arc<Model>,
    tokens: &[u32],
    replay: Replay,
    program: Option<&Program>,
) -> Result<Replayed, ReplayError> {
    let compared = COMPARED.min(tokens.len());
    let logits = |planner: Option<Arc<dyn Planner>>| -> Result<(Vec<f32>, Option<f64>), PlansError> {
        let planning = planner.map(|planner| Arc::new(Planning::new(Some(planner), None, usize::MAX)));
        let (logits, ..) = computed(model, tokens, planning.clone(), compared)?;
        Ok((logits, planning.and_then(|p| p.density())))
    };
    let vocab = model.spec().vocab;
    let (replayed, density) = logits(Some(Arc::new(replay)))?;
    let live = match program {
        None => None,
        Some(program) => {
            let none = || PlansError::None {
                method: program.name(),
            };
            let planner = program.planner().ok_or_else(none)?;
            let (live, _) = logits(Some(Arc::clone(planner)))?;
            let (kl, top1) = distance(&live, &replayed, vocab);
            let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            Some(Live {
                method: program.tag(),
                same_bits: bits(&live) == bits(&replayed),
                kl,
                top1,
            })
        }
    };
    let (dense, _) = logits(None)?;
    let (kl, top1) = distance(&dense, &replayed, vocab);
    Ok(Replayed {
        tokens: tokens.len(),
        density: density.unwrap_or(1.0),
        compared,
        kl,
        top1,
        live,
    })
}

#[cfg(test)]
mod tests {
    use antefix_attention::sparse::json;
    use antefix_conformance::tiny;
    use antefix_kernels::cpu::Cpu;
    use antefix_models::spec::Arch;

    use super::*;
    use crate::plans::{live_plans, plans};
    use crate::testing::program;

    fn tokens() -> Vec<u32> {
        (0..900).map(|i| i * 7 % 200).collect()
    }

    #[test]
    fn plans_that_were_printed_do_what_the_method_did() {
        for arch in [Arch::Llama, Arch::Gemma3] {
            let (model, _) = tiny(arch, Cpu::best(), 2);
            let program = program(
                &model,
                "flexprefill,gamma=0.5,min_budget=32,block=32,rows=16,chunk=8",
            );
            let tokens = tokens();
            let printed: Vec<String> = live_plans(&model, &program, &tokens)
                .expect("planned")
                .iter()
                .map(json::print)
                .collect();
            let read: Vec<Planned> = printed
                .iter()
                .map(|line| json::parse(line).expect("a plan"))
                .collect();
            let made = Replay::new(&model, tokens.len(), read).expect("of this text");
            let got = replay(&model, &tokens, made, Some(&program)).expect("it runs");
            let live = got.live.expect("it was asked for");
            assert!(live.same_bits && live.kl == 0.0 && live.top1 == 1.0, "{live:?}");
            assert!(got.density < 0.9 && got.kl > 0.0, "{}", got.density);

            // Plans that were only looked at are others: layers read what dense layers wrote.
            let looked = plans(&model, &program, &tokens, 1).expect("planned");
            let made = Replay::new(&model, tokens.len(), looked).expect("of this text");
            let other = replay(&model, &tokens, made, Some(&program)).expect("it runs");
            assert!(!other.live.expect("it was asked for").same_bits);
        }
    }

    #[test]
    fn plans_of_something_else_are_refused_with_the_place() {
        let (model, _) = tiny(Arch::Gemma3, Cpu::best(), 1);
        let tokens = &tokens()[..300];
        let program = program(&model, "a_shape,block=32,sinks=4,window=8");
        let good = plans(&model, &program, tokens, 1).expect("planned");
        let (first, window) = {
            let is = |layer: &usize| model.spec().layer_kinds[*layer].window.is_some();
            (
                good[0].layer,
                (0..model.spec().layers).find(is).expect("Gemma has some"),
            )
        };
        type Change = Box<dyn Fn(&mut Vec<Planned>)>;
        let cases: [(Change, &str); 7] = [
            (Box::new(|plans| plans.clear()), "no plan of layer"),
            (Box::new(|plans| plans[0].layer = 999), "the model has"),
            (Box::new(move |plans| plans[0].layer = window), "has a window"),
            (
                Box::new(|plans| plans[0].plan.units.truncate(0)),
                "one cover for each head",
            ),
            (Box::new(|plans| plans.push(plans[0].clone())), "stands where"),
            (
                Box::new(move |plans| {
                    let last = plans.iter().rposition(|p| p.layer == first).expect("there");
                    plans.remove(last);
                }),
                "",
            ),
            (
                Box::new(|plans| plans.iter_mut().for_each(|p| p.queries.end += 1)),
                "stands where",
            ),
        ];
        for (change, why) in cases {
            let mut plans = good.clone();
            change(&mut plans);
            let error = Replay::new(&model, tokens.len(), plans)
                .expect_err(why)
                .to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(Replay::new(&model, tokens.len(), good.clone()).is_ok());
        let error = Replay::new(&model, tokens.len() + 1, good)
            .expect_err("another text")
            .to_string();
        assert!(error.contains("301 tokens"), "{error}");
    }
}
