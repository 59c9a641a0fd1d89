use super::*;

/// A case with values from a small generator; unused rows of the last page are NaN.
struct Case {
    dim: usize,
    keys: usize,
    first: u32,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    visible: Vec<(u32, u32)>,
    /// Of every page, which rows are no holes; the holes hold NaN.
    open: Vec<u32>,
}

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut x = seed;
    (0..n)
        .map(|_| {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (x >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
        })
        .collect()
}

impl Case {
    /// Causal rows at the end of the keys.
    fn causal(rows: usize, keys: usize, dim: usize, first: u32, window: u32) -> Self {
        let visible = (0..rows)
            .map(|r| {
                let hi = first + (keys - (rows - 1 - r).min(keys - 1)) as u32;
                (hi.saturating_sub(window), hi)
            })
            .collect();
        Self {
            dim,
            keys,
            first,
            q: noise(1, rows * dim),
            k: noise(2, keys * dim),
            v: noise(3, keys * dim),
            visible,
            open: vec![u32::MAX; keys.div_ceil(PAGE_ROWS)],
        }
    }

    /// Cuts holes: of every 5 rows 3 stay, and nothing of the second page.
    fn with_holes(mut self) -> Self {
        for (p, open) in self.open.iter_mut().enumerate() {
            *open = (0..PAGE_ROWS)
                .filter(|j| p != 1 && (p * PAGE_ROWS + j) % 5 < 3)
                .fold(0, |bits, j| bits | 1 << j);
        }
        self
    }

    fn is_open(&self, j: usize) -> bool {
        self.open[j / PAGE_ROWS] >> (j % PAGE_ROWS) & 1 == 1
    }

    fn f32_pages(&self) -> Vec<(Vec<f32>, Vec<f32>)> {
        (0..self.keys.div_ceil(PAGE_ROWS))
            .map(|p| {
                let mut page = (
                    vec![f32::NAN; PAGE_ROWS * self.dim],
                    vec![f32::NAN; PAGE_ROWS * self.dim],
                );
                for j in (p * PAGE_ROWS..((p + 1) * PAGE_ROWS).min(self.keys)).filter(|&j| self.is_open(j)) {
                    let span = j * self.dim..(j + 1) * self.dim;
                    PageMut::F32 {
                        k: &mut page.0,
                        v: &mut page.1,
                    }
                    .write_row(j % PAGE_ROWS, &self.k[span.clone()], &self.v[span]);
                }
                page
            })
            .collect()
    }

    fn bf16_pages(&self) -> Vec<(Vec<u16>, Vec<u16>)> {
        let nan = f32_to_bf16(f32::NAN);
        (0..self.keys.div_ceil(PAGE_ROWS))
            .map(|p| {
                let mut page = (vec![nan; PAGE_ROWS * self.dim], vec![nan; PAGE_ROWS * self.dim]);
                for j in (p * PAGE_ROWS..((p + 1) * PAGE_ROWS).min(self.keys)).filter(|&j| self.is_open(j)) {
                    let span = j * self.dim..(j + 1) * self.dim;
                    PageMut::Bf16 {
                        k: &mut page.0,
                        v: &mut page.1,
                    }
                    .write_row(j % PAGE_ROWS, &self.k[span.clone()], &self.v[span]);
                }
                page
            })
            .collect()
    }

