//! Attention over a packed batch with grouped heads, forward and backward, in memory linear in the rows.
//!
//! Backward keeps only the result and the global log-sum-exp of each row and computes weights again (hydragen.md section 7): every block of keys
//! is processed on its own, and keys that many rows read - a prefix shared by responses - collect the sum of their gradients. Tasks are one
//! head of one part of the packing; rows of a task go tile by tile, in order, so no bit depends on the number of threads.

use std::sync::Arc;

use antefix_kernels::dense::{Mat, MatMut, Sum, Threads, product};
use antefix_kernels::grad;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::node::{Arg, Op, Output, Scalar, apply, ensure};
use super::packing::{Angles, Block, Packing, Part, Tile};

/// How a layer attends.
#[derive(Debug, Clone)]
pub struct Attention {
    /// `Hq`
    pub heads: usize,
    /// `Hk`, divides `Hq`; query head `h` reads key head `h / (Hq / Hk)`.
    pub kv_heads: usize,
    /// Factor on scores.
    pub scale: f64,
    /// A row at position `p` sees keys at positions above `p - window` only.
    pub window: Option<u32>,
    /// Rotation of queries and keys, if any.
    pub angles: Option<Arc<Angles>>,
    /// Who attends whom.
    pub packing: Arc<Packing>,
}

/// `o [R, Hq D] = softmax(scale q k^T) v` over what each row sees; `q: [R, Hq D]`, `k, v: [R, Hk D]`, rotated inside.
///
/// # Errors
/// When the sizes do not fit the packing or each other.
pub fn attend(attention: Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    apply(Attend(attention), &[q, k, v])
}

struct Attend(Attention);

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

/// Head-major copies, `[H, R, D]`, rotated.
struct Turned<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

/// `[R, H, D]` to `[H, R, D]`.
fn head_major<T: Scalar>(
    x: &[T],
    rows: usize,
    heads: usize,
    dim: usize,
    turn: Option<&[Vec<T>; 2]>,
) -> Vec<T> {
    let mut out = vec![T::zero(); x.len()];
    out.par_chunks_mut(rows * dim).enumerate().for_each(|(h, out)| {
        for (r, out) in out.chunks_exact_mut(dim).enumerate() {
            out.copy_from_slice(&x[(r * heads + h) * dim..][..dim]);
            if let Some([cos, sin]) = turn {
                let n = cos.len() / rows;
                grad::rotate(out, &cos[r * n..][..n], &sin[r * n..][..n]);
            }
        }
    });
    out
}

/// Sums groups of `fold` heads of `[H, R, D]`, turns them back, and gives `[R, H / fold, D]`.
fn row_major<T: Scalar>(
    x: &[T],
    rows: usize,
    heads: usize,
    dim: usize,
    fold: usize,
    turn: Option<&[Vec<T>; 2]>,
) -> Vec<T> {
    let kept = heads / fold;
    let mut out = vec![T::zero(); rows * kept * dim];
    out.par_chunks_mut(kept * dim).enumerate().for_each(|(r, out)| {
        for (h, out) in out.chunks_exact_mut(dim).enumerate() {
            for part in 0..fold {
                let from = &x[((h * fold + part) * rows + r) * dim..][..dim];
                match part {
                    0 => out.copy_from_slice(from),
                    _ => grad::add_scaled(out, T::one(), from),
                }
            }
            if let Some([cos, sin]) = turn {
                let n = cos.len() / rows;
                grad::rotate_back(out, &cos[r * n..][..n], &sin[r * n..][..n]);
            }
        }
    });
    out
}

/// Splits `[H, R, width]` into one slice for each head of each part, in that order.
fn pieces<'a, T>(mut all: &'a mut [T], heads: usize, parts: &[Part], width: usize) -> Vec<&'a mut [T]> {
    let mut out = Vec::with_capacity(heads * parts.len());
    for _ in 0..heads {
        for part in parts {
            let (piece, rest) = all.split_at_mut(part.rows.len() * width);
            out.push(piece);
            all = rest;
        }
    }
    out
}

