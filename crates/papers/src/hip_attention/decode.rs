//! hip_decode: drawn tokens find their keys by halving runs of keys, and read them for some tokens.
//!
//! # What it does
//! Every so many drawn tokens, each layer cuts the keys before the token into runs, halves them, keeps the halves whose middle scores best, and
//! so on down to single units. Until the next search, tokens read those units, the first keys, and all keys from the window before the search on.
//! It is `hip_attention` for answers. Prompts are computed densely, or as their own planner says.
//!
//! # When it helps
//! Answers to long prompts: a search looks at few keys, and only once in `refresh` tokens. What a token looks for that none before
//! it needed is missed until the next search.
//! Tokens of Qwen2.5-Coder come 2.4 times as fast as densely behind 32,000 tokens, 3.3 times with eight sequences (AVX2; docs/results.md).
//! Facts want small units: of six needles there units of 2 keys find six, of 8 five, of 32 two; of the names in six chains of variables units
//! of 2 find 0.71, of 8 0.38, dense attention 0.75.
//!
//! # Steps
//! 1. (Decoding) The first drawn token, and every `refresh`-th from there on, searches in every layer behind the first `dense_layers`.
//! 2. (Mask estimation) The keys between sinks and window, in units of `unit_keys`, are cut into as many runs of equal size as units are to be read.
//! 3. (Mask estimation) Each run is cut into two halves. The score of a half is the largest of any head's query with any key of the unit in its middle.
//! 4. (Mask estimation) As many halves as there were runs stay, until all runs are one unit.
//! 5. (Decoding) This token and those up to the next search read the units, the first `sinks` keys, and everything from `window` keys before the
//!    search on.
//!
//! # Knobs
//! A token reads in all the larger of `least` keys and the share `share` of what stands before: what `sinks` and `window` leave of it
//! is searched for, one unit at least. A `least` of at least the whole text changes nothing. Layers with a window of their own are left alone.
//!
//! # Cost
//! With T keys of which k are searched for, a search is `log2(T / k)` rounds of at most `2 k / key_stride` products with each query of the group.
//! With the defaults at 16K it looks at 7,400 keys, 920 for each of the 8 tokens that it serves, without their values; a token reads 1,024 keys.
//! Where that is more than one in thirty, as with the defaults, all keys are scored in one pass, which costs less than to collect some: half of
//! what a dense token costs, once in `refresh` tokens, and `sample=all` costs the same. Reported as `plan_s`. What was found is copied side
//! by side until the next search: beside the cache, counted with it, one sixteenth of its size with the defaults.
//!
//! # Differences from the paper
//! Sinks and window count in the budget, so that methods can be compared at equal numbers of keys. Keys that leave the window before the next search
//! are still read; in the paper they are lost until then. Heads that share keys search together by default. Other departures are those of
//! `hip_attention`.
//!
//! # References
//! Lee et al., A training-free sub-quadratic cost transformer model serving framework with hierarchically pruned attention, ICLR 2025,
//! arXiv 2406.09827.

use std::ops::Range;
use std::sync::Arc;

use antefix_attention::method::{
    Axis, Builder, Card, DecodePlanner, DecodeSteps, Dial, Kind, Knob, Knobs, Method, Plan, PlanView, Preset,
    Rig, RigError, Unit,
};

use super::search::{KEY_STRIDE, SAMPLE, Search, WINDOW, unit_keys};
use crate::sparse_baselines::knobs::{
    Budget, SHARES, dense_layers, drawn_share, least, sinks, unit, unit_of,
};

/// The method.
pub struct HipDecode;

static CARD: Card = Card {
    name: "hip_decode",
    title: "HiP attention for answers",
    axis: Axis::Decode,
    exact: false,
    summary: "Drawn tokens find their keys by halving runs of keys, and read them for some tokens.",
    paper: super::PAPER,
    knobs: &[
        drawn_share("ours; the paper has 512 keys"),
        least(784, "the paper's 512 beside sinks and window"),
        Knob {
            name: "refresh",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(8),
            unit: "steps",
            help: "Drawn tokens that read what the first of them has found",
            source: "the paper",
        },
        unit_keys(2, "the paper"),
        KEY_STRIDE,
        SAMPLE,
        sinks(16, "the published code"),
        WINDOW,
        dense_layers(3, "the paper, for 7B"),
        unit(
            "kv_group",
            "One search for all heads that share keys, or one a query head",
            "ours; the paper has one a head",
        ),
    ],
    query_dependent: true,
    needs: &[],
    neutral: Some("least=1048576"),
    source: file!(),
};

