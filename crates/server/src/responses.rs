//! `/v1/responses`: OpenAI's newer API. An answer is remembered in memory, as long as there is room, so that the next request can go
//! on from it with `previous_response_id`; with `store: false` it is not, and a client that sends everything needs nothing remembered.

mod input;
mod writer;

use std::sync::{Arc, PoisonError};

use antefix_engine::{Done, MethodReport, Usage};
use antefix_models::template::Message;
use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::auth::Tenant;
use crate::chat::{self, logprob_json, most_calls};
use crate::error::ApiError;
use crate::methods::{note, note_end};
use crate::openapi::answers::ResponseObject;
use crate::patience::Patience;
use crate::remembered::Entry;
use crate::routes::{Body, Caller, Shared};
use crate::state::{App, now};
use crate::stream::{self, Lines};
use crate::tools::{self, ToolChoice};
use crate::wish::{Knobs, Reports, Running, failure, unknown};
use crate::worker::Happened;

use input::Input;
use writer::Writer;

/// Fields that change nothing here: accepted without a word.
const WITHOUT_EFFECT: [&str; 4] = [
    "reasoning",
    "truncation",
    "stream_options",
    "prompt_cache_options",
];

/// A request for a response.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ResponsesRequest {
    model: Option<String>,
    input: Input,
    /// A system prompt for this answer alone.
    instructions: Option<String>,
    /// Go on from this answer.
    previous_response_id: Option<String>,
    /// False: do not remember the answer.
    store: Option<bool>,
    stream: Option<bool>,
    max_output_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_logprobs: Option<usize>,
    /// `message.output_text.logprobs`, or nothing.
    include: Option<Vec<String>>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    /// `format`: `text`, `json_object` or `json_schema`.
    text: Option<Value>,
    metadata: Option<Value>,
    cache_salt: Option<String>,
    prompt_cache_key: Option<String>,
    /// `in_memory` or `24h`.
    prompt_cache_retention: Option<String>,
    seed: Option<i64>,
    /// How attention is computed, see `/v1/methods`.
    method: Option<String>,
    background: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Map<String, Value>,
}

/// What the response repeats of the request.
struct Form {
    id: String,
    created: u64,
    /// Fields that are the same in every state of the response.
    fixed: Map<String, Value>,
    tenant: u64,
    store: bool,
    /// Everything before the answer, without instructions.
    conversation: Vec<Message>,
    calls: bool,
    opened: bool,
    most_calls: usize,
    logprobs: bool,
}

impl Form {
    fn response(&self, status: &str, output: &[Value], usage: Option<Usage>, cut: bool) -> Value {
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": null,
            "incomplete_details": cut.then(|| json!({"reason": "max_output_tokens"})),
            "output": output,
            "usage": usage.map(usage_json),
        });
        if let Some(object) = response.as_object_mut() {
            object.extend(self.fixed.clone());
        }
        response
    }

    /// The response at its end, remembered if it should be.
    fn finish(mut self, app: &App, output: Vec<Value>, end: &End) -> Value {
        let cut = is_cut(end.done);
        let status = if cut { "incomplete" } else { "completed" };
        let mut response = self.response(status, &output, Some(end.usage), cut);
        note(&mut response, end.method.as_deref());
        note_end(&mut response, end.done);
        if self.store {
            self.conversation.extend(input::output_messages(&output));
            let entry = Entry {
                tenant: self.tenant,
                conversation: self.conversation,
                response: response.clone(),
            };
            let mut remembered = app.remembered.lock().unwrap_or_else(PoisonError::into_inner);
            remembered.insert(self.id, entry);
        }
        response
    }
}

/// Whether there would have been more.
fn is_cut(done: Done) -> bool {
    matches!(done, Done::Length | Done::Deadline { .. })
}

fn usage_json(u: Usage) -> Value {
    json!({
        "input_tokens": u.prompt_tokens,
        "input_tokens_details": {"cached_tokens": u.cached_tokens},
        "output_tokens": u.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": u.prompt_tokens + u.completion_tokens,
    })
}

fn not_remembered(id: &str) -> ApiError {
    ApiError {
        param: Some("previous_response_id".into()),
        ..ApiError::not_found(
            format!(
                "the response `{id}` is not known\nhint: responses are kept in memory, the oldest are forgotten first; send the \
                 whole conversation as `input`"
            ),
            "previous_response_not_found",
        )
    }
}

