//! What the generating routes have in common: the knobs of a request, checked, and the answers gathered.

use std::collections::HashMap;
use std::sync::Arc;

use antefix_constrain::Grammar;
use antefix_engine::{Done, Keep, MethodReport, PromptLogprob, RawJob, RawSampling, Usage};
use antefix_models::documents::WithDocuments;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::auth::{Tenant, Turn};
use crate::error::ApiError;
use crate::methods::{Asked, Offer};
use crate::patience::Patience;
use crate::retention;
use crate::state::{App, Guest};
use crate::traces::Watching;
use crate::worker::{Drawn, Generation, Happened};

/// `n` and `best_of` at most, whoever asks.
const MAX_N: usize = 128;

/// A value or a list of it.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(crate) fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(x) => vec![x],
            Self::Many(xs) => xs,
        }
    }
}

/// How to stream.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// Send `usage` in a last chunk without choices.
    #[serde(default)]
    pub(crate) include_usage: bool,
}

/// Knobs of chat and legacy completions: OpenAI's names, and llama.cpp's and vLLM's where OpenAI has none.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(crate) struct Knobs {
    pub(crate) model: Option<String>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f32>,
    #[serde(alias = "typical")]
    pub(crate) typical_p: Option<f32>,
    #[serde(alias = "repeat_penalty")]
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) logit_bias: Option<HashMap<String, f32>>,
    pub(crate) seed: Option<i64>,
    pub(crate) stop: Option<OneOrMany<String>>,
    pub(crate) n: Option<usize>,
    pub(crate) ignore_eos: Option<bool>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) prompt_cache_key: Option<String>,
    pub(crate) prompt_cache_retention: Option<String>,
    /// What marks of Anthropic's ask for.
    #[serde(skip)]
    pub(crate) keep: Option<Keep>,
    pub(crate) priority: Option<i32>,
    /// How long it may take, and from when on.
    #[serde(skip)]
    pub(crate) patience: Patience,
    /// How attention is computed, see `/v1/methods`: `NAME,knob=value,...`.
    pub(crate) method: Option<String>,
    /// Methods by axis, documents, and hooks.
    #[schema(value_type = Option<Object>)]
    pub(crate) antefix: Option<Map<String, Value>>,
    /// OpenAI's `response_format`, and vLLM's names for what it cannot say.
    pub(crate) response_format: Option<Value>,
    pub(crate) guided_json: Option<Value>,
    pub(crate) guided_regex: Option<String>,
    pub(crate) guided_choice: Option<Vec<String>>,
    pub(crate) guided_grammar: Option<String>,
}

/// Fields that change nothing here: accepted without a word.
const WITHOUT_EFFECT: [&str; 5] = ["user", "metadata", "store", "service_tier", "safety_identifier"];

/// Names in `extra` that we do not know.
///
/// # Errors
/// Under `strict`, when there are any.
pub(crate) fn unknown(extra: &Map<String, Value>, strict: bool) -> Result<Vec<String>, ApiError> {
    let names: Vec<String> = extra
        .iter()
        .filter(|(name, value)| !value.is_null() && !WITHOUT_EFFECT.contains(&name.as_str()))
        .map(|(name, _)| name.clone())
        .collect();
    match names.first() {
        Some(first) if strict => Err(ApiError::param(
            first,
            format!("unknown field `{first}`\nhint: the server runs with --strict"),
        )),
        _ => Ok(names),
    }
}

/// What each sequence should report.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Reports {
    pub(crate) logprobs: bool,
    pub(crate) top: usize,
    pub(crate) prompt: bool,
}

impl Knobs {
    pub(crate) fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    pub(crate) fn wants_usage(&self) -> bool {
        self.stream_options.is_some_and(|o| o.include_usage)
    }

    /// What the answer must follow.
    ///
    /// # Errors
    /// When two things are asked for, or a `response_format` that there is not.
    pub(crate) fn grammar(&self) -> Result<Option<Grammar>, ApiError> {
        let mut asked = Vec::new();
        if let Some(format) = &self.response_format {
            match format.get("type").and_then(Value::as_str) {
                Some("text") => {}
                Some("json_object") => asked.push(Grammar::JsonObject),
                Some("json_schema") => {
                    // The Responses API has the schema one level higher.
                    let schema = format
                        .pointer("/json_schema/schema")
                        .or_else(|| format.get("schema"));
                    let schema = schema.ok_or_else(|| {
                        ApiError::param("response_format", "`json_schema.schema` is missing")
                    })?;
                    asked.push(Grammar::JsonSchema(schema.clone()));
                }
                other => {
                    return Err(ApiError::param(
                        "response_format",
                        format!(
                            "there is no type `{}`\nhint: text, json_object or json_schema",
                            other.unwrap_or("?")
                        ),
                    ));
                }
            }
        }
        asked.extend(self.guided_json.clone().map(Grammar::JsonSchema));
        asked.extend(self.guided_regex.clone().map(Grammar::Regex));
        asked.extend(self.guided_choice.clone().map(Grammar::Choice));
        asked.extend(self.guided_grammar.clone().map(Grammar::Lark));
        match asked.len() {
            0 | 1 => Ok(asked.pop()),
            _ => Err(ApiError::param(
                "response_format",
                "an answer can follow one grammar only",
            )),
        }
    }

