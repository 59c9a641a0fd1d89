//! Every path against the scalar one, bit for bit, and the scalar one against a product in f64.

use super::*;
use crate::ops;

/// A small generator, so that failures repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn unit(&mut self) -> f32 {
        (self.next() % 20_001) as f32 / 10_000.0 - 1.0
    }
}

/// `n * k` weights: random codes, sensible scales.
fn weights(format: Format, n: usize, k: usize, random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..n * k / format.block_len() {
        let mut b: Vec<u8> = (0..format.block_bytes()).map(|_| random.next() as u8).collect();
        let f16 = |v: f32| half::f16::from_f32(v).to_le_bytes();
        let scales: &[usize] = match format {
            Format::F32 | Format::F16 | Format::BF16 => &[],
            Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
            Format::Q2_K => &[80, 82],
            Format::Q3_K => &[108],
            Format::Q6_K => &[208],
            _ => &[0],
        };
        for at in scales {
            b[*at..at + 2].copy_from_slice(&f16(random.unit() * 0.01));
        }
        match format {
            Format::F32 => b.copy_from_slice(&random.unit().to_le_bytes()),
            Format::F16 => b.copy_from_slice(&f16(random.unit())),
            Format::BF16 => b.copy_from_slice(&half::bf16::from_f32(random.unit()).to_le_bytes()),
            _ => {}
        }
        out.extend(b);
    }
    out
}

