//! Choosing by score.

/// Indices of the `count` largest scores, in no order; of equals the lower ones.
pub fn best(scores: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    if count == 0 {
        return Vec::new();
    }
    if count < order.len() {
        let first = |&a: &u32, &b: &u32| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b));
        order.select_nth_unstable_by(count - 1, first);
        order.truncate(count);
    }
    order
}

/// How many of the largest values, taken one after the other, sum to at most `mass`. Values are not negative.
///
/// Equals the definition by sorting, in linear time: values fall into buckets by the leading bits of their representation, and only the
/// bucket in which the mass is reached is sorted. Sums are in f64.
pub fn prefix(values: &[f32], mass: f64) -> usize {
    /// Sign, exponent and four bits of the mantissa are left.
    const SHIFT: u32 = 19;
    let bucket = |x: f32| (x.to_bits() >> SHIFT) as usize;
    let mut buckets = vec![(0usize, 0.0f64); bucket(f32::INFINITY) + 1];
    for &x in values {
        let of = &mut buckets[bucket(x)];
        of.0 += 1;
        of.1 += f64::from(x);
    }
    let (mut count, mut sum) = (0, 0.0);
    for (i, &(n, total)) in buckets.iter().enumerate().rev().filter(|(_, b)| b.0 > 0) {
        if sum + total > mass {
            let mut within: Vec<f32> = values.iter().copied().filter(|&x| bucket(x) == i).collect();
            within.sort_unstable_by(|a, b| b.total_cmp(a));
            for x in within {
                sum += f64::from(x);
                if sum > mass {
                    return count;
                }
                count += 1;
            }
        } else {
            (count, sum) = (count + n, sum + total);
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_those_of_sorting() {
        let scores = [0.5, 2.0, -1.0, 2.0, 0.5, 0.5];
        let sorted = |count| {
            let mut best = best(&scores, count);
            best.sort_unstable();
            best
        };
        assert!(sorted(0).is_empty());
        assert_eq!(sorted(3), [0, 1, 3]);
        assert_eq!(sorted(4), [0, 1, 3, 4]);
        assert_eq!(sorted(9), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_prefix_is_that_of_the_sorted_values() {
        let mut rng = fastrand::Rng::with_seed(3);
        for case in 0..400 {
            let n = rng.usize(0..300);
            let values: Vec<f32> = (0..n)
                .map(|_| match case % 3 {
                    0 => rng.f32(),
                    1 => (rng.f32() * 30.0 - 15.0).exp(),
                    _ => rng.u8(0..3).into(),
                })
                .collect();
            let total: f64 = values.iter().map(|&x| f64::from(x)).sum();
            // Between two sums, so that roundings do not decide.
            let mass = total * rng.f64() + 1e-9;
            let mut sorted = values.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let mut sum = 0.0;
            let want = sorted.iter().take_while(|&&x| {
                sum += f64::from(x);
                sum <= mass
            });
            assert_eq!(prefix(&values, mass), want.count(), "{values:?} {mass}");
        }
    }
}
