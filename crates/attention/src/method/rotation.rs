//! The seam of positions: which angles they become, and how scores are scaled by position.

use std::f64::consts::TAU;

/// How the frequencies of a rotary embedding are changed. Frequencies are in radians a position, pair `i` of `dims / 2`.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Freq {
    /// As the model has them.
    #[default]
    Model,
    /// All divided by `factor`: positions are interpolated.
    Linear {
        /// Divisor, at least 1.
        factor: f64,
    },
    /// Another base.
    Base {
        /// The base.
        base: f64,
    },
    /// The base that stretches the slowest pair by `factor`.
    Ntk {
        /// How much longer, at least 1.
        factor: f64,
    },
    /// Fast pairs as they are, slow ones divided by `factor`, a ramp between them over the turns that a pair makes in `original`
    /// positions.
    ByParts {
        /// Divisor of the slow pairs.
        factor: f64,
        /// Turns up to which a pair is slow.
        low: f64,
        /// Turns from which a pair is fast.
        high: f64,
        /// Positions of the training.
        original: f64,
    },
    /// The same with the ramp over the pair's index, as the released code has it.
    Yarn {
        /// Divisor of the slow pairs.
        factor: f64,
        /// Turns of the first pair on the ramp.
        fast: f64,
        /// Turns of the last pair on the ramp.
        slow: f64,
        /// Positions of the training.
        original: f64,
    },
    /// As Llama 3: the ramp runs over the wavelength.
    Llama3 {
        /// Divisor of the slow pairs.
        factor: f64,
        /// Wavelengths above `original / low` are slow.
        low: f64,
        /// Wavelengths below `original / high` are fast.
        high: f64,
        /// Positions of the training.
        original: f64,
    },
}

impl Freq {
    /// The changed frequencies of an embedding with this `base`, whose own frequencies are `plain: [dims / 2]`.
    pub fn apply(&self, base: f64, plain: &[f32]) -> Vec<f32> {
        let pairs = plain.len();
        let dims = (2 * pairs) as f64;
        let powers = |base: f64| -> Vec<f32> {
            (0..pairs)
                .map(|i| base.powf(-2.0 * i as f64 / dims) as f32)
                .collect()
        };
        // Fast pairs keep their frequency (weight 1), slow ones are divided (weight 0).
        let blend = |factor: f64, weight: &dyn Fn(usize, f64) -> f64| -> Vec<f32> {
            let one = |(i, &f): (usize, &f32)| {
                let f = f64::from(f);
                let keep = weight(i, f).clamp(0.0, 1.0);
                (keep * f + (1.0 - keep) * f / factor) as f32
            };
            plain.iter().enumerate().map(one).collect()
        };
        match *self {
            Self::Model => plain.to_vec(),
            Self::Linear { factor } => plain.iter().map(|&f| (f64::from(f) / factor) as f32).collect(),
            Self::Base { base } => powers(base),
            Self::Ntk { factor } => powers(base * factor.powf(dims / (dims - 2.0))),
            Self::ByParts {
                factor,
                low,
                high,
                original,
            } => blend(factor, &|_, f| (original * f / TAU - low) / (high - low)),
            Self::Yarn {
                factor,
                fast,
                slow,
                original,
            } => {
                let pair_of = |turns: f64| dims * (original / (TAU * turns)).ln() / (2.0 * base.ln());
                let lo = pair_of(fast).floor().max(0.0);
                let mut hi = pair_of(slow).ceil().min(dims - 1.0);
                if lo == hi {
                    hi += 0.001;
                }
                blend(factor, &|i, _| 1.0 - (i as f64 - lo) / (hi - lo))
            }
            Self::Llama3 {
                factor,
                low,
                high,
                original,
            } => blend(factor, &|_, f| (original * f / TAU - low) / (high - low)),
        }
    }
}

/// A factor on the scores of a query row.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum ScoreScale {
    /// 1.
    #[default]
    One,
    /// The same for all rows.
    Constant(f32),
    /// `max(1, ln(p + 1) / ln(from))` for a query at position `p`: 1 up to `from` visible keys.
    LogN {
        /// Keys up to which nothing changes, at least 2.
        from: u32,
    },
}

impl ScoreScale {
    /// The factor of a query at `pos`; exactly 1 where nothing changes.
    pub fn at(self, pos: u32) -> f32 {
        match self {
            Self::One => 1.0,
            Self::Constant(x) => x,
            Self::LogN { from } if pos < from => 1.0,
            Self::LogN { from } => ((f64::from(pos) + 1.0).ln() / f64::from(from).ln()).max(1.0) as f32,
        }
    }
}

/// Angles and scale of a whole model. Layers with a window keep the model's own: they see no far key.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rotation {
    /// Frequencies of all layers without a window.
    pub freq: Freq,
    /// Factor on their scores, from layer `skip_layers` on.
    pub scale: ScoreScale,
    /// First layers whose scores are not scaled.
    pub skip_layers: usize,
}

