//! The Transformer twin's memory: keys and values of all tokens, on the pages and with the kernel of the engine.

use antefix_kernels::attend::{AttendScratch, Page, PageMut, StateMut, StateRef, View, attend, finish};
use antefix_kernels::cpu::Cpu;
use antefix_state::PAGE_ROWS;

/// Keys and values of one layer, a list of f32 pages a head. Head dimensions are filled up with zeros to a multiple of 16 for the kernel.
#[derive(Debug, Clone)]
pub struct Cache {
    /// A head's K parts, one after the other.
    k: Vec<Vec<f32>>,
    /// A head's V parts.
    v: Vec<Vec<f32>>,
    dim: usize,
    padded: usize,
    len: usize,
}

impl Cache {
    /// Nothing seen yet.
    pub fn new(heads: usize, dim: usize) -> Self {
        Self {
            k: vec![Vec::new(); heads],
            v: vec![Vec::new(); heads],
            dim,
            padded: dim.next_multiple_of(16),
            len: 0,
        }
    }

    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the pages in use.
    pub fn bytes(&self) -> usize {
        let part = |parts: &[Vec<f32>]| parts.iter().map(|p| size_of_val(&p[..])).sum::<usize>();
        part(&self.k) + part(&self.v)
    }

    /// Takes keys and values of `b` tokens in and attends with their queries: all are `[b, H D]`, queries already scaled.
    ///
    /// # Panics
    /// When the shapes do not fit, or there are more than 2^32 tokens.
    pub fn attend(&mut self, cpu: Cpu, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
        let (heads, dim, padded) = (self.k.len(), self.dim, self.padded);
        let width = heads * dim;
        let rows = out.len() / width.max(1);
        assert!(
            q.len() == out.len() && k.len() == out.len() && v.len() == out.len(),
            "queries, keys and values are [b, H D]"
        );
        if rows == 0 {
            return;
        }
        let first = self.len;
        self.len += rows;
        let end = |row: usize| u32::try_from(first + row + 1).expect("fewer than 2^32 tokens");
        let visible: Vec<(u32, u32)> = (0..rows).map(|row| (0, end(row))).collect();
        let part = PAGE_ROWS * padded;
        let mut scratch = AttendScratch::default();
        for h in 0..heads {
            let (keys, values) = (&mut self.k[h], &mut self.v[h]);
            let pages = self.len.div_ceil(PAGE_ROWS);
            keys.resize(pages * part, 0.0);
            values.resize(pages * part, 0.0);
            let mut row_k = vec![0.0; padded];
            let mut row_v = vec![0.0; padded];
            let mut queries = vec![0.0; rows * padded];
            for row in 0..rows {
                let from = row * width + h * dim..row * width + (h + 1) * dim;
                row_k[..dim].copy_from_slice(&k[from.clone()]);
                row_v[..dim].copy_from_slice(&v[from.clone()]);
                queries[row * padded..][..dim].copy_from_slice(&q[from]);
                let (page, at) = ((first + row) / PAGE_ROWS, (first + row) % PAGE_ROWS);
                let mut page = PageMut::F32 {
                    k: &mut keys[page * part..][..part],
                    v: &mut values[page * part..][..part],
                };
                page.write_row(at, &row_k, &row_v);
            }
            let views: Vec<View<'_>> = keys
                .chunks_exact(part)
                .zip(values.chunks_exact(part))
                .map(|(k, v)| Page::F32 { k, v }.into())
                .collect();
            let (mut m, mut l) = (vec![f32::NEG_INFINITY; rows], vec![0.0; rows]);
            let mut acc = vec![0.0; rows * padded];
            let mut state = StateMut {
                m: &mut m,
                l: &mut l,
                acc: &mut acc,
            };
            attend(
                cpu,
                padded,
                &queries,
                &visible,
                None,
                &views,
                0,
                end(rows - 1),
                &mut state,
                &mut scratch,
            );
            let mut o = vec![0.0; rows * padded];
            let state = StateRef {
                m: &m,
                l: &l,
                acc: &acc,
            };
            finish(&state, &mut o);
            for row in 0..rows {
                out[row * width + h * dim..][..dim].copy_from_slice(&o[row * padded..][..dim]);
            }
        }
    }
}
