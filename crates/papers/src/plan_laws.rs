//! What every planner of prompts promises, whatever their length, the heads and the settings.
//!
//! `ANTEFIX_CASES=400 cargo test --release -p antefix-papers --lib plan_laws` runs the long version.

use std::sync::Arc;

use antefix_attention::method::{Axis, Card, Knobs, Method, Planner, RawChoice, Value};
use antefix_attention::sparse::Planned;
use antefix_conformance::method::{Rng, random_knobs};

use crate::plan_case::{PlanCase, Shape, planner, planner_with};

/// Layers of a case.
const LAYERS: usize = 2;

pub(crate) fn cases() -> usize {
    let given = std::env::var("ANTEFIX_CASES").ok().and_then(|n| n.parse().ok());
    given.unwrap_or(16)
}

/// A prompt of 1 to 4,096 tokens, short as often as long.
pub(crate) fn random_case(rng: &mut Rng, i: usize) -> PlanCase {
    let most = if i.is_multiple_of(2) {
        4096
    } else {
        1 << (rng.bits() % 13)
    };
    let n = 1 + (rng.bits() % most) as usize;
    let kv_heads = 1 + (rng.bits() % 2) as usize;
    let group = [1, 3, 4, 7][i / 2 % 4];
    PlanCase::random_layers(rng.bits(), Shape(group * kv_heads, kv_heads, 16), n, LAYERS)
}

/// The plans of a layer.
fn of_layer(plans: &[Planned], layer: usize) -> Vec<&Planned> {
    plans.iter().filter(|p| p.layer == layer).collect()
}

/// What a stretch reads depends neither on what comes later nor on whether what came before was computed now. That plans are valid is
/// checked wherever one is made.
pub(crate) fn check(case: &PlanCase, planner: &Arc<dyn Planner>, rng: &mut Rng) -> bool {
    let whole = case.plans(planner);
    let grain = planner.grain().get();
    let stretches = case.n.div_ceil(grain);
    if stretches > 1 {
        let cut = 1 + rng.bits() as usize % (stretches - 1);
        let (before, after) = (
            case.first(cut * grain).plans(planner),
            case.plans_from(planner, cut * grain),
        );
        for layer in 0..LAYERS {
            let (whole, mut parts) = (of_layer(&whole, layer), of_layer(&before, layer));
            parts.extend(of_layer(&after, layer));
            assert!(
                whole == parts,
                "cut at {} of {}: {planner:?}",
                cut * grain,
                case.n
            );
        }
    }
    whole.iter().any(|p| !p.plan.is_dense())
}

/// Random settings, of which the first dense layers leave some of a case's.
fn random_settings(card: &'static Card, rng: &mut Rng) -> Knobs {
    let knobs = random_knobs(card, rng);
    if !card.knobs.iter().any(|knob| knob.name == "dense_layers") {
        return knobs;
    }
    let mut raw = RawChoice::parse(&knobs.to_string()).expect("settings are read as they are written");
    let layers = rng.bits() as usize % LAYERS;
    raw.knobs.insert("dense_layers".into(), Value::Int(layers as i64));
    Knobs::new(card, &raw.knobs).expect("in range")
}

fn laws(method: &'static dyn Method) {
    let card = method.card();
    let neutral = card.neutral.map(|settings| planner(method, settings));
    let (mut rng, mut sparse) = (Rng(5), 0);
    for i in 0..cases() {
        let case = random_case(&mut rng, i);
        // Many random settings read everything.
        for _ in 0..3 {
            let Ok(planner) = planner_with(method, random_settings(card, &mut rng)) else {
                continue;
            };
            sparse += usize::from(check(&case, &planner, &mut rng));
        }
        if let Some(neutral) = &neutral {
            assert!(
                case.plans(neutral).iter().all(|p| p.plan.is_dense()),
                "{}",
                card.name
            );
        }
    }
    assert!(sparse > 0, "{}: no plan left anything out", card.name);
}

#[test]
fn planners_of_prompts_keep_their_promises() {
    for &method in crate::ALL.iter().filter(|m| m.card().axis == Axis::Prefill) {
        laws(method);
    }
}
