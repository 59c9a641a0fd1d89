//! `cargo xtask new-paper SLUG`: a folder for a paper, from the template.

use std::{fs, path::Path};

/// Where `lib.rs` of the papers lists its modules, where its methods, and where its reproductions.
const MODULES: [&str; 2] = ["// papers: first", "// papers: last"];
const METHODS: [&str; 2] = ["// methods: first", "// methods: last"];
const REPROS: [&str; 2] = ["// repros: first", "// repros: last"];

/// Makes `crates/papers/src/SLUG/` and its three lines in `lib.rs`: the module, the method in `ALL`, and the claim in `REPROS`.
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
    let lib = with_line(&lib, MODULES, &format!("pub mod {slug};"))
        .and_then(|lib| with_line(&lib, METHODS, &format!("&{slug}::{},", type_name(slug))))
        .and_then(|lib| with_line(&lib, REPROS, &format!("&{slug}::repro::REPRO,")))
        .map_err(|what| format!("{}: {what}", list.display()))?;
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
        let text = text
            .replace("{{slug}}", slug)
            .replace("{{Type}}", &type_name(slug));
        fs::write(&file, text).map_err(failed(&file))?;
    }
    Ok(())
}

/// `flex_prefill` as a type: `FlexPrefill`.
fn type_name(slug: &str) -> String {
    let capital = |word: &str| {
        let (first, rest) = word.split_at(word.len().min(1));
        first.to_ascii_uppercase() + rest
    };
    slug.split('_').map(capital).collect()
}

/// `lib` with `line` between two markers, in alphabetical order, indented as the markers are.
fn with_line(lib: &str, [first, last]: [&str; 2], line: &str) -> Result<String, String> {
    let missing = || format!("the markers `{first}` and `{last}` are missing");
    let (head, rest) = lib.split_once(first).ok_or_else(missing)?;
    let (list, tail) = rest.split_once(last).ok_or_else(missing)?;
    let indent = &head[head.rfind('\n').map_or(0, |at| at + 1)..];
    let mut lines: Vec<&str> = list
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.contains(&line) {
        return Err(format!("`{line}` is listed already"));
    }
    lines.push(line);
    lines.sort_unstable();
    let lines: String = lines.iter().flat_map(|line| [indent, line, "\n"]).collect();
    Ok(format!("{head}{first}\n{lines}{indent}{last}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Folder;

    fn lib(modules: &str, methods: &str, repros: &str) -> String {
        let ([a, b], [c, d], [e, f]) = (MODULES, METHODS, REPROS);
        format!(
            "//! Papers.\n\n{a}\n{modules}{b}\n\npub const ALL: &[M] = &[\n    {c}\n{methods}    {d}\n];\n\
             pub const REPROS: &[R] = &[\n    {e}\n{repros}    {f}\n];\n"
        )
    }

    fn papers(test: &str) -> Folder {
        let real = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/papers/_template");
        let folder = Folder::new(test);
        folder.write("crates/papers/src/lib.rs", &lib("", "", ""));
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
        let written = fs::read_to_string(folder.0.join("crates/papers/src/lib.rs")).unwrap();
        let want = lib(
            "pub mod alpha_2;\npub mod zeta;\n",
            "    &alpha_2::Alpha2,\n    &zeta::Zeta,\n",
            "    &alpha_2::repro::REPRO,\n    &zeta::repro::REPRO,\n",
        );
        assert_eq!(written, want);
        let text = fs::read_to_string(folder.0.join("crates/papers/src/zeta/mod.rs")).unwrap();
        assert!(text.contains("pub struct Zeta;") && text.contains("zeta") && !text.contains("{{"));
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
