//! Cards as JSON and as Markdown.

use std::fmt::Write;

use serde_json::{Value, json};

use super::card::{Axis, Card, Preset};
use super::{Kind, Method};

/// Headings that the module documentation of every method has, in this order.
pub const HEADINGS: [&str; 7] = [
    "What it does",
    "When it helps",
    "Steps",
    "Knobs",
    "Cost",
    "Differences from the paper",
    "References",
];

fn preset_json(preset: Preset) -> Value {
    match preset {
        Preset::Int(x) => json!(x),
        Preset::Float(x) => json!(x),
        Preset::Bool(x) => json!(x),
        Preset::Text(x) => json!(x),
    }
}

/// A card as one object: what `antefix methods --json` and `/v1/methods` give.
pub fn card_json(card: &Card) -> Value {
    let knobs: Vec<Value> = card
        .knobs
        .iter()
        .map(|k| {
            let mut knob = json!({
                "name": k.name,
                "kind": k.kind.name(),
                "range": k.kind.range(),
                "default": preset_json(k.default),
                "unit": k.unit,
                "help": k.help,
                "source": k.source,
            });
            match k.kind {
                Kind::Int { min, max } => {
                    knob["min"] = json!(min);
                    knob["max"] = json!(max);
                }
                Kind::Choice(words) => knob["values"] = json!(words),
                _ => {}
            }
            knob
        })
        .collect();
    json!({
        "name": card.name,
        "axis": card.axis.name(),
        "title": card.title,
        "exact": card.exact,
        "summary": card.summary,
        "query_dependent": card.query_dependent,
        "knobs": knobs,
        "paper": {
            "title": card.paper.title,
            "authors": card.paper.authors,
            "year": card.paper.year,
            "reference": card.paper.reference,
        },
    })
}

/// The page of a method: its card, and the module documentation of its source file `source`.
///
/// # Errors
/// When the module documentation lacks a heading, has them in another order, or still is the template's.
pub fn page(card: &Card, source: &str) -> Result<String, String> {
    let doc: Vec<&str> = source
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .collect();
    let fault = |what: &str| format!("{}: {what}", card.source);
    let found: Vec<&str> = doc.iter().filter_map(|line| line.strip_prefix("# ")).collect();
    if found != HEADINGS {
        return Err(fault(&format!(
            "the headings are {found:?}, they must be {HEADINGS:?}"
        )));
    }
    if doc
        .iter()
        .any(|line| line.contains("one sentence that says what the method changes"))
    {
        return Err(fault("the module documentation is still the template's"));
    }
    let mut page = format!("# {} (`{}`)\n\n{}\n\n", card.title, card.name, card.summary);
    let _ = writeln!(page, "| | |\n|---|---|");
    let _ = writeln!(page, "| axis | `{}` |", card.axis);
    let _ = writeln!(
        page,
        "| exact | {} |",
        if card.exact { "yes, bit for bit" } else { "no" }
    );
    let _ = writeln!(
        page,
        "| depends on the question | {} |",
        if card.query_dependent { "yes" } else { "no" }
    );
    let paper = &card.paper;
    let _ = writeln!(
        page,
        "| paper | {}: {}, {}, {} |",
        paper.authors, paper.title, paper.year, paper.reference
    );
    if let Some(neutral) = card.neutral {
        let _ = writeln!(page, "| changes nothing with | `{neutral}` |");
    }
    let _ = writeln!(page);
    for line in doc.into_iter().skip_while(|line| !line.starts_with("# ")) {
        match line.strip_prefix("# ") {
            Some("Knobs") => {
                let _ = writeln!(page, "## Knobs\n\n{}", knob_table(card));
            }
            Some(heading) => {
                let _ = writeln!(page, "## {heading}");
            }
            None => {
                let _ = writeln!(page, "{line}");
            }
        }
    }
    Ok(page)
}

fn knob_table(card: &Card) -> String {
    if card.knobs.is_empty() {
        return "None.".into();
    }
    let mut table =
        String::from("| knob | values | default | what it does | default from |\n|---|---|---|---|---|\n");
    for k in card.knobs {
        let unit = if k.unit.is_empty() {
            String::new()
        } else {
            format!(" {}", k.unit)
        };
        let default = k.default.to_string();
        let default = if default.is_empty() {
            "none".into()
        } else {
            format!("`{default}`")
        };
        let _ = writeln!(
            table,
            "| `{}` | {}{unit} | {default} | {} | {} |",
            k.name,
            k.kind.range(),
            k.help,
            k.source
        );
    }
    table
}

/// The list of all methods, by axis, of what `always` runs, and of what is `trained`.
pub fn index(methods: &[&dyn Method], always: &[&Card], trained: &[&Card]) -> String {
    let mut page = String::from(
        "# Methods\n\nA request chooses at most one method on each axis: `--method NAME[,knob=value...]` on the command line, \
         `\"antefix\": {\"AXIS\": \"NAME,knob=value\"}` over HTTP.\n",
    );
    for axis in Axis::ALL {
        let on_it = methods.iter().map(|m| m.card()).filter(|c| c.axis == axis);
        section(&mut page, axis.name(), "", &on_it.collect::<Vec<_>>());
    }
    let text = "How the engine computes whatever was asked for. There is nothing to choose.\n\n";
    section(&mut page, "Always", text, always);
    let text = "What `antefix train` and its kin run, beside those above that are trained, too. No request chooses it.\n\n";
    section(&mut page, "Trained", text, trained);
    page
}

/// Nothing without cards.
fn section(page: &mut String, heading: &str, text: &str, cards: &[&Card]) {
    if cards.is_empty() {
        return;
    }
    let _ = writeln!(
        page,
        "\n## {heading}\n\n{text}| method | what it does | exact | paper |\n|---|---|---|---|"
    );
    cards.iter().for_each(|c| line(page, c));
}

fn line(page: &mut String, c: &Card) {
    let exact = if c.exact { "yes" } else { "no" };
    let _ = writeln!(
        page,
        "| [{}]({}.md) | {} | {exact} | {}, {} |",
        c.name, c.name, c.summary, c.paper.reference, c.paper.year
    );
}
