//! Losses and their gradients. The encoder's product is dense; everything after it costs what the active features cost.
//!
//! Sums over rows are taken in the order of the rows, one feature a task: the number of threads changes no bit.

use antefix_kernels::dense::{Mat, MatMut, Real, Sum, Threads, product};
use rayon::prelude::*;

use super::config::{Loss, SaeConfig};
use super::params::Params;

/// Features of rows, as a list of (feature, value) a row, ascending.
pub(crate) type Sparse<T> = Vec<Vec<(u32, T)>>;

/// What a batch gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome<T> {
    /// Gradients of the whole loss.
    pub gradients: Params<T>,
    /// The whole loss.
    pub loss: f64,
    /// Mean squared error of a row, summed over its values.
    pub mse: f64,
    /// Mean squared distance of a row from the mean row.
    pub variance: f64,
    /// Mean number of active features.
    pub l0: f64,
    /// How often each feature was active, `[F]`.
    pub fires: Vec<u32>,
    /// The least kept value of a batch (`batchtopk`); `None` if nothing was kept.
    pub least: Option<f64>,
    /// Squared error of each row, `[rows]`.
    pub errors: Vec<f64>,
}

fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    // Eight sums side by side, added in a fixed order.
    let mut sums = [T::zero(); 8];
    let (wide_a, tail_a) = a.as_chunks::<8>();
    let (wide_b, tail_b) = b.as_chunks::<8>();
    for (a, b) in wide_a.iter().zip(wide_b) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let mut sum = sums.into_iter().fold(T::zero(), |x, y| x + y);
    for (a, b) in tail_a.iter().zip(tail_b) {
        sum += *a * *b;
    }
    sum
}

fn axpy<T: Real>(to: &mut [T], by: T, x: &[T]) {
    to.iter_mut().zip(x).for_each(|(t, x)| *t += by * *x);
}

/// The `n` largest values of `row`, ties to the earlier entry; ascending by feature.
fn keep_largest<T: Real>(row: &mut Vec<(u32, T)>, n: usize) {
    if row.len() > n {
        let order = |a: &(u32, T), b: &(u32, T)| b.1.f64().total_cmp(&a.1.f64()).then(a.0.cmp(&b.0));
        if n > 0 {
            row.select_nth_unstable_by(n - 1, order);
        }
        row.truncate(n);
        row.sort_unstable_by_key(|f| f.0);
    }
}

/// Keeps the `n` largest values of all rows together, ties to the earlier row and feature; returns the least one kept.
fn keep_largest_of_all<T: Real>(rows: &mut Sparse<T>, n: usize) -> Option<f64> {
    let mut all: Vec<f64> = rows.iter().flatten().map(|f| f.1.f64()).collect();
    let total = all.len();
    if n == 0 {
        rows.iter_mut().for_each(Vec::clear);
        return None;
    }
    if total > n {
        let (_, &mut cut, _) = all.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a));
        // Those above the cut are kept, and of those at it as many as there is room for.
        let mut room = n - rows.iter().flatten().filter(|f| f.1.f64() > cut).count();
        for row in rows.iter_mut() {
            row.retain(|f| {
                let x = f.1.f64();
                let at = x == cut && room > 0;
                room -= usize::from(at);
                x > cut || at
            });
        }
    }
    let kept = rows.iter().flatten().map(|f| f.1.f64());
    kept.min_by(f64::total_cmp)
}

/// Bits of a positive f64 below its bucket: exponent and four bits of the fraction are left.
const BUCKET: u32 = 48;

