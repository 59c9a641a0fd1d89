//! The description of the API: every route is in it, and what is sent is what it says.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, ok, server_with, text};
use serde_json::{Value, json};
use tower::ServiceExt;

/// What issue and documentation promise.
const ROUTES: [(&str, &str); 29] = [
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/embeddings"),
    ("post", "/v1/responses"),
    ("get", "/v1/responses/{id}"),
    ("delete", "/v1/responses/{id}"),
    ("post", "/v1/messages"),
    ("post", "/v1/messages/count_tokens"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("get", "/v1/methods"),
    ("post", "/v1/cache/lookup"),
    ("get", "/v1/cache/stats"),
    ("get", "/v1/cache/tree"),
    ("post", "/v1/cache/pin"),
    ("post", "/v1/cache/unpin"),
    ("get", "/v1/traces/{id}"),
    ("get", "/v1/traces/{id}/tensors"),
    ("get", "/v1/loads"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("post", "/apply-template"),
    ("get", "/metrics"),
    ("get", "/health"),
    ("get", "/health/live"),
    ("get", "/health/ready"),
    ("get", "/version"),
    ("get", "/server_info"),
    ("get", "/openapi.json"),
];

async fn description(app: &Router) -> Value {
    call(app, Request::get("/openapi.json").body(Body::empty()).unwrap())
        .await
        .1
}

#[tokio::test]
async fn every_route_is_described_and_every_described_route_is_there() {
    let app = server_with(|_| ()).app();
    let api = description(&app).await;
    assert!(
        api["openapi"].as_str().unwrap().starts_with("3.1"),
        "{}",
        api["openapi"]
    );
    let mut described = vec![("get".to_string(), "/openapi.json".to_string())];
    for (path, item) in api["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            described.push((method.clone(), path.clone()));
            assert!(operation["summary"].is_string(), "{method} {path} has no summary");
            assert!(
                operation["responses"]["default"].is_object(),
                "{method} {path} has no errors"
            );
        }
    }
    for (method, path) in ROUTES {
        assert!(
            described.contains(&(method.into(), path.into())),
            "{method} {path} is not described"
        );
    }
    assert_eq!(described.len(), ROUTES.len(), "{described:?}");
    for (method, path) in described {
        let request = Request::builder()
            .method(method.to_uppercase().as_str())
            .uri(path.replace("{name}", "tiny").replace("{id}", "none"))
            .body(Body::empty())
            .unwrap();
        let response = app.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = text(response).await;
        assert!(
            status != 405 && !body.contains("unknown_url"),
            "{method} {path}: {status} {body}"
        );
    }
}

#[tokio::test]
async fn references_lead_somewhere_and_names_are_unique() {
    fn check(api: &Value, value: &Value) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(to)) = fields.get("$ref") {
                    assert!(api.pointer(to.trim_start_matches('#')).is_some(), "{to}");
                }
                fields.values().for_each(|v| check(api, v));
            }
            Value::Array(list) => list.iter().for_each(|v| check(api, v)),
            _ => {}
        }
    }
    let api = description(&server_with(|_| ()).app()).await;
    check(&api, &api);
    let knobs = &api["components"]["schemas"]["Knobs"]["properties"];
    assert!(knobs["temperature"].is_object() && knobs["logit_bias"].is_object());
    let mut ids: Vec<&Value> = Vec::new();
    for item in api["paths"].as_object().unwrap().values() {
        ids.extend(
            item.as_object()
                .unwrap()
                .values()
                .map(|operation| &operation["operationId"]),
        );
    }
    for (i, id) in ids.iter().enumerate() {
        assert!(!ids[..i].contains(id), "two operations are called {id}");
    }
}

#[tokio::test]
async fn answers_are_as_described() {
    let app = server_with(|_| ()).app();
    let api = description(&app).await;
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "additionalProperties": false}}});
    let say = json!([{"role": "user", "content": "x"}]);
    for (path, body) in [
        (
            "/v1/chat/completions",
            json!({"messages": say, "max_tokens": 3, "logprobs": true, "n": 2}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": say, "max_tokens": 60, "tools": [tool], "tool_choice": "required"}),
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "max_tokens": 3, "logprobs": 2, "echo": true}),
        ),
        ("/v1/completions", json!({"prompt": "x", "max_tokens": 3})),
        ("/v1/embeddings", json!({"input": ["x", "y"]})),
        (
            "/v1/embeddings",
            json!({"input": "x", "encoding_format": "base64"}),
        ),
        (
            "/v1/messages",
            json!({"messages": say, "max_tokens": 3, "stop_sequences": ["a"]}),
        ),
        ("/v1/responses", json!({"input": "x", "max_output_tokens": 3})),
    ] {
        let answer = ok(&app, path, body).await;
        let pointer = format!(
            "/paths/{}/post/responses/200/content/application~1json/schema",
            path.replace('/', "~1")
        );
        let mut schema = json!({"components": api["components"]});
        let described = api
            .pointer(&pointer)
            .unwrap_or_else(|| panic!("{path} does not say what it answers"));
        schema["allOf"] = json!([described]);
        let validator = jsonschema::validator_for(&schema).unwrap();
        let errors: Vec<String> = validator.iter_errors(&answer).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "{path}: {errors:?}\n{answer}");
    }
}

#[tokio::test]
async fn the_pages_are_served_and_load_nothing_from_elsewhere() {
    let app = server_with(|_| ()).app();
    for path in [
        "/",
        "/docs",
        "/main.js",
        "/style.css",
        "/vendor/uplot/uPlot.iife.min.js",
    ] {
        let response = app
            .clone()
            .oneshot(Request::get(path).body(Body::empty()).unwrap())
            .await
            .unwrap();
        assert_eq!(response.status(), 200, "{path}");
        let policy = response.headers()["content-security-policy"].to_str().unwrap();
        assert!(
            policy.starts_with("default-src 'self'") && !policy.contains("inline"),
            "{policy}"
        );
        assert_eq!(response.headers()["x-content-type-options"], "nosniff");
        if path == "/" || path == "/docs" {
            let page = text(response).await;
            assert!(!page.contains("http://") && !page.contains("https://"), "{path}");
        }
    }
}
