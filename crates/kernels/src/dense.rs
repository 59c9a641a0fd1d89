//! Dense products of plain matrices in f32 or f64, for training and for what a method computes once: `out = scale * a b (+ out)`.
//!
//! The quantised products of inference are in [`crate::matmul`]. Here the work is the `gemm` crate's, which reaches the machine's ceiling
//! for these sizes; this file only checks that views stay within their slices. A sum over the inner dimension is taken in an order that
//! depends on the sizes and the processor, not on the number of threads (tested).

/// Element types of training: f32 in earnest, f64 where a gradient is checked against finite differences.
pub trait Real:
    num_traits::Float + num_traits::NumAssign + Default + Send + Sync + std::iter::Sum + std::fmt::Debug + 'static
{
    /// `e^self`: [`crate::ops::exp`] in f32.
    #[must_use]
    fn exponential(self) -> Self;

    /// The nearest value of this type.
    fn of(x: f64) -> Self;

    /// The same value.
    fn f64(self) -> f64;
}

impl Real for f32 {
    #[inline(always)]
    fn exponential(self) -> Self {
        crate::ops::exp(self)
    }

    #[inline(always)]
    fn of(x: f64) -> Self {
        x as Self
    }

    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn exponential(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
}

/// A view of a matrix `[rows, cols]`. Having one proves that every element lies in the slice.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A view of a row-major matrix that can be written, `[rows, cols]`. Rows do not overlap.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) {
    if rows > 0 && cols > 0 {
        assert!(cols <= row_stride || rows == 1, "rows of a matrix do not overlap");
        let last = (rows - 1)
            .checked_mul(row_stride)
            .and_then(|at| at.checked_add(cols));
        assert!(
            last.is_some_and(|last| last <= len),
            "a matrix of {rows} x {cols} does not fit into {len} elements"
        );
    }
}

impl<'a, T> Mat<'a, T> {
    /// All of `data`, row-major.
    ///
    /// # Panics
    /// When `data` is shorter than `rows * cols`.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row `r` starts at `r * row_stride`.
    ///
    /// # Panics
    /// When a row does not lie in `data`, or rows overlap.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// The transpose, without a copy.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

impl<'a, T> MatMut<'a, T> {
    /// All of `data`, row-major.
    ///
    /// # Panics
    /// When `data` is shorter than `rows * cols`.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row `r` starts at `r * row_stride`.
    ///
    /// # Panics
    /// When a row does not lie in `data`, or rows overlap.
    pub fn strided(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
        }
    }
}

/// What becomes of what stood in the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sum {
    /// It is overwritten.
    Replace,
    /// The product is added to it.
    Add,
}

/// Who computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread.
    One,
    /// The threads of the current rayon pool.
    Pool,
}

/// `out = scale * a b`, or `out += scale * a b`; `a: [m, k]`, `b: [k, n]`, `out: [m, n]`. An empty `k` gives zeros.
///
/// # Panics
/// When the sizes do not fit together.
pub fn product<T: Real>(
    out: MatMut<'_, T>,
    sum: Sum,
    scale: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    threads: Threads,
) {
    assert!(
        a.cols == b.rows && a.rows == out.rows && b.cols == out.cols,
        "{} x {} times {} x {} is not {} x {}",
        a.rows,
        a.cols,
        b.rows,
        b.cols,
        out.rows,
        out.cols
    );
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::Pool => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the views were checked to lie within their slices when they were made; `out` is borrowed for writing, so it overlaps neither
    // `a` nor `b`; its rows do not overlap.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.data.as_mut_ptr(),
            1,
            out.row_stride as isize,
            sum == Sum::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::one(),
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed.wrapping_mul(2_654_435_761) | 1;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                (x >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect()
    }

    /// `a b` in f64.
    fn plain(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<f64> {
        let mut out = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = (0..k)
                    .map(|c| f64::from(a[i * k + c]) * f64::from(b[c * n + j]))
                    .sum();
            }
        }
        out
    }

    #[test]
    fn products_of_odd_sizes_transposes_and_sums_are_those_of_the_definition() {
        for [m, k, n] in [[1, 1, 1], [3, 5, 7], [17, 33, 9], [64, 0, 4], [70, 129, 65]] {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let want = plain(&a, &b, [m, k, n]);
            let mut bt = vec![0.0; k * n];
            for i in 0..k {
                for j in 0..n {
                    bt[j * k + i] = b[i * n + j];
                }
            }
            for threads in [Threads::One, Threads::Pool] {
                let mut out = vec![f32::NAN; m * n];
                product(
                    MatMut::new(&mut out, m, n),
                    Sum::Replace,
                    2.0,
                    Mat::new(&a, m, k),
                    Mat::new(&bt, n, k).t(),
                    threads,
                );
                product(
                    MatMut::new(&mut out, m, n),
                    Sum::Add,
                    -1.0,
                    Mat::new(&a, m, k),
                    Mat::new(&b, k, n),
                    threads,
                );
                for (got, want) in out.iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want}");
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let [m, k, n] = [513, 700, 257];
        let (a, b) = (numbers(m * k, 3), numbers(k * n, 4));
        let once = |threads: Threads| {
            let mut out = vec![0.0f32; m * n];
            product(
                MatMut::new(&mut out, m, n),
                Sum::Replace,
                1.0,
                Mat::new(&a, m, k),
                Mat::new(&b, k, n),
                threads,
            );
            out
        };
        let alone = once(Threads::One);
        assert!(
            alone
                .iter()
                .zip(once(Threads::Pool))
                .all(|(a, b)| a.to_bits() == b.to_bits())
        );
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_view_beyond_its_slice_is_refused() {
        let _ = Mat::strided(&[0.0f32; 10], 3, 3, 4);
    }
}
