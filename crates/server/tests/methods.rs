//! Methods over HTTP: chosen per request, reported in the answer, and never to be found in the cache of exact prefixes.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use antefix_attention::method::{Bands, RawMethods};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use common::{call, post, server_with, text};
use serde_json::{Value, json};
use tower::ServiceExt;

fn ask(prompt: &str, antefix: Value) -> Value {
    json!({
        "prompt": prompt, "max_tokens": 90, "temperature": 0, "ignore_eos": true, "logprobs": 1, "antefix": antefix,
    })
}

async fn complete(app: &Router, body: &Value) -> (StatusCode, Value) {
    call(app, post("/v1/completions", body)).await
}

/// The drawn tokens with their log-probabilities: what must agree bit for bit.
fn drawn(answer: &Value) -> (Value, Value) {
    let lists = &answer["choices"][0]["logprobs"];
    (lists["tokens"].clone(), lists["token_logprobs"].clone())
}

fn long_prompt() -> String {
    "the quick brown fox jumps over the lazy dog and runs away from it. ".repeat(6)
}

#[tokio::test]
async fn a_cut_cache_is_reported_and_leaves_nothing_behind_for_exact_requests() {
    let prompt = long_prompt();
    let cut = json!({"kv": "streaming_llm,budget=24,sinks=4,every=16"});
    let cold = server_with(|_| {}).app();
    let (_, dense_alone) = complete(&cold, &ask(&prompt, json!({}))).await;
    assert!(dense_alone.get("antefix").is_none(), "{dense_alone}");

    let app = server_with(|_| {}).app();
    let (status, first) = complete(&app, &ask(&prompt, cut.clone())).await;
    assert_eq!(status, StatusCode::OK, "{first}");
    let report = &first["antefix"];
    assert_eq!(report["method"], "streaming_llm");
    assert_eq!(report["settings"], "streaming_llm,budget=24,sinks=4,every=16");
    assert_eq!(report["exact"], false);
    let kept = report["kept"].as_f64().unwrap();
    assert!(kept > 0.0 && kept < 0.6, "{report}");
    // At the end of the prompt, and after 16, 32, 48, 64 and 80 of the 90 tokens, of which the last is not computed.
    assert_eq!(report["edits"], 6);
    assert_ne!(drawn(&first), drawn(&dense_alone), "24 rows are not all rows");

    // The same request again reads the exact prompt out of the cache and comes to the same cut state.
    let (_, second) = complete(&app, &ask(&prompt, cut)).await;
    assert!(
        second["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
            > 0
    );
    assert_eq!(drawn(&second), drawn(&first));
    // Nothing of it is to be found by those who want exact attention.
    let (_, dense) = complete(&app, &ask(&prompt, json!({}))).await;
    assert_eq!(drawn(&dense), drawn(&dense_alone));
}

#[tokio::test]
async fn documents_stand_in_front_of_the_question_and_are_read_twice() {
    let app = server_with(|_| {}).app();
    let chat = |antefix: Value| {
        post(
            "/v1/chat/completions",
            &json!({
                "messages": [{"role": "user", "content": "which one"}], "max_tokens": 4, "temperature": 0, "antefix": antefix,
            }),
        )
    };
    let documents = json!([{"id": "a", "text": "one two three"}, {"text": "four five six"}]);
    let (_, once) = call(&app, chat(json!({"documents": documents}))).await;
    let (status, twice) = call(&app, chat(json!({"documents": documents, "context": "jrt"}))).await;
    assert_eq!(status, StatusCode::OK, "{twice}");
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(
        tokens(&twice) > tokens(&once) + 6,
        "{} {}",
        tokens(&twice),
        tokens(&once)
    );
    assert_eq!(
        twice["antefix"]["prompt_tokens_before"].as_u64().unwrap(),
        tokens(&once)
    );
    assert_eq!(twice["antefix"]["kept"], 1.0);
    let (status, refused) = call(&app, chat(json!({"context": "jrt"}))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(
        refused["error"]["message"]
            .as_str()
            .unwrap()
            .contains("`jrt` needs documents"),
        "{refused}"
    );
}

#[tokio::test]
async fn wrong_choices_say_what_would_be_right() {
    let app = server_with(|_| {}).app();
    for (antefix, hint) in [
        (json!({"kv": "streaming"}), "choose from"),
        (json!({"kv": "streaming_llm,budget=0"}), "1 to 1048576"),
        (
            json!({"kv": {"name": "streaming_llm", "budgt": 1}}),
            "choose from budget, sinks, every",
        ),
        (
            json!({"kv": "streaming_llm,budget=4,sinks=4"}),
            "4 sinks leave nothing",
        ),
        (json!({"prefill": "streaming_llm"}), "write it under `kv`"),
        (json!({"cache": "streaming_llm"}), "prefill, decode, kv"),
        (json!({"documents": "text"}), "antefix.documents"),
    ] {
        let (status, body) = complete(&app, &ask("hello", antefix.clone())).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{antefix}");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains(hint), "{antefix}: {message}");
        assert_eq!(body["error"]["param"], "antefix");
    }
    let (status, body) = complete(&app, &json!({"prompt": "a", "method": "nothing_like_it"})).await;
    assert_eq!(
        (status, &body["error"]["param"]),
        (StatusCode::BAD_REQUEST, &json!("method"))
    );
    for method in ["dense", "exact", "streaming_llm,budget=64"] {
        let (status, body) = complete(&app, &json!({"prompt": "a", "method": method, "max_tokens": 1})).await;
        assert_eq!(status, StatusCode::OK, "{body}");
    }
}

#[tokio::test]
async fn the_servers_profile_holds_where_a_request_says_nothing() {
    let defaults: RawMethods = serde_json::from_value(json!({"kv": "streaming_llm,budget=16"})).unwrap();
    let app = server_with(|config| config.offer.defaults = defaults).app();
    let (_, answer) = complete(&app, &ask(&long_prompt(), json!({}))).await;
    assert_eq!(answer["antefix"]["method"], "streaming_llm", "{answer}");
    let (_, answer) = complete(&app, &ask(&long_prompt(), json!({"kv": "dense"}))).await;
    assert!(answer.get("antefix").is_none(), "{answer}");
}

fn bands(text: Value) -> Bands {
    Bands::new(serde_json::from_value(text).unwrap()).unwrap()
}

#[tokio::test]
async fn the_length_of_a_prompt_chooses_where_a_request_says_nothing() {
    let by_length = bands(json!([
        {"below": 60, "prefill": "dense"},
        {"from": 60, "prefill": "a_shape,window=16,sinks=4", "decode": "quest"},
    ]));
    let defaults: RawMethods = serde_json::from_value(json!({"kv": "streaming_llm,budget=4096"})).unwrap();
    let app = server_with(|config| {
        config.offer.bands = by_length;
        config.offer.defaults = defaults;
    })
    .app();
    let (long, short) = (long_prompt(), "the quick brown fox");
    let (_, answer) = complete(&app, &ask(&long, json!({}))).await;
    let tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens > 60, "{answer}");
    assert_eq!(
        answer["antefix"]["method"], "a_shape+quest+streaming_llm",
        "{answer}"
    );
    assert!(answer["antefix"]["density"].as_f64().unwrap() < 1.0);
    // Prompts of one request are of their own lengths.
    let both = json!({"prompt": [short, long], "max_tokens": 1, "antefix": {"kv": "dense"}});
    let (status, answer) = complete(&app, &both).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    // The report is that of the first prompt: dense, because the profile says so.
    let report = &answer["antefix"];
    assert_eq!(
        (&report["method"], &report["exact"]),
        (&json!("dense"), &json!(true)),
        "{answer}"
    );

    // What a request says, wins: one axis, all axes, and a knob.
    let (_, answer) = complete(&app, &ask(&long, json!({"prefill": "dense"}))).await;
    assert_eq!(answer["antefix"]["method"], "quest+streaming_llm", "{answer}");
    let (_, answer) = complete(&app, &ask(&long, json!({"prefill": "a_shape,window=8"}))).await;
    let settings = answer["antefix"]["settings"].as_str().unwrap();
    assert!(
        settings.starts_with("a_shape,") && settings.contains("window=8 "),
        "{settings}"
    );
    let mut body = ask(&long, json!({}));
    body["method"] = json!("dense");
    let (_, answer) = complete(&app, &body).await;
    assert_eq!(answer["antefix"]["method"], "dense", "{answer}");
    let alone = complete(&server_with(|_| {}).app(), &ask(&long, json!({})))
        .await
        .1;
    assert_eq!(drawn(&answer), drawn(&alone));

    // What does not go with the server's choice is told whose it was.
    let mut body = ask(
        &long,
        json!({"context": "ape", "documents": [{"text": "one two three"}]}),
    );
    body["max_tokens"] = json!(1);
    let (status, refused) = complete(&app, &body).await;
    let message = refused["error"]["message"].as_str().unwrap();
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(
        message.contains("the server chose the method of prefill, decode, kv"),
        "{message}"
    );
}

#[test]
fn a_server_does_not_start_with_methods_that_cannot_hold() {
    let start = |change: &dyn Fn(&mut antefix_server::Config)| common::start(|config| change(config));
    for (band, why) in [
        (
            json!([{"prefill": "flexprefil"}]),
            "there is no method `flexprefil`",
        ),
        (
            json!([{"from": 9, "decode": "quest,share=2"}]),
            "in the band from 9: `quest`: knob `share`",
        ),
        (
            json!([{"kv": "streaming_llm,budget=4,sinks=4"}]),
            "4 sinks leave nothing",
        ),
        (
            json!([{"prefill": "a_shape", "context": "ape"}]),
            "do not go together",
        ),
    ] {
        let error = start(&|config| config.offer.bands = bands(band.clone()))
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.starts_with("in the profile: ") && error.contains(why),
            "{error}"
        );
    }
    let bad: RawMethods = serde_json::from_value(json!({"kv": "quest"})).unwrap();
    let error = start(&|config| config.offer.defaults = bad.clone())
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("write it under `decode`"), "{error}");
}

