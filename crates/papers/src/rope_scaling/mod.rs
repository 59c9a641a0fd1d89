//! Other ways to use a model beyond its trained window: what `entropy_abf` is compared with. One file each.

pub mod llama3;
pub mod ntk;
pub mod parts;
pub mod pi;
pub mod yarn;

use antefix_attention::method::{Facts, Kind, Knob, Knobs, Preset, Rig, RigError, Rotation, Stretch};
use antefix_kernels::ops::MAX_POSITIONS;

/// How far to stretch.
pub(crate) const FACTOR: Knob = Knob {
    name: "factor",
    kind: Kind::float(1.0, 16.0),
    default: Preset::Float(4.0),
    unit: "trained windows",
    help: "Longest request, in trained windows; the smallest of 2, 4, 8 ... that holds a request is used for it",
    source: "ours",
};

/// Whether short requests are changed, too.
pub(crate) const ALWAYS: Knob = Knob {
    name: "always",
    kind: Kind::Bool,
    default: Preset::Bool(false),
    unit: "",
    help: "Stretch requests that fit the trained window, too, by the whole factor: for measurements",
    source: "ours",
};

/// Installs `rotation(s)`, the rotation for requests of up to `s` trained windows.
///
/// Requests inside the trained window keep the model's own angles, bit for bit; longer ones get the smallest step of 2, 4, 8 ... up to the
/// knob `factor` that holds them, prompt and answer together, once and for all.
pub(crate) fn install(
    knobs: &Knobs,
    rig: &mut Rig<'_>,
    rotation: impl Fn(&Facts, f64) -> Rotation,
) -> Result<(), RigError> {
    let facts = rig.facts();
    let factor = knobs.float("factor");
    let positions = |s: f64| (facts.context as f64 * s) as usize;
    if positions(factor) > MAX_POSITIONS {
        return Err(rig.senseless(format!(
            "{factor} windows of {} tokens are more than the {MAX_POSITIONS} positions that there are",
            facts.context
        )));
    }
    if facts.full_layers().next().is_none() {
        return Err(rig.misfit("every layer has a window, no key is ever far away"));
    }
    let step = |s: f64| (positions(s), rotation(facts, s));
    let steps = if knobs.bool("always") {
        vec![step(factor)]
    } else {
        let doubled = std::iter::successors(Some(2.0), |s| Some(s * 2.0)).take_while(|s| *s < factor);
        let last = (factor > 1.0).then_some(factor);
        let plain = (facts.context, Rotation::default());
        std::iter::once(plain)
            .chain(doubled.chain(last).map(step))
            .collect()
    };
    rig.set_stretch(Stretch { steps })
}

/// The base of the layers that see far keys.
pub(crate) fn base(facts: &Facts) -> f64 {
    let layer = facts.full_layers().next().unwrap_or(0);
    f64::from(facts.layers[layer].rope_base)
}

/// Their rotated dimensions.
pub(crate) fn dims(facts: &Facts) -> f64 {
    let layer = facts.full_layers().next().unwrap_or(0);
    facts.layers[layer].rope_dims as f64
}

#[cfg(test)]
mod tests {
    use antefix_attention::method::Freq;

    #[test]
    fn they_conform() {
        for method in [
            &super::pi::PositionInterpolation as &'static dyn antefix_attention::method::Method,
            &super::ntk::NtkAware,
            &super::parts::NtkByParts,
            &super::yarn::Yarn,
            &super::llama3::Llama3,
        ] {
            antefix_conformance::method::check(method);
        }
    }

    /// By parts and YaRN, with the ramps of their papers.
    fn ramps(factor: f64, original: f64) -> [Freq; 2] {
        let parts = Freq::ByParts {
            factor,
            low: 1.0,
            high: 32.0,
            original,
        };
        let yarn = Freq::Yarn {
            factor,
            fast: 32.0,
            slow: 1.0,
            original,
        };
        [parts, yarn]
    }

