//! razor_attention: heads that retrieve keep everything; the others keep sinks, recent rows, and one row for all that went.
//!
//! # What it does
//! Only some KV heads look far back: induction heads, which find what followed an earlier copy of the current token, and echo heads, which
//! find the copy itself. They keep their whole cache. Every other head keeps `sinks` first rows, a buffer of recent rows and one
//! compensation row: the mean key and value of the dropped rows, weighted with their number.
//!
//! # When it helps
//! Long prompts and questions that are not known yet: what stays does not depend on the question, so it serves the next turn, too. Below
//! `buffer` rows nothing happens. Qwen2.5-Coder finds six of six needles in 16,000 tokens, asked for after the cut, with 21 % of the bytes
//! (`buffer=64,fraction=0.05`; docs/results.md); other models need other shares.
//!
//! # Steps
//! 1. (3.1) Induction and echo scores of every head on repeated random tokens: `antefix analyse heads --kind induction` and `--kind echo`.
//!    A KV head has the best score of its query heads; the best `induction` and `echo` shares of all KV heads are retrieval heads.
//! 2. (3.2) A head that is none keeps its first `sinks` rows and its last `max(buffer, n * fraction)`; the rows between become one row of
//!    log-weight `ln n` (`compensation=count`), one that counts once (`mean`), or nothing (`none`).
//! 3. (3.4) After every `every` tokens of the answer, again: what was folded before goes on with the same mean.
//!
//! # Knobs
//! `induction=1` makes every head a retrieval head: dense, bit for bit.
//!
//! # Cost
//! No score is computed for a request. Bytes: retrieval heads `n` rows, others `sinks + 1 + buffer`, allocated, not masked.
//!
//! # Differences from the paper
//! Its buffer is 4,000 rows at least, for prompts of tens of thousands; the default here suits 2K to 32K. One published implementation gives
//! the compensation row no weight and another applies the weight before the scale: both differ from the paper's equation, which is used here.
//! Small models have few KV heads, so shares are rounded and at least one head of each kind is kept. Layers with a window are left alone.
//!
//! # References
//! Tang et al., RazorAttention: efficient KV cache compression through retrieval heads, ICLR 2025, arXiv 2407.15891.

use std::num::NonZeroUsize;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, CachePolicy, Card, Fold, HeadEdit, Kind, Knob, Knobs, LayerEdit, LayerView, Method, Need, Paper,
    Preset, Rig, RigError, Sight,
};

use crate::heads::{self, KIND, profile_knob, ranking};

pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

/// The method.
pub struct RazorAttention;

static CARD: Card = Card {
    name: "razor_attention",
    title: "RazorAttention",
    axis: Axis::Kv,
    exact: false,
    summary: "Retrieval heads keep the whole cache, the others sinks, recent rows and one row for the rest.",
    paper: Paper {
        title: "RazorAttention: efficient KV cache compression through retrieval heads",
        authors: "Tang et al.",
        year: 2025,
        reference: "arXiv 2407.15891",
    },
    knobs: &[
        Knob {
            name: "induction",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.14),
            unit: "of all KV heads",
            help: "Share of heads kept for their induction score",
            source: "section 3.1",
        },
        Knob {
            name: "echo",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.01),
            unit: "of all KV heads",
            help: "Share of heads kept for their echo score",
            source: "section 3.1",
        },
        Knob {
            name: "sinks",
            kind: Kind::int(0, 4096),
            default: Preset::Int(4),
            unit: "rows",
            help: "First rows that every head keeps",
            source: "section 3.2",
        },
        Knob {
            name: "buffer",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(512),
            unit: "rows",
            help: "Recent rows that every head keeps at least",
            source: "ours; 4,000 in the paper",
        },
        Knob {
            name: "fraction",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.2),
            unit: "of the rows",
            help: "Recent rows as a share of the prompt, if that is more",
            source: "section 3.2: a fifth",
        },
        Knob {
            name: "compensation",
            kind: Kind::Choice(&["count", "mean", "none"]),
            default: Preset::Text("count"),
            unit: "",
            help: "What stands for the dropped rows: their mean with their number, their mean as one row, or nothing",
            source: "section 3.2",
        },
        Knob {
            name: "every",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(256),
            unit: "tokens",
            help: "Tokens of the answer after which rows are folded again",
            source: "ours",
        },
        profile_knob(
            "Profile of heads with the measurements induction and echo, from antefix analyse heads",
            "section 3.1",
        ),
    ],
    query_dependent: false,
    needs: &[Need::Profile(KIND)],
    neutral: Some("induction=1"),
    source: file!(),
};

