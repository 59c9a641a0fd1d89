//! Profiles of heads: what was measured of every head of a model, in one file format for all methods that choose heads.

use antefix_attention::method::Facts;
use serde::{Deserialize, Serialize};

mod choose;

pub use choose::{HEADS, KIND, Measured, choose, load, parse_heads, profile_knob};

/// The first field of every profile.
pub const FORMAT: &str = "antefix heads 1";

/// What was measured of the heads of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadProfile {
    /// [`FORMAT`]
    pub format: String,
    /// Name of the model.
    pub model: String,
    /// SHA-256 of its file, in hexadecimal digits.
    pub sha256: String,
    /// Version of the engine and its kernels' path.
    pub engine: String,
    /// Layers `L`.
    pub layers: usize,
    /// Query heads `Hq`.
    pub heads: usize,
    /// Key/value heads `Hk`.
    pub kv_heads: usize,
    /// Layers with a sliding window: their heads cannot read far, whatever they are good for.
    pub local_layers: Vec<usize>,
    /// Measurements, one of a name.
    pub tests: Vec<HeadTest>,
}

/// One measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadTest {
    /// `retrieval`, `semantic`, `induction`, `echo`, `sink`, ...
    pub name: String,
    /// What was run, in words.
    pub what: String,
    /// Runs made.
    pub runs: usize,
    /// Runs that count: those in which the model did what was asked.
    pub accepted: usize,
    /// Shortest and longest prompt, tokens.
    pub tokens: [usize; 2],
    /// Seed of the data.
    pub seed: u64,
    /// `[L][Hq]`
    pub score: Vec<Vec<f32>>,
    /// Fraction of the accepted runs in which the head scored at all, `[L][Hq]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active: Option<Vec<Vec<f32>>>,
    /// Rank correlation between the scores of the two halves of the runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub half_spearman: Option<f64>,
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// Not JSON of this form.
    #[error("not a profile of heads: {0}")]
    Json(#[from] serde_json::Error),
    /// Another format.
    #[error("the profile's format is `{got}`, `{FORMAT}` is read")]
    Format {
        /// What it says.
        got: String,
    },
    /// A table of another shape than the profile says.
    #[error("the scores of `{test}` are not {layers} layers of {heads} heads")]
    Shape {
        /// Which measurement.
        test: String,
        /// Layers of the profile.
        layers: usize,
        /// Heads of the profile.
        heads: usize,
    },
    /// Made on a model of another shape.
    #[error("the profile is of {got:?} layers, heads and key/value heads, the model has {want:?}")]
    Model {
        /// Of the profile.
        got: [usize; 3],
        /// Of the model.
        want: [usize; 3],
    },
    /// Not measured.
    #[error("the profile has no `{name}`, only {have}")]
    Missing {
        /// What was wanted.
        name: String,
        /// What there is.
        have: String,
    },
}

/// A head with its score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ranked {
    /// Layer.
    pub layer: usize,
    /// Head.
    pub head: usize,
    /// Its score.
    pub score: f32,
}

impl HeadProfile {
    /// A made-up profile of a model for tests: measurements by name with their scores `[L][Hq]`.
    pub fn example<'a>(facts: &Facts, scores: impl IntoIterator<Item = (&'a str, Vec<Vec<f32>>)>) -> Self {
        let test = |(name, score): (&str, _)| HeadTest {
            name: name.into(),
            what: "made up".into(),
            runs: 1,
            accepted: 1,
            tokens: [10, 10],
            seed: 0,
            score,
            active: None,
            half_spearman: None,
        };
        let local = facts
            .layers
            .iter()
            .enumerate()
            .filter(|(_, l)| l.window.is_some());
        Self {
            format: FORMAT.into(),
            model: facts.name.clone(),
            sha256: String::new(),
            engine: String::new(),
            layers: facts.layers.len(),
            heads: facts.heads,
            kv_heads: facts.kv_heads,
            local_layers: local.map(|(l, _)| l).collect(),
            tests: scores.into_iter().map(test).collect(),
        }
    }

    /// The same with every measurement that a method may ask for, of scores above 0 that follow from the seed alone.
    pub fn made_up(facts: &Facts, seed: u64) -> Self {
        const MEASURED: [&str; 7] = [
            "act",
            "retrieval",
            "semantic",
            "induction",
            "echo",
            "sink",
            "eviction",
        ];
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut row = || (0..facts.heads).map(|_| 0.1 + rng.f32()).collect();
        let mut table = || (0..facts.layers.len()).map(|_| row()).collect();
        Self::example(facts, MEASURED.map(|name| (name, table())))
    }

    /// Reads a profile and checks it against a model of `layers`, `heads` and `kv_heads`.
    ///
    /// # Errors
    /// See [`ProfileError`].
    pub fn parse(text: &str, [layers, heads, kv_heads]: [usize; 3]) -> Result<Self, ProfileError> {
        let profile: Self = serde_json::from_str(text)?;
        if profile.format != FORMAT {
            return Err(ProfileError::Format { got: profile.format });
        }
        let got = [profile.layers, profile.heads, profile.kv_heads];
        if got != [layers, heads, kv_heads] {
            let want = [layers, heads, kv_heads];
            return Err(ProfileError::Model { got, want });
        }
        for test in &profile.tests {
            if test.score.len() != layers || test.score.iter().any(|row| row.len() != heads) {
                let test = test.name.clone();
                return Err(ProfileError::Shape { test, layers, heads });
            }
        }
        Ok(profile)
    }

    /// The measurement of this name.
    ///
    /// # Errors
    /// When it was not made.
    pub fn test(&self, name: &str) -> Result<&HeadTest, ProfileError> {
        self.tests.iter().find(|t| t.name == name).ok_or_else(|| {
            let have: Vec<&str> = self.tests.iter().map(|t| t.name.as_str()).collect();
            ProfileError::Missing {
                name: name.to_owned(),
                have: have.join(", "),
            }
        })
    }

    /// Adds a measurement, in place of one of the same name.
    pub fn put(&mut self, test: HeadTest) {
        self.tests.retain(|t| t.name != test.name);
        self.tests.push(test);
    }
}

