//! What every head reads of a text, in a few figures.

use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Positions, Probe, Sources};
use antefix_attention::readout::{Group, HeadReading, Reads};
use antefix_engine::Session;
use serde::Serialize;

use crate::heads::{HeadsError, Subject};

/// Tokens at the start that count as sinks.
pub const SINKS: u32 = 4;
/// Tokens before the query, itself included, that count as its window.
pub const WINDOW: u32 = 32;
/// Bytes of readings at most: about a million rows.
const CAP: usize = 1 << 30;

/// Means over the rows of one head.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadSummary {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Query rows.
    pub rows: usize,
    /// Mass on the first [`SINKS`] tokens.
    pub sink: f64,
    /// Mass on the last [`WINDOW`] tokens.
    pub window: f64,
    /// Nats.
    pub entropy: f64,
    /// Tokens back.
    pub distance: f64,
    /// The keys with the largest mean weight over the rows that see them.
    pub top: Vec<TopKey>,
}

/// A key that a head reads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TopKey {
    /// Its position.
    pub pos: usize,
    /// Its text.
    pub text: String,
    /// Mean weight over the rows that see it.
    pub mean: f64,
}

/// Rows that must see a key before its mean says something.
const MIN_ROWS: u32 = 8;

/// Summaries of `heads` of `layers` (all where `None`) on `tokens`, with `top` keys each.
///
/// # Errors
/// When a layer or head does not exist or the model fails.
pub fn summaries(
    subject: &Subject,
    tokens: &[u32],
    layers: Option<Vec<usize>>,
    heads: Option<Vec<usize>>,
    top: usize,
) -> Result<Vec<HeadSummary>, HeadsError> {
    let spec = HookSpec {
        probes: vec![Probe {
            id: String::new(),
            layers,
            heads,
            positions: Positions::All,
            read: Reads {
                mass: vec![Group::Sinks(SINKS), Group::Window(WINDOW)],
                distance: Some(u32::MAX),
                columns: true,
                ..Reads::default()
            },
        }],
        ..HookSpec::default()
    };
    let plan = HookPlan::compile(&spec, subject.model.hook_shape(), &Sources::default())?;
    let observer = Arc::new(Observer::new(Arc::new(plan), tokens.len(), CAP));
    let mut session = Session::new(Arc::clone(&subject.model), tokens.len(), 512);
    session.observe(Some(Arc::clone(&observer)));
    session.feed(tokens, 0, &mut Vec::new())?;
    let readings = observer.take_readings().into_iter().flat_map(|p| p.1);
    let mut out: Vec<HeadSummary> = readings.map(|r| summary(subject, tokens, &r, top)).collect();
    out.sort_by_key(|s| (s.layer, s.head));
    Ok(out)
}

fn summary(subject: &Subject, tokens: &[u32], reading: &HeadReading, top: usize) -> HeadSummary {
    let mean = |f: &dyn Fn(&antefix_attention::readout::RowReading) -> f32| {
        reading.rows.iter().map(|r| f64::from(f(r))).sum::<f64>() / reading.rows.len().max(1) as f64
    };
    let mut keys: Vec<TopKey> = Vec::new();
    if let Some(columns) = &reading.columns {
        let means = columns.means();
        let mut order: Vec<usize> = (0..means.len())
            .filter(|&t| columns.seen[t] >= MIN_ROWS)
            .collect();
        order.sort_by(|&a, &b| means[b].total_cmp(&means[a]).then(a.cmp(&b)));
        keys.extend(order.into_iter().take(top).map(|pos| TopKey {
            pos,
            text: subject.tokenizer.decode(&tokens[pos..=pos]),
            mean: means[pos],
        }));
    }
    HeadSummary {
        layer: reading.layer,
        head: reading.head,
        rows: reading.rows.len(),
        sink: mean(&|r| r.mass.first().copied().unwrap_or(0.0)),
        window: mean(&|r| r.mass.get(1).copied().unwrap_or(0.0)),
        entropy: mean(&|r| r.entropy),
        distance: mean(&|r| r.distance.unwrap_or(0.0)),
        top: keys,
    }
}
