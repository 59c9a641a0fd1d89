//! The routes, called without a socket, on a tiny random model.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::time::Duration;

use antefix_kernels::cpu::Cpu;
use antefix_models::spec::Arch;
use antefix_server::KeyConfig;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, events, ok, post, server_with, text};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

fn app() -> Router {
    server_with(|_| ()).app()
}

fn long_prompt(n: usize) -> String {
    let words: Vec<String> = (0..n).map(|i| format!("word{}", i % 17)).collect();
    words.join(" ")
}

#[tokio::test]
async fn streamed_and_whole_answers_agree() {
    let app = app();
    let ask = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "temperature": 0.8, "seed": 3,
        "n": 3, "logprobs": true, "top_logprobs": 2,
    });
    let whole = ok(&app, "/v1/chat/completions", ask.clone()).await;
    assert_eq!(whole["usage"]["completion_tokens"], 60);
    assert_eq!(whole["choices"].as_array().unwrap().len(), 3);
    let mut streaming = ask;
    streaming["stream"] = json!(true);
    streaming["stream_options"] = json!({"include_usage": true});
    let chunks = events(&app, "/v1/chat/completions", streaming, true).await;
    for index in 0..3 {
        let mine = || {
            chunks
                .iter()
                .flat_map(|c| c["choices"].as_array().unwrap())
                .filter(move |c| c["index"] == index)
        };
        let roles: Vec<_> = mine().map(|c| c["delta"]["role"] == "assistant").collect();
        assert!(
            roles[0] && !roles[1..].contains(&true),
            "once, at its start: {roles:?}"
        );
        let said: String = mine().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(whole["choices"][index]["message"]["content"], said);
        let logprobs: Vec<&Value> = mine()
            .filter_map(|c| c["logprobs"]["content"].as_array())
            .flatten()
            .collect();
        let want: Vec<&Value> = whole["choices"][index]["logprobs"]["content"]
            .as_array()
            .unwrap()
            .iter()
            .collect();
        assert_eq!(logprobs, want);
        assert_eq!(want.len(), 20);
        assert_eq!(mine().next_back().unwrap()["finish_reason"], "length");
    }
    assert_ne!(
        whole["choices"][0], whole["choices"][1],
        "seeds follow each other"
    );
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 60);
}

