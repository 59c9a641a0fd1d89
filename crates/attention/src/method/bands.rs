//! Which methods hold by the length of a prompt: profiles such as `antefix tune` writes.
//!
//! ```toml
//! model = "qwen2.5-coder-0.5b" # optional: refused with another
//!
//! [[band]]                     # below 4096 tokens: dense
//! below = 4096
//! prefill = "dense"
//!
//! [[band]]
//! from = 4096
//! prefill = "flexprefill,gamma=0.95"
//! decode = "tidaldecode"
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use super::choice::RawMethods;
use super::facts::Facts;
use super::knobs::ChoiceError;
use super::program::Program;
use super::rig::{Profiles, Rig, RigError};
use super::{Method, Trust};

/// Methods of prompts of some lengths, as somebody wrote them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Band {
    /// Tokens of the shortest prompts that it is for.
    #[serde(default)]
    pub from: usize,
    /// Prompts of so many tokens and more are beyond it; `None`: it has no end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<usize>,
    /// The methods; the axes that it leaves out are somebody else's to choose.
    #[serde(flatten)]
    pub methods: RawMethods,
}

impl Band {
    /// Whether prompts of `tokens` tokens are its own.
    pub fn holds(&self, tokens: usize) -> bool {
        self.from <= tokens && self.below.is_none_or(|below| tokens < below)
    }

    /// Whether some prompts belong to both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let ends_behind = |a: &Self, b: &Self| a.below.is_none_or(|below| below > b.from);
        ends_behind(self, other) && ends_behind(other, self)
    }

    /// Its lengths: `from 4096`, `from 4096 to below 16384`.
    pub fn lengths(&self) -> String {
        match self.below {
            None => format!("from {}", self.from),
            Some(below) => format!("from {} to below {below}", self.from),
        }
    }
}

/// Lengths and methods in a line.
impl fmt::Display for Band {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "prompts {}", self.lengths())?;
        let each = self.methods.0.iter().enumerate();
        each.into_iter().try_for_each(|(i, (axis, raw))| {
            let before = if i == 0 { ": " } else { "; " };
            write!(f, "{before}{axis} = {raw}")
        })
    }
}

/// Why bands are no profile, or not one of this model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BandError {
    /// Nothing in it.
    #[error("there is no band in it\nhint: write `[[band]]`, `from = 4096`, `prefill = \"flexprefill\"`")]
    None,
    /// Ends before it begins.
    #[error("the band {0} holds no length")]
    Empty(String),
    /// Two bands for one length.
    #[error(
        "the bands {first} and {second} overlap\nhint: `from` is the first length of a band, `below` the first one beyond it"
    )]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The other.
        second: String,
    },
    /// A method that there is not, or a wrong setting.
    #[error("in the band {band}: {error}")]
    Choice {
        /// Its lengths.
        band: String,
        /// What is wrong.
        error: ChoiceError,
    },
    /// Methods that do not go together or do not fit the model.
    #[error("in the band {band}: {error}")]
    Rig {
        /// Its lengths.
        band: String,
        /// What is wrong.
        error: RigError,
    },
}

/// Bands that do not overlap, by ascending length. There may be lengths between them that are nobody's.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Bands(Vec<Band>);

impl Bands {
    /// Puts `bands` in order.
    ///
    /// # Errors
    /// When there are none, one is empty, or two overlap.
    pub fn new(mut bands: Vec<Band>) -> Result<Self, BandError> {
        if bands.is_empty() {
            return Err(BandError::None);
        }
        bands.sort_by_key(|band| band.from);
        if let Some(band) = bands.iter().find(|band| !band.holds(band.from)) {
            return Err(BandError::Empty(band.lengths()));
        }
        match bands.windows(2).find(|pair| pair[0].overlaps(&pair[1])) {
            None => Ok(Self(bands)),
            Some(pair) => Err(BandError::Overlap {
                first: pair[0].lengths(),
                second: pair[1].lengths(),
            }),
        }
    }

