//! `/v1/chat/completions`.

use std::sync::Arc;

use antefix_models::documents;
use antefix_models::template::Message;
use antefix_models::tokenizer::Tokenizer;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::auth::Tenant;
use crate::error::ApiError;
use crate::methods::{note, note_all, note_end};
use crate::openapi::answers::ChatCompletion;
use crate::patience::Patience;
use crate::routes::{Body, Caller, Shared};
use crate::state::{App, now};
use crate::stream;
use crate::tools::{self, Piece, Splitter, ToolChoice};
use crate::wish::{Answer, Knobs, Reports, Running, failure, finish_reason, total, unknown};
use crate::worker::{Drawn, Happened};

/// A chat request.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ChatRequest {
    messages: Vec<ChatMessage>,
    #[serde(flatten)]
    knobs: Knobs,
    max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    tools: Option<Vec<Value>>,
    /// `auto`, `none`, `required`, or an object that names a function.
    tool_choice: Option<Value>,
    /// False: one call at most.
    parallel_tool_calls: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Map<String, Value>,
}

/// One message as clients send it.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct ChatMessage {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Map<String, Value>,
}

/// The content of a message: OpenAI calls its pieces parts, Anthropic blocks.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Value>),
}

impl ChatMessage {
    /// As templates want it: one text.
    pub(crate) fn plain(self) -> Result<Message, ApiError> {
        let role = match self.role.as_str() {
            "developer" => "system",
            "system" | "user" | "assistant" | "tool" | "function" => &self.role,
            other => {
                return Err(ApiError::param(
                    "messages",
                    format!("there is no role `{other}`\nhint: system, developer, user, assistant or tool"),
                ));
            }
        };
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let mut whole = String::new();
                for part in &parts {
                    match (
                        part.get("type").and_then(Value::as_str),
                        part.get("text").and_then(Value::as_str),
                    ) {
                        (Some("text" | "input_text" | "output_text"), Some(text)) => whole.push_str(text),
                        (kind, _) => {
                            return Err(ApiError::param(
                                "messages",
                                format!(
                                    "content of type `{}` cannot be read by this model\nhint: send text",
                                    kind.unwrap_or("?")
                                ),
                            ));
                        }
                    }
                }
                whole
            }
        };
        let mut message = Message::new(role, content);
        message.extra = self.extra;
        if let Some(calls) = message.extra.get_mut("tool_calls").and_then(Value::as_array_mut) {
            calls.iter_mut().for_each(open_arguments);
        }
        Ok(message)
    }
}

/// OpenAI sends the arguments of a call as JSON text; templates want the object.
fn open_arguments(call: &mut Value) {
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(object) = arguments
            .as_str()
            .and_then(|text| serde_json::from_str(text).ok())
    {
        *arguments = object;
    }
}

/// The prompt of a conversation.
pub(crate) fn prompt(app: &App, messages: &[Message], tools: Option<&[Value]>) -> Result<String, ApiError> {
    let template = app.template.as_ref().ok_or_else(|| {
        ApiError::invalid(
            "this model has no chat template\nhint: use /v1/completions, or start the server with --chat-template FILE",
        )
    })?;
    if messages.is_empty() {
        return Err(ApiError::param("messages", "`messages` is empty"));
    }
    let tools = tools.map(|t| Value::Array(t.to_vec()));
    Ok(template.render(messages, tools.as_ref(), true)?)
}

pub(crate) fn plain(messages: Vec<ChatMessage>) -> Result<Vec<Message>, ApiError> {
    messages.into_iter().map(ChatMessage::plain).collect()
}

/// OpenAI's `usage`.
pub(crate) fn usage_json(u: antefix_engine::Usage) -> Value {
    json!({
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.prompt_tokens + u.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": u.cached_tokens, "disk_tokens": u.loaded_tokens},
    })
}

fn token_json(tokenizer: &Tokenizer, token: u32, logprob: f32) -> Value {
    let bytes = tokenizer.token_bytes(token);
    json!({"token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes})
}

/// OpenAI's `logprobs.content` entry of one token.
pub(crate) fn logprob_json(tokenizer: &Tokenizer, drawn: &Drawn) -> Value {
    let mut entry = token_json(tokenizer, drawn.token, drawn.logprob.unwrap_or(f32::NEG_INFINITY));
    let top: Vec<Value> = drawn
        .top
        .iter()
        .map(|&(id, lp)| token_json(tokenizer, id, lp))
        .collect();
    entry["top_logprobs"] = Value::Array(top);
    entry
}

/// Everything the answer's form depends on.
struct Form {
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
    calls: bool,
    /// The prompt ends inside a call.
    opened: bool,
    /// Calls at most.
    most_calls: usize,
    usage: bool,
}

/// How many calls an answer may make.
pub(crate) fn most_calls(parallel: Option<bool>) -> usize {
    match parallel {
        Some(false) => 1,
        _ => usize::MAX,
    }
}

/// An answer to a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "generate",
    request_body = ChatRequest,
    params(("x-request-timeout-ms" = Option<u64>, Header, description = "How long it may take")),
    responses((status = 200, description = "OpenAI's chat completion; with `stream` its chunks as events", content(
        (ChatCompletion = "application/json"),
        (String = "text/event-stream"),
    ))),
)]
pub(crate) async fn create(
    State(app): Shared,
    Caller(tenant): Caller,
    patience: Patience,
    Body(mut request): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    request.knobs.patience = patience;
    answer(app, tenant, request).await
}

