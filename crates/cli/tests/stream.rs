//! `antefix stream`: answers line by line, goes on from a saved state, names broken lines.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use antefix_papers::aaren::file::write;
use antefix_papers::aaren::{Config, Mixer, Norm, Scale, Task};

fn model(folder: &Path, mixer: Mixer) -> String {
    let config = Config {
        mixer,
        width: 8,
        heads: 2,
        layers: 2,
        ffn: 16,
        norm: Norm::Pre,
        decay: 0.0,
        task: Task::Forecast {
            channels: 1,
            horizon: 2,
            scale: Scale {
                mean: vec![0.0],
                std: vec![1.0],
            },
        },
    };
    let tensors = config
        .tensors()
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let n: usize = shape.iter().product();
            let value = |j: usize| (((i * 31 + j * 17) % 23) as f32 - 11.0) / 20.0;
            (name, (0..n).map(value).collect())
        });
    let file = folder.join(format!("{mixer:?}.safetensors"));
    std::fs::write(&file, write(&config, &tensors.collect()).unwrap()).unwrap();
    file.to_str().unwrap().to_owned()
}

fn stream(words: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_antefix"))
        .arg("stream")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that refuses its model has closed the pipe already.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn events(from: usize, to: usize) -> String {
    let event = |i: usize| format!("{{\"x\": [{}]}}\n", (i as f64 * 0.7).sin());
    (from..to).map(event).collect::<Vec<_>>().concat()
}

#[test]
fn a_stream_cut_in_two_says_what_the_whole_one_says() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), Mixer::Aaren);
    let whole = stream(&[&model], events(0, 50).as_bytes());
    assert!(whole.status.success());
    let whole = String::from_utf8(whole.stdout).unwrap();
    assert_eq!(whole.lines().count(), 50);
    let state = folder.path().join("s.safetensors");
    let words = [model.as_str(), "--state", state.to_str().unwrap()];
    let mut parts = String::new();
    for (from, to) in [(0, 20), (20, 20), (20, 50)] {
        let out = stream(&words, events(from, to).as_bytes());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        parts += &String::from_utf8(out.stdout).unwrap();
    }
    assert_eq!(parts, whole);
}

#[test]
fn broken_lines_stop_the_stream_or_are_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), Mixer::Aaren);
    let mut input = events(0, 2).into_bytes();
    input.extend(b"{\"x\": [1, 2]}\n\xff\n\n");
    input.extend(vec![b' '; (1 << 20) + 5]);
    input.push(b'\n');
    input.extend(events(2, 3).bytes());
    let state = folder.path().join("s.safetensors");
    let out = stream(&[&model, "--state", state.to_str().unwrap()], &input);
    assert_eq!(out.status.code(), Some(2));
    let error = String::from_utf8(out.stderr).unwrap();
    assert_eq!(error, "antefix: line 3: `x` has 2 values, this model reads 1\n");
    assert_eq!(String::from_utf8(out.stdout).unwrap().lines().count(), 2);
    assert!(state.exists(), "what was answered is kept");
    let out = stream(&[&model, "--skip-broken"], &input);
    assert!(out.status.success());
    let error = String::from_utf8(out.stderr).unwrap();
    assert!(error.contains("line 4: it is not UTF-8"), "{error}");
    assert!(
        error.contains("line 6: it has more than 1048576 bytes"),
        "{error}"
    );
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(
        said,
        String::from_utf8(stream(&[&model], events(0, 3).as_bytes()).stdout).unwrap()
    );
}

#[test]
fn files_that_are_no_model_and_states_of_other_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (aaren, twin) = (
        model(folder.path(), Mixer::Aaren),
        model(folder.path(), Mixer::Attention),
    );
    let state = folder.path().join("s.safetensors");
    let state = state.to_str().unwrap();
    let refused = |words: &[&str], want: &str| {
        let out = stream(words, b"");
        let error = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{error}");
        assert!(error.contains(want), "{error}");
    };
    refused(&["/nowhere"], "cannot be read");
    std::fs::write(state, "no state").unwrap();
    refused(
        &[state],
        "is no model of this kind: it is no whole safetensors file",
    );
    refused(&[&aaren, "--state", state], "is no state of this model");
    refused(&[&twin, "--state", state], "its mixer is `attention`");
    refused(
        &[&aaren, "--state", &aaren],
        "is no state of this model: `format`",
    );
    assert!(stream(&[&twin], events(0, 3).as_bytes()).status.success());
}
