//! Text and tokens: `/tokenize`, `/detokenize`, `/apply-template`.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use antefix_models::tokenizer::Specials;

use crate::chat::{self, ChatMessage};
use crate::error::ApiError;
use crate::routes::{Body, Caller, Shared};
use crate::state::App;

/// Text or a conversation, to be looked at as tokens.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    /// Text; or `messages`.
    #[serde(alias = "prompt")]
    content: Option<String>,
    messages: Option<Vec<ChatMessage>>,
    tools: Option<Vec<Value>>,
    /// Start with the model's begin-of-text token, as prompts do.
    #[serde(default = "yes")]
    #[schema(default = true)]
    add_special: bool,
    /// Name each token.
    #[serde(default)]
    with_pieces: bool,
}

fn yes() -> bool {
    true
}

/// The tokens of what was asked about.
pub(crate) fn tokens_of(app: &App, ask: TokenizeRequest) -> Result<Vec<u32>, ApiError> {
    let t = app.tokenizer();
    match (ask.content, ask.messages) {
        (Some(text), None) if ask.add_special => Ok(t.encode_prompt(&text)),
        (Some(text), None) => Ok(t.encode(&text, Specials::Plain)),
        (None, Some(messages)) => {
            let text = chat::prompt(app, &chat::plain(messages)?, ask.tools.as_deref())?;
            Ok(t.encode_prompt(&text))
        }
        _ => Err(ApiError::invalid("give either `content` or `messages`")),
    }
}

/// The tokens of a text or of a conversation.
#[utoipa::path(
    post,
    path = "/tokenize",
    tag = "tokens",
    request_body = TokenizeRequest,
    responses((status = 200, description = "`tokens`, `count`", body = Object)),
)]
pub(crate) async fn tokenize(
    State(app): Shared,
    _: Caller,
    Body(ask): Body<TokenizeRequest>,
) -> Result<Json<Value>, ApiError> {
    let pieces = ask.with_pieces;
    let tokens = tokens_of(&app, ask)?;
    let piece = |&id: &u32| {
        let bytes = app.tokenizer().token_bytes(id);
        match String::from_utf8(bytes) {
            Ok(text) => json!({"id": id, "piece": text}),
            Err(e) => json!({"id": id, "piece": e.into_bytes()}),
        }
    };
    let list: Value = match pieces {
        true => tokens.iter().map(piece).collect(),
        false => json!(tokens),
    };
    Ok(Json(
        json!({"tokens": list, "count": tokens.len(), "max_model_len": app.context}),
    ))
}

/// Tokens, to be looked at as text.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    tokens: Vec<u32>,
}

/// The text of tokens.
#[utoipa::path(
    post,
    path = "/detokenize",
    tag = "tokens",
    request_body = DetokenizeRequest,
    responses((status = 200, description = "`content`", body = Object)),
)]
pub(crate) async fn detokenize(
    State(app): Shared,
    _: Caller,
    Body(ask): Body<DetokenizeRequest>,
) -> Result<Json<Value>, ApiError> {
    let vocab = app.tokenizer().vocab_size();
    if let Some(bad) = ask.tokens.iter().find(|&&t| t as usize >= vocab) {
        return Err(ApiError::param(
            "tokens",
            format!("token {bad} is not in the vocabulary of {vocab}"),
        ));
    }
    let text = app.tokenizer().decode(&ask.tokens);
    Ok(Json(json!({"content": text, "prompt": text})))
}

/// A conversation, to be looked at as the model gets it.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TemplateRequest {
    messages: Vec<ChatMessage>,
    tools: Option<Vec<Value>>,
}

/// The prompt of a conversation.
#[utoipa::path(
    post,
    path = "/apply-template",
    tag = "tokens",
    request_body = TemplateRequest,
    responses((status = 200, description = "`prompt`", body = Object)),
)]
pub(crate) async fn apply_template(
    State(app): Shared,
    _: Caller,
    Body(ask): Body<TemplateRequest>,
) -> Result<Json<Value>, ApiError> {
    let text = chat::prompt(&app, &chat::plain(ask.messages)?, ask.tools.as_deref())?;
    Ok(Json(json!({"prompt": text})))
}
