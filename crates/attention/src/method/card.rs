//! What a method says about itself: everything that help texts, routes, documentation pages and tests need to know of it.

use std::fmt;
use std::ops::Bound;

/// What a method changes. A request has at most one method on each axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Which keys the rows of a prompt read.
    Prefill,
    /// Which keys a drawn token reads.
    Decode,
    /// What the cache keeps once the prompt is computed.
    Kv,
    /// What the prompt is made of before it is computed.
    Context,
    /// How positions become angles, and how scores are scaled.
    Geometry,
    /// Which activations are read or edited.
    Hooks,
    /// How the engine computes whatever was asked for: what stands here always runs, and no request chooses it.
    #[serde(skip_deserializing)]
    Execution,
    /// How models are trained, or a layer that is: `antefix train` and its kin run it, and no request chooses it.
    #[serde(skip_deserializing)]
    Training,
}

impl Axis {
    /// Those on which a request chooses, in the order of the documentation.
    pub const ALL: [Self; 6] = [
        Self::Prefill,
        Self::Decode,
        Self::Kv,
        Self::Context,
        Self::Geometry,
        Self::Hooks,
    ];

    /// The name people write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Kv => "kv",
            Self::Context => "context",
            Self::Geometry => "geometry",
            Self::Hooks => "hooks",
            Self::Execution => "execution",
            Self::Training => "training",
        }
    }

    /// The axis of this name, of those on which a request chooses.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|axis| axis.name() == name)
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which values a knob takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Whole numbers from `min` to `max`, both included.
    Int {
        /// Least.
        min: i64,
        /// Greatest.
        max: i64,
    },
    /// Real numbers between two bounds.
    Float {
        /// Lower bound.
        min: Bound<f64>,
        /// Upper bound.
        max: Bound<f64>,
    },
    /// `true` or `false`.
    Bool,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A profile that was measured on a model, such as a table of heads: its name in the profile folder, or, on the command line, the
    /// path of a file.
    Profile,
    /// Free text that the method itself parses when it is installed.
    Text,
}

impl Kind {
    /// Whole numbers from `min` to `max`.
    pub const fn int(min: i64, max: i64) -> Self {
        Self::Int { min, max }
    }

    /// Real numbers from `min` to `max`, both included.
    pub const fn float(min: f64, max: f64) -> Self {
        Self::Float {
            min: Bound::Included(min),
            max: Bound::Included(max),
        }
    }

    /// Real numbers above `min`, up to and including `max`.
    pub const fn above(min: f64, max: f64) -> Self {
        Self::Float {
            min: Bound::Excluded(min),
            max: Bound::Included(max),
        }
    }

    /// `int`, `float`, `bool`, `choice`, `profile` or `text`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Int { .. } => "int",
            Self::Float { .. } => "float",
            Self::Bool => "bool",
            Self::Choice(_) => "choice",
            Self::Profile => "profile",
            Self::Text => "text",
        }
    }

    /// The values it takes, for people: `1 to 64`, `above 0, up to 1`, `mean, lnN`.
    pub fn range(&self) -> String {
        match self {
            Self::Int { min, max } if *max == i64::MAX => format!("{min} or more"),
            Self::Int { min, max } => format!("{min} to {max}"),
            Self::Float { min, max } => match (min, max) {
                (Bound::Included(lo), Bound::Included(hi)) => format!("{lo} to {hi}"),
                (lo, hi) => {
                    let lo = match lo {
                        Bound::Included(lo) => Some(format!("{lo} or more")),
                        Bound::Excluded(lo) => Some(format!("above {lo}")),
                        Bound::Unbounded => None,
                    };
                    let hi = match hi {
                        Bound::Included(hi) => Some(format!("up to {hi}")),
                        Bound::Excluded(hi) => Some(format!("below {hi}")),
                        Bound::Unbounded => None,
                    };
                    let both: Vec<String> = lo.into_iter().chain(hi).collect();
                    if both.is_empty() {
                        "any number".into()
                    } else {
                        both.join(", ")
                    }
                }
            },
            Self::Bool => "true or false".into(),
            Self::Choice(words) => words.join(", "),
            Self::Profile => "name of a profile".into(),
            Self::Text => "text".into(),
        }
    }
}

