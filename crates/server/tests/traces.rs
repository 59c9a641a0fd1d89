//! Hooks over HTTP: off unless the server analyses, within limits, for those who asked.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::time::Duration;

use antefix_models::captures;
use antefix_server::{Analysis, KeyConfig};
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, post, server_with};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

fn app(limits: Analysis) -> Router {
    server_with(|c| c.analysis = Some(limits)).app()
}

fn ask(antefix: Value) -> Value {
    json!({
        "model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 6, "temperature": 0,
        "ignore_eos": true, "antefix": antefix,
    })
}

/// The answer's text and the ids of its traces.
async fn run(app: &Router, body: Value) -> (String, Vec<String>) {
    let response = app
        .clone()
        .oneshot(post("/v1/chat/completions", &body))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let ids = response.headers().get("x-antefix-trace");
    let ids = ids.map_or_else(Vec::new, |v| {
        v.to_str().unwrap().split(',').map(str::to_owned).collect()
    });
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let value: Value = serde_json::from_slice(&bytes).unwrap();
    let text = value["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_default();
    (text.to_owned(), ids)
}

async fn get(app: &Router, path: &str, key: Option<&str>) -> (u16, Vec<u8>) {
    let mut request = Request::get(path);
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let response = app
        .clone()
        .oneshot(request.body(Body::empty()).unwrap())
        .await
        .unwrap();
    let status = response.status().as_u16();
    (
        status,
        response.into_body().collect().await.unwrap().to_bytes().to_vec(),
    )
}

#[tokio::test]
async fn a_request_captures_is_probed_and_changed_and_others_are_not() {
    let app = app(Analysis::default());
    let (plain, none) = run(&app, ask(json!({}))).await;
    assert!(none.is_empty());
    let (watched, ids) = run(
        &app,
        ask(json!({"capture": {
            "captures": [{"at": {"site": "attn.hook_z", "layers": [0], "positions": "answer"}}],
            "probes": [{"id": "p", "layers": [1], "positions": "last", "read": {"top": 1}}],
        }})),
    )
    .await;
    assert_eq!(watched, plain, "looking changes nothing");
    assert_eq!(ids.len(), 1);
    let (status, body) = get(&app, &format!("/v1/traces/{}", ids[0]), None).await;
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["tensors"][0]["name"], "blocks.0.attn.hook_z");
    // The last token of the prompt and all but the last of the answer.
    assert_eq!(body["tensors"][0]["rows"], 6);
    assert_eq!(body["probes"][0]["heads"][0]["rows"].as_array().unwrap().len(), 1);
    let (status, bytes) = get(&app, &format!("/v1/traces/{}/tensors", ids[0]), None).await;
    assert_eq!(status, 200);
    let captured = captures::from_bytes(&bytes, "trace").unwrap();
    assert_eq!(captured[0].positions.len(), 6);

    let edit = json!({"hooks": {"edits": [{"at": {"site": "hook_resid_mid"}, "do": {"scale": -1}}]}});
    let (changed, _) = run(&app, ask(edit)).await;
    assert_ne!(changed, plain);
    assert_eq!(
        run(&app, ask(json!({}))).await.0,
        plain,
        "the cache has nothing of the edited run"
    );
}

#[tokio::test]
async fn hooks_are_off_unless_the_server_analyses() {
    let app = server_with(|_| ()).app();
    let capture = json!({"capture": [{"at": {"site": "hook_embed"}}]});
    let (status, body) = call(&app, post("/v1/chat/completions", &ask(capture))).await;
    assert_eq!(status, 400);
    assert!(
        body["error"]["message"].as_str().unwrap().contains("--analysis"),
        "{body}"
    );
    assert_eq!(get(&app, "/v1/traces/x", None).await.0, 404);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_by_name() {
    let app = app(Analysis {
        sequence_bytes: 100,
        ..Analysis::default()
    });
    for (antefix, says) in [
        (
            json!({"capture": [{"at": {"site": "hook_embed"}}]}),
            "the limit is 100",
        ),
        (
            json!({"capture": [{"at": {"site": "attn.hook_z", "layers": [99]}}]}),
            "layer 99",
        ),
        (json!({"capture": [{"at": {"site": "nowhere"}}]}), "is no site"),
        (
            json!({"hooks": {"edits": [{"at": {"site": "hook_embed"}, "do": {"set": {"from": {"capture": "x"}}}}]}}),
            "no capture `x`",
        ),
    ] {
        let (status, body) = call(&app, post("/v1/chat/completions", &ask(antefix))).await;
        assert_eq!(status, 400, "{body}");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains(says), "{message}");
    }
}

