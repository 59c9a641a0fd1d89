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
}

#[test]
fn plans_are_written_drawn_and_executed_again() {
    let dir = Dir::new("replay");
    let method = "flexprefill,gamma=0.6,min_budget=32,block=32,rows=16,chunk=8";
    let plan = |more: &[&str]| dir.run(&[&["explain", "--plan", "0.txt", "--method", method], more].concat());
    let written = plan(&["--live", "--json"]);
    assert!(
        written.status.success(),
        "{}",
        String::from_utf8_lossy(&written.stderr)
    );
    fs::write(dir.0.join("plans.jsonl"), &written.stdout).unwrap();
    let words = ["explain", "--plan", "--replay", "plans.jsonl", "0.txt", "--json"];
    let [done] = &dir.lines(&[&words[..], &["--method", method]].concat())[..] else {
        panic!("one line")
    };
    assert_eq!(
        (&done["live"]["same_bits"], &done["live"]["kl"]),
        (&Value::Bool(true), &Value::from(0.0))
    );
    assert!(
        done["kl"].as_f64().unwrap() > 0.0 && done["density"].as_f64().unwrap() < 1.0,
        "{done}"
    );
    let [alone] = &dir.lines(&words)[..] else {
        panic!("one line")
    };
    assert_eq!((&alone["kl"], &alone["live"]), (&done["kl"], &Value::Null));

    for (more, cells) in [(&[][..], 0), (&["--picture", "1.0"], 1)] {
        let drawn = plan(&[&["--heat-map", "map.svg"], more].concat());
        assert!(
            drawn.status.success(),
            "{}",
            String::from_utf8_lossy(&drawn.stderr)
        );
        let svg = fs::read_to_string(dir.0.join("map.svg")).unwrap();
        assert!(
            svg.starts_with("<svg") && svg.matches("<rect").count() > 1 + cells,
            "{svg}"
        );
    }

    // Plans of another text, of nothing, and no plans.
    dir.refused(
        2,
        &["explain", "--plan", "--replay", "plans.jsonl", "1.txt"],
        "layer 0: ",
    );
    let good = String::from_utf8(written.stdout).unwrap();
    let first = good.lines().next().unwrap();
    for (text, why) in [
        (String::new(), "no plan of layer 0"),
        (first.to_string(), "hint: "),
        ("{}".into(), "line 1"),
        (good.replacen("\"layer\":0", "\"layer\":77", 1), "the model has"),
        (good.replacen("\"cover\"", "\"cuver\"", 1), "line 1"),
        (format!("{good}{{\"layer\":0"), "not a plan"),
        (format!("{good}{first}\n"), "stands where"),
        (
            good.replacen("\"queries\":[0,", "\"queries\":[0,4294967295", 1),
            "line 1",
        ),
    ] {
        fs::write(dir.0.join("bad.jsonl"), text).unwrap();
        dir.refused(2, &["explain", "--plan", "--replay", "bad.jsonl", "0.txt"], why);
    }
}

