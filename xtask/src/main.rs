//! Repository chores: `cargo xtask tidy`, `cargo xtask new-paper SLUG`, `cargo xtask docs`.

mod docs;
mod new_paper;
mod tidy;

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the root of the repository");
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["tidy"] => tidy::run(root),
        ["new-paper", slug] => new_paper::run(root, slug),
        ["docs"] => docs::run(root),
        _ => Err(
            "usage: cargo xtask tidy\n       cargo xtask new-paper SLUG\n       cargo xtask docs".to_owned(),
        ),
    };
    match result {
        Ok(said) => {
            eprintln!("{said}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

/// A folder of its own for one test, deleted afterwards.
#[cfg(test)]
struct Folder(std::path::PathBuf);

#[cfg(test)]
impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("antefix-xtask-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.0.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

#[cfg(test)]
impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
