//! The search for the best units of keys: halves of runs, down to single units.

use std::ops::Range;

use antefix_attention::method::{Kind, Knob, Knobs, PlanView, Preset};
use antefix_attention::sparse::all_cost_less;

use crate::sparse_baselines::select::best;

/// Keys of a unit.
pub(super) const fn unit_keys(default: i64, source: &'static str) -> Knob {
    Knob {
        name: "unit_keys",
        kind: Kind::int(1, 64),
        default: Preset::Int(default),
        unit: "keys",
        help: "Keys of a unit: the search ends with units, which are read whole",
        source,
    }
}

/// Keys of a unit that are scored.
pub(super) const KEY_STRIDE: Knob = Knob {
    name: "key_stride",
    kind: Kind::int(1, 64),
    default: Preset::Int(1),
    unit: "keys",
    help: "Of the keys of a unit every so many is scored",
    source: "the paper",
};

/// Which unit stands for a half.
pub(super) const SAMPLE: Knob = Knob {
    name: "sample",
    kind: Kind::Choice(&["center", "first", "last", "all"]),
    default: Preset::Text("center"),
    unit: "",
    help: "The unit that stands for a half; `all`: every one, which finds the best ones and costs as much as dense scores",
    source: "the paper, which finds it best",
};

/// Last keys, always read.
pub(super) const WINDOW: Knob = Knob {
    name: "window",
    kind: Kind::int(0, 1 << 20),
    default: Preset::Int(256),
    unit: "keys",
    help: "Keys before its block that every row reads",
    source: "the published code",
};

/// Which unit stands for a run of units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sample {
    /// The one in the middle.
    Center,
    /// The first.
    First,
    /// The last.
    Last,
    /// Every one: the score of a run is the largest in it.
    All,
}

impl Sample {
    /// The units that stand for units `[start, start + size)`.
    pub fn units(self, start: usize, size: usize) -> Range<usize> {
        match self {
            Self::Center => start + size / 2..start + size / 2 + 1,
            Self::First => start..start + 1,
            Self::Last => start + size - 1..start + size,
            Self::All => start..start + size,
        }
    }
}

/// How units of keys are searched for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Search {
    pub(super) unit_keys: usize,
    pub(super) key_stride: usize,
    pub(super) sample: Sample,
}

/// A run of units.
#[derive(Debug, Clone, Copy)]
struct Node {
    start: usize,
    size: usize,
}

impl Node {
    /// Its two halves, without empty ones.
    fn halves(self) -> impl Iterator<Item = Self> {
        let left = self.size / 2;
        let halves = [
            Self {
                start: self.start,
                size: left,
            },
            Self {
                start: self.start + left,
                size: self.size - left,
            },
        ];
        halves.into_iter().filter(|half| half.size > 0)
    }
}

impl Search {
    /// The values of the knobs.
    pub(super) fn of(knobs: &Knobs) -> Self {
        Self {
            unit_keys: knobs.size("unit_keys"),
            key_stride: knobs.size("key_stride"),
            sample: match knobs.text("sample") {
                "first" => Sample::First,
                "last" => Sample::Last,
                "all" => Sample::All,
                _ => Sample::Center,
            },
        }
    }

    /// Where the searched keys begin behind `sinks` first ones, in whole units.
    pub(super) fn behind(&self, sinks: usize) -> usize {
        sinks.next_multiple_of(self.unit_keys)
    }

    /// Of `keys` of `kv_head` about `count` in whole units, as runs, ascending: those that the search finds for the queries
    /// `q: [R, D]`, already scaled. All of them if there are no more.
    pub(super) fn run(
        &self,
        view: &PlanView<'_>,
        kv_head: usize,
        q: &[f32],
        keys: Range<usize>,
        count: usize,
    ) -> Vec<(u32, u32)> {
        let run = |from: usize, to: usize| (from as u32, to.min(keys.end) as u32);
        if keys.len() <= count {
            return vec![run(keys.start, keys.end)];
        }
        // Step 2.
        let (units, beams) = (
            keys.len().div_ceil(self.unit_keys),
            count.div_ceil(self.unit_keys),
        );
        let cut = |j: usize| units * j / beams;
        let mut nodes: Vec<Node> = (0..beams)
            .map(|j| Node {
                start: cut(j),
                size: cut(j + 1) - cut(j),
            })
            .collect();
        let all = all_cost_less(
            q.len() / view.rows.geometry.dim,
            self.looks_at(units, beams),
            keys.len(),
        )
        .then(|| view.largest_scores_between(kv_head, q, keys.clone()));
        while nodes.iter().any(|node| node.size > 1) {
            // Step 3.
            let halves: Vec<Node> = nodes.iter().flat_map(|node| node.halves()).collect();
            let looked_at = self.looked_at(&keys, &halves);
            let largest = match &all {
                Some(all) => looked_at
                    .keys
                    .iter()
                    .map(|&key| all[key as usize - keys.start])
                    .collect(),
                None => view.largest_scores(kv_head, q, &looked_at.keys),
            };
            let scores = looked_at.by_node(&largest);
            // Step 4.
            let mut kept = best(&scores, beams);
            kept.sort_unstable();
            nodes = kept.into_iter().map(|i| halves[i as usize]).collect();
        }
        let at = |unit: usize| keys.start + unit * self.unit_keys;
        nodes.iter().map(|n| run(at(n.start), at(n.start + 1))).collect()
    }

    /// About how many keys a search for `beams` of `units` looks at.
    fn looks_at(&self, units: usize, beams: usize) -> usize {
        let rounds = units.div_ceil(beams).next_power_of_two().ilog2() as usize;
        let each = match self.sample {
            Sample::All => units,
            Sample::Center | Sample::First | Sample::Last => 2 * beams,
        };
        rounds * each * self.unit_keys.div_ceil(self.key_stride)
    }

    /// The keys that stand for each of `nodes`.
    fn looked_at(&self, keys: &Range<usize>, nodes: &[Node]) -> LookedAt {
        let (mut looked_at, mut ends) = (Vec::new(), Vec::with_capacity(nodes.len()));
        for node in nodes {
            for unit in self.sample.units(node.start, node.size) {
                let from = keys.start + unit * self.unit_keys;
                let to = (from + self.unit_keys).min(keys.end);
                looked_at.extend((from..to).step_by(self.key_stride).map(|key| key as u32));
            }
            ends.push(looked_at.len());
        }
        LookedAt {
            keys: looked_at,
            ends,
        }
    }
}

/// Keys that stand for nodes.
struct LookedAt {
    /// Ascending.
    keys: Vec<u32>,
    /// By node: how many stand for it and those before it.
    ends: Vec<usize>,
}

impl LookedAt {
    /// The largest score of each node, out of those of the keys.
    fn by_node(&self, scores: &[f32]) -> Vec<f32> {
        let mut from = 0;
        let largest = |&to: &usize| {
            let of = &scores[std::mem::replace(&mut from, to)..to];
            of.iter().copied().fold(f32::NEG_INFINITY, f32::max)
        };
        self.ends.iter().map(largest).collect()
    }
}
