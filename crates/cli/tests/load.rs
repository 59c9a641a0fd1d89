//! `antefix bench --serve` against the server that it starts itself.

use std::process::Command;

use serde_json::Value;

/// The JSON lines of `antefix bench WORDS --json` on a small random model.
fn bench(words: &[&str]) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_antefix"))
        .args(["bench", "--model", "tiny-random", "-t", "1", "--json", "--serve"])
        .args(words)
        .env("ANTEFIX_LOG", "warn")
        .output()
        .expect("the command starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[test]
fn shared_prompts_are_found_and_unique_ones_are_not() {
    let sizes = [
        "--prefix-words",
        "60",
        "--suffix-words",
        "5",
        "--output-tokens",
        "4",
        "--conversations",
        "12",
    ];
    let rows = bench(&[&["--concurrency", "1,4"], &sizes[..]].concat());
    assert_eq!(rows.len(), 6);
    for row in &rows {
        let turns = if row["kind"] == "multi_turn" { 4 } else { 1 };
        assert_eq!(row["requests"], 12 * turns, "{row}");
        assert_eq!(row["errors"], 0, "{row}");
        let cached = row["cached_share"].as_f64().expect("a number");
        match row["kind"].as_str() {
            Some("unique") if row["concurrency"] == 1 => assert!(cached < 0.2, "{row}"),
            Some("prefix_repetition" | "multi_turn") => assert!(cached > 0.3, "{row}"),
            _ => {}
        }
    }
}

#[test]
fn tenants_see_nothing_of_each_other_unless_they_share() {
    let rows = bench(&["--isolation", "40", "--secret-tokens", "256"]);
    let cached = |i: usize| rows[i]["cached_tokens"].as_u64().expect("a number");
    assert_eq!((&rows[0]["caches"], cached(0)), (&Value::from("apart"), 0));
    // Half of the probes ask what the other tenant asked just before: all of it but the last block is cached.
    let asked = rows[1]["asked_before"].as_u64().expect("a number");
    assert_eq!(
        (&rows[1]["caches"], cached(1)),
        (&Value::from("shared"), asked * 224)
    );
}

#[test]
fn a_stream_goes_on_beside_long_prompts() {
    let rows = bench(&["--fairness", "--prefix-words", "100", "--long-prompts", "1"]);
    assert!(rows[0]["prompt_tokens"].as_u64() > Some(300), "{}", rows[0]);
    assert!(rows[0]["busy_gaps"].as_u64() > Some(1), "{}", rows[0]);
}

#[test]
fn a_soak_samples_the_process() {
    let sizes = [
        "--prefix-words",
        "20",
        "--suffix-words",
        "3",
        "--output-tokens",
        "2",
    ];
    let rows = bench(&[&["--soak", "0.05", "--sample-s", "1"], &sizes[..]].concat());
    let (last, samples) = rows.split_last().expect("rows");
    assert_eq!(samples.len(), 3);
    assert!(
        samples
            .iter()
            .all(|s| s["rss_mb"].as_f64() > Some(1.0) && s["failed"] == 0)
    );
    assert!(samples[2]["answered"].as_u64() > Some(0));
    assert!(last["slopes"]["rss_mb_h"].is_number());
}
