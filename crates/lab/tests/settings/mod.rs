//! Settings of methods in tests.

use antefix_attention::method::Card;

/// The method with those of `values` for which it has a knob, as people write it: `snapkv,budget=40`.
pub(crate) fn with(card: &Card, values: &[(&str, &str)]) -> String {
    let known = |(name, _): &&(&str, &str)| card.knobs.iter().any(|knob| knob.name == *name);
    let setting = |(name, value): &(&str, &str)| format!(",{name}={value}");
    card.name.to_owned() + &values.iter().filter(known).map(setting).collect::<String>()
}