/// A value that the `n` largest positive ones of `h + bias` do not fall below, and few others exceed: the lower edge of the `n`-th largest's
/// bucket of a histogram. 0 if there are fewer.
fn bound_of_largest<T: Real>(h: &[T], bias: &[T], n: usize) -> f64 {
    let empty = || vec![0u32; (f64::INFINITY.to_bits() >> BUCKET) as usize + 1];
    let counts = h
        .par_chunks(bias.len())
        .fold(empty, |mut counts, row| {
            for (h, b) in row.iter().zip(bias) {
                let x = (*h + *b).f64();
                if x > 0.0 {
                    counts[(x.to_bits() >> BUCKET) as usize] += 1;
                }
            }
            counts
        })
        .reduce(empty, |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        });
    let mut above = 0;
    for (bucket, count) in counts.iter().enumerate().rev() {
        above += *count as usize;
        if above >= n {
            return f64::from_bits((bucket as u64) << BUCKET);
        }
    }
    0.0
}

/// `h = (x - b_dec) W_enc` and the centred rows: `[rows, F]`, `[rows, d_in]`.
fn pre<T: Real>(p: &Params<T>, x: &[T], d: usize) -> (Vec<T>, Vec<T>) {
    let (rows, features) = (x.len() / d, p.b_enc.len());
    let centred: Vec<T> = x
        .par_chunks(d)
        .flat_map_iter(|row| row.iter().zip(&p.b_dec).map(|(x, b)| *x - *b))
        .collect();
    let mut h = vec![T::zero(); rows * features];
    product(
        MatMut::new(&mut h, rows, features),
        Sum::Replace,
        T::one(),
        Mat::new(&centred, rows, d),
        Mat::new(&p.w_enc, features, d).t(),
        Threads::Pool,
    );
    (h, centred)
}

/// `rows . W_dec + bias`, less `minus`, `[rows, d_in]`.
fn decode_less<T: Real>(p: &Params<T>, codes: &Sparse<T>, bias: bool, minus: &[T], d: usize) -> Vec<T> {
    let mut out = vec![T::zero(); minus.len()];
    out.par_chunks_mut(d)
        .zip(codes)
        .zip(minus.par_chunks(d))
        .for_each(|((out, row), minus)| {
            for &(j, f) in row {
                axpy(out, f, &p.w_dec[j as usize * d..][..d]);
            }
            for (i, x) in out.iter_mut().enumerate() {
                let b = if bias { p.b_dec[i] } else { T::zero() };
                *x = *x + b - minus[i];
            }
        });
    out
}

/// One way in which the loss depends on features: of each entry, the value that the decoder read (if its gradient flows there), and the
/// gradients of the pre-activation.
struct Path<'a, T> {
    codes: &'a Sparse<T>,
    /// Gradient of each row of the output, `[rows, d_in]`.
    g: &'a [T],
    /// Whether the decoder learns from it.
    decoder: bool,
}

/// By feature, its entries in the order of the rows: (row, place in the row).
fn by_feature<T>(codes: &Sparse<T>, features: usize) -> Vec<Vec<(u32, u32)>> {
    let mut lists = vec![Vec::new(); features];
    for (r, row) in codes.iter().enumerate() {
        for (i, (j, _)) in row.iter().enumerate() {
            lists[*j as usize].push((r as u32, i as u32));
        }
    }
    lists
}

/// Gradients of features through the decoder: `g_r . W_dec[j]` for every entry.
fn through_decoder<T: Real>(p: &Params<T>, path: &Path<'_, T>, d: usize) -> Vec<Vec<T>> {
    path.codes
        .par_iter()
        .zip(path.g.par_chunks(d))
        .map(|(row, g)| {
            row.iter()
                .map(|(j, _)| dot(g, &p.w_dec[*j as usize * d..][..d]))
                .collect()
        })
        .collect()
}

/// The rows of both matrices that a feature's gradient goes to, and its other gradients.
struct Slots<'a, T> {
    w_enc: &'a mut [T],
    w_dec: &'a mut [T],
    b_enc: &'a mut T,
}

