//! Row-wise operations: norms, RoPE, activations. The order of additions is fixed and the same on every path.
//!
//! Each body is written once, in lanes, and compiled for the baseline, for AVX2 + FMA and, where arithmetic is most of it, for
//! AVX-512. `mul_add` is one rounding on all of them, so the bits are the same; only the speed differs.

use std::sync::OnceLock;

use crate::cpu::{Cpu, Path};

/// Partial sums of a reduction. Sum `i` takes the elements `i, i + 16, ..`; the sums fold in a fixed tree.
const LANES: usize = 16;

/// Sum of squares in 16 strided partial sums.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane += x * x;
    }
    fold(lanes)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Runs a function of `fast` where this machine has AVX2 and FMA, else the body.
macro_rules! best {
    ($fast:ident, $body:ident, $($arg:expr),*) => {{
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: just looked.
            return unsafe { fast::$fast($($arg),*) };
        }
        $body($($arg),*)
    }};
}

/// `out = x / rms(x) * w`, with `rms(x) = sqrt(mean(x^2) + eps)`. All `[d]`.
///
/// # Panics
/// When the lengths differ.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    assert!(
        x.len() == w.len() && x.len() == out.len(),
        "a norm keeps its width"
    );
    best!(rms_norm, rms_norm_body, x, w, eps, out);
}

#[inline(always)]
fn rms_norm_body(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
        *o = x * scale * w;
    }
}

/// [`rms_norm`] of each `w.len()` values of `row`, in place: the heads of q or k.
///
/// # Panics
/// When `row` is not a whole number of heads.
pub fn rms_norm_in_place(row: &mut [f32], w: &[f32], eps: f32) {
    assert_eq!(row.len() % w.len(), 0, "whole heads");
    best!(norm_heads, norm_heads_body, row, w, eps);
}

#[inline(always)]
fn norm_heads_body(row: &mut [f32], w: &[f32], eps: f32) {
    for head in row.chunks_exact_mut(w.len()) {
        let scale = 1.0 / (sum_of_squares(head) / w.len() as f32 + eps).sqrt();
        for (x, w) in head.iter_mut().zip(w) {
            *x = *x * scale * w;
        }
    }
}

/// The largest value, minus infinity of none; NaN never is. A maximum does not depend on the order, so that lanes need not wait for one another.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(a, &b)| *a = larger(*a, b));
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

/// `x += y`.
///
/// # Panics
/// When the lengths differ.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "sums are element by element");
    best!(add, add_body, x, y);
}

#[inline(always)]
fn add_body(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// `x = cap * tanh(x / cap)`.
pub fn softcap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = cap * (*x / cap).tanh();
    }
}

/// `e^x` within 2 units in the last place: the same polynomial, with the same roundings, on every path.
///
/// Below -87.3 the result is 0, above 88.7 it is infinite; `exp(-inf) = 0`, NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has few bits, so n * HI is exact.
    const HI: f32 = 0.693_359_4;
    const LO: f32 = -2.121_944_4e-4;
    // Round to the nearest integer by adding 1.5 * 2^23.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 88.8 {
        88.8
    } else if x < -87.4 {
        -87.4
    } else {
        x
    };
    let shifted = clamped.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LO, n.mul_add(-HI, clamped));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_5e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = (r * r).mul_add(p, r) + 1.0;
    // 2^n in two factors: n can be 128. A cast would be checked number by number; the low bits of the shifted one are n.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let two = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
    let y = y * two(half) * two(n - half);
    if x < -87.33 { 0.0 } else { y }
}

#[inline(always)]
fn silu_mul_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

#[inline(always)]
fn gelu_tanh_mul_body(gate: &mut [f32], up: &[f32]) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    for (g, u) in gate.iter_mut().zip(up) {
        let x = *g;
        let inner = SQRT_2_OVER_PI * x * (0.044_715 * x).mul_add(x, 1.0);
        // 0.5 (1 + tanh(y)) = 1 / (1 + e^-2y)
        *g = x / (1.0 + exp(-2.0 * inner)) * u;
    }
}

