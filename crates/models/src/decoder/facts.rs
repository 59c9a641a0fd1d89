//! What methods may know of a model, and the angles that they may ask for.

use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::Angles;
use antefix_attention::method::{Facts, LayerFacts, Rotation, Words};
use antefix_kernels::ops::Rope;

use super::{Model, weights};
use crate::tokenizer::{Specials, Tokenizer};

impl Words for Tokenizer {
    fn encode(&self, text: &str) -> Vec<u32> {
        Tokenizer::encode(self, text, Specials::Plain)
    }
}

/// Tables of angles that requests have asked for, kept as long as the model.
#[derive(Default)]
pub(super) struct AngleTables(Mutex<Vec<(Rotation, Arc<Angles>)>>);

impl Model {
    /// What methods may know of it.
    pub fn facts(&self) -> Facts {
        let spec = self.spec();
        let layer = |kind: &crate::spec::LayerKind| {
            let rope = &spec.ropes[kind.rope];
            LayerFacts {
                window: kind.window,
                rope_base: rope.base,
                rope_dims: rope.dims,
            }
        };
        Facts {
            name: spec.name.clone(),
            id: format!("{:016x}", self.files().fingerprint()),
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            dim: spec.head_dim,
            d_model: spec.d_model,
            vocab: spec.vocab,
            d_ff: spec.d_ff,
            context: spec.context,
            scale: spec.attn_scale,
            layers: spec.layer_kinds.iter().map(layer).collect(),
        }
    }

    /// The tables of `rotation`: computed once, and shared by all requests that ask for the same.
    pub fn angles(&self, rotation: &Rotation) -> Arc<Angles> {
        let mut tables = self.angles.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, angles)) = tables.iter().find(|(known, _)| known == rotation) {
            return Arc::clone(angles);
        }
        let spec = self.spec();
        let ropes: Vec<Arc<Rope>> = spec
            .ropes
            .iter()
            .map(|rope| {
                let frequencies = rotation.freq.apply(f64::from(rope.base), &rope.frequencies());
                Arc::new(weights::rope_of(rope, &frequencies))
            })
            .collect();
        let changed =
            |kind: &crate::spec::LayerKind| kind.window.is_none().then(|| Arc::clone(&ropes[kind.rope]));
        let layers = spec.layer_kinds.iter().map(changed).collect();
        let angles = Arc::new(Angles::new(rotation.clone(), layers));
        tables.push((rotation.clone(), Arc::clone(&angles)));
        angles
    }
}
