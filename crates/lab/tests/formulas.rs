//! What methods say they hold and leave alone, from request to report on a tiny model: bytes of the accountant against the formula of the
//! policy, and bits of requests that are too short to be changed.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod settings;

use std::path::PathBuf;

use antefix_attention::method::{Answer, Ask, Axis, Host, Profiles, Prompt};
use antefix_conformance::tiny;
use antefix_kernels::cpu::Cpu;
use antefix_lab::host::EngineHost;
use antefix_models::spec::Arch;
use antefix_papers::heads::HeadProfile;
use antefix_papers::{ALL, compresskv, kv_baselines};
use antefix_state::PAGE_ROWS;

const PROMPT: usize = 300;
const PROFILE: &str = "made_up";

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What eviction costs each layer of the made-up profile.
const ERRORS: [f64; 2] = [0.75, 0.25];

/// A profile in which head 0 of layer 0 alone scores.
fn profile(host: &EngineHost) -> HeadProfile {
    let facts = host.facts();
    let mut score = vec![vec![0.0; facts.heads]; facts.layers.len()];
    score[0][0] = 1.0;
    let errors = ERRORS.map(|e| vec![e as f32; facts.heads]).to_vec();
    let scores = ["semantic", "induction", "echo"].map(|name| (name, score.clone()));
    HeadProfile::example(facts, scores.into_iter().chain([("eviction", errors)]))
}

fn host(test: &str) -> (EngineHost, Folder) {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let folder = std::env::temp_dir().join(format!("antefix-formulas-{test}-{}", std::process::id()));
    let profiles = Profiles::named_in(vec![folder.clone()]);
    let host = EngineHost::with_room(&model, &tokenizer, PROMPT * 2, (ALL, profiles));
    std::fs::create_dir_all(folder.join("heads")).unwrap();
    let text = serde_json::to_string(&profile(&host)).unwrap();
    std::fs::write(folder.join(format!("heads/{PROFILE}.json")), text).unwrap();
    (host, Folder(folder))
}

fn ask(tokens: usize) -> Ask {
    Ask {
        prompt: Prompt::plain((0..tokens).map(|i| ((i * 37 + 11) % 250) as u32).collect()),
        // The first drawn token is a row of the sequence, the second is not yet.
        answer: Answer::Given(vec![7, 8]),
        logits: true,
        fresh: true,
        ..Ask::default()
    }
}

fn pages(rows: usize) -> usize {
    rows.div_ceil(PAGE_ROWS)
}

/// What a request of `prompt` under `method` keeps is `want` pages, over those that dense attention holds of `rows` rows.
fn check(host: &mut EngineHost, method: &str, prompt: Prompt, want: usize, rows: usize) {
    let program = host.install(&[method]).unwrap();
    let told = host
        .ask(&Ask {
            program: Some(program),
            prompt,
            ..ask(0)
        })
        .unwrap();
    let facts = host.facts();
    let dense = facts.layers.len() * facts.kv_heads * pages(rows);
    let want = want as f64 / dense as f64;
    assert!(
        (told.kept - want).abs() < 1e-12,
        "{method}: {} for {want}",
        told.kept
    );
}

#[test]
fn the_bytes_that_are_held_are_those_of_the_formula() {
    let (mut host, _folder) = host("bytes");
    let facts = host.facts();
    let (layers, kv_heads) = (facts.layers.len(), facts.kv_heads);
    let runs = layers * kv_heads;
    let check = |host: &mut EngineHost, method: &str, of_prompt: usize| {
        // Every head has a page for the answer.
        check(host, method, ask(PROMPT).prompt, of_prompt + runs, PROMPT + 1);
    };
    for budget in [40, 64, 65, 128] {
        let same_everywhere = runs * pages(budget);
        for method in [
            format!("snapkv,budget={budget},window=8"),
            format!("h2o,budget={budget}"),
            format!("random_kv,budget={budget},window=8"),
            format!("streaming_llm,budget={budget}"),
            format!("compresskv,budget={budget},layers=uniform,profile={PROFILE}"),
        ] {
            check(&mut host, &method, same_everywhere);
        }
        // The budget falls from layer to layer, or follows the layers' errors.
        for beta in [2, 20] {
            let past = kv_baselines::reference::pyramid(budget, 8, PROMPT, beta, layers);
            let held = past.iter().map(|p| kv_heads * pages(p + 8)).sum();
            check(
                &mut host,
                &format!("pyramidkv,budget={budget},window=8,beta={beta}"),
                held,
            );
        }
        let of_layers = compresskv::reference::budgets(&ERRORS, budget as i64, 32, 3 * budget as i64);
        let held = of_layers.iter().map(|&b| kv_heads * pages(b as usize)).sum();
        check(
            &mut host,
            &format!("compresskv,budget={budget},profile={PROFILE}"),
            held,
        );
    }
    // One head keeps all rows, the others sinks, recent rows and one for those between.
    for (buffer, fraction) in [(40, 0.0), (16, 0.5), (59, 0.0), (60, 0.0)] {
        let recent = buffer.max((PROMPT as f64 * fraction) as usize);
        let share = 1.0 / runs as f64;
        let method = format!(
            "razor_attention,induction={share},echo=0,sinks=4,buffer={buffer},fraction={fraction},profile={PROFILE}"
        );
        let held = pages(PROMPT) + (runs - 1) * pages(4 + 1 + recent);
        check(&mut host, &method, held);
    }
}

