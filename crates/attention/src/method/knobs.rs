//! Settings of a method, checked against its card.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Bound, RangeBounds};

use super::card::{Card, Kind, Knob, Preset};

/// A value that somebody wrote, in JSON, in TOML or on the command line.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// `true`, `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Everything else; the command line has nothing but texts.
    Text(String),
}

impl From<Preset> for Value {
    fn from(preset: Preset) -> Self {
        match preset {
            Preset::Int(x) => Self::Int(x),
            Preset::Float(x) => Self::Float(x),
            Preset::Bool(x) => Self::Bool(x),
            Preset::Text(x) => Self::Text(x.to_string()),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(x) => x.fmt(f),
            Self::Int(x) => x.fmt(f),
            Self::Float(x) => x.fmt(f),
            Self::Text(x) => f.write_str(x),
        }
    }
}

/// Why a method, or a setting of it, cannot be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChoiceError {
    /// No method of this name.
    #[error("there is no method `{name}`\nhint: {}", one_of(.known))]
    Method {
        /// What was asked for.
        name: String,
        /// The names there are.
        known: Vec<&'static str>,
    },
    /// A method on an axis that is not its own.
    #[error("`{name}` is a method of the axis `{is}`, not of `{asked}`\nhint: write it under `{is}`")]
    Axis {
        /// The method.
        name: String,
        /// Its axis.
        is: &'static str,
        /// Where it was asked for.
        asked: &'static str,
    },
    /// Two methods on one axis.
    #[error("`{first}` and `{second}` are both methods of the axis `{axis}`\nhint: choose one")]
    Twice {
        /// The axis.
        axis: &'static str,
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// A knob that the method does not have.
    #[error("`{method}` has no knob `{name}`\nhint: {}", one_of(.known))]
    Knob {
        /// The method.
        method: &'static str,
        /// What was written.
        name: String,
        /// The knobs it has.
        known: Vec<&'static str>,
    },
    /// A value that the knob does not take.
    #[error("`{method}`: knob `{knob}` cannot be `{got}`: it takes {kind}, {range}")]
    Value {
        /// The method.
        method: &'static str,
        /// The knob.
        knob: &'static str,
        /// What was written.
        got: String,
        /// `int`, `float` and so on.
        kind: &'static str,
        /// The values it takes.
        range: String,
    },
    /// A text that says nothing.
    #[error("`{text}` names no method\nhint: write NAME or NAME,knob=value,...")]
    Syntax {
        /// What was written.
        text: String,
    },
    /// Text that starts like JSON and is none of what is read there.
    #[error(
        "{problem}\nhint: write {{\"kv\": \"NAME,knob=value\"}} or {{\"kv\": {{\"name\": \"NAME\", \"knob\": 1}}}}"
    )]
    Json {
        /// What the reader says.
        problem: String,
    },
    /// The same knob twice.
    #[error("`{method}`: knob `{knob}` is given twice")]
    KnobTwice {
        /// The method, as written.
        method: String,
        /// The knob.
        knob: String,
    },
}

