//! Attention of one constant query over a growing prefix: its state, and the ways to compute all prefixes (3.1 to 3.4, 3.8).
//!
//! The state is that of [`antefix_state::State`] with one row a head, kept divided: `lse = m + ln l` and `o = acc / l`. A sum `l` in f32
//! would lose the weight of a new token after 2^24 equal ones (3.8); `lse` in f64 does not, and `o` is always the answer.

use std::sync::{Mutex, PoisonError};

use antefix_kernels::dense::Real;
use antefix_kernels::team::Team;
use antefix_state::State;

/// Attention of `H` constant queries over the tokens seen so far.
///
/// `lse: [H]`, the logarithm of the sum of all weights; `o: [H, D]`, the output. No token: `lse = -inf`, `o = 0`, the identity of
/// [`Prefix::merge`]. Size: `H (D + 2)` numbers of 4 bytes (f32), whatever was seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Prefix<T = f32> {
    lse: Vec<f64>,
    o: Vec<T>,
    dim: usize,
}

/// What a token's score does to a head: the new `lse` and the token's share of the new output. One `exp`.
#[inline]
fn take(lse: f64, score: f64) -> (f64, f64) {
    let d = score - lse; // +inf for the first token, whose share is then 1
    let e = (-d.abs()).exp();
    if d <= 0.0 {
        (lse + e.ln_1p(), e / (1.0 + e))
    } else {
        (score + e.ln_1p(), 1.0 / (1.0 + e))
    }
}

impl<T: Real> Prefix<T> {
    /// Nothing seen yet, of `heads` heads of dimension `dim`.
    pub fn new(heads: usize, dim: usize) -> Self {
        Self {
            lse: vec![f64::NEG_INFINITY; heads],
            o: vec![T::default(); heads * dim],
            dim,
        }
    }

    /// A state out of its parts, `lse: [H]` and `o: [H, D]`; `None` if they are not of one shape, or a head without weight has an output.
    pub fn from_parts(lse: Vec<f64>, o: Vec<T>, dim: usize) -> Option<Self> {
        let fits = dim > 0 && lse.len().checked_mul(dim) == Some(o.len());
        let sound = |(lse, o): (&f64, &[T])| {
            let finite = *lse < f64::INFINITY && o.iter().all(|x| x.f64().is_finite());
            finite && (*lse > f64::NEG_INFINITY || o.iter().all(|x| *x == T::default()))
        };
        (fits && lse.iter().zip(o.chunks_exact(dim)).all(sound)).then_some(Self { lse, o, dim })
    }

    /// Heads `H`.
    pub fn heads(&self) -> usize {
        self.lse.len()
    }

    /// Head dimension `D`.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Logarithms of the sums of weights, `[H]`.
    pub fn lse(&self) -> &[f64] {
        &self.lse
    }

    /// The output, `[H, D]`: zeros before the first token.
    pub fn output(&self) -> &[T] {
        &self.o
    }

