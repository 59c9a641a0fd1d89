//! `cargo xtask tidy`: invariants of ARCHITECTURE.md that no compiler checks.

use std::{fs, path::Path, process::Command};

/// Registries are reached through their own clients, so their hosts are written nowhere.
const HOSTS: [&str; 7] = [
    concat!("pypi", ".org"),
    concat!("python", "hosted.org"),
    concat!("crates", ".io/"),
    concat!("index.crates", ".io"),
    concat!("static.crates", ".io"),
    concat!("npmjs", ".org"),
    concat!("deb.debian", ".org"),
];
/// The hub's host may be named for people to follow, not in code.
const HUB: &str = concat!("hugging", "face.co");

/// Checks the tracked files of the repository at `root`.
pub(crate) fn run(root: &Path) -> Result<String, String> {
    let list = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output();
    let list = list.map_err(|error| format!("`git ls-files`: {error}"))?;
    if !list.status.success() {
        return Err(format!(
            "`git ls-files` failed: {}",
            String::from_utf8_lossy(&list.stderr).trim()
        ));
    }
    let list = String::from_utf8_lossy(&list.stdout);
    let files: Vec<&str> = list.split('\0').filter(|file| !file.is_empty()).collect();
    let findings = check(root, &files);
    if findings.is_empty() {
        Ok(format!("tidy: {} files are in order", files.len()))
    } else {
        Err(findings.join("\n"))
    }
}

/// What is wrong with `files`, paths relative to `root` with `/` between folders.
fn check(root: &Path, files: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for &file in files {
        // A file that is deleted but still tracked, a folder behind a link, or no text: nothing to check.
        let Ok(text) = fs::read_to_string(root.join(file)) else {
            continue;
        };
        if text.contains('\0') {
            continue;
        }
        if !text.is_empty() && !text.ends_with('\n') {
            found.push(format!("{file}: does not end with a newline"));
        }
        if !file.ends_with("Cargo.lock") {
            hosts(file, &text, &mut found);
        }
        if ends(file, "rs") && !file.starts_with("crates/kernels/") && file != "crates/models/src/map.rs" {
            for line in unsafe_lines(&text) {
                found.push(format!(
                    "{file}:{line}: `unsafe` belongs in crates/kernels and crates/models/src/map.rs"
                ));
            }
        }
        if file.ends_with("Cargo.toml") {
            found.extend(lints(file, &text).map(|what| format!("{file}: {what}")));
        }
        match file {
            "crates/state/Cargo.toml" => {
                for name in dependencies(&text, "dependencies") {
                    found.push(format!("{file}: `{name}`: state has no dependencies"));
                }
            }
            "crates/papers/Cargo.toml" => {
                let engine = |kind| {
                    dependencies(&text, kind)
                        .iter()
                        .any(|name| name == "antefix-engine")
                };
                if ["dependencies", "dev-dependencies", "build-dependencies"]
                    .into_iter()
                    .any(engine)
                {
                    found.push(format!("{file}: papers do not know the engine"));
                }
            }
            _ => {}
        }
    }
    found
}

fn ends(file: &str, end: &str) -> bool {
    Path::new(file).extension().is_some_and(|e| e == end)
}

fn hosts(file: &str, text: &str, found: &mut Vec<String>) {
    for (index, line) in text.lines().enumerate() {
        let hub = (!ends(file, "md")).then_some(HUB);
        for host in HOSTS.into_iter().chain(hub).filter(|host| line.contains(host)) {
            found.push(format!("{file}:{}: names the host `{host}`", index + 1));
        }
    }
}

/// Names in the tables of one kind of dependency, those of one target included.
fn dependencies(toml: &str, kind: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut inside = false;
    for line in toml.lines().map(str::trim) {
        if let Some(table) = line.strip_prefix('[') {
            let table = table.trim_end_matches(']');
            let table = table
                .strip_prefix("target.")
                .and_then(|t| t.rsplit_once(").").or(t.split_once('.')))
                .map_or(table, |t| t.1);
            let table = table.trim_start_matches(['\'', '"', '.']);
            inside = table == kind;
            // `[dependencies.name]`
            if let Some(name) = table.strip_prefix(kind).and_then(|rest| rest.strip_prefix('.')) {
                names.push(name.to_owned());
            }
        } else if inside && !line.is_empty() && !line.starts_with('#') {
            names.extend(line.split(['=', '.', ' ']).next().map(str::to_owned));
        }
    }
    names
}

/// What is wrong with a manifest's lints: the workspace denies `unsafe_code`, every crate takes its lints from there. `fuzz/` is a
/// workspace of its own.
fn lints(file: &str, text: &str) -> Option<&'static str> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let has = |pair: [&str; 2]| lines.windows(2).any(|two| two == pair);
    match file {
        "Cargo.toml" if !lines.contains(&r#"unsafe_code = "deny""#) => {
            Some("the lints of the workspace do not deny `unsafe_code`")
        }
        "Cargo.toml" | "fuzz/Cargo.toml" => None,
        _ if !has(["[lints]", "workspace = true"]) => Some("does not take its lints from the workspace"),
        _ => None,
    }
}

/// Numbers of the lines with the keyword, or with the lint that an attribute may allow, outside comments and literals.
fn unsafe_lines(text: &str) -> Vec<usize> {
    let code = code_of(text);
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let has = |line: &str| {
        line.split(|c| !word(c))
            .any(|w| w == "unsafe" || w == "unsafe_code")
    };
    code.lines()
        .enumerate()
        .filter(|(_, line)| has(line))
        .map(|(index, _)| index + 1)
        .collect()
}

