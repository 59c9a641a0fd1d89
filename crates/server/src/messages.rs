//! `/v1/messages`: Anthropic's API.

use std::sync::Arc;
use std::time::Duration;

use antefix_constrain::Grammar;
use antefix_engine::{Done, Keep, Usage};
use antefix_models::template::Message;
use axum::Json;
use axum::extract::{FromRequest, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::auth::Tenant;
use crate::chat::{self, Content, most_calls};
use crate::error::ApiError;
use crate::methods::Asked;
use crate::openapi::answers::AnthropicAnswer;
use crate::patience::Patience;
use crate::retention::cache_control;
use crate::routes::{Body, Caller, Shared};
use crate::state::App;
use crate::stream;
use crate::tools::{self, Call, Piece, Splitter, ToolChoice};
use crate::wish::{Knobs, OneOrMany, Reports, Running, failed, failure, unknown};
use crate::worker::Happened;

/// Fields of Anthropic's that change nothing here.
const WITHOUT_EFFECT: [&str; 4] = ["metadata", "service_tier", "container", "betas"];

/// One message as clients send it.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct AnthropicMessage {
    role: String,
    content: Content,
}

/// A tool that the model may call.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct Tool {
    name: String,
    description: Option<String>,
    input_schema: Value,
    cache_control: Option<Value>,
}

/// A request for a message.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct MessagesRequest {
    model: Option<String>,
    max_tokens: usize,
    #[serde(flatten)]
    asked: CountRequest,
    stop_sequences: Option<Vec<String>>,
    stream: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<i64>,
    top_p: Option<f32>,
}

/// The part of a request that makes the prompt.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CountRequest {
    messages: Vec<AnthropicMessage>,
    system: Option<Content>,
    tools: Option<Vec<Tool>>,
    tool_choice: Option<Value>,
    /// Marks everything up to the last message.
    cache_control: Option<Value>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Map<String, Value>,
}

/// A mark for as long counts as Anthropic's `1h`.
const HOUR: Duration = Duration::from_hours(1);

/// Marks at most, as at Anthropic's.
const MAX_MARKS: usize = 4;

/// A conversation as templates want it, and where the client marked the end of what it wants cached.
struct Prepared {
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    /// Messages up to and with each mark, and how long it asks for.
    marks: Vec<(usize, Duration)>,
    /// What a call that has to be made must follow.
    forced: Option<Grammar>,
    /// Calls at most.
    most_calls: usize,
}

/// How long the marked ones of `blocks` are to be kept.
fn marks_in(blocks: &[Value]) -> Result<Vec<Duration>, ApiError> {
    let marks = blocks.iter().filter_map(|block| block.get("cache_control"));
    marks.filter_map(|mark| cache_control(mark).transpose()).collect()
}

fn text_of(block: &Value) -> Result<&str, ApiError> {
    match (
        block.get("type").and_then(Value::as_str),
        block.get("text").and_then(Value::as_str),
    ) {
        (Some("text"), Some(text)) => Ok(text),
        (kind, _) => Err(ApiError::param(
            "messages",
            format!(
                "a block of type `{}` cannot be read by this model",
                kind.unwrap_or("?")
            ),
        )),
    }
}

fn text_in(content: &Value) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(blocks) => blocks.iter().map(text_of).collect(),
        Value::Null => Ok(String::new()),
        _ => Err(ApiError::param(
            "messages",
            "the content of a tool result is text or blocks",
        )),
    }
}

