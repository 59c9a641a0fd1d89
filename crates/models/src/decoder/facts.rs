//! What methods may know of a model, and the angles that they may ask for.

use std::collections::VecDeque;
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

/// Tables of angles kept for the next request: with as many settings as anybody may send there is no end to them.
const TABLES: usize = 32;

/// The tables of angles that were made last, the oldest first.
#[derive(Default)]
pub(super) struct AngleTables(Mutex<VecDeque<(Rotation, Arc<Angles>)>>);

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

    /// The tables of `rotation`, shared by requests that ask for the same; the last 32 that were made are kept.
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
        if tables.len() == TABLES {
            tables.pop_front();
        }
        tables.push_back((rotation.clone(), Arc::clone(&angles)));
        angles
    }
}

#[cfg(test)]
mod tests {
    use antefix_attention::method::Freq;
    use antefix_kernels::cpu::Cpu;
    use antefix_kernels::matmul::Precision;
    use antefix_kernels::team::Team;

    use super::*;
    use crate::files::ModelFiles;
    use crate::gguf::Gguf;
    use crate::spec::Arch;
    use crate::testing::tiny_gguf;

    fn model(arch: Arch) -> Model {
        let gguf = Gguf::parse(tiny_gguf(arch, 1)).expect("it is sound");
        let files = ModelFiles::from_gguf(gguf, "tiny.gguf".as_ref()).expect("it is whole");
        Model::load(files, Cpu::best(), Arc::new(Team::new(1)), Precision::Fast).expect("known formats")
    }

    fn stretched(factor: f64) -> Rotation {
        Rotation {
            freq: Freq::Linear { factor },
            ..Rotation::default()
        }
    }

    #[test]
    fn layers_with_a_window_keep_their_angles_whatever_is_asked() {
        let model = model(Arch::Gemma3);
        let angles = model.angles(&stretched(4.0));
        let windows: Vec<bool> = model
            .spec()
            .layer_kinds
            .iter()
            .map(|k| k.window.is_some())
            .collect();
        assert!(windows.contains(&true) && windows.contains(&false));
        for (layer, window) in windows.into_iter().enumerate() {
            assert_eq!(angles.rope(layer).is_none(), window, "layer {layer}");
        }
    }

    #[test]
    fn tables_are_shared_and_do_not_pile_up() {
        let model = model(Arch::Llama);
        let first = model.angles(&stretched(2.0));
        assert!(Arc::ptr_eq(&first, &model.angles(&stretched(2.0))));
        for i in 0..1000 {
            model.angles(&stretched(3.0 + f64::from(i)));
        }
        assert!(model.angles.0.lock().expect("no panic").len() <= TABLES);
        assert!(!Arc::ptr_eq(&first, &model.angles(&stretched(2.0))));
    }
}