impl Method for RazorAttention {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let facts = rig.facts();
        let profile = heads::load(knobs, rig, "induction")?;
        let mut retrieval = vec![vec![false; facts.kv_heads]; facts.layers.len()];
        let full: Vec<usize> = facts.full_layers().collect();
        for kind in ["induction", "echo"] {
            let score = profile.test(kind)?.of_kv_heads(facts.kv_heads);
            for (layer, head) in retrieval_heads(&score, &full, knobs.float(kind)) {
                retrieval[layer][head] = true;
            }
        }
        rig.set_cache_policy(Arc::new(Razor {
            retrieval,
            sinks: knobs.size("sinks"),
            buffer: knobs.size("buffer"),
            fraction: knobs.float("fraction"),
            fold: match knobs.text("compensation") {
                "count" => Fold::LnCount,
                "mean" => Fold::Mean,
                _ => Fold::Drop,
            },
            every: NonZeroUsize::new(knobs.size("every")),
        }))
    }
}

/// The best `share` of all KV heads of the layers `full`: rounded, at least one unless the share is 0, with everyone who ties with the last.
fn retrieval_heads(score: &[Vec<f32>], full: &[usize], share: f64) -> Vec<(usize, usize)> {
    let all: Vec<_> = ranking(score)
        .into_iter()
        .filter(|r| full.contains(&r.layer))
        .collect();
    let count = ((share * all.len() as f64).round() as usize).max(usize::from(share > 0.0));
    let Some(least) = count.checked_sub(1).and_then(|i| all.get(i)).map(|r| r.score) else {
        return Vec::new();
    };
    all.iter()
        .filter(|r| r.score >= least)
        .map(|r| (r.layer, r.head))
        .collect()
}

#[derive(Debug)]
struct Razor {
    /// `[L][Hk]`: who keeps everything.
    retrieval: Vec<Vec<bool>>,
    sinks: usize,
    buffer: usize,
    fraction: f64,
    fold: Fold,
    every: Option<NonZeroUsize>,
}

impl Razor {
    /// Recent rows of a head that does not retrieve, of a sequence of `tokens`.
    fn recent(&self, tokens: usize) -> usize {
        self.buffer.max((tokens as f64 * self.fraction) as usize)
    }

    /// What a head with `rows` rows keeps when the next token is at `next`; `None` if that is everything.
    fn keep(&self, rows: usize, next: usize) -> Option<Vec<u32>> {
        let recent = self.recent(next);
        // Step 2: with one row between, its mean is the row itself.
        if rows <= self.sinks + recent + 1 {
            return None;
        }
        Some(
            (0..self.sinks)
                .chain(rows - recent..rows)
                .map(|r| r as u32)
                .collect(),
        )
    }
}

impl CachePolicy for Razor {
    fn sight(&self, _tokens: usize) -> Option<Sight> {
        // Also for short prompts: they grow with their answers.
        Some(Sight::default())
    }

    fn every(&self) -> Option<NonZeroUsize> {
        self.every
    }

    fn layer(&self, view: &LayerView<'_>) -> LayerEdit {
        let retrieval = &self.retrieval[view.layer];
        if view.geometry.window.is_some() || retrieval.iter().all(|r| *r) {
            return LayerEdit::KeepAll;
        }
        let heads: Vec<HeadEdit> = (0..view.geometry.kv_heads)
            .map(|head| {
                let rows = view.rows(head).len();
                match self.keep(rows, view.next as usize).filter(|_| !retrieval[head]) {
                    Some(keep) => HeadEdit {
                        keep,
                        fold: self.fold,
                    },
                    None => HeadEdit {
                        keep: (0..rows as u32).collect(),
                        fold: Fold::Drop,
                    },
                }
            })
            .collect();
        let whole = heads
            .iter()
            .enumerate()
            .all(|(h, e)| e.keep.len() == view.rows(h).len());
        if whole {
            LayerEdit::KeepAll
        } else {
            LayerEdit::Heads(heads)
        }
    }
}
