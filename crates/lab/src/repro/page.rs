//! `docs/reproductions.md`, made from the lines of earlier runs.

use std::fmt::Write;

use antefix_papers::repro::Claim;

use super::Line;

/// Lines out of JSON lines.
///
/// # Errors
/// In words, with the number of the line that is none.
pub fn read(text: &str) -> Result<Vec<Line>, String> {
    text.lines()
        .enumerate()
        .map(|(i, line)| serde_json::from_str(line).map_err(|e| format!("line {}: {e}", i + 1)))
        .collect()
}

/// Puts `line` in the place of the one of the same reproduction, model and length of run; sorted.
pub fn replace(lines: &mut Vec<Line>, line: Line) {
    let key = |l: &Line| (l.slug.clone(), l.model.clone(), l.fast);
    lines.retain(|l| key(l) != key(&line));
    lines.push(line);
    lines.sort_by_key(key);
}

/// Four significant digits.
fn figure(x: Option<f64>) -> String {
    match x {
        None => "-".into(),
        Some(x) if x == 0.0 || x.abs() >= 1000.0 => format!("{x:.0}"),
        Some(x) => {
            let digits = (3.0 - x.abs().log10().floor()).clamp(0.0, 6.0) as usize;
            format!("{x:.digits$}")
        }
    }
}

/// The page: every claim with its rule and its figures.
pub fn page(claims: &[Claim], lines: &[Line]) -> String {
    let mut page = String::from(
        "# Reproductions\n\n\
         What papers claim, measured again on small models. A verdict follows from the figures by the rule that stands above them. Short runs \
         (`--fast`) have few samples and short texts: read them as a check that the experiment works. Prompts under planners are real text: this \
         repository's own pages, as they are in the program that measures (`--prose FILE`: another text). This page is written by\n\n\
         ```sh\nantefix repro --all --fast --write-docs   # then `cargo xtask docs` for the pages of the methods\n```\n\n\
         out of `docs/reproductions.jsonl`, which keeps the last figures of every reproduction, model and length of run. CI runs three short ones end to \
         end (`tests/repro.sh`), and all of them on a tiny random model.\n",
    );
    for claim in claims {
        let _ = write!(
            page,
            "\n## {}\n\n**Claim.** {} *{}*\n\n**Rule.** {}\n\n",
            claim.slug, claim.says, claim.source, claim.rule
        );
        let mine: Vec<&Line> = lines.iter().filter(|l| l.slug == claim.slug).collect();
        let Some(first) = mine.first() else {
            page.push_str("Not run yet.\n");
            continue;
        };
        let unit = mine.iter().map(|l| &l.unit).find(|u| !u.is_empty());
        let _ = write!(
            page,
            "Figure: {}.\n\n| model | run | measured | baseline | verdict | why |\n|---|---|---|---|---|---|\n",
            unit.unwrap_or(&first.unit)
        );
        for l in mine {
            let run = match l.fast {
                true => "short",
                false => "full",
            };
            let _ = writeln!(
                page,
                "| {} | {run}: {} | {} | {} | **{}** | {} ({}, {:.0} s) |",
                l.model,
                l.scale,
                figure(l.measured),
                figure(l.baseline),
                l.verdict,
                l.why,
                l.machine,
                l.seconds
            );
        }
    }
    page
}
