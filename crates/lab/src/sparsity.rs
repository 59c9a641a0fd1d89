//! How sparse a model's own attention is: how few keys carry most of the weight, by layer and head.
//!
//! Some rows of the text are read while it is computed densely; a row of weights a thread is all that is held.

use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::hooks::{At, Hook, HookPlan, HookSpec, Observer, Site, Sources};
use antefix_attention::readout::{AttentionView, Weights};
use antefix_engine::Session;
use antefix_models::decoder::Model;
use serde::Serialize;

use crate::heads::HeadsError;

/// Shares of a row's weight that are looked at.
pub const MASSES: [f64; 3] = [0.9, 0.95, 0.99];

/// Rows of a step.
const CHUNK: usize = 512;

/// What the rows of one head need, in the mean.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadSparsity {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Keys that a row of the layer sees at most; `None`: all of them.
    pub window: Option<u32>,
    /// Rows that were read.
    pub rows: usize,
    /// Keys that a row sees.
    pub keys: f64,
    /// Nats.
    pub entropy: f64,
    /// One for each of [`MASSES`].
    pub needed: Vec<Needed>,
}

/// The fewest keys of a row that carry a share of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Needed {
    /// The share of the weight.
    pub mass: f64,
    /// How many keys.
    pub keys: f64,
    /// How many of those that the row sees, 0 to 1.
    pub share: f64,
}

/// Sums over the rows of a head.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    rows: usize,
    keys: f64,
    entropy: f64,
    /// Keys, and share of the keys, for each of [`MASSES`].
    needed: [[f64; 2]; MASSES.len()],
}

impl Sums {
    fn add(&mut self, row: &Weights<'_>, sorted: &mut Vec<f32>) {
        let keys = row.p.len() as f64;
        self.rows += 1;
        self.keys += keys;
        self.entropy += f64::from(row.entropy);
        for (sum, count) in self.needed.iter_mut().zip(fewest(row.p, sorted)) {
            sum[0] += count as f64;
            sum[1] += count as f64 / keys;
        }
    }

    fn merge(&mut self, other: &Self) {
        self.rows += other.rows;
        self.keys += other.keys;
        self.entropy += other.entropy;
        let pairs = self
            .needed
            .iter_mut()
            .flatten()
            .zip(other.needed.iter().flatten());
        pairs.for_each(|(a, b)| *a += b);
    }
}

/// How many of the largest of `weights` sum to each of [`MASSES`] of their sum. `sorted` is scratch.
fn fewest(weights: &[f32], sorted: &mut Vec<f32>) -> [usize; MASSES.len()] {
    sorted.clear();
    sorted.extend_from_slice(weights);
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let all: f64 = sorted.iter().map(|&w| f64::from(w)).sum();
    let (mut sum, mut count) = (0.0, 0);
    MASSES.map(|mass| {
        while sum < mass * all && count < sorted.len() {
            sum += f64::from(sorted[count]);
            count += 1;
        }
        count
    })
}

/// Reads the rows at `positions`, ascending.
struct Look {
    layers: usize,
    positions: Vec<usize>,
    /// `[layers][heads]`.
    sums: Arc<Mutex<Vec<Vec<Sums>>>>,
}

impl Look {
    fn read(view: &AttentionView<'_>, rows: &[usize]) -> Vec<Sums> {
        view.run.1.map(view.geometry.heads, |head| {
            let (mut sums, mut sorted) = (Sums::default(), Vec::new());
            view.each_row(head, rows, &mut |_, row| sums.add(&row, &mut sorted));
            sums
        })
    }
}

impl Hook for Look {
    fn wants(&self, layer: usize) -> u32 {
        if layer < self.layers { Site::Z.bit() } else { 0 }
    }

    fn fingerprint(&self) -> Option<u64> {
        None
    }

    fn at(&mut self, at: &At<'_>, _: &mut [f32]) {
        let Some(view) = &at.attention else { return };
        let from = at.pos0 as usize;
        let here = self
            .positions
            .iter()
            .filter(|&&p| p >= from && p < from + at.rows);
        let rows: Vec<usize> = here.map(|p| p - from).collect();
        if rows.is_empty() {
            return;
        }
        let read = Self::read(view, &rows);
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let of_layer = &mut sums[at.layer];
        of_layer.resize(read.len(), Sums::default());
        of_layer.iter_mut().zip(&read).for_each(|(a, b)| a.merge(b));
    }
}

