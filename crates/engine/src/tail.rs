//! The queries of a sequence's last rows, kept for its cache policy.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use antefix_attention::hooks::{At, Hook, Site};

/// Queries of the last `rows` rows of every layer, after RoPE, unscaled.
#[derive(Debug)]
pub(crate) struct Tail {
    rows: usize,
    prompt: usize,
    /// One ring a layer, `[rows, width]`: the row at position `p` lies at `p % rows`.
    layers: Mutex<Vec<Vec<f32>>>,
}

impl Tail {
    /// Follows a sequence whose prompt has `prompt` tokens.
    pub(crate) fn new(rows: usize, prompt: usize, layers: usize) -> Self {
        Self {
            rows,
            prompt,
            layers: Mutex::new(vec![Vec::new(); layers]),
        }
    }

    /// The hook that fills it.
    pub(crate) fn hook(self: &Arc<Self>) -> Box<dyn Hook> {
        Box::new(Filler(Arc::clone(self)))
    }

    /// Queries of one layer at positions `next - rows..next`, `[rows, Hq, D]`.
    pub(crate) fn window(&self, layer: usize, next: u32) -> Vec<f32> {
        let layers = self.lock();
        let ring = &layers[layer];
        let width = ring.len() / self.rows.max(1);
        let first = (next as usize).saturating_sub(self.rows);
        (first..next as usize)
            .flat_map(|p| &ring[p % self.rows * width..][..width])
            .copied()
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<f32>>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Filler(Arc<Tail>);

impl Hook for Filler {
    fn wants(&self, layer: usize) -> u32 {
        match layer < self.0.lock().len() {
            true => Site::RotQ.bit(),
            false => 0,
        }
    }

    fn fingerprint(&self) -> Option<u64> {
        None
    }

    fn at(&mut self, at: &At<'_>, rows: &mut [f32]) {
        let tail = &self.0;
        let ring = &mut tail.lock()[at.layer];
        ring.resize(tail.rows * at.width, 0.0);
        for (r, row) in rows.chunks_exact(at.width).enumerate() {
            let p = at.pos0 as usize + r;
            // Rows of the prompt that will be overwritten before anybody asks need not be written.
            if p + tail.rows >= tail.prompt {
                ring[p % tail.rows * at.width..][..at.width].copy_from_slice(row);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rows_come_out_in_order_whatever_the_chunks() {
        for chunk in [1, 2, 3, 7] {
            let tail = Arc::new(Tail::new(3, 7, 1));
            let mut hook = tail.hook();
            let mut at = At {
                layer: 0,
                site: Site::RotQ,
                rows: 0,
                width: 2,
                pos0: 0,
                prompt: 7,
                attention: None,
            };
            let all: Vec<f32> = (0..20).map(|x| x as f32).collect();
            for (i, piece) in all[..14].chunks(chunk * 2).enumerate() {
                at.pos0 = (i * chunk) as u32;
                hook.at(&at, &mut piece.to_vec());
            }
            assert_eq!(tail.window(0, 7), all[8..14], "chunks of {chunk}");
            at.pos0 = 7;
            hook.at(&at, &mut all[14..16].to_vec());
            assert_eq!(tail.window(0, 8), all[10..16]);
        }
    }
}
