//! Logits of the real models against those of transformers and llama.cpp, see tools/golden/logits.py.
//!
//! Each test needs its model in the store and says so when it is not there. The 2,048-token prompts take minutes in f32:
//! `cargo test --release -p antefix-lab --test golden_logits -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::path::Path;
use std::sync::Arc;

use antefix_engine::{argmax, log_softmax_at};
use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::team::Team;
use antefix_lab::logits;
use antefix_models::decoder::Model;
use antefix_models::files::ModelFiles;
use serde::Deserialize;

/// The first line of a file.
#[derive(Deserialize)]
struct Header {
    /// Ids whose logits are stored for every prompt.
    at: Vec<usize>,
}

#[derive(Deserialize)]
struct Prompt {
    prompt: String,
    ids: Vec<u32>,
    transformers: Reference,
    llama_f32: Reference,
}

/// Logits after the last token.
#[derive(Deserialize)]
struct Reference {
    at: Vec<f32>,
    top: Vec<(usize, f32)>,
    argmax: Vec<usize>,
}

impl Reference {
    /// The largest absolute difference over the stored ids.
    fn distance(&self, header: &Header, logits: &[f32]) -> f32 {
        let at = header.at.iter().copied().zip(self.at.iter().copied());
        at.chain(self.top.iter().copied())
            .map(|(id, logit)| (logits[id] - logit).abs())
            .fold(0.0, f32::max)
    }
}

fn golden(alias: &str) -> (Header, Vec<Prompt>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/golden/logits/{alias}.jsonl"));
    let text = std::fs::read_to_string(path).unwrap();
    let (header, prompts) = text.split_once('\n').unwrap();
    let prompts = prompts
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    (serde_json::from_str(header).unwrap(), prompts)
}

fn load(path: &Path, precision: Precision) -> Arc<Model> {
    let team = Arc::new(Team::new(2));
    let files = ModelFiles::open(path).unwrap();
    Arc::new(Model::load(files, Cpu::from_env().unwrap(), team, precision).unwrap())
}

/// Every position's logits.
fn every(model: &Arc<Model>, ids: &[u32]) -> Vec<Vec<f32>> {
    let mut rows = Vec::with_capacity(ids.len());
    logits::each(model, ids, |_, row| rows.push(row.to_vec())).unwrap();
    rows
}

/// `KL(a || b)` of two rows of logits, in nats.
fn divergence(a: &[f32], b: &[f32]) -> f64 {
    let lse = |row: &[f32]| f64::from(row[0] - log_softmax_at(row, 0));
    let (la, lb) = (lse(a), lse(b));
    let term = |(a, b): (&f32, &f32)| {
        let (p, q) = (f64::from(*a) - la, f64::from(*b) - lb);
        p.exp() * (p - q)
    };
    a.iter().zip(b).map(term).sum()
}

fn compare(alias: &str, wanted: impl Fn(&Prompt) -> bool) {
    let Some(path) = antefix_models::testing::model(alias) else {
        eprintln!("{alias} is not on this machine: not compared (antefix models pull {alias})");
        return;
    };
    let (header, prompts) = golden(alias);
    let prompts: Vec<Prompt> = prompts.into_iter().filter(wanted).collect();
    let (exact, fast) = (load(&path, Precision::F32), load(&path, Precision::Fast));
    // llama.cpp looks GELU up in a table of f16 results: only Gemma uses it.
    let llama_bound = if alias == "gemma3-270m" { 2e-2 } else { 1e-3 };
    let (mut worst, mut positions, mut agree, mut kl) = (0.0f32, 0usize, 0usize, 0.0f64);
    for p in &prompts {
        let (f32s, fasts) = (every(&exact, &p.ids), every(&fast, &p.ids));
        let last = f32s.last().unwrap();
        let from_transformers = p.transformers.distance(&header, last);
        let from_llama = p.llama_f32.distance(&header, last);
        eprintln!(
            "{alias} {}: {} tokens, max abs difference of f32 logits to transformers {from_transformers:.1e}, llama.cpp {from_llama:.1e}",
            p.prompt,
            p.ids.len(),
        );
        worst = worst.max(from_transformers);
        assert!(
            from_llama <= llama_bound,
            "{alias} {}: {from_llama} from llama.cpp",
            p.prompt
        );
        assert_eq!(
            argmax(last) as usize,
            p.transformers.top[0].0,
            "{alias} {}",
            p.prompt
        );
        let same = f32s.iter().zip(&p.transformers.argmax);
        let wrong = same.filter(|(row, id)| argmax(row) as usize != **id).count();
        assert_eq!(wrong, 0, "{alias} {}: most likely tokens of f32", p.prompt);
        for (a, b) in f32s.iter().zip(&fasts) {
            positions += 1;
            agree += usize::from(argmax(a) == argmax(b));
            kl += divergence(a, b);
        }
    }
    let (kl, agree) = (kl / positions as f64, agree as f64 / positions as f64);
    eprintln!(
        "{alias}: f32 within {worst:.1e}; fast path over {positions} positions: mean KL {kl:.5}, top-1 {:.2} %",
        100.0 * agree
    );
    assert!(worst <= 1e-3, "{alias}: f32 logits differ by {worst}");
    assert!(kl <= 0.02, "{alias}: mean KL {kl}");
    assert!(agree >= 0.95, "{alias}: top-1 {agree}");
}

macro_rules! models {
    ($($name:ident $long:ident $alias:literal)*) => {$(
        #[test]
        fn $name() {
            compare($alias, |p| p.ids.len() < 500);
        }

        #[test]
        #[ignore = "a 2,048-token prompt in f32 takes minutes"]
        fn $long() {
            compare($alias, |p| p.ids.len() >= 500);
        }
    )*};
}

models! {
    smollm2 smollm2_long "smollm2"
    gemma3 gemma3_long "gemma3-270m"
    qwen2 qwen2_long "qwen2.5-coder-0.5b"
}
