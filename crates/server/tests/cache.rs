//! What clients say about the cache and what they are told of it.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::path::Path;
use std::time::Duration;

use antefix_server::{DiskConfig, Server};
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, post, server_with};
use serde_json::{Value, json};

fn server_at(dir: &Path) -> Server {
    server_with(|c| {
        c.cache.disk = Some(DiskConfig {
            dir: dir.to_owned(),
            bytes: 64 << 20,
            ttl: None,
        });
    })
}

async fn ok(app: &Router, path: &str, body: Value) -> Value {
    let (status, value) = call(app, post(path, &body)).await;
    assert_eq!(status, 200, "{value}");
    value
}

fn prompt(n: usize) -> Vec<usize> {
    (0..n).map(|i| 3 + i * 7 % 250).collect()
}

async fn complete(app: &Router, change: Value) -> Value {
    let mut ask = json!({"prompt": prompt(100), "max_tokens": 2, "ignore_eos": true});
    for (name, value) in change.as_object().unwrap() {
        ask[name] = value.clone();
    }
    ok(app, "/v1/completions", ask).await["usage"]["prompt_tokens_details"].clone()
}

async fn lookup(app: &Router, n: usize) -> (u64, u64) {
    let found = ok(app, "/v1/cache/lookup", json!({"tokens": prompt(n)})).await;
    let tier = |name: &str| found["tiers"][name].as_u64().unwrap();
    assert_eq!(
        found["cached_tokens"].as_u64().unwrap(),
        tier("ram") + tier("disk")
    );
    (tier("ram"), tier("disk"))
}

#[tokio::test]
async fn lookup_and_usage_tell_the_tier() {
    let dir = tempfile::TempDir::new().unwrap();
    let first = server_at(dir.path());
    let app = first.app();
    assert_eq!(lookup(&app, 100).await, (0, 0));
    assert_eq!(
        complete(&app, json!({})).await,
        json!({"cached_tokens": 0, "disk_tokens": 0})
    );
    assert_eq!(lookup(&app, 100).await, (96, 0));
    assert_eq!(
        complete(&app, json!({})).await,
        json!({"cached_tokens": 96, "disk_tokens": 0})
    );
    first.close().await;
    let second = server_at(dir.path());
    let app = second.app();
    assert_eq!(lookup(&app, 100).await, (0, 96));
    assert_eq!(
        complete(&app, json!({})).await,
        json!({"cached_tokens": 96, "disk_tokens": 96})
    );
    assert_eq!(lookup(&app, 100).await, (96, 0));
    let (_, stats) = call(&app, Request::get("/v1/cache/stats").body(Body::empty()).unwrap()).await;
    let disk = &stats["below"]["tiers"][0];
    assert_eq!(
        (&disk["name"], &disk["blocks_loaded"]),
        (&json!("disk"), &json!(3))
    );
    assert!(disk["off"].is_null());
    second.close().await;
    assert_eq!(
        call(&app, post("/v1/completions", &json!({"prompt": "x"})))
            .await
            .0,
        503
    );
}

#[tokio::test]
async fn what_clients_say_about_time_holds() {
    let server = server_with(|_| ());
    let app = server.app();
    let pass = async |minutes| {
        let by = Duration::from_mins(minutes);
        server
            .inspect(move |engine| engine.advance_cache(by))
            .await
            .unwrap();
    };
    complete(&app, json!({"prompt_cache_retention": "in_memory"})).await;
    pass(59).await;
    assert_eq!(lookup(&app, 100).await.0, 96);
    pass(2).await;
    assert_eq!(lookup(&app, 100).await.0, 0);
    complete(&app, json!({})).await;
    pass(60 * 24 * 30).await;
    assert_eq!(lookup(&app, 100).await.0, 96);

    let marked = |ttl: Value| {
        json!({
            "max_tokens": 2,
            "system": [{"type": "text", "text": "one two three four five six seven eight nine ten ".repeat(4),
                "cache_control": {"type": "ephemeral", "ttl": ttl}}],
            "messages": [{"role": "user", "content": "hello"}],
        })
    };
    let read = async |ttl: &str| {
        let answer = ok(&app, "/v1/messages", marked(json!(ttl))).await;
        answer["usage"]["cache_read_input_tokens"].as_u64().unwrap()
    };
    assert_eq!(read("5m").await, 0);
    pass(4).await;
    assert!(read("5m").await > 0);
    pass(6).await;
    assert_eq!(read("1h").await, 0);
    pass(50).await;
    assert!(read("5m").await > 0, "the longer wish holds");
    let (status, value) = call(&app, post("/v1/messages", &marked(json!("2h")))).await;
    assert_eq!((status.as_u16(), &value["type"]), (400, &json!("error")));
    let ask = json!({"prompt": "x", "prompt_cache_retention": "forever"});
    let (status, value) = call(&app, post("/v1/completions", &ask)).await;
    assert_eq!(
        (status.as_u16(), &value["error"]["param"]),
        (400, &json!("prompt_cache_retention"))
    );
}

#[tokio::test]
async fn a_pinned_prompt_stays() {
    let server = server_with(|c| {
        c.engine.kv_bytes = 3 << 18;
        c.engine.context = 512;
    });
    let app = server.app();
    complete(&app, json!({})).await;
    let tokens = json!({"tokens": prompt(100)});
    assert_eq!(
        ok(&app, "/v1/cache/pin", tokens.clone()).await["pinned_tokens"],
        96
    );
    for n in 0..20 {
        let other: Vec<usize> = (0..400).map(|i| 3 + (i * 11 + n) % 250).collect();
        complete(&app, json!({"prompt": other})).await;
    }
    assert_eq!(lookup(&app, 100).await.0, 96);
    assert_eq!(
        ok(&app, "/v1/cache/unpin", tokens.clone()).await["unpinned_tokens"],
        96
    );
    for n in 0..20 {
        let other: Vec<usize> = (0..400).map(|i| 3 + (i * 13 + n) % 250).collect();
        complete(&app, json!({"prompt": other})).await;
    }
    assert_eq!(lookup(&app, 100).await.0, 0);
}
