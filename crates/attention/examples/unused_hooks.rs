//! What hooks cost a step that nobody observes: `cargo run --release -p antefix-attention --example unused_hooks`.
//!
//! Prints the nanoseconds that a step of a batch spends on finding out that there is nothing to do, the least of 50 rounds.

use std::hint::black_box;
use std::time::Instant;

use antefix_attention::hooks::{Site, Watch};

const LAYERS: usize = 30;
const STEPS: u32 = 2000;

fn step(sequences: usize) -> usize {
    let nobody = (0..sequences).map(|_| (None, 1, 100));
    let mut watch = Watch::of(LAYERS, black_box(nobody));
    let mut wanted = 0;
    for layer in 0..=LAYERS {
        for site in Site::ALL {
            wanted += usize::from(black_box(&watch).wants(black_box(layer), site));
        }
    }
    watch.narrow(&vec![1; sequences]);
    wanted
}

fn main() {
    for sequences in [1, 8, 32] {
        let round = || {
            let start = Instant::now();
            for _ in 0..STEPS {
                assert_eq!(step(sequences), 0);
            }
            start.elapsed().as_nanos() as f64 / f64::from(STEPS)
        };
        let best = (0..50).map(|_| round()).fold(f64::INFINITY, f64::min);
        #[expect(clippy::print_stdout, reason = "that is what it is for")]
        {
            println!("{sequences} sequences, {LAYERS} layers: {best:.0} ns a step");
        }
    }
}
