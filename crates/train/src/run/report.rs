//! One self-contained page a run: its recipe, its curves, its last figures.

use std::path::Path;

use antefix_lab::plot::{Curve, curves};
use serde_json::Value;

use crate::error::TrainError;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// `(step, value)` of each line of kind `kind` that has `key`, and whose name is `name` if one is given.
fn points(lines: &[Value], kind: &str, name: Option<&str>, key: &str) -> Vec<(f64, f64)> {
    lines
        .iter()
        .filter(|l| l["t"] == kind && name.is_none_or(|n| l["name"] == n))
        .filter_map(|l| Some((l["step"].as_f64()?, l[key].as_f64()?)))
        .collect()
}

/// Writes `report.html` and the curves as SVG into the run's folder, out of `metrics.jsonl`.
pub(super) fn write(run: &Path) -> Result<(), TrainError> {
    let metrics = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&metrics).map_err(TrainError::io(&metrics))?;
    let lines: Vec<Value> = text
        .lines()
        .filter_map(|l| serde_json::from_str(l).ok())
        .collect();
    let mut names: Vec<&str> = lines
        .iter()
        .filter(|l| l["t"] == "eval")
        .filter_map(|l| l["name"].as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    let mut charts = vec![("loss".to_string(), points(&lines, "step", None, "loss"))];
    charts.push(("reward".into(), points(&lines, "step", None, "reward")));
    charts.push(("reward margin".into(), points(&lines, "step", None, "margin")));
    charts.push(("tokens a second".into(), points(&lines, "step", None, "tok_s")));
    for name in names {
        charts.push((
            format!("held out: {name}"),
            points(&lines, "eval", Some(name), "value"),
        ));
    }
    let mut body = String::new();
    for (title, points) in charts.into_iter().filter(|(_, p)| p.len() > 1) {
        let curve = Curve {
            name: title.clone(),
            points,
        };
        let svg =
            curves(&title, ("step", &title), &[curve]).map_err(|e| TrainError::file(run, e.to_string()))?;
        let file = run.join(format!("{}.svg", title.replace([' ', ':'], "-")));
        std::fs::write(&file, &svg).map_err(TrainError::io(&file))?;
        body += &svg;
    }
    let recipe = std::fs::read_to_string(run.join("recipe.toml")).unwrap_or_default();
    let last = lines
        .iter()
        .rev()
        .find(|l| l["t"] == "step")
        .map(Value::to_string)
        .unwrap_or_default();
    let page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
         <style>body{{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}}\
         svg{{width:100%;height:auto}}pre{{overflow:auto;background:#f4f4f4;padding:1rem}}</style>\
         <h1>{title}</h1>{body}<h2>Last step</h2><pre>{last}</pre><h2>Recipe</h2><pre>{recipe}</pre></html>\n",
        title = escape(&run.display().to_string()),
        last = escape(&last),
        recipe = escape(&recipe),
    );
    let file = run.join("report.html");
    std::fs::write(&file, page).map_err(TrainError::io(&file))
}
