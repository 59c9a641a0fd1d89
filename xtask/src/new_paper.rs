//! `cargo xtask new-paper SLUG`: a folder for a paper, from the template.

use std::{fs, path::Path};

/// Where `lib.rs` of the papers lists its modules.
const FIRST: &str = "// papers: first";
const LAST: &str = "// papers: last";

/// Makes `crates/papers/src/SLUG/` and its line in `lib.rs`.
pub(crate) fn run(root: &Path, slug: &str) -> Result<String, String> {
    let plain = slug.starts_with(|c: char| c.is_ascii_lowercase())
        && slug
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !plain {
        return Err(format!(
            "`{slug}` is no name for a module\nhint: small letters, digits and `_`, such as `flex_prefill`"
        ));
    }
    let papers = root.join("crates/papers");
    let folder = papers.join("src").join(slug);
    if folder.exists() {
        return Err(format!(
            "{}: exists already\nhint: choose another name",
            folder.display()
        ));
    }
    let list = papers.join("src/lib.rs");
    let lib = fs::read_to_string(&list).map_err(|error| format!("{}: {error}", list.display()))?;
    // Before anything is written, so that a refusal leaves nothing behind.
    let lib = with_module(&lib, slug).map_err(|what| format!("{}: {what}", list.display()))?;
    copy(&papers.join("_template"), &folder, slug)?;
    fs::write(&list, lib).map_err(|error| format!("{}: {error}", list.display()))?;
    Ok(format!(
        "{}: made; write the headings of `mod.rs`, then `reference.rs`",
        folder.display()
    ))
}

fn copy(from: &Path, to: &Path, slug: &str) -> Result<(), String> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| format!("{path}: {error}")
    };
    fs::create_dir_all(to).map_err(failed(to))?;
    for entry in fs::read_dir(from).map_err(failed(from))? {
        let entry = entry.map_err(failed(from))?;
        let text = fs::read_to_string(entry.path()).map_err(failed(&entry.path()))?;
        let file = to.join(entry.file_name());
        fs::write(&file, text.replace("{{slug}}", slug)).map_err(failed(&file))?;
    }
    Ok(())
}

/// `lib` with `pub mod slug;` between the markers, in alphabetical order.
fn with_module(lib: &str, slug: &str) -> Result<String, String> {
    let missing = || format!("the markers `{FIRST}` and `{LAST}` are missing");
    let (head, rest) = lib.split_once(FIRST).ok_or_else(missing)?;
    let (list, tail) = rest.split_once(LAST).ok_or_else(missing)?;
    let line = format!("pub mod {slug};");
    let mut lines: Vec<&str> = list
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.contains(&line.as_str()) {
        return Err(format!("`{slug}` is listed already"));
    }
    lines.push(&line);
    lines.sort_unstable();
    Ok(format!("{head}{FIRST}\n{}\n{LAST}{tail}", lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Folder;

    fn papers(test: &str) -> Folder {
        let real = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/papers/_template");
        let folder = Folder::new(test);
        folder.write(
            "crates/papers/src/lib.rs",
            &format!("//! Papers.\n\n{FIRST}\n{LAST}\n\npub const N: u8 = 0;\n"),
        );
        for entry in fs::read_dir(real).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            folder.write(
                &format!("crates/papers/_template/{name}"),
                &fs::read_to_string(entry.path()).unwrap(),
            );
        }
        folder
    }

    #[test]
    fn a_paper_gets_its_folder_and_its_line() {
        let folder = papers("paper");
        run(&folder.0, "zeta").unwrap();
        run(&folder.0, "alpha_2").unwrap();
        let lib = fs::read_to_string(folder.0.join("crates/papers/src/lib.rs")).unwrap();
        assert_eq!(
            lib,
            format!(
                "//! Papers.\n\n{FIRST}\npub mod alpha_2;\npub mod zeta;\n{LAST}\n\npub const N: u8 = 0;\n"
            )
        );
        let text = fs::read_to_string(folder.0.join("crates/papers/src/zeta/mod.rs")).unwrap();
        assert!(text.contains("zeta") && !text.contains("{{slug}}"));
        let headings: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("//! # "))
            .collect();
        let fixed = [
            "What it does",
            "When it helps",
            "Steps",
            "Knobs",
            "Cost",
            "Differences from the paper",
            "References",
        ];
        assert_eq!(headings, fixed);
        for file in ["reference.rs", "repro.rs", "tests.rs"] {
            assert!(folder.0.join("crates/papers/src/zeta").join(file).exists());
        }
    }

    #[test]
    fn wrong_names_and_second_tries_change_nothing() {
        let folder = papers("refused");
        for wrong in ["", "../x", "Zeta", "_template", "a-b", "2d"] {
            assert!(run(&folder.0, wrong).unwrap_err().contains("hint: "), "{wrong}");
        }
        run(&folder.0, "zeta").unwrap();
        assert!(run(&folder.0, "zeta").unwrap_err().contains("exists already"));
        folder.write("crates/papers/src/lib.rs", "//! No markers.\n");
        assert!(run(&folder.0, "eta").unwrap_err().contains("markers"));
        assert!(!folder.0.join("crates/papers/src/eta").exists());
    }
}
