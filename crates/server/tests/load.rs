//! Exactness under load: whatever runs beside a request and whatever is cached, it gets the answer it gets alone on a cold server.
//!
//! `ANTEFIX_REQUESTS=1500 cargo test --release -p antefix-server --test load -- --nocapture` runs the long version.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::collections::HashMap;
use std::time::Duration;

use antefix_models::testing::Rng;
use antefix_server::DiskConfig;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use common::{call, post, server_with};
use serde_json::{Value, json};

/// Requests whose prompts share prefixes on three levels, and a few that their client gives up on.
struct Traffic {
    rng: Rng,
    levels: [Vec<Vec<u32>>; 3],
}

impl Traffic {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let mut some = |count: usize, len: usize| -> Vec<Vec<u32>> {
            (0..count)
                .map(|_| (0..len).map(|_| 3 + (rng.bits() % 250) as u32).collect())
                .collect()
        };
        let levels = [some(2, 200), some(4, 90), some(8, 45)];
        Self { rng, levels }
    }

    fn below(&mut self, n: usize) -> usize {
        (self.rng.bits() % n as u64) as usize
    }

    /// A request and whether its client stays.
    fn next(&mut self) -> (Value, bool) {
        let mut prompt = Vec::new();
        for level in 0..3 {
            let pick = self.below(self.levels[level].len() + 1);
            match self.levels[level].get(pick) {
                Some(part) => prompt.extend_from_slice(part),
                None => break,
            }
        }
        let own = 1 + self.below(40);
        prompt.extend((0..own).map(|_| 3 + (self.rng.bits() % 250) as u32));
        let seeded = self.below(2) == 0;
        let n = [1, 1, 1, 2, 8][self.below(5)];
        let longest = [24, 24, 150][self.below(3)];
        let ask = json!({
            "prompt": prompt,
            "max_tokens": 1 + self.below(longest),
            "temperature": if seeded { 0.9 } else { 0.0 },
            "seed": self.below(1000),
            "n": if seeded { n } else { 1 },
            "logprobs": self.below(4),
            "ignore_eos": true,
            "priority": self.below(3) as i64 - 1,
        });
        (ask, self.below(12) > 0)
    }
}

async fn answer(app: &Router, ask: &Value) -> Value {
    loop {
        let (status, value) = call(app, post("/v1/completions", ask)).await;
        match status.as_u16() {
            200 => return value["choices"].clone(),
            429 => tokio::time::sleep(Duration::from_millis(5)).await,
            other => panic!("{other}: {value}"),
        }
    }
}

/// What a server has counted; it is asked before it goes.
#[derive(Default)]
struct Counted {
    cached: u64,
    loaded: u64,
    preempted: u64,
}

impl Counted {
    async fn add(&mut self, app: &Router) {
        let get = |path: &str| Request::get(path).body(Body::empty()).unwrap();
        let (_, loads) = call(app, get("/v1/loads")).await;
        let (_, stats) = call(app, get("/v1/cache/stats")).await;
        let number = |of: &Value, name: &str| of[name].as_u64().unwrap();
        self.cached += number(&loads, "cached_tokens_total");
        self.loaded += number(&loads, "loaded_tokens_total");
        self.preempted += number(&loads, "preempted_total");
        assert_eq!(
            number(&stats, "bytes_used"),
            number(&stats, "blocks") * number(&stats, "block_bytes"),
            "nobody but the cache holds pages"
        );
    }
}

#[tokio::test]
async fn a_busy_server_answers_as_a_cold_one_also_behind_a_disk_and_restarts() {
    let requests: usize = std::env::var("ANTEFIX_REQUESTS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(150);
    let dir = tempfile::TempDir::new().unwrap();
    let start = || {
        server_with(|c| {
            // Room for a few requests: they wait, lose their memory to each other, and prefixes are evicted.
            c.engine.kv_bytes = 3 << 18;
            c.engine.context = 512;
            c.limits.queue = 40;
            c.cache.disk = Some(DiskConfig {
                dir: dir.path().to_owned(),
                bytes: 256 << 20,
                ttl: None,
            });
        })
    };
    let mut traffic = Traffic::new(7);
    let mut counted = Counted::default();
    let (mut sent, mut left) = (Vec::new(), 0);
    let mut answers: HashMap<usize, Value> = HashMap::new();
    const LIVES: usize = 3;
    for _ in 0..LIVES {
        let server = start();
        let busy = server.app();
        let mut running = tokio::task::JoinSet::new();
        for i in 0..requests.div_ceil(LIVES) {
            let (ask, stays) = traffic.next();
            let app = busy.clone();
            if stays {
                sent.push(ask.clone());
                let at = sent.len() - 1;
                running.spawn(async move { Some((at, answer(&app, &ask).await)) });
            } else {
                left += 1;
                running.spawn(async move {
                    let gone = Duration::from_millis(2);
                    let _ = tokio::time::timeout(gone, call(&app, post("/v1/completions", &ask))).await;
                    None
                });
            }
            if i % 16 == 15 {
                tokio::time::sleep(Duration::from_millis(8)).await;
            }
        }
        while let Some(done) = running.join_next().await {
            answers.extend(done.unwrap());
        }
        counted.add(&busy).await;
        server.close().await;
    }
    assert_eq!(answers.len(), sent.len());
    let cold = server_with(|c| c.engine.context = 512).app();
    let mut tokens = 0;
    for (at, ask) in sent.iter().enumerate() {
        let mut alone = ask.clone();
        // A salt of its own: nothing is cached for it.
        alone["cache_salt"] = json!(format!("cold {at}"));
        let want = answer(&cold, &alone).await;
        assert_eq!(answers[&at], want, "request {at}: {ask}");
        let drawn = |c: &Value| c["logprobs"]["tokens"].as_array().map_or(0, Vec::len);
        tokens += want.as_array().unwrap().iter().map(drawn).sum::<usize>();
    }
    // Who loses its memory depends on the clock here; the conformance suite makes sure that it happens.
    assert!(counted.cached > 0, "nothing was shared");
    assert!(counted.loaded > 0, "nothing came from the disk");
    eprintln!(
        "{} requests and {left} whose clients left, {LIVES} lives of the server, {tokens} tokens and log-probabilities compared, \
         {} prompt tokens cached, {} of them from disk, {} sequences preempted: 0 differences",
        sent.len(),
        counted.cached,
        counted.loaded,
        counted.preempted
    );
}