/// Loss and gradients of `x: [rows, d_in]`. `dead` are the features that the auxiliary loss may use, `[F]`.
///
/// # Panics
/// When `x` is empty or no whole number of rows, or `p` is not of the sizes of `cfg`.
pub fn gradients<T: Real>(cfg: &SaeConfig, p: &Params<T>, x: &[T], dead: &[bool]) -> Outcome<T> {
    let (d, features) = (cfg.d_in, cfg.features);
    assert!(
        !x.is_empty() && x.len().is_multiple_of(d),
        "whole rows of {d} values"
    );
    assert_eq!(p.w_enc.len(), features * d, "parameters of this configuration");
    let rows = x.len() / d;
    let per_row = T::of(1.0 / rows as f64);
    let (h, centred) = pre(p, x, d);
    let (codes, least) = activate(cfg, p, &h, rows);
    let error = decode_less(p, &codes, true, x, d);
    let errors: Vec<f64> = error
        .par_chunks(d)
        .map(|row| row.iter().map(|e| e.f64() * e.f64()).sum())
        .collect();
    let mse = errors.iter().sum::<f64>() / rows as f64;
    let two = T::of(2.0) * per_row;
    let g: Vec<T> = error.par_iter().map(|e| *e * two).collect();
    let mut out = Params::zeros(cfg);
    let mut loss = mse;

    // The auxiliary loss of dead features, on what is left (section 3.8).
    let aux = auxiliary(cfg, p, &h, &error, dead, rows);
    loss += aux.as_ref().map_or(0.0, |a| a.loss);
    // The gates' own reconstruction, with a frozen decoder.
    let gates = gates(cfg, p, &h, x, rows);
    loss += gates.as_ref().map_or(0.0, |a| a.loss);

    let main = Path {
        codes: &codes,
        g: &g,
        decoder: true,
    };
    let mut paths = vec![main];
    for side in aux.iter().chain(&gates) {
        paths.push(Path {
            codes: &side.codes,
            g: &side.g,
            decoder: aux.is_some(),
        });
    }
    for (n, path) in paths.iter().enumerate() {
        let back = through_decoder(p, path, d);
        let lists = by_feature(path.codes, features);
        // What an entry's pre-activation gets beside the decoder's part.
        let constant = match (cfg.loss, n) {
            (Loss::Standard { l1 }, 0) | (Loss::Gated { l1 }, 1) => T::of(l1) * per_row,
            _ => T::zero(),
        };
        let gated = n == 0 && matches!(cfg.loss, Loss::Gated { .. });
        let mags: Vec<(T, T)> = out
            .w_enc
            .par_chunks_mut(d)
            .zip(out.w_dec.par_chunks_mut(d))
            .zip(out.b_enc.par_iter_mut())
            .zip(&lists)
            .enumerate()
            .map(|(j, (((w_enc, w_dec), b_enc), list))| {
                let slots = Slots { w_enc, w_dec, b_enc };
                // A gated magnitude is h exp(r_mag) + b_mag; elsewhere a feature is its pre-activation.
                let factor = if gated {
                    T::of(p.scale[j].f64().exp())
                } else {
                    T::one()
                };
                let (mut sum_scale, mut sum_mag) = (T::zero(), T::zero());
                for &(r, i) in list {
                    let (r, i) = (r as usize, i as usize);
                    let value = path.codes[r][i].1;
                    let by = back[r][i] + constant;
                    if path.decoder {
                        axpy(slots.w_dec, value, &path.g[r * d..][..d]);
                    }
                    axpy(slots.w_enc, by * factor, &centred[r * d..][..d]);
                    if gated {
                        sum_scale += by * h[r * features + j] * factor;
                        sum_mag += by;
                    } else {
                        *slots.b_enc += by;
                    }
                }
                (sum_scale, sum_mag)
            })
            .collect();
        if gated {
            for (j, (scale, mag)) in mags.into_iter().enumerate() {
                out.scale[j] += scale;
                out.b_mag[j] += mag;
            }
        }
    }
    match cfg.loss {
        Loss::Standard { l1 } => {
            let sum: f64 = codes.iter().flatten().map(|f| f.1.f64()).sum();
            loss += l1 * sum / rows as f64;
        }
        Loss::JumpRelu { l0, bandwidth } => {
            let count: usize = codes.iter().map(Vec::len).sum();
            loss += l0 * count as f64 / rows as f64;
            thresholds(p, &h, &g, (l0, bandwidth), &mut out.scale, d);
        }
        _ => {}
    }
    bias_of_decoder(p, &g, &mut out, d);
    let mut fires = vec![0u32; features];
    codes.iter().flatten().for_each(|f| fires[f.0 as usize] += 1);
    Outcome {
        gradients: out,
        loss,
        mse,
        variance: variance(x, d),
        l0: codes.iter().map(Vec::len).sum::<usize>() as f64 / rows as f64,
        fires,
        least,
        errors,
    }
}

