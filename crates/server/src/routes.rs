//! The routes, and those that do not generate.

use std::sync::Arc;
use std::time::Duration;

use antefix_attention::method;
use antefix_models::tokenizer::Specials;
use antefix_state::PAGE_ROWS;
use axum::extract::{FromRequest, FromRequestParts, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use tower_http::trace::TraceLayer;

use crate::auth::Tenant;
use crate::chat::{self, ChatMessage, ChatRequest};
use crate::completions::{self, CompletionRequest};
use crate::error::ApiError;
use crate::messages::{self, CountRequest, MessagesRequest};
use crate::pins;
use crate::state::App;

/// A JSON body whose refusal has OpenAI's shape.
pub(crate) struct Body<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let Json(value) = Json::<Value>::from_request(request, state).await?;
        match T::deserialize(&value) {
            Ok(body) => Ok(Self(body)),
            Err(error) => Err(ApiError {
                param: culprit::<T>(&value),
                ..ApiError::invalid(error.to_string())
            }
            .naming_param()),
        }
    }
}

/// The field without which the body would be valid; else the one that is wanted, but not like this.
fn culprit<T: DeserializeOwned>(value: &Value) -> Option<String> {
    let fields = value.as_object()?;
    let without = |name: &str| {
        let rest: serde_json::Map<_, _> = fields
            .iter()
            .filter(|(n, _)| *n != name)
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        T::deserialize(&Value::Object(rest)).err().map(|e| e.to_string())
    };
    let errors: Vec<(&String, Option<String>)> = fields.keys().take(64).map(|n| (n, without(n))).collect();
    let valid = errors.iter().find(|(_, e)| e.is_none());
    let missing =
        |name: &str, e: &Option<String>| e.as_ref().is_some_and(|e| e.contains(&format!("`{name}`")));
    valid
        .or_else(|| errors.iter().find(|(n, e)| missing(n, e)))
        .map(|(n, _)| (*n).clone())
}

pub(crate) type Shared = State<Arc<App>>;

/// All routes.
pub(crate) fn router(app: Arc<App>, body_bytes: usize, body_timeout: Duration) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(complete))
        .route("/v1/messages", post(anthropic))
        .route("/v1/messages/count_tokens", post(anthropic_count))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/v1/methods", get(methods))
        .route("/v1/cache/lookup", post(cache_lookup))
        .route("/v1/cache/stats", get(cache_stats))
        .route("/v1/cache/tree", get(cache_tree))
        .route("/v1/cache/pin", post(pins::pin))
        .route("/v1/cache/unpin", post(pins::unpin))
        .route("/v1/loads", get(loads))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/apply-template", post(apply_template))
        .route("/health", get(ready))
        .route("/health/ready", get(ready))
        .route("/health/live", get(|| async { Json(json!({"status": "ok"})) }))
        .route("/metrics", get(metrics))
        .route(
            "/version",
            get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }),
        )
        .route("/server_info", get(server_info))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(RequestBodyLimitLayer::new(body_bytes))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .layer(RequestBodyTimeoutLayer::new(body_timeout))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(TraceLayer::new_for_http())
        .with_state(app)
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    tracing::error!("a handler panicked");
    ApiError::internal("the request failed; the server's log says why").into_response()
}

async fn nothing_here(request: Request) -> ApiError {
    ApiError::not_found(
        format!("there is no {} here", request.uri().path()),
        "unknown_url",
    )
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError {
        status: StatusCode::METHOD_NOT_ALLOWED,
        ..ApiError::invalid(format!(
            "{} does not take {}",
            request.uri().path(),
            request.method()
        ))
    }
}

/// Whoever bears a valid key. As the first argument of a handler it stands before the body is read.
pub(crate) struct Caller(pub(crate) Arc<Tenant>);

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        app.tenants.find(&parts.headers).map(Self)
    }
}

async fn chat(
    State(app): Shared,
    Caller(tenant): Caller,
    Body(ask): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    chat::answer(app, tenant, ask).await
}

async fn complete(
    State(app): Shared,
    Caller(tenant): Caller,
    Body(ask): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    completions::answer(app, tenant, ask).await
}