#[tokio::test]
async fn a_second_turn_finds_the_first_one_cached_and_says_the_same() {
    let app = app();
    let first = long_prompt(60);
    let ask = json!({"prompt": first, "max_tokens": 40, "temperature": 0, "logprobs": 3});
    let cold = ok(&app, "/v1/completions", ask.clone()).await;
    assert_eq!(cold["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let warm = ok(&app, "/v1/completions", ask.clone()).await;
    let prompt = warm["usage"]["prompt_tokens"].as_u64().unwrap();
    let cached = warm["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap();
    assert!(
        cached + 32 >= prompt && cached.is_multiple_of(32),
        "{cached} of {prompt}"
    );
    assert_eq!(
        cold["choices"], warm["choices"],
        "to the bit, log-probabilities included"
    );
    // Other salts see nothing of it.
    let mut salted = ask;
    salted["cache_salt"] = json!("other");
    let other = ok(&app, "/v1/completions", salted).await;
    assert_eq!(other["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(other["choices"], cold["choices"]);
    let look = ok(&app, "/v1/cache/lookup", json!({"content": first})).await;
    assert_eq!(look["cached_tokens"].as_u64(), Some(cached));
    let request = Request::get("/v1/cache/tree").body(Body::empty()).unwrap();
    let (_, tree) = call(&app, request).await;
    assert!(tree["nodes"][0]["tokens"].as_u64().unwrap() >= cached);
    assert!(tree["nodes"][0]["text"].as_str().unwrap().contains("word0"));
}

#[tokio::test]
async fn echo_scores_the_prompt_as_the_answer_would_be() {
    let app = app();
    let ask = json!({"prompt": [5, 6, 7, 8], "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": true});
    let echoed = ok(&app, "/v1/completions", ask).await;
    let lists = &echoed["choices"][0]["logprobs"];
    assert_eq!(lists["tokens"].as_array().unwrap().len(), 8);
    assert!(lists["token_logprobs"][0].is_null());
    assert!(lists["token_logprobs"][1].as_f64().unwrap() < 0.0);
    // Score the whole text again: what was drawn has the log-probability it was drawn with.
    let drawn = ok(
        &app,
        "/v1/completions",
        json!({"prompt": [5, 6, 7, 8], "max_tokens": 4, "temperature": 0, "logprobs": 0}),
    )
    .await;
    assert_eq!(
        drawn["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()[..],
        lists["token_logprobs"].as_array().unwrap()[4..]
    );
    let scored = ok(
        &app,
        "/v1/completions",
        json!({"prompt": [5, 6, 7, 8], "max_tokens": 0, "logprobs": 0, "echo": true}),
    )
    .await;
    assert_eq!(
        scored["choices"][0]["logprobs"]["tokens"]
            .as_array()
            .unwrap()
            .len(),
        4
    );
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn structured_answers_validate_whoever_looks_at_them() {
    let app = app();
    let schema = json!({
        "type": "object", "required": ["colour", "list"], "additionalProperties": false,
        "properties": {"colour": {"enum": ["red", "green"]}, "list": {"type": "array", "items": {"type": "integer", "maximum": 99,
        "minimum": 10}, "minItems": 2, "maxItems": 3}},
    });
    let ask = json!({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "temperature": 1, "seed": 4, "n": 4,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": true}},
    });
    let chat = "/v1/chat/completions";
    let whole = ok(&app, chat, ask.clone()).await;
    let said = |v: &Value| -> Vec<String> {
        let choices = v["choices"].as_array().unwrap();
        let text = |c: &Value| c["message"]["content"].as_str().unwrap().to_string();
        choices.iter().map(text).collect()
    };
    for (i, text) in said(&whole).iter().enumerate() {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(["red", "green"].contains(&value["colour"].as_str().unwrap()));
        let list = value["list"].as_array().unwrap();
        assert!(
            (2..=3).contains(&list.len()) && list.iter().all(|x| (10..=99).contains(&x.as_i64().unwrap()))
        );
        assert_eq!(whole["choices"][i]["finish_reason"], "stop");
    }
    // Forced tokens are computed one by one for their log-probabilities: the answer is the same.
    let mut looked_at = ask.clone();
    looked_at["logprobs"] = json!(true);
    let looked_at = ok(&app, chat, looked_at).await;
    assert_eq!(said(&whole), said(&looked_at));
    assert_eq!(
        whole["usage"]["completion_tokens"],
        looked_at["usage"]["completion_tokens"]
    );
    for (bad, word) in [
        (json!({"type": "xml"}), "xml"),
        (json!({"type": "json_schema", "json_schema": {}}), "missing"),
        (
            json!({"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}),
            "colour",
        ),
        (
            json!({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}),
            "not",
        ),
    ] {
        let mut ask = ask.clone();
        ask["response_format"] = bad;
        let (status, value) = call(&app, post(chat, &ask)).await;
        assert_eq!(status.as_u16(), 400, "{value}");
        assert!(
            value["error"]["message"].as_str().unwrap().contains(word),
            "{value}"
        );
        assert_eq!(value["error"]["param"], "response_format");
    }
    let guided = json!({"prompt": "x", "max_tokens": 20, "guided_choice": ["one", "two"], "seed": 1});
    let guided = ok(&app, "/v1/completions", guided).await;
    assert!(["one", "two"].contains(&guided["choices"][0]["text"].as_str().unwrap()));
}

#[tokio::test]
async fn forced_calls_are_made() {
    let app = app();
    let tool = |name: &str| {
        json!({"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "required": ["x"], "additionalProperties": false,
            "properties": {"x": {"$ref": "#/$defs/digit"}}, "$defs": {"digit": {"enum": [1, 2, 3]}},
        }}})
    };
    let mut ask = json!({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "seed": 2, "tools": [tool("f"), tool("g")],
        "tool_choice": "required",
    });
    let chat = "/v1/chat/completions";
    let made = ok(&app, chat, ask.clone()).await;
    assert_eq!(made["choices"][0]["finish_reason"], "tool_calls");
    let call_ = &made["choices"][0]["message"]["tool_calls"][0]["function"];
    assert!(["f", "g"].contains(&call_["name"].as_str().unwrap()));
    let arguments: Value = serde_json::from_str(call_["arguments"].as_str().unwrap()).unwrap();
    assert!((1..=3).contains(&arguments["x"].as_i64().unwrap()));
    ask["tool_choice"] = json!({"type": "function", "function": {"name": "g"}});
    ask["stream"] = json!(true);
    let chunks = events(&app, chat, ask.clone(), true).await;
    let streamed = chunks
        .iter()
        .find_map(|c| c.pointer("/choices/0/delta/tool_calls/0"))
        .unwrap();
    assert_eq!(streamed["function"]["name"], "g");
    ask["tool_choice"] = json!({"type": "function", "function": {"name": "h"}});
    assert_eq!(call(&app, post(chat, &ask)).await.0, 400);

    let ask = json!({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "tool_choice": {"type": "any"},
        "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}, "additionalProperties": false}}],
    });
    let made = ok(&app, "/v1/messages", ask).await;
    assert_eq!(made["stop_reason"], "tool_use");
    assert_eq!(made["content"][0]["name"], "f");
    assert_eq!(made["content"][0]["input"], json!({}));
}

#[tokio::test]
async fn best_of_keeps_the_likeliest() {
    let app = app();
    let ask =
        |n: usize| json!({"prompt": "abc", "max_tokens": 6, "seed": 1, "n": n, "best_of": 6, "logprobs": 0});
    let mean = |c: &Value| {
        let lp: Vec<f64> = c["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect();
        lp.iter().sum::<f64>() / lp.len() as f64
    };
    let all = ok(&app, "/v1/completions", ask(6)).await;
    let best = ok(&app, "/v1/completions", ask(2)).await;
    let mut means: Vec<f64> = all["choices"].as_array().unwrap().iter().map(mean).collect();
    means.sort_by(|a, b| b.total_cmp(a));
    let got: Vec<f64> = best["choices"].as_array().unwrap().iter().map(mean).collect();
    assert_eq!(got, means[..2]);
    assert_eq!(best["usage"]["completion_tokens"], 36);
}

#[tokio::test]
async fn bad_requests_are_named_in_openai_s_shape() {
    let app = app();
    let chat = "/v1/chat/completions";
    let hello = json!([{"role": "user", "content": "x"}]);
    let cases = [
        (chat, json!({"messages": []}), 400, "messages"),
        (
            chat,
            json!({"messages": [{"role": "king", "content": "x"}]}),
            400,
            "king",
        ),
        (
            chat,
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            400,
            "image_url",
        ),
        (chat, json!({"messages": hello, "model": "gpt-9"}), 404, "gpt-9"),
        (
            chat,
            json!({"messages": hello, "temperature": -1}),
            400,
            "temperature",
        ),
        (chat, json!({"messages": hello, "top_p": 7}), 400, "top_p"),
        (chat, json!({"messages": hello, "n": 0}), 400, "`n`"),
        (
            chat,
            json!({"messages": hello, "max_tokens": 0}),
            400,
            "max_tokens",
        ),
        (
            chat,
            json!({"messages": hello, "max_tokens": "many"}),
            400,
            "max_tokens",
        ),
        (
            chat,
            json!({"messages": hello, "logit_bias": {"x": 1}}),
            400,
            "logit_bias",
        ),
        (
            chat,
            json!({"messages": hello, "top_logprobs": 21, "logprobs": true}),
            400,
            "top_logprobs",
        ),
        (
            chat,
            json!({"messages": [{"role": "user", "content": long_prompt(3000)}]}),
            400,
            "context",
        ),
        ("/v1/completions", json!({"prompt": ""}), 400, "empty"),
        ("/v1/completions", json!({"prompt": [999_999]}), 400, "999999"),
        (
            "/v1/completions",
            json!({"prompt": "x", "n": 3, "best_of": 2}),
            400,
            "best_of",
        ),
        ("/v1/nowhere", json!({}), 404, "nowhere"),
        ("/detokenize", json!({"tokens": [4_000_000]}), 400, "4000000"),
    ];
    for (path, body, status, word) in cases {
        let (got, value) = call(&app, post(path, &body)).await;
        assert_eq!(got.as_u16(), status, "{body}: {value}");
        let message = value["error"]["message"].as_str().unwrap();
        assert!(message.contains(word), "{message}");
        assert!(value["error"]["type"].is_string());
    }
    for (body, status) in [("{", 400), ("[]", 400), ("\u{0}", 400)] {
        let request = Request::post(chat)
            .header("content-type", "application/json")
            .body(Body::from(body))
            .unwrap();
        let (got, value) = call(&app, request).await;
        assert_eq!(got.as_u16(), status, "{body:?}");
        assert!(value["error"]["message"].is_string());
    }
    let deep = "[".repeat(100_000);
    let request = Request::post(chat)
        .header("content-type", "application/json")
        .body(Body::from(deep))
        .unwrap();
    assert_eq!(call(&app, request).await.0, 400);
    let (status, _) = call(&app, post(chat, &json!({"messages": "x".repeat(2 << 20)}))).await;
    assert_eq!(status, 413);
    let (status, _) = call(&app, Request::get(chat).body(Body::empty()).unwrap()).await;
    assert_eq!(status, 405);
}

#[tokio::test]
async fn unknown_fields_are_named_or_refused() {
    let ask = json!({"prompt": "x", "max_tokens": 1, "frobnicate": 1, "user": "me"});
    let response = app().oneshot(post("/v1/completions", &ask)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["x-antefix-ignored-fields"], "frobnicate");
    let strict = server_with(|c| c.strict = true).app();
    let (status, value) = call(&strict, post("/v1/completions", &ask)).await;
    assert_eq!(
        (status.as_u16(), value["error"]["param"].as_str()),
        (400, Some("frobnicate"))
    );
}

#[tokio::test]
async fn keys_are_wanted_and_their_caches_are_apart() {
    let key = |name: &str, secret: &str| KeyConfig {
        name: name.into(),
        key: Some(secret.into()),
        ..KeyConfig::default()
    };
    let app =
        server_with(|c| c.keys = vec![key("a", "aaaaaaaaaaaaaaaa"), key("b", "bbbbbbbbbbbbbbbb")]).app();
    let ask = json!({"prompt": long_prompt(50), "max_tokens": 1});
    let with = |key: Option<&str>| {
        let mut request = post("/v1/completions", &ask);
        if let Some(key) = key {
            request
                .headers_mut()
                .insert("authorization", format!("Bearer {key}").parse().unwrap());
        }
        request
    };
    for path in [
        "/v1/models",
        "/metrics",
        "/v1/loads",
        "/v1/cache/tree",
        "/server_info",
    ] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        assert_eq!(call(&app, request).await.0, 401, "{path}");
    }
    assert_eq!(call(&app, with(None)).await.0, 401);
    for path in [
        "/v1/chat/completions",
        "/v1/messages",
        "/tokenize",
        "/v1/cache/lookup",
    ] {
        let (status, _) = call(&app, post(path, &json!("nonsense"))).await;
        assert_eq!(status, 401, "{path}: the key comes before the body");
    }
    assert_eq!(call(&app, with(Some("aaaaaaaaaaaaaaab"))).await.0, 401);
    let cached = |v: Value| {
        v["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(cached(call(&app, with(Some("aaaaaaaaaaaaaaaa"))).await.1), 0);
    assert!(cached(call(&app, with(Some("aaaaaaaaaaaaaaaa"))).await.1) > 0);
    assert_eq!(cached(call(&app, with(Some("bbbbbbbbbbbbbbbb"))).await.1), 0);
    let (status, _) = call(&app, Request::get("/health/ready").body(Body::empty()).unwrap()).await;
    assert_eq!(status, 200, "probes need no key");
}

#[tokio::test]
async fn anthropic_messages_count_what_they_read_and_wrote() {
    let app = app();
    let system = long_prompt(60);
    let ask = |stream: bool| {
        json!({
            "model": "tiny", "max_tokens": 12, "temperature": 0, "stream": stream,
            "system": [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": "hello"}],
        })
    };
    let cold = ok(&app, "/v1/messages", ask(false)).await;
    let number = |v: &Value, name: &str| v["usage"][name].as_u64().unwrap();
    let sum = |v: &Value| {
        number(v, "input_tokens")
            + number(v, "cache_creation_input_tokens")
            + number(v, "cache_read_input_tokens")
    };
    assert_eq!(cold["type"], "message");
    assert_eq!(cold["stop_reason"], "max_tokens");
    assert_eq!(number(&cold, "cache_read_input_tokens"), 0);
    assert!(number(&cold, "cache_creation_input_tokens") > 60);
    let warm = ok(&app, "/v1/messages", ask(false)).await;
    assert!(number(&warm, "cache_read_input_tokens") > 60);
    assert_eq!(sum(&cold), sum(&warm));
    assert_eq!(cold["content"], warm["content"]);
    let mut count = ask(false);
    count.as_object_mut().unwrap().remove("max_tokens");
    let counted = ok(&app, "/v1/messages/count_tokens", count).await;
    assert_eq!(counted["input_tokens"].as_u64(), Some(sum(&cold)));

    let chunks = events(&app, "/v1/messages", ask(true), false).await;
    let kinds: Vec<&str> = chunks.iter().map(|c| c["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..2], ["message_start", "content_block_start"]);
    assert_eq!(
        kinds[kinds.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    let said: String = chunks
        .iter()
        .filter_map(|c| c["delta"]["text"].as_str())
        .collect();
    assert_eq!(cold["content"][0]["text"], said);
    assert_eq!(chunks[chunks.len() - 2]["usage"]["output_tokens"], 12);

    let (status, value) = call(
        &app,
        post("/v1/messages", &json!({"messages": [], "max_tokens": 3})),
    )
    .await;
    assert_eq!((status.as_u16(), value["type"].as_str()), (400, Some("error")));
    assert_eq!(value["error"]["type"], "invalid_request_error");
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_memory() {
    let app = app();
    let mut ask =
        json!({"prompt": long_prompt(40), "max_tokens": 1500, "ignore_eos": true, "cache_salt": "gone"});
    for (stream, gone) in [(false, 1), (true, 2)] {
        ask["stream"] = json!(stream);
        let request = app.clone().oneshot(post("/v1/completions", &ask));
        if stream {
            let mut body = request.await.unwrap().into_body();
            assert!(body.frame().await.unwrap().is_ok());
            drop(body);
        } else {
            let left = tokio::time::timeout(Duration::from_millis(30), request).await;
            assert!(left.is_err(), "it was still running");
        }
        let wanted = [
            format!("antefix_requests_cancelled_total {gone}\n"),
            "vllm:num_requests_running 0\n".to_string(),
        ];
        let mut tries = 0;
        loop {
            let request = Request::get("/metrics").body(Body::empty()).unwrap();
            let metrics = text(app.clone().oneshot(request).await.unwrap()).await;
            if wanted.iter().all(|w| metrics.contains(w)) {
                break;
            }
            tries += 1;
            assert!(tries < 1000, "{metrics}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn a_full_line_turns_away_with_retry_after() {
    let app = server_with(|c| {
        c.limits.queue = 2;
        // Room for one long sequence.
        c.engine.kv_bytes = 1 << 20;
        c.engine.context = 1024;
    })
    .app();
    let ask = json!({"prompt": "x", "max_tokens": 4, "n": 3});
    let response = app.oneshot(post("/v1/completions", &ask)).await.unwrap();
    assert_eq!(response.status(), 429);
    assert!(
        response.headers()["retry-after"]
            .to_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            >= 1
    );
}

#[tokio::test]
async fn tokens_go_there_and_back() {
    let app = app();
    let text = "héllo <|weird|> 世界";
    let tokens = ok(&app, "/tokenize", json!({"content": text, "add_special": false})).await;
    let back = ok(&app, "/detokenize", json!({"tokens": tokens["tokens"]})).await;
    assert_eq!(back["content"], text);
    let prompt = ok(
        &app,
        "/apply-template",
        json!({"messages": [{"role": "user", "content": "x"}]}),
    )
    .await;
    assert_eq!(prompt["prompt"], "[user]x\n[assistant]");
}

#[tokio::test]
async fn marks_are_counted_by_how_long_they_hold() {
    let app = app();
    let block = |text: String, ttl: &str| json!({"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": ttl}});
    let ask = json!({
        "max_tokens": 4, "temperature": 0,
        "system": [block(long_prompt(60), "1h")],
        "messages": [{"role": "user", "content": [block(long_prompt(90), "5m")]}, {"role": "user", "content": "And now?"}],
    });
    let cold = ok(&app, "/v1/messages", ask.clone()).await;
    let usage = &cold["usage"];
    let number = |v: &Value| v.as_u64().unwrap();
    let (hour, minutes) = (
        number(&usage["cache_creation"]["ephemeral_1h_input_tokens"]),
        number(&usage["cache_creation"]["ephemeral_5m_input_tokens"]),
    );
    assert!(
        hour > 60 && minutes > 90 && number(&usage["input_tokens"]) > 0,
        "{usage}"
    );
    assert_eq!(hour + minutes, number(&usage["cache_creation_input_tokens"]));
    let warm = ok(&app, "/v1/messages", ask.clone()).await;
    assert_eq!(warm["usage"]["cache_creation"]["ephemeral_1h_input_tokens"], 0);
    let mut bad = ask.clone();
    bad["system"] = json!([block("x".into(), "1d")]);
    let (status, value) = call(&app, post("/v1/messages", &bad)).await;
    assert_eq!((status.as_u16(), value["type"].as_str()), (400, Some("error")));
    let mut many = ask;
    many["messages"] = json!(
        (0..5)
            .map(|_| json!({"role": "user", "content": [block("x".into(), "5m")]}))
            .collect::<Vec<_>>()
    );
    assert_eq!(call(&app, post("/v1/messages", &many)).await.0, 400);
}

#[tokio::test]
async fn the_stop_sequence_that_came_is_named() {
    let app = app();
    let ask = |stops: &[&str]| {
        json!({
            "max_tokens": 200, "temperature": 0, "stop_sequences": stops, "messages": [{"role": "user", "content": "hello"}],
        })
    };
    let whole = ok(&app, "/v1/messages", ask(&[])).await;
    let text = whole["content"][0]["text"].as_str().unwrap();
    let middle: String = text.chars().skip(text.chars().count() / 2).take(2).collect();
    let stopped = ok(&app, "/v1/messages", ask(&["never said", &middle])).await;
    assert_eq!(stopped["stop_reason"], "stop_sequence");
    assert_eq!(stopped["stop_sequence"].as_str(), Some(middle.as_str()));
    let mut streaming = ask(&["never said", &middle]);
    streaming["stream"] = json!(true);
    let chunks = events(&app, "/v1/messages", streaming, false).await;
    assert_eq!(
        chunks[chunks.len() - 2]["delta"]["stop_sequence"].as_str(),
        Some(middle.as_str())
    );
}

#[tokio::test]
async fn a_biased_token_is_drawn_or_never() {
    let app = app();
    let ask = |bias: Value| json!({"prompt": "x", "max_tokens": 12, "seed": 1, "logit_bias": bias, "logprobs": 0, "ignore_eos": true});
    let tokens = |v: Value| v["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone();
    let only = tokens(ok(&app, "/v1/completions", ask(json!({"40": 100}))).await);
    assert!(only.iter().all(|t| t == &only[0]), "{only:?}");
    let without = tokens(ok(&app, "/v1/completions", ask(json!({"40": -100}))).await);
    assert!(without.iter().all(|t| t != &only[0]), "{without:?}");
}

#[tokio::test]
async fn one_call_at_most_without_parallel_calls() {
    // The model writes what the grammar makes it write: two calls.
    let app = app();
    let call_text = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    let mut ask = json!({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "tools": [tool],
        "guided_choice": [format!("{call_text}{call_text}")],
    });
    let chat = "/v1/chat/completions";
    let calls = |v: &Value| v["choices"][0]["message"]["tool_calls"].as_array().unwrap().len();
    assert_eq!(calls(&ok(&app, chat, ask.clone()).await), 2);
    ask["parallel_tool_calls"] = json!(false);
    assert_eq!(calls(&ok(&app, chat, ask.clone()).await), 1);
    ask["stream"] = json!(true);
    let chunks = events(&app, chat, ask, true).await;
    let streamed = chunks
        .iter()
        .filter(|c| c.pointer("/choices/0/delta/tool_calls/0").is_some());
    assert_eq!(streamed.count(), 1);
}

#[tokio::test]
async fn hints_of_hosted_caches_are_accepted() {
    let ask = json!({
        "prompt": "x", "max_tokens": 1, "prompt_cache_key": "k", "prompt_cache_retention": "24h", "user": "me", "store": false,
    });
    let response = app().oneshot(post("/v1/completions", &ask)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key("x-antefix-ignored-fields"));
}

#[tokio::test]
async fn an_answer_that_cannot_go_on_fails_by_name_and_alone() {
    let app = app();
    // It can be derived in more and more ways the longer it gets, until the parser may not keep them all.
    let ways: Vec<String> = (2..40).map(|n| vec!["s"; n].join(" ")).collect();
    let grammar = format!("start: s\ns: {} | \"a\" | \"b\"", ways.join(" | "));
    let (_, tokenizer) = antefix_conformance::tiny(Arch::Llama, Cpu::best(), 1);
    let ends = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_end(id));
    let never: serde_json::Map<String, Value> = ends.map(|id| (id.to_string(), json!(-100))).collect();
    let bad = json!({
        "prompt": "x", "max_tokens": 1500, "temperature": 1, "seed": 1, "guided_grammar": grammar, "ignore_eos": true,
        "logit_bias": never,
    });
    let plain = |k: usize| {
        json!({
            "prompt": long_prompt(40 + k), "max_tokens": 60, "temperature": 0, "ignore_eos": true, "logprobs": 1,
            "cache_salt": k.to_string(),
        })
    };
    let mut alone = Vec::new();
    for k in 0..3 {
        alone.push(ok(&app, "/v1/completions", plain(k)).await["choices"].clone());
    }
    let fresh = self::app();
    let (failed, a, b, c) = tokio::join!(
        call(&fresh, post("/v1/completions", &bad)),
        ok(&fresh, "/v1/completions", plain(0)),
        ok(&fresh, "/v1/completions", plain(1)),
        ok(&fresh, "/v1/completions", plain(2)),
    );
    assert_eq!(failed.0, 400, "{}", failed.1);
    assert_eq!(failed.1["error"]["code"], "constraint_failed");
    assert!(failed.1["error"]["message"].as_str().unwrap().contains("hint: "));
    // Its masks get harder and harder, but nobody waits for long.
    let loads = call(&fresh, Request::get("/v1/loads").body(Body::empty()).unwrap());
    let loads = loads.await.1;
    let steps = loads["steps"].as_array().unwrap().iter();
    let longest = steps.map(|s| s["ms"].as_f64().unwrap()).fold(0.0, f64::max);
    assert!(longest < 2_000.0, "{longest} ms");
    assert_eq!(
        [&a["choices"], &b["choices"], &c["choices"]],
        [&alone[0], &alone[1], &alone[2]]
    );
    // In a stream, whose status is sent already, it is the last event.
    let mut streamed = bad.clone();
    streamed["stream"] = json!(true);
    let lines = events(&fresh, "/v1/completions", streamed, false).await;
    let last = lines.last().unwrap();
    assert_eq!(last["error"]["code"], "constraint_failed", "{last}");

    assert_eq!(ok(&fresh, "/v1/completions", plain(0)).await["choices"], alone[0]);
}