    /// What it says about methods.
    ///
    /// # Errors
    /// When that has no meaning.
    pub(crate) fn asked(&self, offer: &Offer) -> Result<Asked, ApiError> {
        Asked::read(offer, self.antefix.as_ref(), self.method.as_deref())
    }

    fn sampling(&self) -> Result<RawSampling, ApiError> {
        let d = RawSampling::default();
        let mut logit_bias = Vec::new();
        for (token, &bias) in self.logit_bias.iter().flatten() {
            let id = token
                .parse()
                .map_err(|_| ApiError::param("logit_bias", format!("`{token}` is no token id")))?;
            logit_bias.push((id, bias));
        }
        logit_bias.sort_unstable_by_key(|b| b.0);
        Ok(RawSampling {
            temperature: self.temperature.unwrap_or(1.0),
            // -1 is vLLM's "all".
            top_k: usize::try_from(self.top_k.unwrap_or(0)).unwrap_or(0),
            top_p: self.top_p.unwrap_or(d.top_p),
            min_p: self.min_p.unwrap_or(d.min_p),
            typical: self.typical_p.unwrap_or(d.typical),
            repeat_penalty: self.repetition_penalty.unwrap_or(d.repeat_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(d.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(d.frequency_penalty),
            logit_bias,
            seed: self.seed.map_or_else(rand::random, |s| s as u64),
            ..d
        })
    }

    /// Submits `count` sequences of each prompt; their seeds follow each other.
    pub(crate) async fn start(
        &self,
        app: &App,
        tenant: &Arc<Tenant>,
        (prompts, asked): (Vec<WithDocuments>, Asked),
        count: usize,
        max_tokens: Option<usize>,
        reports: Reports,
        grammar: Option<Grammar>,
    ) -> Result<Running, ApiError> {
        app.check_model(self.model.as_deref())?;
        let most = tenant.n.unwrap_or(MAX_N).min(MAX_N);
        let sequences = count * prompts.len();
        if count == 0 || count > most || sequences > most * 4 {
            return Err(ApiError::param(
                "n",
                format!("`n` is {count}, it must be from 1 to {most}"),
            ));
        }
        let stop = self.stop.clone().map(OneOrMany::into_vec).unwrap_or_default();
        if stop.len() > 64 {
            return Err(ApiError::param("stop", "more than 64 stop strings"));
        }
        let most = tenant.max_tokens.unwrap_or(usize::MAX);
        if max_tokens.is_some_and(|n| n > most) {
            return Err(ApiError::param(
                "max_tokens",
                format!("this key may have at most {most} tokens an answer"),
            ));
        }
        let max_tokens = max_tokens.or(tenant.max_tokens);
        let room = |prompt: usize| {
            max_tokens
                .unwrap_or(app.context)
                .min(app.context.saturating_sub(prompt))
        };
        let tokens: usize = prompts
            .iter()
            .map(|p| p.tokens.len() + room(p.tokens.len()) * count)
            .sum();
        let question_after_cut = asked.question_after_cut;
        let deadline = self.patience.deadline(asked.deadline);
        let hooks = asked.hooks.clone();
        let lengths = prompts.iter().map(|p| p.tokens.len());
        let programs = asked.programs(&app.offer, &app.facts, lengths)?;
        let watching = match &hooks {
            None => None,
            Some(spec) => {
                let traces = app.may_look(tenant)?;
                let plan = traces.plan(&app.model, spec)?;
                let sizes =
                    |p: &WithDocuments| std::iter::repeat_n((p.tokens.len(), room(p.tokens.len())), count);
                let sizes: Vec<_> = prompts.iter().flat_map(sizes).collect();
                let known = programs.iter().flatten().all(|p| p.is_dense());
                Some(traces.watch(&plan, tenant, &sizes, known, || app.id("trace"))?)
            }
        };
        let sampling = self.sampling()?;
        let keep = match self.keep {
            Some(keep) => keep,
            None => retention::openai(
                self.prompt_cache_retention.as_deref(),
                self.prompt_cache_key.as_deref(),
            )?,
        };
        let turn = tenant.enter(tokens)?;
        let constraint = match grammar {
            Some(grammar) => Some(app.constrain(grammar).await?),
            None => None,
        };
        let mut jobs = Vec::with_capacity(sequences);
        for (prompt, program) in prompts.into_iter().zip(programs) {
            for i in 0..count {
                let observer = |w: &Watching| w.observer(jobs.len());
                jobs.push(RawJob {
                    hooks: watching.as_ref().and_then(observer),
                    tokens: prompt.tokens.clone(),
                    documents: prompt.documents.clone(),
                    program: program.clone(),
                    question_after_cut,
                    max_tokens,
                    sampling: RawSampling {
                        seed: sampling.seed.wrapping_add(i as u64),
                        ..sampling.clone()
                    },
                    stop: stop.clone(),
                    ignore_eos: self.ignore_eos.unwrap_or(false),
                    salt: tenant.salt(self.cache_salt.as_deref()),
                    keep,
                    tenant: tenant.number,
                    priority: self.priority.unwrap_or(0),
                    deadline,
                    want_logprobs: reports.logprobs,
                    top_logprobs: reports.top,
                    prompt_logprobs: reports.prompt,
                    constraint: constraint.clone(),
                    ..RawJob::default()
                });
            }
        }
        let generation = app.worker.submit(jobs).await?;
        Ok(Running {
            watching,
            ..Running::new(generation, Some(turn), app.guest())
        })
    }
}

/// A request under way. Dropping it cancels what still runs.
pub(crate) struct Running {
    pub(crate) generation: Generation,
    watching: Option<Watching>,
    _turn: Option<Turn>,
    _guest: Guest,
}

/// All that one sequence brought.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) drawn: Vec<Drawn>,
    pub(crate) prompt: Vec<PromptLogprob>,
    pub(crate) vector: Vec<f32>,
    pub(crate) done: Done,
    pub(crate) usage: Usage,
    pub(crate) method: Option<Box<MethodReport>>,
}

impl Running {
    /// `turn` ends with it.
    pub(crate) fn new(generation: Generation, turn: Option<Turn>, guest: Guest) -> Self {
        Self {
            generation,
            watching: None,
            _turn: turn,
            _guest: guest,
        }
    }

