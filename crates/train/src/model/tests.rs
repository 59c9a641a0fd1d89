//! Laws of the trainable decoder: parity with the engine, gradients everywhere, adapters that start as nothing.

use std::path::Path;
use std::sync::Arc;

use antefix_engine::Session;
use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::team::Team;
use antefix_models::decoder::Model;
use antefix_models::files::ModelFiles;
use antefix_models::gguf::Gguf;
use antefix_models::spec::Arch;
use antefix_models::testing::tiny_gguf;
use candle_core::Tensor;

use super::*;
use crate::ops::{self, Packing, RowLoss};
use crate::optim::Grads;

mod composed;

const ARCHS: [Arch; 4] = [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3];

fn files(arch: Arch) -> ModelFiles {
    let gguf = Gguf::parse(tiny_gguf(arch, 3)).unwrap();
    ModelFiles::from_gguf(gguf, Path::new("tiny.gguf")).unwrap()
}

fn batch(tokens: &[u32]) -> Batch {
    Batch {
        tokens: Arc::new(tokens.to_vec()),
        packing: Arc::new(Packing::causal(&[tokens.len()]).unwrap()),
    }
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + 11) % 250).collect()
}

fn logits(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    let h = decoder.hidden(&batch(tokens)).unwrap();
    ops::linear(&h, decoder.output(), None)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn engine_logits(files: ModelFiles, tokens: &[u32]) -> Vec<f32> {
    let cpu = Cpu::best();
    let model = Model::load(files, cpu, Arc::new(Team::new(2)), Precision::F32).unwrap();
    let mut session = Session::new(Arc::new(model), tokens.len(), 64);
    let mut out = Vec::new();
    session.feed(tokens, tokens.len(), &mut out).unwrap();
    out
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The law on which rollouts rest: trainer and engine compute the same logits, and what the trainer hands over is what it has.
#[test]
fn every_family_computes_what_the_engine_computes() {
    let tokens = tokens(40);
    for arch in ARCHS {
        let decoder = Decoder::load(&files(arch), &Train::All, 0).unwrap();
        let ours = logits(&decoder, &tokens);
        let theirs = engine_logits(files(arch), &tokens);
        assert!(
            furthest(&ours, &theirs) <= 1e-3,
            "{arch:?}: {}",
            furthest(&ours, &theirs)
        );
        let handed = ModelFiles::in_memory(decoder.spec().clone(), decoder.tensors().unwrap()).unwrap();
        assert!(
            furthest(&ours, &engine_logits(handed, &tokens)) <= 1e-3,
            "{arch:?} handed over"
        );
    }
}

fn loss(decoder: &Decoder, tokens: &[u32]) -> Tensor {
    let rows: Vec<u32> = (0..tokens.len() as u32 - 1).collect();
    let h = decoder.hidden(&batch(tokens)).unwrap();
    let h = ops::embed(&h, &Arc::new(rows), 1.0).unwrap();
    let targets = Arc::new(tokens[1..].to_vec());
    let weights = Arc::new(vec![1.0 / targets.len() as f64; targets.len()]);
    ops::token_loss(
        &h,
        decoder.output(),
        &targets,
        1.0,
        RowLoss::CrossEntropy(weights),
    )
    .unwrap()
}

#[test]
fn every_variable_of_every_family_gets_a_gradient() {
    for arch in ARCHS {
        let decoder = Decoder::load(&files(arch), &Train::All, 0).unwrap();
        let mut grads = Grads::default();
        grads.add(decoder.params(), &loss(&decoder, &tokens(20))).unwrap();
        assert_eq!(grads.silent(decoder.params()), Vec::<&str>::new(), "{arch:?}");
        let fresh = Decoder::fresh(decoder.spec(), INITIALIZER_RANGE, 5).unwrap();
        let mut grads = Grads::default();
        grads.add(fresh.params(), &loss(&fresh, &tokens(20))).unwrap();
        assert_eq!(
            grads.silent(fresh.params()),
            Vec::<&str>::new(),
            "{arch:?} from nothing"
        );
    }
}

/// A direction in the space of all parameters: the slope of the loss along it is the gradient's, for every family.
#[test]
fn the_gradient_of_a_whole_model_is_the_slope_of_its_loss() {
    for arch in ARCHS {
        let decoder = Decoder::load(&files(arch), &Train::All, 0).unwrap();
        let tokens = tokens(24);
        let mut grads = Grads::default();
        grads.add(decoder.params(), &loss(&decoder, &tokens)).unwrap();
        let norm = grads.norm();
        let move_by = |step: f64| {
            let vars: Vec<_> = decoder
                .params()
                .variables()
                .map(|(n, v)| (n.to_string(), v.clone()))
                .collect();
            for ((_, var), grad) in vars.iter().zip(grads.sums()) {
                let grad = Tensor::from_vec(grad.clone(), var.shape(), &candle_core::Device::Cpu).unwrap();
                let moved = (var.as_tensor() + (grad * (step / norm)).unwrap()).unwrap();
                var.set(&moved).unwrap();
            }
        };
        let value = || f64::from(loss(&decoder, &tokens).to_scalar::<f32>().unwrap());
        let h = 2e-2;
        move_by(h);
        let up = value();
        move_by(-2.0 * h);
        let down = value();
        let slope = (up - down) / (2.0 * h);
        assert!(
            (slope - norm).abs() <= 0.02 * norm,
            "{arch:?}: slope {slope}, gradient {norm}"
        );
    }
}

fn grads_of(decoder: &Decoder) -> Grads {
    let mut grads = Grads::default();
    // Twice: sums over micro-batches go on from what is there.
    for n in [20, 13] {
        grads.add(decoder.params(), &loss(decoder, &tokens(n))).unwrap();
    }
    grads
}

/// Gradient checkpointing changes no bit of any gradient: every family, adapters behind frozen rows, and a model of one's own.
#[test]
fn recomputed_layers_give_the_same_bits() {
    for arch in ARCHS {
        let make = || Decoder::load(&files(arch), &Train::All, 0).unwrap();
        let (kept, again) = (make(), make().with_recompute(Recompute::Layers));
        assert_eq!(grads_of(&kept).sums(), grads_of(&again).sums(), "{arch:?}");
        let (kept, again) = (adapted(arch), adapted(arch).with_recompute(Recompute::Layers));
        let (kept_grads, grads) = (grads_of(&kept), grads_of(&again));
        assert_eq!(kept_grads.sums(), grads.sums(), "{arch:?} adapted");
        assert_eq!(kept_grads.silent(kept.params()), grads.silent(again.params()));
        assert_eq!(logits(&kept, &tokens(9)), logits(&again, &tokens(9)));
    }
    let raw = RawGpt {
        layers: 3,
        d: 32,
        heads: 2,
        kv_heads: 1,
        ffn: 48,
        ..RawGpt::default()
    };
    let grads = |recompute| {
        let model = Gpt::fresh(&raw, 5).unwrap().with_recompute(recompute);
        let h = model.hidden(&batch(&tokens(20))).unwrap();
        let targets = Arc::new(tokens(20));
        let weights = RowLoss::CrossEntropy(Arc::new(vec![0.05; 20]));
        let loss = ops::token_loss(&h, model.output(), &targets, 1.0, weights).unwrap();
        let mut grads = Grads::default();
        grads.add(model.params(), &loss).unwrap();
        assert!(grads.silent(model.params()).is_empty());
        grads
    };
    assert_eq!(grads(Recompute::Nothing).sums(), grads(Recompute::Layers).sums());
}

/// A backward pass whose gradients nobody fetched leaves nothing in those of the next.
#[test]
fn gradients_that_were_not_fetched_are_forgotten() {
    let decoder = Decoder::load(&files(Arch::Llama), &Train::All, 0).unwrap();
    let decoder = decoder.with_recompute(Recompute::Layers);
    let want = grads_of(&decoder);
    let _ = loss(&decoder, &tokens(30)).backward().unwrap();
    assert_eq!(grads_of(&decoder).sums(), want.sums());
}

fn adapted(arch: Arch) -> Decoder {
    let spec = LoraSpec {
        modules: vec!["q_proj".into(), "down_proj".into(), "up_proj".into()],
        rank: 4,
        alpha: 8.0,
    };
    Decoder::load(&files(arch), &Train::Lora(spec), 1).unwrap()
}

#[test]
fn a_fresh_adapter_changes_nothing_and_a_merged_one_is_the_same_model() {
    let tokens = tokens(30);
    for arch in ARCHS {
        let decoder = adapted(arch);
        let plain = Decoder::load(&files(arch), &Train::Nothing, 0).unwrap();
        assert!(furthest(&logits(&decoder, &tokens), &logits(&plain, &tokens)) < 1e-5);
        for (name, var) in decoder.params().variables() {
            assert!(name.contains("lora_"), "{name} is trained");
            let filled = Init::Normal(0.05);
            let mut other = Params::default();
            let value = other.fresh(name, var.dims(), filled, 9).unwrap();
            var.set(&value).unwrap();
        }
        let ours = logits(&decoder, &tokens);
        assert!(
            furthest(&ours, &logits(&plain, &tokens)) > 1e-2,
            "the adapter does something"
        );
        let merged = ModelFiles::in_memory(decoder.spec().clone(), decoder.tensors().unwrap()).unwrap();
        let merged = Decoder::load(&merged, &Train::Nothing, 0).unwrap();
        assert!(furthest(&ours, &logits(&merged, &tokens)) < 1e-4, "{arch:?}");
    }
}

#[test]
fn an_adapter_trains_itself_and_nothing_else() {
    let decoder = adapted(Arch::Llama);
    let mut grads = Grads::default();
    grads.add(decoder.params(), &loss(&decoder, &tokens(20))).unwrap();
    // B is zero at the start, so A has no gradient in the first step; B has.
    let silent = grads.silent(decoder.params());
    assert!(silent.iter().all(|n| n.contains("lora_A")), "{silent:?}");
    let [trained, all] = decoder.params().counts();
    assert!(trained > 0 && trained < all / 4);
}

#[test]
fn adapters_of_unknown_modules_are_refused() {
    let spec = LoraSpec {
        modules: vec!["query".into()],
        rank: 4,
        alpha: 8.0,
    };
    let error = Decoder::load(&files(Arch::Llama), &Train::Lora(spec), 1).unwrap_err();
    assert!(error.to_string().contains("q_proj"), "{error}");
}
