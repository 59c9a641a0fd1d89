//! Every pair of methods either works or is refused with both names; `docs/methods/combinations.md` says which.
//!
//! `cargo xtask docs` writes the page.

use std::fmt::Write;
use std::path::Path;

use antefix_attention::method::Profiles;
use antefix_conformance::method::{PAIRED, Pair, pair};
use antefix_conformance::tiny;
use antefix_kernels::cpu::Cpu;
use antefix_papers::heads::{HeadProfile, KIND};
use antefix_papers::{ALL, attention_sae};

#[test]
fn every_pair_works_or_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder for tests");
    let facts = tiny(PAIRED, Cpu::best(), 1).0.facts();
    let profile = HeadProfile::made_up(&facts, 5);
    let text = serde_json::to_string(&profile).expect("plain data");
    std::fs::create_dir(folder.path().join(KIND)).expect("a folder for tests");
    std::fs::write(folder.path().join(KIND).join("default.json"), text).expect("a file for tests");
    std::fs::create_dir(folder.path().join(attention_sae::KIND)).expect("a folder for tests");
    let file = folder
        .path()
        .join(attention_sae::KIND)
        .join("default.safetensors");
    std::fs::write(file, attention_sae::made_up(&facts)).expect("a file for tests");
    let profiles = Profiles::named_in(vec![folder.path().to_owned()]);
    let mut table = String::from("| |");
    for m in ALL {
        let _ = write!(table, " {} |", m.card().name);
    }
    let _ = write!(table, "\n|---|{}\n", "---|".repeat(ALL.len()));
    let mut reasons = String::new();
    for (i, one) in ALL.iter().enumerate() {
        let _ = write!(table, "| **{}** |", one.card().name);
        for (j, other) in ALL.iter().enumerate() {
            let (a, b) = (one.card(), other.card());
            let cell = match () {
                () if j <= i => "",
                () if a.axis == b.axis => "axis",
                () => match pair(*one, *other, &profiles) {
                    Pair::Works => "yes",
                    Pair::Refused(why) => {
                        assert!(
                            why.contains(&format!("`{}`", a.name)) && why.contains(&format!("`{}`", b.name)),
                            "{} and {} are refused without their names: {why}",
                            a.name,
                            b.name
                        );
                        let why = why.lines().next().unwrap_or_default();
                        let _ = writeln!(reasons, "- {why}");
                        "no"
                    }
                },
            };
            let _ = write!(table, " {cell} |");
        }
        table.push('\n');
    }
    let mut page = String::from(
        "# Which methods go together\n\n`yes`: a request under both ran in the tests, in chunks and out of the cache, with the same bits. \
         `axis`: both are on one axis, of which a request chooses one. `no`: refused, for the reason below.\n\n",
    );
    page += &table;
    if !reasons.is_empty() {
        let _ = write!(page, "\n{reasons}");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/methods/combinations.md");
    if std::env::var_os("ANTEFIX_WRITE_PAGES").is_some() {
        std::fs::write(&path, &page).expect("docs/methods exists");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == page,
        "docs/methods/combinations.md is not what the tests find\nhint: cargo xtask docs"
    );
}
