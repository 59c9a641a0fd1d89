//! Every registered method over HTTP: a new one fails here until it works. It answers, says what it did and kept, and leaves nothing
//! behind for those who want exact attention.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod common;

use std::path::Path;

use antefix_attention::method::{Axis, Card, Kind, Profiles};
use antefix_papers::heads::HeadProfile;
use antefix_server::Server;
use axum::Router;
use common::{ok, server_with};
use serde_json::{Map, Value, json};

/// A profile of heads of the tiny model, with made-up scores, and a dictionary with random directions.
fn write_profiles(folder: &Path) {
    let (model, _) = antefix_conformance::tiny(
        antefix_models::spec::Arch::Llama,
        antefix_kernels::cpu::Cpu::best(),
        1,
    );
    let profile = HeadProfile::made_up(&model.facts(), 5);
    std::fs::create_dir_all(folder.join("heads")).unwrap();
    let text = serde_json::to_string(&profile).unwrap();
    std::fs::write(folder.join("heads/made_up.json"), text).unwrap();
    std::fs::create_dir_all(folder.join("sae")).unwrap();
    let dictionary = antefix_papers::attention_sae::made_up(&model.facts());
    std::fs::write(folder.join("sae/made_up.safetensors"), dictionary).unwrap();
}

/// Settings with which a method has something to do on a prompt of a few hundred tokens; else the card's own.
fn settings(card: &'static Card) -> Value {
    let mut choice = Map::from_iter([("name".to_string(), json!(card.name))]);
    for knob in card.knobs {
        let value = match (knob.name, knob.kind) {
            (_, Kind::Profile) => json!("made_up"),
            ("budget", _) => json!(64),
            ("window" | "buffer", _) => json!(8),
            ("every", _) => json!(4),
            ("top", _) => json!(2),
            ("least", _) => json!(16),
            ("start" | "dense_layers", _) => json!(0),
            ("always", _) => json!(true),
            ("edit", _) => json!("3:add:4"),
            _ => continue,
        };
        choice.insert(knob.name.into(), value);
    }
    Value::Object(choice)
}

fn documents() -> Value {
    let text =
        |i: usize| format!("report {i} says that the {i}th lazy dog jumps over fox number {i}. ").repeat(4);
    (0..3).map(|i| json!({ "id": i, "text": text(i) })).collect()
}

/// The answer to a question behind the documents, under what `antefix` says besides.
async fn ask(app: &Router, question: &str, mut antefix: Value) -> Value {
    antefix["documents"] = documents();
    let body = json!({
        "messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0, "ignore_eos": true,
        "logprobs": true, "antefix": antefix,
    });
    ok(app, "/v1/chat/completions", body).await
}

/// What must agree bit for bit: the drawn tokens with their log-probabilities.
fn bits(answer: &Value) -> &Value {
    &answer["choices"][0]["logprobs"]["content"]
}

fn cached(answer: &Value) -> &Value {
    &answer["usage"]["prompt_tokens_details"]["cached_tokens"]
}

fn server(profiles: &Path) -> Server {
    let folders = vec![profiles.to_path_buf()];
    server_with(|config| config.offer.profiles = Profiles::named_in(folders))
}

#[tokio::test]
async fn every_method_is_served_and_leaves_the_cache_exact() {
    let folder = tempfile::tempdir().unwrap();
    write_profiles(folder.path());
    let (first, other) = (
        "which dog?",
        "how many foxes are there, and over whom do they jump?",
    );
    // A server that never sees a method.
    let plain = server(folder.path()).app();
    let never = [
        ask(&plain, first, json!({})).await,
        ask(&plain, first, json!({})).await,
        ask(&plain, other, json!({})).await,
    ];
    assert!(cached(&never[1]).as_u64().unwrap() > 0);

    for method in antefix_papers::ALL {
        let card = method.card();
        let name = card.name;
        let antefix = || json!({ (card.axis.name()): settings(card) });
        let app = server(folder.path()).app();
        let before = ask(&app, first, json!({})).await;
        assert!(before.get("antefix").is_none(), "{name}: {before}");
        let under = ask(&app, other, antefix()).await;
        let report = &under["antefix"];
        assert_eq!(report["method"], name, "{under}");
        assert_eq!(report["exact"], card.exact, "{name}");
        let told = report["settings"].as_str().unwrap();
        assert!(told.starts_with(name), "{name}: {told}");
        let kept = report["kept"]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {report}"));
        assert!(kept > 0.0, "{name}: {report}");
        if card.axis == Axis::Kv {
            assert!(
                kept < 1.0 && report["edits"].as_u64().unwrap() > 0,
                "{name}: {report}"
            );
        }
        assert_eq!(under["usage"]["completion_tokens"], 12, "{name}");
        assert_eq!(bits(&under).as_array().unwrap().len(), 12, "{name}");

        // Planners may find that on so few keys everything is to be read.
        if card.axis != Axis::Prefill {
            assert_ne!(bits(&under), bits(&never[2]), "{name} does nothing");
        }

        let after = ask(&app, first, json!({})).await;
        for (got, want) in [(&before, &never[0]), (&after, &never[1])] {
            assert_eq!(bits(got), bits(want), "{name}");
            assert_eq!(cached(got), cached(want), "{name}");
        }
        // The very prompt that the method has worked on.
        let dense = ask(&app, other, json!({})).await;
        assert_eq!(bits(&dense), bits(&never[2]), "{name} is found by exact requests");
        // And again under the method: what it finds cached changes nothing.
        let again = ask(&app, other, antefix()).await;
        assert_eq!(bits(&again), bits(&under), "{name}");

        // On a server that has seen nothing but the method.
        let app = server(folder.path()).app();
        let cold = ask(&app, first, antefix()).await;
        assert_eq!(cold["antefix"]["method"], name);
        let dense = ask(&app, first, json!({})).await;
        assert_eq!(bits(&dense), bits(&never[0]), "{name} is found by exact requests");
    }
}
