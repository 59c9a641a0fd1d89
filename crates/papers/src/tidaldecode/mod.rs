//! tidaldecode: drawn tokens choose their keys in two layers and read only those in the layers that follow.
//!
//! # What it does
//! The keys that matter to a token are largely the same in neighbouring layers. So the first layers are dense; a selection layer is dense,
//! too, and notes the keys of the largest weights; the layers behind it read only those, until another selection layer looks again. Every
//! token chooses anew, and the whole cache stays: this saves time, not memory. Prompts are computed densely, or as their own planner says.
//!
//! # When it helps
//! Answers to long prompts, from about 8K tokens on: below, weights cost more than keys. A key that matters only in a layer behind the selection is
//! missed.
//! Tokens of Qwen2.5-Coder come 1.7 times as fast as densely behind 16,320 tokens, 2.5 behind 32,000, 3.0 there with eight
//! sequences (AVX2), but this model's predictions move far (docs/results.md).
//!
//! # Steps
//! 1. (3.1) Layers before `start` are dense.
//! 2. (3.1) The layer `start`, and the layer `recall`, are dense and choose: units of `unit_keys` keys by the largest weight in them,
//!    as many as make up `top_k` keys. Layers with a window are left alone and counted in no list: the next one that sees all keys takes
//!    their place.
//! 3. (3.3) With `unit=kv_group` a unit counts by the largest weight, within its own head, among the heads of the group.
//! 4. The other layers read the chosen units, and the token's own key.
//! 5. (3.5) With `correct_every=c`, whenever the answer has grown to a multiple of `c` tokens, the last `c` are computed once more, together and
//!    densely, as a prompt is, and their rows are replaced. The next token is drawn from the last of them.
//!
//! # Knobs
//! `top_k` is the larger of `least` keys and the share `share` of what stands before. A `least` of at least the whole text changes nothing.
//!
//! # Cost
//! Selection layers read their keys twice, once for the answer and once for the choice. The others read `top_k` keys. With L layers of
//! which 4 are dense, attention costs at best 4 / L of before. Reported as `plan_s`.
//!
//! # Differences from the paper
//! Units of 32 keys, a page, instead of single ones: one key is spread over its page, and a page costs as much as its keys together.
//! `unit_keys=1` is the paper's form. Heads that share keys share the choice. The token's own key is always read. The end of an answer is
//! not corrected: a next turn computes what is left as part of its prompt. `antefix tune` and `antefix bench --sparse` leave corrections out.
//!
//! # References
//! Yang et al., TidalDecode: fast and accurate LLM decoding with position persistent sparse attention, ICLR 2025, arXiv 2410.05076.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, Cover, DecodePlanner, DecodeSteps, Dial, Kind, Knob, Knobs, Method, Paper, Plan,
    PlanView, Preset, Rig, RigError, Unit,
};

use crate::sparse_baselines::knobs::{Budget, SHARES, drawn_share, least, unit, unit_of};
use crate::sparse_baselines::select::best;

pub mod reference;
pub mod repro;
#[cfg(test)]
mod tests;

/// The method.
pub struct TidalDecode;