/// One message may hold several of the template's: results of tools stand alone. Returns the marks in it.
fn open_message(message: AnthropicMessage, out: &mut Vec<Message>) -> Result<Vec<Duration>, ApiError> {
    if !matches!(message.role.as_str(), "user" | "assistant") {
        return Err(ApiError::param(
            "messages",
            format!("there is no role `{}`\nhint: user or assistant", message.role),
        ));
    }
    let blocks = match message.content {
        Content::Text(text) => {
            out.push(Message::new(&message.role, text));
            return Ok(Vec::new());
        }
        Content::Parts(blocks) => blocks,
    };
    let mut text = String::new();
    let mut calls = Vec::new();
    for block in &blocks {
        match block.get("type").and_then(Value::as_str) {
            Some("tool_use") => calls.push(json!({
                "id": block.get("id"),
                "type": "function",
                "function": {"name": block.get("name"), "arguments": block.get("input")},
            })),
            Some("tool_result") => {
                let content = text_in(block.get("content").unwrap_or(&Value::Null))?;
                let mut result = Message::new("tool", content);
                let id = block.get("tool_use_id").cloned().unwrap_or_default();
                result.extra.insert("tool_call_id".into(), id);
                out.push(result);
            }
            Some("thinking" | "redacted_thinking") => {}
            _ => text.push_str(text_of(block)?),
        }
    }
    if !text.is_empty() || !calls.is_empty() {
        let mut whole = Message::new(&message.role, text);
        if !calls.is_empty() {
            whole.extra.insert("tool_calls".into(), Value::Array(calls));
        }
        out.push(whole);
    }
    marks_in(&blocks)
}

fn prepare(request: CountRequest, strict: bool) -> Result<(Prepared, Vec<String>), ApiError> {
    let mut extra = request.extra;
    WITHOUT_EFFECT.iter().for_each(|name| drop(extra.remove(*name)));
    let ignored = unknown(&extra, strict)?;
    let mut messages = Vec::new();
    let mut marks = Vec::new();
    let mut mark = |at: usize, lives: Vec<Duration>| marks.extend(lives.into_iter().map(|life| (at, life)));
    for tool in request.tools.iter().flatten() {
        mark(0, marks_in(&[json!({"cache_control": tool.cache_control})])?);
    }
    match request.system {
        None => {}
        Some(Content::Text(text)) => messages.push(Message::new("system", text)),
        Some(Content::Parts(blocks)) => {
            let text: Result<String, _> = blocks.iter().map(text_of).collect();
            messages.push(Message::new("system", text?));
            mark(1, marks_in(&blocks)?);
        }
    }
    if request.messages.is_empty() {
        return Err(ApiError::param("messages", "`messages` is empty"));
    }
    for message in request.messages {
        let lives = open_message(message, &mut messages)?;
        mark(messages.len(), lives);
    }
    let whole = marks_in(&[json!({"cache_control": request.cache_control})])?;
    mark(messages.len(), whole);
    if marks.len() > MAX_MARKS {
        return Err(ApiError::param(
            "cache_control",
            format!("there are {} marks, at most {MAX_MARKS} are allowed", marks.len()),
        ));
    }
    let choice = ToolChoice::read_anthropic(request.tool_choice.as_ref())?;
    let wants = choice != ToolChoice::None;
    let serial = request
        .tool_choice
        .as_ref()
        .and_then(|c| c.get("disable_parallel_tool_use"))
        .and_then(Value::as_bool);
    let tools = request.tools.filter(|t| wants && !t.is_empty()).map(|tools| {
        let open = |t: Tool| {
            json!({"type": "function", "function": {
                "name": t.name, "description": t.description, "parameters": t.input_schema,
            }})
        };
        tools.into_iter().map(open).collect()
    });
    let tools: Option<Vec<Value>> = tools;
    let forced = choice.grammar(tools.as_deref())?;
    Ok((
        Prepared {
            messages,
            tools,
            marks,
            forced,
            most_calls: most_calls(serial.map(|s| !s)),
        },
        ignored,
    ))
}

/// How many of the prompt's first tokens the client marked.
#[derive(Debug, Clone, Copy, Default)]
struct Marked {
    /// By any mark.
    all: usize,
    /// By a mark for an hour.
    hour: usize,
}

