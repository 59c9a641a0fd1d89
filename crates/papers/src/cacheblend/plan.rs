//! How many chunk rows go on behind each layer, and how they are chosen: what cacheblend decides.

use antefix_attention::{ChunkLayout, ChunkUse, Deviation, Mend};

/// How the share of rows falls from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// One selection, at layer 1: what the official code does.
    Single,
    /// Another one at every layer, each out of the rows of the one before (section 4.3 of the paper: gradual filtering). The paper
    /// gives no numbers; ours fall linearly around the mean.
    Gradual,
}

/// How far the gradual share lies above its mean at layer 1, and below it at the last layer.
const SLOPE: f64 = 0.3;

/// cacheblend with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Blending {
    /// Share of chunk rows that are computed again, the mean over the layers behind layer 0; in `0..=1`.
    pub ratio: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// How rows are chosen.
    pub deviation: Deviation,
}

impl Blending {
    /// Step 3: rows that go on behind the selection of each layer, `[L]`. Never more than behind the layer before.
    pub fn keep(&self, layers: usize, rows: usize) -> Vec<usize> {
        let mut left = rows;
        // Never above all rows: else the mean would fall short.
        let slope = SLOPE.min(1.0 / self.ratio - 1.0);
        (0..layers)
            .map(|l| {
                let share = match self.schedule {
                    _ if l == 0 => 1.0,
                    Schedule::Gradual if layers > 2 => {
                        let at = (l - 1) as f64 / (layers - 2) as f64;
                        self.ratio * (1.0 + slope * (1.0 - 2.0 * at))
                    }
                    _ => self.ratio,
                };
                left = left.min((share * rows as f64).ceil() as usize);
                left
            })
            .collect()
    }

    /// Share of full prefill's matrix products that are left on a model of `layers` layers, of whose layer the projections to queries,
    /// keys and values are the share `qkv` (section 3.6 of the specification: layer 0 runs for all rows but computes no key, layer 1
    /// projects all rows).
    pub fn cost(&self, layers: usize, qkv: f64) -> f64 {
        (1.0 + qkv + self.ratio * (layers as f64 - 1.0)) / layers as f64
    }
}

impl ChunkUse for Blending {
    /// Step 1: the chunks stand one after the other, as in an ordinary prompt.
    fn layout(&self, prefix: usize, chunks: &[usize]) -> ChunkLayout {
        ChunkLayout::in_line(prefix, chunks)
    }

    fn mend(&self, layers: usize, rows: usize) -> Option<Mend> {
        (self.ratio > 0.0 && rows > 0).then(|| Mend {
            keep: self.keep(layers, rows),
            deviation: self.deviation,
        })
    }
}
