//! attention_sae: a sparse dictionary of one layer's head outputs says which features are active, and changes them.
//!
//! # What it does
//! A trained dictionary reads the outputs of all heads of one layer, before `W_o`, as a sum of few directions out of thousands. With each
//! answer come the most active features of its tokens; features can be set, scaled, added to or switched off while the model writes.
//!
//! # When it helps
//! To see what a layer says at a token, and to try whether it does what it seems to: steer a feature and read the answer. It makes no answer better or
//! faster. A dictionary is trained with `antefix sae train` on the model at hand, or comes from SAELens.
//!
//! # Steps
//! 1. (3.1) `f = relu((z - b_dec) W_enc + b_enc)`; other architectures as SAELens computes them (3.8): TopK, JumpReLU (BatchTopK is stored as that), gated.
//! 2. (3.5) A changed feature: `z + (f' - f) W_dec[j]`. What the dictionary does not explain stays as it is, so that no change is no
//!    change, bit for bit.
//! 3. (3.6, 3.7) Whose a feature is: `antefix sae attribute` tells what each head and each source token gave; the sums are exact.
//!
//! # Knobs
//! `sae` names a dictionary: a folder of SAELens or `sparsify`, or a single safetensors file; over HTTP a name in `$ANTEFIX_HOME/profiles/sae/`. Its
//! file says of which layer it is, or `layer` does. `edit` lists changes: `17:zero+42:set:3.5+9:scale:2+3:add:-1`. `read=all` also tells of the prompt, which is then computed
//! whatever the cache holds. `read=none` without `edit` changes nothing and tells nothing.
//!
//! # Cost
//! One product `[d_in, F]` in f32 a token that is read; with `read=none` the columns of the changed features only. The dictionary is held in memory twice in
//! f32: 21 MB for 4,608 features of 576 values. It is read for the first request that names it; the four used last stay, and one whose files change is
//! read again.
//!
//! # Differences from the paper
//! Edits are added to `z` instead of decoding twice and adding the error: the same on paper, exact where nothing changes. Ties of TopK go to the lower
//! feature. Dictionaries of models whose value biases TransformerLens folded are read with a warning; `Sae::fold_offset` mends them.
//!
//! # References
//! Kissane et al., Interpreting attention layer outputs with sparse autoencoders, 2024, arXiv 2406.17759. File formats: SAELens 6.

use std::sync::Arc;

use antefix_attention::hooks::fingerprint;
use antefix_attention::method::{
    Axis, Card, Facts, Kind, Knob, Knobs, Method, Need, Paper, Preset, Rig, RigError,
};

use crate::repro::{Claim, SMOLLM2};

pub mod attribute;
pub mod format;
pub mod live;
pub mod loaded;
pub mod reference;
pub mod sae;
#[cfg(test)]
mod tests;

pub use format::{Origin, SaeError, Stored};
pub use sae::{Architecture, Codes, Frame, Norm, Parts, Sae};

use live::{Edit, Live, Maker, Rows, Wish};
use loaded::Loaded;

/// The kind of profile that a dictionary is, as its folder is called.
pub const KIND: &str = "sae";

/// The method.
pub struct AttentionSae;

static CARD: Card = Card {
    name: "attention_sae",
    title: "Features of attention outputs",
    axis: Axis::Hooks,
    exact: false,
    summary: "Tells which features of a sparse dictionary of one layer's head outputs are active, and changes them.",
    paper: Paper {
        title: "Interpreting Attention Layer Outputs with Sparse Autoencoders",
        authors: "Kissane et al.",
        year: 2024,
        reference: "arXiv 2406.17759",
    },
    knobs: &[
        Knob {
            name: "sae",
            kind: Kind::Profile,
            default: Preset::Text("default"),
            unit: "",
            help: "The dictionary",
            source: "ours",
        },
        Knob {
            name: "layer",
            kind: Kind::int(-1, 4096),
            default: Preset::Int(-1),
            unit: "",
            help: "Layer whose head outputs are read; -1: the one that the dictionary names",
            source: "ours",
        },
        Knob {
            name: "read",
            kind: Kind::Choice(&["answer", "all", "none"]),
            default: Preset::Text("answer"),
            unit: "",
            help: "Tokens whose features are told",
            source: "ours",
        },
        Knob {
            name: "top",
            kind: Kind::int(0, 4096),
            default: Preset::Int(8),
            unit: "features",
            help: "Features that are told of each token, largest first",
            source: "ours",
        },
        Knob {
            name: "edit",
            kind: Kind::Text,
            default: Preset::Text(""),
            unit: "",
            help: "Changes of features, joined by +: FEATURE:zero, FEATURE:set:X, FEATURE:scale:X, FEATURE:add:X",
            source: "ours",
        },
        Knob {
            name: "edit_at",
            kind: Kind::Choice(&["all", "answer"]),
            default: Preset::Text("all"),
            unit: "",
            help: "Tokens at which features are changed",
            source: "ours",
        },
    ],
    query_dependent: false,
    needs: &[Need::Profile(KIND)],
    neutral: Some("read=none"),
    source: file!(),
};