impl Marked {
    fn of(app: &App, prepared: &Prepared, tokens: &[u32]) -> Result<Self, ApiError> {
        let last = |least: Duration| {
            let marks = prepared.marks.iter().filter(|m| m.1 >= least);
            marks.map(|m| m.0).max()
        };
        let reach = |n: Option<usize>| n.map_or(Ok(0), |n| marked_tokens(app, prepared, tokens, n));
        Ok(Self {
            all: reach(last(Duration::ZERO))?,
            hour: reach(last(HOUR))?,
        })
    }

    /// Anthropic's three kinds of input tokens; they add up to the prompt.
    fn usage(self, u: Usage) -> Value {
        let created = self.all.saturating_sub(u.cached_tokens);
        let hour = self.hour.saturating_sub(u.cached_tokens);
        json!({
            "input_tokens": u.prompt_tokens - u.cached_tokens - created,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": u.cached_tokens,
            "cache_creation": {
                "ephemeral_5m_input_tokens": created - hour,
                "ephemeral_1h_input_tokens": hour,
            },
            "output_tokens": u.completion_tokens,
        })
    }
}

/// How many tokens the first `n` messages are: as far as the prompt agrees with that of those messages alone.
fn marked_tokens(app: &App, prepared: &Prepared, tokens: &[u32], n: usize) -> Result<usize, ApiError> {
    if n >= prepared.messages.len() {
        return Ok(tokens.len());
    }
    // A system message alone is no conversation to some templates: an empty question follows it.
    let mut part = prepared.messages[..n].to_vec();
    part.push(Message::new("user", "\u{fffc}"));
    let text = chat::prompt(app, &part, prepared.tools.as_deref())?;
    let other = app.tokenizer().encode_prompt(&text);
    Ok(tokens.iter().zip(&other).take_while(|(a, b)| a == b).count())
}

/// The answer of `count_tokens`.
fn count(app: &App, request: CountRequest) -> Result<Value, ApiError> {
    let mut request = request;
    if let Some(model) = request.extra.remove("model") {
        app.check_model(model.as_str())?;
    }
    let (prepared, _) = prepare(request, app.strict)?;
    let text = chat::prompt(app, &prepared.messages, prepared.tools.as_deref())?;
    Ok(json!({"input_tokens": app.tokenizer().encode_prompt(&text).len()}))
}

fn call_block(app: &App, call: &Call) -> Value {
    let input: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
    json!({"type": "tool_use", "id": app.id("toolu"), "name": call.name, "input": input})
}

/// Why it ended, and with which of the client's stop sequences.
fn stopped(done: Done, called: bool, stops: &[String]) -> (&'static str, Option<&str>) {
    match done {
        _ if called => ("tool_use", None),
        Done::Length | Done::Deadline { .. } => ("max_tokens", None),
        Done::StopString(i) => ("stop_sequence", stops.get(i).map(String::as_str)),
        Done::EndToken | Done::Cancelled | Done::Failed | Done::Constraint => ("end_turn", None),
    }
}

/// What the form of an answer depends on.
struct Form {
    /// Calls are looked for in the answer.
    calls: bool,
    /// The prompt ends inside a call.
    opened: bool,
    most_calls: usize,
    marked: Marked,
    stops: Vec<String>,
    prompt_tokens: usize,
}

/// An answer to a conversation, as Anthropic's API.
#[utoipa::path(
    post,
    path = "/v1/messages",
    tag = "anthropic",
    request_body = MessagesRequest,
    params(("x-request-timeout-ms" = Option<u64>, Header, description = "How long it may take")),
    responses((status = 200, description = "Anthropic's message; with `stream` its events", content(
        (AnthropicAnswer = "application/json"),
        (String = "text/event-stream"),
    ))),
)]
pub(crate) async fn create(
    State(app): Shared,
    caller: Result<Caller, ApiError>,
    patience: Result<Patience, ApiError>,
    request: Request,
) -> Response {
    let answer = async {
        let Caller(tenant) = caller?;
        let patience = patience?;
        let Body(ask) = Body::<MessagesRequest>::from_request(request, &app).await?;
        answer(Arc::clone(&app), tenant, patience, ask).await
    };
    answer.await.unwrap_or_else(|e| e.anthropic())
}

