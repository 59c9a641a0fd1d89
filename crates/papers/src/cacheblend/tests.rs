//! cacheblend's decisions against its reference. The mended prompts themselves are tested where they are computed
//! (`crates/models/tests/reuse.rs`).

use antefix_attention::ChunkUse;

use super::*;

#[test]
fn it_conforms() {
    antefix_conformance::method::check(&CacheBlend);
}

fn blending(ratio: f64, schedule: Schedule) -> Blending {
    Blending {
        ratio,
        schedule,
        deviation: Deviation::Values,
    }
}

#[test]
fn counts_fall_around_the_mean_and_never_rise() {
    for (layers, rows) in [(24, 2048), (30, 8192), (18, 1000), (3, 40), (2, 7)] {
        for ratio in [0.05, 0.15, 0.5, 0.9, 1.0] {
            let keep = blending(ratio, Schedule::Gradual).keep(layers, rows);
            assert_eq!((keep.len(), keep[0]), (layers, rows));
            assert!(keep.windows(2).all(|w| w[0] >= w[1]), "{keep:?}");
            let mean = keep[1..].iter().sum::<usize>() as f64 / (layers - 1) as f64;
            // Rounded up.
            assert!(
                (mean - ratio * rows as f64).abs() <= 1.0,
                "{mean} of {rows} at {ratio}"
            );
            let single = blending(ratio, Schedule::Single).keep(layers, rows);
            assert!(
                single[1..]
                    .iter()
                    .all(|&k| k == (ratio * rows as f64).ceil() as usize)
            );
        }
    }
}

#[test]
fn nothing_and_everything_are_the_ends_of_the_ratio() {
    let none = blending(0.0, Schedule::Gradual);
    assert_eq!(none.mend(24, 100), None);
    assert_eq!(blending(0.5, Schedule::Gradual).mend(24, 0), None);
    assert_eq!(blending(1.0, Schedule::Single).keep(5, 100), [100; 5]);
}

#[test]
fn the_cost_is_the_bound_of_the_specification() {
    // Section 3.6: SmolLM2-135M 0.184, Qwen2.5-0.5B 0.188, Gemma-3-270M 0.207 at 15 %. Widths: queries, keys, values, output; gate, up, down.
    let share =
        |d: f64, q: f64, kv: f64, ff: f64| (q + 2.0 * kv) * d / ((q + 2.0 * kv) * d + q * d + 3.0 * d * ff);
    let at = |layers, qkv| blending(0.15, Schedule::Single).cost(layers, qkv);
    assert!((at(30, share(576.0, 576.0, 192.0, 1536.0)) - 0.184).abs() < 0.002);
    assert!((at(24, share(896.0, 896.0, 128.0, 4864.0)) - 0.188).abs() < 0.002);
    assert!((at(18, share(640.0, 1024.0, 256.0, 2048.0)) - 0.207).abs() < 0.008);
}

#[test]
fn placement_is_a_group_action() {
    let frequencies: Vec<f64> = (0..8).map(|i| 1e4f64.powf(-f64::from(i) / 8.0)).collect();
    let key: Vec<f64> = (0..16).map(|i| f64::from(i * 37 % 11) - 5.0).collect();
    let there = reference::place(&key, 700, &frequencies);
    let back = reference::place(&there, -700, &frequencies);
    let twice = reference::place(&reference::place(&key, 400, &frequencies), 300, &frequencies);
    for i in 0..16 {
        assert!((back[i] - key[i]).abs() < 1e-9 && (twice[i] - there[i]).abs() < 1e-9);
    }
    assert!(
        (reference::deviation(&there, &key)).sqrt() > 1.0,
        "moving matters"
    );
}

#[test]
fn selection_takes_the_most_wrong_rows_and_the_earlier_of_equals() {
    assert_eq!(reference::select(&[1.0, 5.0, 5.0, 0.0, 9.0], 3), [1, 2, 4]);
    assert_eq!(reference::select(&[2.0, 2.0, 2.0], 2), [0, 1]);
    assert_eq!(reference::select(&[1.0], 5), [0]);
    assert_eq!(reference::select(&[], 5), [0usize; 0]);
}

#[test]
fn no_query_sees_a_later_key() {
    let v: Vec<Vec<f64>> = (0..4).map(|t| vec![f64::from(t) * 10.0]).collect();
    let k = vec![vec![0.0]; 4];
    // A gathered query at position 5 between rows at 2, 5, 8, 9: the official mask would let it see three of them.
    let out = reference::attend(&[1.0], 5, &[2, 5, 8, 9], &k, &v);
    assert!((out[0] - 5.0).abs() < 1e-12, "{out:?}");
}
