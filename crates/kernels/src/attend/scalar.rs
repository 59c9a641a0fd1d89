//! The scalar twin: what the SIMD paths compute, in the plainest form.

use antefix_state::PAGE_ROWS;

use super::{StateMut, Tile};
use crate::ops::exp;

/// Continues every row that sees something of the page.
pub(super) fn page(tile: &Tile<'_>, state: &mut StateMut<'_>) {
    let dim = tile.call.dim;
    for r in tile.seen.clone() {
        let (lo, hi) = tile.span(r);
        let q = &tile.call.q[r * dim..][..dim];
        let mut s = [f32::NEG_INFINITY; PAGE_ROWS];
        for (j, s) in s.iter_mut().enumerate().take(hi).skip(lo) {
            if !tile.is_open(j) {
                continue;
            }
            *s = q
                .iter()
                .enumerate()
                .fold(0.0f32, |sum, (d, q)| q.mul_add(tile.page.key(dim, j, d), sum));
            if let Some(cap) = tile.call.softcap {
                *s = cap * (*s / cap).tanh();
            }
        }
        let Some(factor) = softmax_step(&mut s, &mut state.m[r], &mut state.l[r]) else {
            continue;
        };
        for (d, a) in state.acc[r * dim..][..dim].iter_mut().enumerate() {
            *a = (0..tile.valid)
                .filter(|&j| tile.is_open(j))
                .fold(*a * factor, |sum, j| {
                    s[j].mul_add(tile.page.value(dim, j, d), sum)
                });
        }
    }
}

/// Turns scores into weights under the new maximum and moves `m` and `l` on. Returns the factor for `acc`, or nothing when
/// every score is -inf: then the state stays as it is, to the bit.
fn softmax_step(s: &mut [f32; PAGE_ROWS], m: &mut f32, l: &mut f32) -> Option<f32> {
    let top = s
        .iter()
        .fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    if top == f32::NEG_INFINITY {
        return None;
    }
    let new = if top > *m { top } else { *m };
    let factor = exp(*m - new);
    for s in s.iter_mut() {
        *s = exp(*s - new);
    }
    let mut sum = *s;
    let mut half = PAGE_ROWS / 2;
    while half > 0 {
        for i in 0..half {
            sum[i] += sum[i + half];
        }
        half /= 2;
    }
    *l = l.mul_add(factor, sum[0]);
    *m = new;
    Some(factor)
}
