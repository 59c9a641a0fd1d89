//! What a run captured.

use antefix_kernels::attend::{bf16_to_f32, f32_to_bf16};

use super::site::Site;
use super::spec::Dtype;

/// Rows of one site and layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Captured {
    /// Id of the capture, may be empty.
    pub id: String,
    /// Which activation.
    pub site: Site,
    /// Its layer; 0 for sites that exist once.
    pub layer: usize,
    /// The heads in the rows, ascending, if the site has heads.
    pub heads: Option<Vec<usize>>,
    /// Values of a row.
    pub width: usize,
    /// Token of each row, ascending.
    pub positions: Vec<u32>,
    /// `[positions, width]`.
    pub values: Values,
}

/// Values in one of the types that captures have.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// As computed.
    F32(Vec<f32>),
    /// Rounded, as bits.
    Bf16(Vec<u16>),
}

impl Captured {
    /// Name of its tensor in a file: `ID/blocks.N.SITE`, without `ID/` if there is none.
    pub fn name(&self) -> String {
        let name = self.site.full_name(self.layer);
        match self.id.as_str() {
            "" => name,
            id => format!("{id}/{name}"),
        }
    }

    /// The row of token `pos`, `[width]`.
    pub fn row(&self, pos: u32) -> Option<Vec<f32>> {
        let at = self.positions.binary_search(&pos).ok()?;
        let span = at * self.width..(at + 1) * self.width;
        Some(match &self.values {
            Values::F32(v) => v[span].to_vec(),
            Values::Bf16(v) => v[span].iter().map(|&x| bf16_to_f32(x)).collect(),
        })
    }

    /// All values in f32, `[positions, width]`.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.values {
            Values::F32(v) => v.clone(),
            Values::Bf16(v) => v.iter().map(|&x| bf16_to_f32(x)).collect(),
        }
    }

    /// Bytes of its values.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::F32(v) => v.len() * 4,
            Values::Bf16(v) => v.len() * 2,
        }
    }

    /// Bytes of one row's values.
    pub(super) fn row_bytes(&self) -> usize {
        match &self.values {
            Values::F32(_) => self.width * 4,
            Values::Bf16(_) => self.width * 2,
        }
    }

    pub(super) fn empty(
        id: &str,
        site: Site,
        layer: usize,
        heads: Option<Vec<usize>>,
        width: usize,
        dtype: Dtype,
    ) -> Self {
        Self {
            id: id.to_owned(),
            site,
            layer,
            heads,
            width,
            positions: Vec::new(),
            values: match dtype {
                Dtype::F32 => Values::F32(Vec::new()),
                Dtype::Bf16 => Values::Bf16(Vec::new()),
            },
        }
    }

    /// Takes in the row of token `pos`, in place of an earlier one: a token that is computed again is captured again.
    /// Returns by how many bytes it grew.
    pub(super) fn put(&mut self, pos: u32, row: impl Iterator<Item = f32>) -> usize {
        let before = self.bytes();
        let (at, known) = match self.positions.binary_search(&pos) {
            Ok(at) => (at, true),
            Err(at) => (at, false),
        };
        if !known {
            self.positions.insert(at, pos);
        }
        let span = at * self.width..(at + usize::from(known)) * self.width;
        match &mut self.values {
            Values::F32(v) => drop(v.splice(span, row)),
            Values::Bf16(v) => drop(v.splice(span, row.map(f32_to_bf16))),
        }
        self.bytes() - before
    }
}