impl Rotation {
    /// Whether it changes nothing.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// Factor on the scores of `layer` for a query at `pos`.
    pub fn scale(&self, layer: usize, pos: u32) -> f32 {
        if layer < self.skip_layers {
            1.0
        } else {
            self.scale.at(pos)
        }
    }
}

/// Which rotation a request gets, by the tokens it may come to have.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stretch {
    /// (tokens at most, rotation), ascending: the first that is long enough holds for the whole request.
    pub steps: Vec<(usize, Rotation)>,
}

impl Stretch {
    /// The rotation of a request of up to `tokens` tokens; the last one if none is long enough.
    pub fn choose(&self, tokens: usize) -> Option<&Rotation> {
        let fits = self.steps.iter().find(|(limit, _)| tokens <= *limit);
        fits.or(self.steps.last()).map(|(_, rotation)| rotation)
    }

    /// Tokens that a request may have at most.
    pub fn limit(&self) -> usize {
        self.steps.last().map_or(0, |(limit, _)| *limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SmolLM2: base 1e5, 64 dimensions, trained on 8,192 positions, stretched 4 times; pairs 0, 10, 16, 20 and 31.
    #[test]
    fn frequencies_are_those_of_the_published_formulas() {
        let plain = Freq::Base { base: 1e5 }.apply(1e5, &[0.0; 32]);
        let (factor, original) = (4.0, 8192.0);
        let cases: [(Freq, [f32; 5]); 6] = [
            (Freq::Model, [1.0, 2.73842e-2, 3.16228e-3, 7.49894e-4, 1.43301e-5]),
            (
                Freq::Ntk { factor },
                [1.0, 1.75100e-2, 1.54618e-3, 3.06601e-4, 3.58253e-6],
            ),
            (
                Freq::ByParts {
                    factor,
                    low: 1.0,
                    high: 32.0,
                    original,
                },
                [1.0, 2.73842e-2, 1.02950e-3, 1.87474e-4, 3.58253e-6],
            ),
            (
                Freq::Yarn {
                    factor,
                    fast: 32.0,
                    slow: 1.0,
                    original,
                },
                [1.0, 2.73842e-2, 1.73925e-3, 1.87474e-4, 3.58253e-6],
            ),
            (
                Freq::Llama3 {
                    factor,
                    low: 1.0,
                    high: 4.0,
                    original,
                },
                [1.0, 2.73842e-2, 3.16228e-3, 1.87474e-4, 3.58253e-6],
            ),
            (
                Freq::Base { base: 918_959.0 },
                [1.0, 1.36921e-2, 1.04316e-3, 1.87474e-4, 1.67131e-6],
            ),
        ];
        for (freq, want) in cases {
            let got = freq.apply(1e5, &plain);
            for (pair, want) in [0, 10, 16, 20, 31].into_iter().zip(want) {
                assert!(
                    (got[pair] / want - 1.0).abs() < 1e-4,
                    "{freq:?}, pair {pair}: {} {want}",
                    got[pair]
                );
            }
        }
    }

    #[test]
    fn a_factor_of_one_changes_no_bit() {
        let plain = Freq::Base { base: 1e5 }.apply(1e5, &[0.0; 32]);
        let (factor, original) = (1.0, 8192.0);
        for freq in [
            Freq::Linear { factor },
            Freq::Ntk { factor },
            Freq::Llama3 {
                factor,
                low: 1.0,
                high: 4.0,
                original,
            },
        ] {
            assert_eq!(freq.apply(1e5, &plain), plain, "{freq:?}");
        }
    }

    #[test]
    fn the_logarithmic_scale_starts_behind_its_border() {
        let scale = ScoreScale::LogN { from: 4096 };
        assert_eq!((scale.at(0), scale.at(4095)), (1.0, 1.0));
        for (pos, want) in [(8191, 1.083_333), (16_383, 1.166_667), (32_767, 1.25)] {
            assert!((scale.at(pos) - want).abs() < 1e-5);
        }
        let rotation = Rotation {
            scale,
            skip_layers: 2,
            ..Rotation::default()
        };
        assert_eq!(
            (rotation.scale(1, 8191), rotation.scale(2, 8191)),
            (1.0, scale.at(8191))
        );
    }

    #[test]
    fn short_requests_take_the_first_step_that_holds_them() {
        let long = Rotation {
            freq: Freq::Ntk { factor: 2.0 },
            ..Rotation::default()
        };
        let stretch = Stretch {
            steps: vec![(100, Rotation::default()), (200, long.clone())],
        };
        assert!(stretch.choose(100).unwrap().is_plain());
        assert_eq!(stretch.choose(101), Some(&long));
        assert_eq!((stretch.choose(999), stretch.limit()), (Some(&long), 200));
        assert_eq!(Stretch::default().choose(1), None);
    }
}
