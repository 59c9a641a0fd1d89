//! How a total of rows is spread over layers by what eviction costs each of them (3.3).

/// Rows of each layer: `least` for every layer, the rest in proportion to `errors`, at most `most`; the sum is `mean * L` exactly.
///
/// `errors` are not negative; if all are 0 the budget is uniform. Ties go to the earlier layer.
///
/// # Panics
/// When `least <= mean <= most` does not hold.
pub fn allocate(errors: &[f64], mean: usize, least: usize, most: usize) -> Vec<usize> {
    assert!(least <= mean && mean <= most, "the mean lies between the bounds");
    let layers = errors.len();
    let sum: f64 = errors.iter().sum();
    if sum <= 0.0 {
        return vec![mean; layers];
    }
    let total = mean * layers;
    let free = (total - least * layers) as f64;
    let mut rows: Vec<usize> = errors
        .iter()
        .map(|e| (least + (e / sum * free).round() as usize).min(most))
        .collect();
    // Rounding and clipping leave a difference: one row at a time, the costliest layers gain first, the cheapest lose first.
    let mut order: Vec<usize> = (0..layers).collect();
    order.sort_by(|&a, &b| errors[b].total_cmp(&errors[a]).then(a.cmp(&b)));
    let mut given: usize = rows.iter().sum();
    while given < total {
        for &l in &order {
            if given < total && rows[l] < most {
                rows[l] += 1;
                given += 1;
            }
        }
    }
    while given > total {
        for &l in order.iter().rev() {
            if given > total && rows[l] > least {
                rows[l] -= 1;
                given -= 1;
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_exact_and_bounds_hold() {
        let mut rng = fastrand::Rng::with_seed(4);
        for _ in 0..500 {
            let layers = rng.usize(1..40);
            let errors: Vec<f64> = (0..layers).map(|_| rng.f64().powi(4)).collect();
            let mean = rng.usize(33..600);
            let rows = allocate(&errors, mean, 32, 3 * mean);
            assert_eq!(rows.iter().sum::<usize>(), mean * layers);
            assert!(rows.iter().all(|r| (32..=3 * mean).contains(r)));
        }
    }

    #[test]
    fn the_costlier_layer_gets_more() {
        assert_eq!(allocate(&[1.0, 3.0], 100, 20, 300), [60, 140]);
        assert_eq!(allocate(&[0.0, 0.0, 0.0], 64, 32, 192), [64; 3]);
        // Clipped at the upper bound, the others share what it cannot take.
        assert_eq!(allocate(&[100.0, 1.0, 1.0], 50, 10, 100), [100, 25, 25]);
    }
}
