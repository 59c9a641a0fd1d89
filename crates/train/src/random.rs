//! Random numbers that depend on what they are for, never on what was drawn before: (seed, name) or (seed, step, site) names a stream.

/// A stream of numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Stream {
    state: u64,
    spare: Option<f64>,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Stream {
    /// The stream of `name` under `seed`.
    pub fn of(seed: u64, name: &str) -> Self {
        // FNV-1a of the name.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        Self {
            state: mix(seed ^ mix(hash)),
            spare: None,
        }
    }

    /// The same for one step of a run.
    pub fn at(seed: u64, name: &str, step: u64) -> Self {
        Self::of(mix(seed.wrapping_add(mix(step.wrapping_add(1)))), name)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// In `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.unit()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    /// Puts items in random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_follow_their_names() {
        let first = |mut s: Stream| [s.bits(), s.bits()];
        assert_eq!(first(Stream::of(1, "a")), first(Stream::of(1, "a")));
        assert_ne!(first(Stream::of(1, "a")), first(Stream::of(1, "b")));
        assert_ne!(first(Stream::of(1, "a")), first(Stream::of(2, "a")));
        assert_ne!(first(Stream::at(1, "a", 0)), first(Stream::at(1, "a", 1)));
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_deviation_one() {
        let mut stream = Stream::of(7, "normal");
        let draws: Vec<f64> = (0..100_000).map(|_| stream.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let square = draws.iter().map(|x| x * x).sum::<f64>() / draws.len() as f64;
        assert!(
            mean.abs() < 0.02 && (square - 1.0).abs() < 0.02,
            "{mean} {square}"
        );
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<usize> = (0..100).collect();
        Stream::of(3, "shuffle").shuffle(&mut items);
        assert!(items.iter().enumerate().any(|(i, &x)| i != x));
        items.sort_unstable();
        assert!(items.into_iter().eq(0..100));
    }
}
