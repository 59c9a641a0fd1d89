//! Rows for people: a table for the terminal, one self-contained page with plots.

use std::fmt::Write;

use super::Row;
use crate::plot::{Curve, HeatMap, PlotError, curves, heat_map};

/// Columns of [`Row`] lined up for a terminal.
pub fn table(rows: &[Row]) -> String {
    let width = rows
        .iter()
        .map(|r| r.method.len())
        .max()
        .unwrap_or(0)
        .clamp(6, 48);
    let mut out = format!(
        "{:<15} {:<width$} {:>7} {:>6} {:>4} {:>9} {:>6} {:>8}\n",
        "task", "method", "length", "depth", "n", "accuracy", "kept", "ttft s"
    );
    for r in rows {
        let depth = r.depth.map_or_else(|| "-".to_string(), |d| format!("{d:.2}"));
        let _ = writeln!(
            out,
            "{:<15} {:<width$} {:>7} {depth:>6} {:>4} {:>9.3} {:>6.3} {:>8.3}",
            r.task, r.method, r.length, r.n, r.accuracy, r.kept, r.ttft_s
        );
    }
    out
}

fn distinct<T: PartialEq + Clone>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut out = Vec::new();
    for v in values {
        if !out.contains(&v) {
            out.push(v);
        }
    }
    out
}

/// Accuracy by length (curves) of every task, and by length and depth (a heat map per method) where depths were tried.
fn plots(rows: &[Row]) -> Result<Vec<String>, PlotError> {
    let mut out = Vec::new();
    let methods = distinct(rows.iter().map(|r| r.method.as_str()));
    for task in distinct(rows.iter().map(|r| r.task.as_str())) {
        let of = |method: &str| {
            rows.iter()
                .filter(move |r| r.task == task && r.method == method)
                .collect::<Vec<_>>()
        };
        let by_length: Vec<Curve> = methods
            .iter()
            .map(|method| {
                let cells = of(method);
                let mut lengths = distinct(cells.iter().map(|r| r.length));
                lengths.sort_unstable();
                let mean = |length: usize| {
                    let here: Vec<f64> = cells
                        .iter()
                        .filter(|r| r.length == length)
                        .map(|r| r.accuracy)
                        .collect();
                    here.iter().sum::<f64>() / here.len().max(1) as f64
                };
                Curve {
                    name: (*method).to_string(),
                    points: lengths.into_iter().map(|l| (l as f64, mean(l))).collect(),
                }
            })
            .filter(|c| !c.points.is_empty())
            .collect();
        out.push(curves(task, ("tokens", "accuracy"), &by_length)?);
        for method in &methods {
            let cells = of(method);
            let mut depths = distinct(cells.iter().filter_map(|r| r.depth));
            if depths.len() < 2 {
                continue;
            }
            depths.sort_by(f64::total_cmp);
            let mut lengths = distinct(cells.iter().map(|r| r.length));
            lengths.sort_unstable();
            let value = |depth: f64, length: usize| {
                let cell = cells
                    .iter()
                    .find(|r| r.depth == Some(depth) && r.length == length);
                cell.map_or(f64::NAN, |r| r.accuracy)
            };
            let values: Vec<f64> = depths
                .iter()
                .flat_map(|&d| lengths.iter().map(move |&l| (d, l)))
                .map(|(d, l)| value(d, l))
                .collect();
            out.push(heat_map(&HeatMap {
                title: &format!("{task}: {method}"),
                axes: ("tokens", "depth"),
                columns: &lengths.iter().map(ToString::to_string).collect::<Vec<_>>(),
                rows: &depths.iter().map(|d| format!("{d:.2}")).collect::<Vec<_>>(),
                values: &values,
                range: (0.0, 1.0),
            })?);
        }
    }
    Ok(out)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// One page with table and plots that needs nothing else. `about` says what was run, line by line.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn html(title: &str, about: &[String], rows: &[Row]) -> Result<String, PlotError> {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title>\n<style>\
         body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}\
         table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}}\
         td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){{text-align:left}}svg{{max-width:100%;height:auto;margin:.5rem 0}}\
         </style></head><body>\n<h1>{0}</h1>\n",
        escaped(title)
    );
    for line in about {
        let _ = writeln!(page, "<p>{}</p>", escaped(line));
    }
    page.push_str("<table><tr><th>task</th><th>method</th><th>tokens</th><th>depth</th><th>n</th><th>accuracy</th><th>kept</th><th>TTFT, s</th></tr>\n");
    for r in rows {
        let depth = r.depth.map_or_else(String::new, |d| format!("{d:.2}"));
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{depth}</td><td>{}</td><td>{:.3}</td><td>{:.3}</td><td>{:.3}</td></tr>",
            escaped(&r.task),
            escaped(&r.method),
            r.length,
            r.n,
            r.accuracy,
            r.kept,
            r.ttft_s
        );
    }
    page.push_str("</table>\n");
    for svg in plots(rows)? {
        let _ = writeln!(page, "<figure>{svg}</figure>");
    }
    page.push_str("</body></html>\n");
    Ok(page)
}
