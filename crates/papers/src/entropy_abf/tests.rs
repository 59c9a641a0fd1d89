//! entropy_abf against figures computed elsewhere, and its laws.

use antefix_attention::method::{Chosen, Profiles, Program};

use super::reference::{Row, attention};
use super::*;

#[test]
fn it_conforms() {
    antefix_conformance::method::check(&EntropyAbf);
}

/// The generator of the golden vectors: a 64-bit linear congruence, upper 24 bits, in -1..1.
fn draw(state: &mut u64, n: usize) -> Vec<f64> {
    let mut next = || {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        2.0 * (*state >> 40) as f64 / f64::from(1 << 24) - 1.0
    };
    (0..n).map(|_| next()).collect()
}

const N: usize = 24;
const D: usize = 8;
const BASE: f64 = 1e4;
const WINDOW: u32 = 8;
const FACTOR: f64 = 3.0;

fn rows(freq: &Freq, scale: ScoreScale) -> Vec<Row> {
    let mut state = 3;
    let [q, k, v] = [2.0, 2.0, 1.0].map(|by| {
        draw(&mut state, N * D)
            .into_iter()
            .map(|x| x * by)
            .collect::<Vec<_>>()
    });
    let plain = Freq::Base { base: BASE }.apply(BASE, &[0.0; D / 2]);
    let freqs: Vec<f64> = freq.apply(BASE, &plain).into_iter().map(f64::from).collect();
    attention(&q, &k, &v, &freqs, |p| f64::from(scale.at(p as u32)))
}

/// Entropy and first four outputs of the last row, computed with NumPy by the author of the specification.
#[test]
fn tables_and_scales_give_the_golden_rows() {
    let original = f64::from(WINDOW);
    let abf = Freq::Base { base: 5e5 };
    let yarn = (0.1 * FACTOR.ln() + 1.0).powi(2) as f32;
    let parts = Freq::ByParts {
        factor: FACTOR,
        low: 1.0,
        high: 32.0,
        original,
    };
    let ramp = Freq::Yarn {
        factor: FACTOR,
        fast: 32.0,
        slow: 1.0,
        original,
    };
    let log = ScoreScale::LogN { from: WINDOW };
    let cases: [(&str, Freq, ScoreScale, [f64; 5]); 7] = [
        (
            "plain",
            Freq::Model,
            ScoreScale::One,
            [2.199602, -0.261342, 0.183200, 0.498641, -0.043531],
        ),
        (
            "interpolation",
            Freq::Linear { factor: FACTOR },
            ScoreScale::One,
            [2.218347, -0.173080, 0.163516, 0.369829, 0.105149],
        ),
        (
            "ntk",
            Freq::Ntk { factor: FACTOR },
            ScoreScale::One,
            [2.123649, -0.239821, 0.196502, 0.498923, -0.049383],
        ),
        (
            "by parts",
            parts,
            ScoreScale::One,
            [2.244367, -0.179635, 0.168392, 0.365074, 0.120143],
        ),
        (
            "yarn",
            ramp,
            ScoreScale::Constant(yarn),
            [1.965574, -0.210254, 0.205626, 0.491167, -0.051703],
        ),
        (
            "abf",
            abf.clone(),
            ScoreScale::One,
            [2.286547, -0.232188, 0.199087, 0.436863, -0.017667],
        ),
        (
            "eabf",
            abf.clone(),
            log,
            [1.492514, -0.162513, 0.201234, 0.559022, -0.106690],
        ),
    ];
    for (name, freq, scale, want) in cases {
        let row = &rows(&freq, scale)[N - 1];
        let got: Vec<f64> = std::iter::once(row.entropy)
            .chain(row.out[..4].iter().copied())
            .collect();
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 2e-6, "{name}: {got} for {want}");
        }
    }
    assert!((log.at(23) - 1.528_321).abs() < 1e-6);
    // Inside the window the scale does nothing.
    let (with, without) = (rows(&abf, log), rows(&abf, ScoreScale::One));
    assert_eq!(with[7], without[7]);
    assert!((with[7].entropy - 1.562_298).abs() < 2e-6);
}

#[test]
fn sharper_scores_never_raise_the_entropy() {
    let at = |c: f32| rows(&Freq::Model, ScoreScale::Constant(c));
    let (mut before, steps) = (at(0.5), [0.75, 1.0, 1.5, 2.5]);
    for c in steps {
        let now = at(c);
        assert!(
            now.iter()
                .zip(&before)
                .all(|(n, b)| n.entropy <= b.entropy + 1e-12),
            "at {c}"
        );
        before = now;
    }
}

fn smollm2() -> Facts {
    let example = Facts::example();
    let layer = antefix_attention::method::LayerFacts {
        window: None,
        rope_base: 1e5,
        rope_dims: 64,
    };
    Facts {
        context: 8192,
        layers: vec![layer; 4],
        ..example
    }
}

fn installed(knobs: &str) -> Program {
    let raw = antefix_attention::method::RawChoice::parse(knobs).expect("well written");
    let knobs = Knobs::new(&CARD, &raw.knobs).expect("in range");
    let chosen = Chosen {
        method: &EntropyAbf,
        knobs,
    };
    Rig::assemble(&smollm2(), &Profiles::default(), &[chosen]).expect("it goes")
}

