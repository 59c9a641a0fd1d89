//! `/v1/messages`: Anthropic's API.

use std::sync::Arc;
use std::time::Duration;

use antefix_constrain::Grammar;
use antefix_engine::{Done, Keep, Usage};
use antefix_models::template::Message;
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::auth::Tenant;
use crate::chat::{self, Content};
use crate::error::ApiError;
use crate::methods::Asked;
use crate::retention::cache_control;
use crate::state::App;
use crate::stream;
use crate::tools::{self, Call, Piece, Splitter, ToolChoice};
use crate::wish::{Knobs, OneOrMany, Reports, Running, failed, unknown};
use crate::worker::Happened;

/// Fields of Anthropic's that change nothing here.
const WITHOUT_EFFECT: [&str; 4] = ["metadata", "service_tier", "container", "betas"];

#[derive(Debug, Clone, Deserialize)]
struct AnthropicMessage {
    role: String,
    content: Content,
}

#[derive(Debug, Clone, Deserialize)]
struct Tool {
    name: String,
    description: Option<String>,
    input_schema: Value,
    cache_control: Option<Value>,
}

/// A request for a message.
#[derive(Debug, Deserialize)]
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
#[derive(Debug, Deserialize)]
pub(crate) struct CountRequest {
    messages: Vec<AnthropicMessage>,
    system: Option<Content>,
    tools: Option<Vec<Tool>>,
    tool_choice: Option<Value>,
    #[serde(flatten)]
    extra: Map<String, Value>,
}

/// A conversation as templates want it, and where the client marked the end of what it wants cached.
struct Prepared {
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    /// Messages up to and with the last mark.
    marked: Option<usize>,
    /// The longest life that a mark asks for.
    ttl: Option<Duration>,
    /// What a call that has to be made must follow.
    forced: Option<Grammar>,
}

/// How long a block is to be kept, if it is marked.
fn mark(block: &Value) -> Result<Option<Duration>, ApiError> {
    block.get("cache_control").map_or(Ok(None), cache_control)
}

/// The longest of the marks on `blocks`.
fn marks(blocks: &[Value]) -> Result<Option<Duration>, ApiError> {
    blocks
        .iter()
        .try_fold(None, |longest, block| Ok(longest.max(mark(block)?)))
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

/// One message may hold several of the template's: results of tools stand alone. Returns how long its blocks are to be kept.
fn open_message(message: AnthropicMessage, out: &mut Vec<Message>) -> Result<Option<Duration>, ApiError> {
    if !matches!(message.role.as_str(), "user" | "assistant") {
        return Err(ApiError::param(
            "messages",
            format!("there is no role `{}`\nhint: user or assistant", message.role),
        ));
    }
    let blocks = match message.content {
        Content::Text(text) => {
            out.push(Message::new(&message.role, text));
            return Ok(None);
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
    marks(&blocks)
}

fn prepare(request: CountRequest, strict: bool) -> Result<(Prepared, Vec<String>), ApiError> {
    let mut extra = request.extra;
    WITHOUT_EFFECT.iter().for_each(|name| drop(extra.remove(*name)));
    let ignored = unknown(&extra, strict)?;
    let mut messages = Vec::new();
    let (mut marked, mut ttl) = (None, None);
    match request.system {
        None => {}
        Some(Content::Text(text)) => messages.push(Message::new("system", text)),
        Some(Content::Parts(blocks)) => {
            let text: Result<String, _> = blocks.iter().map(text_of).collect();
            messages.push(Message::new("system", text?));
            ttl = marks(&blocks)?;
            marked = ttl.map(|_| 1);
        }
    }
    if request.messages.is_empty() {
        return Err(ApiError::param("messages", "`messages` is empty"));
    }
    for message in request.messages {
        let life = open_message(message, &mut messages)?;
        if life.is_some() {
            marked = Some(messages.len());
        }
        ttl = ttl.max(life);
    }
    let choice = ToolChoice::read_anthropic(request.tool_choice.as_ref())?;
    let wants = choice != ToolChoice::None;
    for tool in request.tools.iter().flatten().filter(|_| wants) {
        let life = tool.cache_control.as_ref().map_or(Ok(None), cache_control)?;
        if life.is_some() {
            marked.get_or_insert(0);
        }
        ttl = ttl.max(life);
    }
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
            marked,
            ttl,
            forced,
        },
        ignored,
    ))
}

/// How many of the prompt's first tokens the client marked: as far as the prompt agrees with that of the marked messages alone.
fn marked_tokens(app: &App, prepared: &Prepared, tokens: &[u32]) -> Result<usize, ApiError> {
    let Some(n) = prepared.marked else {
        return Ok(0);
    };
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
pub(crate) fn count(app: &App, request: CountRequest) -> Result<Value, ApiError> {
    let mut request = request;
    if let Some(model) = request.extra.remove("model") {
        app.check_model(model.as_str())?;
    }
    let (prepared, _) = prepare(request, app.strict)?;
    let text = chat::prompt(app, &prepared.messages, prepared.tools.as_deref())?;
    Ok(json!({"input_tokens": app.tokenizer().encode_prompt(&text).len()}))
}

/// Anthropic's three kinds of input tokens; they add up to the prompt.
fn usage(u: Usage, marked: usize) -> Value {
    let created = marked.saturating_sub(u.cached_tokens);
    json!({
        "input_tokens": u.prompt_tokens - u.cached_tokens - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": u.cached_tokens,
        "output_tokens": u.completion_tokens,
    })
}

fn call_block(app: &App, call: &Call) -> Value {
    let input: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
    json!({"type": "tool_use", "id": app.id("toolu"), "name": call.name, "input": input})
}

/// Why it ended; `stop_sequence` when one of the client's came.
fn stop_reason(done: Done, calls: bool) -> &'static str {
    match done {
        _ if calls => "tool_use",
        Done::Length => "max_tokens",
        Done::StopString => "stop_sequence",
        Done::EndToken | Done::Cancelled | Done::Failed => "end_turn",
    }
}