    /// States of rows `rows` after the keys, `(m, l, acc)`, the pages folded in two calls cut before page `cut`.
    fn run(
        &self,
        cpu: Cpu,
        dtype: KvDtype,
        rows: std::ops::Range<usize>,
        cut: usize,
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (f32s, bf16s) = (self.f32_pages(), self.bf16_pages());
        let pages: Vec<Page<'_>> = match dtype {
            KvDtype::F32 => f32s.iter().map(|(k, v)| Page::F32 { k, v }).collect(),
            KvDtype::Bf16 => bf16s.iter().map(|(k, v)| Page::Bf16 { k, v }).collect(),
        };
        let pages: Vec<View<'_>> = pages
            .into_iter()
            .zip(&self.open)
            .map(|(page, &rows)| View { page, rows })
            .collect();
        let n = rows.len();
        let (mut m, mut l, mut acc) = (vec![f32::NAN; n], vec![f32::NAN; n], vec![f32::NAN; n * self.dim]);
        let mut state = StateMut {
            m: &mut m,
            l: &mut l,
            acc: &mut acc,
        };
        reset(&mut state);
        let mut scratch = AttendScratch {
            wide: vec![f32::NAN; 7],
            q: vec![f32::NAN; 5],
            ..AttendScratch::default()
        };
        let cut = cut.min(pages.len());
        let cut_keys = (cut * PAGE_ROWS).min(self.keys);
        for (pages, first, keys) in [
            (&pages[..cut], self.first, cut_keys),
            (
                &pages[cut..],
                self.first + (cut * PAGE_ROWS) as u32,
                self.keys - cut_keys,
            ),
        ] {
            attend(
                cpu,
                self.dim,
                &self.q[rows.start * self.dim..rows.end * self.dim],
                &self.visible[rows.clone()],
                None,
                pages,
                first,
                keys as u32,
                &mut state,
                &mut scratch,
            );
        }
        (m, l, acc)
    }

    /// Softmax attention of one row in f64, on the values as stored.
    fn reference(&self, dtype: KvDtype, r: usize) -> Vec<f64> {
        let store = |x: f32| match dtype {
            KvDtype::F32 => f64::from(x),
            KvDtype::Bf16 => f64::from(bf16_to_f32(f32_to_bf16(x))),
        };
        let (lo, hi) = self.visible[r];
        let keys: Vec<usize> = (0..self.keys)
            .filter(|&j| (lo..hi).contains(&(self.first + j as u32)) && self.is_open(j))
            .collect();
        let s: Vec<f64> = keys
            .iter()
            .map(|&j| {
                (0..self.dim)
                    .map(|d| f64::from(self.q[r * self.dim + d]) * store(self.k[j * self.dim + d]))
                    .sum()
            })
            .collect();
        let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if keys.is_empty() {
            return vec![0.0; self.dim];
        }
        let l: f64 = s.iter().map(|s| (s - max).exp()).sum();
        (0..self.dim)
            .map(|d| {
                keys.iter()
                    .zip(&s)
                    .map(|(&j, s)| (s - max).exp() * store(self.v[j * self.dim + d]))
                    .sum::<f64>()
                    / l
            })
            .collect()
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, keys, dim, first, window) in [
        (1, 1, 64, 0, u32::MAX),
        (3, 31, 64, 0, u32::MAX),
        (3, 33, 64, 1024, u32::MAX),
        (7, 64, 128, 0, u32::MAX),
        (13, 97, 64, 32, u32::MAX),
        (20, 130, 256, 0, u32::MAX),
        (5, 100, 16, 0, u32::MAX),
        (9, 100, 48, 64, u32::MAX),
        (11, 150, 64, 0, 40),
        (4, 150, 256, 0, 33),
        (40, 40, 64, 0, u32::MAX),
    ] {
        cases.push(Case::causal(rows, keys, dim, first, window));
        cases.push(Case::causal(rows, keys, dim, first, window).with_holes());
    }
    cases
}

/// Whether the path computes the case in bf16 tiles: their rounding is not the scalar twin's.
fn tiles(cpu: Cpu, case: &Case, dtype: KvDtype) -> bool {
    cpu.path() == Path::Amx && dtype == KvDtype::Bf16 && case.dim.is_multiple_of(32)
}