#[cfg(target_arch = "x86_64")]
mod fast {
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        super::rms_norm_body(x, w, eps, out);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn norm_heads(row: &mut [f32], w: &[f32], eps: f32) {
        super::norm_heads_body(row, w, eps);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn add(x: &mut [f32], y: &[f32]) {
        super::add_body(x, y);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
        super::silu_mul_body(gate, up);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn gelu_tanh_mul(gate: &mut [f32], up: &[f32]) {
        super::gelu_tanh_mul_body(gate, up);
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512dq,avx512vl,avx512bw")]
    pub(super) fn silu_mul_avx512(gate: &mut [f32], up: &[f32]) {
        super::silu_mul_body(gate, up);
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512dq,avx512vl,avx512bw")]
    pub(super) fn gelu_tanh_mul_avx512(gate: &mut [f32], up: &[f32]) {
        super::gelu_tanh_mul_body(gate, up);
    }
}

/// `gate = silu(gate) * up`.
///
/// # Panics
/// When the lengths differ.
pub fn silu_mul(cpu: Cpu, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "a gate for each value");
    #[cfg(target_arch = "x86_64")]
    match cpu.path() {
        // SAFETY: `cpu` proves AVX-512 F, BW, DQ, VL.
        Path::Avx512 | Path::Amx => return unsafe { fast::silu_mul_avx512(gate, up) },
        // SAFETY: `cpu` proves AVX2 and FMA.
        Path::Avx2 => return unsafe { fast::silu_mul(gate, up) },
        Path::Scalar => {}
    }
    silu_mul_body(gate, up);
}

/// `gate = gelu(gate) * up` with the tanh form of GELU.
///
/// # Panics
/// When the lengths differ.
pub fn gelu_tanh_mul(cpu: Cpu, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "a gate for each value");
    #[cfg(target_arch = "x86_64")]
    match cpu.path() {
        // SAFETY: `cpu` proves AVX-512 F, BW, DQ, VL.
        Path::Avx512 | Path::Amx => return unsafe { fast::gelu_tanh_mul_avx512(gate, up) },
        // SAFETY: `cpu` proves AVX2 and FMA.
        Path::Avx2 => return unsafe { fast::gelu_tanh_mul(gate, up) },
        Path::Scalar => {}
    }
    gelu_tanh_mul_body(gate, up);
}

/// Which dimensions of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `i` with `i + dims / 2`.
    Neox,
    /// `2 i` with `2 i + 1`.
    Interleaved,
}

/// Rotary position embedding: cosines and sines, computed in f64 once per position and kept.
pub struct Rope {
    dims: usize,
    style: RopeStyle,
    frequencies: Vec<f64>,
    /// Positions in slabs of [`SLAB`]: `[SLAB][dims / 2]` pairs of (cos, sin), each computed when first needed.
    slabs: Box<[OnceLock<Vec<(f32, f32)>>]>,
}

/// Positions whose angles are computed together.
const SLAB: usize = 256;

/// Positions that a [`Rope`] can hold: one million.
pub const MAX_POSITIONS: usize = 1 << 20;

impl Rope {
    /// Pair `i` of each head turns by `frequencies[i]` radians a position: the first `2 * frequencies.len()` dimensions.
    pub fn new(frequencies: &[f32], style: RopeStyle) -> Self {
        Self {
            dims: frequencies.len() * 2,
            style,
            frequencies: frequencies.iter().copied().map(f64::from).collect(),
            slabs: std::iter::repeat_with(OnceLock::new)
                .take(MAX_POSITIONS / SLAB)
                .collect(),
        }
    }

    fn slab(&self, index: usize) -> &[(f32, f32)] {
        self.slabs[index].get_or_init(|| {
            (index * SLAB..(index + 1) * SLAB)
                .flat_map(|pos| {
                    self.frequencies.iter().map(move |f| {
                        let (sin, cos) = (pos as f64 * f).sin_cos();
                        (cos as f32, sin as f32)
                    })
                })
                .collect()
        })
    }

    /// Rotates every head of `dim` values in `row` to position `pos`.
    ///
    /// # Panics
    /// When `row` is not a whole number of heads, heads are shorter than the rotated dimensions, or `pos` is not below
    /// [`MAX_POSITIONS`].
    pub fn apply(&self, row: &mut [f32], dim: usize, pos: u32) {
        self.rotate(row, dim, pos, 1.0);
    }

    /// Rotates every head of `dim` values in `row` by `by` positions, forwards or backwards: what stood at `p` stands at `p + by`.
    ///
    /// # Panics
    /// As [`Rope::apply`], for the distance.
    pub fn turn(&self, row: &mut [f32], dim: usize, by: i32) {
        self.rotate(row, dim, by.unsigned_abs(), if by < 0 { -1.0 } else { 1.0 });
    }

