//! What the server says about itself: models, methods, health, figures.

use antefix_attention::method;
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::{ApiError, ErrorBody};
use crate::routes::{Caller, Shared};
use crate::state::App;

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

/// The models that are served.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "models",
    responses((status = 200, description = "OpenAI's list", body = Object)),
)]
pub(crate) async fn models(State(app): Shared, _: Caller) -> Result<Json<Value>, ApiError> {
    let data: Vec<Value> = app.names.iter().map(|name| model_json(&app, name)).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// One of them.
#[utoipa::path(
    get,
    path = "/v1/models/{name}",
    tag = "models",
    params(("name" = String, Path, description = "A name from the list")),
    responses((status = 200, description = "OpenAI's model", body = Object)),
)]
pub(crate) async fn model(
    State(app): Shared,
    _: Caller,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.check_model(Some(&name))?;
    Ok(Json(model_json(&app, &name)))
}

/// How attention can be computed: names for `method`, and their knobs. What has the axis `execution` always runs.
#[utoipa::path(
    get,
    path = "/v1/methods",
    tag = "models",
    responses((status = 200, description = "`methods`", body = Object)),
)]
pub(crate) async fn methods(State(app): Shared, _: Caller) -> Json<Value> {
    let cards: Vec<Value> = app
        .offer
        .methods
        .iter()
        .map(|m| m.card())
        .chain(app.offer.always.iter().copied())
        .map(method::card_json)
        .collect();
    Json(json!({"methods": cards}))
}

/// Figures of the moment, and of the last steps.
#[utoipa::path(
    get,
    path = "/v1/loads",
    tag = "server",
    responses((status = 200, description = "`running`, `waiting`, `steps`, `ttft_ms`, `itl_ms`", body = Object)),
)]
pub(crate) async fn loads(State(app): Shared, _: Caller) -> Result<Response, ApiError> {
    Ok(Json(app.meters.loads()).into_response())
}

/// Whether the server takes requests.
#[utoipa::path(
    get,
    path = "/health/ready",
    tag = "server",
    security(()),
    responses((status = 200, description = "It does", body = Object), (status = 503, description = "It is shutting down", body = ErrorBody)),
)]
pub(crate) async fn ready(State(app): Shared) -> Response {
    match app.worker.is_closing() {
        true => ApiError::unavailable("the server is shutting down").into_response(),
        false => Json(json!({"status": "ok"})).into_response(),
    }
}

/// Prometheus text: `antefix_*` and vLLM's names.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "server",
    responses((status = 200, description = "OpenMetrics", body = String, content_type = "application/openmetrics-text")),
)]
pub(crate) async fn metrics(State(app): Shared, _: Caller) -> Response {
    metrics_text(&app)
}

/// The answer of `/metrics`.
pub(crate) fn metrics_text(app: &App) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.meters.text()).into_response()
}

/// What runs here.
#[utoipa::path(
    get,
    path = "/server_info",
    tag = "server",
    responses((status = 200, description = "`model`, `architecture`, `context_length`", body = Object)),
)]
pub(crate) async fn server_info(State(app): Shared, _: Caller) -> Result<Json<Value>, ApiError> {
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

/// As `/health/ready`.
#[utoipa::path(
    get,
    path = "/health",
    tag = "server",
    security(()),
    responses((status = 200, description = "It does", body = Object), (status = 503, description = "It is shutting down", body = ErrorBody)),
)]
pub(crate) async fn health(app: Shared) -> Response {
    ready(app).await
}

/// Whether the server answers at all.
#[utoipa::path(
    get,
    path = "/health/live",
    tag = "server",
    security(()),
    responses((status = 200, description = "It does", body = Object)),
)]
pub(crate) async fn live() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// The program's version.
#[utoipa::path(
    get,
    path = "/version",
    tag = "server",
    security(()),
    responses((status = 200, description = "`version`", body = Object)),
)]
pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
