//! The methods of a request: `"antefix": {"kv": "compresskv,budget=512", "documents": [..]}`, and what is told of them.

use std::sync::Arc;
use std::time::Duration;

use antefix_attention::hooks::HookSpec;
use antefix_attention::hooks::Told;
use antefix_attention::method::{
    Axis, BandError, Bands, Card, ChoiceError, DENSE, Facts, Method, Profiles, Program, RawChoice,
    RawMethods, Rig, RigError, Trust, find,
};
use antefix_engine::{Done, MethodReport};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::wish::Answer;
use crate::{patience, traces};

/// What the server has to offer.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    /// The methods that requests can choose from.
    pub methods: &'static [&'static dyn Method],
    /// What always runs: listed, but not to be chosen.
    pub always: &'static [&'static Card],
    /// Where their profiles lie.
    pub profiles: Profiles,
    /// What holds on the axes about which a request says nothing.
    pub defaults: RawMethods,
    /// What holds there before `defaults`, by the length of the prompt.
    pub bands: Bands,
}

/// Why the server's own choice of methods cannot hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// A name or a setting of `defaults`.
    #[error("in `methods`: {0}")]
    Choice(ChoiceError),
    /// Methods of `defaults` that do not go together or do not fit the model.
    #[error("in `methods`: {0}")]
    Rig(RigError),
    /// One of the bands.
    #[error("in the profile: {0}")]
    Band(BandError),
}

impl Offer {
    /// Checks what holds where a request is silent.
    ///
    /// # Errors
    /// When a name or a knob is wrong, or methods do not go together or do not fit the model.
    pub(crate) fn check(&self, facts: &Facts) -> Result<(), OfferError> {
        let defaults = self.defaults.resolve(self.methods, Trust::Remote);
        Rig::assemble(facts, &self.profiles, &defaults.map_err(OfferError::Choice)?)
            .map_err(OfferError::Rig)?;
        let known = (self.methods, Trust::Remote);
        self.bands
            .fit(known, (facts, &self.profiles), &self.defaults)
            .map_err(OfferError::Band)
    }
}

/// A text that the question is about.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    /// The client's name for it; nothing depends on it.
    #[serde(default, rename = "id")]
    _id: Option<Value>,
    text: String,
}

/// What a request says about methods: `antefix`, and the short form `method`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Asked {
    methods: RawMethods,
    /// What it says nothing about is dense, whatever the server would choose.
    dense: bool,
    pub(crate) documents: Vec<String>,
    /// The cache policy decides behind the documents, before it sees the question.
    pub(crate) question_after_cut: bool,
    /// How long it may take.
    pub(crate) deadline: Option<Duration>,
    /// What it wants to see or change inside the model.
    pub(crate) hooks: Option<HookSpec>,
}

impl Asked {
    /// Reads both forms; which methods there are is not asked yet, except to find the axis of the short form.
    ///
    /// # Errors
    /// When they have another form, or contradict each other.
    pub(crate) fn read(
        offer: &Offer,
        antefix: Option<&Map<String, Value>>,
        short: Option<&str>,
    ) -> Result<Self, ApiError> {
        let mut asked = Self::default();
        if let Some(antefix) = antefix {
            asked.hooks = traces::asked(antefix)?;
        }
        for (name, value) in antefix.into_iter().flatten().filter(|(_, v)| !v.is_null()) {
            if name == "capture" || (name == "hooks" && traces::is_spec(value)) {
                continue;
            }
            let wrong = |e: serde_json::Error| ApiError::param("antefix", format!("`antefix.{name}`: {e}"));
            if name == "documents" {
                let documents: Vec<Document> = Vec::deserialize(value).map_err(wrong)?;
                asked.documents = documents.into_iter().map(|d| d.text).collect();
                continue;
            }
            if name == "deadline_ms" {
                let ms = u64::deserialize(value).map_err(wrong)?;
                asked.deadline = Some(patience::milliseconds("antefix.deadline_ms", ms)?);
                continue;
            }
            if name == "question_after_cut" {
                asked.question_after_cut = bool::deserialize(value).map_err(wrong)?;
                continue;
            }
            let axis = Axis::named(name).ok_or_else(|| {
                let names: Vec<&str> = Axis::ALL.iter().map(|a| a.name()).collect();
                ApiError::param(
                    "antefix",
                    format!(
                        "there is no `antefix.{name}`\nhint: {}, documents, question_after_cut, deadline_ms, capture",
                        names.join(", ")
                    ),
                )
            })?;
            asked
                .methods
                .0
                .insert(axis, RawChoice::deserialize(value).map_err(wrong)?);
        }
        asked.dense = short.is_some_and(|text| text == DENSE || text == "exact");
        if let Some(text) = short.filter(|_| !asked.dense) {
            let raw = RawChoice::parse(text).map_err(|e| refused("method", &e))?;
            let axis = find(offer.methods, &raw.name)
                .map_err(|e| refused("method", &e))?
                .card()
                .axis;
            if let Some(first) = asked.methods.0.insert(axis, raw.clone()) {
                let twice = ChoiceError::Twice {
                    axis: axis.name(),
                    first: first.name,
                    second: raw.name,
                };
                return Err(refused("method", &twice));
            }
        }
        Ok(asked)
    }