async fn answer(app: Arc<App>, tenant: Arc<Tenant>, request: ChatRequest) -> Result<Response, ApiError> {
    let ignored = unknown(&request.extra, app.strict)?;
    let asked = request.knobs.asked(&app.offer)?;
    let mut messages = plain(request.messages)?;
    if !asked.documents.is_empty() {
        stand_before(&mut messages)?;
    }
    let choice = ToolChoice::read(request.tool_choice.as_ref())?;
    let tools = request
        .tools
        .filter(|t| choice != ToolChoice::None && !t.is_empty());
    let mut text = prompt(&app, &messages, tools.as_deref())?;
    let mut grammar = request.knobs.grammar()?;
    let forced = choice.grammar(tools.as_deref())?;
    if forced.is_some() {
        if grammar.is_some() {
            return Err(ApiError::param(
                "tool_choice",
                "a forced call and a `response_format` exclude each other",
            ));
        }
        // The call is opened for the model, which then has to finish it.
        text.push_str(tools::OPENING);
        grammar.clone_from(&forced);
    }
    let prompt = match asked.documents.is_empty() {
        true => app.tokenizer().encode_prompt(&text).into(),
        false => documents::encode(app.tokenizer(), &text, &asked.documents),
    };
    let reports = Reports {
        logprobs: request.logprobs.unwrap_or(false),
        top: request.top_logprobs.unwrap_or(0),
        prompt: false,
    };
    if reports.top > 20 {
        return Err(ApiError::param("top_logprobs", "`top_logprobs` is at most 20"));
    }
    let n = request.knobs.n.unwrap_or(1);
    let max_tokens = request.max_completion_tokens.or(request.knobs.max_tokens);
    let running = request
        .knobs
        .start(
            &app,
            &tenant,
            (vec![prompt], asked),
            n,
            max_tokens,
            reports,
            grammar,
        )
        .await?;
    let form = Form {
        id: app.id("chatcmpl"),
        created: now(),
        model: app.name().to_string(),
        logprobs: reports.logprobs,
        calls: tools.is_some(),
        opened: forced.is_some(),
        most_calls: most_calls(request.parallel_tool_calls),
        usage: request.knobs.wants_usage(),
    };
    let traces = running.trace_ids();
    let mut response = match request.knobs.streams() {
        true => streamed(app, form, running, n),
        false => {
            let answers = running.gather().await?;
            Json(whole(&app, &form, &answers)).into_response()
        }
    };
    crate::traces::note(&mut response, &traces);
    crate::note_ignored(&mut response, &ignored);
    Ok(response)
}

fn whole(app: &App, form: &Form, answers: &[Answer]) -> Value {
    let choice = |(index, answer): (usize, &Answer)| {
        let (text, calls) = match form.calls {
            true => parts(app, &answer.text, form),
            false => (answer.text.clone(), Vec::new()),
        };
        let mut message = json!({"role": "assistant", "content": text});
        let mut reason = finish_reason(answer.done);
        if !calls.is_empty() {
            if text.trim().is_empty() {
                message["content"] = Value::Null;
            }
            message["tool_calls"] = Value::Array(calls);
            reason = "tool_calls";
        }
        let logprobs = form.logprobs.then(|| {
            let content: Vec<Value> = answer
                .drawn
                .iter()
                .map(|d| logprob_json(app.tokenizer(), d))
                .collect();
            json!({"content": content, "refusal": null})
        });
        json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    };
    let choices: Vec<Value> = answers.iter().enumerate().map(choice).collect();
    let usages: Vec<_> = answers.iter().map(|a| a.usage).collect();
    let mut body = json!({
        "id": form.id,
        "object": "chat.completion",
        "created": form.created,
        "model": form.model,
        "system_fingerprint": crate::FINGERPRINT,
        "choices": choices,
        "usage": usage_json(total(&usages, usages.len())),
    });
    note_all(&mut body, answers);
    body
}