#[test]
fn the_smallest_base_brings_the_critical_pair_back_to_its_trained_angle() {
    let facts = smollm2();
    for (s, want) in [(2.0, 303_143.0), (4.0, 918_959.0)] {
        let base = smallest_base(&facts, s);
        assert!((base / want - 1.0).abs() < 1e-4, "{s}: {base}");
        // The largest ratio of an angle on s windows to the trained one, over the pairs from the critical one on, is 1 there.
        let ratio = |i: f64| s * (base.powf(-2.0 * i / 64.0)) / 1e5f64.powf(-2.0 * i / 64.0);
        assert!((ratio(20.0) - 1.0).abs() < 1e-9);
        assert!((20..32).all(|i| ratio(f64::from(i)) <= 1.0 + 1e-9));
    }
}

/// Critical pairs and bases of section 3.2 of the specification, and scales of 3.1 and 3.3.
#[test]
fn bases_and_scales_are_those_of_the_tables() {
    // Base, rotated dimensions, window, stretch: critical pair, NTK-aware base, smallest base.
    let rows = [
        (1e5, 64, 8192, 2.0, 20.0, 204_522.0, 303_143.0),
        (1e5, 64, 8192, 4.0, 20.0, 418_294.0, 918_959.0),
        (1e6, 64, 32_768, 4.0, 20.0, 4.183e6, 9.190e6),
        (1e6, 256, 32_768, 4.0, 80.0, 4.044e6, 9.190e6),
        (1e4, 128, 4096, 4.0, 46.0, 40_890.0, 68_810.0),
    ];
    for (base, dims, window, s, pair, ntk, smallest) in rows {
        let mut facts = smollm2();
        facts.context = window;
        for layer in &mut facts.layers {
            (layer.rope_base, layer.rope_dims) = (base as f32, dims);
        }
        assert_eq!(critical_pair(base, dims as f64, window as f64), pair);
        let got = smallest_base(&facts, s);
        assert!((got / smallest - 1.0).abs() < 2e-4, "{got} for {smallest}");
        // The NTK-aware table is that of its base.
        let plain = Freq::Base { base }.apply(base, &vec![0.0; dims / 2]);
        let table = Freq::Ntk { factor: s }.apply(base, &plain);
        let of_base = Freq::Base { base: ntk }.apply(base, &plain);
        let pairs = table.iter().zip(&of_base);
        assert!(pairs.into_iter().all(|(a, b)| (a / b - 1.0).abs() < 2e-4));
    }
    let scale = ScoreScale::LogN { from: 8192 };
    for (position, want) in [(8192, 1.000_014), (16_383, 1.076_923), (32_767, 1.153_846)] {
        assert!((scale.at(position) - want).abs() < 1e-6, "at {position}");
    }
    // YaRN's factor on queries and keys, squared.
    for (factor, want) in [(2.0, 1.1434), (4.0, 1.2965)] {
        let raw = antefix_attention::method::RawChoice::parse(&format!("yarn,factor={factor},always=true"));
        let knobs = &raw.expect("well written").knobs;
        let method: &'static dyn Method = &rope_scaling::yarn::Yarn;
        let chosen = Chosen {
            method,
            knobs: Knobs::new(method.card(), knobs).expect("in range"),
        };
        let program = Rig::assemble(&smollm2(), &Profiles::default(), &[chosen]).expect("it goes");
        let scale = program.rotation(10).expect("always").scale(0, 5);
        assert!((f64::from(scale) - want).abs() < 1e-4, "{factor}: {scale}");
    }
}

#[test]
fn short_requests_keep_the_models_angles_and_long_ones_take_the_smallest_step() {
    let program = installed("entropy_abf,factor=4");
    assert_eq!(program.rotation(8192), None);
    let base = |tokens| match program.rotation(tokens).expect("stretched").freq {
        Freq::Base { base } => base,
        ref other => panic!("{other:?}"),
    };
    assert!((base(8193) / 303_143.0 - 1.0).abs() < 1e-4);
    assert!((base(16_385) / 918_959.0 - 1.0).abs() < 1e-4);
    assert_eq!(program.context(8192), 32_768);
    let always = installed("entropy_abf,factor=2,always=true,base=500000,skip_layers=0");
    let rotation = always.rotation(10).expect("always");
    assert_eq!(rotation.freq, Freq::Base { base: 500_000.0 });
    assert!(rotation.scale(0, 8190) == 1.0 && rotation.scale(0, 16_000) > 1.0);
    assert_eq!(installed("entropy_abf,factor=1").rotation(5000), None);
}

#[test]
fn each_part_can_be_left_out() {
    let base_only = installed("entropy_abf,parts=base_only");
    assert_eq!(base_only.rotation(9000).map(|r| r.scale), Some(ScoreScale::One));
    let scale_only = installed("entropy_abf,parts=scale_only,from=4096");
    let rotation = scale_only.rotation(9000).expect("scaled");
    assert_eq!(
        (&rotation.freq, rotation.scale),
        (&Freq::Model, ScoreScale::LogN { from: 4096 })
    );
}
