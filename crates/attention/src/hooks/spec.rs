//! What to read and what to change: the JSON that users write, the same in Rust, over HTTP and on the command line.
//!
//! ```
//! use antefix_attention::hooks::HookSpec;
//!
//! let spec: HookSpec = serde_json::from_str(r#"{
//!     "captures": [{"at": {"site": "attn.hook_z", "layers": [3, 4]}, "dtype": "bf16"}],
//!     "edits": [{"at": {"site": "attn.hook_z", "layers": [5], "heads": [1]}, "do": {"scale": 0.0}}]
//! }"#)?;
//! assert_eq!(spec.edits.len(), 1);
//! # Ok::<(), serde_json::Error>(())
//! ```

use serde::{Deserialize, Serialize};

use super::site::Site;
use crate::readout::Reads;

/// Everything that one request wants from hooks.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HookSpec {
    /// Activations to keep.
    pub captures: Vec<Capture>,
    /// What attention reads, see [`crate::readout`].
    pub probes: Vec<Probe>,
    /// Changes, made in this order at each site, before the captures of that site.
    pub edits: Vec<Edit>,
    /// What captures do about tokens that the prefix cache has.
    pub on_hit: OnHit,
}

/// Tokens that the prefix cache holds are not computed, so there is nothing to capture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnHit {
    /// Compute the whole prompt.
    #[default]
    Recompute,
    /// Capture only what is computed anyway.
    NewOnly,
}

/// A region of the activations of a sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cells {
    /// Which activation.
    pub site: Site,
    /// Layers; all if missing. Must be missing for sites that exist once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Heads (query or key/value heads, as the site has them); all if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<Vec<usize>>,
    /// Tokens.
    #[serde(default)]
    pub positions: Positions,
}

impl Cells {
    /// All of a site.
    pub fn all(site: Site) -> Self {
        Self {
            site,
            layers: None,
            heads: None,
            positions: Positions::All,
        }
    }

    /// One layer of a site.
    pub fn layer(site: Site, layer: usize) -> Self {
        Self {
            layers: Some(vec![layer]),
            ..Self::all(site)
        }
    }

    /// One head.
    pub fn head(site: Site, layer: usize, head: usize) -> Self {
        Self {
            heads: Some(vec![head]),
            ..Self::layer(site, layer)
        }
    }

    /// The same at these tokens only.
    #[must_use]
    pub fn at(self, positions: Positions) -> Self {
        Self { positions, ..self }
    }
}

/// Tokens of a sequence, by position.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// All.
    #[default]
    All,
    /// The last token of the prompt.
    Last,
    /// From the last token of the prompt on: the rows that draw the answer's tokens.
    Answer,
    /// Tokens of the answer.
    Generated,
    /// From the first to before the second.
    Range(u32, u32),
    /// These.
    List(Vec<u32>),
}

impl Positions {
    /// Whether they include `pos` in a sequence whose prompt has `prompt` tokens.
    pub fn contains(&self, pos: u32, prompt: u32) -> bool {
        match self {
            Positions::All => true,
            Positions::Last => pos + 1 == prompt,
            Positions::Answer => pos + 1 >= prompt,
            Positions::Generated => pos >= prompt,
            Positions::Range(from, to) => (*from..*to).contains(&pos),
            Positions::List(list) => list.contains(&pos),
        }
    }

    /// How many of the tokens `0..tokens` they include.
    pub(crate) fn count(&self, tokens: usize, prompt: usize) -> usize {
        match self {
            Positions::All => tokens,
            Positions::Last => usize::from(prompt <= tokens),
            Positions::Answer => (tokens + 1).saturating_sub(prompt),
            Positions::Generated => tokens.saturating_sub(prompt),
            Positions::Range(from, to) => (*to as usize).min(tokens).saturating_sub(*from as usize),
            Positions::List(list) => list.iter().filter(|&&p| (p as usize) < tokens).count(),
        }
    }
}

/// How captured values are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// As computed.
    #[default]
    F32,
    /// Rounded to 16 bits.
    Bf16,
}

/// An activation to keep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capture {
    /// Prefix of its tensors' names, so that one site can be captured twice; empty: none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// What.
    pub at: Cells,
    /// How it is kept.
    #[serde(default)]
    pub dtype: Dtype,
    /// Take it before the edits of its site.
    #[serde(default)]
    pub before_edits: bool,
}

impl Capture {
    /// Keeps `at` in f32, after edits.
    pub fn of(at: Cells) -> Self {
        Self {
            id: String::new(),
            at,
            dtype: Dtype::F32,
            before_edits: false,
        }
    }
}

/// A reading of attention weights while the model runs, of the rows as they are computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Its name in the results.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Layers; all if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Query heads; all if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<Vec<usize>>,
    /// Query tokens.
    #[serde(default)]
    pub positions: Positions,
    /// What of their rows.
    pub read: Reads,
}

/// A change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edit {
    /// Where.
    pub at: Cells,
    /// What happens there.
    #[serde(rename = "do")]
    pub action: Action,
}

/// What an edit does to the values of its cells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Multiply; 0 ablates.
    Scale(f32),
    /// Replace.
    Set(Set),
    /// Add.
    Add(Add),
}

/// What values are replaced with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Set {
    /// Zeros.
    Zero,
    /// One row for every token (mean ablation): the chosen heads' values, or the whole row.
    Mean(Vec<f32>),
    /// What another run had there (activation patching).
    From(FromRun),
}

/// Adds `alpha` times a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Add {
    /// The row: a steering vector, or what another run had.
    pub what: Vector,
    /// Its factor.
    #[serde(default = "one")]
    pub alpha: f32,
}

fn one() -> f32 {
    1.0
}

/// A row to add.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vector {
    /// The same for every token.
    Row(Vec<f32>),
    /// The row of another run.
    From(FromRun),
}

/// Rows captured in another run, at the same site, layer and heads.
///
/// The row of token `p` is taken from token `p - shift` of that run. Tokens without one there stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FromRun {
    /// Id of the capture (empty for a capture without one).
    #[serde(default)]
    pub capture: String,
    /// Tokens by which this run is behind.
    #[serde(default)]
    pub shift: i64,
}