    /// By `sign * pos` positions. A sign of 1 changes no bit of the sines.
    fn rotate(&self, row: &mut [f32], dim: usize, pos: u32, sign: f32) {
        assert!(dim >= self.dims && row.len().is_multiple_of(dim), "whole heads");
        let half = self.dims / 2;
        let slab = self.slab(pos as usize / SLAB);
        let angles = &slab[pos as usize % SLAB * half..][..half];
        for head in row.chunks_exact_mut(dim) {
            match self.style {
                RopeStyle::Neox => {
                    let (a, b) = head[..self.dims].split_at_mut(half);
                    for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(angles) {
                        let sin = sin * sign;
                        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                    }
                }
                RopeStyle::Interleaved => {
                    for (pair, (cos, sin)) in head[..self.dims].chunks_exact_mut(2).zip(angles) {
                        let sin = sin * sign;
                        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.731).sin() * 3.0).collect()
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -8700..8870 {
            let x = i as f32 * 0.01 + 0.003;
            let want = f64::from(x).exp();
            if want < f64::from(f32::MAX) && want > f64::from(f32::MIN_POSITIVE) {
                let ulp = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
                worst = worst.max((f64::from(exp(x)) - want).abs() / ulp);
            }
        }
        assert!(worst < 2.0, "{worst} ulp");
        assert_eq!(
            (exp(f32::NEG_INFINITY), exp(-1e30), exp(0.0), exp(f32::INFINITY)),
            (0.0, 0.0, 1.0, f32::INFINITY)
        );
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn activations_are_the_same_bits_on_every_path_and_close_to_f64() {
        for n in [1, 7, 8, 33] {
            let (gate, up) = (wave(n), wave(n + 5)[5..].to_vec());
            let mut want = gate.clone();
            silu_mul(Cpu::with(Path::Scalar).unwrap(), &mut want, &up);
            let mut want_gelu = gate.clone();
            gelu_tanh_mul(Cpu::with(Path::Scalar).unwrap(), &mut want_gelu, &up);
            for cpu in Cpu::available() {
                let mut got = gate.clone();
                silu_mul(cpu, &mut got, &up);
                assert_eq!(got, want, "{}", cpu.path());
                let mut got = gate.clone();
                gelu_tanh_mul(cpu, &mut got, &up);
                assert_eq!(got, want_gelu, "{}", cpu.path());
            }
            for i in 0..n {
                let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
                assert!((f64::from(want[i]) - g / (1.0 + (-g).exp()) * u).abs() < 1e-5);
                let gelu = 0.5
                    * g
                    * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g * g * g)).tanh());
                assert!(
                    (f64::from(want_gelu[i]) - gelu * u).abs() < 1e-5,
                    "{} {}",
                    want_gelu[i],
                    gelu * u
                );
            }
        }
    }

    #[test]
    fn a_norm_has_unit_mean_square_times_the_weight() {
        let x = wave(37);
        let mut out = vec![f32::NAN; 37];
        rms_norm(&x, &[2.0; 37], 0.0, &mut out);
        let mean: f32 = out.iter().map(|o| o * o).sum::<f32>() / 37.0;
        assert!((mean - 4.0).abs() < 1e-4, "{mean}");
        let mut heads = [x.clone(), x.clone()].concat();
        rms_norm_in_place(&mut heads, &[2.0; 37], 0.0);
        assert_eq!(heads, [out.clone(), out].concat());
    }

    #[test]
    fn rotation_keeps_lengths_and_depends_on_distance_only() {
        for style in [RopeStyle::Neox, RopeStyle::Interleaved] {
            let frequencies: Vec<f32> = (0..8).map(|i| 1e4f32.powf(-f64::from(i) as f32 / 8.0)).collect();
            let rope = Rope::new(&frequencies, style);
            let dot = |p: u32, q: u32| -> f32 {
                let (mut a, mut b) = (wave(20), wave(40)[20..].to_vec());
                rope.apply(&mut a, 20, p);
                rope.apply(&mut b, 20, q);
                a.iter().zip(&b).map(|(a, b)| a * b).sum()
            };
            assert!((dot(3, 7) - dot(1003, 1007)).abs() < 2e-3);
            assert!((dot(3, 7) - dot(3, 8)).abs() > 1e-2, "positions matter");
            let mut row = wave(20);
            rope.apply(&mut row, 20, 900);
            assert_eq!(row[16..], wave(20)[16..], "dimensions beyond `dims` stay");
            let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
            assert!((norm(&row) - norm(&wave(20))).abs() < 1e-3);
        }
    }

    #[test]
    fn turning_composes_and_turning_back_undoes() {
        for style in [RopeStyle::Neox, RopeStyle::Interleaved] {
            let frequencies: Vec<f32> = (0..8).map(|i| 1e4f32.powf(-f64::from(i) as f32 / 8.0)).collect();
            let rope = Rope::new(&frequencies, style);
            let mut steps = wave(40);
            rope.apply(&mut steps, 20, 700);
            rope.turn(&mut steps, 20, 4000);
            rope.turn(&mut steps, 20, -3001);
            let mut once = wave(40);
            rope.apply(&mut once, 20, 1699);
            rope.turn(&mut steps, 20, 0);
            for (a, b) in steps.iter().zip(&once) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }

    #[test]
    fn styles_are_permutations_of_each_other() {
        let frequencies = [1.0, 0.3, 0.05, 0.001];
        let (neox, inter) = (
            Rope::new(&frequencies, RopeStyle::Neox),
            Rope::new(&frequencies, RopeStyle::Interleaved),
        );
        let x = wave(8);
        let mut a = x.clone();
        neox.apply(&mut a, 8, 11);
        let mut b: Vec<f32> = (0..8).map(|i| x[i / 2 + i % 2 * 4]).collect();
        inter.apply(&mut b, 8, 11);
        for i in 0..8 {
            assert_eq!(b[i], a[i / 2 + i % 2 * 4]);
        }
    }

    #[test]
    fn softcap_is_nearly_linear_near_zero_and_bounded() {
        let mut x = [0.01, 1e9, -1e9];
        softcap(&mut x, 30.0);
        assert!((x[0] - 0.01).abs() < 1e-6 && x[1] == 30.0 && x[2] == -30.0);
    }
}