    /// The checked programs on a model of prompts of so many tokens each; `None` for dense attention that nobody chose.
    ///
    /// # Errors
    /// When a name or a knob is wrong, or the methods do not go together.
    pub(crate) fn programs(
        &self,
        offer: &Offer,
        facts: &Facts,
        lengths: impl Iterator<Item = usize>,
    ) -> Result<Vec<Option<Arc<Program>>>, ApiError> {
        // Prompts of one band have one program.
        let mut known: Vec<(Option<usize>, Option<Arc<Program>>)> = Vec::new();
        lengths
            .map(|tokens| {
                let band = offer.bands.at(tokens);
                let from = band.map(|band| band.from);
                if let Some((_, program)) = known.iter().find(|(known, _)| *known == from) {
                    return Ok(program.clone());
                }
                let none = RawMethods::default();
                let program = self.program(offer, facts, band.map_or(&none, |band| &band.methods))?;
                let program = Some(program)
                    .filter(|program| band.is_some() || !program.is_dense())
                    .map(Arc::new);
                known.push((from, program.clone()));
                Ok(program)
            })
            .collect()
    }

    /// What holds if `band` does where the request says nothing.
    fn program(&self, offer: &Offer, facts: &Facts, band: &RawMethods) -> Result<Program, ApiError> {
        let own = self.methods.clone();
        let methods = match self.dense {
            true => own,
            false => own.or(band).or(&offer.defaults),
        };
        let chosen = methods
            .resolve(offer.methods, Trust::Remote)
            .map_err(|e| refused("antefix", &e))?;
        Rig::assemble(facts, &offer.profiles, &chosen).map_err(|e| {
            let servers: Vec<&str> = methods
                .0
                .iter()
                .filter(|(axis, raw)| !self.methods.0.contains_key(axis) && raw.name != DENSE)
                .map(|(axis, _)| axis.name())
                .collect();
            match servers.is_empty() {
                true => refused("antefix", &e),
                false => ApiError::param(
                    "antefix",
                    format!(
                        "{e}\nhint: the server chose the method of {}; \"dense\" there turns it off",
                        servers.join(", ")
                    ),
                ),
            }
        })
    }
}

fn refused(field: &str, error: &dyn std::error::Error) -> ApiError {
    ApiError::param(field, error.to_string())
}

/// Says in an answer that it ended with its time.
pub(crate) fn note_end(body: &mut Value, done: Done) {
    if matches!(done, Done::Deadline { .. }) {
        body["antefix"]["deadline_exceeded"] = json!(true);
    }
}

/// The same of a request's sequences together, with what the methods of the first one did.
pub(crate) fn note_all(body: &mut Value, answers: &[Answer]) {
    note(body, answers.first().and_then(|a| a.method.as_deref()));
    answers.iter().for_each(|a| note_end(body, a.done));
}

/// What a hook tells, `{"site", "rows": [{"pos", "ids", "values"}]}`.
fn told_json(told: &Told) -> Value {
    let row = |(pos, row): &(u32, Vec<(u32, f32)>)| {
        let (ids, values): (Vec<u32>, Vec<f32>) = row.iter().copied().unzip();
        json!({ "pos": pos, "ids": ids, "values": values })
    };
    json!({
        "site": told.site.full_name(told.layer),
        "rows": told.rows.iter().map(row).collect::<Vec<_>>(),
        "dropped_rows": told.dropped,
    })
}

/// Adds what the methods did to an answer.
pub(crate) fn note(body: &mut Value, report: Option<&MethodReport>) {
    if let Some(r) = report {
        body["antefix"] = json!({
            "method": r.method,
            "settings": r.settings,
            "exact": r.exact,
            "kept": r.kept,
            "edits": r.edits,
            "prompt_tokens_before": r.prompt_before,
        });
        if let Some(plan) = &r.plan {
            for (name, density) in [("density", plan.density), ("decode_density", plan.decode_density)] {
                if let Some(density) = density {
                    body["antefix"][name] = json!(density);
                }
            }
            body["antefix"]["plan_s"] = json!(plan.plan_s);
            body["antefix"]["summary_bytes"] = json!(plan.summary_bytes);
            if plan.corrected > 0 {
                body["antefix"]["corrected"] = json!(plan.corrected);
            }
        }
        for told in &r.told {
            body["antefix"][&told.name] = told_json(told);
        }
        if let Some(d) = &r.documents {
            body["antefix"]["documents"] = json!({
                "found": d.found,
                "computed": d.encoded,
                "fresh": d.fresh_rows as f64 / d.all_rows.max(1) as f64,
            });
        }
    }
}
