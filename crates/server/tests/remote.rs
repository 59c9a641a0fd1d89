//! A server with a cache on another machine: what it brings, and that nobody waits for it.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use antefix_server::{RemoteConfig, Server};
use axum::body::Body;
use axum::http::Request;
use common::{call, ok, server_with};
use serde_json::{Value, json};
use tempfile::TempDir;

fn server_at(uri: &str) -> Server {
    server_with(|c| c.cache.remote = Some(RemoteConfig::at(uri)))
}

/// The answer and where its prompt came from; `salt` is the tenant.
async fn complete(server: &Server, salt: &str) -> (Value, Value) {
    let prompt: Vec<usize> = (0..100).map(|i| 3 + i * 7 % 250).collect();
    let ask = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "logprobs": 1, "cache_salt": salt});
    let answer = ok(&server.app(), "/v1/completions", ask).await;
    (
        answer["choices"][0].clone(),
        answer["usage"]["prompt_tokens_details"].clone(),
    )
}

/// What the server says of its store.
async fn stats(server: &Server) -> Value {
    let ask = Request::get("/v1/cache/stats").body(Body::empty()).unwrap();
    let (_, stats) = call(&server.app(), ask).await;
    stats["below"]["tiers"][0].clone()
}

#[tokio::test]
async fn prompts_come_back_after_a_restart_for_their_tenant_alone() {
    let dir = TempDir::new().unwrap();
    let uri = format!("fs://{}", dir.path().display());
    let first = server_at(&uri);
    let (cold, from) = complete(&first, "a").await;
    assert_eq!(from, json!({"cached_tokens": 0, "disk_tokens": 0}));
    first.close().await;
    let second = server_at(&uri);
    let (other, from) = complete(&second, "b").await;
    assert_eq!(
        (&other, from["disk_tokens"].as_u64()),
        (&cold, Some(0)),
        "another tenant"
    );
    let (warm, from) = complete(&second, "a").await;
    assert_eq!(from, json!({"cached_tokens": 96, "disk_tokens": 96}));
    assert_eq!(warm, cold, "bit for bit");
    let tier = stats(&second).await;
    assert_eq!(
        (&tier["name"], &tier["off"]),
        (&json!("fs"), &Value::Null),
        "{tier}"
    );
    second.close().await;
}

#[tokio::test]
async fn a_damaged_store_gives_misses() {
    let dir = TempDir::new().unwrap();
    let uri = format!("fs://{}", dir.path().display());
    let first = server_at(&uri);
    let (cold, _) = complete(&first, "a").await;
    first.close().await;
    let mut harmed = 0;
    for folder in std::fs::read_dir(dir.path()).unwrap() {
        for file in std::fs::read_dir(folder.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            harmed += 1;
        }
    }
    assert!(harmed >= 3, "{harmed} blocks");
    let second = server_at(&uri);
    let (again, from) = complete(&second, "a").await;
    assert_eq!((again, from["disk_tokens"].as_u64()), (cold, Some(0)));
    second.close().await;
}

#[tokio::test]
async fn nobody_waits_long_for_a_store_that_is_silent_or_gone() {
    let plain = server_with(|_| ());
    let (want, _) = complete(&plain, "a").await;
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [silent.local_addr().unwrap(), gone] {
        let server = server_at(&format!("redis://{address}"));
        let began = Instant::now();
        for _ in 0..20 {
            assert_eq!(complete(&server, "a").await.0, want);
        }
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
        // Figures are a second old at most.
        while !stats(&server).await["off"].is_string() {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "it says that it left the store alone"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        server.close().await;
    }
}
