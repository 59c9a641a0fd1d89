//! What methods say they hold and leave alone, from request to report on a tiny model: bytes of the accountant against the formula of the
//! policy, and bits of requests that are too short to be changed.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::path::PathBuf;

use antefix_attention::method::{Answer, Ask, Axis, Host, Profiles, Prompt};
use antefix_conformance::tiny;
use antefix_kernels::cpu::Cpu;
use antefix_lab::host::EngineHost;
use antefix_models::spec::Arch;
use antefix_papers::ALL;
use antefix_papers::heads::HeadProfile;
use antefix_state::PAGE_ROWS;

const PROMPT: usize = 300;
const PROFILE: &str = "made_up";

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A profile in which head 0 of layer 0 alone scores.
fn profile(host: &EngineHost) -> HeadProfile {
    let facts = host.facts();
    let mut score = vec![vec![0.0; facts.heads]; facts.layers.len()];
    score[0][0] = 1.0;
    HeadProfile::example(
        facts,
        ["semantic", "induction", "echo"].map(|name| (name, score.clone())),
    )
}

fn host(test: &str) -> (EngineHost, Folder) {
    let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
    let folder = std::env::temp_dir().join(format!("antefix-formulas-{test}-{}", std::process::id()));
    let profiles = Profiles {
        folders: vec![folder.clone()],
    };
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

#[test]
fn the_bytes_that_are_held_are_those_of_the_formula() {
    let (mut host, _folder) = host("bytes");
    let facts = host.facts();
    let runs = facts.layers.len() * facts.kv_heads;
    let dense = runs * pages(PROMPT + 1);
    let check = |host: &mut EngineHost, method: &str, of_prompt: usize| {
        let program = host.install(&[method]).unwrap();
        let told = host
            .ask(&Ask {
                program: Some(program),
                ..ask(PROMPT)
            })
            .unwrap();
        // Every head has a page for the answer.
        let want = (of_prompt + runs) as f64 / dense as f64;
        assert!(
            (told.kept - want).abs() < 1e-12,
            "{method}: {} for {want}",
            told.kept
        );
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
}