/// The documents stand at the start of the last message of the user.
fn stand_before(messages: &mut [Message]) -> Result<(), ApiError> {
    let last = messages.iter_mut().rfind(|m| m.role == "user");
    let last = last.ok_or_else(|| {
        ApiError::param(
            "antefix",
            "documents stand before a question, but there is no message of the role `user`",
        )
    })?;
    last.content.insert_str(0, documents::MARK);
    Ok(())
}

fn parts(app: &App, text: &str, form: &Form) -> (String, Vec<Value>) {
    let mut splitter = Splitter::new(form.opened);
    let pieces = splitter.push(text).into_iter().chain(splitter.finish());
    let (mut plain, mut calls) = (String::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Text(text) => plain.push_str(&text),
            Piece::Call(call) => calls.push(call.openai(&app.id("call"))),
        }
        if calls.len() == form.most_calls {
            break;
        }
    }
    (plain.trim_end().to_string(), calls)
}

/// What one choice has streamed so far.
struct Choice {
    /// Whether its role is told. That waits for the first token: clients take the first chunk for it.
    begun: bool,
    splitter: Splitter,
    calls: usize,
}

fn streamed(app: Arc<App>, form: Form, mut running: Running, n: usize) -> Response {
    stream::respond(async move |lines| {
        let chunk = |index: usize, delta: Value, logprobs: Value, reason: Option<&str>| {
            let mut chunk = json!({
                "id": form.id,
                "object": "chat.completion.chunk",
                "created": form.created,
                "model": form.model,
                "system_fingerprint": crate::FINGERPRINT,
                "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}],
            });
            if form.usage {
                chunk["usage"] = Value::Null;
            }
            chunk
        };
        // The client is gone when nobody receives: the generation is dropped with this task and cancelled.
        let mut choices: Vec<Choice> = (0..n)
            .map(|_| Choice {
                begun: false,
                splitter: Splitter::new(form.opened),
                calls: 0,
            })
            .collect();
        let mut usages = vec![antefix_engine::Usage::default(); n];
        loop {
            let Ok(next) = lines.next(&mut running).await else {
                return;
            };
            let Some((index, happened)) = next else { break };
            let choice = &mut choices[index];
            let mut method = None;
            let (text, logprobs, end) = match happened {
                Happened::Prompt(_) | Happened::Pooled(_) => continue,
                Happened::Token(drawn) => {
                    let logprobs = match form.logprobs {
                        true => json!({"content": [logprob_json(app.tokenizer(), &drawn)], "refusal": null}),
                        false => Value::Null,
                    };
                    (drawn.text, logprobs, None)
                }
                Happened::End {
                    done,
                    text,
                    usage,
                    method: did,
                } => {
                    usages[index] = usage;
                    method = did;
                    (text, Value::Null, Some(done))
                }
            };
            if let Some(error) = end.and_then(failure) {
                lines.send(&error.body()).await;
                return;
            }
            if !std::mem::replace(&mut choice.begun, true) {
                let first = json!({"role": "assistant", "content": ""});
                if !lines.send(&chunk(index, first, Value::Null, None)).await {
                    return;
                }
            }
            let mut pieces = match form.calls {
                true => choice.splitter.push(&text),
                false if text.is_empty() => Vec::new(),
                false => vec![Piece::Text(text)],
            };
            if end.is_some() && form.calls {
                pieces.extend(choice.splitter.finish());
            }
            let mut logprobs = logprobs;
            if pieces.is_empty() && !logprobs.is_null() {
                pieces.push(Piece::Text(String::new()));
            }
            for piece in pieces {
                if choice.calls == form.most_calls {
                    break;
                }
                let delta = match piece {
                    Piece::Text(text) => json!({"content": text}),
                    Piece::Call(call) => {
                        let mut value = call.openai(&app.id("call"));
                        value["index"] = json!(choice.calls);
                        choice.calls += 1;
                        json!({"tool_calls": [value]})
                    }
                };
                if !lines.send(&chunk(index, delta, logprobs.take(), None)).await {
                    return;
                }
            }
            if let Some(done) = end {
                let reason = match choice.calls {
                    0 => finish_reason(done),
                    _ => "tool_calls",
                };
                let mut last = chunk(index, json!({}), Value::Null, Some(reason));
                note(&mut last, method.as_deref());
                note_end(&mut last, done);
                if !lines.send(&last).await {
                    return;
                }
            }
        }
        if form.usage {
            let mut last = chunk(0, json!({}), Value::Null, None);
            last["choices"] = json!([]);
            last["usage"] = usage_json(total(&usages, n));
            lines.send(&last).await;
        }
        lines.done().await;
    })
}