impl Attend {
    fn size<T>(&self, args: &[Arg<'_, T>]) -> Result<Size> {
        let Attention {
            heads,
            kv_heads,
            packing,
            angles,
            ..
        } = &self.0;
        let [rows, wide] = args[0].matrix();
        let dim = wide.checked_div(*heads).unwrap_or(0);
        let fits = *heads > 0
            && *kv_heads > 0
            && heads.is_multiple_of(*kv_heads)
            && dim * heads == wide
            && rows == packing.rows()
            && args[1].matrix() == [rows, dim * kv_heads]
            && args[2].matrix() == [rows, dim * kv_heads]
            && angles
                .as_ref()
                .is_none_or(|a| 2 * a.pairs() <= dim && a.rows() == rows);
        ensure(fits, || {
            format!(
                "attention of {heads} heads over {kv_heads} in a packing of {} rows cannot take q {:?}, k {:?}, v {:?}",
                packing.rows(),
                args[0].dims,
                args[1].dims,
                args[2].dims
            )
        })?;
        Ok(Size {
            rows,
            heads: *heads,
            kv_heads: *kv_heads,
            dim,
        })
    }

    fn turns<T: Scalar>(&self) -> Option<[Vec<T>; 2]> {
        self.0
            .angles
            .as_ref()
            .filter(|a| a.pairs() > 0)
            .map(|a| a.tables())
    }

    #[expect(clippy::unused_self, reason = "a step of this operator")]
    fn turned<T: Scalar>(&self, args: &[Arg<'_, T>], size: Size, turn: Option<&[Vec<T>; 2]>) -> Turned<T> {
        Turned {
            q: head_major(args[0].data, size.rows, size.heads, size.dim, turn),
            k: head_major(args[1].data, size.rows, size.kv_heads, size.dim, turn),
            v: head_major(args[2].data, size.rows, size.kv_heads, size.dim, None),
        }
    }

    /// Masked scores of a tile, `[rows, cols]`, minus infinity where a row sees nothing.
    fn scores<T: Scalar>(&self, tile: &Tile, q: &[T], k: &[T], dim: usize, out: &mut Vec<T>) {
        out.clear();
        out.resize(tile.rows.len() * tile.cols, T::neg_infinity());
        let positions = self.0.packing.positions();
        for block in &tile.blocks {
            let at = (block.rows.start - tile.rows.start) * tile.cols + block.col;
            let scores = &mut out[at..];
            product(
                MatMut::strided(scores, block.rows.len(), block.keys.len(), tile.cols),
                Sum::Replace,
                T::of(self.0.scale),
                Mat::new(&q[block.rows.start * dim..], block.rows.len(), dim),
                Mat::new(&k[block.keys.start * dim..], block.keys.len(), dim).t(),
                Threads::One,
            );
            for (i, row) in block.rows.clone().enumerate() {
                let scores = &mut scores[i * tile.cols..][..block.keys.len()];
                scores[block.seen(row)..].fill(T::neg_infinity());
                if let Some(window) = self.0.window {
                    for (s, key) in scores.iter_mut().zip(block.keys.clone()) {
                        if positions[row].saturating_sub(positions[key]) >= window {
                            *s = T::neg_infinity();
                        }
                    }
                }
            }
        }
    }

    /// `o` (head-major, of one task) and the log-sum-exp of its rows.
    fn forward_task<T: Scalar>(
        &self,
        part: &Part,
        q: &[T],
        k: &[T],
        v: &[T],
        dim: usize,
        o: &mut [T],
        lse: &mut [T],
    ) {
        let mut scores = Vec::new();
        for tile in &part.tiles {
            self.scores(tile, q, k, dim, &mut scores);
            let first = tile.rows.start - part.rows.start;
            for (row, scores) in scores.chunks_exact_mut(tile.cols).enumerate() {
                let (m, l) = grad::softmax_parts(scores);
                grad::scale(scores, T::one() / l);
                lse[first + row] = m + l.ln();
            }
            for block in &tile.blocks {
                let from = (block.rows.start - part.rows.start) * dim;
                product(
                    MatMut::new(&mut o[from..], block.rows.len(), dim),
                    Sum::Add,
                    T::one(),
                    Self::block(&scores, tile, block),
                    Mat::new(&v[block.keys.start * dim..], block.keys.len(), dim),
                    Threads::One,
                );
            }
        }
    }

    fn block<'a, T>(scores: &'a [T], tile: &Tile, block: &Block) -> Mat<'a, T> {
        let at = (block.rows.start - tile.rows.start) * tile.cols + block.col;
        Mat::strided(&scores[at..], block.rows.len(), block.keys.len(), tile.cols)
    }
}

/// One task of backward: slices of its head and part.
struct Back<'a, T> {
    part: &'a Part,
    dq: &'a mut [T],
    dk: &'a mut [T],
    dv: &'a mut [T],
}

