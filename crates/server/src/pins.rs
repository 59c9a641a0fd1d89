//! Prefixes that are to stay in memory, and what is told about the tiers below it.

use antefix_kv::tiers::TiersStats;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::cache::{LookupRequest, gone};
use crate::error::ApiError;
use crate::routes::{Body, Caller, Shared};

/// Keeps what is cached of a prompt in memory until it is unpinned; send the prompt first, with `max_tokens` 1.
#[utoipa::path(
    post,
    path = "/v1/cache/pin",
    tag = "cache",
    request_body = LookupRequest,
    responses((status = 200, description = "`tokens`, `pinned_tokens`", body = Object)),
)]
pub(crate) async fn pin(
    State(app): Shared,
    Caller(tenant): Caller,
    Body(ask): Body<LookupRequest>,
) -> Result<Json<Value>, ApiError> {
    let (tokens, salt) = ask.resolve(&app, &tenant)?;
    let count = tokens.len();
    let pinned = app.worker.inspect(move |engine| engine.pin(&tokens, salt)).await;
    match pinned.ok_or_else(gone)? {
        Ok(pinned) => Ok(Json(json!({"tokens": count, "pinned_tokens": pinned}))),
        Err(error) => Err(ApiError::invalid(error.to_string())),
    }
}

/// Takes one pin off a prompt.
#[utoipa::path(
    post,
    path = "/v1/cache/unpin",
    tag = "cache",
    request_body = LookupRequest,
    responses((status = 200, description = "`tokens`, `unpinned_tokens`", body = Object)),
)]
pub(crate) async fn unpin(
    State(app): Shared,
    Caller(tenant): Caller,
    Body(ask): Body<LookupRequest>,
) -> Result<Json<Value>, ApiError> {
    let (tokens, salt) = ask.resolve(&app, &tenant)?;
    let count = tokens.len();
    let unpinned = app
        .worker
        .inspect(move |engine| engine.unpin(&tokens, salt))
        .await;
    Ok(Json(
        json!({"tokens": count, "unpinned_tokens": unpinned.ok_or_else(gone)?}),
    ))
}

/// The tiers below the memory, as `/v1/cache/stats` tells of them. `loaded`: blocks that each has brought back.
pub(crate) fn below_json(below: &TiersStats, loaded: &[u64]) -> Value {
    let tier = |(i, t): (usize, &antefix_kv::tiers::TierStats)| {
        json!({
            "name": t.name,
            "blocks": t.blocks,
            "bytes": t.bytes,
            "bytes_capacity": t.capacity,
            "blocks_loaded": loaded.get(i).copied().unwrap_or(0),
            "hits": t.hits,
            "misses": t.misses,
            "damaged": t.bad,
            "evicted": t.evicted,
            "bytes_written": t.bytes_written,
            "bytes_read": t.bytes_read,
            "off": t.off,
        })
    };
    json!({
        "tiers": below.tiers.iter().enumerate().map(tier).collect::<Vec<_>>(),
        "queued_blocks": below.queued,
        "queued_bytes": below.queued_bytes,
        "refused_blocks": below.refused,
        "alive": below.alive,
    })
}
