//! Requests that should never have been sent, and more of them than a server can take.

use std::sync::Arc;
use std::time::Duration;

use antefix_attention::hooks::{At, Hook, HookPlan, HookSpec, Observer, Site, Sources};
use antefix_engine::{BoxedConstraint, Constraint, ConstraintFailed, Job, RawJob};
use antefix_models::decoder::Model;
use antefix_server::{Config, KeyConfig};
use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::{call, post, server_with};
use crate::{Outcome, PROMPTS, Runner, aftermath, ask, cold, expect, live, prompt};

fn raw(body: impl Into<Body>) -> Request<Body> {
    Request::post("/v1/completions")
        .header("content-type", "application/json")
        .body(body.into())
        .unwrap()
}

/// Every one of `requests` gets a status out of `allowed`, and nobody else is harmed.
async fn refused(requests: Vec<Request<Body>>, allowed: &'static [u16]) -> Outcome {
    let app = server_with(|c| c.body_bytes = 1 << 20).app();
    for request in requests {
        let (status, value) = call(&app, request).await;
        expect(&format!("{status}: {value}"), allowed.contains(&status.as_u16()))?;
        expect(
            "the error has OpenAI's shape",
            value["error"]["message"].is_string(),
        )?;
    }
    aftermath(&app).await
}

fn with(change: Value) -> Request<Body> {
    let mut whole = ask(0);
    for (name, value) in change.as_object().unwrap() {
        whole[name] = value.clone();
    }
    post("/v1/completions", &whole)
}

async fn bad_keys() -> Outcome {
    let locked = |c: &mut Config| {
        c.keys = vec![KeyConfig {
            name: "one".into(),
            key: Some("0123456789abcdef".into()),
            ..KeyConfig::default()
        }];
    };
    let app = server_with(locked).app();
    let long = "x".repeat(4000);
    let wrong = [
        "",
        "Bearer ",
        "Bearer 0123456789abcdeF",
        "Basic 0123456789abcdef",
        &long,
    ];
    for n in 0..500 {
        let request = Request::post("/v1/completions")
            .header("content-type", "application/json")
            .header("authorization", wrong[n % wrong.len()])
            .body(Body::from(ask(0).to_string()))
            .unwrap();
        let (status, value) = call(&app, request).await;
        expect(&format!("401, not {status}: {value}"), status == 401)?;
    }
    let right = |mut request: Request<Body>| {
        let key = "Bearer 0123456789abcdef".parse().unwrap();
        request.headers_mut().insert("authorization", key);
        request
    };
    let (status, value) = call(&app, right(post("/v1/completions", &ask(0)))).await;
    expect(
        "the right key is let in",
        status == 200 && value["choices"] == cold().await[0],
    )?;
    let (_, stats) = call(&app, right(crate::get("/v1/cache/stats"))).await;
    Ok(
        stats["bytes_used"].as_u64().unwrap() / stats["block_bytes"].as_u64().unwrap()
            - stats["blocks"].as_u64().unwrap(),
    )
}

