//! Whatever a model says under a schema validates against it, and ends.
//!
//! `suite.jsonl` holds the draft 4 schemas of the JSON Schema Test Suite (Copyright (c) 2012 Julian Berman, MIT) that need no network.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::sync::Arc;
use std::time::Instant;

use antefix_constrain::{Grammar, GrammarError, Vocabulary};
use antefix_engine::BoxedConstraint;
use antefix_models::gguf::Gguf;
use antefix_models::spec::Arch;
use antefix_models::testing::{Rng, tiny_gguf};
use antefix_models::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn tiny() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_gguf(&Gguf::parse(tiny_gguf(Arch::Llama, 11)).unwrap()).unwrap())
}

/// A schema out of the kinds that people send: objects with optional properties, enums, ranges, patterns, lengths, choices,
/// references.
fn schema(rng: &mut Rng, depth: usize) -> Value {
    let mut below = |n: u64| rng.bits() % n;
    let kind = below(if depth == 0 { 9 } else { 13 });
    match kind {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let lo = below(50) as i64 - 25;
            json!({"type": "integer", "minimum": lo, "maximum": lo + below(100) as i64})
        }
        3 => json!({"type": "number", "minimum": 0, "exclusiveMaximum": 1 + below(10)}),
        4 => json!({"enum": ["red", 3, null, true, {"a": [1]}, format!("no {}", below(9))]}),
        5 => {
            let lo = below(4);
            json!({"type": "string", "minLength": lo, "maxLength": lo + 1 + below(8)})
        }
        6 => {
            let pattern = ["^[a-f]{2,5}$", "^(yes|no)$", "^\\d{3}-\\d{2}$"][below(3) as usize];
            json!({"type": "string", "pattern": pattern})
        }
        7 => {
            // Dates and times are left out: llguidance knows the form but not the calendar (29 February, leap seconds).
            let format = ["uuid", "ipv4"][below(2) as usize];
            json!({"type": "string", "format": format})
        }
        8 => {
            let values = json!(["x", 1, [1, 2], {"k": null}]);
            json!({"const": values[below(4) as usize]})
        }
        9 => {
            let (lo, more) = (below(3), below(3));
            json!({"type": "array", "items": schema(rng, depth - 1), "minItems": lo, "maxItems": lo + more})
        }
        10 => json!({"anyOf": [schema(rng, depth - 1), schema(rng, depth - 1)]}),
        // References start at the root.
        11 if depth == 3 => json!({
            "$defs": {"node": schema(rng, depth - 1)},
            "type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3,
        }),
        _ => {
            let count = 1 + below(4);
            let wanted = below(count + 1);
            let properties: serde_json::Map<String, Value> = (0..count)
                .map(|i| (format!("p{i}"), schema(rng, depth - 1)))
                .collect();
            let required: Vec<String> = (0..wanted).map(|i| format!("p{i}")).collect();
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        }
    }
}

/// What random logits say under the constraint; `None` when they have not come to an end.
fn walk(tokenizer: &Tokenizer, mut constraint: BoxedConstraint, rng: &mut Rng) -> Option<String> {
    let mut tokens = Vec::new();
    let mut logits = vec![0.0f32; tokenizer.vocab_size()];
    while tokens.len() < 4000 {
        for (id, logit) in logits.iter_mut().enumerate() {
            let bytes = tokenizer.token_bytes(id as u32);
            // Noise closes nothing: what ends strings, numbers and lists is made likely.
            let likely = match bytes[..] {
                _ if tokenizer.is_end(id as u32) => 0.9,
                [b'"' | b',' | b']' | b'}'] => 0.9,
                [b'0'..=b'9'] => 0.3,
                _ => 0.0,
            };
            *logit = (rng.bits() >> 40) as f32 / (1u64 << 24) as f32 + likely;
        }
        constraint.0.mask(&mut logits).unwrap();
        let token = antefix_engine::argmax(&logits);
        assert!(
            logits[token as usize] > f32::NEG_INFINITY,
            "something is always allowed"
        );
        if tokenizer.is_end(token) {
            return Some(tokenizer.decode(&tokens));
        }
        constraint.0.commit(token).unwrap();
        tokens.push(token);
        tokens.extend(constraint.0.forced());
        if constraint.0.is_done() {
            return Some(tokenizer.decode(&tokens));
        }
    }
    None
}

