//! `/v1/embeddings` on a tiny random model.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use axum::Router;
use common::{call, ok, post, server_with};
use serde_json::{Value, json};

const PATH: &str = "/v1/embeddings";

fn app() -> Router {
    server_with(|_| ()).app()
}

fn vector(v: &Value, i: usize) -> Vec<f32> {
    serde_json::from_value(v["data"][i]["embedding"].clone()).unwrap()
}

/// RFC 4648 without a library: the test must not share a mistake with the code.
fn unbase64(text: &str) -> Vec<u8> {
    let digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = text
        .trim_end_matches('=')
        .chars()
        .flat_map(|c| {
            (0..6)
                .rev()
                .map(move |i| (digits.find(c).unwrap() >> i & 1) as u8)
        })
        .collect();
    let byte = |b: &[u8]| b.iter().fold(0, |sum, bit| sum << 1 | bit);
    bits.chunks_exact(8).map(byte).collect()
}

#[tokio::test]
async fn vectors_have_length_one_and_both_formats_say_the_same() {
    let app = app();
    let ask = json!({"model": "tiny", "input": ["hello", "world", "hello"]});
    let floats = ok(&app, PATH, ask.clone()).await;
    assert_eq!(floats["object"], "list");
    assert_eq!(floats["data"].as_array().unwrap().len(), 3);
    assert_eq!(floats["usage"]["prompt_tokens"], floats["usage"]["total_tokens"]);
    for i in 0..3 {
        assert_eq!(floats["data"][i]["index"], i);
        let length: f32 = vector(&floats, i).iter().map(|x| x * x).sum();
        assert!((length - 1.0).abs() < 1e-5, "{length}");
    }
    assert_eq!(vector(&floats, 0), vector(&floats, 2));
    assert_ne!(vector(&floats, 0), vector(&floats, 1));
    let mut packed = ask;
    packed["encoding_format"] = json!("base64");
    let packed = ok(&app, PATH, packed).await;
    let bytes = unbase64(packed["data"][1]["embedding"].as_str().unwrap());
    let numbers: Vec<f32> = bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert_eq!(numbers, vector(&floats, 1));
}

#[tokio::test]
async fn pooling_is_what_it_says() {
    let app = app();
    let raw = |input: Value, pooling: &str| json!({"input": input, "pooling": pooling, "normalize": false});
    let tokens = [5, 6, 7];
    let last = |n: usize| ok(&app, PATH, raw(json!(tokens[..n]), "last"));
    // A prefix's last vector is that of the longer prompt's row there: the mean is theirs.
    let rows = [
        vector(&last(1).await, 0),
        vector(&last(2).await, 0),
        vector(&last(3).await, 0),
    ];
    let mean = vector(&ok(&app, PATH, raw(json!(tokens), "mean")).await, 0);
    for (i, m) in mean.iter().enumerate() {
        let want = (f64::from(rows[0][i]) + f64::from(rows[1][i]) + f64::from(rows[2][i])) / 3.0;
        assert!((f64::from(*m) - want).abs() < 1e-6, "{i}: {m} {want}");
    }
    let normal = ok(&app, PATH, json!({"input": tokens, "pooling": "last"})).await;
    let length = rows[2].iter().map(|x| x * x).sum::<f32>().sqrt();
    for (a, b) in vector(&normal, 0).iter().zip(&rows[2]) {
        assert!((a * length - b).abs() < 1e-5);
    }
    let width = rows[0].len();
    ok(&app, PATH, json!({"input": "x", "dimensions": width})).await;
    let (status, error) = call(&app, post(PATH, &json!({"input": "x", "dimensions": width / 2}))).await;
    assert_eq!(
        (status.as_u16(), &error["error"]["param"]),
        (400, &json!("dimensions"))
    );
}

#[tokio::test]
async fn more_inputs_than_the_line_is_long_are_taken_in_turns() {
    let app = server_with(|c| c.limits.queue = 40).app();
    let inputs: Vec<String> = (0..100).map(|i| format!("text {i}")).collect();
    let many = ok(&app, PATH, json!({"input": inputs})).await;
    assert_eq!(many["data"].as_array().unwrap().len(), 100);
    let one = ok(&app, PATH, json!({"input": "text 77"})).await;
    assert_eq!(vector(&many, 77), vector(&one, 0), "bit for bit, alone or not");
}

#[tokio::test]
async fn senseless_inputs_are_named() {
    let app = app();
    for (body, word) in [
        (json!({}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": ""}), "input"),
        (json!({"input": [999_999]}), "999999"),
        (json!({"input": "x", "encoding_format": "hex"}), "encoding_format"),
        (json!({"input": "x", "pooling": "max"}), "pooling"),
        (json!({"input": vec!["x"; 2049]}), "2048"),
    ] {
        let (status, value) = call(&app, post(PATH, &body)).await;
        assert_eq!(status.as_u16(), 400, "{value}");
        assert!(
            value["error"]["message"].as_str().unwrap().contains(word),
            "{value}"
        );
    }
    assert_eq!(
        call(&app, post(PATH, &json!({"input": "x", "model": "ada"})))
            .await
            .0,
        404
    );
}
