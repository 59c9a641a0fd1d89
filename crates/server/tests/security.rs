//! Who is let in, and what a hostile client can do.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use antefix_server::{Config, KeyConfig};
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, ok, post, server_with, text};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

fn key(name: &str, secret: &str) -> KeyConfig {
    KeyConfig {
        name: name.into(),
        key: Some(secret.into()),
        ..KeyConfig::default()
    }
}

fn with_key(mut request: Request<Body>, key: &str) -> Request<Body> {
    let value = format!("Bearer {key}").parse().unwrap();
    request.headers_mut().insert("authorization", value);
    request
}

fn get(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

/// Serves on a free port; the server lives as long as the test.
async fn listening(change: impl FnOnce(&mut Config)) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = server_with(change);
    tokio::spawn(server.serve(listener, None, std::future::pending()));
    address
}

/// What the server sends until it closes the connection.
async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes));
    let _reset = read.await.expect("the server closes the connection");
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn without_keys_only_this_machine_s_names_are_answered() {
    let ask = |app: Router, host: &'static str| async move {
        let request = Request::get("/v1/models")
            .header("host", host)
            .body(Body::empty())
            .unwrap();
        app.oneshot(request).await.unwrap().status().as_u16()
    };
    let open = server_with(|c| c.hosts = vec!["box.lan".into()]).app();
    for (host, want) in [
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("box.lan", 200),
        ("evil.example", 403),
    ] {
        assert_eq!(ask(open.clone(), host).await, want, "{host}");
    }
    // A page that was bound to our address has no key: with keys, names do not matter.
    let locked = server_with(|c| c.keys = vec![key("a", "aaaaaaaaaaaaaaaa")]).app();
    assert_eq!(ask(locked.clone(), "evil.example").await, 401);
    let request = Request::get("/v1/models")
        .header("host", "api.example")
        .body(Body::empty())
        .unwrap();
    assert_eq!(call(&locked, with_key(request, "aaaaaaaaaaaaaaaa")).await.0, 200);
}

