//! What settings of a planner cost and keep on real prompts.

use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::method::{
    Axis, Chosen, DecodePlanner, DecodeSteps, Facts, Knobs, Method, Plan, PlanView, Profiles, Program, Rig,
    RigError, Summary,
};
use antefix_attention::sparse::Planning;
use antefix_engine::{EngineError, Session};
use antefix_models::decoder::Model;

use super::search::{Bench, Figures};
use crate::panel::{Closeness, Sums, look};
use crate::reuse::distance;

/// Rows of a step; stretches of a plan may make it longer.
const CHUNK: usize = 512;

/// Last positions of a prompt whose predictions are compared; for a decode planner they are the tokens that count as drawn.
pub const COMPARED: usize = 64;

/// Why settings cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// Settings that do not fit the model.
    #[error(transparent)]
    Rig(#[from] RigError),
    /// A method that plans nothing.
    #[error(
        "`{0}` chooses no keys: there is nothing to tune\nhint: methods of the axes `prefill` and `decode` can be tuned"
    )]
    NoPlanner(&'static str),
    /// The model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Several planners that are asked about every drawn token, which is attended densely.
#[derive(Debug)]
struct DecodePanel {
    planners: Vec<Arc<dyn DecodePlanner>>,
    rows: usize,
    sums: Arc<Mutex<Vec<Sums>>>,
}

#[derive(Debug)]
struct DecodePanelSteps {
    steps: Vec<Box<dyn DecodeSteps>>,
    rows: usize,
    sums: Arc<Mutex<Vec<Sums>>>,
}

impl DecodePlanner for DecodePanel {
    fn start(&self) -> Box<dyn DecodeSteps> {
        Box::new(DecodePanelSteps {
            steps: self.planners.iter().map(|planner| planner.start()).collect(),
            rows: self.rows,
            sums: Arc::clone(&self.sums),
        })
    }

    fn summaries(&self) -> Vec<Summary> {
        self.planners
            .iter()
            .flat_map(|planner| planner.summaries())
            .collect()
    }
}

impl DecodeSteps for DecodePanelSteps {
    fn plan(&mut self, view: &PlanView<'_>) -> Plan {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        for (steps, sums) in self.steps.iter_mut().zip(sums.iter_mut()) {
            sums.add(view, &steps.plan(view), self.rows);
        }
        view.dense()
    }
}

/// A method on a model, and prompts to judge it by.
pub struct Judge<'a> {
    model: Arc<Model>,
    facts: Facts,
    profiles: &'a Profiles,
    method: &'static dyn Method,
    prompts: Vec<Vec<u32>>,
    closeness: Closeness,
    /// Logits of the last [`COMPARED`] positions of each prompt under dense attention, once they are needed.
    dense: Vec<Option<Vec<f32>>>,
    /// Hears of every prompt that is computed.
    computed: &'a dyn Fn(),
}

/// What settings do on prompts that they were not chosen by, in the mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// Recall, density and distance.
    pub figures: Figures,
    /// Share of positions with the same most likely token.
    pub top1: f64,
}

impl<'a> Judge<'a> {
    /// Judges `method` by `prompts`, each of at least two tokens. `computed` hears of every prompt that is computed.
    pub fn new(
        model: &Arc<Model>,
        method: &'static dyn Method,
        prompts: Vec<Vec<u32>>,
        closeness: Closeness,
        (profiles, computed): (&'a Profiles, &'a dyn Fn()),
    ) -> Self {
        Self {
            model: Arc::clone(model),
            facts: model.facts(),
            profiles,
            method,
            dense: vec![None; prompts.len()],
            prompts,
            closeness,
            computed,
        }
    }

    fn program(&self, knobs: &Knobs) -> Result<Program, RigError> {
        let chosen = Chosen {
            method: self.method,
            knobs: knobs.clone(),
        };
        Rig::assemble(&self.facts, self.profiles, &[chosen])
    }

    /// Tokens at the end of a prompt of `n` that count as drawn.
    fn drawn(n: usize) -> usize {
        COMPARED.min(n / 2)
    }

    /// Logits of the last positions of a prompt under `planning`.
    fn logits(&self, tokens: &[u32], planning: Option<Planning>) -> Result<Vec<f32>, EngineError> {
        let mut session = Session::new(Arc::clone(&self.model), tokens.len(), CHUNK);
        session.plan(planning.map(Arc::new));
        let (mut logits, drawn) = (Vec::new(), Self::drawn(tokens.len()));
        // Drawn tokens are no part of the prompt's stretches; a planner of prompts plans them all.
        match self.method.card().axis {
            Axis::Decode => {
                let (prompt, last) = tokens.split_at(tokens.len() - drawn);
                session.feed(prompt, 0, &mut logits)?;
                session.feed(last, drawn, &mut logits)?;
            }
            _ => session.feed(tokens, drawn, &mut logits)?,
        }
        (self.computed)();
        Ok(logits)
    }