static CARD: Card = Card {
    name: "tidaldecode",
    title: "TidalDecode",
    axis: Axis::Decode,
    exact: false,
    summary: "Drawn tokens choose their keys in two layers and read only those in the layers that follow.",
    paper: Paper {
        title: "TidalDecode: fast and accurate LLM decoding with position persistent sparse attention",
        authors: "Yang et al.",
        year: 2025,
        reference: "ICLR 2025, arXiv 2410.05076",
    },
    knobs: &[
        drawn_share("ours; the paper has 256 to 4096 keys"),
        least(512, "ours"),
        Knob {
            name: "start",
            kind: Kind::int(0, 1024),
            default: Preset::Int(2),
            unit: "layers",
            help: "Layers that are dense before the first selection",
            source: "the published code",
        },
        Knob {
            name: "recall",
            kind: Kind::int(0, 1024),
            default: Preset::Int(0),
            unit: "",
            help: "Layer that chooses again; 0: two fifths of the way up; none if it is `start` or below, or the last",
            source: "ours; the published scripts have 13 of 32",
        },
        Knob {
            name: "unit_keys",
            kind: Kind::Choice(&["1", "16", "32"]),
            default: Preset::Text("32"),
            unit: "keys",
            help: "Keys that are chosen together",
            source: "ours; the paper has 1",
        },
        Knob {
            name: "correct_every",
            kind: Kind::int(0, 1 << 20),
            default: Preset::Int(0),
            unit: "tokens of the answer",
            help: "Drawn tokens that are then computed again densely, together, and replaced in the cache; 0: never",
            source: "the paper; off in its published code",
        },
        unit(
            "kv_group",
            "One choice for all heads that share keys, or one a query head",
            "ours; the paper has one a head",
        ),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("least=1048576,start=0"),
    source: file!(),
};

impl Method for TidalDecode {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let facts = rig.facts();
        let start = knobs.size("start");
        let recall = match knobs.size("recall") {
            0 => (facts.layers.len() * 2).div_ceil(5),
            layer => layer,
        };
        let next = |from: usize| facts.full_layers().find(|&l| l >= from);
        let Some(first) = next(start) else {
            return Err(rig.senseless(format!(
                "no layer behind the first {start} sees all keys: the model has {}",
                facts.layers.len()
            )));
        };
        let used = |l: usize| next(l + 1).is_some();
        let again = next(recall).filter(|&l| recall > start && l > first && used(l));
        if let Some(every) = NonZeroUsize::new(knobs.size("correct_every")) {
            rig.correct_drawn(every);
        }
        rig.set_decode_planner(Arc::new(Tidal {
            budget: Budget::of(knobs),
            select: [Some(first), again].into_iter().flatten().collect(),
            unit_keys: knobs
                .text("unit_keys")
                .parse()
                .expect("one of the choices is a number"),
            unit: unit_of(knobs),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        SHARES
    }
}

#[derive(Debug, Clone)]
struct Tidal {
    budget: Budget,
    /// Layers that choose, ascending; not empty.
    select: Vec<usize>,
    unit_keys: usize,
    unit: Unit,
}

impl DecodePlanner for Tidal {
    fn start(&self) -> Box<dyn DecodeSteps> {
        Box::new(Steps {
            tidal: self.clone(),
            sets: Vec::new(),
        })
    }
}

/// Keys `[start, end)`, ascending.
type Runs = Vec<(u32, u32)>;

#[derive(Debug)]
struct Steps {
    tidal: Tidal,
    /// What the rows of this step have chosen last, by row within unit.
    sets: Vec<Vec<Runs>>,
}

impl DecodeSteps for Steps {
    fn plan(&mut self, view: &PlanView<'_>) -> Plan {
        let layer = view.rows.layer;
        if layer < self.tidal.select[0] {
            return view.dense();
        }
        if self.tidal.select.contains(&layer) {
            self.sets = view.each(view.units(self.tidal.unit), |unit| self.tidal.choose(view, unit));
            return view.dense();
        }
        // Layers ascend: the rows of this step have chosen.
        view.plan(self.tidal.unit, |unit| cover(view, &self.sets[unit]))
    }
}

/// The chosen keys of each row, and its own.
fn cover(view: &PlanView<'_>, rows: &[Runs]) -> Cover {
    let mut builder = Builder::new(1, view.queries());
    rows.iter().for_each(|runs| builder.push(runs.iter().copied()));
    builder.finish()
}

impl Tidal {
    /// What each row chooses for a head or group.
    fn choose(&self, view: &PlanView<'_>, unit: usize) -> Vec<Runs> {
        let heads = view.heads(self.unit, unit);
        let one = |(row, pos): (usize, u32)| {
            let keys = pos + 1;
            match self.budget.keys(keys as usize) {
                None => vec![(0, keys)],
                Some(budget) => self.top(view, heads.clone(), row, budget),
            }
        };
        view.queries()
            .enumerate()
            .map(|(row, pos)| one((row, pos)))
            .collect()
    }

    /// The units of `unit_keys` keys with the largest weights.
    fn top(&self, view: &PlanView<'_>, heads: Range<usize>, row: usize, budget: usize) -> Runs {
        // Step 3.
        let scores = view.largest_log_weights(heads, row, self.unit_keys);
        // Step 2.
        let mut units = best(&scores, (budget / self.unit_keys).max(1));
        units.sort_unstable();
        let (keys, end) = (self.unit_keys as u32, view.queries().start + row as u32 + 1);
        units
            .into_iter()
            .map(|u| (u * keys, ((u + 1) * keys).min(end)))
            .collect()
    }
}
