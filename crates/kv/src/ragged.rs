//! Runs of rows whose length differs from head to head: what is left of a head's cache when a policy keeps only some rows.

use antefix_kernels::attend::View;
use antefix_state::PAGE_ROWS;

use crate::pool::{KvError, PageId, Pool, SeqKv};

/// The kept rows of one (layer, head): real pages, so that what was dropped is free.
#[derive(Debug)]
#[must_use = "pages are only freed by HeadRun::release"]
pub struct HeadRun {
    pages: Vec<PageId>,
    /// Positions of the rows, strictly ascending: a kept key keeps its position.
    positions: Vec<u32>,
}

impl HeadRun {
    /// Copies the rows at `keep` (ascending positions) of one head into pages of their own.
    ///
    /// # Errors
    /// When there is no room.
    ///
    /// # Panics
    /// When `keep` does not ascend or names a row that is not written.
    pub fn compact(
        pool: &mut Pool,
        seq: &SeqKv,
        layer: usize,
        head: usize,
        keep: &[u32],
    ) -> Result<Self, KvError> {
        assert!(keep.windows(2).all(|w| w[0] < w[1]), "positions ascend");
        assert!(
            keep.last().is_none_or(|&p| (p as usize) < seq.len()),
            "only written rows are kept"
        );
        let need = keep.len().div_ceil(PAGE_ROWS);
        let asked = need * pool.shape().page_bytes();
        if asked > pool.free_bytes() || !pool.has_free(need) {
            return Err(KvError::OutOfMemory {
                asked,
                free: pool.free_bytes(),
                capacity: pool.capacity(),
            });
        }
        let dim = pool.shape().dim;
        let pages: Vec<PageId> = (0..need).map(|_| pool.take()).collect();
        for (i, &pos) in keep.iter().enumerate() {
            let from = pool.page(seq.pages(layer, head)[pos as usize / PAGE_ROWS]);
            let row = pos as usize % PAGE_ROWS;
            let key: Vec<f32> = (0..dim).map(|d| from.key(dim, row, d)).collect();
            let value: Vec<f32> = (0..dim).map(|d| from.value(dim, row, d)).collect();
            pool.page_mut(pages[i / PAGE_ROWS])
                .write_row(i % PAGE_ROWS, &key, &value);
        }
        Ok(Self {
            pages,
            positions: keep.to_vec(),
        })
    }

    /// Rows kept.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether nothing was kept.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Positions of the rows in their sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The rows' pages; row `i` is row `i % 32` of page `i / 32`.
    pub fn pages<'p>(&self, pool: &'p Pool) -> Vec<View<'p>> {
        self.pages.iter().map(|&id| pool.page(id).into()).collect()
    }

    /// How many rows a query at `pos` sees: those at positions up to its own.
    pub fn visible_to(&self, pos: u32) -> u32 {
        self.positions.partition_point(|&p| p <= pos) as u32
    }

    /// Gives the pages back.
    pub fn release(self, pool: &mut Pool) {
        for page in self.pages {
            pool.drop_ref(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvDtype, KvShape};
    use antefix_kernels::attend::{AttendScratch, StateMut, attend, reset};
    use antefix_kernels::cpu::Cpu;
    use antefix_state::State;

    const D: usize = 16;

    #[test]
    fn a_ragged_run_is_masked_dense_attention_in_less_memory() {
        let shape = KvShape {
            layers: 1,
            kv_heads: 2,
            dim: D,
            dtype: KvDtype::F32,
        };
        let mut pool = Pool::new(shape, 1 << 20);
        let mut seq = SeqKv::new(shape);
        pool.reserve(&mut seq, 100).unwrap();
        let wave = |i: usize| ((i * 37 % 101) as f32 * 0.21).sin();
        let k: Vec<f32> = (0..100 * 2 * D).map(wave).collect();
        let v: Vec<f32> = (0..100 * 2 * D).map(|i| wave(i + 7)).collect();
        pool.write(&seq, 0, 0, &k, &v);
        seq.commit(100);
        let q: Vec<f32> = (0..D).map(|i| wave(i * 3) * 4.0).collect();
        let keeps: [Vec<u32>; 2] = [
            vec![0, 1, 5, 40, 41, 77, 99],
            (0..100).filter(|p| p % 2 == 0).collect(),
        ];
        for (head, keep) in keeps.iter().enumerate() {
            let before = pool.stats().bytes_used;
            let run = HeadRun::compact(&mut pool, &seq, 0, head, keep).unwrap();
            assert_eq!(
                pool.stats().bytes_used - before,
                keep.len().div_ceil(PAGE_ROWS) * shape.page_bytes()
            );
            for pos in [99u32, 42, 0] {
                let mut want = State::identity(1, D);
                for &p in keep.iter().filter(|&&p| p <= pos) {
                    let at = (p as usize * 2 + head) * D;
                    let s: f32 = q.iter().zip(&k[at..at + D]).map(|(a, b)| a * b).sum();
                    want.push(0, s, &v[at..at + D]);
                }
                let mut got = State::identity(1, D);
                {
                    let (m, l, acc) = got.parts_mut();
                    let mut state = StateMut { m, l, acc };
                    reset(&mut state);
                    let seen = [(0, run.visible_to(pos))];
                    let (pages, keys) = (run.pages(&pool), run.len() as u32);
                    attend(
                        Cpu::best(),
                        D,
                        &q,
                        &seen,
                        None,
                        &pages,
                        0,
                        keys,
                        &mut state,
                        &mut AttendScratch::default(),
                    );
                }
                for (a, b) in got.finish().0.iter().zip(want.finish().0) {
                    assert!((a - b).abs() < 1e-5, "{a} {b}");
                }
            }
            run.release(&mut pool);
            assert_eq!(pool.stats().bytes_used, before);
        }
        pool.release(seq);
    }
}