    /// The sums of `programs`, which are looked at together, on one prompt.
    fn sums(&self, (i, tokens): (usize, &[u32]), programs: &[Program]) -> Result<Vec<Sums>, MeasureError> {
        let name = self.method.card().name;
        if self.method.card().axis == Axis::Decode {
            let planner = |program: &Program| program.decode_planner().cloned();
            let planners: Option<Vec<_>> = programs.iter().map(planner).collect();
            let sums = Arc::new(Mutex::new(vec![Sums::default(); programs.len()]));
            let panel = DecodePanel {
                planners: planners.ok_or(MeasureError::NoPlanner(name))?,
                rows: self.closeness.rows,
                sums: Arc::clone(&sums),
            };
            let prompt = tokens.len() - Self::drawn(tokens.len());
            self.logits(tokens, Some(Planning::new(None, Some(Arc::new(panel)), prompt)))?;
            return Ok(std::mem::take(
                &mut *sums.lock().unwrap_or_else(PoisonError::into_inner),
            ));
        }
        let planners: Option<Vec<_>> = programs.iter().map(|p| p.planner().cloned()).collect();
        let closeness = Closeness {
            seed: self.closeness.seed.wrapping_add(i as u64),
            ..self.closeness
        };
        let planners = planners.ok_or(MeasureError::NoPlanner(name))?;
        look(&planners, tokens.len(), closeness, |planning| {
            self.logits(tokens, Some(planning)).map(drop)
        })
        .map_err(MeasureError::from)
    }

    /// Distance of the predictions under `program` on prompt `i`, and the share of equal most likely tokens.
    fn distance_on(&mut self, i: usize, program: &Program) -> Result<(f64, f64), MeasureError> {
        if self.dense[i].is_none() {
            self.dense[i] = Some(self.logits(&self.prompts[i], None)?);
        }
        let tokens = &self.prompts[i];
        let prompt = match self.method.card().axis {
            Axis::Decode => tokens.len() - Self::drawn(tokens.len()),
            _ => usize::MAX,
        };
        let planning =
            Planning::of(program, prompt).ok_or(MeasureError::NoPlanner(self.method.card().name))?;
        let logits = self.logits(tokens, Some(planning))?;
        let dense = self.dense[i].as_deref().unwrap_or_default();
        Ok(distance(dense, &logits, self.model.spec().vocab))
    }

    /// Everything that there is to know of settings, in the mean over the prompts.
    ///
    /// # Errors
    /// When they do not fit the model, or that fails.
    pub fn verdict(&mut self, knobs: &Knobs) -> Result<Verdict, MeasureError> {
        let program = self.program(knobs)?;
        let n = self.prompts.len().max(1) as f64;
        let (mut recall, mut density, mut kl, mut top1) = (0.0, 0.0, 0.0, 0.0);
        for i in 0..self.prompts.len() {
            let sums = self.sums((i, &self.prompts[i]), std::slice::from_ref(&program))?;
            let figures = figures(&sums[0]);
            let (far, same) = self.distance_on(i, &program)?;
            recall += figures.recall / n;
            density += figures.density / n;
            kl += far / n;
            top1 += same / n;
        }
        Ok(Verdict {
            figures: Figures {
                recall,
                density,
                kl: Some(kl),
            },
            top1,
        })
    }
}

fn figures(sums: &Sums) -> Figures {
    Figures {
        recall: sums.recall(),
        density: sums.density(),
        kl: None,
    }
}

/// The worst recall and distance of any prompt, so that the mean of others has room; the mean density.
impl Bench for Judge<'_> {
    type Error = MeasureError;

    fn look(&mut self, settings: &[Knobs]) -> Result<Vec<Figures>, MeasureError> {
        let programs: Result<Vec<Program>, RigError> = settings.iter().map(|k| self.program(k)).collect();
        let programs = programs?;
        let mut all = vec![
            Figures {
                recall: 1.0,
                density: 0.0,
                kl: None,
            };
            settings.len()
        ];
        for (i, tokens) in self.prompts.iter().enumerate() {
            for (all, sums) in all.iter_mut().zip(self.sums((i, tokens), &programs)?) {
                let figures = figures(&sums);
                all.recall = all.recall.min(figures.recall);
                all.density += figures.density / self.prompts.len() as f64;
            }
        }
        Ok(all)
    }

    fn distance(&mut self, settings: &Knobs) -> Result<f64, MeasureError> {
        let program = self.program(settings)?;
        (0..self.prompts.len()).try_fold(0.0f64, |worst, i| Ok(worst.max(self.distance_on(i, &program)?.0)))
    }
}