/// Reads `rows` rows in equal distances of `tokens`, in every layer and head; all of them if there are no more.
///
/// # Errors
/// When the model fails.
pub fn sparsity(model: &Arc<Model>, tokens: &[u32], rows: usize) -> Result<Vec<HeadSparsity>, HeadsError> {
    let n = tokens.len();
    let rows = rows.clamp(1, n.max(1));
    let layers = model.spec().layers;
    let sums = Arc::new(Mutex::new(vec![Vec::new(); layers]));
    let look = Look {
        layers,
        positions: (0..rows).map(|i| (2 * i + 1) * n / (2 * rows)).collect(),
        sums: Arc::clone(&sums),
    };
    let plan = HookPlan::compile(&HookSpec::default(), model.hook_shape(), &Sources::default())?;
    let observer = Observer::new(Arc::new(plan), n, 0).with(Box::new(look));
    let mut session = Session::new(Arc::clone(model), n, CHUNK);
    session.observe(Some(Arc::new(observer)));
    session.feed(tokens, 0, &mut Vec::new())?;
    let sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
    let head = |layer: usize, (head, sums): (usize, &Sums)| {
        let mean = |x: f64| x / sums.rows.max(1) as f64;
        let needed = MASSES.iter().zip(&sums.needed);
        HeadSparsity {
            layer,
            head,
            window: model.spec().layer_kinds[layer].window,
            rows: sums.rows,
            keys: mean(sums.keys),
            entropy: mean(sums.entropy),
            needed: needed
                .map(|(&mass, &[keys, share])| Needed {
                    mass,
                    keys: mean(keys),
                    share: mean(share),
                })
                .collect(),
        }
    };
    let of_layer = |(layer, sums): (usize, &Vec<Sums>)| -> Vec<HeadSparsity> {
        sums.iter().enumerate().map(|one| head(layer, one)).collect()
    };
    Ok(sums.iter().enumerate().flat_map(of_layer).collect())
}

#[cfg(test)]
mod tests {
    use antefix_attention::hooks::{Positions, Probe};
    use antefix_attention::readout::Reads;
    use antefix_conformance::tiny;
    use antefix_kernels::cpu::Cpu;
    use antefix_models::spec::Arch;

    use super::*;

    #[test]
    fn the_largest_weights_are_counted_until_they_carry_the_share() {
        let count = |weights: &[f32]| fewest(weights, &mut Vec::new());
        assert_eq!(count(&[0.0, 1.0, 0.0]), [1, 1, 1]);
        assert_eq!(count(&[0.125; 8]), [8, 8, 8]);
        assert_eq!(count(&[0.02, 0.02, 0.91, 0.05]), [1, 2, 4]);
        assert_eq!(count(&[]), [0, 0, 0]);
    }

    /// Against all rows of weights, counted key by key.
    #[test]
    fn the_figures_are_those_of_the_rows_of_weights() {
        for (arch, tokens) in [(Arch::Gemma3, 700), (Arch::Llama, 90)] {
            let (model, _) = tiny(arch, Cpu::best(), 2);
            let tokens: Vec<u32> = (0..tokens).map(|i| (i * 37 + 11) % 250).collect();
            let rows = 7;
            let got = sparsity(&model, &tokens, rows).unwrap();
            let positions: Vec<u32> = (0..rows)
                .map(|i| ((2 * i + 1) * tokens.len() / (2 * rows)) as u32)
                .collect();
            let spec = HookSpec {
                probes: vec![Probe {
                    id: String::new(),
                    layers: None,
                    heads: None,
                    positions: Positions::List(positions),
                    read: Reads {
                        weights: true,
                        ..Reads::default()
                    },
                }],
                ..HookSpec::default()
            };
            let plan = HookPlan::compile(&spec, model.hook_shape(), &Sources::default()).unwrap();
            let observer = Arc::new(Observer::new(Arc::new(plan), tokens.len(), 1 << 28));
            let mut session = Session::new(Arc::clone(&model), tokens.len(), 64);
            session.observe(Some(Arc::clone(&observer)));
            session.feed(&tokens, 0, &mut Vec::new()).unwrap();
            let mut seen = 0;
            for head in observer.take_readings().into_iter().flat_map(|probe| probe.1) {
                let mine = got
                    .iter()
                    .find(|s| (s.layer, s.head) == (head.layer, head.head))
                    .unwrap();
                assert_eq!((mine.rows, head.rows.len()), (rows, rows));
                let mut shares = 0.0;
                for row in &head.rows {
                    let mut left = row.weights.clone().unwrap().1;
                    let (n, mut sum, mut count) = (left.len(), 0.0f64, 0);
                    while sum < 0.95 - 1e-6 {
                        let best = (0..left.len())
                            .max_by(|&a, &b| left[a].total_cmp(&left[b]))
                            .unwrap();
                        sum += f64::from(left.swap_remove(best));
                        count += 1;
                    }
                    shares += f64::from(count) / n as f64;
                }
                let share = mine.needed[1].share;
                assert!((share - shares / rows as f64).abs() < 2e-3, "{mine:?} {shares}");
                let entropy: f32 = head.rows.iter().map(|r| r.entropy).sum();
                assert!((mine.entropy - f64::from(entropy) / rows as f64).abs() < 1e-4);
                if let Some(window) = mine.window {
                    assert!(mine.keys <= f64::from(window));
                }
                seen += 1;
            }
            assert_eq!(seen, got.len());
            assert_eq!(got.len(), model.spec().layers * model.spec().heads);
        }
    }
}
