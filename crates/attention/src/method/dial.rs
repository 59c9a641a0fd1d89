//! Knobs by which a method is tuned.

use super::card::{Card, Kind};
use super::knobs::{Value, check};

/// A knob that trades cost for quality, and the values that are worth trying.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dial {
    /// A knob with whole or real numbers.
    pub knob: &'static str,
    /// Least value.
    pub from: f64,
    /// Greatest value.
    pub to: f64,
}

/// Values from a factor of this on are tried in equal factors, others in equal steps.
const FACTORS: f64 = 8.0;

impl Dial {
    /// What is wrong with it on `card`; `None` if nothing is.
    pub fn fault(&self, card: &Card) -> Option<String> {
        let Some(knob) = card.knob(self.knob) else {
            return Some(format!("`{}` has no knob `{}`", card.name, self.knob));
        };
        if !matches!(knob.kind, Kind::Int { .. } | Kind::Float { .. }) {
            return Some(format!("knob `{}` holds no numbers", self.knob));
        }
        let outside = |x: f64| check(knob, &number(knob.kind, x)).is_err();
        let ordered = self.from < self.to;
        (!ordered || outside(self.from) || outside(self.to)).then(|| {
            format!(
                "`{}`: {} to {} are no values of knob `{}`: {}, {}",
                card.name,
                self.from,
                self.to,
                self.knob,
                knob.kind.name(),
                knob.kind.range()
            )
        })
    }

    /// The value at `place`, 0 to 1: whole where the knob of `card` takes whole numbers, otherwise of three digits.
    pub fn value(&self, card: &Card, place: f64) -> Value {
        let place = place.clamp(0.0, 1.0);
        let x = match self.from > 0.0 && self.to / self.from >= FACTORS {
            true => self.from * (self.to / self.from).powf(place),
            false => self.from + (self.to - self.from) * place,
        };
        let kind = card.knob(self.knob).map_or(Kind::Text, |knob| knob.kind);
        number(kind, x)
    }
}

/// `x` as a knob of this kind takes it: whole, or of three digits.
fn number(kind: Kind, x: f64) -> Value {
    if matches!(kind, Kind::Int { .. }) {
        return Value::Int(x.round() as i64);
    }
    // The text of three digits is read back: no digits that nobody asked for.
    let digits = format!("{x:.2e}").parse().unwrap_or(x);
    Value::Float(digits)
}

#[cfg(test)]
mod tests {
    use super::super::card::{Axis, Knob, Paper, Preset};
    use super::*;

    static CARD: Card = Card {
        name: "example",
        title: "Example",
        axis: Axis::Prefill,
        exact: false,
        summary: "Nothing but an example.",
        paper: Paper {
            title: "None",
            authors: "Nobody",
            year: 2026,
            reference: "none",
        },
        knobs: &[
            knob("keep", Kind::int(2, 1024), Preset::Int(24)),
            knob("gamma", Kind::above(0.0, 1.0), Preset::Float(0.95)),
            knob("turns", Kind::Bool, Preset::Bool(false)),
        ],
        query_dependent: false,
        needs: &[],
        neutral: None,
        source: file!(),
    };

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

    const fn dial(knob: &'static str, from: f64, to: f64) -> Dial {
        Dial { knob, from, to }
    }

    #[test]
    fn values_lie_between_the_ends_in_steps_or_factors() {
        let keep = dial("keep", 4.0, 400.0);
        let at = |dial: &Dial, place| dial.value(&CARD, place);
        assert_eq!(
            [0.0, 0.5, 1.0, 9.0].map(|place| at(&keep, place)),
            [4, 40, 400, 400].map(Value::Int)
        );
        let gamma = dial("gamma", 0.5, 0.99);
        assert_eq!(
            [0.0, 1.0 / 3.0, 1.0].map(|place| at(&gamma, place)),
            [0.5, 0.663, 0.99].map(Value::Float)
        );
    }

    #[test]
    fn dials_are_numbers_of_the_card() {
        assert_eq!(dial("keep", 2.0, 1024.0).fault(&CARD), None);
        assert_eq!(dial("gamma", 0.1, 1.0).fault(&CARD), None);
        for (bad, why) in [
            (dial("size", 1.0, 2.0), "has no knob `size`"),
            (dial("turns", 0.0, 1.0), "holds no numbers"),
            (dial("keep", 1.0, 24.0), "int, 2 to 1024"),
            (dial("keep", 8.0, 4.0), "8 to 4 are no values"),
            (dial("gamma", f64::NAN, 1.0), "are no values"),
        ] {
            let fault = bad.fault(&CARD).expect(why);
            assert!(fault.contains(why), "{fault}");
        }
    }
}