#[test]
fn every_path_is_softmax_attention() {
    for cpu in Cpu::available() {
        for case in cases() {
            for dtype in [KvDtype::F32, KvDtype::Bf16] {
                let rows = case.visible.len();
                let (m, l, acc) = case.run(cpu, dtype, 0..rows, 0);
                let mut out = vec![f32::NAN; rows * case.dim];
                finish(
                    &StateRef {
                        m: &m,
                        l: &l,
                        acc: &acc,
                    },
                    &mut out,
                );
                // A weight in bf16 is off by up to 2^-9 of itself, and values are up to 1.
                let tolerance = if tiles(cpu, &case, dtype) { 4e-3 } else { 1e-5 };
                for r in 0..rows {
                    for (d, want) in case.reference(dtype, r).into_iter().enumerate() {
                        let got = f64::from(out[r * case.dim + d]);
                        assert!(
                            (got - want).abs() < tolerance,
                            "{} row {r} dim {d}: {got} {want}",
                            cpu.path()
                        );
                    }
                }
            }
        }
        eprintln!("attention: path {} tested", cpu.path());
    }
    for path in Path::ALL.into_iter().filter(|&p| Cpu::with(p).is_none()) {
        eprintln!("attention: path {path} is not on this machine, not tested");
    }
}

#[test]
fn every_path_of_f32_arithmetic_gives_the_scalar_twins_bits() {
    let scalar = Cpu::with(Path::Scalar).unwrap();
    for case in cases() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let want = case.run(scalar, dtype, 0..case.visible.len(), 0);
            for cpu in Cpu::available()
                .into_iter()
                .filter(|&cpu| !tiles(cpu, &case, dtype))
            {
                assert_eq!(
                    case.run(cpu, dtype, 0..case.visible.len(), 0),
                    want,
                    "{}",
                    cpu.path()
                );
            }
        }
    }
}

#[test]
fn a_row_does_not_notice_its_neighbours_nor_where_the_pages_are_cut() {
    for cpu in Cpu::available() {
        for case in cases() {
            for dtype in [KvDtype::F32, KvDtype::Bf16] {
                let rows = case.visible.len();
                let whole = case.run(cpu, dtype, 0..rows, 0);
                for cut in 1..=case.keys.div_ceil(PAGE_ROWS) {
                    assert_eq!(case.run(cpu, dtype, 0..rows, cut), whole, "cut before page {cut}");
                }
                for r in 0..rows {
                    let (m, l, acc) = case.run(cpu, dtype, r..r + 1, 1);
                    assert_eq!((m[0], l[0]), (whole.0[r], whole.1[r]));
                    assert_eq!(acc, whole.2[r * case.dim..(r + 1) * case.dim]);
                }
            }
        }
    }
}

