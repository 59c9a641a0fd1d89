//! What is cached: `/v1/cache/lookup`, `/v1/cache/stats`, `/v1/cache/tree`.

use antefix_state::PAGE_ROWS;
use axum::Json;
use axum::extract::{Query, State};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use crate::auth::Tenant;
use crate::error::ApiError;
use crate::pins;
use crate::routes::{Body, Caller, Shared};
use crate::state::App;
use crate::tokens::{TokenizeRequest, tokens_of};

/// A prompt: text, a conversation or tokens.
#[derive(Debug, Deserialize, ToSchema)]
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
#[utoipa::path(
    post,
    path = "/v1/cache/lookup",
    tag = "cache",
    request_body = LookupRequest,
    responses((status = 200, description = "`tokens`, `cached_tokens`", body = Object)),
)]
pub(crate) async fn lookup(
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

/// Bytes and blocks of the prefix cache.
#[utoipa::path(
    get,
    path = "/v1/cache/stats",
    tag = "cache",
    responses((status = 200, description = "`blocks`, `bytes_used`, `bytes_aside`, `bytes_capacity`", body = Object)),
)]
pub(crate) async fn stats(State(app): Shared, _: Caller) -> Result<Json<Value>, ApiError> {
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
        "bytes_aside": pool.bytes_aside,
        "bytes_allocated": pool.bytes_allocated,
        "bytes_capacity": pool.capacity,
    })))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct TreeQuery {
    cache_salt: Option<String>,
}

/// Runs shown at most.
const TREE_LIMIT: usize = 500;

/// The cached prefixes of whoever asks, and the running requests that read them.
#[utoipa::path(
    get,
    path = "/v1/cache/tree",
    tag = "cache",
    params(TreeQuery),
    responses((status = 200, description = "`nodes`", body = Object)),
)]
pub(crate) async fn tree(
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