/// Documents of these lengths behind 20 tokens and in front of a question of 50; those of equal length are equal.
fn with_documents(lengths: &[usize]) -> Prompt {
    let mut prompt = ask(20).prompt;
    for &length in lengths {
        let from = prompt.tokens.len();
        prompt
            .tokens
            .extend((0..length).map(|i| ((i * 29 + length) % 250) as u32));
        prompt.documents.push(from..from + length);
    }
    prompt.tokens.extend(ask(50).prompt.tokens);
    prompt
}

#[test]
fn documents_lie_in_pages_of_their_own() {
    let (mut host, _folder) = host("documents");
    let facts = host.facts();
    let (layers, kv_heads) = (facts.layers.len(), facts.kv_heads);
    for lengths in [&[200][..], &[70, 33, 64], &[70, 70, 33]] {
        let prompt = with_documents(lengths);
        let rows = prompt.tokens.len() + 1;
        // A document that stands there twice is stored once.
        let mut stored = lengths.to_vec();
        stored.dedup();
        let apart = pages(20) + stored.iter().map(|&n| pages(n)).sum::<usize>() + pages(50 + 1);
        let held = layers * kv_heads * apart;
        check(&mut host, "ape", prompt.clone(), held, rows);
        check(&mut host, "cacheblend,ratio=0", prompt.clone(), held, rows);
        // Fresh rows lie beside the stored ones: all of them in layer 1, in each layer behind it those that were chosen.
        let documents: usize = lengths.iter().sum();
        for ratio in [0.25, 1.0] {
            let chosen = (ratio * documents as f64).ceil() as usize;
            let fresh = pages(documents) + (layers - 2) * pages(chosen);
            let method = format!("cacheblend,ratio={ratio},schedule=single");
            check(&mut host, &method, prompt.clone(), held + kv_heads * fresh, rows);
        }
        // Read twice: dense attention on the prompt as it was rewritten holds as much.
        let twice = rows + documents + host.encode("\n").len();
        let all = layers * kv_heads * pages(twice);
        check(&mut host, "jrt", prompt, all, twice);
    }
}

/// Rows go when the prompt is computed: what its last row says is exact.
#[test]
fn the_first_token_is_that_of_the_whole_cache() {
    let (mut host, _folder) = host("first");
    let dense = host.ask(&ask(PROMPT)).unwrap().logits;
    let mut tried = 0;
    for method in ALL.iter().filter(|m| m.card().axis == Axis::Kv) {
        let card = method.card();
        let few = [
            ("budget", "40"),
            ("window", "8"),
            ("buffer", "16"),
            ("profile", PROFILE),
        ];
        let text = settings::with(card, &few);
        let program = host.install(&[&text]).unwrap();
        let told = host
            .ask(&Ask {
                program: Some(program),
                ..ask(PROMPT)
            })
            .unwrap();
        assert!(told.kept < 0.9, "{text}: {}", told.kept);
        assert!(told.logits[0] == dense[0], "{text}: the prompt is computed whole");
        assert!(told.logits[1] != dense[1], "{text}: the answer is not");
        tried += 1;
    }
    assert!(tried >= 7, "{tried}");
}

#[test]
fn what_fits_the_buffer_is_dense() {
    let (mut host, _folder) = host("buffer");
    let dense = host.ask(&ask(PROMPT)).unwrap().logits;
    // Sinks, buffer and one row between are all rows, and the answer's.
    let method = format!(
        "razor_attention,sinks=4,fraction=0,every=1,buffer={},profile={PROFILE}",
        PROMPT - 4
    );
    let program = host.install(&[&method]).unwrap();
    let asked = Ask {
        program: Some(program),
        ..ask(PROMPT)
    };
    let told = host.ask(&asked).unwrap();
    assert_eq!(told.kept, 1.0);
    assert!(told.logits == dense);
}

#[test]
fn documents_that_do_not_fit_twice_are_refused() {
    let (mut host, _folder) = host("twice");
    let program = host.install(&["jrt,times=4"]).unwrap();
    let asked = Ask {
        program: Some(program),
        prompt: with_documents(&[150]),
        ..ask(0)
    };
    let error = host.ask(&asked).unwrap_err().to_string();
    assert!(error.contains("600") && error.contains("hint"), "{error}");
}

#[test]
fn short_requests_keep_their_bits_under_every_stretch() {
    let (mut host, _folder) = host("bits");
    let dense = host.ask(&ask(PROMPT)).unwrap().logits;
    let mut tried = 0;
    for method in ALL.iter().filter(|m| m.card().axis == Axis::Geometry) {
        let name = method.card().name;
        let mut under = |text: &str| {
            let program = host.install(&[text]).unwrap();
            let asked = Ask {
                program: Some(program),
                ..ask(PROMPT)
            };
            host.ask(&asked).unwrap().logits
        };
        assert!(under(name) == dense, "{name} changes a request inside the window");
        let always = under(&format!("{name},always=true"));
        assert!(always != dense, "{name}: the test could not tell them apart");
        tried += 1;
    }
    assert!(tried >= 6, "{tried}");
    // Installed for all requests, but with the model's own angles: scores are scaled beyond the window only.
    let program = host
        .install(&["entropy_abf,always=true,parts=scale_only,skip_layers=0"])
        .unwrap();
    let asked = Ask {
        program: Some(program),
        ..ask(PROMPT)
    };
    assert!(host.ask(&asked).unwrap().logits == dense);
}
