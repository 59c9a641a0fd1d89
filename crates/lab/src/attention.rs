//! What every head reads of a text, in a few figures.

use std::collections::BTreeMap;
use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Positions, Probe, Sources};
use antefix_attention::readout::{Group, HeadReading, Reads};
use antefix_engine::Session;
use antefix_papers::act::sinks::Rule;
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
    /// Keys other than the first that are sinks by the rule of paper `act`, ascending.
    pub hidden: Vec<TopKey>,
}

impl HeadSummary {
    /// Sum of the mean weights of its hidden sinks.
    pub fn hidden_mass(&self) -> f64 {
        self.hidden.iter().map(|k| k.mean).sum()
    }
}

/// Hidden sinks of all heads together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SinkMap {
    /// Heads looked at.
    pub heads: usize,
    /// Heads with at least one hidden sink.
    pub with_hidden_sinks: usize,
    /// Texts of the sinks and how many heads have each, most first.
    pub texts: Vec<(String, usize)>,
}

impl SinkMap {
    /// Counts the hidden sinks of `all`, naming the `top` most frequent texts.
    pub fn new(all: &[HeadSummary], top: usize) -> Self {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for key in all.iter().flat_map(|s| &s.hidden) {
            *counts.entry(&key.text).or_default() += 1;
        }
        let mut texts: Vec<(String, usize)> = counts.into_iter().map(|(t, n)| (t.to_string(), n)).collect();
        texts.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        texts.truncate(top);
        Self {
            heads: all.len(),
            with_hidden_sinks: all.iter().filter(|s| !s.hidden.is_empty()).count(),
            texts,
        }
    }
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
    let (mut keys, mut hidden) = (Vec::new(), Vec::new());
    if let Some(columns) = &reading.columns {
        let means = columns.means();
        let key = |pos: usize| TopKey {
            pos,
            text: subject.tokenizer.decode(&tokens[pos..=pos]),
            mean: means[pos],
        };
        let window = subject.model.spec().layer_kinds[reading.layer].window;
        let sinks = Rule::PAPER.sinks(columns, reading.rows.len(), window);
        hidden.extend(sinks.into_iter().map(|pos| key(pos as usize)));
        let mut order: Vec<usize> = (0..means.len())
            .filter(|&t| columns.seen[t] >= MIN_ROWS)
            .collect();
        order.sort_by(|&a, &b| means[b].total_cmp(&means[a]).then(a.cmp(&b)));
        keys.extend(order.into_iter().take(top).map(key));
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
        hidden,
    }
}

#[cfg(test)]
mod tests {
    use antefix_conformance::tiny;
    use antefix_kernels::cpu::Cpu;
    use antefix_models::spec::Arch;

    use super::*;

    #[test]
    fn hidden_sinks_are_the_keys_of_much_mean_weight_but_for_the_first() {
        let (model, tokenizer) = tiny(Arch::Gemma3, Cpu::best(), 1);
        let subject = Subject {
            model,
            tokenizer,
            name: "tiny".into(),
            sha256: String::new(),
        };
        let tokens: Vec<u32> = (0..90).map(|i| (i * 37 + 11) % 250).collect();
        let all = summaries(&subject, &tokens, None, None, tokens.len()).unwrap();
        let mut found = 0;
        for s in &all {
            let window = subject.model.spec().layer_kinds[s.layer].window;
            let rows = window.map_or(tokens.len(), |w| tokens.len().min(w as usize));
            let mut want: Vec<usize> = s
                .top
                .iter()
                .filter(|k| k.mean > 5.0 / rows as f64)
                .map(|k| k.pos)
                .collect();
            want.retain(|&pos| pos != 0);
            want.sort_unstable();
            assert_eq!(s.hidden.iter().map(|k| k.pos).collect::<Vec<_>>(), want);
            found += want.len();
        }
        let map = SinkMap::new(&all, usize::MAX);
        assert_eq!(map.heads, all.len());
        assert_eq!(map.texts.iter().map(|t| t.1).sum::<usize>(), found);
    }

    #[test]
    fn a_map_counts_heads_and_texts() {
        let key = |text: &str| TopKey {
            pos: 1,
            text: text.into(),
            mean: 0.25,
        };
        let head = |hidden: Vec<TopKey>| HeadSummary {
            layer: 0,
            head: 0,
            rows: 9,
            sink: 0.0,
            window: 0.0,
            entropy: 0.0,
            distance: 0.0,
            top: Vec::new(),
            hidden,
        };
        let all = [
            head(vec![key("."), key("\n")]),
            head(Vec::new()),
            head(vec![key("\n")]),
        ];
        assert!((all[0].hidden_mass() - 0.5).abs() < 1e-12);
        let map = SinkMap::new(&all, 1);
        assert_eq!((map.heads, map.with_hidden_sinks), (3, 2));
        assert_eq!(map.texts, [("\n".to_string(), 2)]);
    }
}
