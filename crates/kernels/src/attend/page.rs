//! Pages: 32 keys and values of one (layer, KV head), laid out for the kernels.

use std::ops::Range;

use antefix_state::PAGE_ROWS;

/// Keys of half a page stand side by side: a vector load takes one dimension (or pair) of 16 keys.
const HALF: usize = PAGE_ROWS / 2;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 16 bits; keys in pairs of dimensions and values in pairs of rows, the operand order of AMX tiles.
    Bf16,
    /// 32 bits.
    F32,
}

impl KvDtype {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::Bf16 => 2,
            KvDtype::F32 => 4,
        }
    }
}

/// Sizes of a page. K and V have `32 * dim` values each.
///
/// bf16: K `[2 halves][D/2][16 keys][2 dims]`, V `[16 pairs][D][2 rows]`. f32: K `[2 halves][D][16 keys]`, V row-major
/// `[32][D]`. The layout is the same on every machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageLayout {
    /// Head dimension `D`.
    pub dim: usize,
    /// Type of a value.
    pub dtype: KvDtype,
}

impl PageLayout {
    /// Values of the K part; the V part has as many.
    pub fn part_len(self) -> usize {
        PAGE_ROWS * self.dim
    }

    /// Bytes of a page, K and V.
    pub fn bytes(self) -> usize {
        2 * self.part_len() * self.dtype.bytes()
    }
}

/// A page to be read.
#[derive(Debug, Clone, Copy)]
pub enum Page<'a> {
    /// 16-bit values.
    Bf16 {
        /// Keys.
        k: &'a [u16],
        /// Values.
        v: &'a [u16],
    },
    /// 32-bit values.
    F32 {
        /// Keys.
        k: &'a [f32],
        /// Values.
        v: &'a [f32],
    },
}

/// A page, and which of its rows a call may see at all.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The page.
    pub page: Page<'a>,
    /// Bit `i` stands for row `i`. A row without its bit is a hole: it adds nothing, whatever it holds.
    pub rows: u32,
}

impl<'a> From<Page<'a>> for View<'a> {
    /// A page without holes.
    fn from(page: Page<'a>) -> Self {
        Self { page, rows: u32::MAX }
    }
}

/// A page to be written.
#[derive(Debug)]
pub enum PageMut<'a> {
    /// 16-bit values.
    Bf16 {
        /// Keys.
        k: &'a mut [u16],
        /// Values.
        v: &'a mut [u16],
    },
    /// 32-bit values.
    F32 {
        /// Keys.
        k: &'a mut [f32],
        /// Values.
        v: &'a mut [f32],
    },
}

/// Keys one behind the other in pages of their own, for scores alone: there are no values. A last page that is not full ends with zeros.
#[derive(Debug)]
pub struct KeyPages {
    dim: usize,
    len: usize,
    keys: Keys,
}

#[derive(Debug)]
enum Keys {
    Bf16(Vec<u16>),
    F32(Vec<f32>),
}

impl KeyPages {
    /// No keys yet, of `dim` values each.
    pub fn new(dim: usize, dtype: KvDtype) -> Self {
        let keys = match dtype {
            KvDtype::Bf16 => Keys::Bf16(Vec::new()),
            KvDtype::F32 => Keys::F32(Vec::new()),
        };
        Self { dim, len: 0, keys }
    }

    /// Appends `key`, `[D]`, rounded to the type of the pages.
    ///
    /// # Panics
    /// When its length is another.
    pub fn push(&mut self, key: &[f32]) {
        assert_eq!(key.len(), self.dim, "keys of one dimension");
        let row = self.len % PAGE_ROWS;
        self.next().write_key(row, key);
        self.len += 1;
    }

    /// Appends copies of the keys in `rows` of a page of the same layout.
    ///
    /// # Panics
    /// When the layouts differ.
    pub fn copy(&mut self, from: &Page<'_>, mut rows: Range<usize>) {
        while !rows.is_empty() {
            let to = self.len % PAGE_ROWS;
            let n = rows.len().min(PAGE_ROWS - to);
            self.next().copy_keys(to, from, rows.start..rows.start + n);
            self.len += n;
            rows.start += n;
        }
    }

    /// The page that the next key goes to.
    fn next(&mut self) -> PageMut<'_> {
        let size = PAGE_ROWS * self.dim;
        let page = self.len / PAGE_ROWS * size;
        match &mut self.keys {
            Keys::Bf16(k) => {
                k.resize(page + size, 0);
                PageMut::Bf16 {
                    k: &mut k[page..],
                    v: &mut [],
                }
            }
            Keys::F32(k) => {
                k.resize(page + size, 0.0);
                PageMut::F32 {
                    k: &mut k[page..],
                    v: &mut [],
                }
            }
        }
    }

    /// The pages. Scores never look at values: the keys stand in for them.
    pub fn pages(&self) -> impl Iterator<Item = Page<'_>> {
        let size = PAGE_ROWS * self.dim;
        (0..self.len.div_ceil(PAGE_ROWS)).map(move |page| {
            let page = page * size..(page + 1) * size;
            match &self.keys {
                Keys::Bf16(k) => Page::Bf16 {
                    k: &k[page.clone()],
                    v: &k[page],
                },
                Keys::F32(k) => Page::F32 {
                    k: &k[page.clone()],
                    v: &k[page],
                },
            }
        })
    }
}

