//! The scans of the paper and of the textbook (3.4), for comparison: on two cores neither beats a serial scan.

use super::{Case, Prefix};

fn leaf(case: &Case, i: usize) -> Prefix {
    let mut leaf = case.start();
    let width = case.width();
    leaf.push(
        &case.s[i * case.heads..][..case.heads],
        &case.v[i * width..][..width],
    );
    leaf
}

fn join(left: &Prefix, right: &Prefix) -> Prefix {
    let mut joined = left.clone();
    joined.merge(right);
    joined
}

fn outputs(states: &[Prefix]) -> Vec<f32> {
    states.iter().flat_map(|s| s.output().to_vec()).collect()
}

/// The algorithm box of the paper: `ceil(log2 N)` rounds over two buffers.
pub(super) fn hillis_steele(case: &Case) -> Vec<f32> {
    let mut z: Vec<Prefix> = (0..case.len()).map(|i| leaf(case, i)).collect();
    let mut step = 1;
    while step < z.len() {
        z = (0..z.len())
            .map(|j| match j.checked_sub(step) {
                Some(before) => join(&z[before], &z[j]),
                None => z[j].clone(),
            })
            .collect();
        step *= 2;
    }
    outputs(&z)
}

/// Up-sweep and down-sweep over a tree, filled up with identities; exclusive, so that each leaf is added at the end.
pub(super) fn blelloch(case: &Case) -> Vec<f32> {
    let n = case.len().next_power_of_two();
    let mut z: Vec<Prefix> = (0..n)
        .map(|i| match i < case.len() {
            true => leaf(case, i),
            false => case.start(),
        })
        .collect();
    let mut step = 1;
    while step < n {
        for right in (2 * step - 1..n).step_by(2 * step) {
            z[right] = join(&z[right - step], &z[right]);
        }
        step *= 2;
    }
    z[n - 1] = case.start();
    while step > 1 {
        step /= 2;
        for right in (2 * step - 1..n).step_by(2 * step) {
            let before = z[right].clone();
            z[right] = join(&before, &z[right - step]);
            z[right - step] = before;
        }
    }
    let all: Vec<Prefix> = (0..case.len()).map(|i| join(&z[i], &leaf(case, i))).collect();
    outputs(&all)
}