    pub(crate) async fn next(&mut self) -> Option<(usize, Happened)> {
        let event = self.generation.next().await?;
        if let (i, Happened::End { .. }) = &event
            && let Some(watching) = &mut self.watching
        {
            watching.keep(*i);
        }
        Some(event)
    }

    /// The names under which what its sequences captured will be found.
    pub(crate) fn trace_ids(&self) -> Vec<String> {
        self.watching.as_ref().map_or_else(Vec::new, Watching::ids)
    }

    /// Waits for all sequences.
    pub(crate) async fn gather(mut self) -> Result<Vec<Answer>, ApiError> {
        let blank = Answer {
            text: String::new(),
            drawn: Vec::new(),
            prompt: Vec::new(),
            vector: Vec::new(),
            done: Done::Failed,
            usage: Usage::default(),
            method: None,
        };
        let mut answers = vec![blank; self.generation.open];
        while let Some((i, happened)) = self.next().await {
            let answer = &mut answers[i];
            match happened {
                Happened::Prompt(logprobs) => answer.prompt = logprobs,
                Happened::Pooled(vector) => answer.vector = vector,
                Happened::Token(drawn) => {
                    answer.text.push_str(&drawn.text);
                    answer.drawn.push(drawn);
                }
                Happened::End {
                    done,
                    text,
                    usage,
                    method,
                } => {
                    answer.text.push_str(&text);
                    answer.done = done;
                    answer.usage = usage;
                    answer.method = method;
                }
            }
        }
        match answers.iter().find_map(|a| failure(a.done)) {
            Some(error) => Err(error),
            None => Ok(answers),
        }
    }
}

/// What to say of a sequence that did not end well.
pub(crate) fn failure(done: Done) -> Option<ApiError> {
    match done {
        Done::Failed => Some(failed()),
        Done::Deadline { answered: false } => Some(ApiError::timeout()),
        Done::Constraint => Some(ApiError {
            code: Some("constraint_failed"),
            ..ApiError::invalid(
                "the answer could not be brought to follow the grammar: its limits were used up on the way\nhint: a simpler \
                 schema, or bounds on its lists and strings",
            )
        }),
        _ => None,
    }
}

/// A step failed under this request.
pub(crate) fn failed() -> ApiError {
    ApiError::internal("the request failed in the engine; the server's log says why")
}

/// OpenAI's `finish_reason`.
pub(crate) fn finish_reason(done: Done) -> &'static str {
    match done {
        Done::Length | Done::Deadline { .. } => "length",
        Done::EndToken | Done::StopString(_) => "stop",
        Done::Cancelled | Done::Failed | Done::Constraint => "error",
    }
}

/// The cost of a request's sequences: each prompt once, every answer; cached is what was there before it.
pub(crate) fn total(usages: &[Usage], per_prompt: usize) -> Usage {
    let per_prompt = per_prompt.max(1);
    usages
        .chunks(per_prompt)
        .map(|same| Usage {
            prompt_tokens: same.first().map_or(0, |u| u.prompt_tokens),
            cached_tokens: same.iter().map(|u| u.cached_tokens).min().unwrap_or(0),
            loaded_tokens: same.iter().map(|u| u.loaded_tokens).max().unwrap_or(0),
            completion_tokens: same.iter().map(|u| u.completion_tokens).sum(),
        })
        .fold(Usage::default(), |a, b| Usage {
            prompt_tokens: a.prompt_tokens + b.prompt_tokens,
            cached_tokens: a.cached_tokens + b.cached_tokens,
            loaded_tokens: a.loaded_tokens + b.loaded_tokens,
            completion_tokens: a.completion_tokens + b.completion_tokens,
        })
}
