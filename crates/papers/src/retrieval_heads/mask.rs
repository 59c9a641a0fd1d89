//! Heads that are switched off while the answer is written (section 2.4). The prompt is computed with all heads.

use antefix_attention::hooks::{Action, Cells, Edit, HookSpec, Positions, Set, Site};

/// How a head is switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// Its query is 0: it reads all keys evenly, as in the paper's program.
    Uniform,
    /// Its output is 0.
    Zero,
}

impl std::str::FromStr for Mask {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "uniform" => Ok(Self::Uniform),
            "zero" => Ok(Self::Zero),
            _ => Err(format!("`{name}` is no mask\nhint: uniform or zero")),
        }
    }
}

/// The edits that switch `heads` (layer, head) off, from the row that draws the answer's first token on.
pub fn mask(heads: &[(usize, usize)], mode: Mask) -> HookSpec {
    let edit = |&(layer, head): &(usize, usize)| {
        let (site, action) = match mode {
            Mask::Uniform => (Site::RotQ, Action::Set(Set::Zero)),
            Mask::Zero => (Site::Z, Action::Scale(0.0)),
        };
        Edit {
            at: Cells::head(site, layer, head).at(Positions::Answer),
            action,
        }
    };
    HookSpec {
        edits: heads.iter().map(edit).collect(),
        ..HookSpec::default()
    }
}