async fn a_length_that_lies() -> Outcome {
    let server = live(|c| c.body_bytes = 1 << 20).await;
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n{";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).await.unwrap();
    expect("413", answer.ends_with(b"413"))?;
    aftermath(&server.app).await
}

/// More requests at once than the line holds: those that are taken get the right answer, the others 429.
async fn overload(kv_bytes: usize, queue: usize, crowd: usize) -> Result<(usize, usize, u64), String> {
    let app = server_with(|c| {
        c.engine.kv_bytes = kv_bytes;
        c.engine.context = 512;
        c.limits.queue = queue;
    })
    .app();
    let want = cold().await;
    let mut running = tokio::task::JoinSet::new();
    for i in 0..crowd {
        let app = app.clone();
        running.spawn(async move {
            let (status, value) = call(&app, post("/v1/completions", &ask(i % PROMPTS))).await;
            (i, status.as_u16(), value)
        });
    }
    let (mut answered, mut refused) = (0, 0);
    while let Some(done) = running.join_next().await {
        let (i, status, value) = done.map_err(|e| e.to_string())?;
        match status {
            200 => {
                expect(
                    "an accepted request gets its answer",
                    value["choices"] == want[i % PROMPTS],
                )?;
                answered += 1;
            }
            429 => refused += 1,
            other => return Err(format!("{other}: {value}")),
        }
    }
    Ok((answered, refused, aftermath(&app).await?))
}

/// Breaks where a token is drawn.
struct Bomb;

/// Breaks in the model, at a token.
struct Mine(u32);

impl Hook for Mine {
    fn wants(&self, layer: usize) -> u32 {
        match layer {
            0 => Site::Z.bit(),
            _ => 0,
        }
    }
    fn fingerprint(&self) -> Option<u64> {
        None
    }
    fn at(&mut self, at: &At<'_>, _: &mut [f32]) {
        assert!(at.pos0 + at.rows as u32 <= self.0, "a panic that was put here");
    }
}

impl Constraint for Bomb {
    fn mask(&mut self, _: &mut [f32]) -> Result<(), ConstraintFailed> {
        panic!("a panic that was put here")
    }
    fn commit(&mut self, _: u32) -> Result<(), ConstraintFailed> {
        Ok(())
    }
    fn is_done(&self) -> bool {
        false
    }
    fn forced(&mut self) -> Vec<u32> {
        Vec::new()
    }
    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Bomb)
    }
}

/// Others that run beside a request that panics, where `bad` makes it do so.
async fn a_panic_in_a_step(bad: fn(&Model) -> RawJob) -> Outcome {
    let server = server_with(|_| ());
    let app = server.app();
    for _ in 0..3 {
        let mut others = tokio::task::JoinSet::new();
        for k in 0..PROMPTS {
            let app = app.clone();
            others.spawn(async move { (k, call(&app, post("/v1/completions", &ask(k))).await) });
        }
        server
            .inspect(move |engine| {
                let raw = bad(engine.model());
                let job = Job::new(raw, engine.model().spec().vocab, engine.context()).unwrap();
                engine.submit(job).unwrap();
            })
            .await
            .ok_or("the engine is gone")?;
        while let Some(other) = others.join_next().await {
            let (k, (status, value)) = other.map_err(|e| e.to_string())?;
            let right = status == 200 && value["choices"] == cold().await[k];
            expect(&format!("the right answer, not {status}: {value}"), right)?;
        }
    }
    aftermath(&app).await
}

fn with_bomb(_: &Model) -> RawJob {
    RawJob {
        tokens: prompt(3),
        constraint: Some(BoxedConstraint(Box::new(Bomb))),
        ..RawJob::default()
    }
}

/// Its prompt and a few tokens are computed, then it breaks.
fn with_mine(model: &Model) -> RawJob {
    let plan = HookPlan::compile(&HookSpec::default(), model.hook_shape(), &Sources::default()).unwrap();
    let tokens = prompt(3);
    let observer = Observer::new(Arc::new(plan), tokens.len(), 0);
    RawJob {
        hooks: Some(Arc::new(observer.with(Box::new(Mine(tokens.len() as u32 + 3))))),
        ignore_eos: true,
        tokens,
        ..RawJob::default()
    }
}

