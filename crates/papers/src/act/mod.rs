//! act: weight on hidden sinks is handed on to the other keys.
//!
//! # What it does
//! In chosen heads, keys other than the first that collect much attention from all rows (hidden sinks) keep a part `beta` of their weight;
//! the rest goes to the row's other keys in proportion to their weights. Weights of the model are untouched, sinks are found anew in
//! each text.
//!
//! # When it helps
//! The paper reports gains of tenths of a point to a few points on classification and multiple choice for models of 7B and more, with
//! heads that were chosen on labelled data of the same kind. On a small model expect little, and measure against as many random heads.
//!
//! # Steps
//! 1. (3.1) A key is a sink if its mean weight over the rows that see it is above `alpha / N` (or a fixed threshold); the first token never is.
//! 2. (3.2) A row with weight `s` on sinks: sinks keep `beta` of theirs, the others are multiplied by `(1 - beta s) / (1 - s)`.
//! 3. (3.3) Only in the heads of a profile; the first two and the last layer are never in it.
//! 4. (3.4) A profile: each head alone is calibrated, and the margin of the right answers on labelled examples compared.
//! 5. (3.5) While the answer is written, sinks are found anew every 64 tokens, out of the means so far.
//! 6. (3.6) Fast form: the output is `c (z - z_S) + beta z_S` with the part `z_S` of the output that sinks give; no matrix.
//!
//! # Knobs
//! `mode=causal` decides about a row by the rows before its block of 64: no row depends on later ones or on how a prompt was cut into
//! steps. `mode=two_pass` decides by the whole prompt, as the paper does; only a prompt that is computed in one step can have that, others
//! fall back to `causal`, so its answers depend on the size of the steps. `beta=1` changes nothing; above 1 sinks gain: the control.
//!
//! # Cost
//! One more product of queries and keys in the calibrated heads (two in `two_pass`), and one value row for each sink.
//!
//! # Differences from the paper
//! The official program spares the first sink it finds instead of the first token, divides by zero where a row sees only sinks, and its
//! decoding steps do not keep the sum of a row; here the first token is spared, such rows stay as they are, and rows always sum to 1.
//! Heads are ranked by the margin of the right answer, not by accuracy, which is noise on a few hundred examples.
//!
//! # References
//! Yu et al., Unveiling and Harnessing Hidden Attention Sinks, ICML 2024, arXiv 2406.15765.

use std::sync::Arc;

use antefix_attention::hooks::Hook;
use antefix_attention::method::{
    Axis, Card, HookMaker, Kind, Knob, Knobs, Method, Need, Paper, Preset, Rig, RigError,
};

use crate::heads::{HEADS, KIND, choose, profile_knob};
use calibrate::{Act, Calibration, Mode};
use sinks::{Rule, Threshold};

pub mod calibrate;
pub mod reference;
pub mod repro;
pub mod sinks;
#[cfg(test)]
mod tests;

/// The method.
pub struct Calibrated;

static CARD: Card = Card {
    name: "act",
    title: "Attention calibration (ACT)",
    axis: Axis::Hooks,
    exact: false,
    summary: "In chosen heads, hands most of the weight on hidden sinks on to the other keys.",
    paper: Paper {
        title: "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention Calibration",
        authors: "Yu et al.",
        year: 2024,
        reference: "arXiv 2406.15765",
    },
    knobs: &[
        Knob {
            name: "beta",
            kind: Kind::float(0.0, 4.0),
            default: Preset::Float(0.4),
            unit: "",
            help: "Part of a sink's weight that it keeps; above 1 it gains, the control experiment",
            source: "the official scripts",
        },
        Knob {
            name: "alpha",
            kind: Kind::above(0.0, 1e6),
            default: Preset::Float(5.0),
            unit: "times 1/N",
            help: "A key whose mean weight is above alpha/N is a sink",
            source: "section 3, recalled",
        },
        Knob {
            name: "threshold",
            kind: Kind::float(0.0, 1.0),
            default: Preset::Float(0.0),
            unit: "mean weight",
            help: "This fixed mean weight instead of alpha/N; 0: alpha/N",
            source: "0.1 and 0.15 in the official scripts",
        },
        Knob {
            name: "min_rows",
            kind: Kind::int(1, 1 << 20),
            default: Preset::Int(8),
            unit: "rows",
            help: "Keys that fewer rows have seen are no sinks",
            source: "ours; 1 in the official program",
        },
        Knob {
            name: "spare",
            kind: Kind::Choice(&["first_token", "first_found"]),
            default: Preset::Text("first_token"),
            unit: "",
            help: "Which key is never a sink",
            source: "section 3; first_found: the official program",
        },
        Knob {
            name: "mode",
            kind: Kind::Choice(&["causal", "two_pass"]),
            default: Preset::Text("causal"),
            unit: "",
            help: "By the rows before, or by the whole prompt where it is computed in one step",
            source: "two_pass: the paper",
        },
        Knob {
            name: "top",
            kind: Kind::int(0, 4096),
            default: Preset::Int(16),
            unit: "heads",
            help: "How many heads of the profile, best margin first",
            source: "2 to 20 % of the heads in the official lists",
        },
        profile_knob(
            "Profile of heads with the measurement act, from antefix analyse heads --kind act",
            "ours",
        ),
        HEADS,
    ],
    query_dependent: false,
    needs: &[Need::Profile(KIND)],
    neutral: Some("top=0"),
    source: file!(),
};

impl Method for Calibrated {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let mut heads = vec![Vec::new(); rig.facts().layers.len()];
        for (layer, head) in choose(knobs, rig, "act", knobs.size("top"))? {
            heads[layer].push(head);
        }
        for layer in &mut heads {
            layer.sort_unstable();
            layer.dedup();
        }
        let threshold = match knobs.float("threshold") {
            0.0 => Threshold::Alpha(knobs.float("alpha")),
            least => Threshold::Fixed(least),
        };
        let calibration = Calibration {
            heads,
            rule: Rule {
                threshold,
                min_rows: knobs.size("min_rows") as u32,
                spare_first_found: knobs.text("spare") == "first_found",
            },
            beta: knobs.float("beta") as f32,
            mode: match knobs.text("mode") {
                "two_pass" => Mode::TwoPass,
                _ => Mode::Causal,
            },
        };
        if !calibration.is_neutral() {
            rig.add_hook(Arc::new(calibration));
        }
        Ok(())
    }
}

impl HookMaker for Calibration {
    fn make(&self, _prompt: usize) -> Box<dyn Hook> {
        Box::new(Act::new(self.clone()))
    }

    fn sees_all(&self) -> bool {
        // The means of a row are over all rows before it.
        true
    }
}