    /// Bytes held: constant.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.lse[..]) + size_of_val(&self.o[..])
    }

    /// The recurrence (3.1), one token: scores `s: [H]`, values `v: [H, D]`. A score of -inf is no token: it changes no bit.
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn push(&mut self, s: &[T], v: &[T]) {
        assert!(
            s.len() == self.heads() && v.len() == self.o.len(),
            "a score and a value for each head"
        );
        let rows = self.o.chunks_exact_mut(self.dim).zip(v.chunks_exact(self.dim));
        for ((lse, s), (o, v)) in self.lse.iter_mut().zip(s).zip(rows) {
            let s = s.f64();
            if s == f64::NEG_INFINITY {
                continue;
            }
            let (next, share) = take(*lse, s);
            *lse = next;
            let share = T::of(share);
            for (o, v) in o.iter_mut().zip(v) {
                *o += share * (*v - *o);
            }
        }
    }

    /// A block of `b` tokens at once (3.3): one maximum, one rescaling. `s: [b, H]`, `v: [b, H, D]`. Only the state behind the block is
    /// known afterwards, for `b` scores of memory.
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn push_block(&mut self, s: &[T], v: &[T]) {
        let (heads, dim) = (self.heads(), self.dim);
        assert!(
            s.len().is_multiple_of(heads.max(1)) && v.len() == s.len() * dim,
            "scores are [b, H], values [b, H, D]"
        );
        for h in 0..heads {
            let scores = || s.iter().skip(h).step_by(heads).map(|s| s.f64());
            let m = scores().fold(self.lse[h], f64::max);
            if m == f64::NEG_INFINITY {
                continue;
            }
            let old = (self.lse[h] - m).exp();
            let sum = old + scores().map(|s| (s - m).exp()).sum::<f64>();
            let o = &mut self.o[h * dim..][..dim];
            let keep = T::of(old / sum);
            o.iter_mut().for_each(|o| *o *= keep);
            for (i, s) in scores().enumerate() {
                let share = T::of((s - m).exp() / sum);
                if share != T::default() {
                    let v = &v[(i * heads + h) * dim..][..dim];
                    o.iter_mut().zip(v).for_each(|(o, v)| *o += share * *v);
                }
            }
            self.lse[h] = m + sum.ln();
        }
    }

    /// The operator of 3.2: continues with the tokens of `other`. The identity changes no bit.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn merge(&mut self, other: &Self) {
        assert!(
            self.lse.len() == other.lse.len() && self.dim == other.dim,
            "only states of the same heads merge"
        );
        merge(&mut self.lse, &mut self.o, &other.lse, &other.o, 0.0);
    }

    /// Multiplies the weight of everything seen by `e^b`. With `b = -lambda` before every token, older ones are forgotten (the decay of 3.8).
    pub fn gain(&mut self, b: f64) {
        self.lse.iter_mut().for_each(|lse| *lse += b);
    }

    /// All prefixes one after the other: pushes `s: [N, H]`, `v: [N, H, D]` and writes each output to `out: [N, H, D]`, and each `lse` to
    /// `lses: [N, H]` where someone asks. `decay` is subtracted from the logarithm of every weight before each token; 0 forgets nothing.
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn scan(&mut self, s: &[T], v: &[T], decay: f64, out: &mut [T], mut lses: Option<&mut [f64]>) {
        let (heads, width) = (self.heads(), self.o.len());
        assert!(
            width > 0
                && v.len() == out.len()
                && v.len() == s.len() * self.dim
                && v.len().is_multiple_of(width),
            "scores are [N, H], values and outputs [N, H, D]"
        );
        let rows = s.chunks_exact(heads).zip(v.chunks_exact(width));
        for (i, ((s, v), out)) in rows.zip(out.chunks_exact_mut(width)).enumerate() {
            if decay != 0.0 {
                self.gain(-decay);
            }
            self.push(s, v);
            out.copy_from_slice(&self.o);
            if let Some(lses) = &mut lses {
                lses[i * heads..][..heads].copy_from_slice(&self.lse);
            }
        }
    }

    /// [`Prefix::scan`] in three phases (3.4): chunks of `chunk` tokens alone, one serial pass over their ends, and what came before each
    /// chunk merged into it. Where the cuts are depends on `chunk` alone, so the number of threads changes no bit.
    ///
    /// # Panics
    /// When the shapes do not fit or `chunk` is 0.
    pub fn scan_chunked(&mut self, team: &Team, chunk: usize, s: &[T], v: &[T], decay: f64, out: &mut [T]) {
        let (heads, width, dim) = (self.heads(), self.o.len(), self.dim);
        assert!(
            chunk > 0 && width > 0 && v.len() == out.len() && v.len() == s.len() * dim,
            "scores are [N, H], values and outputs [N, H, D]"
        );
        let mut lses = vec![0.0; s.len()];
        let pieces = out
            .chunks_mut(chunk * width)
            .zip(lses.chunks_mut(chunk * heads))
            .map(Mutex::new);
        let pieces: Vec<_> = pieces.collect();
        team.run(pieces.len(), &|c| {
            let mut piece = pieces[c].lock().unwrap_or_else(PoisonError::into_inner);
            let (out, lses) = &mut *piece;
            let (from, tokens) = (c * chunk, lses.len() / heads);
            let (s, v) = (&s[from * heads..][..lses.len()], &v[from * width..][..out.len()]);
            debug_assert_eq!(s.len(), tokens * heads);
            Self::new(heads, dim).scan(s, v, decay, out, Some(lses));
        });
        let mut carries = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            let piece = piece.lock().unwrap_or_else(PoisonError::into_inner);
            carries.push(self.clone());
            let tokens = piece.1.len() / heads;
            self.gain(-decay * tokens as f64);
            let (lse, o) = (&piece.1[(tokens - 1) * heads..], &piece.0[(tokens - 1) * width..]);
            merge(&mut self.lse, &mut self.o, lse, o, 0.0);
        }
        team.run(pieces.len(), &|c| {
            let carry = &carries[c];
            if carry.lse.iter().all(|lse| *lse == f64::NEG_INFINITY) {
                return;
            }
            let mut piece = pieces[c].lock().unwrap_or_else(PoisonError::into_inner);
            let (out, lses) = &mut *piece;
            let rows = out.chunks_exact_mut(width).zip(lses.chunks_exact_mut(heads));
            for (j, (o, lse)) in rows.enumerate() {
                merge(lse, o, &carry.lse, &carry.o, -decay * (j + 1) as f64);
            }
        });
    }
}

/// `(lse, o)` continues with `(other_lse + gain, other_o)`, head by head.
fn merge<T: Real>(lse: &mut [f64], o: &mut [T], other_lse: &[f64], other_o: &[T], gain: f64) {
    let dim = o.len() / lse.len().max(1);
    let rows = o
        .chunks_exact_mut(dim.max(1))
        .zip(other_o.chunks_exact(dim.max(1)));
    for ((lse, other), (o, p)) in lse.iter_mut().zip(other_lse).zip(rows) {
        if *other == f64::NEG_INFINITY {
            continue;
        }
        if *lse == f64::NEG_INFINITY {
            *lse = other + gain;
            o.copy_from_slice(p);
            continue;
        }
        let (next, share) = take(*lse, other + gain);
        *lse = next;
        let (share, keep) = (T::of(share), T::of(1.0 - share));
        o.iter_mut().zip(p).for_each(|(o, p)| *o = keep * *o + share * *p);
    }
}

impl Prefix<f32> {
    /// The same as a state of the algebra, a row a head: `m = lse`, `l = 1`, `acc = o`.
    pub fn state(&self) -> State {
        let mut state = State::identity(self.heads(), self.dim);
        let (m, l, acc) = state.parts_mut();
        for (h, lse) in self.lse.iter().enumerate() {
            if *lse > f64::NEG_INFINITY {
                (m[h], l[h]) = (*lse as f32, 1.0);
            }
        }
        acc.copy_from_slice(&self.o);
        state
    }
}

impl From<&State> for Prefix<f32> {
    fn from(state: &State) -> Self {
        let lse = state.m().iter().zip(state.l());
        Self {
            lse: lse.map(|(m, l)| f64::from(*m) + f64::from(*l).ln()).collect(),
            o: state.finish().0,
            dim: state.dim(),
        }
    }
}
