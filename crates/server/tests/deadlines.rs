//! How long requests may take: in line, while they answer, on every route.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::time::Duration;

use antefix_server::Server;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, events, post, server_with};
use serde_json::{Value, json};

const HOUR: Duration = Duration::from_hours(1);

/// A request that writes for long.
fn ask(deadline_ms: u64) -> Value {
    json!({
        "prompt": "x", "max_tokens": 1900, "temperature": 0, "ignore_eos": true,
        "antefix": {"deadline_ms": deadline_ms},
    })
}

fn with_header(path: &str, body: &Value, ms: &str) -> Request<Body> {
    let mut request = post(path, body);
    request
        .headers_mut()
        .insert("x-request-timeout-ms", ms.parse().unwrap());
    request
}

/// Lets deadlines come an hour nearer as soon as somebody has drawn `tokens` tokens behind a prompt of `prompt`.
async fn an_hour_passes_after(server: &Server, prompt: usize, tokens: usize) {
    for _ in 0..100_000 {
        let passed = server.inspect(move |engine| {
            let there = engine.running().any(|(_, t)| t.len() >= prompt + tokens);
            if there {
                engine.advance_deadlines(HOUR);
            }
            there
        });
        if passed.await.unwrap() {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("nobody ever wrote");
}

async fn pages(app: &Router) -> u64 {
    let stats = Request::get("/v1/cache/stats").body(Body::empty()).unwrap();
    let (_, stats) = call(app, stats).await;
    let number = |name: &str| stats[name].as_u64().unwrap();
    (number("bytes_used") - number("blocks") * number("block_bytes")).div_ceil(number("block_bytes"))
}

#[tokio::test]
async fn who_gets_no_turn_in_time_is_told_so_on_every_route() {
    let server = server_with(|_| ());
    let app = server.app();
    server
        .inspect(|engine| engine.advance_deadlines(HOUR))
        .await
        .unwrap();
    let say = json!([{"role": "user", "content": "x"}]);
    let ms = "3600000";
    for (path, body) in [
        ("/v1/chat/completions", json!({"messages": say})),
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/embeddings", json!({"input": "x"})),
        ("/v1/responses", json!({"input": "x"})),
        ("/v1/messages", json!({"messages": say, "max_tokens": 5})),
    ] {
        let (status, value) = call(&app, with_header(path, &body, ms)).await;
        assert_eq!(
            (status.as_u16(), &value["error"]["type"]),
            (504, &json!("timeout_error")),
            "{path}: {value}"
        );
        let code = match path {
            "/v1/messages" => Value::Null,
            _ => json!("deadline_exceeded"),
        };
        assert_eq!(value["error"]["code"], code, "{path}");
        // Without the header there is time enough.
        assert_eq!(call(&app, post(path, &body)).await.0, 200, "{path}");
    }
    let (status, value) = call(&app, post("/v1/completions", &ask(3_600_000))).await;
    assert_eq!(status.as_u16(), 504, "{value}");
    // A chat's first chunk, which tells the role, waits for a first token, too: clients measure their time to it.
    let mut chat = ask(3_600_000);
    chat["messages"] = say;
    for (path, mut body) in [
        ("/v1/completions", ask(3_600_000)),
        ("/v1/chat/completions", chat),
    ] {
        body["stream"] = json!(true);
        let lines = events(&app, path, body, false).await;
        assert_eq!(lines.len(), 1, "{path}: {lines:?}");
        assert_eq!(lines[0]["error"]["code"], "deadline_exceeded", "{path}");
    }
    assert_eq!(pages(&app).await, 0);
}

#[tokio::test]
async fn real_time_passes_while_the_engine_is_busy() {
    let server = server_with(|_| ());
    let app = server.app();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let busy = server.inspect(move |_| {
        let _ = wait.recv(); // until the sender is gone
    });
    let late = async {
        let answer = tokio::spawn({
            let app = app.clone();
            async move { call(&app, post("/v1/completions", &ask(1))).await }
        });
        tokio::time::sleep(Duration::from_millis(30)).await;
        drop(go);
        answer.await.unwrap()
    };
    let (_, (status, value)) = tokio::join!(busy, late);
    assert_eq!(status.as_u16(), 504, "{value}");
}

#[tokio::test]
async fn what_is_written_by_then_is_the_answer() {
    let server = server_with(|_| ());
    let app = server.app();
    let prompt = call(&app, post("/tokenize", &json!({"content": "x"}))).await.1["count"]
        .as_u64()
        .unwrap();
    let prompt = prompt as usize;
    let asked = ask(3_600_000);
    let whole_request = post("/v1/completions", &asked);
    let whole = call(&app, whole_request);
    let ((), (status, answer)) = tokio::join!(an_hour_passes_after(&server, prompt, 3), whole);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["antefix"]["deadline_exceeded"], true);
    let drawn = answer["usage"]["completion_tokens"].as_u64().unwrap() as usize;
    assert!((3..1900).contains(&drawn), "{drawn}");
    assert_eq!(pages(&app).await, 0, "nothing is held any more");

    // The same with as many tokens is the same text: it stopped between two steps, and nothing was lost.
    let mut short = asked.clone();
    short["max_tokens"] = json!(drawn);
    short["antefix"] = json!({});
    let (_, same) = call(&app, post("/v1/completions", &short)).await;
    assert_eq!(same["choices"][0]["text"], answer["choices"][0]["text"]);
    assert!(same.get("antefix").is_none());

    // A stream ends the same way; the clock is one hour ahead by now.
    let mut stream = ask(2 * 3_600_000);
    stream["stream"] = json!(true);
    let streamed = events(&app, "/v1/completions", stream, true);
    let ((), lines) = tokio::join!(an_hour_passes_after(&server, prompt, 3), streamed);
    let last = lines.last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(last["antefix"]["deadline_exceeded"], true);
    assert!(lines.len() < 1900);
    assert_eq!(pages(&app).await, 0);
}

#[tokio::test]
async fn the_servers_limit_holds_and_requests_can_only_shorten_it() {
    let server = server_with(|c| c.request_timeout = Some(HOUR));
    let app = server.app();
    server
        .inspect(|engine| engine.advance_deadlines(HOUR))
        .await
        .unwrap();
    for body in [ask(7_200_000), json!({"prompt": "x"})] {
        let (status, value) = call(&app, post("/v1/completions", &body)).await;
        assert_eq!(status.as_u16(), 504, "{value}");
    }
}

#[tokio::test]
async fn limits_that_are_none_are_refused_by_name() {
    let app = server_with(|_| ()).app();
    for ms in ["0", "-1", "1.5", "soon", ""] {
        let (status, value) = call(&app, with_header("/v1/completions", &json!({"prompt": "x"}), ms)).await;
        assert_eq!(
            (status.as_u16(), &value["error"]["param"]),
            (400, &json!("x-request-timeout-ms")),
            "{ms}"
        );
    }
    for ms in [json!(0), json!(-1), json!("1"), json!(1.5)] {
        let body = json!({"prompt": "x", "antefix": {"deadline_ms": ms}});
        let (status, value) = call(&app, post("/v1/completions", &body)).await;
        let message = value["error"]["message"].as_str().unwrap();
        assert!(
            status == 400 && message.contains("antefix.deadline_ms"),
            "{status} {message}"
        );
    }
}