    /// Whether nothing holds for any length.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, by ascending length.
    pub fn all(&self) -> &[Band] {
        &self.0
    }

    /// The band of prompts of `tokens` tokens.
    pub fn at(&self, tokens: usize) -> Option<&Band> {
        self.0.iter().find(|band| band.holds(tokens))
    }

    /// Checks names and knobs against the methods there are.
    ///
    /// # Errors
    /// The first thing that is wrong, with its band.
    pub fn check(&self, known: &[&'static dyn Method], trust: Trust) -> Result<(), BandError> {
        self.0.iter().try_for_each(|band| {
            let resolved = band.methods.resolve(known, trust);
            resolved.map(drop).map_err(|error| BandError::Choice {
                band: band.lengths(),
                error,
            })
        })
    }

    /// Checks that each band, with `defaults` where it says nothing, can run on a model.
    ///
    /// # Errors
    /// As [`Bands::check`], and when methods do not go together or do not fit the model.
    pub fn fit(
        &self,
        (known, trust): (&[&'static dyn Method], Trust),
        (facts, profiles): (&Facts, &Profiles),
        defaults: &RawMethods,
    ) -> Result<(), BandError> {
        self.check(known, trust)?;
        for band in &self.0 {
            let lengths = || band.lengths();
            let methods = band.methods.clone().or(defaults);
            let chosen = methods.resolve(known, trust).map_err(|error| BandError::Choice {
                band: lengths(),
                error,
            })?;
            let fits: Result<Program, RigError> = Rig::assemble(facts, profiles, &chosen);
            fits.map_err(|error| BandError::Rig {
                band: lengths(),
                error,
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::card::Axis;
    use super::super::choice::RawChoice;
    use super::*;

    fn band(from: usize, below: Option<usize>) -> Band {
        Band {
            from,
            below,
            ..Band::default()
        }
    }

    #[test]
    fn each_length_has_at_most_one_band() {
        let bands = Bands::new(vec![
            band(4096, None),
            band(0, Some(1000)),
            band(1000, Some(2000)),
        ])
        .unwrap();
        let at = |tokens| bands.at(tokens).map(|b| b.from);
        assert_eq!(
            [0, 999, 1000, 1999, 2000, 4095, 4096, usize::MAX].map(at),
            [
                Some(0),
                Some(0),
                Some(1000),
                Some(1000),
                None,
                None,
                Some(4096),
                Some(4096)
            ]
        );
    }

    #[test]
    fn overlapping_and_empty_bands_are_refused_with_their_lengths() {
        for (bands, why) in [
            (vec![], "no band"),
            (vec![band(5, Some(5))], "from 5 to below 5"),
            (vec![band(0, None), band(10, None)], "from 0 and from 10 overlap"),
            (
                vec![band(10, None), band(0, Some(11))],
                "from 0 to below 11 and from 10 overlap",
            ),
            (vec![band(3, Some(9)), band(3, Some(9))], "overlap"),
        ] {
            let error = Bands::new(bands).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_band_is_read_from_one_table_and_says_what_it_holds() {
        let text =
            r#"{"from": 4096, "below": 8192, "kv": {"name": "example", "budget": 3}, "prefill": "dense"}"#;
        let read: Band = serde_json::from_str(text).unwrap();
        assert_eq!((read.from, read.below), (4096, Some(8192)));
        assert_eq!(read.methods.0[&Axis::Prefill], RawChoice::parse("dense").unwrap());
        assert_eq!(
            read.to_string(),
            "prompts from 4096 to below 8192: prefill = dense; kv = example,budget=3"
        );
        let error = serde_json::from_str::<Band>(r#"{"from": 4096, "prefil": "dense"}"#).unwrap_err();
        assert!(
            error.to_string().contains("`prefil`, expected one of `prefill`"),
            "{error}"
        );
    }
}