/// How many input tokens a message would have.
#[utoipa::path(
    post,
    path = "/v1/messages/count_tokens",
    tag = "anthropic",
    request_body = CountRequest,
    responses((status = 200, description = "`input_tokens`", body = Object)),
)]
pub(crate) async fn count_tokens(
    State(app): Shared,
    caller: Result<Caller, ApiError>,
    request: Request,
) -> Response {
    let answer = async {
        caller?;
        let Body(ask) = Body::<CountRequest>::from_request(request, &app).await?;
        count(&app, ask)
    };
    match answer.await {
        Ok(count) => Json(count).into_response(),
        Err(error) => error.anthropic(),
    }
}

async fn answer(
    app: Arc<App>,
    tenant: Arc<Tenant>,
    patience: Patience,
    request: MessagesRequest,
) -> Result<Response, ApiError> {
    let streams = request.stream.unwrap_or(false);
    let stops = request.stop_sequences.unwrap_or_default();
    let mut knobs = Knobs {
        model: request.model,
        temperature: request.temperature,
        top_k: request.top_k,
        top_p: request.top_p,
        stop: Some(OneOrMany::Many(stops.clone())),
        patience,
        ..Knobs::default()
    };
    let (prepared, ignored) = prepare(request.asked, app.strict)?;
    let mut text = chat::prompt(&app, &prepared.messages, prepared.tools.as_deref())?;
    let opened = prepared.forced.is_some();
    if opened {
        text.push_str(tools::OPENING);
    }
    let tokens = app.tokenizer().encode_prompt(&text);
    let marked = Marked::of(&app, &prepared, &tokens)?;
    let longest = prepared.marks.iter().map(|mark| mark.1).max();
    knobs.keep = longest.map(|ttl| Keep {
        ttl: Some(ttl),
        marked: marked.all,
        ram_only: true,
    });
    let form = Form {
        calls: prepared.tools.is_some(),
        opened,
        most_calls: prepared.most_calls,
        marked,
        stops,
        prompt_tokens: tokens.len(),
    };
    let running = knobs
        .start(
            &app,
            &tenant,
            (vec![tokens.into()], Asked::default()),
            1,
            Some(request.max_tokens),
            Reports::default(),
            prepared.forced.clone(),
        )
        .await?;
    let mut response = match streams {
        true => streamed(app, running, form),
        false => whole(&app, running, &form).await?,
    };
    crate::note_ignored(&mut response, &ignored);
    Ok(response)
}

async fn whole(app: &App, running: Running, form: &Form) -> Result<Response, ApiError> {
    let answers = running.gather().await?;
    let Some(answer) = answers.into_iter().next() else {
        return Err(failed());
    };
    let pieces = match form.calls {
        true => {
            let mut splitter = Splitter::new(form.opened);
            let pieces = splitter.push(&answer.text);
            pieces.into_iter().chain(splitter.finish()).collect()
        }
        false => vec![Piece::Text(answer.text.clone())],
    };
    let mut content: Vec<Value> = Vec::new();
    let mut calls = 0;
    for piece in pieces {
        if calls == form.most_calls {
            break;
        }
        match piece {
            Piece::Call(call) => {
                calls += 1;
                content.push(call_block(app, &call));
            }
            Piece::Text(text) if text.trim().is_empty() => {}
            Piece::Text(text) => match content.last_mut().filter(|b| b["type"] == "text") {
                Some(block) => {
                    let joined = block["text"].as_str().unwrap_or_default().to_string() + &text;
                    block["text"] = json!(joined);
                }
                None => content.push(json!({"type": "text", "text": text})),
            },
        }
    }
    let (reason, stop) = stopped(answer.done, calls > 0, &form.stops);
    Ok(Json(json!({
        "id": app.id("msg"),
        "type": "message",
        "role": "assistant",
        "model": app.name(),
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop,
        "usage": form.marked.usage(answer.usage),
    }))
    .into_response())
}

