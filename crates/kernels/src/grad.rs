//! Row-wise operations of training, forward and backward, in f32 and f64. Gradients are checked against finite differences in `antefix-train`.
//!
//! Each body is written once and compiled for the baseline, AVX2 with FMA, and AVX-512. Sums are taken in 16 strided lanes and folded in a
//! fixed tree, so a row's result depends on nothing but the row.

#[cfg(target_arch = "x86_64")]
use crate::cpu::{Cpu, Path};
use crate::dense::Real;

const LANES: usize = 16;

/// The best path of this machine, looked up once.
#[cfg(target_arch = "x86_64")]
fn path() -> Path {
    static PATH: std::sync::OnceLock<Path> = std::sync::OnceLock::new();
    *PATH.get_or_init(|| Cpu::best().path())
}

/// Compiles a body for each kind of processor and picks one when called.
macro_rules! compiled {
    ($(#[$doc:meta])* pub fn $name:ident<T: Real>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        pub fn $name<T: Real>($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<T: Real>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,avx512f,avx512dq,avx512vl,avx512bw")]
                fn avx512<T: Real>($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }

                #[target_feature(enable = "avx2,fma")]
                fn avx2<T: Real>($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }

                match path() {
                    // SAFETY: the path proves AVX-512 F, BW, DQ, VL.
                    Path::Avx512 | Path::Amx => return unsafe { avx512($($arg),*) },
                    // SAFETY: the path proves AVX2 and FMA.
                    Path::Avx2 => return unsafe { avx2($($arg),*) },
                    Path::Scalar => {}
                }
            }
            body($($arg),*)
        }
    };
}

#[inline(always)]
fn fold<T: Real>(mut lanes: [T; LANES]) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `sum f(a_i, b_i)`
#[inline(always)]
fn sum2<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    for (i, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += f(a, b);
    }
    fold(lanes)
}

#[inline(always)]
fn largest<T: Real>(row: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [T::neg_infinity(); LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(T::neg_infinity(), |a, &b| larger(a, b))
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).exponential())
}

/// `1 / (1 + e^-2y)` for the tanh form of GELU, and `dy/dx`.
#[inline(always)]
fn gelu_parts<T: Real>(x: T) -> (T, T) {
    let (c, a) = (T::of(0.797_884_560_802_865_4), T::of(0.044_715));
    let inner = c * x * (T::one() + a * x * x);
    let slope = c * (T::one() + T::of(3.0) * a * x * x);
    (sigmoid(inner + inner), slope)
}

/// Value and derivative of an activation at `x`.
#[inline(always)]
fn activation<T: Real>(act: Act, x: T) -> (T, T) {
    match act {
        Act::Silu => {
            let s = sigmoid(x);
            (x * s, s * (T::one() + x * (T::one() - s)))
        }
        Act::GeluTanh => {
            let (s, slope) = gelu_parts(x);
            (x * s, s + T::of(2.0) * x * s * (T::one() - s) * slope)
        }
    }
}

/// The nonlinearity of a feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `x * sigmoid(x)`
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

compiled! {
    /// `sum a_i b_i`. Both `[n]`.
    pub fn dot<T: Real>(a: &[T], b: &[T]) -> T {
        sum2(a, b, |a, b| a * b)
    }
}

compiled! {
    /// `y += c x`. Both `[n]`.
    pub fn add_scaled<T: Real>(y: &mut [T], c: T, x: &[T]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y += c * x;
        }
    }
}

compiled! {
    /// `y *= c`
    pub fn scale<T: Real>(y: &mut [T], c: T) {
        for y in y.iter_mut() {
            *y *= c;
        }
    }
}

compiled! {
    /// `out = x w / rms(x)`, with `rms(x) = sqrt(mean(x^2) + eps)`; gives `1 / rms(x)`. All `[d]`.
    pub fn rms_norm<T: Real>(x: &[T], w: &[T], eps: T, out: &mut [T]) -> T {
        let inverse = T::one() / (sum2(x, x, |a, b| a * b) / T::of(x.len() as f64) + eps).sqrt();
        for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
            *o = x * inverse * w;
        }
        inverse
    }
}

