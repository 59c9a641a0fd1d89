//! Faults, one after the other, on servers with a tiny model: each says what is expected, and is survived or not.
//!
//! `cargo test --release -p antefix-server --test faults -- --nocapture` prints the list. *Survived* means: what was expected
//! happened, the server answers a set of prompts afterwards with the bits of a cold one, and nobody but the cache holds a page.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may, and its list is its product"
)]
#![cfg(unix)]

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod disk;
mod process;
mod requests;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use antefix_server::Config;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, post, server_with};
use serde_json::{Value, json};

/// What came of a fault: pages that nobody should hold any more, or what went wrong.
type Outcome = Result<u64, String>;

/// Prompts that tell whether a server answers right. They share prefixes.
const PROMPTS: usize = 6;

/// Prompt `k`: 160 tokens shared by two, then its own.
fn prompt(k: usize) -> Vec<u32> {
    let token = |i: usize| 3 + ((i * 7 + if i < 160 { k / 2 * 11 } else { k * 13 }) % 250) as u32;
    (0..200).map(token).collect()
}

fn ask(k: usize) -> Value {
    json!({"prompt": prompt(k), "max_tokens": 8, "temperature": 0, "ignore_eos": true, "logprobs": 2})
}

async fn choices(app: &Router, ask: &Value) -> Result<Value, String> {
    let (status, value) = call(app, post("/v1/completions", ask)).await;
    match status.as_u16() {
        200 => Ok(value["choices"].clone()),
        other => Err(format!("{other}: {value}")),
    }
}

/// The answers of a cold server, each prompt for itself.
async fn cold() -> &'static [Value] {
    static COLD: OnceLock<Vec<Value>> = OnceLock::new();
    if COLD.get().is_none() {
        let app = server_with(|_| ()).app();
        let mut answers = Vec::new();
        for k in 0..PROMPTS {
            let mut ask = ask(k);
            ask["cache_salt"] = json!(format!("cold {k}"));
            answers.push(choices(&app, &ask).await.unwrap());
        }
        let _ = COLD.set(answers); // somebody was quicker, with the same
    }
    COLD.get().unwrap()
}

fn get(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

fn number(value: &Value, name: &str) -> Result<u64, String> {
    value[name]
        .as_u64()
        .ok_or_else(|| format!("no `{name}` in {value}"))
}

/// Whether the server is as good as new, and how many pages are lost.
async fn aftermath(app: &Router) -> Outcome {
    for (k, want) in cold().await.iter().enumerate() {
        let got = choices(app, &ask(k)).await?;
        if got != *want {
            return Err(format!("wrong answer to prompt {k}: {got}"));
        }
    }
    for _ in 0..1000 {
        let (_, loads) = call(app, get("/v1/loads")).await;
        if number(&loads, "running")? + number(&loads, "waiting")? == 0 {
            let (_, stats) = call(app, get("/v1/cache/stats")).await;
            let block = number(&stats, "block_bytes")?;
            let held = number(&stats, "bytes_used")? - number(&stats, "blocks")? * block;
            return Ok(held.div_ceil(block));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("somebody still runs after 10 s".into())
}

fn expect(what: &str, holds: bool) -> Result<(), String> {
    match holds {
        true => Ok(()),
        false => Err(format!("not so: {what}")),
    }
}

/// A server on a socket.
struct Live {
    app: Router,
    address: SocketAddr,
    stop: tokio::sync::oneshot::Sender<()>,
    ended: tokio::task::JoinHandle<()>,
}

async fn live(change: impl FnOnce(&mut Config)) -> Live {
    let server = server_with(change);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (app, address) = (server.app(), listener.local_addr().unwrap());
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let ended = tokio::spawn(async move {
        let stopped = async { drop(stopped.await) };
        server.serve(listener, None, stopped).await;
    });
    Live {
        app,
        address,
        stop,
        ended,
    }
}

/// Runs faults and keeps the list.
#[derive(Default)]
struct Runner {
    ran: usize,
    failed: usize,
    leaked: u64,
}

impl Runner {
    async fn fault(
        &mut self,
        name: &str,
        expected: &str,
        fault: impl Future<Output = Outcome> + Send + 'static,
    ) {
        let limited = tokio::time::timeout(Duration::from_mins(2), fault);
        let outcome = match tokio::spawn(limited).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err("not over after 120 s".into()),
            Err(panic) => Err(format!("panicked: {panic}")),
        };
        self.ran += 1;
        let (survived, pages) = match &outcome {
            Ok(pages) => ("yes", *pages),
            Err(_) => ("NO", 0),
        };
        self.leaked += pages;
        println!(
            "{:>3}  {name:<58}  {survived:<3}  {pages} leaked  expected: {expected}",
            self.ran
        );
        if let Err(why) = outcome {
            self.failed += 1;
            println!("     {why}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_is_survived() {
    let mut runner = Runner::default();
    println!();
    clients::run(&mut runner).await;
    requests::run(&mut runner).await;
    disk::run(&mut runner).await;
    process::run(&mut runner).await;
    println!(
        "{} faults, {} not survived, {} leaked blocks",
        runner.ran, runner.failed, runner.leaked
    );
    assert!(runner.ran >= 25);
    assert_eq!((runner.failed, runner.leaked), (0, 0));
}
