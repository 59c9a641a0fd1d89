//! Clients that leave, dawdle, or never say anything.

use std::time::Duration;

use http_body_util::BodyExt;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

use crate::common::{post, server_with, text};
use crate::{Outcome, Runner, aftermath, ask, cold, expect, live, prompt};

fn long(max_tokens: usize, n: usize) -> serde_json::Value {
    json!({
        "prompt": prompt(9), "max_tokens": max_tokens, "temperature": 0.9, "seed": 1, "n": n, "ignore_eos": true,
        "stream": true,
    })
}

/// The client drops its request after `after`.
async fn leaves(after: Duration, n: usize) -> Outcome {
    let app = server_with(|_| ()).app();
    for _ in 0..10 {
        let _ = tokio::time::timeout(after, read(&app, &long(300, n))).await;
    }
    aftermath(&app).await
}

/// Reads a streamed answer to its end.
async fn read(app: &axum::Router, body: &serde_json::Value) -> String {
    text(app.clone().oneshot(post("/v1/completions", body)).await.unwrap()).await
}

async fn leaves_the_line() -> Outcome {
    let app = server_with(|c| c.engine.kv_bytes = 3 << 18).app();
    let crowd = (0..20).map(|_| {
        let app = app.clone();
        tokio::spawn(async move {
            let gone = Duration::from_millis(4);
            let _ = tokio::time::timeout(gone, read(&app, &long(60, 1))).await;
        })
    });
    for one in crowd.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    aftermath(&app).await
}

async fn leaves_a_stream() -> Outcome {
    let app = server_with(|_| ()).app();
    for _ in 0..5 {
        let response = app
            .clone()
            .oneshot(post("/v1/completions", &long(1000, 2)))
            .await
            .unwrap();
        let mut body = response.into_body();
        for _ in 0..3 {
            body.frame().await.unwrap().unwrap();
        }
    }
    aftermath(&app).await
}

fn head(len: usize) -> String {
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len}\r\n\r\n"
    )
}

/// Sends `share` of a request over a socket, reads `read` bytes of the answer, and closes it.
async fn hangs_up(share: f64, read: usize) -> Outcome {
    let server = live(|_| ()).await;
    let body = long(400, 1).to_string();
    let whole = head(body.len()) + &body;
    for _ in 0..10 {
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        let sent = (whole.len() as f64 * share) as usize;
        socket.write_all(&whole.as_bytes()[..sent]).await.unwrap();
        let mut answer = vec![0; read];
        socket.read_exact(&mut answer).await.unwrap();
    }
    aftermath(&server.app).await
}

/// The request asks for a long stream and nobody reads it; a second client must not notice.
async fn reads_nothing() -> Outcome {
    let server = live(|_| ()).await;
    let body = long(1500, 8).to_string();
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket
        .write_all((head(body.len()) + &body).as_bytes())
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let other = crate::choices(&server.app, &ask(0)).await?;
    expect("the other client gets its answer", other == cold().await[0])?;
    drop(socket);
    aftermath(&server.app).await
}

async fn writes_a_byte_at_a_time() -> Outcome {
    let server = live(|c| c.body_timeout = Duration::from_millis(150)).await;
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(head(1000).as_bytes()).await.unwrap();
    let began = std::time::Instant::now();
    socket.write_all(b"{").await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut answer)).await;
    expect("the server gives up", read.is_ok() || !answer.is_empty())?;
    expect("and soon", began.elapsed() < Duration::from_secs(5))?;
    aftermath(&server.app).await
}

async fn says_nothing() -> Outcome {
    let server = live(|_| ()).await;
    let mut sockets = Vec::new();
    for _ in 0..200 {
        sockets.push(TcpStream::connect(server.address).await.unwrap());
    }
    let pages = aftermath(&server.app).await?;
    drop(sockets);
    Ok(pages)
}

pub(crate) async fn run(runner: &mut Runner) {
    let ms = Duration::from_millis;
    let cancelled = "cancelled within a step, its pages are free";
    runner
        .fault("client leaves at once", cancelled, leaves(ms(0), 1))
        .await;
    runner
        .fault(
            "client leaves while it waits in line",
            cancelled,
            leaves_the_line(),
        )
        .await;
    runner
        .fault(
            "client leaves while its prompt is computed",
            cancelled,
            leaves(ms(2), 1),
        )
        .await;
    runner
        .fault(
            "client leaves in the middle of 8 answers",
            cancelled,
            leaves(ms(30), 8),
        )
        .await;
    runner
        .fault(
            "client leaves a stream after 3 events",
            cancelled,
            leaves_a_stream(),
        )
        .await;
    let nothing = "nothing was asked, nothing runs";
    runner
        .fault(
            "socket closed in the middle of the head",
            nothing,
            hangs_up(0.05, 0),
        )
        .await;
    runner
        .fault(
            "socket closed in the middle of the body",
            nothing,
            hangs_up(0.7, 0),
        )
        .await;
    runner
        .fault(
            "socket closed right after the request",
            cancelled,
            hangs_up(1.0, 0),
        )
        .await;
    runner
        .fault(
            "socket closed in the middle of a stream",
            cancelled,
            hangs_up(1.0, 400),
        )
        .await;
    runner
        .fault(
            "a reader that never reads",
            "others are answered; its end frees all",
            reads_nothing(),
        )
        .await;
    runner
        .fault(
            "a writer that stops in the body",
            "given up after the body timeout",
            writes_a_byte_at_a_time(),
        )
        .await;
    runner
        .fault(
            "200 connections that say nothing",
            "others are answered",
            says_nothing(),
        )
        .await;
}