/// A value as a card writes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Preset {
    /// A whole number.
    Int(i64),
    /// A real number.
    Float(f64),
    /// A switch.
    Bool(bool),
    /// A word, a profile or a text.
    Text(&'static str),
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(x) => x.fmt(f),
            Self::Float(x) => x.fmt(f),
            Self::Bool(x) => x.fmt(f),
            Self::Text(x) => f.write_str(x),
        }
    }
}

/// One setting of a method.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Knob {
    /// Its name, as people write it.
    pub name: &'static str,
    /// The values it takes.
    pub kind: Kind,
    /// What holds when nobody says otherwise.
    pub default: Preset,
    /// `tokens`, `rows`, `heads` or the like; empty for plain numbers and words.
    pub unit: &'static str,
    /// One line that says what it does.
    pub help: &'static str,
    /// Where the default comes from: a section or table of the paper, its code, or `ours`.
    pub source: &'static str,
}

/// Where a method was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paper {
    /// Title.
    pub title: &'static str,
    /// Authors, short: `Xiao et al.`
    pub authors: &'static str,
    /// Year.
    pub year: u16,
    /// Where: `arXiv 2309.17453`.
    pub reference: &'static str,
}

/// What must be there before a method can be installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A profile of the model at hand, of this kind, such as `heads`.
    Profile(&'static str),
    /// Documents beside the question.
    Documents,
}

/// What a method is. One value per method, known at compile time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Card {
    /// The name people write, a module's name: `streaming_llm`.
    pub name: &'static str,
    /// The name people read: `StreamingLLM`.
    pub title: &'static str,
    /// What it changes.
    pub axis: Axis,
    /// Whether the answers are those of dense attention over the prompt that is computed, bit for bit.
    pub exact: bool,
    /// One sentence.
    pub summary: &'static str,
    /// Where it comes from.
    pub paper: Paper,
    /// Its settings, in the order of the documentation.
    pub knobs: &'static [Knob],
    /// Whether what it keeps depends on the question, so that it cannot be kept for the next one.
    pub query_dependent: bool,
    /// What it needs.
    pub needs: &'static [Need],
    /// Settings, as on the command line, with which it changes nothing: `sinks=4,recent=1048576`. `None` if there are none.
    pub neutral: Option<&'static str>,
    /// The file whose module documentation is its page: `file!()`.
    pub source: &'static str,
}

impl Card {
    /// The knob of this name.
    pub fn knob(&self, name: &str) -> Option<&'static Knob> {
        self.knobs.iter().find(|k| k.name == name)
    }

    /// What is wrong with the card itself; empty when it is in order. A test asks this of every card.
    pub fn faults(&'static self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut need = |ok: bool, what: String| {
            if !ok {
                faults.push(format!("`{}`: {what}", self.name));
            }
        };
        let word = |s: &str| {
            s.starts_with(|c: char| c.is_ascii_lowercase())
                && s.chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        need(word(self.name), "the name is no module's name".into());
        need(!self.title.is_empty(), "the title is empty".into());
        need(self.summary.ends_with('.'), "the summary is no sentence".into());
        need(
            self.paper.year > 1990 && !self.paper.title.is_empty(),
            "the paper is not named".into(),
        );
        need(
            self.source.ends_with(".rs"),
            "`source` is no file: write `file!()`".into(),
        );
        for (i, knob) in self.knobs.iter().enumerate() {
            let name = knob.name;
            let new = self.knobs[..i].iter().all(|k| k.name != name);
            // Methods write some names as their papers do: `T`, `S`.
            need(
                !name.is_empty() && !name.contains([',', '=', ' ']),
                format!("knob `{name}` has no name that can be written"),
            );
            need(
                new && name != "name",
                format!("knob `{name}` is there twice, or is called `name`"),
            );
            need(
                !knob.help.is_empty() && !knob.source.is_empty(),
                format!("knob `{name}` lacks its help or the source of its default"),
            );
            if let Err(fault) = super::knobs::check(knob, &knob.default.into()) {
                need(false, format!("the default of knob `{name}`: {fault}"));
            }
        }
        if let Some(neutral) = self.neutral {
            let fault = super::choice::RawChoice::parse(&format!("{},{neutral}", self.name))
                .and_then(|raw| super::knobs::Knobs::new(self, &raw.knobs))
                .err();
            need(
                fault.is_none() && !neutral.is_empty(),
                format!("the neutral settings `{neutral}`: {fault:?}"),
            );
        }
        faults
    }
}
