//! Cards are in order, and the pages under `docs/methods/` say what cards and module documentation say.
//!
//! `cargo xtask docs` writes the pages.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use antefix_attention::method;
use antefix_papers::ALL;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn every_card_is_in_order_and_every_name_is_there_once() {
    let faults: Vec<String> = ALL.iter().flat_map(|m| m.card().faults()).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
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
    let mut pages = vec![("README.md".to_string(), method::index(ALL))];
    for m in ALL {
        let card = m.card();
        let source = fs::read_to_string(root().join(card.source)).expect(card.source);
        let page = method::page(card, &source).unwrap_or_else(|e| panic!("{e}"));
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
