//! The four kinds of task (4.05) as problems ([`super::Problem`]).

mod classify;
mod control;
mod events;
mod forecast;

use antefix_papers::aaren::config::sinusoid;
use candle_core::{Device, Result, Tensor};

pub use classify::Classify;
pub use control::Control;
pub use events::Events;
pub use forecast::Forecast;

/// Items of a batch when nothing is learned.
const TEST_BATCH: usize = 64;

/// Positions `0..n`, `[n, d]`.
fn places(n: usize, d: usize) -> Result<Tensor> {
    let mut all = vec![0.0; n * d];
    for (i, row) in all.chunks_exact_mut(d).enumerate() {
        sinusoid(i as f64, d, row);
    }
    Tensor::from_vec(all, (n, d), &Device::Cpu)
}