#[tokio::test]
async fn metrics_are_kept_by_the_names_of_methods_whatever_their_settings() {
    let app = server_with(|_| {}).app();
    for antefix in [
        json!({"prefill": "a_shape,window=16,sinks=4", "decode": "quest"}),
        json!({"prefill": "a_shape,window=32,sinks=4", "decode": "quest,share=0.2"}),
        json!({"prefill": "a_shape,window=8,sinks=4"}),
        json!({"kv": "streaming_llm,budget=64"}),
        json!({}),
    ] {
        let (status, body) = complete(&app, &ask(&long_prompt(), antefix)).await;
        assert_eq!(status, StatusCode::OK, "{body}");
    }
    let response = app
        .oneshot(Request::get("/metrics").body(Body::empty()).unwrap())
        .await;
    let metrics = text(response.unwrap()).await;
    let value = |name: &str| -> f64 {
        let line = metrics
            .lines()
            .find(|line| line.strip_prefix(name).is_some_and(|l| l.starts_with(' ')));
        let line = line.unwrap_or_else(|| panic!("no {name} in {metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(
        value(r#"antefix_method_requests_total{prefill="a_shape",decode="quest"}"#),
        2.0
    );
    assert_eq!(
        value(r#"antefix_method_requests_total{prefill="a_shape",decode="dense"}"#),
        1.0
    );
    // What only cuts the cache reads densely.
    assert_eq!(
        value(r#"antefix_method_requests_total{prefill="dense",decode="dense"}"#),
        2.0
    );
    assert_eq!(
        value(r#"antefix_plan_seconds_count{prefill="a_shape",decode="quest"}"#),
        2.0
    );
    assert_eq!(value(r#"antefix_prefill_density_count{method="a_shape"}"#), 3.0);
    let sum = value(r#"antefix_prefill_density_sum{method="a_shape"}"#);
    assert!(sum > 0.0 && sum < 3.0, "{sum}");
    assert_eq!(value(r#"antefix_decode_density_count{method="quest"}"#), 2.0);
    assert!(
        !metrics.contains("window") && !metrics.contains("share=0.2"),
        "{metrics}"
    );
}

#[tokio::test]
async fn the_list_of_methods_is_that_of_the_cards() {
    let app = server_with(|_| {}).app();
    let (_, list) = call(&app, Request::get("/v1/methods").body(Body::empty()).unwrap()).await;
    let names: Vec<&str> = list["methods"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    let cards = antefix_papers::ALL.iter().map(|m| m.card().name);
    let always = antefix_papers::ALWAYS.iter().map(|c| c.name);
    let cards: Vec<&str> = cards.chain(always).collect();
    assert_eq!(names, cards);
}

#[tokio::test]
async fn a_stream_ends_with_the_report() {
    let app = server_with(|_| {}).app();
    let mut body = ask(&long_prompt(), json!({"kv": "streaming_llm,budget=16"}));
    body["stream"] = json!(true);
    let lines = text(app.oneshot(post("/v1/completions", &body)).await.unwrap()).await;
    let reports = lines.matches("\"antefix\":").count();
    assert_eq!(reports, 1, "{lines}");
}

#[tokio::test]
async fn reused_documents_are_found_in_any_order_and_leave_nothing_in_the_tree() {
    let text =
        |i: usize| format!("report {i} says that the {i}th lazy dog jumps over fox number {i}. ").repeat(4);
    let documents = |order: &[usize]| -> Value { order.iter().map(|&i| json!({"text": text(i)})).collect() };
    let chat = |antefix: Value| {
        post(
            "/v1/chat/completions",
            &json!({
                "messages": [{"role": "user", "content": "which dog?"}], "max_tokens": 6, "temperature": 0,
                "ignore_eos": true, "logprobs": true, "antefix": antefix,
            }),
        )
    };
    let drawn = |answer: &Value| answer["choices"][0]["logprobs"]["content"].clone();
    let (_, dense_alone) = call(
        &server_with(|_| {}).app(),
        chat(json!({"documents": documents(&[1, 2, 3])})),
    )
    .await;
    for method in ["ape", "cacheblend"] {
        let app = server_with(|_| {}).app();
        let ask = |order: &[usize]| chat(json!({"documents": documents(order), "context": method}));
        let (status, first) = call(&app, ask(&[1, 2, 3])).await;
        assert_eq!(status, StatusCode::OK, "{first}");
        let report = &first["antefix"];
        assert_eq!(
            (&report["method"], &report["exact"]),
            (&json!(method), &json!(false))
        );
        assert_eq!(report["documents"]["found"], 0, "{report}");
        let all = report["documents"]["computed"].as_u64().unwrap();
        assert!(all > 100, "{report}");

        let (_, turned) = call(&app, ask(&[3, 1, 2])).await;
        assert_eq!(turned["antefix"]["documents"]["found"], all, "{turned}");
        assert_eq!(turned["antefix"]["documents"]["computed"], 0);
        assert!(turned["antefix"]["documents"]["fresh"].as_f64().unwrap() < 1.0);
        if method == "ape" {
            assert_eq!(drawn(&turned), drawn(&first), "side by side, order means nothing");
        }
        let (_, again) = call(&app, ask(&[1, 2, 3])).await;
        assert_eq!(
            drawn(&again),
            drawn(&first),
            "found or computed, the answer is the same"
        );

        let (_, dense) = call(&app, chat(json!({"documents": documents(&[1, 2, 3])}))).await;
        assert_eq!(
            drawn(&dense),
            drawn(&dense_alone),
            "{method} is not to be found by exact requests"
        );
        let (status, refused) = call(
            &app,
            chat(json!({"documents": documents(&[1]), "context": method, "kv": "streaming_llm"})),
        )
        .await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        let message = refused["error"]["message"].as_str().unwrap();
        assert!(
            message.contains(method) && message.contains("streaming_llm"),
            "{message}"
        );
    }
}
