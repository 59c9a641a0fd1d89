//! `cargo xtask docs`: the pages that are made from the code.

use std::{path::Path, process::Command};

/// Tests that compare committed pages with what the code says, and write them instead when they are told to.
const WRITERS: [(&str, &str); 2] = [("antefix-papers", "pages"), ("antefix-papers", "combinations")];

/// Writes `docs/methods/`.
pub(crate) fn run(root: &Path) -> Result<String, String> {
    for (package, test) in WRITERS {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .args(["test", "--release", "--package", package, "--test", test])
            .env("ANTEFIX_WRITE_PAGES", "1")
            .current_dir(root);
        let status = cargo.status().map_err(|error| format!("`cargo test`: {error}"))?;
        if !status.success() {
            return Err(format!("{package}, {test}: the pages are not written"));
        }
    }
    Ok("docs/methods/ is written".to_owned())
}
