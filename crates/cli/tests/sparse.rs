//! The tools around sparse attention as a person runs them, on a small random model.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use antefix_models::spec::Arch;
use antefix_models::testing::tiny_gguf;
use serde_json::Value;

struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Dir {
    fn new(test: &str) -> Self {
        let dir = Self(std::env::temp_dir().join(format!("antefix-{test}-{}", std::process::id())));
        fs::create_dir_all(&dir.0).unwrap();
        fs::write(dir.0.join("model.gguf"), tiny_gguf(Arch::Llama, 1)).unwrap();
        for i in 0..3usize {
            let words = (0..220 + 10 * i)
                .map(|w| format!("{}{} ", ["fox", "dog", "tree"][w * (w + i) % 3], w % (7 + i)));
            fs::write(dir.0.join(format!("{i}.txt")), words.collect::<String>()).unwrap();
        }
        dir
    }

    /// Runs the command on the model, in the folder.
    fn run(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_antefix"))
            .args(words)
            .args(["--model", "model.gguf", "--threads", "1"])
            .current_dir(&self.0)
            .env("ANTEFIX_HOME", &self.0)
            .output()
            .unwrap()
    }

    fn lines(&self, words: &[&str]) -> Vec<Value> {
        let output = self.run(words);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[track_caller]
    fn refused(&self, code: i32, words: &[&str], why: &str) {
        let output = self.run(words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(why) && !said.contains("panicked"), "{said}");
    }
}

#[test]
fn sparsity_is_told_by_layer_and_head() {
    let dir = Dir::new("sparsity");
    let lines = dir.lines(&[
        "analyse",
        "sparsity",
        "0.txt",
        "--rows",
        "9",
        "--json",
        "--heat-map",
        "map.svg",
    ]);
    assert!(
        lines.len() > 1 && lines[0]["layer"] == 0 && lines[0]["rows"] == 9,
        "{lines:?}"
    );
    for head in &lines {
        let shares: Vec<f64> = (0..3)
            .map(|i| head["needed"][i]["share"].as_f64().unwrap())
            .collect();
        assert!(
            shares[0] > 0.0 && shares[0] <= shares[1] && shares[1] <= shares[2] && shares[2] <= 1.0,
            "{head}"
        );
    }
    assert!(
        fs::read_to_string(dir.0.join("map.svg"))
            .unwrap()
            .starts_with("<svg")
    );
    let table = dir.run(&["analyse", "sparsity", "0.txt"]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert_eq!(table.lines().count(), lines.len() + 2, "{table}");
    dir.refused(2, &["analyse", "sparsity", "0.txt", "--rows", "0"], "at least 1");
    fs::write(dir.0.join("empty"), "").unwrap();
    let empty = dir.run(&["analyse", "sparsity", "empty"]);
    assert!(empty.status.success() || empty.status.code() == Some(2));
}
