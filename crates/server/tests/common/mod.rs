//! A server on a tiny random model, and calls without a socket.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "a test may, and not every one needs everything"
)]

use std::time::Duration;

use antefix_engine::{Budget, Options};
use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;
use antefix_models::template::ChatTemplate;
use antefix_server::{CacheConfig, ClientLimits, Config, Limits, Offer, RememberLimits, Server, ServerError};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]";

pub(crate) fn server_with(change: impl FnOnce(&mut Config)) -> Server {
    start(change).unwrap()
}

pub(crate) fn start(change: impl FnOnce(&mut Config)) -> Result<Server, ServerError> {
    let (model, tokenizer) = antefix_conformance::tiny(Arch::Llama, Cpu::best(), 1);
    let template = ChatTemplate::new(TEMPLATE, "", "").unwrap();
    let mut config = Config {
        names: vec!["tiny".into()],
        engine: Options {
            kv_bytes: 32 << 20,
            context: 2048,
            budget: Budget::default(),
        },
        chunks: None,
        limits: Limits { queue: 64 },
        keys: Vec::new(),
        offer: Offer {
            methods: antefix_papers::ALL,
            always: antefix_papers::ALWAYS,
            ..Offer::default()
        },
        analysis: None,
        request_timeout: None,
        strict: false,
        body_bytes: 1 << 20,
        body_timeout: Duration::from_secs(5),
        clients: ClientLimits::default(),
        remember: RememberLimits::default(),
        hosts: Vec::new(),
        drain: Duration::from_secs(5),
        cache: CacheConfig::default(),
    };
    change(&mut config);
    Server::start(&model, &tokenizer, Some(template), config)
}

pub(crate) fn post(path: &str, body: &Value) -> Request<Body> {
    Request::post(path)
        .header("content-type", "application/json")
        .body(Body::from(body.to_string()))
        .unwrap()
}

pub(crate) async fn text(response: Response<Body>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

pub(crate) async fn call(app: &Router, request: Request<Body>) -> (StatusCode, Value) {
    let response = app.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let text = text(response).await;
    (
        status,
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}")),
    )
}

/// The answer of a request that must succeed.
pub(crate) async fn ok(app: &Router, path: &str, body: Value) -> Value {
    let (status, value) = call(app, post(path, &body)).await;
    assert_eq!(status, 200, "{value}");
    value
}

/// The data of a server-sent event stream, `[DONE]` checked and left out.
pub(crate) async fn events(app: &Router, path: &str, body: Value, done: bool) -> Vec<Value> {
    let response = app.clone().oneshot(post(path, &body)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = text(response).await;
    let mut data: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    if done {
        assert_eq!(data.pop(), Some("[DONE]"));
    }
    data.iter().map(|d| serde_json::from_str(d).unwrap()).collect()
}
