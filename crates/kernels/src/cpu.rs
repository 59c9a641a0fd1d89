//! Which instructions this machine has, looked up once.
//!
//! `ANTEFIX_CPU=scalar|avx2|avx512|amx` forces a path, so that every path a machine has can be tested on it.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// A family of kernels. Ordered: a later path needs everything an earlier one needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// Plain Rust. The documentation and the referee of all others; builds on every architecture.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// AMX int8 and bf16 tiles and AVX-512 BF16 on top of AVX-512.
    Amx,
}

impl Path {
    /// All paths, slowest first.
    pub const ALL: [Path; 4] = [Path::Scalar, Path::Avx2, Path::Avx512, Path::Amx];

    /// The name used by `ANTEFIX_CPU`.
    pub fn name(self) -> &'static str {
        match self {
            Path::Scalar => "scalar",
            Path::Avx2 => "avx2",
            Path::Avx512 => "avx512",
            Path::Amx => "amx",
        }
    }

    fn is_here(self) -> bool {
        match self {
            Path::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => {
                Path::Avx2.is_here()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Path::Amx => {
                Path::Avx512.is_here() && is_x86_feature_detected!("avx512bf16") && crate::amx::permitted()
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Path {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Path::ALL
            .into_iter()
            .find(|p| p.name() == s)
            .ok_or_else(|| format!("`{s}` is not a CPU path\nhint: one of scalar, avx2, avx512, amx"))
    }
}

/// Proof that this machine has the features of a [`Path`]; the only way to get one is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    path: Path,
    /// The AVX2 path may use AVX-VNNI, which some processors without AVX-512 have.
    avx_vnni: bool,
}

impl Cpu {
    /// The best path of this machine, or the one that `ANTEFIX_CPU` names.
    ///
    /// # Errors
    /// When `ANTEFIX_CPU` names no path, or one this machine does not have.
    pub fn from_env() -> Result<Cpu, String> {
        static FOUND: OnceLock<Result<Cpu, String>> = OnceLock::new();
        FOUND
            .get_or_init(|| match std::env::var("ANTEFIX_CPU") {
                Ok(name) => {
                    let path: Path = name.parse().map_err(|e| format!("ANTEFIX_CPU: {e}"))?;
                    Cpu::with(path).ok_or_else(|| {
                        format!("ANTEFIX_CPU: this machine has no `{path}`\nhint: unset it to use the best path found")
                    })
                }
                Err(_) => Ok(Cpu::best()),
            })
            .clone()
    }

    /// The best path of this machine, whatever the environment says.
    pub fn best() -> Cpu {
        Cpu::available().last().copied().unwrap_or(Cpu {
            path: Path::Scalar,
            avx_vnni: false,
        })
    }

    /// `path`, if this machine has it.
    pub fn with(path: Path) -> Option<Cpu> {
        #[cfg(target_arch = "x86_64")]
        let avx_vnni = path == Path::Avx2 && is_x86_feature_detected!("avxvnni");
        #[cfg(not(target_arch = "x86_64"))]
        let avx_vnni = false;
        path.is_here().then_some(Cpu { path, avx_vnni })
    }

    /// Every path of this machine, slowest first. Never empty.
    pub fn available() -> Vec<Cpu> {
        Path::ALL.into_iter().filter_map(Cpu::with).collect()
    }

    /// Which path this is.
    pub fn path(self) -> Path {
        self.path
    }

    /// Whether this is the AVX2 path on a machine with AVX-VNNI.
    pub fn avx_vnni(self) -> bool {
        self.avx_vnni
    }

    /// [`Cpu::available`], and the AVX2 path without AVX-VNNI where there is one with it.
    #[cfg(test)]
    pub(crate) fn variants() -> Vec<Cpu> {
        let here = Cpu::available();
        let plain = here.iter().filter(|cpu| cpu.avx_vnni).map(|cpu| Cpu {
            avx_vnni: false,
            ..*cpu
        });
        plain.chain(here.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_everywhere_and_first() {
        let all = Cpu::available();
        assert_eq!(all[0].path(), Path::Scalar);
        assert!(all.windows(2).all(|w| w[0].path() < w[1].path()));
        for path in Path::ALL {
            match Cpu::with(path) {
                Some(_) => eprintln!("path {path}: tested here"),
                None => eprintln!("path {path}: this machine has none, not tested"),
            }
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let e = "sse9".parse::<Path>().unwrap_err();
        assert!(e.contains("avx2") && e.contains("sse9"));
    }
}