#[tokio::test]
async fn traces_are_their_owners_and_go_with_number_and_age() {
    let key = |key: &str| KeyConfig {
        name: key.into(),
        key: Some(key.into()),
        ..KeyConfig::default()
    };
    let server = |limits| {
        server_with(|c| {
            c.analysis = Some(limits);
            c.keys = vec![key("one-key-of-a-tenant"), key("the-key-of-another")];
        })
        .app()
    };
    let capture = |app: Router| async move {
        let body = ask(json!({"capture": [{"at": {"site": "attn.hook_z", "positions": "last"}}]}));
        let mut request = post("/v1/chat/completions", &body);
        let value = "Bearer one-key-of-a-tenant".parse().unwrap();
        request.headers_mut().insert("authorization", value);
        let response = app.oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let id = response.headers()["x-antefix-trace"].to_str().unwrap().to_owned();
        response.into_body().collect().await.unwrap();
        id
    };
    let app = server(Analysis {
        count: 2,
        ..Analysis::default()
    });
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(capture(app.clone()).await);
    }
    let status = async |app: &Router, id: &str, key| get(app, &format!("/v1/traces/{id}"), Some(key)).await.0;
    assert_eq!(status(&app, &ids[2], "one-key-of-a-tenant").await, 200);
    assert_eq!(status(&app, &ids[1], "one-key-of-a-tenant").await, 200);
    assert_eq!(
        status(&app, &ids[0], "one-key-of-a-tenant").await,
        404,
        "the oldest went"
    );
    assert_eq!(
        status(&app, &ids[2], "the-key-of-another").await,
        404,
        "another tenant's"
    );
    let app = server(Analysis {
        age: Duration::ZERO,
        ..Analysis::default()
    });
    let id = capture(app.clone()).await;
    assert_eq!(status(&app, &id, "one-key-of-a-tenant").await, 404, "too old");
}

/// Log-probabilities of the drawn tokens, and how many of the prompt's were cached.
async fn bits(app: &Router, antefix: Value) -> (Value, u64) {
    let prompt = "the quick brown fox jumps over the lazy dog and runs away from it. ".repeat(4);
    let body = json!({
        "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "logprobs": 1, "antefix": antefix,
    });
    let (status, answer) = call(app, post("/v1/completions", &body)).await;
    assert_eq!(status, 200, "{answer}");
    let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    let logprobs = &answer["choices"][0]["logprobs"];
    let bits = json!([logprobs["tokens"], logprobs["token_logprobs"]]);
    (bits, cached.as_u64().unwrap())
}

#[tokio::test]
async fn whoever_runs_beside_an_edited_request_gets_the_same_bits() {
    let (alone, cold) = bits(&app(Analysis::default()), json!({})).await;
    let app = app(Analysis::default());
    let edit =
        |scale: f32| json!({"hooks": {"edits": [{"at": {"site": "attn.hook_z"}, "do": {"scale": scale}}]}});
    let capture = json!({"capture": [{"at": {"site": "hook_resid_post"}}]});
    let (edited, seen, first) =
        tokio::join!(bits(&app, edit(0.5)), bits(&app, capture), bits(&app, json!({})));
    assert_ne!(edited.0, alone);
    assert_eq!(seen.0, alone, "looking changes nothing");
    assert_eq!(first.0, alone);
    // What the edited run cached is for runs of the same edits.
    let (other, cached) = bits(&app, edit(0.25)).await;
    assert_ne!(other, edited.0);
    assert_eq!(cached, 0);
    let (again, cached) = bits(&app, edit(0.5)).await;
    assert_eq!(again, edited.0);
    assert!(cached > 0);

    let fresh = server_with(|c| c.analysis = Some(Analysis::default())).app();
    bits(&fresh, edit(0.5)).await;
    assert_eq!(
        bits(&fresh, json!({})).await,
        (alone, cold),
        "nothing of it is found"
    );
}

#[tokio::test]
async fn positions_are_those_of_a_rewritten_prompt() {
    let app = app(Analysis::default());
    let body = ask(json!({
        "documents": [{"text": "one two three four"}], "context": "jrt",
        "capture": [{"at": {"site": "hook_embed", "positions": "last"}}],
    }));
    let (_, ids) = run(&app, body.clone()).await;
    let (_, bytes) = get(&app, &format!("/v1/traces/{}/tensors", ids[0]), None).await;
    let captured = captures::from_bytes(&bytes, "trace").unwrap();
    let (_, answer) = call(&app, post("/v1/chat/completions", &body)).await;
    let prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(prompt > answer["antefix"]["prompt_tokens_before"].as_u64().unwrap());
    assert_eq!(captured[0].positions, [prompt as u32 - 1]);
}