/// What is measured of it.
pub static CLAIM: Claim = Claim {
    slug: "attention_sae",
    says: "Dictionaries of the head outputs of GPT-2 small with about 20 active features give back more than 80 % of the cross-entropy that zeros in \
           their place cost (75 to 99 % by layer).",
    source: "Kissane et al., section 3.2, table of all layers.",
    rule: "A dictionary of layer 24 with at most 32 active features in the mean: reproduced if it gives back 80 % of the cross-entropy on texts that it \
           was not trained on, and more than principal components and random directions of as many coefficients do; partly if it only gives \
           back more than these.",
    model: SMOLLM2,
    fast_model: SMOLLM2,
};

impl Method for AttentionSae {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn install(&self, knobs: &Knobs, rig: &mut Rig<'_>) -> Result<(), RigError> {
        let edits = Edit::parse(knobs.text("edit")).map_err(|why| rig.senseless(why))?;
        let loaded = dictionary(knobs.text("sae"), rig)?;
        let stored = &loaded.stored;
        let facts = rig.facts();
        let (own, width) = (stored.sae.d_in(), facts.heads * facts.dim);
        if own != width {
            let why = format!("it is of rows of {own} values, the model's head outputs have {width}");
            return Err(rig.unusable(KIND, why, HINT));
        }
        let layer = match knobs.int("layer") {
            -1 => stored.origin.layer().ok_or_else(|| {
                rig.senseless("the dictionary does not say of which layer it is: set `layer`")
            })?,
            layer => layer as usize,
        };
        if layer >= facts.layers.len() {
            return Err(rig.senseless(format!(
                "there is no layer {layer}, the model has {}",
                facts.layers.len()
            )));
        }
        if let Some(edit) = edits.iter().find(|e| e.feature as usize >= stored.sae.features()) {
            return Err(rig.senseless(format!(
                "there is no feature {}, the dictionary has {}",
                edit.feature,
                stored.sae.features()
            )));
        }
        let read = match knobs.text("read") {
            "all" => Rows::All,
            "none" => Rows::None,
            _ => Rows::Answer,
        };
        if read == Rows::None && edits.is_empty() {
            return Ok(());
        }
        let settings = format!("{:x} {knobs}", loaded.mark);
        let mark = fingerprint(settings.as_bytes());
        let wish = Wish {
            layer,
            read,
            top: knobs.size("top"),
            edits,
            edit_rows: match knobs.text("edit_at") {
                "answer" => Rows::Answer,
                _ => Rows::All,
            },
        };
        let live = Live::new(loaded, wish, mark).map_err(|e| rig.unusable(KIND, e.to_string(), HINT))?;
        rig.add_hook(Arc::new(Maker(Arc::new(live))));
        Ok(())
    }
}

const HINT: &str = "antefix sae train makes one; sae=PATH names a folder of SAELens";

/// The dictionary of this name: a folder, or a single file.
fn dictionary(name: &str, rig: &Rig<'_>) -> Result<Arc<Loaded>, RigError> {
    let path = match rig.profile_folder(KIND, name) {
        Some(folder) => folder,
        None => rig.profile_file(KIND, name, "safetensors", HINT)?,
    };
    Loaded::read(&path).map_err(|e| rig.unusable(KIND, e.to_string(), HINT))
}

/// A dictionary of random directions for a model of these facts, a single file: for tests.
pub fn made_up(facts: &Facts) -> Vec<u8> {
    let (d_in, features) = (facts.heads * facts.dim, 24);
    let mut rng = fastrand::Rng::with_seed(7);
    let mut values = |n: usize, size: f32| -> Vec<f32> { (0..n).map(|_| (rng.f32() - 0.5) * size).collect() };
    let parts = Parts {
        d_in,
        features,
        architecture: Architecture::JumpRelu {
            threshold: vec![0.01; features],
        },
        norm: Norm::None,
        apply_b_dec: true,
        w_enc: values(d_in * features, 2.0),
        b_enc: values(features, 0.1),
        w_dec: values(d_in * features, 2.0),
        b_dec: values(d_in, 0.1),
    };
    let origin = Origin {
        hook: Some("blocks.1.attn.hook_z".into()),
        ..Origin::default()
    };
    let stored = Sae::new(parts).map(|sae| Stored::new(sae, origin));
    stored.and_then(|s| s.to_bytes()).unwrap_or_default()
}