fn one_of(names: &[&'static str]) -> String {
    match names {
        [] => "there is none to choose from".to_string(),
        _ => format!("choose from {}", names.join(", ")),
    }
}

/// Settings of one method. Having them proves that every knob has a value that its card allows.
#[derive(Debug, Clone, PartialEq)]
pub struct Knobs {
    card: &'static Card,
    /// One per knob of the card, in its order.
    values: Vec<Value>,
}

impl Knobs {
    /// The defaults of `card`.
    pub fn defaults(card: &'static Card) -> Self {
        Self {
            card,
            values: card.knobs.iter().map(|k| k.default.into()).collect(),
        }
    }

    /// The defaults of `card`, but for what `given` says.
    ///
    /// # Errors
    /// On a knob that there is not, and on a value outside its range.
    pub fn new(card: &'static Card, given: &BTreeMap<String, Value>) -> Result<Self, ChoiceError> {
        let mut knobs = Self::defaults(card);
        for (name, value) in given {
            let at = card.knobs.iter().position(|k| k.name == name);
            let at = at.ok_or_else(|| ChoiceError::Knob {
                method: card.name,
                name: name.clone(),
                known: card.knobs.iter().map(|k| k.name).collect(),
            })?;
            let knob = &card.knobs[at];
            knobs.values[at] = check(knob, value).map_err(|range| ChoiceError::Value {
                method: card.name,
                knob: knob.name,
                got: value.to_string(),
                kind: knob.kind.name(),
                range,
            })?;
        }
        Ok(knobs)
    }

    /// The card that they belong to.
    pub fn card(&self) -> &'static Card {
        self.card
    }

    /// Name and value of every knob, in the card's order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Value)> {
        self.card.knobs.iter().map(|k| k.name).zip(&self.values)
    }

    fn value(&self, name: &str) -> &Value {
        let at = self.card.knobs.iter().position(|k| k.name == name);
        &self.values[at.unwrap_or_else(|| panic!("`{}` has no knob `{name}`", self.card.name))]
    }

    /// The value of an `Int` knob.
    ///
    /// # Panics
    /// As all of these: when the card has no such knob of that kind, which is a mistake of the method.
    pub fn int(&self, name: &str) -> i64 {
        match self.value(name) {
            Value::Int(x) => *x,
            other => panic!("knob `{name}` is no int: {other}"),
        }
    }

    /// The value of an `Int` knob whose range starts at 0 or above.
    pub fn size(&self, name: &str) -> usize {
        usize::try_from(self.int(name)).expect("the card's range starts at 0 or above")
    }

    /// The value of a `Float` knob.
    pub fn float(&self, name: &str) -> f64 {
        match self.value(name) {
            Value::Float(x) => *x,
            other => panic!("knob `{name}` is no float: {other}"),
        }
    }

    /// The value of a `Bool` knob.
    pub fn bool(&self, name: &str) -> bool {
        match self.value(name) {
            Value::Bool(x) => *x,
            other => panic!("knob `{name}` is no bool: {other}"),
        }
    }

    /// The value of a `Choice`, `Profile` or `Text` knob; empty where that is the default.
    pub fn text(&self, name: &str) -> &str {
        match self.value(name) {
            Value::Text(x) => x,
            other => panic!("knob `{name}` is no text: {other}"),
        }
    }
}

/// `name,knob=value,...` with every knob in the card's order: the same settings give the same text.
impl fmt::Display for Knobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.card.name)?;
        self.iter()
            .try_for_each(|(name, value)| write!(f, ",{name}={value}"))
    }
}

/// `value` as `knob` holds it, or the values that it takes.
pub(super) fn check(knob: &Knob, value: &Value) -> Result<Value, String> {
    let checked = match (&knob.kind, value) {
        (Kind::Int { .. }, Value::Int(x)) => Some(Value::Int(*x)),
        (Kind::Int { .. }, Value::Text(x)) => x.trim().parse().ok().map(Value::Int),
        (Kind::Float { .. }, Value::Float(x)) => Some(Value::Float(*x)),
        (Kind::Float { .. }, Value::Int(x)) => Some(Value::Float(*x as f64)),
        (Kind::Float { .. }, Value::Text(x)) => x.trim().parse().ok().map(Value::Float),
        (Kind::Bool, Value::Bool(x)) => Some(Value::Bool(*x)),
        (Kind::Bool, Value::Text(x)) => x.trim().parse().ok().map(Value::Bool),
        (Kind::Choice(_) | Kind::Profile | Kind::Text, Value::Text(x)) => Some(Value::Text(x.clone())),
        (Kind::Choice(words), Value::Bool(x)) => {
            let word = x.to_string();
            words.contains(&word.as_str()).then_some(Value::Text(word))
        }
        (Kind::Text, other) => Some(Value::Text(other.to_string())),
        _ => None,
    };
    let fits = |value: &Value| match (&knob.kind, value) {
        (Kind::Int { min, max }, Value::Int(x)) => (min..=max).contains(&x),
        // Comparisons refuse what is no number.
        (Kind::Float { min, max }, Value::Float(x)) => x.is_finite() && within(*min, *max, *x),
        (Kind::Choice(words), Value::Text(x)) => words.contains(&x.as_str()),
        (Kind::Bool, _) => true,
        (Kind::Profile | Kind::Text, Value::Text(x)) => !x.contains(['\n', '\0']) && x.len() <= 4096,
        _ => false,
    };
    checked.filter(fits).ok_or_else(|| knob.kind.range())
}