/// A response.
#[utoipa::path(
    post,
    path = "/v1/responses",
    tag = "generate",
    request_body = ResponsesRequest,
    params(("x-request-timeout-ms" = Option<u64>, Header, description = "How long it may take")),
    responses((status = 200, description = "OpenAI's response; with `stream` its events", content(
        (ResponseObject = "application/json"),
        (String = "text/event-stream"),
    ))),
)]
pub(crate) async fn create(
    State(app): Shared,
    Caller(tenant): Caller,
    patience: Patience,
    Body(request): Body<ResponsesRequest>,
) -> Result<Response, ApiError> {
    answer(app, tenant, patience, request).await
}

/// A response that is remembered.
#[utoipa::path(
    get,
    path = "/v1/responses/{id}",
    tag = "generate",
    params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "The response as it was sent", body = ResponseObject)),
)]
pub(crate) async fn read(
    State(app): Shared,
    Caller(tenant): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let remembered = app.remembered.lock().unwrap_or_else(PoisonError::into_inner);
    let entry = remembered.get(&id, tenant.number);
    entry
        .map(|e| Json(e.response.clone()))
        .ok_or_else(|| not_remembered(&id))
}

/// Forgets a response.
#[utoipa::path(
    delete,
    path = "/v1/responses/{id}",
    tag = "generate",
    params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "It is forgotten", body = Object)),
)]
pub(crate) async fn remove(
    State(app): Shared,
    Caller(tenant): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut remembered = app.remembered.lock().unwrap_or_else(PoisonError::into_inner);
    match remembered.remove(&id, tenant.number) {
        true => Ok(Json(json!({"id": id, "object": "response", "deleted": true}))),
        false => Err(not_remembered(&id)),
    }
}

/// The conversation up to the answer: what was remembered, then the input.
fn conversation(app: &App, tenant: &Tenant, request: &ResponsesRequest) -> Result<Vec<Message>, ApiError> {
    let mut messages = match &request.previous_response_id {
        None => Vec::new(),
        Some(id) => {
            let remembered = app.remembered.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = remembered.get(id, tenant.number);
            entry.ok_or_else(|| not_remembered(id))?.conversation.clone()
        }
    };
    messages.extend(request.input.messages()?);
    Ok(messages)
}

async fn answer(
    app: Arc<App>,
    tenant: Arc<Tenant>,
    patience: Patience,
    request: ResponsesRequest,
) -> Result<Response, ApiError> {
    let mut extra = request.extra.clone();
    WITHOUT_EFFECT.iter().for_each(|name| drop(extra.remove(*name)));
    let ignored = unknown(&extra, app.strict)?;
    if request.background == Some(true) {
        return Err(ApiError::param(
            "background",
            "answers are not computed in the background",
        ));
    }
    let include = request.include.as_deref().unwrap_or_default();
    let logprobs = include.iter().any(|i| i == "message.output_text.logprobs");
    let conversation = conversation(&app, &tenant, &request)?;
    let mut messages = conversation.clone();
    if let Some(text) = &request.instructions {
        messages.insert(0, Message::new("system", text.as_str()));
    }
    let choice = ToolChoice::read(request.tool_choice.as_ref())?;
    let tools = match choice {
        ToolChoice::None => None,
        _ => input::functions(request.tools.as_deref().unwrap_or_default())?,
    };
    let knobs = Knobs {
        model: request.model.clone(),
        temperature: request.temperature,
        top_p: request.top_p,
        seed: request.seed,
        patience,
        cache_salt: request.cache_salt.clone(),
        prompt_cache_key: request.prompt_cache_key.clone(),
        prompt_cache_retention: request.prompt_cache_retention.clone(),
        method: request.method.clone(),
        response_format: request.text.as_ref().and_then(|t| t.get("format")).cloned(),
        ..Knobs::default()
    };
    let asked = knobs.asked(&app.offer)?;
    let mut grammar = knobs.grammar()?;
    let forced = choice.grammar(tools.as_deref())?;
    let mut text = chat::prompt(&app, &messages, tools.as_deref())?;
    if forced.is_some() {
        if grammar.is_some() {
            return Err(ApiError::param(
                "tool_choice",
                "a forced call and a `text.format` exclude each other",
            ));
        }
        text.push_str(tools::OPENING);
        grammar.clone_from(&forced);
    }
    let reports = Reports {
        logprobs,
        top: request.top_logprobs.filter(|_| logprobs).unwrap_or(0),
        prompt: false,
    };
    if reports.top > 20 {
        return Err(ApiError::param("top_logprobs", "`top_logprobs` is at most 20"));
    }
    let prompt = vec![app.tokenizer().encode_prompt(&text).into()];
    let running = knobs
        .start(
            &app,
            &tenant,
            (prompt, asked),
            1,
            request.max_output_tokens,
            reports,
            grammar,
        )
        .await?;
    let fixed = json!({
        "model": app.name(),
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata.unwrap_or_else(|| json!({})),
        "parallel_tool_calls": request.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": null, "summary": null},
        "store": request.store.unwrap_or(true),
        "temperature": request.temperature.unwrap_or(1.0),
        "text": request.text.unwrap_or_else(|| json!({"format": {"type": "text"}})),
        "tool_choice": request.tool_choice.unwrap_or_else(|| json!("auto")),
        "tools": request.tools.unwrap_or_default(),
        "top_p": request.top_p.unwrap_or(1.0),
        "truncation": "disabled",
    });
    let form = Form {
        id: app.id("resp"),
        created: now(),
        fixed: fixed.as_object().cloned().unwrap_or_default(),
        tenant: tenant.number,
        store: request.store.unwrap_or(true),
        conversation,
        calls: tools.is_some(),
        opened: forced.is_some(),
        most_calls: most_calls(request.parallel_tool_calls),
        logprobs,
    };
    let mut response = match request.stream.unwrap_or(false) {
        true => streamed(app, form, running),
        false => whole(&app, form, running).await?,
    };
    crate::note_ignored(&mut response, &ignored);
    Ok(response)
}

