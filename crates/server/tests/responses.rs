//! `/v1/responses` on a tiny random model.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, events, ok, post, server_with};
use serde_json::{Value, json};

const PATH: &str = "/v1/responses";

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap()
}

async fn read(app: &Router, method: &str, id: &str) -> (u16, Value) {
    let request = Request::builder()
        .method(method)
        .uri(format!("{PATH}/{id}"))
        .body(Body::empty())
        .unwrap();
    let (status, value) = call(app, request).await;
    (status.as_u16(), value)
}

#[tokio::test]
async fn a_response_says_what_a_chat_completion_says() {
    let app = server_with(|_| ()).app();
    let response = ok(
        &app,
        PATH,
        json!({"model": "tiny", "input": "hello", "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 12}),
    )
    .await;
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]);
    let chat = json!({"messages": messages, "temperature": 0, "max_tokens": 12});
    let chat = ok(&app, "/v1/chat/completions", chat).await;
    assert_eq!(text(&response), chat["choices"][0]["message"]["content"]);
    assert_eq!(response["object"], "response");
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(response["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
    assert_eq!(response["usage"]["output_tokens"], 12);
    assert_eq!(response["instructions"], "Be brief.");
}

#[tokio::test]
async fn the_next_request_goes_on_from_the_last_answer() {
    let app = server_with(|_| ()).app();
    let ask =
        json!({"input": "one", "instructions": "Not for later.", "temperature": 0, "max_output_tokens": 8});
    let first = ok(&app, PATH, ask).await;
    let id = first["id"].as_str().unwrap();
    let second =
        json!({"input": "two", "previous_response_id": id, "temperature": 0, "max_output_tokens": 8});
    let second = ok(&app, PATH, second).await;
    let whole = json!({"temperature": 0, "max_output_tokens": 8, "input": [
        {"role": "user", "content": "one"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text(&first), "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "two"}]},
    ]});
    let whole = ok(&app, PATH, whole).await;
    assert_eq!(text(&second), text(&whole));
    assert_eq!(second["usage"]["input_tokens"], whole["usage"]["input_tokens"]);
    assert_eq!(second["previous_response_id"], id);

    assert_eq!(read(&app, "GET", id).await, (200, first.clone()));
    assert_eq!(read(&app, "DELETE", id).await.0, 200);
    let gone = read(&app, "GET", id).await;
    assert_eq!(
        (gone.0, &gone.1["error"]["code"]),
        (404, &json!("previous_response_not_found"))
    );
    let lost = json!({"input": "x", "previous_response_id": id});
    assert_eq!(call(&app, post(PATH, &lost)).await.0, 404);
    let forgotten = ok(
        &app,
        PATH,
        json!({"input": "x", "store": false, "max_output_tokens": 1}),
    )
    .await;
    assert_eq!(read(&app, "GET", forgotten["id"].as_str().unwrap()).await.0, 404);
}

#[tokio::test]
async fn events_tell_the_same_story_as_the_whole() {
    let app = server_with(|_| ()).app();
    let ask = json!({
        "input": "hello", "temperature": 0, "max_output_tokens": 10, "include": ["message.output_text.logprobs"], "top_logprobs": 2,
    });
    let whole = ok(&app, PATH, ask.clone()).await;
    let mut streaming = ask;
    streaming["stream"] = json!(true);
    let events = events(&app, PATH, streaming, false).await;
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    let mut kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    kinds.dedup();
    assert_eq!(
        kinds,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    let said: String = events
        .iter()
        .filter(|e| e["type"] == "response.output_text.delta")
        .map(|e| e["delta"].as_str().unwrap())
        .collect();
    assert_eq!(said, text(&whole));
    let last = &events.last().unwrap()["response"];
    assert_eq!(text(last), said);
    let logprobs = |r: &Value| r["output"][0]["content"][0]["logprobs"].clone();
    assert_eq!(logprobs(last), logprobs(&whole));
    assert_eq!(logprobs(last).as_array().unwrap().len(), 10);
    assert_eq!(logprobs(last)[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(events[0]["response"]["status"], "in_progress");
    assert_eq!(last["usage"]["output_tokens"], 10);
}

#[tokio::test]
async fn forced_calls_and_schemas_work_here_too() {
    let app = server_with(|_| ()).app();
    let schema = json!({"type": "object", "required": ["x"], "additionalProperties": false, "properties": {"x": {"enum": [1, 2, 3]}}});
    let ask = json!({
        "input": "hello", "seed": 3, "max_output_tokens": 200, "tool_choice": "required",
        "tools": [{"type": "function", "name": "f", "parameters": schema}],
    });
    let made = ok(&app, PATH, ask.clone()).await;
    let item = &made["output"][0];
    assert_eq!(
        (item["type"].as_str(), item["name"].as_str()),
        (Some("function_call"), Some("f"))
    );
    let arguments: Value = serde_json::from_str(item["arguments"].as_str().unwrap()).unwrap();
    assert!((1..=3).contains(&arguments["x"].as_i64().unwrap()));
    let mut streaming = ask;
    streaming["stream"] = json!(true);
    let events = events(&app, PATH, streaming, false).await;
    let done = events
        .iter()
        .find(|e| e["type"] == "response.function_call_arguments.done")
        .unwrap();
    assert_eq!(done["arguments"], item["arguments"]);
    assert_eq!(events.last().unwrap()["type"], "response.completed");
    // Its result comes back as an item.
    let next = json!({"previous_response_id": made["id"], "max_output_tokens": 4, "input": [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "7"},
    ]});
    ok(&app, PATH, next).await;

    let ask = json!({
        "input": "hello", "seed": 3, "max_output_tokens": 200,
        "text": {"format": {"type": "json_schema", "name": "s", "schema": schema, "strict": true}},
    });
    let made = ok(&app, PATH, ask).await;
    let value: Value = serde_json::from_str(text(&made)).unwrap();
    assert!((1..=3).contains(&value["x"].as_i64().unwrap()));
}

#[tokio::test]
async fn what_is_not_there_is_said() {
    let app = server_with(|_| ()).app();
    for (body, word) in [
        (json!({}), "input"),
        (json!({"input": []}), "empty"),
        (json!({"input": "x", "background": true}), "background"),
        (
            json!({"input": [{"type": "item_reference", "id": "x"}]}),
            "item_reference",
        ),
        (json!({"input": [{"role": "king", "content": "x"}]}), "king"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
            "input_image",
        ),
        (
            json!({"input": "x", "tools": [{"type": "web_search"}]}),
            "web_search",
        ),
        (json!({"input": "x", "text": {"format": {"type": "xml"}}}), "xml"),
        (json!({"input": "x", "max_output_tokens": 0}), "max_tokens"),
    ] {
        let (status, value) = call(&app, post(PATH, &body)).await;
        assert_eq!(status.as_u16(), 400, "{value}");
        assert!(
            value["error"]["message"].as_str().unwrap().contains(word),
            "{value}"
        );
    }
}