fn within(min: Bound<f64>, max: Bound<f64>, x: f64) -> bool {
    (min, max).contains(&x)
}

#[cfg(test)]
mod tests {
    use super::super::card::{Axis, Paper};
    use super::super::choice::RawChoice;
    use super::*;

    const KNOBS: &[Knob] = &[
        knob("budget", Kind::int(1, 4096), Preset::Int(512)),
        knob("share", Kind::above(0.0, 1.0), Preset::Float(0.5)),
        knob("fold", Kind::Choice(&["none", "mean"]), Preset::Text("none")),
        knob("turns", Kind::Bool, Preset::Bool(false)),
    ];

    const fn knob(name: &'static str, kind: Kind, default: Preset) -> Knob {
        Knob {
            name,
            kind,
            default,
            unit: "",
            help: "For the test",
            source: "ours",
        }
    }

    const CARD: Card = Card {
        name: "example",
        title: "Example",
        axis: Axis::Kv,
        exact: false,
        summary: "Nothing but an example.",
        paper: Paper {
            title: "None",
            authors: "Nobody",
            year: 2026,
            reference: "none",
        },
        knobs: KNOBS,
        query_dependent: false,
        needs: &[],
        neutral: Some("budget=4096"),
        source: file!(),
    };

    fn knobs(text: &str) -> Result<Knobs, ChoiceError> {
        Knobs::new(const { &CARD }, &RawChoice::parse(text)?.knobs)
    }

    #[test]
    fn what_is_not_given_is_the_default() {
        static GOOD: Card = CARD;
        assert_eq!(GOOD.faults(), Vec::<String>::new());
        let k = knobs("example,share=1").unwrap();
        assert_eq!(
            (
                k.size("budget"),
                k.float("share"),
                k.text("fold"),
                k.bool("turns")
            ),
            (512, 1.0, "none", false)
        );
        assert_eq!(k.to_string(), "example,budget=512,share=1,fold=none,turns=false");
        // What is printed can be read back.
        assert_eq!(knobs(&k.to_string()).unwrap(), k);
    }

    #[test]
    fn values_outside_their_range_are_refused_with_the_range() {
        for (text, hint) in [
            ("example,budget=0", "int, 1 to 4096"),
            ("example,budget=1.5", "int, 1 to 4096"),
            ("example,budget=99999999999999999999", "int, 1 to 4096"),
            ("example,share=0", "above 0, up to 1"),
            ("example,share=nan", "above 0, up to 1"),
            ("example,share=inf", "above 0, up to 1"),
            ("example,fold=max", "choice, none, mean"),
            ("example,turns=1", "true or false"),
            ("example,size=1", "choose from budget, share, fold, turns"),
            ("example,budget=1,budget=2", "given twice"),
        ] {
            let error = knobs(text).unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn a_faulty_card_is_told() {
        static UNLIKELY: Card = Card {
            neutral: Some("budget=0"),
            summary: "no sentence",
            ..CARD
        };
        assert_eq!(UNLIKELY.faults().len(), 2, "{:?}", UNLIKELY.faults());
        static WRONG: Card = Card {
            knobs: &[
                knob("x", Kind::int(1, 2), Preset::Int(3)),
                knob("x", Kind::Bool, Preset::Bool(true)),
            ],
            neutral: None,
            ..CARD
        };
        assert_eq!(WRONG.faults().len(), 2, "{:?}", WRONG.faults());
    }
}
