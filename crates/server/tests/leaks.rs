//! What thousands of requests leave behind: nothing that grows with them. `ANTEFIX_REQUESTS` says how many are sent a round.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may")]

mod common;

use std::alloc::System;
use std::time::Duration;

use antefix_server::{KeyConfig, RememberLimits};
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use cap::Cap;
use common::{server_with, text};
use serde_json::{Value, json};
use tower::ServiceExt;

#[global_allocator]
static HEAP: Cap<System> = Cap::new(System, usize::MAX);

/// Rounds in which caches fill and tables reach their sizes, and rounds after them.
const ROUNDS: (usize, usize) = (5, 7);

/// Bytes a request that may be left behind in all: less than any of its parts takes.
const BYTES_A_REQUEST: usize = 4;

/// Bytes a request that a round may leave behind in the median: a table that doubles once does not count, an allocation that every
/// tenth request loses does.
const MEDIAN: f64 = 1.0;

fn post(path: &str, key: &str, body: &Value) -> Request<Body> {
    Request::post(path)
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {key}"))
        .body(Body::from(body.to_string()))
        .unwrap()
}

/// Words that no other request says.
fn words(i: usize, n: usize) -> String {
    let words: Vec<String> = (0..n)
        .map(|j| format!("{:x}", i * 1_000_003 + j * 7919))
        .collect();
    words.join(" ")
}

/// The `i`th request: what clients ask, what they do wrong, and what they do not wait for.
async fn ask(app: &Router, i: usize) {
    let key = ["first key 0123456789", "second key 0123456789"][i / 10 % 2];
    let say = json!([{"role": "user", "content": words(i, 20)}]);
    let schema = json!({"type": "object", "properties": {format!("p{i}"): {"type": "boolean"}}, "required": [format!("p{i}")]});
    let (path, body) = match i % 10 {
        0 => (
            "/v1/completions",
            json!({"prompt": words(i, 30), "max_tokens": 4}),
        ),
        1 => (
            "/v1/chat/completions",
            json!({"messages": say, "max_tokens": 40, "stream": true, "n": 2}),
        ),
        2 => (
            "/v1/completions",
            json!({"prompt": words(i, 20), "max_tokens": 2, "cache_salt": words(i, 1), "user": words(i, 1)}),
        ),
        3 => (
            "/v1/responses",
            json!({"input": words(i, 10), "max_output_tokens": 4}),
        ),
        4 => ("/v1/messages", json!({"messages": say, "max_tokens": 4})),
        5 => (
            "/v1/chat/completions",
            json!({"messages": say, "max_tokens": 30, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
        ),
        6 => ("/v1/embeddings", json!({"input": words(i, 10)})),
        7 => ("/v1/chat/completions", json!({"messages": say, "temperature": i})),
        8 => (
            "/v1/completions",
            json!({"prompt": words(i, 40), "max_tokens": 1000, "ignore_eos": true, "stream": true}),
        ),
        _ => ("/no/such/path", json!({"model": words(i, 1)})),
    };
    let answer = app.clone().oneshot(post(path, key, &body)).await.unwrap();
    // The eighth client goes away while it is answered.
    if i % 10 != 8 {
        text(answer).await;
    }
}

/// Bytes on the heap once nobody is answered any more.
async fn held(server: &antefix_server::Server) -> usize {
    let mut least = usize::MAX;
    for _ in 0..50 {
        let idle = server.inspect(|engine| engine.is_idle()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        if idle {
            least = least.min(HEAP.allocated());
        }
    }
    least
}

#[tokio::test]
async fn what_is_held_does_not_grow_with_the_requests() {
    let requests: usize = std::env::var("ANTEFIX_REQUESTS").map_or(1000, |n| n.parse().unwrap());
    let server = server_with(|config| {
        config.engine.kv_bytes = 2 << 20;
        config.remember = RememberLimits {
            bytes: 64 << 10,
            answers: 40,
        };
        config.keys = ["first", "second"]
            .map(|name| KeyConfig {
                name: name.into(),
                key: Some(format!("{name} key 0123456789")),
                requests_per_minute: 1_000_000.try_into().ok(),
                tokens_per_minute: u32::MAX.try_into().ok(),
                ..KeyConfig::default()
            })
            .into();
    });
    let app = server.app();
    let mut after = Vec::new();
    for round in 0..ROUNDS.0 + ROUNDS.1 {
        for i in 0..requests {
            ask(&app, round * requests + i).await;
        }
        after.push(held(&server).await);
    }
    eprintln!("bytes after each round of {requests} requests: {after:?}");
    let mut more: Vec<i64> = after[ROUNDS.0 - 1..]
        .windows(2)
        .map(|w| w[1] as i64 - w[0] as i64)
        .collect();
    more.sort_unstable();
    let median = more[more.len() / 2] as f64 / requests as f64;
    assert!(median < MEDIAN, "{median} bytes more a request: {after:?}");
    let most = after[..ROUNDS.0].iter().max().unwrap();
    let last = after.last().unwrap();
    assert!(
        *last <= most + BYTES_A_REQUEST * requests * ROUNDS.1,
        "{} bytes more: {after:?}",
        last - most
    );
}
