//! What only whoever runs the server may do. These routes are not among those that clients reach.

use std::sync::Arc;

use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::about;
use crate::cache::gone;
use crate::error::ApiError;
use crate::routes::Shared;
use crate::state::App;

/// Whoever bears a key with `admin = true`; without keys everybody who reaches the listener, which is then a loopback one.
struct Admin;

impl FromRequestParts<Arc<App>> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let tenant = app.tenants.find(&parts.headers)?;
        match tenant.admin || !app.tenants.need_keys() {
            true => Ok(Self),
            false => Err(ApiError::forbidden("this needs a key with `admin = true`")),
        }
    }
}

pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/admin/cache/clear", post(clear_cache))
        .route("/metrics", get(metrics))
        .route("/health/ready", get(about::ready))
}

/// Forgets every cached prefix of everybody; running requests keep theirs.
async fn clear_cache(State(app): Shared, _: Admin) -> Result<Json<Value>, ApiError> {
    let clear = |engine: &mut antefix_engine::Engine| {
        let before = engine.pool().stats().bytes_used;
        engine.clear_cache();
        before - engine.pool().stats().bytes_used
    };
    let freed = app.worker.inspect(clear).await.ok_or_else(gone)?;
    Ok(Json(json!({"bytes_freed": freed})))
}

async fn metrics(State(app): Shared, _: Admin) -> axum::response::Response {
    about::metrics_text(&app)
}
