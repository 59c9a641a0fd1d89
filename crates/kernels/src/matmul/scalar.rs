//! The referee: the arithmetic contract in plain Rust.

use super::Task;
#[cfg(test)]
use super::acts::to_bf16;
use super::layout::{BLOCK, CODES, COLS, Kind, Record};
use super::pack::unpack_record;

/// `post * sum` of `task`'s rows and panels, in the order the contract of [`super`] names.
pub(crate) fn run(task: &Task<'_>) {
    match task.matrix.kind.record() {
        Some(record) => codes(task, record),
        None => floats(task),
    }
}

fn codes(task: &Task<'_>, record: Record) {
    let (acts, blocks) = (task.acts, task.acts.blocks());
    let mut codes = [0u8; CODES];
    let mut acc = vec![[0.0f32; COLS]; task.rows.len()];
    for p in task.panels.clone() {
        acc.fill([0.0; COLS]);
        for (b, packed) in task.matrix.panel(p).chunks_exact(record.bytes()).enumerate() {
            unpack_record(record, packed, &mut codes);
            for (r, acc) in task.rows.clone().zip(&mut acc) {
                let q: &[i8; BLOCK] = acts.q()[(r * blocks + b) * BLOCK..][..BLOCK]
                    .try_into()
                    .expect("a block");
                let parts = record.parts();
                for part in 0..parts {
                    let at = (r * blocks + b) * parts + part;
                    let (sum, sx, d) = (
                        acts.sum[parts - 1][at],
                        acts.sx[parts - 1][at],
                        acts.d[r * blocks + b],
                    );
                    let groups = 8 / parts * part..8 / parts * (part + 1);
                    let isum = integer_sums(&codes, q, groups);
                    for c in 0..COLS {
                        let isum = isum[c] - record.offset * sum;
                        let dw = f16_at(packed, record.scale_at(part), c);
                        acc[c] = (isum as f32).mul_add(dw * d, acc[c]);
                        if record.min {
                            let mw = f16_at(packed, record.scale_at(part) + 2 * COLS, c);
                            acc[c] = mw.mul_add(sx, acc[c]);
                        }
                    }
                }
            }
        }
        for (r, acc) in task.rows.clone().zip(&acc) {
            task.store(r, p, &acc.map(|v| v * task.matrix.post));
        }
    }
}

/// One row of activations `x: [k]` against quantised weights, as `tiles.rs` says: `[n]`.
#[cfg(test)]
pub(crate) fn bf16(matrix: &super::Matrix, x: &[f32]) -> Vec<f32> {
    let record = matrix.kind.record().expect("quantised weights");
    let part_rows = BLOCK / record.parts();
    let mut codes = [0u8; CODES];
    let mut y = Vec::new();
    for p in 0..matrix.panels() {
        let mut acc = [0.0f32; COLS];
        let records = matrix.panel(p).chunks_exact(record.bytes());
        for (packed, x) in records.zip(x.as_chunks::<BLOCK>().0) {
            unpack_record(record, packed, &mut codes);
            for (c, acc) in acc.iter_mut().enumerate() {
                let weight = |i: usize| {
                    let code = i32::from(codes[i / 4 * 64 + c * 4 + i % 4]) - record.offset;
                    let at = record.scale_at(i / part_rows);
                    let scale = f16_at(packed, at, c) * matrix.post;
                    match record.min {
                        true => (code as f32).mul_add(scale, f16_at(packed, at + 2 * COLS, c) * matrix.post),
                        false => code as f32 * scale,
                    }
                };
                let mut sums = [0.0f32; 2];
                for (i, &x) in x.iter().enumerate() {
                    let [w, x] = [weight(i), x].map(|v| half::bf16::from_bits(to_bf16(v)).to_f32());
                    sums[i % 2] = flush(w.mul_add(x, sums[i % 2]));
                }
                *acc = flush(*acc + flush(sums[0] + sums[1]));
            }
        }
        y.extend_from_slice(&acc[..(matrix.n - p * COLS).min(COLS)]);
    }
    y
}

/// Zero for a denormal.
#[cfg(test)]
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

fn integer_sums(codes: &[u8; CODES], q: &[i8; BLOCK], groups: std::ops::Range<usize>) -> [i32; COLS] {
    let mut sums = [0i32; COLS];
    for g in groups {
        for (c, sum) in sums.iter_mut().enumerate() {
            for j in 0..4 {
                *sum += i32::from(codes[g * 64 + c * 4 + j]) * i32::from(q[g * 4 + j]);
            }
        }
    }
    sums
}

fn f16_at(bytes: &[u8], at: usize, c: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at + 2 * c], bytes[at + 2 * c + 1]]).to_f32()
}

fn floats(task: &Task<'_>) {
    let k = task.matrix.k;
    for p in task.panels.clone() {
        let panel = task.matrix.panel(p);
        for r in task.rows.clone() {
            let mut acc = [0.0f32; COLS];
            for (i, x) in task.acts.x()[r * k..(r + 1) * k].iter().enumerate() {
                for (c, acc) in acc.iter_mut().enumerate() {
                    let at = i * COLS + c;
                    let w = match task.matrix.kind {
                        Kind::F32 => {
                            f32::from_le_bytes(panel[4 * at..4 * at + 4].try_into().expect("four bytes"))
                        }
                        Kind::BF16 => half::bf16::from_le_bytes([panel[2 * at], panel[2 * at + 1]]).to_f32(),
                        _ => f16_at(panel, 2 * i * COLS, c),
                    };
                    *acc = w.mul_add(*x, *acc);
                }
            }
            task.store(r, p, &acc);
        }
    }
}
