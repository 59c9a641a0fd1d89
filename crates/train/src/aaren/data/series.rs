//! Series to forecast: sums of sines with noise, and columns of `.csv` files.

use crate::aaren::net::normal;

/// `n` values of a sum of sines with the given periods, random phases and amplitudes of 0.5 to 1, and normal noise of deviation `noise`.
pub fn multi_sine(n: usize, periods: &[f64], noise: f64, rng: &mut fastrand::Rng) -> Vec<f32> {
    let waves: Vec<[f64; 3]> = periods
        .iter()
        .map(|p| [*p, 0.5 + 0.5 * rng.f64(), std::f64::consts::TAU * rng.f64()])
        .collect();
    (0..n)
        .map(|t| {
            let wave = |[p, a, phase]: &[f64; 3]| a * (std::f64::consts::TAU * t as f64 / p + phase).sin();
            (waves.iter().map(wave).sum::<f64>() + noise * normal(rng)) as f32
        })
        .collect()
}

/// The numbers of the last column of a `.csv` text; a first line without a number is a header.
///
/// # Errors
/// With the first line that has none.
pub fn column(text: &str) -> Result<Vec<f32>, String> {
    let mut values = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let last = line.rsplit(',').next().unwrap_or("").trim().trim_matches('"');
        match last.parse::<f32>() {
            Ok(x) if x.is_finite() => values.push(x),
            _ if i == 0 || line.trim().is_empty() => {}
            _ => return Err(format!("line {}: no number in the last column", i + 1)),
        }
    }
    match values.is_empty() {
        true => Err("there are no numbers".into()),
        false => Ok(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_csv_gives_its_last_column() {
        assert_eq!(
            column("\"d\",\"x\"\n1,112\n2,\"118\"\n\n"),
            Ok(vec![112.0, 118.0])
        );
        assert_eq!(
            column("x\n1\nno\n"),
            Err("line 3: no number in the last column".into())
        );
        assert!(column("").is_err());
    }

    #[test]
    fn the_noise_is_what_is_left_of_the_sines() {
        let mut rng = fastrand::Rng::with_seed(3);
        let clean = multi_sine(4000, &[8.0], 0.0, &mut rng);
        for t in 8..4000 {
            assert!((clean[t] - clean[t - 8]).abs() < 1e-3);
        }
        let noisy = multi_sine(4000, &[8.0], 0.3, &mut rng);
        let square: f32 = (8..4000).map(|t| (noisy[t] - noisy[t - 8]).powi(2)).sum::<f32>() / 3992.0;
        assert!((square - 2.0 * 0.09).abs() < 0.02, "{square}");
    }
}