#[test]
fn what_was_tuned_is_a_profile_that_run_takes() {
    let dir = Dir::new("tune");
    let tune = |method: &str, more: &[&str]| -> Vec<String> {
        let words = [
            "tune",
            "--method",
            method,
            "--out",
            "profile.toml",
            "--json",
            "0.txt",
            "1.txt",
            "2.txt",
        ];
        words.iter().chain(more).map(ToString::to_string).collect()
    };
    let prefill = tune(
        "a_shape,block=32,sinks=4",
        &["--knob", "window=8..2048", "--target-recall", "0.8"],
    );
    let prefill: Vec<&str> = prefill.iter().map(String::as_str).collect();
    let lines = dir.lines(&prefill);
    let tuned = lines.last().unwrap();
    assert_eq!(tuned["stage"], "tuned");
    assert!(
        tuned["recall"].as_f64().unwrap() >= 0.8 && lines.len() > 8,
        "{tuned}"
    );
    // Another axis for the same lengths goes into the same band; a second search replaces the first.
    let decode = tune(
        "quest,least=8,dense_layers=0",
        &["--budget", "0.9", "--knob", "share=0.05..1"],
    );
    let decode: Vec<&str> = decode.iter().map(String::as_str).collect();
    dir.lines(&decode);
    assert_eq!(dir.lines(&prefill), lines);
    let profile = fs::read_to_string(dir.0.join("profile.toml")).unwrap();
    assert_eq!(profile.matches("[[band]]").count(), 1, "{profile}");
    let settings = tuned["settings"].as_str().unwrap();
    assert!(
        profile.contains(&format!("prefill = \"{settings}\"")),
        "{profile}"
    );
    assert!(profile.contains("decode = \"quest,"), "{profile}");

    let prompt = fs::read_to_string(dir.0.join("0.txt")).unwrap();
    let run = |more: &[&str]| {
        let words = [
            &["run", "--raw", "-n", "2", "--ctx", "4096"],
            more,
            &[prompt.as_str()],
        ]
        .concat();
        let output = dir.run(&words);
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, said) = run(&["--profile", "profile.toml"]);
    assert!(
        code == Some(0) && said.contains("[a_shape,") && said.contains("+ quest,"),
        "{said}"
    );
    let (_, said) = run(&["--profile", "profile.toml", "--method", "a_shape,window=77"]);
    assert!(said.contains("window=77") && said.contains("+ quest,"), "{said}");
    // Of another model.
    fs::write(dir.0.join("other.toml"), profile.replace("model.gguf", "other")).unwrap();
    let (code, said) = run(&["--profile", "other.toml"]);
    assert!(
        code == Some(2) && said.contains("one of the model `other`"),
        "{said}"
    );
    // Lengths that overlap with what is there.
    let below = tuned["below"].as_u64().unwrap();
    let wide = profile.replace(&format!("below = {below}"), &format!("below = {}", below + 1));
    fs::write(dir.0.join("profile.toml"), wide).unwrap();
    dir.refused(2, &prefill, "the prompts make one");
}

#[test]
fn a_target_that_cannot_be_met_leaves_no_profile() {
    let dir = Dir::new("unmet");
    let words = [
        "tune",
        "--method",
        "a_shape,block=32,sinks=0",
        "--out",
        "profile.toml",
        "0.txt",
        "1.txt",
    ];
    let with = |more: &[&'static str]| -> Vec<&'static str> { words.iter().chain(more).copied().collect() };
    let unmet = with(&["--knob", "window=1..9", "--target-recall", "0.99"]);
    dir.refused(1, &unmet, "no setting of `a_shape` meets the target");
    for (more, why) in [
        (&["--target-recall", "1.5"][..], "a share above 0"),
        (&["--target-kl", "0"], "nats, above 0"),
        (&[], "one target is needed"),
        (&["--budget", "0.5", "--target-kl", "1"], "one target is needed"),
        (&["--budget", "0.5", "--knob", "windo=1..9"], "choose from"),
        (&["--budget", "0.5", "--knob", "window"], "KNOB=FROM..TO"),
        (
            &["--budget", "0.5", "--knob", "window=9..9999999"],
            "no values of knob `window`",
        ),
        (&["--budget", "0.5", "--knob", "block=1..9"], "holds no numbers"),
        (&["--budget", "0.5", "--held-out", "1"], "--held-out"),
        (&["--budget", "0.5", "gone.txt"], "gone.txt"),
    ] {
        dir.refused(2, &with(more), why);
    }
    let one = [
        "tune",
        "--method",
        "a_shape",
        "--out",
        "profile.toml",
        "0.txt",
        "--budget",
        "0.5",
    ];
    dir.refused(2, &one, "1 prompts are too few");
    let axis = [
        "tune",
        "--method",
        "streaming_llm",
        "--out",
        "profile.toml",
        "0.txt",
        "--budget",
        "0.5",
    ];
    dir.refused(2, &axis, "is a method of the axis `kv`");
    assert!(!dir.0.join("profile.toml").exists());
}