/// The server is told to end while requests run: they are answered, then it ends.
async fn told_to_end_under_load() -> Outcome {
    let server = live(|c| c.drain = Duration::from_secs(30)).await;
    let want = cold().await;
    let mut running = tokio::task::JoinSet::new();
    for i in 0..24 {
        let address = server.address;
        running.spawn(async move {
            let body = ask(i % PROMPTS).to_string();
            let mut socket = TcpStream::connect(address).await.unwrap();
            let request = format!(
                "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            socket.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            let _ = socket.read_to_string(&mut answer).await;
            (i, answer)
        });
    }
    tokio::time::sleep(Duration::from_millis(15)).await;
    let _ = server.stop.send(());
    let mut answered = 0;
    while let Some(done) = running.join_next().await {
        let (i, answer) = done.map_err(|e| e.to_string())?;
        let taken = answer.starts_with("HTTP/1.1 200");
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or("");
        if taken {
            let value: Value = serde_json::from_str(body).map_err(|e| format!("{e}: {answer}"))?;
            expect(
                "a taken request is answered",
                value["choices"] == want[i % PROMPTS],
            )?;
            answered += 1;
        } else {
            expect(
                &format!("told that it ends, not: {answer}"),
                answer.is_empty() || answer.starts_with("HTTP/1.1 503"),
            )?;
        }
    }
    expect("somebody was served", answered > 0)?;
    server.ended.await.map_err(|e| e.to_string())?;
    Ok(0)
}

pub(crate) async fn run(runner: &mut Runner) {
    runner
        .fault(
            "500 requests with wrong keys",
            "401 each, nothing runs",
            bad_keys(),
        )
        .await;
    let huge = vec![raw(vec![b' '; 3 << 20]), raw("x".repeat(2 << 20))];
    runner
        .fault("bodies larger than allowed", "413", refused(huge, &[413]))
        .await;
    runner
        .fault(
            "a content length of 100 GB",
            "413 before anything is read",
            a_length_that_lies(),
        )
        .await;
    let latin = vec![
        raw(b"{\"prompt\": \"\xff\xfe\"}".to_vec()),
        raw(b"\xc3\x28".to_vec()),
        raw(Vec::new()),
    ];
    runner
        .fault("invalid UTF-8, or nothing", "400", refused(latin, &[400]))
        .await;
    let deep = vec![
        raw("[".repeat(200_000)),
        raw(format!("{{\"prompt\": {}", "{\"a\":".repeat(100_000))),
        raw(format!(
            "{{\"prompt\": \"x\", \"metadata\": {}1{}}}",
            "[".repeat(100_000),
            "]".repeat(100_000)
        )),
    ];
    runner
        .fault("JSON 100,000 levels deep", "400", refused(deep, &[400]))
        .await;
    let numbers = vec![
        raw("{\"prompt\": \"x\", \"max_tokens\": 1e400}"),
        with(json!({"max_tokens": -1})),
        with(json!({"temperature": 1e40})),
        with(json!({"n": 1_000_000_000_u64})),
        with(json!({"logit_bias": {"x": 1}})),
        with(json!({"prompt_cache_retention": "forever"})),
    ];
    runner
        .fault(
            "numbers out of any range",
            "400 that names the field",
            refused(numbers, &[400]),
        )
        .await;
    let prompts = vec![
        with(json!({"prompt": [4_000_000_000_u64]})),
        with(json!({"prompt": vec![5; 5000]})),
        with(json!({"prompt": []})),
        with(json!({"prompt": {"a": 1}})),
    ];
    runner
        .fault(
            "prompts of unknown tokens, too long, empty",
            "400",
            refused(prompts, &[400]),
        )
        .await;
    let grammars = vec![
        with(json!({"guided_regex": "("})),
        with(json!({"guided_json": {"type": "nonsense"}})),
        with(json!({"response_format": {"type": "json_schema"}})),
    ];
    runner
        .fault("grammars that are none", "400", refused(grammars, &[400]))
        .await;
    runner
        .fault(
            "10 times as many requests as the line holds",
            "right answers or 429",
            async {
                let (answered, refused, pages) = overload(32 << 20, 8, 80).await?;
                expect(
                    &format!("both: {answered}, {refused}"),
                    answered >= 8 && refused > 0,
                )?;
                Ok(pages)
            },
        )
        .await;
    runner
        .fault(
            "memory for two requests, 60 at once",
            "all wait, all are answered",
            async {
                let (answered, refused, pages) = overload(3 << 18, 64, 60).await?;
                expect(&format!("all: {answered}, {refused}"), answered == 60)?;
                Ok(pages)
            },
        )
        .await;
    runner
        .fault(
            "a panic where a token is drawn, three times",
            "it fails, all others get their answers",
            a_panic_in_a_step(with_bomb),
        )
        .await;
    runner
        .fault(
            "a panic in the model at the fourth token, three times",
            "it fails, all others get their answers",
            a_panic_in_a_step(with_mine),
        )
        .await;
    runner
        .fault(
            "told to end under load",
            "what was taken is answered, the rest 503",
            told_to_end_under_load(),
        )
        .await;
}
