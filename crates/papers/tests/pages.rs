//! Cards are in order, and the pages under `docs/methods/` say what cards, module documentation and the last reproductions say.
//!
//! `cargo xtask docs` writes the pages.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use antefix_attention::method;
use antefix_attention::method::Card;
use antefix_papers::{ALL, ALWAYS, TRAINED, WITHOUT_REPRO, claims};
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn cards() -> impl Iterator<Item = &'static Card> {
    let others = ALWAYS.iter().chain(TRAINED).copied();
    ALL.iter().map(|m| m.card()).chain(others)
}

/// The last section of a page: the claim, and the last figures of `antefix repro --write-docs`.
fn reproduction(name: &str, lines: &[Value]) -> String {
    let Some(claim) = claims().into_iter().find(|c| c.slug == name) else {
        let why = WITHOUT_REPRO.iter().find(|w| w.0 == name).map_or("", |w| w.1);
        return format!("\n## Reproduction\nNone of its own. {why}\n");
    };
    let mut out = format!(
        "\n## Reproduction\n**Claim.** {} *{}*\n\n**Rule.** {}\n\n",
        claim.says, claim.source, claim.rule
    );
    let mine: Vec<&Value> = lines.iter().filter(|l| l["slug"] == name).collect();
    let figure = |x: &Value| x.as_f64().map_or_else(|| "-".to_string(), |x| format!("{x:.3}"));
    for (i, l) in mine.iter().enumerate() {
        let text = |key: &str| l[key].as_str().unwrap_or("").to_string();
        if i == 0 {
            out += "| model | run | measured | baseline | verdict |\n|---|---|---|---|---|\n";
        }
        let (run, unit) = (if l["fast"] == true { "short" } else { "full" }, text("unit"));
        out += &format!(
            "| {} | {run}: {} | {} {unit} | {} | {} |\n",
            text("model"),
            text("scale"),
            figure(&l["measured"]),
            figure(&l["baseline"]),
            text("verdict")
        );
    }
    out + &format!(
        "\n`antefix repro {name}` measures it; what the figures say stands in [Reproductions](../reproductions.md#{name}).\n"
    )
}

#[test]
fn every_card_is_in_order_and_every_name_is_there_once() {
    let faults: Vec<String> = cards().flat_map(|card| card.faults()).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let faults = ALL
        .iter()
        .flat_map(|m| m.dials().iter().filter_map(|dial| dial.fault(m.card())));
    assert_eq!(faults.collect::<Vec<String>>(), Vec::<String>::new());
    let names: Vec<&str> = ALL.iter().map(|m| m.card().name).collect();
    let sorted: BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(
        names,
        sorted.into_iter().collect::<Vec<_>>(),
        "ascending, each once"
    );
}

#[test]
fn the_committed_pages_are_those_of_the_cards() {
    let folder = root().join("docs/methods");
    let lines =
        fs::read_to_string(root().join("docs/reproductions.jsonl")).expect("docs/reproductions.jsonl");
    let lines: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).expect("one object a line"))
        .collect();
    let mut pages = vec![("README.md".to_string(), method::index(ALL, ALWAYS, TRAINED))];
    for card in cards() {
        let source = fs::read_to_string(root().join(card.source)).expect(card.source);
        let page = method::page(card, &source).unwrap_or_else(|e| panic!("{e}"));
        let page = page + &reproduction(card.name, &lines);
        pages.push((format!("{}.md", card.name), page));
    }
    let write = std::env::var_os("ANTEFIX_WRITE_PAGES").is_some();
    if write {
        fs::create_dir_all(&folder).unwrap();
    }
    for (file, text) in pages {
        let path = folder.join(&file);
        if write {
            fs::write(&path, &text).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == text,
            "docs/methods/{file} is not what its card and module documentation say\nhint: cargo xtask docs"
        );
    }
}
