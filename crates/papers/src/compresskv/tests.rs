//! compresskv: who votes, and how much each layer keeps.

use std::collections::BTreeMap;

use antefix_attention::method::{Chosen, Facts, Profiles, Value};

use super::*;
use crate::heads::{FORMAT, HeadProfile, HeadTest};

#[test]
fn it_conforms() {
    antefix_conformance::method::check(&CompressKv);
}

#[test]
fn the_best_heads_vote_and_ties_go_to_the_lower_one() {
    assert_eq!(best(&[0.1, 0.7, 0.7, 0.2], 3), [1, 2, 3]);
    assert_eq!(best(&[0.5, 0.1], 4), [0, 1]);
}

fn profile(eviction: Option<Vec<f32>>) -> String {
    let facts = Facts::example();
    let table = |f: &dyn Fn(usize, usize) -> f32| -> Vec<Vec<f32>> {
        (0..facts.layers.len())
            .map(|l| (0..facts.heads).map(|h| f(l, h)).collect())
            .collect()
    };
    let test = |name: &str, score| HeadTest {
        name: name.into(),
        what: "made up".into(),
        runs: 1,
        accepted: 1,
        tokens: [10, 10],
        seed: 0,
        score,
        active: None,
        half_spearman: None,
    };
    let mut tests = vec![test("semantic", table(&|l, h| ((l + h) % facts.heads) as f32))];
    tests.extend(eviction.map(|e| test("eviction", table(&|l, _| e[l]))));
    let profile = HeadProfile {
        format: FORMAT.into(),
        model: facts.name.clone(),
        sha256: String::new(),
        engine: String::new(),
        layers: facts.layers.len(),
        heads: facts.heads,
        kv_heads: facts.kv_heads,
        local_layers: vec![1],
        tests,
    };
    serde_json::to_string(&profile).expect("plain data")
}

fn installed(text: &str, budget: i64) -> Result<String, RigError> {
    let dir = std::env::temp_dir().join(format!(
        "antefix-compresskv-{}-{}",
        std::process::id(),
        fastrand::u64(..)
    ));
    std::fs::create_dir_all(dir.join("heads")).expect("a folder for tests");
    std::fs::write(dir.join("heads/default.json"), text).expect("a file for tests");
    let given = BTreeMap::from([("budget".to_string(), Value::Int(budget))]);
    let chosen = Chosen {
        method: &CompressKv,
        knobs: Knobs::new(&CARD, &given).expect("in range"),
    };
    let profiles = Profiles {
        folders: vec![dir.clone()],
    };
    let program = Rig::assemble(&Facts::example(), &profiles, &[chosen]);
    std::fs::remove_dir_all(&dir).expect("as it was made");
    program.map(|p| format!("{p:?}"))
}

#[test]
fn budgets_follow_the_profile() {
    // Layer 1 has a window and no limit; the others share three budgets by their errors.
    let program = installed(&profile(Some(vec![1.0, 9.0, 2.0, 1.0])), 132).expect("it goes");
    let caps = format!("caps: [{}, {}, {}, {}]", 32 + 75, usize::MAX, 32 + 150, 32 + 75);
    assert!(program.contains(&caps), "{program}");
    let program = installed(&profile(None), 132).expect("it goes");
    assert!(
        program.contains(&format!("caps: [132, {}, 132, 132]", usize::MAX)),
        "{program}"
    );
    assert!(program.contains("voters: [[3, 2, 1, 0]"), "{program}");
}

#[test]
fn a_profile_of_another_model_is_refused() {
    let error =
        installed(&profile(None).replace("\"layers\":4", "\"layers\":5"), 64).expect_err("wrong shape");
    assert!(error.to_string().contains("compresskv"), "{error}");
    assert!(installed("{}", 64).is_err());
}
