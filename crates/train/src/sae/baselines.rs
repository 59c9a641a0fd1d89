//! What a dictionary has to beat: principal components of the same number of coefficients, and random directions.

use antefix_kernels::dense::{Mat, MatMut, Sum, Threads, product};
use antefix_papers::attention_sae::{Architecture, Norm, Parts, Sae, SaeError};

use super::params::{normalise, uniform};

/// Rounds of the subspace iteration: eigenvalues of activations fall quickly, and a direction that is missed for its neighbour explains
/// nearly as much.
const ROUNDS: usize = 60;

/// Mean and largest principal components of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Pca {
    mean: Vec<f32>,
    /// Orthonormal, `[rank, d]`, by falling variance.
    directions: Vec<f32>,
}

impl Pca {
    /// The mean and the `rank` largest components (0: the mean alone) of `rows: [n, d]`, by subspace iteration in f64.
    ///
    /// # Panics
    /// When there are no rows, or `rank` is above `d`.
    pub fn fit(rows: &[f32], d: usize, rank: usize) -> Self {
        assert!(
            !rows.is_empty() && rows.len().is_multiple_of(d) && rank <= d,
            "rows of {d}, rank {rank}"
        );
        let n = rows.len() / d;
        let mut mean = vec![0.0f64; d];
        for row in rows.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x));
        }
        mean.iter_mut().for_each(|m| *m /= n as f64);
        let mut covariance = vec![0.0f64; d * d];
        for block in rows.chunks(d << 12) {
            let centred: Vec<f64> = block
                .iter()
                .enumerate()
                .map(|(i, x)| f64::from(*x) - mean[i % d])
                .collect();
            let view = Mat::new(&centred, block.len() / d, d);
            product(
                MatMut::new(&mut covariance, d, d),
                Sum::Add,
                1.0 / n as f64,
                view.t(),
                view,
                Threads::Pool,
            );
        }
        // A few more directions than asked for converge faster.
        let wide = (rank + 16).min(d);
        let mut basis: Vec<f64> = (0..wide * d).map(|i| uniform(1, 9, i as u64) - 0.5).collect();
        orthonormal(&mut basis, d);
        let mut next = vec![0.0; wide * d];
        for _ in 0..ROUNDS {
            product(
                MatMut::new(&mut next, wide, d),
                Sum::Replace,
                1.0,
                Mat::new(&basis, wide, d),
                Mat::new(&covariance, d, d),
                Threads::Pool,
            );
            std::mem::swap(&mut basis, &mut next);
            orthonormal(&mut basis, d);
        }
        Self {
            mean: mean.into_iter().map(|m| m as f32).collect(),
            directions: basis[..rank * d].iter().map(|x| *x as f32).collect(),
        }
    }

    /// Number of components.
    pub fn rank(&self) -> usize {
        self.directions.len() / self.mean.len()
    }

    /// Rows as their mean and components give them, `[n, d]`.
    pub fn project(&self, rows: &[f32]) -> Vec<f32> {
        let (d, rank) = (self.mean.len(), self.rank());
        let n = rows.len() / d;
        let centred: Vec<f32> = rows
            .iter()
            .enumerate()
            .map(|(i, x)| x - self.mean[i % d])
            .collect();
        let directions = Mat::new(&self.directions, rank, d);
        let mut coefficients = vec![0.0; n * rank];
        product(
            MatMut::new(&mut coefficients, n, rank),
            Sum::Replace,
            1.0,
            Mat::new(&centred, n, d),
            directions.t(),
            Threads::Pool,
        );
        let mut out: Vec<f32> = self.mean.iter().copied().cycle().take(n * d).collect();
        product(
            MatMut::new(&mut out, n, d),
            Sum::Add,
            1.0,
            Mat::new(&coefficients, n, rank),
            directions,
            Threads::Pool,
        );
        out
    }
}

/// Gram and Schmidt, twice over for rounding; rows that vanish become zeros.
fn orthonormal(basis: &mut [f64], d: usize) {
    for _ in 0..2 {
        for i in 0..basis.len() / d {
            let (done, rest) = basis.split_at_mut(i * d);
            let row = &mut rest[..d];
            for other in done.chunks_exact(d) {
                let along: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
            normalise(row);
        }
    }
}

/// A dictionary of random directions: `features` unit rows, encoder their transpose, the `k` largest products of a row kept, and one
/// factor for all of them that fits `rows: [n, d]` best.
///
/// # Errors
/// When the sizes cannot be.
pub fn random(rows: &[f32], d: usize, features: usize, k: usize, seed: u64) -> Result<Sae, SaeError> {
    let n = (rows.len() / d).max(1);
    let mut mean = vec![0.0f32; d];
    for row in rows.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / n as f32);
    }
    let mut w_dec: Vec<f32> = (0..features * d)
        .map(|i| uniform(seed, 21, i as u64) as f32 - 0.5)
        .collect();
    for row in w_dec.chunks_exact_mut(d) {
        normalise(row);
    }
    let make = |factor: f32| {
        Sae::new(Parts {
            d_in: d,
            features,
            architecture: Architecture::TopK { k, rescale: false },
            norm: Norm::None,
            apply_b_dec: true,
            w_enc: (0..d)
                .flat_map(|i| w_dec.iter().skip(i).step_by(d).copied())
                .collect(),
            b_enc: vec![0.0; features],
            w_dec: w_dec.iter().map(|x| x * factor).collect(),
            b_dec: mean.clone(),
        })
    };
    let plain = make(1.0)?;
    let made = plain.decode(&plain.encode(rows, Threads::Pool));
    let (mut along, mut square) = (0.0, 0.0);
    for (i, (x, y)) in rows.iter().zip(&made).enumerate() {
        let (x, y) = (f64::from(x - mean[i % d]), f64::from(y - mean[i % d]));
        along += x * y;
        square += y * y;
    }
    make(if square > 0.0 {
        (along / square) as f32
    } else {
        1.0
    })
}