impl HeadTest {
    /// All heads, best first, ties in the order of layers and heads.
    pub fn ranking(&self) -> Vec<Ranked> {
        ranking(&self.score)
    }

    /// Scores of the key/value heads, `[L][Hk]`: the best of each group's query heads.
    pub fn of_kv_heads(&self, kv_heads: usize) -> Vec<Vec<f32>> {
        let best = |group: &[f32]| group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let row = |row: &Vec<f32>| row.chunks((row.len() / kv_heads).max(1)).map(best).collect();
        self.score.iter().map(row).collect()
    }
}

/// All cells of a table `[L][H]`, largest first, ties in the order of layers and heads.
pub fn ranking(score: &[Vec<f32>]) -> Vec<Ranked> {
    let cells = score.iter().enumerate().flat_map(|(layer, row)| {
        let ranked = move |(head, &score): (usize, &f32)| Ranked { layer, head, score };
        row.iter().enumerate().map(ranked)
    });
    let mut all: Vec<Ranked> = cells.collect();
    all.sort_by(|a, b| {
        b.score
            .total_cmp(&a.score)
            .then((a.layer, a.head).cmp(&(b.layer, b.head)))
    });
    all
}

/// Spearman's rank correlation, ties sharing their mean rank; 0 if one side is constant.
pub fn spearman(a: &[f32], b: &[f32]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let n = a.len().min(b.len());
    let mean = (n as f64 - 1.0) / 2.0;
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(&b) {
        ab += (a - mean) * (b - mean);
        aa += (a - mean) * (a - mean);
        bb += (b - mean) * (b - mean);
    }
    if aa == 0.0 || bb == 0.0 {
        0.0
    } else {
        ab / (aa * bb).sqrt()
    }
}

fn ranks(values: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut from = 0;
    while from < order.len() {
        let same = order[from..]
            .iter()
            .take_while(|&&i| values[i] == values[order[from]]);
        let to = from + same.count().max(1);
        let mean = (from + to - 1) as f64 / 2.0;
        order[from..to].iter().for_each(|&i| ranks[i] = mean);
        from = to;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> HeadProfile {
        HeadProfile {
            format: FORMAT.into(),
            model: "m".into(),
            sha256: "0".into(),
            engine: "e".into(),
            layers: 2,
            heads: 4,
            kv_heads: 2,
            local_layers: vec![],
            tests: vec![HeadTest {
                name: "retrieval".into(),
                what: "w".into(),
                runs: 3,
                accepted: 2,
                tokens: [10, 20],
                seed: 1,
                score: vec![vec![0.5, 0.0, 0.25, 0.5], vec![0.0, 0.75, 0.0, 0.0]],
                active: None,
                half_spearman: None,
            }],
        }
    }

    #[test]
    fn a_profile_is_read_back_and_checked() {
        let text = serde_json::to_string(&profile()).unwrap();
        assert_eq!(HeadProfile::parse(&text, [2, 4, 2]).unwrap(), profile());
        let wrong = |text: &str, shape| HeadProfile::parse(text, shape).unwrap_err().to_string();
        assert!(wrong(&text, [3, 4, 2]).contains("[2, 4, 2]"));
        assert!(wrong("{}", [2, 4, 2]).contains("not a profile"));
        assert!(wrong(&text.replace("heads 1", "heads 9"), [2, 4, 2]).contains("heads 9"));
        assert!(wrong(&text.replace("[0.5,0.0", "[0.0"), [2, 4, 2]).contains("2 layers of 4 heads"));
        let missing = profile().test("echo").unwrap_err().to_string();
        assert!(missing.contains("no `echo`, only retrieval"), "{missing}");
    }

    #[test]
    fn heads_are_ranked_and_groups_take_their_best() {
        let p = profile();
        let test = p.test("retrieval").unwrap();
        let order: Vec<_> = test.ranking().iter().take(4).map(|r| (r.layer, r.head)).collect();
        assert_eq!(order, [(1, 1), (0, 0), (0, 3), (0, 2)]);
        assert_eq!(test.of_kv_heads(2), [[0.5, 0.5], [0.75, 0.0]]);
    }

    #[test]
    fn rank_correlation() {
        assert!((spearman(&[1.0, 2.0, 3.0, 4.0], &[10.0, 20.0, 30.0, 45.0]) - 1.0).abs() < 1e-12);
        assert!((spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        // Ranks 0.5 0.5 2 3 and 0 1 2 3: 4.5 / sqrt(4.5 * 5).
        assert!(
            (spearman(&[0.0, 0.0, 5.0, 9.0], &[1.0, 2.0, 3.0, 4.0]) - 4.5 / (4.5f64 * 5.0).sqrt()).abs()
                < 1e-12
        );
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
        assert_eq!(spearman(&[], &[]), 0.0);
    }
}