/// `text` without comments and string literals; line breaks stay.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let in_word = code.ends_with(|c: char| c.is_alphanumeric() || c == '_') && !code.ends_with('b');
        if let Some(n) = silent(rest, in_word) {
            code.extend(rest[..n].chars().filter(|&c| c == '\n'));
            rest = &rest[n..];
        } else {
            code.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    code
}

/// Bytes of the comment or literal that `rest` starts with, if it does.
fn silent(rest: &str, in_word: bool) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(rest.find("*/").map_or(rest.len(), |n| n + 2));
    }
    if let Some(literal) = ["'\"'", "'\\\"'"]
        .into_iter()
        .find(|quote| rest.starts_with(quote))
    {
        return Some(literal.len());
    }
    let raw = rest
        .strip_prefix('r')
        .filter(|_| !in_word)
        .map(|r| r.trim_start_matches('#'));
    if let Some(body) = raw.and_then(|r| r.strip_prefix('"')) {
        let open = rest.len() - body.len();
        // `r`, the hashes, the quote: the end has as many hashes.
        let close = format!("\"{}", "#".repeat(open - 2));
        return Some(body.find(&close).map_or(rest.len(), |n| open + n + close.len()));
    }
    let body = rest.strip_prefix('"')?;
    let mut escaped = false;
    let end = body.find(|c| {
        let here = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        here
    });
    Some(end.map_or(rest.len(), |n| n + 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Folder;

    /// Findings in one file with this path and text.
    fn one(test: &str, file: &str, text: &str) -> Vec<String> {
        let folder = Folder::new(test);
        folder.write(file, text);
        check(&folder.0, &[file])
    }

    #[test]
    fn unsafe_is_found_where_it_does_not_belong() {
        let text = "//! unsafe\n/* unsafe\n */ const A: &str = \"\\\" unsafe\";\nconst B: &str = r#\"unsafe \" \"#;\nconst Q: char = '\"';\nfn f() { unsafe { g() } }\n#![allow(unsafe_code)]\n";
        assert_eq!(unsafe_lines(text), [6, 7]);
        assert_eq!(one("unsafe", "crates/kv/src/a.rs", text).len(), 2);
        assert_eq!(one("kernels", "crates/kernels/src/a.rs", text), [""; 0]);
        assert_eq!(one("map", "crates/models/src/map.rs", text), [""; 0]);
    }

    #[test]
    fn every_crate_takes_the_lints_of_the_workspace() {
        let whole = "[workspace.lints.rust]\nunsafe_code = \"deny\"\n";
        assert_eq!(one("lints-whole", "Cargo.toml", whole), [""; 0]);
        assert_eq!(
            one("lints-none", "Cargo.toml", &whole.replace("deny", "warn")).len(),
            1
        );
        let file = "crates/kv/Cargo.toml";
        assert_eq!(one("lints-crate", file, "[lints]\nworkspace = true\n"), [""; 0]);
        assert_eq!(
            one("lints-own", file, "[lints.rust]\nunsafe_code = \"allow\"\n").len(),
            1
        );
    }

    #[test]
    fn borders_between_crates_are_kept() {
        let one = |test: &str, file: &str, text: &str| {
            one(test, file, &format!("[lints]\nworkspace = true\n\n{text}"))
        };
        let file = "crates/state/Cargo.toml";
        assert_eq!(
            one(
                "state-dev",
                file,
                "[dependencies]\n# none\n\n[dev-dependencies]\nproptest = \"1\"\n"
            ),
            [""; 0]
        );
        for wrong in [
            "[dependencies]\nhalf.workspace = true\n",
            "[dependencies.half]\nversion = \"2\"\n",
            "[target.'cfg(unix)'.dependencies]\nlibc = \"0.2\"\n",
            "[target.x86_64-unknown-linux-gnu.dependencies]\nlibc = \"0.2\"\n",
        ] {
            assert_eq!(one("state", file, wrong).len(), 1, "{wrong}");
        }
        let file = "crates/papers/Cargo.toml";
        assert_eq!(
            one(
                "papers",
                file,
                "[dev-dependencies]\nantefix-engine.workspace = true\n"
            )
            .len(),
            1
        );
        assert_eq!(
            one(
                "papers-state",
                file,
                "[dependencies]\nantefix-state.workspace = true\n"
            ),
            [""; 0]
        );
    }

    #[test]
    fn files_end_with_a_newline() {
        assert_eq!(one("newline", "docs/a.md", "text").len(), 1);
        assert_eq!(one("empty", "docs/a.md", ""), [""; 0]);
        assert_eq!(one("binary", "docs/a.bin", "a\0b"), [""; 0]);
    }

    #[test]
    fn hosts_of_registries_are_found() {
        for host in HOSTS {
            assert!(
                !one("host", "docs/a.md", &format!("see {host}\n")).is_empty(),
                "{host}"
            );
        }
        assert_eq!(one("lock", "Cargo.lock", &format!("x{}\n", HOSTS[0])), [""; 0]);
        assert_eq!(one("hub-doc", "docs/a.md", &format!("{HUB}\n")), [""; 0]);
        assert_eq!(
            one("hub-code", "crates/x/src/a.rs", &format!("// {HUB}\n")).len(),
            1
        );
    }
}
