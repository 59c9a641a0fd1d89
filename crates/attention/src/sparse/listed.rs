//! Scores of keys that stand here and there: what planners look at who do not look at every key.

use antefix_kernels::attend::{Page, PageMut, scores_rows};
use antefix_kernels::cpu::Cpu;
use antefix_kv::KvDtype;
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
        let mut scores = vec![[0.0; PAGE_ROWS]; q.len() / dim];
        let mut packed = Packed::new(dim, self.rows.pool.shape().dtype);
        let mut at = 0;
        for run in keys.chunk_by(|a, b| *a as usize / PAGE_ROWS == *b as usize / PAGE_ROWS) {
            let page = self.page(kv_head, run[0] as usize / PAGE_ROWS);
            if run.len() > PACKED as usize {
                scores_rows(cpu, dim, q, None, &page, &mut scores);
                let most = most(&scores);
                for (to, key) in largest[at..].iter_mut().zip(run) {
                    *to = most[*key as usize % PAGE_ROWS];
                }
            } else {
                for (i, key) in run.iter().enumerate() {
                    packed.push(&page, *key as usize % PAGE_ROWS, at + i);
                    if packed.places.len() == PAGE_ROWS {
                        packed.score(cpu, q, &mut scores, &mut largest);
                    }
                }
            }
            at += run.len();
        }
        packed.score(cpu, q, &mut scores, &mut largest);
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

/// A page of copied keys.
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
        let n = |of: KvDtype| if of == dtype { PAGE_ROWS * dim } else { 0 };
        Self {
            dim,
            k16: vec![0; n(KvDtype::Bf16)],
            k32: vec![0.0; n(KvDtype::F32)],
            dtype,
            places: Vec::with_capacity(PAGE_ROWS),
        }
    }

    /// Copies a key whose score goes to `place`.
    fn push(&mut self, from: &Page<'_>, row: usize, place: usize) {
        let mut to = match self.dtype {
            KvDtype::Bf16 => PageMut::Bf16 {
                k: &mut self.k16,
                v: &mut [],
            },
            KvDtype::F32 => PageMut::F32 {
                k: &mut self.k32,
                v: &mut [],
            },
        };
        to.copy_key(self.places.len(), from, row);
        self.places.push(place);
    }

    /// Puts the largest scores of the copied keys into their places, and begins again.
    fn score(&mut self, cpu: Cpu, q: &[f32], scores: &mut [[f32; PAGE_ROWS]], largest: &mut [f32]) {
        if self.places.is_empty() {
            return;
        }
        // Scores never look at values: the keys stand in for them.
        let page = match self.dtype {
            KvDtype::Bf16 => Page::Bf16 {
                k: &self.k16,
                v: &self.k16,
            },
            KvDtype::F32 => Page::F32 {
                k: &self.k32,
                v: &self.k32,
            },
        };
        scores_rows(cpu, self.dim, q, None, &page, scores);
        for (place, most) in self.places.drain(..).zip(most(scores)) {
            largest[place] = most;
        }
    }
}
