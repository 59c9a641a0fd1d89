//! What every method has to keep, whatever it does. One line in the tests of a method runs all of it:
//!
//! ```ignore
//! #[test]
//! fn it_conforms() {
//!     antefix_conformance::method::check(&super::FlexPrefill);
//! }
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use antefix_attention::method::{
    self, Card, Chosen, Facts, Kind, Knobs, Method, Profiles, RawChoice, Rig, RigError, Value,
};
use antefix_models::testing::Rng;

/// Runs the whole suite on one method.
///
/// # Panics
/// With what is wrong.
pub fn check(method: &'static dyn Method) {
    card_and_page_are_complete(method.card());
    knobs_keep_their_ranges(method.card());
    installing_never_panics(method);
}

/// The card is in order, and the page can be made from the module documentation.
fn card_and_page_are_complete(card: &'static Card) {
    let faults = card.faults();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(card.source);
    let source = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    method::page(card, &source).unwrap_or_else(|e| panic!("{e}"));
}

/// The ends of every range are taken, and what lies behind them is refused.
fn knobs_keep_their_ranges(card: &'static Card) {
    let set = |knob: &str, value: Value| Knobs::new(card, &BTreeMap::from([(knob.to_string(), value)]));
    for knob in card.knobs {
        match knob.kind {
            Kind::Int { min, max } => {
                for ok in [min, max] {
                    assert!(set(knob.name, Value::Int(ok)).is_ok(), "{}: {ok}", knob.name);
                }
                for bad in [min.checked_sub(1), max.checked_add(1)].into_iter().flatten() {
                    assert!(set(knob.name, Value::Int(bad)).is_err(), "{}: {bad}", knob.name);
                }
            }
            Kind::Float { .. } => {
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    assert!(set(knob.name, Value::Float(bad)).is_err(), "{}: {bad}", knob.name);
                }
            }
            Kind::Choice(words) => {
                for word in words {
                    assert!(
                        set(knob.name, Value::Text((*word).into())).is_ok(),
                        "{}: {word}",
                        knob.name
                    );
                }
                assert!(set(knob.name, Value::Text("no such word".into())).is_err());
            }
            Kind::Bool | Kind::Profile | Kind::Text => {}
        }
    }
}

/// Random settings from the ranges of `card`.
pub fn random_knobs(card: &'static Card, rng: &mut Rng) -> Knobs {
    let mut given = BTreeMap::new();
    for knob in card.knobs {
        let bits = rng.bits();
        let value = match knob.kind {
            Kind::Int { min, max } => {
                // Small numbers as often as the whole range.
                let span = (max as i128 - min as i128 + 1) as u128;
                let span = if bits.is_multiple_of(2) {
                    span.min(64)
                } else {
                    span
                };
                Value::Int((min as i128 + (u128::from(bits / 2) % span) as i128) as i64)
            }
            Kind::Float { min, max } => {
                let end = |bound: std::ops::Bound<f64>, open: f64| match bound {
                    std::ops::Bound::Included(x) => x,
                    std::ops::Bound::Excluded(x) => x + open,
                    std::ops::Bound::Unbounded => open * 1e6,
                };
                let (lo, hi) = (end(min, 1e-6), end(max, -1e-6));
                Value::Float(lo + (hi - lo) * (bits % 1001) as f64 / 1000.0)
            }
            Kind::Bool => Value::Bool(bits.is_multiple_of(2)),
            Kind::Choice(words) => Value::Text(words[bits as usize % words.len()].into()),
            Kind::Profile | Kind::Text => continue,
        };
        given.insert(knob.name.to_string(), value);
    }
    Knobs::new(card, &given).unwrap_or_else(|e| panic!("values from the ranges: {e}"))
}

/// The defaults fit the example model, or say which profile they lack; random settings install or are refused with words.
fn installing_never_panics(method: &'static dyn Method) {
    let (facts, profiles) = (Facts::example(), Profiles::default());
    let install = |knobs: Knobs| Rig::assemble(&facts, &profiles, &[Chosen { method, knobs }]);
    match install(Knobs::defaults(method.card())) {
        Ok(program) => assert_eq!(program.name(), method.card().name),
        Err(RigError::Profile { .. }) if !method.card().needs.is_empty() => {}
        Err(error) => panic!("the defaults cannot be installed: {error}"),
    }
    let mut rng = Rng(7);
    for _ in 0..200 {
        let knobs = random_knobs(method.card(), &mut rng);
        let text = knobs.to_string();
        let again = RawChoice::parse(&text).and_then(|raw| Knobs::new(method.card(), &raw.knobs));
        assert_eq!(again.as_ref(), Ok(&knobs), "{text} is not read as it is written");
        if let Err(error) = install(knobs) {
            assert!(error.to_string().contains(method.card().name), "{error}");
        }
    }
}
