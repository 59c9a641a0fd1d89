//! Activations: as they are, and quantised to int8 in blocks of 32.

use super::layout::BLOCK;
use crate::memory::Shared;
use crate::team::Team;

/// Reusable activations `[rows, k]`, the left side of every product.
///
/// Quantised on first use after a [`Acts::load`]: per row and block of 32, `d = amax / 127`, `q = round_half_even(x * (127 /
/// amax))`. A block with a value that is not finite gets `d = NaN`, so the product shows it; one whose values are all below 1e-36
/// counts as zeros.
#[derive(Debug, Default)]
pub struct Acts {
    rows: usize,
    k: usize,
    x: Vec<f32>,
    quantised: bool,
    widened: bool,
    /// `[rows, k]`
    pub(crate) q: Vec<i8>,
    /// `[rows, k]`, the same values as i16; only for the path that wants them.
    pub(crate) q16: Vec<i16>,
    /// `[rows, blocks]`
    pub(crate) d: Vec<f32>,
    /// Sums of `q`: `[rows, blocks]` of 32 and `[rows, blocks, 2]` of 16.
    pub(crate) sum: [Vec<i32>; 2],
    /// `d * f32(sum)`, shapes as `sum`.
    pub(crate) sx: [Vec<f32>; 2],
}

impl Acts {
    /// No rows.
    pub fn new() -> Acts {
        Acts::default()
    }

    /// Copies `x: [rows, k]`, row-major. Quantises nothing yet.
    pub fn load(&mut self, x: &[f32], rows: usize, k: usize) {
        assert_eq!(x.len(), rows * k, "activations: {rows} x {k} values expected");
        self.x.clear();
        self.x.extend_from_slice(x);
        (self.rows, self.k, self.quantised, self.widened) = (rows, k, false, false);
    }

    /// Rows loaded.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The values as loaded, `[rows, k]`.
    pub fn x(&self) -> &[f32] {
        &self.x
    }

    /// Blocks of 32 per row.
    pub(crate) fn blocks(&self) -> usize {
        self.k / BLOCK
    }

    /// Makes the quantised form, and with `wide` also its i16 copy, unless they are there. `k` is a multiple of 32.
    pub(crate) fn quantise(&mut self, team: &Team, wide: bool) {
        if self.quantised && (self.widened || !wide) {
            return;
        }
        let (rows, k, blocks) = (self.rows, self.k, self.blocks());
        debug_assert!(k.is_multiple_of(BLOCK));
        self.q.resize(rows * k, 0);
        self.d.resize(rows * blocks, 0.0);
        for (part, (sum, sx)) in self.sum.iter_mut().zip(&mut self.sx).enumerate() {
            sum.resize(rows * blocks * (part + 1), 0);
            sx.resize(rows * blocks * (part + 1), 0.0);
        }
        if wide {
            self.q16.resize(rows * k, 0);
        }
        let x = &self.x;
        let (q, q16, d) = (
            Shared::new(self.q.as_mut_ptr()),
            Shared::new(self.q16.as_mut_ptr()),
            Shared::new(self.d.as_mut_ptr()),
        );
        let [sum1, sum2] = &mut self.sum;
        let [sx1, sx2] = &mut self.sx;
        let (sum1, sum2) = (Shared::new(sum1.as_mut_ptr()), Shared::new(sum2.as_mut_ptr()));
        let (sx1, sx2) = (Shared::new(sx1.as_mut_ptr()), Shared::new(sx2.as_mut_ptr()));
        let one_row = |r: usize| {
            // SAFETY: every slice is row `r` of a vector resized above to `rows` such rows, and each row is written by one task.
            unsafe {
                let q = q.slice(r * k, k);
                quantise_row(
                    &x[r * k..(r + 1) * k],
                    q,
                    d.slice(r * blocks, blocks),
                    sum1.slice(r * blocks, blocks),
                    sum2.slice(2 * r * blocks, 2 * blocks),
                    sx1.slice(r * blocks, blocks),
                    sx2.slice(2 * r * blocks, 2 * blocks),
                );
                if wide {
                    for (w, q) in q16.slice(r * k, k).iter_mut().zip(q) {
                        *w = i16::from(*q);
                    }
                }
            }
        };
        if rows * k < 1 << 15 {
            (0..rows).for_each(one_row);
        } else {
            // Rows in groups of about 16 Ki values, so that a task is worth handing out.
            let group = (1usize << 14).div_ceil(k);
            team.run(rows.div_ceil(group), &|t| {
                (t * group..rows.min((t + 1) * group)).for_each(one_row);
            });
        }
        self.quantised = true;
        self.widened |= wide;
    }
}

/// 1.5 * 2^23: adding it rounds to an integer, half to even, and leaves that integer in the low bits.
const ROUND: f32 = 12_582_912.0;

fn quantise_row(
    x: &[f32],
    q: &mut [i8],
    d: &mut [f32],
    sum1: &mut [i32],
    sum2: &mut [i32],
    sx1: &mut [f32],
    sx2: &mut [f32],
) {
    for (b, (x, q)) in x
        .as_chunks::<BLOCK>()
        .0
        .iter()
        .zip(q.as_chunks_mut::<BLOCK>().0)
        .enumerate()
    {
        // As bit patterns, so that NaN counts as larger than everything.
        let amax = x.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
        let amax = f32::from_bits(amax);
        let (scale, inverse) = if !amax.is_finite() {
            (f32::NAN, 0.0)
        } else if amax < 1e-36 {
            (0.0, 0.0)
        } else {
            (amax / 127.0, 127.0 / amax)
        };
        let mut sums = [0i32; 2];
        if inverse == 0.0 {
            q.fill(0);
        } else {
            for (half, (x, q)) in x
                .as_chunks::<16>()
                .0
                .iter()
                .zip(q.as_chunks_mut::<16>().0)
                .enumerate()
            {
                let whole =
                    x.map(|v| ((v * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32));
                sums[half] = whole.iter().sum();
                *q = whole.map(|v| v as i8);
            }
        }
        d[b] = scale;
        sum1[b] = sums[0] + sums[1];
        sum2[2 * b..2 * b + 2].copy_from_slice(&sums);
        sx1[b] = scale * (sums[0] + sums[1]) as f32;
        sx2[2 * b] = scale * sums[0] as f32;
        sx2[2 * b + 1] = scale * sums[1] as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_half_to_even_and_keeps_sums() {
        let team = Team::new(1);
        let mut x = vec![0.0f32; 64];
        x[..6].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]);
        x[16] = -3.0;
        x[40] = f32::INFINITY;
        let mut acts = Acts::new();
        acts.load(&x, 1, 64);
        acts.quantise(&team, true);
        assert_eq!(&acts.q[..6], &[127, 0, 2, 2, 0, -2]);
        assert_eq!(
            acts.q16[..64].iter().map(|&v| v as i8).collect::<Vec<_>>(),
            acts.q
        );
        assert_eq!((acts.sum[0][0], &acts.sum[1][..2]), (126, &[129, -3][..]));
        assert_eq!((acts.d[0], acts.sx[0][0]), (1.0, 126.0));
        assert!(acts.d[1].is_nan() && acts.q[32..].iter().all(|&q| q == 0));
    }
}