#[tokio::test]
async fn other_origins_are_not_invited() {
    let app = server_with(|_| ()).app();
    let mut request = post("/v1/completions", &json!({"prompt": "x", "max_tokens": 1}));
    request
        .headers_mut()
        .insert("origin", "https://evil.example".parse().unwrap());
    let response = app.clone().oneshot(request).await.unwrap();
    assert!(!response.headers().contains_key("access-control-allow-origin"));
    // What a browser sends across origins without asking first is no JSON, and is refused.
    for kind in ["text/plain", "application/x-www-form-urlencoded"] {
        let request = Request::post("/v1/completions")
            .header("content-type", kind)
            .body(Body::from(r#"{"prompt": "x"}"#))
            .unwrap();
        assert_eq!(call(&app, request).await.0, 415, "{kind}");
    }
    let preflight = Request::options("/v1/completions").body(Body::empty()).unwrap();
    assert_eq!(call(&app, preflight).await.0, 405);
}

#[tokio::test]
async fn administration_is_not_where_clients_are() {
    let boss = KeyConfig {
        admin: true,
        ..key("boss", "bbbbbbbbbbbbbbbb")
    };
    let server = server_with(|c| c.keys = vec![key("a", "aaaaaaaaaaaaaaaa"), boss]);
    let (app, admin) = (server.app(), server.admin_app());
    let clear = || Request::post("/admin/cache/clear").body(Body::empty()).unwrap();
    assert_eq!(call(&app, with_key(clear(), "bbbbbbbbbbbbbbbb")).await.0, 404);
    assert_eq!(call(&admin, clear()).await.0, 401);
    assert_eq!(call(&admin, with_key(clear(), "aaaaaaaaaaaaaaaa")).await.0, 403);
    let prompt = json!({"prompt": "a long prompt ".repeat(40), "max_tokens": 1});
    let ask = || with_key(post("/v1/completions", &prompt), "aaaaaaaaaaaaaaaa");
    let cached = |v: Value| {
        v["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    call(&app, ask()).await;
    assert!(cached(call(&app, ask()).await.1) > 0);
    let (status, freed) = call(&admin, with_key(clear(), "bbbbbbbbbbbbbbbb")).await;
    assert_eq!(status, 200);
    assert!(freed["bytes_freed"].as_u64().unwrap() > 0);
    assert_eq!(cached(call(&app, ask()).await.1), 0);
    let metrics = admin
        .oneshot(with_key(get("/metrics"), "bbbbbbbbbbbbbbbb"))
        .await
        .unwrap();
    assert!(text(metrics).await.contains("antefix_kv_bytes_used"));
}

#[tokio::test]
async fn each_limit_of_a_key_holds() {
    let limited = KeyConfig {
        body_bytes: Some(2000),
        max_tokens: Some(5),
        n: Some(2),
        ..key("a", "aaaaaaaaaaaaaaaa")
    };
    let app = server_with(|c| c.keys = vec![limited, key("b", "bbbbbbbbbbbbbbbb")]).app();
    let ask = |body: Value, k: &'static str| {
        let app = app.clone();
        async move { call(&app, with_key(post("/v1/completions", &body), k)).await }
    };
    let a = "aaaaaaaaaaaaaaaa";
    assert_eq!(ask(json!({"prompt": "x", "max_tokens": 6}), a).await.0, 400);
    assert_eq!(
        ask(json!({"prompt": "x", "max_tokens": 5, "n": 3}), a).await.0,
        400
    );
    let large = json!({"prompt": "x", "max_tokens": 1, "user": "y".repeat(3000)});
    assert_eq!(ask(large.clone(), a).await.0, 413);
    assert_eq!(ask(large, "bbbbbbbbbbbbbbbb").await.0, 200);
    let (status, value) = ask(
        json!({"prompt": "x", "max_tokens": 5, "n": 2, "ignore_eos": true}),
        a,
    )
    .await;
    assert_eq!(
        (status.as_u16(), &value["usage"]["completion_tokens"]),
        (200, &json!(10))
    );
    // A conversation's end is bounded, too, where nothing is said.
    let request = post(
        "/v1/chat/completions",
        &json!({"messages": [{"role": "user", "content": "x"}], "ignore_eos": true}),
    );
    let (_, value) = call(&app, with_key(request, a)).await;
    assert_eq!(value["usage"]["completion_tokens"], 5);
}

#[tokio::test]
async fn remembered_responses_belong_to_their_key() {
    let app =
        server_with(|c| c.keys = vec![key("a", "aaaaaaaaaaaaaaaa"), key("b", "bbbbbbbbbbbbbbbb")]).app();
    let ask = post("/v1/responses", &json!({"input": "x", "max_output_tokens": 1}));
    let (_, response) = call(&app, with_key(ask, "aaaaaaaaaaaaaaaa")).await;
    let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
    assert_eq!(call(&app, with_key(get(&path), "bbbbbbbbbbbbbbbb")).await.0, 404);
    assert_eq!(call(&app, with_key(get(&path), "aaaaaaaaaaaaaaaa")).await.0, 200);
    assert_eq!(call(&app, get(&path)).await.0, 401);
}

#[tokio::test]
async fn deep_json_is_refused_wherever_it_is() {
    let app = server_with(|_| ()).app();
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(5000), close.repeat(5000));
        for body in [
            deep.clone(),
            format!("{{\"prompt\": \"x\", \"frobnicate\": {deep}}}"),
        ] {
            let request = Request::post("/v1/completions")
                .header("content-type", "application/json")
                .body(Body::from(body))
                .unwrap();
            assert_eq!(call(&app, request).await.0, 400);
        }
    }
    ok(&app, "/v1/completions", json!({"prompt": "x", "max_tokens": 1})).await;
}

#[tokio::test]
async fn requests_have_ids() {
    let app = server_with(|_| ()).app();
    let response = app.clone().oneshot(get("/version")).await.unwrap();
    assert!(
        response.headers()["x-request-id"]
            .to_str()
            .unwrap()
            .starts_with("req-")
    );
    let request = Request::get("/version")
        .header("x-request-id", "mine")
        .body(Body::empty())
        .unwrap();
    assert_eq!(
        app.oneshot(request).await.unwrap().headers()["x-request-id"],
        "mine"
    );
}

#[tokio::test]
async fn a_slow_head_is_not_waited_for() {
    let address = listening(|c| c.clients.head = Duration::from_millis(300)).await;
    let mut slow = TcpStream::connect(address).await.unwrap();
    let begun = Instant::now();
    for byte in b"GET /version HTTP/1.1\r\nx-slow: 1" {
        if slow.write_all(&[*byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    rest(&mut slow).await;
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_slow_body_is_answered_with_408() {
    let address = listening(|c| c.body_timeout = Duration::from_millis(300)).await;
    let mut slow = TcpStream::connect(address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{";
    slow.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..20 {
        // Something arrives all the time; the whole does not.
        tokio::time::sleep(Duration::from_millis(50)).await;
        if slow.write_all(b" ").await.is_err() {
            break;
        }
    }
    let answer = rest(&mut slow).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_left() {
    let address = listening(|c| c.clients.stalled = Duration::from_millis(150)).await;
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "stream": true, "n": 8, "max_tokens": 1900, "ignore_eos": true,
        "logprobs": true, "top_logprobs": 20,
    })
    .to_string();
    let mut lazy = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    lazy.write_all((head + &body).as_bytes()).await.unwrap();
    // Whoever reads meanwhile is served.
    let mut other = TcpStream::connect(address).await.unwrap();
    other
        .write_all(b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    assert!(rest(&mut other).await.starts_with("HTTP/1.1 200"));
    let begun = Instant::now();
    loop {
        let mut probe = TcpStream::connect(address).await.unwrap();
        probe
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            .await
            .unwrap();
        let metrics = rest(&mut probe).await;
        // It was noticed while the answers were still being computed.
        if metrics.contains("antefix_requests_cancelled_total 8\n")
            && metrics.contains("vllm:num_requests_running 0\n")
        {
            break;
        }
        assert!(begun.elapsed() < Duration::from_mins(1), "{metrics}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!rest(&mut lazy).await.contains("[DONE]"));
}

#[tokio::test]
async fn connections_are_counted() {
    let address = listening(|c| {
        c.clients.connections = 2;
        c.clients.head = Duration::from_millis(500);
    })
    .await;
    let mut idle = vec![
        TcpStream::connect(address).await.unwrap(),
        TcpStream::connect(address).await.unwrap(),
    ];
    tokio::time::sleep(Duration::from_millis(50)).await;
    let begun = Instant::now();
    let mut third = TcpStream::connect(address).await.unwrap();
    third
        .write_all(b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    assert!(rest(&mut third).await.starts_with("HTTP/1.1 200"));
    assert!(
        begun.elapsed() > Duration::from_millis(200),
        "it waited for a place"
    );
    for stream in &mut idle {
        rest(stream).await;
    }
}