/// The blocks of a streamed message.
struct Blocks {
    index: usize,
    text_open: bool,
    calls: usize,
}

impl Blocks {
    fn text(&mut self, text: &str, events: &mut Vec<Value>) {
        if text.is_empty() {
            return;
        }
        if !self.text_open {
            self.text_open = true;
            events.push(json!({
                "type": "content_block_start", "index": self.index, "content_block": {"type": "text", "text": ""},
            }));
        }
        events.push(json!({
            "type": "content_block_delta", "index": self.index, "delta": {"type": "text_delta", "text": text},
        }));
    }

    fn close(&mut self, events: &mut Vec<Value>) {
        if self.text_open {
            events.push(json!({"type": "content_block_stop", "index": self.index}));
            self.index += 1;
            self.text_open = false;
        }
    }

    fn call(&mut self, app: &App, call: &Call, events: &mut Vec<Value>) {
        self.close(events);
        self.calls += 1;
        let mut block = call_block(app, call);
        let input = block["input"].take().to_string();
        block["input"] = json!({});
        events.extend([
            json!({"type": "content_block_start", "index": self.index, "content_block": block}),
            json!({
                "type": "content_block_delta", "index": self.index,
                "delta": {"type": "input_json_delta", "partial_json": input},
            }),
            json!({"type": "content_block_stop", "index": self.index}),
        ]);
        self.index += 1;
    }
}

fn streamed(app: Arc<App>, mut running: Running, form: Form) -> Response {
    stream::respond(async move |lines| {
        let start = json!({"type": "message_start", "message": {
            "id": app.id("msg"), "type": "message", "role": "assistant", "model": app.name(), "content": [],
            "stop_reason": null, "stop_sequence": null,
            // What of it is cached is known when it was read: the last event says so.
            "usage": {"input_tokens": form.prompt_tokens, "output_tokens": 0},
        }});
        if !lines.send_typed(&start).await {
            return;
        }
        let mut blocks = Blocks {
            index: 0,
            text_open: false,
            calls: 0,
        };
        let mut splitter = Splitter::new(form.opened);
        loop {
            let Ok(next) = lines.next(&mut running).await else {
                return;
            };
            let Some((_, happened)) = next else { return };
            let (text, end) = match happened {
                Happened::Prompt(_) | Happened::Pooled(_) => continue,
                Happened::Token(drawn) => (drawn.text, None),
                Happened::End {
                    done, text, usage, ..
                } => (text, Some((done, usage))),
            };
            if let Some(error) = end.as_ref().and_then(|end| failure(end.0)) {
                lines.send_typed(&error.anthropic_body()).await;
                return;
            }
            let mut pieces = match form.calls {
                true => splitter.push(&text),
                false => vec![Piece::Text(text)],
            };
            if end.is_some() {
                pieces.extend(splitter.finish());
            }
            let mut events = Vec::new();
            for piece in &pieces {
                if blocks.calls == form.most_calls {
                    break;
                }
                match piece {
                    Piece::Text(text) => blocks.text(text, &mut events),
                    Piece::Call(call) => blocks.call(&app, call, &mut events),
                }
            }
            if let Some((done, spent)) = end {
                blocks.close(&mut events);
                let (reason, stop) = stopped(done, blocks.calls > 0, &form.stops);
                events.push(json!({
                    "type": "message_delta",
                    "delta": {"stop_reason": reason, "stop_sequence": stop},
                    "usage": form.marked.usage(spent),
                }));
                events.push(json!({"type": "message_stop"}));
            }
            for event in &events {
                if !lines.send_typed(event).await {
                    return;
                }
            }
        }
    })
}
