//! The named activations, under the names of TransformerLens.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::plan::HookShape;

/// An activation of the decoder: f32 rows, one for each token of a step.
///
/// Values are what the engine computes with the file's weights (nothing folded or centred). Edits happen before the next
/// product quantises its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[repr(u32)]
pub enum Site {
    /// Token embeddings after their scaling, `[d_model]`.
    Embed,
    /// The residual stream before a block, `[d_model]`.
    ResidPre,
    /// Queries straight after the projection and its bias, before the head norm and RoPE, `[Hq, D]`.
    Q,
    /// Keys at the same place, `[Hk, D]`.
    K,
    /// Values, `[Hk, D]`.
    V,
    /// Queries after RoPE, not yet scaled, `[Hq, D]`.
    RotQ,
    /// Keys after RoPE, before the cache rounds them, `[Hk, D]`.
    RotK,
    /// Head outputs before `W_o`, `[Hq, D]`; value biases are in it.
    Z,
    /// What attention adds to the stream, after the post-norm where there is one, `[d_model]`.
    AttnOut,
    /// The stream between attention and feed-forward, `[d_model]`.
    ResidMid,
    /// `act(gate) * up`, `[d_ff]`.
    MlpPost,
    /// What the feed-forward part adds, after the post-norm where there is one, `[d_model]`.
    MlpOut,
    /// The stream after a block, `[d_model]`.
    ResidPost,
    /// The normed input of the output projection, `[d_model]`; rows whose logits are asked for.
    FinalNorm,
    /// `[vocab]`; rows whose logits are asked for.
    Logits,
}

/// What a site exists once for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Per {
    /// Every layer.
    Layer,
    /// The model, before its first layer.
    Start,
    /// The model, after its last layer.
    End,
}

/// A name that is no site.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no site\nhint: one of {}", Site::ALL.map(Site::name).join(", "))]
pub struct UnknownSite {
    /// What was written.
    pub name: String,
}

/// A site with the layer that its full name (`blocks.3.attn.hook_z`) tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiteName {
    /// The site.
    pub site: Site,
    /// The layer, if the name has one.
    pub layer: Option<usize>,
}

impl Site {
    /// All sites in the order of a forward pass.
    pub const ALL: [Site; 15] = [
        Site::Embed,
        Site::ResidPre,
        Site::Q,
        Site::K,
        Site::V,
        Site::RotQ,
        Site::RotK,
        Site::Z,
        Site::AttnOut,
        Site::ResidMid,
        Site::MlpPost,
        Site::MlpOut,
        Site::ResidPost,
        Site::FinalNorm,
        Site::Logits,
    ];

    /// Its name in TransformerLens, without `blocks.N.`; `logits` has none there.
    pub fn name(self) -> &'static str {
        match self {
            Site::Embed => "hook_embed",
            Site::ResidPre => "hook_resid_pre",
            Site::Q => "attn.hook_q",
            Site::K => "attn.hook_k",
            Site::V => "attn.hook_v",
            Site::RotQ => "attn.hook_rot_q",
            Site::RotK => "attn.hook_rot_k",
            Site::Z => "attn.hook_z",
            Site::AttnOut => "hook_attn_out",
            Site::ResidMid => "hook_resid_mid",
            Site::MlpPost => "mlp.hook_post",
            Site::MlpOut => "hook_mlp_out",
            Site::ResidPost => "hook_resid_post",
            Site::FinalNorm => "ln_final.hook_normalized",
            Site::Logits => "logits",
        }
    }

    /// The name in the module paths of TransformerLens 3, where that differs.
    fn bridge_name(self) -> Option<&'static str> {
        Some(match self {
            Site::Embed => "embed.hook_out",
            Site::ResidPre => "hook_in",
            Site::Q => "attn.q.hook_out",
            Site::K => "attn.k.hook_out",
            Site::V => "attn.v.hook_out",
            Site::Z => "attn.o.hook_in",
            Site::AttnOut => "attn.hook_out",
            Site::ResidMid => "ln2.hook_in",
            Site::MlpPost => "mlp.out.hook_in",
            Site::MlpOut => "mlp.hook_out",
            Site::ResidPost => "hook_out",
            Site::RotQ | Site::RotK | Site::FinalNorm | Site::Logits => return None,
        })
    }

    /// The tensor name in files: `blocks.N.` before it where there is one a layer.
    pub fn full_name(self, layer: usize) -> String {
        match self.per() {
            Per::Layer => format!("blocks.{layer}.{}", self.name()),
            Per::Start | Per::End => self.name().to_owned(),
        }
    }

    /// Whether it exists in every layer.
    pub fn per(self) -> Per {
        match self {
            Site::Embed => Per::Start,
            Site::FinalNorm | Site::Logits => Per::End,
            _ => Per::Layer,
        }
    }

    /// Its bit in a layer's mask.
    pub fn bit(self) -> u32 {
        1 << self as u32
    }

    /// Heads of a row, if it is made of heads.
    pub fn heads(self, shape: &HookShape) -> Option<usize> {
        match self {
            Site::Q | Site::RotQ | Site::Z => Some(shape.heads),
            Site::K | Site::V | Site::RotK => Some(shape.kv_heads),
            _ => None,
        }
    }

    /// Values of a row.
    pub fn width(self, shape: &HookShape) -> usize {
        match self {
            Site::MlpPost => shape.d_ff,
            Site::Logits => shape.vocab,
            _ => self.heads(shape).map_or(shape.d_model, |heads| heads * shape.dim),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SiteName {
    type Err = UnknownSite;

    fn from_str(name: &str) -> Result<Self, UnknownSite> {
        let unknown = || UnknownSite {
            name: name.to_owned(),
        };
        let (layer, short) = match name.strip_prefix("blocks.") {
            Some(rest) => {
                let (layer, short) = rest.split_once('.').ok_or_else(unknown)?;
                (Some(layer.parse().map_err(|_| unknown())?), short)
            }
            None => (None, name),
        };
        let is = |site: &Site| {
            let last = site.name().rsplit('.').next().unwrap_or_default();
            // `hook_z` alone is what people say; `hook_post` and the like are only ever written in full.
            let alone = matches!(
                site,
                Site::Q | Site::K | Site::V | Site::RotQ | Site::RotK | Site::Z
            );
            short == site.name() || site.bridge_name() == Some(short) || (alone && short == last)
        };
        let site = Site::ALL.into_iter().find(is).ok_or_else(unknown)?;
        match (layer, site.per()) {
            (Some(_), Per::Start | Per::End) => Err(unknown()),
            _ => Ok(Self { site, layer }),
        }
    }
}

impl TryFrom<String> for Site {
    type Error = UnknownSite;

    fn try_from(name: String) -> Result<Self, UnknownSite> {
        match name.parse()? {
            SiteName { site, layer: None } => Ok(site),
            SiteName { layer: Some(_), .. } => Err(UnknownSite { name }),
        }
    }
}

impl From<Site> for String {
    fn from(site: Site) -> Self {
        site.name().to_owned()
    }
}
