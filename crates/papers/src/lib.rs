//! One folder per paper, and the list of them all.
//!
//! `cargo xtask new-paper SLUG` makes a folder and adds its lines here.

use antefix_attention::method::{Card, Method};

use repro::{Claim, Repro};

#[cfg(test)]
mod case;
pub mod heads;
#[cfg(test)]
mod plan_case;
#[cfg(test)]
mod plan_laws;
pub mod repro;

// papers: first
pub mod aaren;
pub mod act;
pub mod anchor_attention;
pub mod ape;
pub mod attention_sae;
pub mod cacheblend;
pub mod compresskv;
pub mod dhsa;
pub mod entropy_abf;
pub mod flexprefill;
pub mod hip_attention;
pub mod hydragen;
pub mod jrt;
pub mod kv_baselines;
pub mod prefix_grouper;
pub mod razor_attention;
pub mod retrieval_heads;
pub mod rope_scaling;
pub mod sparse_baselines;
pub mod tidaldecode;
// papers: last

/// Everything that a request can choose, in the order of the names. Help texts, `/v1/methods`, the pages under `docs/methods/` and the
/// tests of combinations are made from it.
pub const ALL: &[&dyn Method] = &[
    // methods: first
    &sparse_baselines::AShape,
    &sparse_baselines::AShapeDecode,
    &act::Calibrated,
    &anchor_attention::AnchorAttention,
    &ape::Ape,
    &attention_sae::AttentionSae,
    &sparse_baselines::BlockTopK,
    &cacheblend::CacheBlend,
    &compresskv::CompressKv,
    &dhsa::Dhsa,
    &entropy_abf::EntropyAbf,
    &flexprefill::FlexPrefill,
    &kv_baselines::h2o::H2o,
    &hip_attention::HipAttention,
    &hip_attention::HipDecode,
    &jrt::Jrt,
    &rope_scaling::llama3::Llama3,
    &sparse_baselines::MInference,
    &rope_scaling::ntk::NtkAware,
    &rope_scaling::parts::NtkByParts,
    &sparse_baselines::OracleTopK,
    &rope_scaling::pi::PositionInterpolation,
    &kv_baselines::pyramidkv::PyramidKv,
    &sparse_baselines::Quest,
    &sparse_baselines::RandomBlocks,
    &kv_baselines::random::Random,
    &razor_attention::RazorAttention,
    &retrieval_heads::RetrievalHeads,
    &kv_baselines::snapkv::SnapKv,
    &kv_baselines::StreamingLlm,
    &tidaldecode::TidalDecode,
    &sparse_baselines::XAttention,
    &rope_scaling::yarn::Yarn,
    // methods: last
];

/// What always runs and no request chooses, in the order of the names. Listed beside [`ALL`].
pub const ALWAYS: &[&Card] = &[&hydragen::CARD];

/// What is trained and no request chooses, in the order of the names. Listed beside [`ALL`].
pub const TRAINED: &[&Card] = &[&aaren::CARD, &prefix_grouper::CARD];

/// The claims of what is trained. `antefix-train` measures them.
pub const TRAINED_CLAIMS: &[&Claim] = &[&aaren::CLAIM, &attention_sae::CLAIM, &prefix_grouper::CLAIM];

/// All claims that `antefix repro` looks into, in the order of the names.
pub fn claims() -> Vec<Claim> {
    let run = REPROS.iter().map(|repro| &repro.claim);
    let mut all: Vec<Claim> = run.chain(TRAINED_CLAIMS.iter().copied()).copied().collect();
    all.sort_by_key(|claim| claim.slug);
    all
}

/// The claims that `antefix repro` looks into, on models that run, in the order of the names.
pub const REPROS: &[&Repro] = &[
    // repros: first
    &act::repro::REPRO,
    &anchor_attention::repro::REPRO,
    &ape::repro::REPRO,
    &cacheblend::repro::REPRO,
    &compresskv::repro::REPRO,
    &dhsa::repro::REPRO,
    &entropy_abf::repro::REPRO,
    &flexprefill::repro::REPRO,
    &hip_attention::repro::REPRO,
    &hydragen::repro::REPRO,
    &jrt::repro::REPRO,
    &razor_attention::repro::REPRO,
    &retrieval_heads::repro::REPRO,
    &tidaldecode::repro::REPRO,
    // repros: last
];

/// Methods without a reproduction of their own, and why.
pub const WITHOUT_REPRO: &[(&str, &str)] = &[
    ("a_shape", "A baseline of planners."),
    ("a_shape_decode", "A baseline of `tidaldecode` and `hip_decode`."),
    ("block_topk", "A baseline of planners."),
    ("h2o", "A baseline of `compresskv`."),
    (
        "hip_decode",
        "The other form of `hip_attention`; measured beside `tidaldecode`.",
    ),
    ("llama3_rope", "A baseline of `entropy_abf`."),
    ("minference", "A baseline of planners."),
    ("ntk_aware", "A baseline of `entropy_abf`."),
    ("ntk_by_parts", "A baseline of `entropy_abf`."),
    ("oracle_topk", "No paper: an upper bound for planners."),
    ("position_interpolation", "A baseline of `entropy_abf`."),
    ("pyramidkv", "A baseline of `compresskv`."),
    ("quest", "A baseline of `tidaldecode`."),
    ("random_blocks", "No paper: a baseline of planners."),
    (
        "random_kv",
        "No paper: a baseline of `compresskv` and `razor_attention`.",
    ),
    ("snapkv", "A baseline of `compresskv` and `razor_attention`."),
    (
        "streaming_llm",
        "A baseline of `compresskv` and `razor_attention`.",
    ),
    ("xattention", "A baseline of planners."),
    ("yarn", "A baseline of `entropy_abf`."),
];