/// The nearest bf16, ties to even; NaN stays NaN.
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return ((bits >> 16) | 0x40) as u16;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Exact.
pub fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Place of dimension `d` of key `row` in a bf16 K part.
pub(super) fn k_bf16_at(dim: usize, row: usize, d: usize) -> usize {
    ((row / HALF * (dim / 2) + d / 2) * HALF + row % HALF) * 2 + d % 2
}

/// Place of dimension `d` of key `row` in an f32 K part.
pub(super) fn k_f32_at(dim: usize, row: usize, d: usize) -> usize {
    (row / HALF * dim + d) * HALF + row % HALF
}

/// Place of dimension `d` of value `row` in a bf16 V part.
pub(super) fn v_bf16_at(dim: usize, row: usize, d: usize) -> usize {
    (row / 2 * dim + d) * 2 + row % 2
}

impl Page<'_> {
    pub(super) fn check(&self, dim: usize) {
        let (k, v) = match self {
            Page::Bf16 { k, v } => (k.len(), v.len()),
            Page::F32 { k, v } => (k.len(), v.len()),
        };
        assert!(
            k == PAGE_ROWS * dim && v == PAGE_ROWS * dim,
            "a page holds 32 rows of D values, twice"
        );
    }

    /// Dimension `d` of key `row`.
    pub fn key(&self, dim: usize, row: usize, d: usize) -> f32 {
        match self {
            Page::Bf16 { k, .. } => bf16_to_f32(k[k_bf16_at(dim, row, d)]),
            Page::F32 { k, .. } => k[k_f32_at(dim, row, d)],
        }
    }

    /// Dimension `d` of value `row`.
    pub fn value(&self, dim: usize, row: usize, d: usize) -> f32 {
        match self {
            Page::Bf16 { v, .. } => bf16_to_f32(v[v_bf16_at(dim, row, d)]),
            Page::F32 { v, .. } => v[row * dim + d],
        }
    }
}

impl PageMut<'_> {
    /// Writes key and value (`[D]` each) of `row`, rounding to the page's type.
    ///
    /// # Panics
    /// When `row` is not below 32 or the lengths do not fit the page.
    pub fn write_row(&mut self, row: usize, key: &[f32], value: &[f32]) {
        let dim = key.len();
        assert_eq!(value.len(), dim, "a key and its value");
        self.write_key(row, key);
        match self {
            PageMut::Bf16 { v, .. } => {
                let pairs = v[v_bf16_at(dim, row, 0)..].iter_mut().step_by(2);
                for (to, &x) in pairs.zip(value) {
                    *to = f32_to_bf16(x);
                }
            }
            PageMut::F32 { v, .. } => v[row * dim..][..dim].copy_from_slice(value),
        }
    }

    /// Writes the key (`[D]`) of `row` alone, rounding to the page's type.
    ///
    /// # Panics
    /// When `row` is not below 32 or the length does not fit the page.
    pub fn write_key(&mut self, row: usize, key: &[f32]) {
        let dim = key.len();
        assert!(row < PAGE_ROWS, "a row of a page");
        match self {
            PageMut::Bf16 { k, .. } => {
                // Two neighbours in a row of the key are neighbours in the page, the next two a line further.
                let lines = k[k_bf16_at(dim, row, 0)..].chunks_mut(2 * HALF);
                for (to, key) in lines.zip(key.as_chunks::<2>().0) {
                    to[..2].copy_from_slice(&key.map(f32_to_bf16));
                }
            }
            PageMut::F32 { k, .. } => {
                for (d, &x) in key.iter().enumerate() {
                    k[k_f32_at(dim, row, d)] = x;
                }
            }
        }
    }

    /// Copies another page of the same layout.
    ///
    /// # Panics
    /// When the layouts differ.
    pub fn copy_from(&mut self, from: &Page<'_>) {
        match (self, from) {
            (PageMut::Bf16 { k, v }, Page::Bf16 { k: fk, v: fv }) => {
                k.copy_from_slice(fk);
                v.copy_from_slice(fv);
            }
            (PageMut::F32 { k, v }, Page::F32 { k: fk, v: fv }) => {
                k.copy_from_slice(fk);
                v.copy_from_slice(fv);
            }
            _ => unreachable!("pages of one pool have one layout"),
        }
    }
}