pub(crate) async fn answer(
    app: Arc<App>,
    tenant: Arc<Tenant>,
    request: MessagesRequest,
) -> Result<Response, ApiError> {
    let streams = request.stream.unwrap_or(false);
    let mut knobs = Knobs {
        model: request.model,
        temperature: request.temperature,
        top_k: request.top_k,
        top_p: request.top_p,
        stop: request.stop_sequences.map(OneOrMany::Many),
        ..Knobs::default()
    };
    let (prepared, ignored) = prepare(request.asked, app.strict)?;
    let mut text = chat::prompt(&app, &prepared.messages, prepared.tools.as_deref())?;
    let opened = prepared.forced.is_some();
    if opened {
        text.push_str(tools::OPENING);
    }
    let tokens = app.tokenizer().encode_prompt(&text);
    let marked = marked_tokens(&app, &prepared, &tokens)?;
    let prompt_tokens = tokens.len();
    knobs.keep = prepared.ttl.map(|ttl| Keep {
        ttl: Some(ttl),
        marked,
        ram_only: true,
    });
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
    let calls = prepared.tools.is_some().then_some(opened);
    let mut response = match streams {
        true => streamed(app, running, calls, marked, prompt_tokens),
        false => whole(&app, running, calls, marked).await?,
    };
    crate::note_ignored(&mut response, &ignored);
    Ok(response)
}

async fn whole(
    app: &App,
    running: Running,
    calls: Option<bool>,
    marked: usize,
) -> Result<Response, ApiError> {
    let answers = running.gather().await?;
    let Some(answer) = answers.into_iter().next() else {
        return Err(failed());
    };
    let pieces = match calls {
        Some(opened) => {
            let mut splitter = Splitter::new(opened);
            let pieces = splitter.push(&answer.text);
            pieces.into_iter().chain(splitter.finish()).collect()
        }
        None => vec![Piece::Text(answer.text.clone())],
    };
    let mut content: Vec<Value> = Vec::new();
    let mut called = false;
    for piece in pieces {
        match piece {
            Piece::Call(call) => {
                called = true;
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
    Ok(Json(json!({
        "id": app.id("msg"),
        "type": "message",
        "role": "assistant",
        "model": app.name(),
        "content": content,
        "stop_reason": stop_reason(answer.done, called),
        "stop_sequence": null,
        "usage": usage(answer.usage, marked),
    }))
    .into_response())
}

/// The blocks of a streamed message.
struct Blocks {
    index: usize,
    text_open: bool,
    called: bool,
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
        self.called = true;
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

fn streamed(
    app: Arc<App>,
    mut running: Running,
    calls: Option<bool>,
    marked: usize,
    prompt_tokens: usize,
) -> Response {
    stream::respond(async move |lines| {
        let send = |value: &Value| lines.send_typed(value);
        let start = json!({"type": "message_start", "message": {
            "id": app.id("msg"), "type": "message", "role": "assistant", "model": app.name(), "content": [],
            "stop_reason": null, "stop_sequence": null,
            "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
        }});
        if !send(&start) {
            return;
        }
        let mut blocks = Blocks {
            index: 0,
            text_open: false,
            called: false,
        };
        let mut splitter = Splitter::new(calls == Some(true));
        loop {
            let Ok(next) = lines.next(&mut running).await else {
                return;
            };
            let Some((_, happened)) = next else { return };
            let (text, end) = match happened {
                Happened::Prompt(_) => continue,
                Happened::Token(drawn) => (drawn.text, None),
                Happened::End {
                    done, text, usage, ..
                } => (text, Some((done, usage))),
            };
            if matches!(end, Some((Done::Failed, _))) {
                send(&failed().anthropic_body());
                return;
            }
            let mut pieces = match calls {
                Some(_) => splitter.push(&text),
                None => vec![Piece::Text(text)],
            };
            if end.is_some() {
                pieces.extend(splitter.finish());
            }
            let mut events = Vec::new();
            for piece in &pieces {
                match piece {
                    Piece::Text(text) => blocks.text(text, &mut events),
                    Piece::Call(call) => blocks.call(&app, call, &mut events),
                }
            }
            if let Some((done, spent)) = end {
                blocks.close(&mut events);
                events.push(json!({
                    "type": "message_delta",
                    "delta": {"stop_reason": stop_reason(done, blocks.called), "stop_sequence": null},
                    "usage": usage(spent, marked),
                }));
                events.push(json!({"type": "message_stop"}));
            }
            if !events.iter().all(send) {
                return;
            }
        }
    })
}
