//! Ceilings of the machine, measured in about a second: what `antefix doctor` prints and benches are held against.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::cpu::{Cpu, Path};
use crate::team::Team;

/// Measured ceilings of a team of threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Bytes per second read from a buffer far larger than the caches.
    pub read_bytes_s: f64,
    /// f32 operations per second of fused multiply-adds (2 each).
    pub f32_flop_s: f64,
    /// Operations per second of the int8 multiply-add of the path's vectors (2 each).
    pub int8_op_s: f64,
    /// Those of AMX, on its path.
    pub tiles: Option<Tiles>,
}

/// Measured ceilings of tile products, 2 operations a multiply-add.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tiles {
    /// int8 operations per second.
    pub int8_op_s: f64,
    /// bf16 operations per second.
    pub bf16_flop_s: f64,
}

/// Seconds of the fastest of `repeats` calls.
fn fastest(repeats: usize, mut f: impl FnMut()) -> f64 {
    (0..repeats)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// Measures with all threads of `team`.
pub fn measure(cpu: Cpu, team: &Team) -> Ceilings {
    const WORDS: usize = 32 << 20; // 256 MiB
    let data = vec![1u64; WORDS];
    let sink = AtomicU64::new(0);
    let pieces: Vec<&[u64]> = data.chunks(1 << 16).collect();
    let seconds = fastest(5, || {
        team.run(pieces.len(), &|i| {
            sink.fetch_add(sum(cpu, pieces[i]), Ordering::Relaxed);
        });
    });
    let read_bytes_s = (WORDS * 8) as f64 / seconds;

    let threads = team.threads();
    const ROUNDS: usize = 200_000;
    let seconds = fastest(5, || {
        team.run(threads, &|_| {
            sink.fetch_add(u64::from(fma(cpu, ROUNDS).to_bits()), Ordering::Relaxed);
        });
    });
    let f32_flop_s = (2 * FMA_LANES * ROUNDS * threads) as f64 / seconds;
    let seconds = fastest(5, || {
        team.run(threads, &|_| {
            sink.fetch_add(int8(cpu, ROUNDS) as u64, Ordering::Relaxed);
        });
    });
    let int8_op_s = (2 * INT8_MACS * ROUNDS * threads) as f64 / seconds;
    std::hint::black_box(sink.load(Ordering::Relaxed));
    Ceilings {
        read_bytes_s,
        f32_flop_s,
        int8_op_s,
        tiles: tiles(cpu, team),
    }
}

#[cfg(target_arch = "x86_64")]
fn tiles(cpu: Cpu, team: &Team) -> Option<Tiles> {
    const ROUNDS: usize = 20_000;
    // Four full tiles a round: 16 rows, 16 columns, 64 bytes along K.
    let operations = (4 * 2 * 16 * 16 * 64 * ROUNDS * team.threads()) as f64;
    let seconds = |bf16| {
        fastest(5, || {
            team.run(team.threads(), &|_| {
                // SAFETY: asked for only on the AMX path, whose `Cpu` proves int8 and bf16 tiles.
                unsafe { crate::amx::products(bf16, ROUNDS) };
            });
        })
    };
    (cpu.path() == Path::Amx).then(|| Tiles {
        int8_op_s: operations / seconds(false),
        bf16_flop_s: operations / 2.0 / seconds(true),
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn tiles(_: Cpu, _: &Team) -> Option<Tiles> {
    None
}

/// f32 multiply-adds of one round: enough independent chains to hide the latency on AVX2 and AVX-512.
const FMA_LANES: usize = 160;

/// int8 multiply-adds of one round.
const INT8_MACS: usize = 512;

#[inline(always)]
fn sum_body(x: &[u64]) -> u64 {
    x.iter().fold(0, |a, b| a.wrapping_add(*b))
}

#[inline(always)]
fn fma_body(rounds: usize) -> f32 {
    let mut acc = [1.0f32; FMA_LANES];
    let (a, b) = (std::hint::black_box(0.999f32), std::hint::black_box(0.001f32));
    for _ in 0..rounds {
        for x in &mut acc {
            *x = x.mul_add(a, b);
        }
    }
    acc.iter().sum()
}

#[inline(always)]
fn int8_body(rounds: usize) -> i32 {
    let mut acc = [0i32; 64];
    let w = std::hint::black_box([3u8; INT8_MACS]);
    let x = std::hint::black_box([5i8; INT8_MACS]);
    for _ in 0..rounds {
        for (i, (w, x)) in w.iter().zip(&x).enumerate() {
            acc[i % 64] += i32::from(*w) * i32::from(*x);
        }
        std::hint::black_box(&mut acc);
    }
    acc.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod fast {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn sum(x: &[u64]) -> u64 {
        super::sum_body(x)
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma_avx2(rounds: usize) -> f32 {
        // 10 chains of 8 lanes, twice a round.
        let (a, b) = (
            _mm256_set1_ps(std::hint::black_box(0.999)),
            _mm256_set1_ps(std::hint::black_box(0.001)),
        );
        let mut acc = [_mm256_set1_ps(1.0); 10];
        for _ in 0..rounds {
            for _ in 0..2 {
                for x in &mut acc {
                    *x = _mm256_fmadd_ps(*x, a, b);
                }
            }
        }
        let total = acc
            .into_iter()
            .fold(_mm256_setzero_ps(), |s, x| _mm256_add_ps(s, x));
        _mm256_cvtss_f32(total)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma_avx512(rounds: usize) -> f32 {
        let (a, b) = (
            _mm512_set1_ps(std::hint::black_box(0.999)),
            _mm512_set1_ps(std::hint::black_box(0.001)),
        );
        let mut acc = [_mm512_set1_ps(1.0); 10];
        for _ in 0..rounds {
            for x in &mut acc {
                *x = _mm512_fmadd_ps(*x, a, b);
            }
        }
        let total = acc
            .into_iter()
            .fold(_mm512_setzero_ps(), |s, x| _mm512_add_ps(s, x));
        _mm512_cvtss_f32(total)
    }

    /// 16 products of 32 bytes a round, summed in 16 bits as the 4-bit kernels do.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn int8_avx2(rounds: usize) -> i32 {
        let w = _mm256_set1_epi8(std::hint::black_box(3));
        let x = _mm256_set1_epi8(std::hint::black_box(1));
        let mut acc = [_mm256_setzero_si256(); 8];
        for _ in 0..rounds {
            for _ in 0..2 {
                for a in &mut acc {
                    // The accumulator is an operand, so that no product leaves the loop.
                    *a = _mm256_add_epi16(x, _mm256_maddubs_epi16(*a, w));
                }
            }
        }
        let total = acc
            .into_iter()
            .fold(_mm256_setzero_si256(), |s, x| _mm256_add_epi16(s, x));
        _mm256_extract_epi32::<0>(total)
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8_avx512(rounds: usize) -> i32 {
        let w = _mm512_set1_epi8(std::hint::black_box(3));
        let x = _mm512_set1_epi8(std::hint::black_box(1));
        let mut acc = [_mm512_setzero_si512(); 8];
        for _ in 0..rounds {
            for a in &mut acc {
                *a = _mm512_dpbusd_epi32(*a, w, x);
            }
        }
        let total = acc
            .into_iter()
            .fold(_mm512_setzero_si512(), |s, x| _mm512_add_epi32(s, x));
        _mm512_reduce_add_epi32(total)
    }
}

fn sum(cpu: Cpu, x: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if cpu.path() >= Path::Avx2 {
        // SAFETY: `cpu` proves AVX2.
        return unsafe { fast::sum(x) };
    }
    sum_body(x)
}

fn fma(cpu: Cpu, rounds: usize) -> f32 {
    match cpu.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX2 and FMA.
        Path::Avx2 => unsafe { fast::fma_avx2(rounds) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX-512F.
        Path::Avx512 | Path::Amx => unsafe { fast::fma_avx512(rounds) },
        _ => fma_body(rounds),
    }
}

fn int8(cpu: Cpu, rounds: usize) -> i32 {
    match cpu.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX2.
        Path::Avx2 => unsafe { fast::int8_avx2(rounds) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `cpu` proves AVX-512F and VNNI.
        Path::Avx512 | Path::Amx => unsafe { fast::int8_avx512(rounds) },
        _ => int8_body(rounds),
    }
}