/// `b_dec` is added to every output, and taken off every input: what the encoder's inputs get is the sum over features of what their
/// pre-activations get, times their rows.
fn bias_of_decoder<T: Real>(p: &Params<T>, g: &[T], out: &mut Params<T>, d: usize) {
    for row in g.chunks_exact(d) {
        axpy(&mut out.b_dec, T::one(), row);
    }
    // The gradient of each h summed over the rows: that of the bias, and of a gated magnitude its factor times that of `b_mag`.
    for (j, row) in p.w_enc.chunks_exact(d).enumerate() {
        let mut sum = out.b_enc[j];
        if !out.b_mag.is_empty() {
            sum += out.b_mag[j] * T::of(p.scale[j].f64().exp());
        }
        axpy(&mut out.b_dec, -sum, row);
    }
}

fn variance<T: Real>(x: &[T], d: usize) -> f64 {
    let n = (x.len() / d) as f64;
    let columns = (0..d).into_par_iter().map(|i| {
        let values = || x.iter().skip(i).step_by(d).map(|x| x.f64());
        let mean = values().sum::<f64>() / n;
        values().map(|x| (x - mean).powi(2)).sum::<f64>()
    });
    let columns: Vec<f64> = columns.collect();
    columns.iter().sum::<f64>() / n
}

/// The active features of every row, and the least value that a batch kept.
pub(crate) fn activate<T: Real>(
    cfg: &SaeConfig,
    p: &Params<T>,
    h: &[T],
    rows: usize,
) -> (Sparse<T>, Option<f64>) {
    let features = cfg.features;
    let each = |f: &(dyn Fn(usize, T) -> Option<T> + Sync)| -> Sparse<T> {
        h.par_chunks(features)
            .map(|row| {
                let entries = row.iter().enumerate();
                entries
                    .filter_map(|(j, h)| f(j, *h).map(|x| (j as u32, x)))
                    .collect()
            })
            .collect()
    };
    let relu = |j: usize, h: T| Some(h + p.b_enc[j]).filter(|x| *x > T::zero());
    match cfg.loss {
        Loss::Standard { .. } => (each(&relu), None),
        Loss::TopK { k, .. } => {
            let mut codes = each(&relu);
            codes.par_iter_mut().for_each(|row| keep_largest(row, k));
            (codes, None)
        }
        Loss::BatchTopK { k, .. } => {
            let bound = T::of(bound_of_largest(h, &p.b_enc, k * rows));
            let mut codes = each(&|j, h| relu(j, h).filter(|x| *x >= bound));
            let least = keep_largest_of_all(&mut codes, k * rows);
            (codes, least)
        }
        Loss::JumpRelu { .. } => {
            let theta: Vec<T> = p.scale.iter().map(|x| T::of(x.f64().exp())).collect();
            (each(&|j, h| relu(j, h).filter(|x| *x > theta[j])), None)
        }
        Loss::Gated { .. } => {
            let factor: Vec<T> = p.scale.iter().map(|x| T::of(x.f64().exp())).collect();
            let value = |j: usize, h: T| {
                relu(j, h)?;
                Some(h * factor[j] + p.b_mag[j]).filter(|x| *x > T::zero())
            };
            (each(&value), None)
        }
    }
}

/// A second reconstruction.
struct Side<T> {
    codes: Sparse<T>,
    g: Vec<T>,
    loss: f64,
}