compiled! {
    /// Backward of [`rms_norm`]: `dx` is overwritten, `dw` summed up. `inverse` is what it gave.
    pub fn rms_norm_back<T: Real>(x: &[T], w: &[T], inverse: T, dy: &[T], dx: &mut [T], dw: &mut [T]) {
        for (((dx, &dy), &w), (dw, &x)) in dx.iter_mut().zip(dy).zip(w).zip(dw.iter_mut().zip(x)) {
            *dx = dy * w;
            *dw += dy * x * inverse;
        }
        let along = sum2(dx, x, |a, b| a * b) * inverse * inverse / T::of(x.len() as f64);
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = inverse * (*dx - x * along);
        }
    }
}

compiled! {
    /// `out = (x - mean) / sqrt(variance + eps) * w + b`; gives the mean and the inverse deviation. All `[d]`.
    pub fn layer_norm<T: Real>(x: &[T], w: &[T], b: &[T], eps: T, out: &mut [T]) -> [T; 2] {
        let n = T::of(x.len() as f64);
        let mean = sum2(x, x, |a, _| a) / n;
        let inverse = T::one() / (sum2(x, x, |a, _| (a - mean) * (a - mean)) / n + eps).sqrt();
        for ((o, &x), (&w, &b)) in out.iter_mut().zip(x).zip(w.iter().zip(b)) {
            *o = (x - mean) * inverse * w + b;
        }
        [mean, inverse]
    }
}

compiled! {
    /// Backward of [`layer_norm`]: `dx` is overwritten, `dw` and `db` summed up. `stats` is what it gave.
    pub fn layer_norm_back<T: Real>(
        x: &[T],
        w: &[T],
        stats: [T; 2],
        dy: &[T],
        dx: &mut [T],
        dw: &mut [T],
        db: &mut [T],
    ) {
        let [mean, inverse] = stats;
        let n = T::of(x.len() as f64);
        for ((dx, (&dy, &w)), ((dw, db), &x)) in
            dx.iter_mut().zip(dy.iter().zip(w)).zip(dw.iter_mut().zip(db.iter_mut()).zip(x))
        {
            *dx = dy * w;
            *dw += dy * (x - mean) * inverse;
            *db += dy;
        }
        let flat = sum2(dx, x, |g, _| g) / n;
        let along = sum2(dx, x, |g, x| g * (x - mean)) * inverse * inverse / n;
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = inverse * (*dx - flat - (x - mean) * along);
        }
    }
}

compiled! {
    /// `out = act(x)`. Both `[n]`.
    pub fn act<T: Real>(kind: Act, x: &[T], out: &mut [T]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = activation(kind, x).0;
        }
    }
}

compiled! {
    /// Backward of [`act`], in place: `d = d act'(x)`.
    pub fn act_back<T: Real>(kind: Act, x: &[T], d: &mut [T]) {
        for (d, &x) in d.iter_mut().zip(x) {
            *d *= activation(kind, x).1;
        }
    }
}

compiled! {
    /// `out = act(gate) up`. All `[n]`.
    pub fn gated<T: Real>(kind: Act, gate: &[T], up: &[T], out: &mut [T]) {
        for (o, (&g, &u)) in out.iter_mut().zip(gate.iter().zip(up)) {
            *o = activation(kind, g).0 * u;
        }
    }
}

compiled! {
    /// Backward of [`gated`]: `dgate` and `dup` are overwritten.
    pub fn gated_back<T: Real>(kind: Act, gate: &[T], up: &[T], d: &[T], dgate: &mut [T], dup: &mut [T]) {
        for ((dg, du), ((&g, &u), &d)) in dgate.iter_mut().zip(dup.iter_mut()).zip(gate.iter().zip(up).zip(d)) {
            let (value, slope) = activation(kind, g);
            *dg = d * u * slope;
            *du = d * value;
        }
    }
}