#[test]
fn a_row_that_sees_nothing_keeps_its_state() {
    for cpu in Cpu::available() {
        let mut case = Case::causal(4, 40, 64, 64, u32::MAX);
        case.visible[2] = (0, 64);
        let (m, l, acc) = case.run(cpu, KvDtype::F32, 0..4, 1);
        assert_eq!((m[2], l[2]), (f32::NEG_INFINITY, 0.0));
        assert!(acc[2 * 64..3 * 64].iter().all(|&x| x == 0.0));
        let mut out = vec![f32::NAN; 4 * 64];
        finish(
            &StateRef {
                m: &m,
                l: &l,
                acc: &acc,
            },
            &mut out,
        );
        assert!(out.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn holes_at_the_ends_of_what_is_visible_are_a_shorter_interval() {
    for cpu in Cpu::available() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let mut holes = Case::causal(9, 130, 64, 64, u32::MAX);
            holes.open[0] = u32::MAX << 5;
            holes.open[2] = u32::MAX;
            holes.open[3] = 0x000f_ffff;
            holes.open[4] = 0;
            let mut interval = Case::causal(9, 130, 64, 64, u32::MAX);
            for (lo, hi) in &mut interval.visible {
                (*lo, *hi) = (64 + 5, (64 + 3 * 32 + 20).min(*hi));
            }
            let bits = |case: &Case| case.run(cpu, dtype, 0..9, 0);
            assert_eq!(bits(&holes), bits(&interval), "{}", cpu.path());
        }
    }
}

#[test]
fn merged_partitions_are_the_whole() {
    let cpu = Cpu::best();
    let case = Case::causal(3, 128, 64, 0, u32::MAX);
    let whole = case.run(cpu, KvDtype::F32, 0..3, 0);
    let mut left = Case::causal(3, 128, 64, 0, u32::MAX);
    left.visible.iter_mut().for_each(|v| v.1 = 64);
    let mut right = Case::causal(3, 128, 64, 0, u32::MAX);
    right.visible.iter_mut().for_each(|v| v.0 = 64);
    let (mut m, mut l, mut acc) = left.run(cpu, KvDtype::F32, 0..3, 0);
    let part = right.run(cpu, KvDtype::F32, 0..3, 0);
    let mut state = StateMut {
        m: &mut m,
        l: &mut l,
        acc: &mut acc,
    };
    merge(
        &mut state,
        &StateRef {
            m: &part.0,
            l: &part.1,
            acc: &part.2,
        },
    );
    // A part without keys changes no bit.
    let before = (state.m.to_vec(), state.l.to_vec(), state.acc.to_vec());
    let empty = (vec![f32::NEG_INFINITY; 3], vec![0.0; 3], vec![0.0; 3 * 64]);
    merge(
        &mut state,
        &StateRef {
            m: &empty.0,
            l: &empty.1,
            acc: &empty.2,
        },
    );
    assert_eq!(before, (m.clone(), l.clone(), acc.clone()));
    for (a, w) in acc.iter().zip(&whole.2) {
        assert!((a - w).abs() < 1e-4, "{a} {w}");
    }
}

#[test]
fn scores_are_capped() {
    for cpu in Cpu::available() {
        let case = Case::causal(2, 40, 16, 0, u32::MAX);
        let pages = case.f32_pages();
        let pages: Vec<View<'_>> = pages.iter().map(|(k, v)| Page::F32 { k, v }.into()).collect();
        let q: Vec<f32> = case.q.iter().map(|x| x * 1e4).collect();
        let (mut m, mut l, mut acc) = (vec![0.0; 2], vec![0.0; 2], vec![0.0; 32]);
        let mut state = StateMut {
            m: &mut m,
            l: &mut l,
            acc: &mut acc,
        };
        reset(&mut state);
        let scratch = &mut AttendScratch::default();
        attend(
            cpu,
            16,
            &q,
            &case.visible,
            Some(5.0),
            &pages,
            0,
            40,
            &mut state,
            scratch,
        );
        assert!(m.iter().all(|&m| m > 4.9 && m <= 5.0), "{m:?}");
    }
}

#[test]
fn a_far_larger_score_late_moves_the_reference_and_nothing_is_lost() {
    for cpu in Cpu::available() {
        for dim in [64, 128] {
            let mut case = Case::causal(5, 330, dim, 0, u32::MAX);
            // Scores around 0, then around 60 from key 200 on, then one key at about -90, far below.
            for (j, k) in case.k.chunks_mut(dim).enumerate() {
                k[0] = match j {
                    0..200 => 0.0,
                    280 => -90.0,
                    _ => 60.0,
                };
            }
            case.q.chunks_mut(dim).for_each(|q| q[0] = 1.0);
            let (m, l, acc) = case.run(cpu, KvDtype::Bf16, 0..5, 3);
            let mut out = vec![f32::NAN; 5 * dim];
            let state = StateRef {
                m: &m,
                l: &l,
                acc: &acc,
            };
            finish(&state, &mut out);
            for r in 0..5 {
                for (got, want) in out[r * dim..].iter().zip(case.reference(KvDtype::Bf16, r)) {
                    assert!(
                        (f64::from(*got) - want).abs() < 4e-3,
                        "{}: {got} {want}",
                        cpu.path()
                    );
                }
            }
        }
    }
}
