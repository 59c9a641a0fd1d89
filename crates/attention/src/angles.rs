//! Angles and scales that one request uses instead of the model's own.

use std::fmt;
use std::sync::Arc;

use antefix_kernels::ops::Rope;
use twox_hash::XxHash3_64;

use crate::method::Rotation;

/// A [`Rotation`] with its tables.
#[derive(Clone)]
pub struct Angles {
    rotation: Rotation,
    /// `[L]`; `None`: the layer keeps the model's own, and its scores are not scaled.
    layers: Vec<Option<Arc<Rope>>>,
}

impl fmt::Debug for Angles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rotation.fmt(f)
    }
}

impl Angles {
    /// Tables of `rotation`, one a layer; `None` where the layer keeps the model's own.
    pub fn new(rotation: Rotation, layers: Vec<Option<Arc<Rope>>>) -> Self {
        Self { rotation, layers }
    }

    /// The table of `layer`, if it is not the model's own.
    pub fn rope(&self, layer: usize) -> Option<&Rope> {
        self.layers.get(layer)?.as_deref()
    }

    /// Factor on the scores of `layer` for a query at `pos`.
    pub fn scale(&self, layer: usize, pos: u32) -> f32 {
        match self.rope(layer) {
            Some(_) => self.rotation.scale(layer, pos),
            None => 1.0,
        }
    }

    /// The salt under which pages computed with these angles may be shared.
    pub fn salted(&self, salt: u64) -> u64 {
        XxHash3_64::oneshot_with_seed(salt, format!("{:?}", self.rotation).as_bytes())
    }
}
