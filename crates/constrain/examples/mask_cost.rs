//! What a mask costs: `cargo run --release -p antefix-constrain --example mask_cost [MODEL]`.
//!
//! Random text under the suite's schemas and some of the kinds that people send, with the tokens of a real model (SmolLM2's 49,152 by
//! default). Prints the time of preparing the vocabulary and a schema, and of the mask and the commit of each token.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement for its author's terminal"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use antefix_constrain::{Grammar, Vocabulary};
use antefix_models::files::ModelFiles;
use antefix_models::store::Store;
use antefix_models::testing::Rng;
use antefix_models::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// Tokens of one answer at most.
const LENGTH: usize = 200;

fn asked() -> Vec<Value> {
    let person = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "email", "tags"],
        "properties": {
            "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "email": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.(com|org)$"},
            "tags": {"type": "array", "maxItems": 5, "items": {"enum": ["new", "old", "lost", "found"]}},
        },
    });
    let tree = json!({
        "$defs": {"node": {
            "type": "object", "additionalProperties": false, "required": ["label"],
            "properties": {"label": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        }},
        "$ref": "#/$defs/node",
    });
    vec![person, tree, json!({"type": "object"}), json!({"type": "string"})]
}

fn percentile(sorted: &[Duration], share: f64) -> Duration {
    sorted[(share * (sorted.len() - 1) as f64) as usize]
}

fn main() {
    let name = std::env::args().nth(1).unwrap_or_else(|| "smollm2".into());
    let files = ModelFiles::open(&Store::open().unwrap().pull(&name, &mut |_| ()).unwrap()).unwrap();
    let tokenizer = Arc::new(Tokenizer::open(&files).unwrap());
    let begun = Instant::now();
    let vocabulary = Vocabulary::new(&tokenizer).unwrap();
    println!(
        "{name}: {} tokens, vocabulary prepared in {:.0?}",
        tokenizer.vocab_size(),
        begun.elapsed()
    );
    let suite = include_str!("../tests/suite.jsonl").lines();
    let suite = suite.map(|line| serde_json::from_str::<Value>(line).unwrap()["schema"].clone());
    let (mut prepared, mut masks, mut commits) = (Vec::new(), Vec::new(), Vec::new());
    let mut rng = Rng(1);
    let mut logits = vec![0.0f32; tokenizer.vocab_size()];
    for schema in suite.chain(asked()) {
        let begun = Instant::now();
        let Ok(mut constraint) = vocabulary.constrain(&Grammar::JsonSchema(schema)) else {
            continue;
        };
        prepared.push(begun.elapsed());
        for _ in 0..LENGTH {
            logits.iter_mut().for_each(|l| *l = (rng.bits() >> 40) as f32);
            let begun = Instant::now();
            constraint.0.mask(&mut logits).unwrap();
            masks.push(begun.elapsed());
            let token = antefix_engine::argmax(&logits);
            if tokenizer.is_end(token) {
                break;
            }
            let begun = Instant::now();
            constraint.0.commit(token).unwrap();
            constraint.0.forced();
            commits.push(begun.elapsed());
            if constraint.0.is_done() {
                break;
            }
        }
    }
    for (what, times) in [
        ("schema", &mut prepared),
        ("mask", &mut masks),
        ("commit", &mut commits),
    ] {
        times.sort_unstable();
        let [p50, p99, most] = [0.5, 0.99, 1.0].map(|share| percentile(times, share));
        let mean = times.iter().sum::<Duration>() / times.len() as u32;
        println!(
            "{what:7} {:6} times: mean {mean:.1?}, p50 {p50:.1?}, p99 {p99:.1?}, most {most:.1?}",
            times.len()
        );
    }
}
