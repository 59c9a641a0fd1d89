//! Scores of keys that stand here and there: what planners look at who do not look at every key.

use antefix_kernels::attend::{KvDtype, Page, PageMut, scores_each};
use antefix_state::PAGE_ROWS;

use super::execute::PACKED;
use super::view::PlanView;

impl PlanView<'_> {
    /// The largest score that any of the vectors `q: [R, D]`, already scaled, has with each of `keys` of `kv_head`, which ascend:
    /// `[keys]`. Single keys of a page are copied side by side first, so that the cost follows the number of keys. The cap on scores is
    /// left out, as in [`PlanView::scores`].
    pub fn largest_scores(&self, kv_head: usize, q: &[f32], keys: &[u32]) -> Vec<f32> {
        let (cpu, dim) = (self.rows.run.0, self.rows.geometry.dim);
        let mut largest = vec![f32::NEG_INFINITY; keys.len()];
        let (mut whole, mut packed) = (Vec::new(), Packed::new(dim, self.rows.pool.shape().dtype));
        let mut at = 0;
        for run in keys.chunk_by(|a, b| *a as usize / PAGE_ROWS == *b as usize / PAGE_ROWS) {
            let page = self.page(kv_head, run[0] as usize / PAGE_ROWS);
            if run.len() > PACKED as usize {
                whole.push((page, at, run));
            } else {
                for (i, key) in run.iter().enumerate() {
                    packed.push(&page, *key as usize % PAGE_ROWS, at + i);
                }
            }
            at += run.len();
        }
        let pages = whole.iter().map(|w| w.0);
        scores_each(cpu, dim, q, pages, |page, scores| {
            let (most, (_, at, run)) = (most(scores), &whole[page]);
            for (to, key) in largest[*at..].iter_mut().zip(*run) {
                *to = most[*key as usize % PAGE_ROWS];
            }
        });
        scores_each(cpu, dim, q, packed.pages(), |page, scores| {
            let places = packed.places[page * PAGE_ROWS..].iter();
            places
                .zip(most(scores))
                .for_each(|(&place, most)| largest[place] = most);
        });
        largest
    }
}

/// The largest score of each key of a page.
fn most(scores: &[[f32; PAGE_ROWS]]) -> [f32; PAGE_ROWS] {
    let mut most = [f32::NEG_INFINITY; PAGE_ROWS];
    for row in scores {
        most.iter_mut().zip(row).for_each(|(m, s)| *m = m.max(*s));
    }
    most
}

/// Copied keys, in pages.
struct Packed {
    dim: usize,
    /// One of them holds the keys.
    k16: Vec<u16>,
    k32: Vec<f32>,
    dtype: KvDtype,
    /// Where the score of each copied key goes.
    places: Vec<usize>,
}

impl Packed {
    fn new(dim: usize, dtype: KvDtype) -> Self {
        Self {
            dim,
            k16: Vec::new(),
            k32: Vec::new(),
            dtype,
            places: Vec::new(),
        }
    }

    /// Copies a key whose score goes to `place`.
    fn push(&mut self, from: &Page<'_>, row: usize, place: usize) {
        let (size, at) = (PAGE_ROWS * self.dim, self.places.len() % PAGE_ROWS);
        let page = self.places.len() / PAGE_ROWS * size;
        let mut to = match self.dtype {
            KvDtype::Bf16 => {
                self.k16.resize(page + size, 0);
                PageMut::Bf16 {
                    k: &mut self.k16[page..],
                    v: &mut [],
                }
            }
            KvDtype::F32 => {
                self.k32.resize(page + size, 0.0);
                PageMut::F32 {
                    k: &mut self.k32[page..],
                    v: &mut [],
                }
            }
        };
        to.copy_key(at, from, row);
        self.places.push(place);
    }

    /// Scores never look at values: the keys stand in for them.
    fn pages(&self) -> impl Iterator<Item = Page<'_>> {
        let size = PAGE_ROWS * self.dim;
        (0..self.places.len().div_ceil(PAGE_ROWS)).map(move |page| {
            let page = page * size..(page + 1) * size;
            match self.dtype {
                KvDtype::Bf16 => Page::Bf16 {
                    k: &self.k16[page.clone()],
                    v: &self.k16[page],
                },
                KvDtype::F32 => Page::F32 {
                    k: &self.k32[page.clone()],
                    v: &self.k32[page],
                },
            }
        })
    }
}
