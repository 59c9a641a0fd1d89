//! The command on hostile files of up to 1 MiB: exit code 2, one paragraph, and at most 128 MiB of memory.
#![cfg(target_os = "linux")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use antefix_models::{
    spec::Arch,
    testing::{Meta, hostile, tiny_builder, tiny_gguf},
};
use nix::sys::resource::{UsageWho, getrusage};

/// KiB of resident memory.
const MAX_RSS: i64 = 128 << 10;

struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Dir {
    /// Runs the command with `words`, then the model's path.
    fn run(&self, name: &str, words: &[&str], model: &Path) -> Output {
        let output = Command::new(env!("CARGO_BIN_EXE_antefix"))
            .args(words)
            .arg(model)
            .env("ANTEFIX_HOME", &self.0)
            .output()
            .expect("the command starts");
        // Of all children so far, so that the first one over the limit is the one that is named.
        let rss = getrusage(UsageWho::RUSAGE_CHILDREN).expect("known").max_rss();
        assert!(rss <= MAX_RSS, "{name}: {} MiB of memory", rss >> 10);
        output
    }

    #[track_caller]
    fn refused(&self, name: &str, words: &[&str], model: &Path) {
        let output = self.run(name, words, model);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{name}: {said}");
        assert!(output.stdout.is_empty(), "{name}");
        // A line, then hints.
        let mut lines = said.lines();
        assert!(
            lines.next().is_some_and(|line| line.starts_with("antefix: ")),
            "{name}: {said}"
        );
        assert!(lines.all(|line| line.starts_with("hint: ")), "{name}: {said}");
        assert!(said.len() < 1000 && !said.contains("panicked"), "{name}: {said}");
    }

    fn write(&self, file: &str, bytes: &[u8]) -> PathBuf {
        assert!(bytes.len() <= 1 << 20, "{file}: {} bytes", bytes.len());
        let path = self.0.join(file);
        fs::write(&path, bytes).expect("there is room");
        path
    }

    /// A folder of these files.
    fn folder(&self, files: &[hostile::Named]) -> PathBuf {
        let folder = self.0.join("folder");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("there is room");
        for (file, bytes) in files {
            self.write(&format!("folder/{file}"), bytes);
        }
        folder
    }
}

/// One test, because the memory of children is known only of all of them.
#[test]
fn hostile_files_are_refused_in_little_memory() {
    let dir = Dir(std::env::temp_dir().join(format!("antefix-cli-hostile-{}", std::process::id())));
    fs::create_dir_all(&dir.0).expect("there is room");
    let text = dir.write("text", b"a b\n");
    let tokenize = ["tokenize", text.to_str().expect("UTF-8"), "--model"];
    let explain = ["explain", "--threads", "1", "--model"];
    let run = ["run", "--threads", "1", "--max-tokens", "1", "hi", "--model"];

    let good = dir.write("good.gguf", &tiny_gguf(Arch::Llama, 1));
    for words in [&tokenize[..], &explain, &run] {
        let output = dir.run("good", words, &good);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    for (name, bytes) in hostile::gguf().into_iter().chain(hostile::tables()) {
        let file = dir.write("hostile.gguf", &bytes);
        dir.refused(&name, &explain, &file);
        dir.refused(&name, &tokenize, &file);
    }
    for (name, source) in hostile::templates() {
        let source = Meta::Str(String::from_utf8(source).expect("UTF-8"));
        let model = tiny_builder(Arch::Qwen3, 1).replace("tokenizer.chat_template", source);
        dir.refused(&name, &run, &dir.write("hostile.gguf", &model.build()));
    }
    for (name, files) in hostile::folders() {
        dir.refused(&name, &explain, &dir.folder(&files));
    }
    for (name, bytes) in hostile::large() {
        let file = dir.write("large.gguf", &bytes);
        for words in [&tokenize[..], &explain] {
            let output = dir.run(&name, words, &file);
            assert!(
                output.status.success(),
                "{name}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
    for (name, files) in hostile::large_folders() {
        let output = dir.run(&name, &tokenize, &dir.folder(&files));
        assert!(
            output.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
