//! Draws the rows of the example `sparse_density` of `antefix-attention`: speed over density, beside the ideal.
//!
//! `cargo run --release -p antefix-lab --example plot_density ROWS.jsonl OUT.svg`
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::error::Error;

use antefix_lab::plot::{Curve, curves};
use serde_json::Value;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(rows), Some(out)) = (args.next(), args.next()) else {
        return Err("usage: plot_density ROWS.jsonl OUT.svg".into());
    };
    let mut by_case: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for line in std::fs::read_to_string(rows)?.lines() {
        let row: Value = serde_json::from_str(line)?;
        let number = |name: &str| row[name].as_f64().ok_or(format!("no number `{name}` in {line}"));
        let text = |name: &str| row[name].as_str().unwrap_or("?");
        let case = format!("{}, {} keys, {}", text("shape"), row["n"], text("unit"));
        by_case
            .entry(case)
            .or_default()
            .push((100.0 * number("density")?, 100.0 * number("of_ideal")?));
    }
    let drawn: Vec<Curve> = by_case
        .into_iter()
        .map(|(name, mut points)| {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Curve { name, points }
        })
        .collect();
    let axes = ("kept pairs, %", "of the ideal speed, %");
    std::fs::write(
        out,
        curves("Sparse attention: efficiency by density", axes, &drawn)?,
    )?;
    Ok(())
}