compiled! {
    /// Turns the pairs `(i, i + n)` of `head: [>= 2 n]` by angles whose cosines and sines are `cos` and `sin: [n]`, in place.
    pub fn rotate<T: Real>(head: &mut [T], cos: &[T], sin: &[T]) {
        let (low, high) = head.split_at_mut(cos.len());
        for ((a, b), (&c, &s)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
            let (x, y) = (*a, *b);
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}

compiled! {
    /// Turns them back: the inverse of [`rotate`], and its backward.
    pub fn rotate_back<T: Real>(head: &mut [T], cos: &[T], sin: &[T]) {
        let (low, high) = head.split_at_mut(cos.len());
        for ((a, b), (&c, &s)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
            let (x, y) = (*a, *b);
            *a = x * c + y * s;
            *b = y * c - x * s;
        }
    }
}

compiled! {
    /// `s = e^(s - m)` in place, with `m` the largest; gives `m` and the sum `l`. Nothing to see (all minus infinity): zeros, `m = -inf`, `l = 0`.
    pub fn softmax_parts<T: Real>(s: &mut [T]) -> (T, T) {
        let m = largest(s);
        if m == T::neg_infinity() {
            s.fill(T::zero());
            return (m, T::zero());
        }
        for s in s.iter_mut() {
            *s = if *s == T::neg_infinity() { T::zero() } else { (*s - m).exponential() };
        }
        (m, sum2(s, s, |a, _| a))
    }
}

compiled! {
    /// `ln sum e^s`; minus infinity of nothing.
    pub fn log_sum_exp<T: Real>(s: &[T]) -> T {
        let m = largest(s);
        if m == T::neg_infinity() {
            return m;
        }
        m + sum2(s, s, |a, _| (a - m).exponential()).ln()
    }
}

compiled! {
    /// `s = c e^(s - lse)` in place; 0 where `s` is minus infinity.
    pub fn exp_minus<T: Real>(s: &mut [T], lse: T, c: T) {
        for s in s.iter_mut() {
            *s = if *s == T::neg_infinity() { T::zero() } else { c * (*s - lse).exponential() };
        }
    }
}

compiled! {
    /// `p = p (dp - delta)` in place: from attention weights to the gradient of scores (hydragen.md section 7).
    pub fn scores_back<T: Real>(p: &mut [T], dp: &[T], delta: T) {
        for (p, &dp) in p.iter_mut().zip(dp) {
            *p *= dp - delta;
        }
    }
}

/// What one step of Adam does to a tensor: all of it decided before, so that every element is treated alike.
#[derive(Debug, Clone, Copy)]
pub struct AdamStep<T> {
    /// Learning rate over the first moment's correction, `lr / (1 - beta1^t)`.
    pub rate: T,
    /// `1 / sqrt(1 - beta2^t)`
    pub second_correction: T,
    /// Decay of the first moment.
    pub beta1: T,
    /// Decay of the second moment.
    pub beta2: T,
    /// Added to the root of the second moment.
    pub eps: T,
    /// Factor on the value before the step, `1 - lr * decay` (AdamW).
    pub keep: T,
    /// Factor on the gradient: clipping, and the share of an accumulated sum.
    pub grad_scale: T,
}

compiled! {
    /// AdamW on one tensor, in place. All `[n]`.
    pub fn adam_step<T: Real>(step: AdamStep<T>, value: &mut [T], first: &mut [T], second: &mut [T], grad: &[T]) {
        let AdamStep { rate, second_correction, beta1, beta2, eps, keep, grad_scale } = step;
        for ((x, &g), (m, v)) in value.iter_mut().zip(grad).zip(first.iter_mut().zip(second.iter_mut())) {
            let g = g * grad_scale;
            *m = beta1 * *m + (T::one() - beta1) * g;
            *v = beta2 * *v + (T::one() - beta2) * g * g;
            *x = *x * keep - rate * *m / (v.sqrt() * second_correction + eps);
        }
    }
}

compiled! {
    /// Sum of squares in f64, for the norm of gradients.
    pub fn squares<T: Real>(x: &[T]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        for (i, x) in x.iter().enumerate() {
            let x = x.f64();
            lanes[i % LANES] += x * x;
        }
        fold(lanes)
    }
}