fn product(cpu: Cpu, team: &Team, w: &Matrix, x: &[f32], rows: usize) -> Vec<u32> {
    let mut acts = Acts::new();
    // What an earlier, larger load leaves behind must not matter.
    acts.load(&vec![f32::NAN; (rows + 3) * w.k()], rows + 3, w.k());
    matmul(cpu, team, &mut acts, w, &mut vec![f32::NAN; (rows + 3) * w.n()]);
    acts.load(x, rows, w.k());
    let mut y = vec![f32::NAN; rows * w.n()];
    matmul(cpu, team, &mut acts, w, &mut y);
    y.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_path_row_count_and_thread_count_gives_the_bits_of_one_scalar_row() {
    let teams = [Team::new(1), Team::new(3)];
    let scalar = Cpu::with(Path::Scalar).expect("everywhere");
    for path in Path::ALL {
        eprintln!(
            "path {path}: {}",
            if Cpu::with(path).is_some() {
                "compared with scalar"
            } else {
                "not on this machine"
            }
        );
    }
    eprintln!(
        "avx2 with AVX-VNNI: {}",
        if Cpu::variants().iter().any(|cpu| cpu.avx_vnni()) {
            "compared with scalar, and without it too"
        } else {
            "not on this machine"
        }
    );
    let mut random = Random(7);
    for format in Format::ALL {
        for precision in [Precision::Fast, Precision::F32] {
            let longest = if format.block_len() == 1 { 37 } else { 512 };
            // 1,280 values are more than one stretch of unpacked codes.
            let shapes = [(16, 256), (1, longest), (53, longest), (35, 1280)];
            for (n, k) in shapes {
                let bytes = weights(format, n, k, &mut random);
                let w = Matrix::pack(scalar, &teams[0], format, &bytes, n, k, precision).unwrap();
                let x: Vec<f32> = (0..33 * k).map(|_| random.unit()).collect();
                let want: Vec<u32> = x
                    .chunks_exact(k)
                    .flat_map(|row| product(scalar, &teams[0], &w, row, 1))
                    .collect();
                for cpu in Cpu::variants() {
                    for rows in (1..=9).chain([17, 33]) {
                        let team = &teams[rows % 2];
                        let got = product(cpu, team, &w, &x[..rows * k], rows);
                        assert!(
                            got == want[..rows * n],
                            "{} {format} {precision:?}, {rows} rows, {n} x {k}",
                            cpu.path()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn rows_in_bf16_have_the_bits_of_the_scalar_twin_whoever_is_beside_them() {
    let Some(cpu) = Cpu::with(Path::Amx) else {
        return eprintln!("path amx: not on this machine");
    };
    let teams = [Team::new(1), Team::new(3)];
    let mut random = Random(11);
    for format in Format::ALL.into_iter().filter(|f| f.block_len() > 1) {
        for (n, k) in [(16, 256), (1, 512), (53, 512), (67, 1280)] {
            let bytes = weights(format, n, k, &mut random);
            let w = Matrix::pack(cpu, &teams[0], format, &bytes, n, k, Precision::Fast).unwrap();
            let x: Vec<f32> = (0..67 * k).map(|_| random.unit()).collect();
            let int8 = product(cpu, &teams[0], &w, &x, 67);
            let bf16: Vec<u32> = x
                .chunks_exact(k)
                .flat_map(|row| scalar::bf16(&w, row))
                .map(f32::to_bits)
                .collect();
            for (rows, int8_rows) in [
                (1, 0),
                (15, 0),
                (33, 0),
                (67, 0),
                (34, 1),
                (40, 7),
                (67, 17),
                (5, 5),
            ] {
                let mut acts = Acts::new();
                acts.load(&vec![f32::NAN; 80 * k], 80, k);
                acts.set_int8_rows(Some(0));
                let team = &teams[rows % 2];
                matmul(cpu, team, &mut acts, &w, &mut vec![f32::NAN; 80 * n]);
                acts.set_int8_rows(Some(int8_rows));
                acts.load(&x[..rows * k], rows, k);
                let mut y = vec![f32::NAN; rows * n];
                matmul(cpu, team, &mut acts, &w, &mut y);
                let y: Vec<u32> = y.iter().map(|v| v.to_bits()).collect();
                let at = int8_rows * n;
                assert!(
                    y[..at] == int8[..at],
                    "{format}: int8 rows beside others, {rows} rows, {n} x {k}"
                );
                assert!(
                    y[at..] == bf16[at..rows * n],
                    "{format}: bf16, {rows} rows from {int8_rows}, {n} x {k}"
                );
            }
        }
    }
}

#[test]
fn gated_products_have_the_bits_of_their_steps() {
    let teams = [Team::new(1), Team::new(3)];
    let mut random = Random(13);
    let (n, k) = (352, 256);
    for (f, format) in [
        (ops::silu_mul as Gate, Format::Q4_1),
        (ops::gelu_tanh_mul, Format::Q6_K),
        (ops::silu_mul, Format::Q5_0),
        (ops::silu_mul, Format::F16),
    ] {
        let mut matrix = |n: usize, k: usize, format: Format| {
            let bytes = weights(format, n, k, &mut random);
            Matrix::pack(Cpu::best(), &teams[0], format, &bytes, n, k, Precision::Fast).unwrap()
        };
        let (gate, up, down) = (
            matrix(n, k, format),
            matrix(n, k, format),
            matrix(19, n, Format::Q8_0),
        );
        let mut values = Random(17);
        let x: Vec<f32> = (0..1100 * k).map(|_| 40.0 * values.unit()).collect();
        for cpu in Cpu::variants() {
            let (mut acts, mut out, mut buffer) = (Acts::new(), Acts::new(), Vec::new());
            for (rows, int8_rows) in [
                (1100, 3),
                (1, 0),
                (15, 0),
                (33, 0),
                (50, 50),
                (40, 7),
                (48, 1),
                (1, 1),
            ] {
                let team = &teams[rows % 2];
                acts.set_int8_rows(Some(int8_rows));
                acts.load(&x[..rows * k], rows, k);
                let mut steps = [vec![f32::NAN; rows * n], vec![f32::NAN; rows * n]];
                let [g, u] = &mut steps;
                matmul_many(cpu, team, &mut acts, &mut [(&gate, g), (&up, u)]);
                f(cpu, g, u);
                let want_x = g.clone();
                let mut want = vec![f32::NAN; rows * 19];
                let mut next = Acts::new();
                next.set_int8_rows(Some(int8_rows));
                next.load(&want_x, rows, n);
                matmul(cpu, team, &mut next, &down, &mut want);
                for whole in [false, true] {
                    acts.load(&x[..rows * k], rows, k);
                    let what = Gated {
                        gate: &gate,
                        up: &up,
                        f,
                        next: (!whole).then_some(&down),
                    };
                    gated(cpu, team, &mut acts, what, &mut buffer, &mut out);
                    let mut got = vec![f32::NAN; rows * 19];
                    matmul(cpu, team, &mut out, &down, &mut got);
                    let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert!(
                        bits(&got) == bits(&want),
                        "{} {format}: {rows} rows, {int8_rows} of them in int8, whole: {whole}",
                        cpu.path()
                    );
                    assert!(!whole || bits(out.x()) == bits(&want_x));
                }
            }
        }
    }
}

#[test]
fn extreme_codes_and_activations_overflow_nothing() {
    let team = Team::new(1);
    let k = 256;
    for format in Format::ALL {
        for fill in [0x00u8, 0x7f, 0x80, 0xff] {
            let mut bytes = vec![fill; format.row_bytes(k).unwrap() * 16];
            for b in bytes.chunks_exact_mut(format.block_bytes()) {
                let one = half::f16::from_f32(1.0).to_le_bytes();
                match format {
                    Format::F32 | Format::F16 | Format::BF16 => b.fill(0),
                    Format::Q2_K => b[80..84].copy_from_slice(&[one, one].concat()),
                    Format::Q3_K => b[108..].copy_from_slice(&one),
                    Format::Q6_K => b[208..].copy_from_slice(&one),
                    Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => b[..2].copy_from_slice(&one),
                    _ => b[..4].copy_from_slice(&[one, one].concat()),
                }
            }
            let w = Matrix::pack(Cpu::best(), &team, format, &bytes, 16, k, Precision::Fast).unwrap();
            for sign in [1.0f32, -1.0] {
                for rows in [1, 5, 16] {
                    let x = vec![127.0 * sign; rows * k];
                    let want = product(Cpu::with(Path::Scalar).unwrap(), &team, &w, &x, rows);
                    let mut row = vec![0.0; k];
                    crate::quant::dequantise(format, &bytes[..bytes.len() / 16], &mut row).unwrap();
                    let exact: f64 = row.iter().map(|v| f64::from(*v) * f64::from(127.0 * sign)).sum();
                    let got = f64::from(f32::from_bits(want[0]));
                    assert!(
                        (got - exact).abs() <= 2e-3 * exact.abs(),
                        "{format} {fill:#x}: {got} for {exact}"
                    );
                    for cpu in Cpu::variants() {
                        assert!(
                            product(cpu, &team, &w, &x, rows) == want,
                            "{} {format} {fill:#x} {rows}",
                            cpu.path()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn products_are_close_to_those_of_the_dequantised_weights() {
    let team = Team::new(2);
    let mut random = Random(3);
    let (n, k, rows) = (19, 768, 3);
    for format in Format::ALL {
        let bytes = weights(format, n, k, &mut random);
        let x: Vec<f32> = (0..rows * k).map(|_| random.unit()).collect();
        let mut w = vec![0.0; n * k];
        for (row, b) in w
            .chunks_exact_mut(k)
            .zip(bytes.chunks_exact(format.row_bytes(k).unwrap()))
        {
            crate::quant::dequantise(format, b, row).unwrap();
        }
        for (precision, tolerance) in [(Precision::Fast, 1e-2), (Precision::F32, 1e-5)] {
            let packed = Matrix::pack(Cpu::best(), &team, format, &bytes, n, k, precision).unwrap();
            let y = product(Cpu::best(), &team, &packed, &x, rows);
            for r in 0..rows {
                for j in 0..n {
                    let (row, weights) = (&x[r * k..][..k], &w[j * k..][..k]);
                    let terms = row
                        .iter()
                        .zip(weights)
                        .map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let exact: f64 = terms.clone().sum();
                    let size: f64 = terms.map(|t| t * t).sum::<f64>().sqrt();
                    let error = (f64::from(f32::from_bits(y[r * n + j])) - exact).abs();
                    assert!(
                        error <= tolerance * size.max(1e-3) * 3.0,
                        "{format} {precision:?}: {error} of {size}"
                    );
                }
            }
        }
    }
}

#[test]
fn several_matrices_share_activations_and_a_nan_stays_in_its_row() {
    let team = Team::new(2);
    let mut random = Random(5);
    let (k, rows) = (256, 4);
    let shapes = [(Format::Q4_K, 40), (Format::Q8_0, 7), (Format::F16, 16)];
    let packed: Vec<Matrix> = shapes
        .iter()
        .map(|&(format, n)| {
            let bytes = weights(format, n, k, &mut random);
            Matrix::pack(Cpu::best(), &team, format, &bytes, n, k, Precision::Fast).unwrap()
        })
        .collect();
    let mut x: Vec<f32> = (0..rows * k).map(|_| random.unit()).collect();
    x[k + 40] = f32::NAN;
    let mut y: Vec<Vec<f32>> = packed.iter().map(|w| vec![f32::NAN; rows * w.n()]).collect();
    let mut acts = Acts::new();
    acts.load(&x, rows, k);
    let mut products: Vec<_> = packed.iter().zip(y.iter_mut().map(|y| &mut y[..])).collect();
    matmul_many(Cpu::best(), &team, &mut acts, &mut products);
    for (w, y) in packed.iter().zip(&y) {
        let alone = product(Cpu::best(), &team, w, &x[..k], 1);
        assert_eq!(y[..w.n()].iter().map(|v| v.to_bits()).collect::<Vec<_>>(), alone);
        for (r, row) in y.chunks_exact(w.n()).enumerate() {
            assert!(row.iter().all(|v| v.is_nan() == (r == 1)), "{w:?} row {r}");
        }
    }
}

#[test]
fn wrong_sizes_are_errors() {
    let team = Team::new(1);
    let pack = |bytes: &[u8], n, k| {
        Matrix::pack(Cpu::best(), &team, Format::Q4_K, bytes, n, k, Precision::Fast)
            .map(|_| ())
            .unwrap_err()
    };
    assert!(matches!(
        pack(&[0; 144], 1, 255),
        QuantError::RowLength {
            k: 255,
            block: 256,
            ..
        }
    ));
    assert!(matches!(
        pack(&[0; 143], 1, 256),
        QuantError::Bytes {
            got: 143,
            want: Some(144),
            ..
        }
    ));
    assert!(matches!(
        pack(&[0; 144], usize::MAX, 256),
        QuantError::Bytes { want: None, .. }
    ));
    assert!(matches!(pack(&[], 0, 256), QuantError::Empty { .. }));
    assert!(pack(&[0; 143], 1, 256).to_string().contains("hint:"));
}