#[test]
fn what_completes_validates() {
    let tokenizer = tiny();
    let vocabulary = Vocabulary::new(&tokenizer).unwrap();
    let mut rng = Rng(3);
    let suite = include_str!("suite.jsonl").lines().map(|line| {
        let entry: Value = serde_json::from_str(line).unwrap();
        (
            entry["from"].as_str().unwrap().to_string(),
            entry["schema"].clone(),
        )
    });
    let mut schemas: Vec<(String, Value)> = suite.collect();
    let from_suite = schemas.len();
    schemas.extend((0..320).map(|i| (format!("made {i}"), schema(&mut rng, 3))));
    let (mut done, mut refused, mut open) = (0, Vec::new(), Vec::new());
    for (name, schema) in &schemas {
        let constraint = match vocabulary.constrain(&Grammar::JsonSchema(schema.clone())) {
            Ok(c) => c,
            Err(e) => {
                assert!(!e.to_string().is_empty());
                refused.push(format!("{name}: {e}"));
                continue;
            }
        };
        let draft = match name.starts_with("made") {
            true => jsonschema::Draft::Draft202012,
            false => jsonschema::Draft::Draft4,
        };
        let options = jsonschema::options()
            .with_draft(draft)
            .should_validate_formats(name.starts_with("made"));
        let validator = options.build(schema).unwrap();
        for _ in 0..3 {
            let Some(text) = walk(&tokenizer, constraint.clone(), &mut rng) else {
                open.push(name.clone());
                continue;
            };
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}: {text}"));
            let errors: Vec<String> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
            assert!(errors.is_empty(), "{name}: {schema}\n{text}\n{errors:?}");
            done += 1;
        }
    }
    eprintln!(
        "{} schemas ({from_suite} of the suite): {done} answers completed, all valid; {} schemas refused, {} answers cut at 4,000 tokens",
        schemas.len(),
        refused.len(),
        open.len()
    );
    for line in &refused {
        eprintln!("refused {line}");
    }
    assert!(
        refused.iter().all(|r| !r.starts_with("made")),
        "what people send is supported"
    );
    // Expressions without an anchor have no end that noise would find.
    open.retain(|name| name.starts_with("made"));
    assert!(open.is_empty(), "ran away: {open:?}");
}

#[test]
fn bad_grammars_are_named() {
    let vocabulary = Vocabulary::new(&tiny()).unwrap();
    let error = |g: Grammar| vocabulary.constrain(&g).err().unwrap();
    assert_eq!(error(Grammar::Choice(Vec::new())), GrammarError::NoChoice);
    assert_eq!(error(Grammar::JsonSchema(json!(false))), GrammarError::NoChoice);
    assert!(matches!(
        error(Grammar::Regex("(".into())),
        GrammarError::Invalid(_)
    ));
    assert!(matches!(
        error(Grammar::Lark("start: nothing".into())),
        GrammarError::Invalid(_)
    ));
    assert!(matches!(
        error(Grammar::JsonSchema(json!({"type": "colour"}))),
        GrammarError::Invalid(_)
    ));
    assert!(matches!(
        error(Grammar::JsonSchema(json!(3))),
        GrammarError::Invalid(_)
    ));
    let remote = json!({"$ref": "http://example.com/schema.json"});
    assert!(matches!(
        error(Grammar::JsonSchema(remote)),
        GrammarError::Invalid(_)
    ));
    assert!(matches!(
        error(Grammar::Regex("a".repeat(300_000))),
        GrammarError::TooLong { .. }
    ));
    // A bomb is an error, not a long wait.
    let started = Instant::now();
    let bomb = (0..18).fold("a".to_string(), |s, _| format!("({s}){{1,9}}"));
    let _ = vocabulary.constrain(&Grammar::Regex(bomb));
    let deep = (0..100).fold(
        json!({"type": "string"}),
        |s, _| json!({"type": "array", "items": s, "minItems": 1}),
    );
    let _ = vocabulary.constrain(&Grammar::JsonSchema(deep));
    assert!(started.elapsed().as_secs() < 60);
}

#[test]
fn choices_and_expressions_are_followed_and_forks_are_apart() {
    let tokenizer = tiny();
    let vocabulary = Vocabulary::new(&tokenizer).unwrap();
    let mut rng = Rng(9);
    let choice = vocabulary
        .constrain(&Grammar::Choice(vec!["a \"b\"".into(), "a c".into()]))
        .unwrap();
    let expression = vocabulary.constrain(&Grammar::Regex("[0-9]{3}x".into())).unwrap();
    for _ in 0..20 {
        let said = walk(&tokenizer, choice.clone(), &mut rng).unwrap();
        assert!(["a \"b\"", "a c"].contains(&said.as_str()), "{said}");
        let said = walk(&tokenizer, expression.clone(), &mut rng).unwrap();
        assert!(said.len() == 4 && said.ends_with('x'), "{said}");
    }
}