    /// SmolLM2 (base 1e5, 64 dimensions, 8,192 positions) stretched 4 times, as the specification of `entropy_abf` tabulates it.
    #[test]
    fn tables_are_the_golden_ones() {
        let plain = Freq::Base { base: 1e5 }.apply(1e5, &[0.0; 32]);
        let (factor, original) = (4.0, 8192.0);
        let [parts, yarn] = ramps(factor, original);
        let llama3 = Freq::Llama3 {
            factor,
            low: 1.0,
            high: 4.0,
            original,
        };
        let cases: [(&str, Freq, [f64; 5]); 6] = [
            (
                "plain",
                Freq::Model,
                [1.0, 2.73842e-2, 3.16228e-3, 7.49894e-4, 1.43301e-5],
            ),
            (
                "ntk",
                Freq::Ntk { factor },
                [1.0, 1.75100e-2, 1.54618e-3, 3.06601e-4, 3.58253e-6],
            ),
            (
                "by parts",
                parts,
                [1.0, 2.73842e-2, 1.02950e-3, 1.87474e-4, 3.58253e-6],
            ),
            (
                "yarn",
                yarn,
                [1.0, 2.73842e-2, 1.73925e-3, 1.87474e-4, 3.58253e-6],
            ),
            (
                "llama3",
                llama3,
                [1.0, 2.73842e-2, 3.16228e-3, 1.87474e-4, 3.58253e-6],
            ),
            (
                "abf",
                Freq::Base { base: 918_959.0 },
                [1.0, 1.36921e-2, 1.04316e-3, 1.87474e-4, 1.67131e-6],
            ),
        ];
        for (name, freq, want) in cases {
            let table = freq.apply(1e5, &plain);
            for (pair, want) in [0, 10, 16, 20, 31].into_iter().zip(want) {
                let got = f64::from(table[pair]);
                assert!(
                    (got / want - 1.0).abs() < 5e-6,
                    "{name}, pair {pair}: {got} for {want}"
                );
            }
        }
    }

    /// Laws 2, 3 and 8 of that specification, for any base, stretch and number of dimensions.
    #[test]
    fn ends_and_ramps_obey_their_laws() {
        let near = |a: f32, b: f64| (f64::from(a) / b - 1.0).abs() < 1e-6;
        for (base, dims, original) in [
            (1e4, 64, 4096.0),
            (1e5, 64, 8192.0),
            (1e6, 128, 32_768.0),
            (5e5, 256, 8192.0),
        ] {
            let plain = Freq::Base { base }.apply(base, &vec![0.0; dims / 2]);
            let last = f64::from(plain[dims / 2 - 1]);
            for factor in [1.5, 2.0, 4.0, 32.0] {
                // Interpolation: the angle at `p` is the plain one at `p / s`.
                let linear = Freq::Linear { factor }.apply(base, &plain);
                assert!(
                    linear
                        .iter()
                        .zip(&plain)
                        .all(|(&l, &p)| near(l, f64::from(p) / factor))
                );
                // NTK-aware: the fastest pair untouched, the slowest stretched all the way.
                let ntk = Freq::Ntk { factor }.apply(base, &plain);
                assert!(
                    ntk[0] == 1.0 && near(ntk[dims / 2 - 1], last / factor),
                    "{base} {factor}"
                );
                // YaRN and by parts differ on their ramps only.
                let [parts, yarn] = ramps(factor, original).map(|freq| freq.apply(base, &plain));
                let mut outside = [0, 0];
                for (i, &f) in plain.iter().enumerate() {
                    let turns = original * f64::from(f) / std::f64::consts::TAU;
                    // Yarn's ramp ends on whole pairs, up to one beyond.
                    let step = base.powf(2.0 / dims as f64);
                    if turns > 32.0 * step {
                        assert_eq!((parts[i], yarn[i]), (f, f), "fast pair {i}");
                        outside[0] += 1;
                    } else if turns < 1.0 / step {
                        assert_eq!(parts[i], yarn[i], "slow pair {i}");
                        assert!(near(yarn[i], f64::from(f) / factor));
                        outside[1] += 1;
                    }
                }
                assert!(outside.iter().all(|&n| n > 3), "{outside:?}");
            }
        }
    }
}