async fn anthropic(State(app): Shared, headers: HeaderMap, request: Request) -> Response {
    let answer = async {
        let tenant = app.tenants.find(&headers)?;
        let Body(ask) = Body::<MessagesRequest>::from_request(request, &()).await?;
        messages::answer(Arc::clone(&app), tenant, ask).await
    };
    answer.await.unwrap_or_else(|e| e.anthropic())
}

async fn anthropic_count(State(app): Shared, headers: HeaderMap, request: Request) -> Response {
    let answer = async {
        app.tenants.find(&headers)?;
        let Body(ask) = Body::<CountRequest>::from_request(request, &()).await?;
        messages::count(&app, ask)
    };
    match answer.await {
        Ok(count) => Json(count).into_response(),
        Err(error) => error.anthropic(),
    }
}

fn model_json(app: &App, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": app.started,
        "owned_by": "antefix",
        "context_length": app.context,
        "max_model_len": app.context,
    })
}

async fn models(State(app): Shared, _: Caller) -> Result<Json<Value>, ApiError> {
    let data: Vec<Value> = app.names.iter().map(|name| model_json(&app, name)).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

async fn model(
    State(app): Shared,
    _: Caller,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.check_model(Some(&name))?;
    Ok(Json(model_json(&app, &name)))
}

async fn methods(State(app): Shared, _: Caller) -> Json<Value> {
    let cards: Vec<Value> = app
        .offer
        .methods
        .iter()
        .map(|m| method::card_json(m.card()))
        .collect();
    Json(json!({"methods": cards}))
}

/// Text or a conversation, to be looked at as tokens.
#[derive(Debug, Deserialize)]
struct TokenizeRequest {
    #[serde(alias = "prompt")]
    content: Option<String>,
    messages: Option<Vec<ChatMessage>>,
    tools: Option<Vec<Value>>,
    #[serde(default = "yes")]
    add_special: bool,
    #[serde(default)]
    with_pieces: bool,
}

fn yes() -> bool {
    true
}

fn tokens_of(app: &App, ask: TokenizeRequest) -> Result<Vec<u32>, ApiError> {
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

async fn tokenize(
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

#[derive(Debug, Deserialize)]
struct DetokenizeRequest {
    tokens: Vec<u32>,
}

async fn detokenize(
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

#[derive(Debug, Deserialize)]
struct TemplateRequest {
    messages: Vec<ChatMessage>,
    tools: Option<Vec<Value>>,
}

async fn apply_template(
    State(app): Shared,
    _: Caller,
    Body(ask): Body<TemplateRequest>,
) -> Result<Json<Value>, ApiError> {
    let text = chat::prompt(&app, &chat::plain(ask.messages)?, ask.tools.as_deref())?;
    Ok(Json(json!({"prompt": text})))
}

#[derive(Debug, Deserialize)]
pub(crate) struct LookupRequest {
    #[serde(flatten)]
    what: TokenizeRequest,
    tokens: Option<Vec<u32>>,
    cache_salt: Option<String>,
}

impl LookupRequest {
    /// Its tokens, and the salt under which the tenant has them cached.
    pub(crate) fn resolve(self, app: &App, tenant: &Tenant) -> Result<(Vec<u32>, u64), ApiError> {
        let salt = tenant.salt(self.cache_salt.as_deref());
        let tokens = match self.tokens {
            Some(tokens) => tokens,
            None => tokens_of(app, self.what)?,
        };
        Ok((tokens, salt))
    }
}

pub(crate) fn gone() -> ApiError {
    ApiError::unavailable("the engine is gone")
}

/// How much of a prompt would be found cached: nothing is computed, nothing is touched.
async fn cache_lookup(
    State(app): Shared,
    Caller(tenant): Caller,
    Body(ask): Body<LookupRequest>,
) -> Result<Json<Value>, ApiError> {
    let (tokens, salt) = ask.resolve(&app, &tenant)?;
    let count = tokens.len();
    let found = app
        .worker
        .inspect(move |engine| engine.whereabouts(&tokens[..tokens.len().saturating_sub(1)], salt))
        .await
        .ok_or_else(gone)?;
    Ok(Json(json!({
        "tokens": count,
        "cached_tokens": found.ram + found.below,
        "tiers": {"ram": found.ram, "disk": found.below},
        "block_tokens": PAGE_ROWS,
    })))
}

async fn cache_stats(State(app): Shared, _: Caller) -> Result<Json<Value>, ApiError> {
    let look = |engine: &mut antefix_engine::Engine| {
        let pool = engine.pool();
        (pool.stats(), engine.cache_stats(), pool.shape().block_bytes())
    };
    let (pool, cache, block_bytes) = app.worker.inspect(look).await.ok_or_else(gone)?;
    Ok(Json(json!({
        "block_tokens": PAGE_ROWS,
        "blocks": cache.blocks,
        "block_bytes": block_bytes,
        "pinned_blocks": cache.pinned,
        "prompts_loading": cache.loading,
        "blocks_to_store": cache.to_store,
        "below": cache.below.as_ref().map(|below| pins::below_json(below, &cache.loaded)),
        "bytes_used": pool.bytes_used,
        "bytes_allocated": pool.bytes_allocated,
        "bytes_capacity": pool.capacity,
    })))
}

#[derive(Debug, Deserialize)]
struct TreeQuery {
    cache_salt: Option<String>,
}

/// Runs shown at most.
const TREE_LIMIT: usize = 500;

/// The cached prefixes of whoever asks, and the running requests that read them.
async fn cache_tree(
    State(app): Shared,
    Caller(tenant): Caller,
    Query(query): Query<TreeQuery>,
) -> Result<Json<Value>, ApiError> {
    let salt = tenant.salt(query.cache_salt.as_deref());
    let look = move |engine: &mut antefix_engine::Engine| {
        let runs = engine.radix().runs(engine.pool(), salt, TREE_LIMIT);
        let running: Vec<(u64, Vec<u32>)> = engine.running().map(|(id, t)| (id.0, t.to_vec())).collect();
        (engine.pool().stats(), runs, running)
    };
    let (pool, runs, running) = app.worker.inspect(look).await.ok_or_else(gone)?;
    // The tokens from the root to the end of each run: a request reads a run when its tokens start with them.
    let mut paths: std::collections::HashMap<usize, Vec<u32>> = std::collections::HashMap::new();
    let mut nodes = Vec::with_capacity(runs.len());
    for run in &runs {
        let mut path = run
            .parent
            .and_then(|p| paths.get(&p).cloned())
            .unwrap_or_default();
        path.extend_from_slice(&run.tokens);
        let requests: Vec<String> = running
            .iter()
            .filter(|(_, tokens)| tokens.starts_with(&path))
            .map(|(id, _)| format!("seq-{id}"))
            .collect();
        let start = &run.tokens[..run.tokens.len().min(48)];
        nodes.push(json!({
            "id": run.id,
            "parent": run.parent,
            "tokens": run.tokens.len(),
            "bytes": run.bytes,
            "text": app.tokenizer().decode(start),
            "requests": requests,
            "tier": "ram",
            "pinned_blocks": run.pinned,
            "idle_s": run.idle.as_secs_f64(),
        }));
        paths.insert(run.id, path);
    }
    Ok(Json(json!({
        "block_tokens": PAGE_ROWS,
        "bytes_used": pool.bytes_used,
        "bytes_capacity": pool.capacity,
        "nodes": nodes,
    })))
}

async fn loads(State(app): Shared, _: Caller) -> Result<Response, ApiError> {
    Ok(Json(app.meters.loads()).into_response())
}

async fn ready(State(app): Shared) -> Response {
    match app.worker.is_closing() {
        true => ApiError::unavailable("the server is shutting down").into_response(),
        false => Json(json!({"status": "ok"})).into_response(),
    }
}

async fn metrics(State(app): Shared, _: Caller) -> Result<Response, ApiError> {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], app.meters.text()).into_response())
}

async fn server_info(State(app): Shared, _: Caller) -> Result<Json<Value>, ApiError> {
    let spec = app.model.spec();
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": app.name(),
        "architecture": spec.arch.name(),
        "layers": spec.layers,
        "vocabulary": spec.vocab,
        "context_length": app.context,
        "chat_template": app.template.is_some(),
    })))
}
