//! Which methods a request asks for: what people write, and what it means.
//!
//! The same three forms hold on the command line, in TOML and over HTTP: `compresskv,budget=512`, a table
//! `{name = "compresskv", budget = 512}`, and a table of those by axis, `{kv = ..., geometry = ...}`.

use std::collections::BTreeMap;

use super::card::{Axis, Card};
use super::knobs::{ChoiceError, Knobs, Value};
use super::{Method, Trust};

/// The word that asks for no method on an axis, where a default would hold otherwise.
pub const DENSE: &str = "dense";

/// One method as somebody wrote it: nothing is checked.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RawChoice {
    /// Name of a method.
    pub name: String,
    /// Settings; what is missing is the default.
    pub knobs: BTreeMap<String, Value>,
}

impl RawChoice {
    /// Reads `NAME[,knob=value...]`.
    ///
    /// # Errors
    /// When it has another form.
    pub fn parse(text: &str) -> Result<Self, ChoiceError> {
        let syntax = || ChoiceError::Syntax {
            text: text.to_string(),
        };
        let mut words = text.split(',').map(str::trim);
        let name = words
            .next()
            .filter(|n| !n.is_empty() && !n.contains('='))
            .ok_or_else(syntax)?;
        let mut knobs = BTreeMap::new();
        for word in words {
            let (knob, value) = word.split_once('=').ok_or_else(syntax)?;
            let (knob, value) = (knob.trim().to_string(), Value::Text(value.trim().to_string()));
            if knobs.insert(knob.clone(), value).is_some() {
                return Err(ChoiceError::KnobTwice {
                    method: name.to_string(),
                    knob,
                });
            }
        }
        Ok(Self {
            name: name.to_string(),
            knobs,
        })
    }
}

/// The form that [`RawChoice::parse`] reads.
impl std::fmt::Display for RawChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        self.knobs
            .iter()
            .try_for_each(|(knob, value)| write!(f, ",{knob}={value}"))
    }
}

impl serde::Serialize for RawChoice {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for RawChoice {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(
            untagged,
            expecting = "a method is `NAME,knob=value,...` or a table with `name` and its knobs"
        )]
        enum Form {
            Text(String),
            Table {
                name: String,
                #[serde(flatten)]
                knobs: BTreeMap<String, Value>,
            },
        }
        match Form::deserialize(from)? {
            Form::Text(text) => Self::parse(&text).map_err(serde::de::Error::custom),
            Form::Table { name, knobs } => Ok(Self { name, knobs }),
        }
    }
}

/// At most one method an axis, as somebody wrote it.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct RawMethods(pub BTreeMap<Axis, RawChoice>);

impl RawMethods {
    /// Reads what one `--method` says, `NAME[,knob=value...]` or a JSON table by axis, and adds it.
    ///
    /// # Errors
    /// When it has another form, names no method of `known`, or an axis that has one already.
    pub fn add(&mut self, known: &[&dyn Method], text: &str) -> Result<(), ChoiceError> {
        if text.trim_start().starts_with('{') {
            let table: Self = serde_json::from_str(text).map_err(|e| ChoiceError::Json {
                problem: e.to_string(),
            })?;
            return table
                .0
                .into_iter()
                .try_for_each(|(axis, raw)| self.put(axis, raw));
        }
        let raw = RawChoice::parse(text)?;
        let axis = find(known, &raw.name)?.card().axis;
        self.put(axis, raw)
    }

    fn put(&mut self, axis: Axis, raw: RawChoice) -> Result<(), ChoiceError> {
        match self.0.get(&axis) {
            Some(first) => Err(ChoiceError::Twice {
                axis: axis.name(),
                first: first.name.clone(),
                second: raw.name,
            }),
            None => {
                self.0.insert(axis, raw);
                Ok(())
            }
        }
    }

    /// What `self` says, and on the axes about which it says nothing, what `defaults` says.
    #[must_use]
    pub fn or(mut self, defaults: &Self) -> Self {
        for (&axis, raw) in &defaults.0 {
            self.0.entry(axis).or_insert_with(|| raw.clone());
        }
        self
    }

    /// Checks names, axes and knobs against the methods there are.
    ///
    /// # Errors
    /// The first thing that is wrong, with what would be right.
    pub fn resolve(&self, known: &[&'static dyn Method], trust: Trust) -> Result<Vec<Chosen>, ChoiceError> {
        let asked = self.0.iter().filter(|(_, raw)| raw.name != DENSE);
        asked
            .map(|(&axis, raw)| {
                let method = find(known, &raw.name)?;
                let card = method.card();
                if card.axis != axis {
                    return Err(ChoiceError::Axis {
                        name: raw.name.clone(),
                        is: card.axis.name(),
                        asked: axis.name(),
                    });
                }
                let knobs = Knobs::new(card, &raw.knobs)?;
                trust.check(&knobs)?;
                Ok(Chosen { method, knobs })
            })
            .collect()
    }
}

/// A method with its settings, both valid.
#[derive(Clone)]
pub struct Chosen {
    /// The method.
    pub method: &'static dyn Method,
    /// Its settings.
    pub knobs: Knobs,
}

impl Chosen {
    /// The method's card.
    pub fn card(&self) -> &'static Card {
        self.method.card()
    }
}

impl std::fmt::Debug for Chosen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.knobs.fmt(f)
    }
}

/// The method of this name.
///
/// # Errors
/// When there is none; the error lists the names.
pub fn find<'m>(known: &[&'m dyn Method], name: &str) -> Result<&'m dyn Method, ChoiceError> {
    let found = known.iter().find(|m| m.card().name == name).copied();
    found.ok_or_else(|| ChoiceError::Method {
        name: name.to_string(),
        known: known.iter().map(|m| m.card().name).collect(),
    })
}