impl Method for HipDecode {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        rig.set_decode_planner(Arc::new(Hip {
            budget: Budget::of(knobs),
            refresh: knobs.int("refresh") as u32,
            sinks: knobs.size("sinks"),
            window: knobs.size("window"),
            dense_layers: knobs.size("dense_layers"),
            unit: unit_of(knobs),
            search: Search::of(knobs),
        }))
    }

    fn dials(&self) -> &'static [Dial] {
        SHARES
    }
}

#[derive(Debug, Clone)]
struct Hip {
    budget: Budget,
    refresh: u32,
    sinks: usize,
    window: usize,
    dense_layers: usize,
    unit: Unit,
    search: Search,
}

impl DecodePlanner for Hip {
    fn start(&self) -> Box<dyn DecodeSteps> {
        Box::new(Steps {
            hip: self.clone(),
            first: None,
            found: Vec::new(),
        })
    }

    fn repeated(&self, tokens: usize) -> usize {
        let all = |budget| self.kept() + self.searched(budget).next_multiple_of(self.search.unit_keys);
        match (self.refresh, self.unit) {
            (2.., Unit::KvGroup) => self.budget.keys(tokens).map_or(0, all),
            _ => 0,
        }
    }
}

/// What a token found.
#[derive(Debug)]
struct Found {
    /// Its position.
    at: u32,
    /// By unit: keys `[start, end)`, ascending, sinks and the keys from the window up to `at` among them.
    runs: Vec<Vec<(u32, u32)>>,
}

#[derive(Debug)]
struct Steps {
    hip: Hip,
    /// Position of the first drawn token.
    first: Option<u32>,
    /// By layer: what may be read again, ascending.
    found: Vec<Vec<Found>>,
}

impl DecodeSteps for Steps {
    fn plan(&mut self, view: &PlanView<'_>) -> Plan {
        let (layer, queries) = (view.rows.layer, view.queries());
        let first = *self.first.get_or_insert(queries.start);
        if layer < self.hip.dense_layers {
            return view.dense();
        }
        if self.found.len() <= layer {
            self.found.resize_with(layer + 1, Vec::new);
        }
        let found = &mut self.found[layer];
        // Step 1. The position of the last search up to `pos`.
        let search = |pos: u32| pos - pos.saturating_sub(first) % self.hip.refresh;
        // A step that is taken back begins again at its first row: what its own rows have found goes, what they read stays.
        found.retain(|f| (search(queries.start)..queries.start).contains(&f.at));
        for (row, at) in queries.clone().enumerate().filter(|&(_, pos)| search(pos) == pos) {
            let runs = view.each(view.units(self.hip.unit), |unit| {
                self.hip
                    .find(view, view.heads(self.hip.unit, unit), row, at as usize)
            });
            found.push(Found { at, runs });
        }
        view.plan(self.hip.unit, |unit| {
            let mut builder = Builder::new(1, queries.clone());
            for pos in queries.clone() {
                // Step 5. Nothing found is read as everything.
                let last = found.iter().rfind(|f| f.at <= pos);
                let (runs, from) = last.map_or((&[][..], 0), |f| (&f.runs[unit][..], f.at));
                builder.push(runs.iter().copied().chain([(from, pos)]));
            }
            builder.finish()
        })
    }
}

impl Hip {
    /// Keys that are read without a search.
    fn kept(&self) -> usize {
        self.search.behind(self.sinks) + self.window
    }

    /// Keys that are searched for, of `budget` keys in all.
    fn searched(&self, budget: usize) -> usize {
        budget.saturating_sub(self.kept()).max(self.search.unit_keys)
    }

    /// What row `row` at position `at` reads for `heads`, which share keys.
    fn find(&self, view: &PlanView<'_>, heads: Range<usize>, row: usize, at: usize) -> Vec<(u32, u32)> {
        let Some(budget) = self.budget.keys(at + 1) else {
            return vec![(0, at as u32)];
        };
        let (end, sinks) = (at.saturating_sub(self.window), self.search.behind(self.sinks));
        let count = self.searched(budget);
        let kv_head = heads.start / view.group();
        let q: Vec<f32> = heads.flat_map(|head| view.query(row, head)).collect();
        let mut runs = vec![(0, sinks as u32)];
        runs.extend(self.search.run(view, kv_head, &q, sinks.min(end)..end, count));
        runs.push((end as u32, at as u32));
        runs
    }
}