impl Attend {
    fn backward_task<T: Scalar>(&self, task: Back<'_, T>, [q, k, v, o, d]: [&[T]; 5], lse: &[T], dim: usize) {
        let Back { part, dq, dk, dv } = task;
        let start = part.rows.start;
        let (mut p, mut dp) = (Vec::new(), Vec::new());
        for tile in &part.tiles {
            self.scores(tile, q, k, dim, &mut p);
            dp.clear();
            dp.resize(p.len(), T::zero());
            for (row, p) in tile.rows.clone().zip(p.chunks_exact_mut(tile.cols)) {
                grad::exp_minus(p, lse[row], T::one());
            }
            for block in &tile.blocks {
                let dout = Mat::new(&d[block.rows.start * dim..], block.rows.len(), dim);
                // dV += p^T do
                product(
                    MatMut::new(&mut dv[(block.keys.start - start) * dim..], block.keys.len(), dim),
                    Sum::Add,
                    T::one(),
                    Self::block(&p, tile, block).t(),
                    dout,
                    Threads::One,
                );
                // dP = do V^T
                let at = (block.rows.start - tile.rows.start) * tile.cols + block.col;
                product(
                    MatMut::strided(&mut dp[at..], block.rows.len(), block.keys.len(), tile.cols),
                    Sum::Replace,
                    T::one(),
                    dout,
                    Mat::new(&v[block.keys.start * dim..], block.keys.len(), dim).t(),
                    Threads::One,
                );
            }
            // ds = p (dP - delta)
            for ((row, p), dp) in tile
                .rows
                .clone()
                .zip(p.chunks_exact_mut(tile.cols))
                .zip(dp.chunks_exact(tile.cols))
            {
                let delta = grad::dot(&d[row * dim..][..dim], &o[row * dim..][..dim]);
                grad::scores_back(p, dp, delta);
            }
            let scale = T::of(self.0.scale);
            for block in &tile.blocks {
                product(
                    MatMut::new(&mut dq[(block.rows.start - start) * dim..], block.rows.len(), dim),
                    Sum::Add,
                    scale,
                    Self::block(&p, tile, block),
                    Mat::new(&k[block.keys.start * dim..], block.keys.len(), dim),
                    Threads::One,
                );
                product(
                    MatMut::new(&mut dk[(block.keys.start - start) * dim..], block.keys.len(), dim),
                    Sum::Add,
                    scale,
                    Self::block(&p, tile, block).t(),
                    Mat::new(&q[block.rows.start * dim..], block.rows.len(), dim),
                    Threads::One,
                );
            }
        }
    }
}

impl Op for Attend {
    /// Log-sum-exp of each row, `[Hq, R]`.
    type Saved<T: Scalar> = Vec<T>;

    const NAME: &'static str = "attention";

    fn forward<T: Scalar>(&self, args: &[Arg<'_, T>]) -> Result<Output<T, Vec<T>>> {
        let size = self.size(args)?;
        let Size {
            rows,
            heads,
            kv_heads,
            dim,
        } = size;
        let turn = self.turns();
        let turned = self.turned(args, size, turn.as_ref());
        let parts = self.0.packing.parts();
        let (mut o, mut lse) = (vec![T::zero(); heads * rows * dim], vec![T::zero(); heads * rows]);
        pieces(&mut o, heads, parts, dim)
            .into_par_iter()
            .zip(pieces(&mut lse, heads, parts, 1))
            .enumerate()
            .for_each(|(task, (o, lse))| {
                let (head, part) = (task / parts.len(), &parts[task % parts.len()]);
                let kv = head / (heads / kv_heads) * rows * dim;
                self.forward_task(
                    part,
                    &turned.q[head * rows * dim..][..rows * dim],
                    &turned.k[kv..][..rows * dim],
                    &turned.v[kv..][..rows * dim],
                    dim,
                    o,
                    lse,
                );
            });
        Ok(Output {
            data: row_major(&o, rows, heads, dim, 1, None),
            dims: args[0].dims.to_vec(),
            saved: lse,
        })
    }

    fn backward<T: Scalar>(
        &self,
        args: &[Arg<'_, T>],
        _: &[bool],
        lse: &Vec<T>,
        result: &[T],
        grad: &[T],
    ) -> Result<Vec<Option<Vec<T>>>> {
        let size = self.size(args)?;
        let Size {
            rows,
            heads,
            kv_heads,
            dim,
        } = size;
        let turn = self.turns();
        let turned = self.turned(args, size, turn.as_ref());
        let o = head_major(result, rows, heads, dim, None);
        let d = head_major(grad, rows, heads, dim, None);
        let parts = self.0.packing.parts();
        let len = heads * rows * dim;
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![T::zero(); len]);
        pieces(&mut dq, heads, parts, dim)
            .into_par_iter()
            .zip(pieces(&mut dk, heads, parts, dim))
            .zip(pieces(&mut dv, heads, parts, dim))
            .enumerate()
            .for_each(|(task, ((dq, dk), dv))| {
                let (head, part) = (task / parts.len(), &parts[task % parts.len()]);
                let own = head * rows * dim;
                let kv = head / (heads / kv_heads) * rows * dim;
                self.backward_task(
                    Back { part, dq, dk, dv },
                    [
                        &turned.q[own..][..rows * dim],
                        &turned.k[kv..][..rows * dim],
                        &turned.v[kv..][..rows * dim],
                        &o[own..][..rows * dim],
                        &d[own..][..rows * dim],
                    ],
                    &lse[head * rows..][..rows],
                    dim,
                );
            });
        let fold = heads / kv_heads;
        Ok(vec![
            Some(row_major(&dq, rows, heads, dim, 1, turn.as_ref())),
            Some(row_major(&dk, rows, heads, dim, fold, turn.as_ref())),
            Some(row_major(&dv, rows, heads, dim, fold, None)),
        ])
    }
}