/// How an answer ended.
struct End {
    done: Done,
    usage: Usage,
    method: Option<Box<MethodReport>>,
}

/// What one event of the engine brings: text, log-probabilities, and the end.
fn brought(app: &App, form: &Form, happened: Happened) -> (String, Vec<Value>, Option<End>) {
    match happened {
        Happened::Prompt(_) | Happened::Pooled(_) => (String::new(), Vec::new(), None),
        Happened::Token(drawn) => {
            let logprobs = match form.logprobs {
                true => vec![logprob_json(app.tokenizer(), &drawn)],
                false => Vec::new(),
            };
            (drawn.text, logprobs, None)
        }
        Happened::End {
            done,
            text,
            usage,
            method,
        } => (text, Vec::new(), Some(End { done, usage, method })),
    }
}

async fn whole(app: &App, form: Form, mut running: Running) -> Result<Response, ApiError> {
    let mut writer = Writer::new(app, &form);
    while let Some((_, happened)) = running.next().await {
        let (text, logprobs, end) = brought(app, &form, happened);
        writer.push(&text, logprobs, end.is_some());
        if let Some(end) = end {
            if let Some(error) = failure(end.done) {
                return Err(error);
            }
            let output = writer.output();
            return Ok(Json(form.finish(app, output, &end)).into_response());
        }
    }
    Err(crate::wish::failed())
}

/// Numbers the events of a stream.
struct Numbered<'a> {
    lines: &'a Lines,
    next: u64,
}

impl Numbered<'_> {
    async fn send(&mut self, mut event: Value) -> bool {
        event["sequence_number"] = json!(self.next);
        self.next += 1;
        self.lines.send_typed(&event).await
    }
}

fn streamed(app: Arc<App>, form: Form, mut running: Running) -> Response {
    stream::respond(async move |lines| {
        let mut out = Numbered {
            lines: &lines,
            next: 0,
        };
        let begun = form.response("in_progress", &[], None, false);
        for kind in ["response.created", "response.in_progress"] {
            if !out.send(json!({"type": kind, "response": begun})).await {
                return;
            }
        }
        let mut writer = Writer::new(&app, &form);
        loop {
            let Ok(next) = lines.next(&mut running).await else {
                return;
            };
            let Some((_, happened)) = next else { return };
            let (text, logprobs, end) = brought(&app, &form, happened);
            if let Some(error) = end.as_ref().and_then(|end| failure(end.done)) {
                let mut response = form.response("failed", &writer.output(), None, false);
                response["error"] =
                    json!({"code": error.code.unwrap_or("server_error"), "message": error.message});
                out.send(json!({"type": "response.failed", "response": response}))
                    .await;
                return;
            }
            for event in writer.push(&text, logprobs, end.is_some()) {
                if !out.send(event).await {
                    return;
                }
            }
            if let Some(end) = end {
                let output = writer.output();
                drop(writer);
                let response = form.finish(&app, output, &end);
                let kind = match end.done {
                    done if is_cut(done) => "response.incomplete",
                    _ => "response.completed",
                };
                out.send(json!({"type": kind, "response": response})).await;
                return;
            }
        }
    })
}
