//! Which keys are hidden sinks of a head (section 3.1), and how their weight is handed on (section 3.6).

use antefix_attention::readout::Columns;

/// From which mean weight on a key it counts as a sink.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Threshold {
    /// `alpha / rows` (the paper); in a layer with a sliding window, over its length if that is smaller.
    Alpha(f64),
    /// This mean weight (the official program: 0.1).
    Fixed(f64),
}

/// The criterion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// From which mean weight.
    pub threshold: Threshold,
    /// Keys that fewer rows have seen are none: the last keys of a text have means over hardly any rows. 1 in the official program.
    pub min_rows: u32,
    /// Spare the first sink that is found, whichever it is (the official program), instead of the first token.
    pub spare_first_found: bool,
}

impl Rule {
    /// That of the paper, but for keys that hardly any row has seen.
    pub const PAPER: Self = Self {
        threshold: Threshold::Alpha(5.0),
        min_rows: 8,
        spare_first_found: false,
    };

    /// Sinks among the keys of `columns`, which `rows` rows have seen, ascending.
    pub fn sinks(&self, columns: &Columns, rows: usize, window: Option<u32>) -> Vec<u32> {
        let rows = window.map_or(rows, |w| rows.min(w as usize));
        let least = match self.threshold {
            Threshold::Alpha(alpha) => alpha / rows.max(1) as f64,
            Threshold::Fixed(least) => least,
        };
        let means = columns.means();
        let is_sink = |&j: &usize| means[j] > least && columns.seen[j] >= self.min_rows;
        let found = (0..means.len()).filter(is_sink).map(|j| j as u32);
        match self.spare_first_found {
            true => found.skip(1).collect(),
            false => found.filter(|&j| j != 0).collect(),
        }
    }
}

/// Hands a part `1 - beta` of a row's weight on `sinks` to its other keys, in proportion to their weights: `z: [D]` is the output of
/// the row before and after (step 3.6). `weight(j)` and `value(j, d)` are those of key `j`.
///
/// A row that sees nothing but sinks stays as it is.
pub fn hand_on(
    sinks: &[u32],
    beta: f32,
    weight: impl Fn(u32) -> f32,
    value: impl Fn(u32, usize) -> f32,
    z: &mut [f32],
) {
    let mut mass = 0.0f32;
    let mut of_sinks = vec![0.0f32; z.len()];
    for &j in sinks {
        let a = weight(j);
        if a == 0.0 {
            continue;
        }
        mass += a;
        for (d, sum) in of_sinks.iter_mut().enumerate() {
            *sum += a * value(j, d);
        }
    }
    if mass == 0.0 || 1.0 - mass <= 1e-6 {
        return;
    }
    let others = (1.0 - beta * mass) / (1.0 - mass);
    for (z, sinks) in z.iter_mut().zip(of_sinks) {
        *z = others * (*z - sinks) + beta * sinks;
    }
}