/// Dead features decode what the living left: `coef min(n_dead / k_aux, 1) mean ||a W_dec - (x - x^)||^2` with the `k_aux = d_in / 2`
/// largest pre-activations, whatever their sign. `x - x^` is a constant here. `None` where nothing is dead.
fn auxiliary<T: Real>(
    cfg: &SaeConfig,
    p: &Params<T>,
    h: &[T],
    error: &[T],
    dead: &[bool],
    rows: usize,
) -> Option<Side<T>> {
    let coef = cfg.loss.aux();
    let ids: Vec<u32> = (0..cfg.features as u32)
        .filter(|&j| dead.get(j as usize) == Some(&true))
        .collect();
    if coef == 0.0 || ids.is_empty() {
        return None;
    }
    let (d, wanted) = (cfg.d_in, (cfg.d_in / 2).max(1));
    let codes: Sparse<T> = h
        .par_chunks(cfg.features)
        .map(|h| {
            let mut row: Vec<(u32, T)> = ids
                .iter()
                .map(|&j| (j, h[j as usize] + p.b_enc[j as usize]))
                .collect();
            keep_largest(&mut row, wanted);
            row
        })
        .collect();
    let weight = coef * (ids.len() as f64 / wanted as f64).min(1.0);
    // error = x^ - x, so that what is left is its negative.
    let left: Vec<T> = error.iter().map(|e| -*e).collect();
    Some(side(p, codes, &left, (false, weight), rows, d))
}

fn side<T: Real>(
    p: &Params<T>,
    codes: Sparse<T>,
    target: &[T],
    (bias, weight): (bool, f64),
    rows: usize,
    d: usize,
) -> Side<T> {
    let off = decode_less(p, &codes, bias, target, d);
    let loss: f64 = off.iter().map(|e| e.f64() * e.f64()).sum::<f64>() * weight / rows as f64;
    let two = T::of(2.0 * weight / rows as f64);
    Side {
        codes,
        g: off.into_iter().map(|e| e * two).collect(),
        loss,
    }
}

/// The gates of a gated dictionary as features of their own: `mean ||relu(gate) W_dec + b_dec - x||^2 + l1 mean sum relu(gate)`, with a
/// frozen decoder. `None` for the other architectures.
fn gates<T: Real>(cfg: &SaeConfig, p: &Params<T>, h: &[T], x: &[T], rows: usize) -> Option<Side<T>> {
    let Loss::Gated { l1 } = cfg.loss else {
        return None;
    };
    let codes: Sparse<T> = h
        .par_chunks(cfg.features)
        .map(|h| {
            let gates = h.iter().zip(&p.b_enc).enumerate();
            let open = gates.map(|(j, (h, b))| (j as u32, *h + *b));
            open.filter(|f| f.1 > T::zero()).collect()
        })
        .collect();
    let sum: f64 = codes.iter().flatten().map(|f| f.1.f64()).sum();
    let mut side = side(p, codes, x, (true, 1.0), rows, cfg.d_in);
    side.loss += l1 * sum / rows as f64;
    Some(side)
}

/// Gradients of the log-thresholds through a rectangular kernel of width `bandwidth` around them: a feature at its threshold would
/// lose or gain the value `theta`, and the count 1.
fn thresholds<T: Real>(
    p: &Params<T>,
    h: &[T],
    g: &[T],
    (l0, bandwidth): (f64, f64),
    out: &mut [T],
    d: usize,
) {
    let features = out.len();
    let rows = h.len() / features;
    out.par_iter_mut().enumerate().for_each(|(j, out)| {
        let theta = p.scale[j].f64().exp();
        let mut sum = 0.0;
        for r in 0..rows {
            let x = (h[r * features + j] + p.b_enc[j]).f64();
            if ((x - theta) / bandwidth).abs() < 0.5 {
                let df = dot(&g[r * d..][..d], &p.w_dec[j * d..][..d]).f64();
                sum -= (theta * df + l0 / rows as f64) / bandwidth;
            }
        }
        // d theta / d ln theta = theta.
        *out += T::of(sum * theta);
    });
}