#[tokio::test]
async fn memory_for_captures_is_reserved_until_a_request_ends() {
    let app = app(Analysis {
        sequence_bytes: 1 << 20,
        bytes: 3 << 19,
        ..Analysis::default()
    });
    let probe = json!({"capture": {"probes": [{"positions": "last", "read": {"top": 1}}]}});
    let twice = json!({"prompt": "x", "n": 2, "max_tokens": 1, "antefix": probe});
    let (status, body) = call(&app, post("/v1/completions", &twice)).await;
    assert_eq!(
        (status.as_u16(), &body["error"]["param"]),
        (400, &json!("antefix")),
        "{body}"
    );
    // A client that reads nothing: its answer waits, and what it captured with it.
    let mut held =
        json!({"prompt": "x", "max_tokens": 1000, "ignore_eos": true, "stream": true, "antefix": probe});
    let response = app.clone().oneshot(post("/v1/completions", &held)).await.unwrap();
    assert_eq!(response.status(), 200);
    held["stream"] = json!(false);
    held["max_tokens"] = json!(1);
    let (status, body) = call(&app, post("/v1/completions", &held)).await;
    assert_eq!(
        (status.as_u16(), &body["error"]["code"]),
        (429, &json!("rate_limit_exceeded")),
        "{body}"
    );
    drop(response);
    for _ in 0..1000 {
        if call(&app, post("/v1/completions", &held)).await.0 == 200 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the memory never came back");
}

#[tokio::test]
async fn what_is_too_much_is_refused_and_what_does_not_fit_is_counted() {
    let small = app(Analysis {
        entries: 2,
        tensors: 3,
        sequence_bytes: 4096,
        ..Analysis::default()
    });
    let at = json!({"at": {"site": "attn.hook_z", "positions": "last"}});
    let many: Vec<u32> = (0..5000).collect();
    for (antefix, says) in [
        (json!({"capture": [at, at, at]}), "the limit is 2"),
        (
            json!({"capture": [at, {"id": "b", "at": {"site": "attn.hook_q", "positions": "last"}}]}),
            "fill 4 tensors",
        ),
        (
            json!({"capture": [{"at": {"site": "hook_embed", "positions": {"list": many}}}]}),
            "a list of 5000",
        ),
        (
            json!({"capture": [{"id": "x".repeat(65), "at": {"site": "hook_embed", "positions": "last"}}]}),
            "65 bytes",
        ),
        (
            json!({"capture": {"edits": [{"at": {"site": "hook_embed"}, "do": {"scale": 0}}]}}),
            "changes nothing",
        ),
    ] {
        let (status, body) = call(&small, post("/v1/chat/completions", &ask(antefix))).await;
        let message = body["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(says), "{status} {message}");
    }
    // The weights of every row are more than there is room for.
    let all = json!({"capture": {"probes": [{"layers": [0], "heads": [0], "read": {"weights": true}}]}});
    let mut body = ask(all);
    body["messages"] = json!([{"role": "user", "content": "word ".repeat(60)}]);
    let (_, ids) = run(&small, body).await;
    let (_, trace) = get(&small, &format!("/v1/traces/{}", ids[0]), None).await;
    let trace: Value = serde_json::from_slice(&trace).unwrap();
    assert!(trace["dropped_rows"].as_u64().unwrap() > 0);
    let rows = trace["probes"][0]["heads"][0]["rows"].as_array().unwrap();
    assert!(!rows.is_empty() && rows.len() < 40, "{}", rows.len());
}

#[tokio::test]
async fn a_key_may_be_kept_from_looking() {
    let key = |name: &str, analysis| KeyConfig {
        name: name.into(),
        key: Some(format!("the-key-of-{name}")),
        analysis,
        ..KeyConfig::default()
    };
    let app = server_with(|c| {
        c.analysis = Some(Analysis::default());
        c.keys = vec![key("somebody", None), key("somebody-else", Some(false))];
    })
    .app();
    for (name, status) in [("somebody", 200), ("somebody-else", 403)] {
        let mut request = post(
            "/v1/chat/completions",
            &ask(json!({"capture": [{"at": {"site": "hook_embed"}}]})),
        );
        let value = format!("Bearer the-key-of-{name}").parse().unwrap();
        request.headers_mut().insert("authorization", value);
        assert_eq!(call(&app, request).await.0, status);
    }
}
