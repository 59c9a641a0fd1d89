//! Laws of runs: resuming, accumulation, broken recipes, broken checkpoints.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::error::TrainError;
use crate::random::Stream;

mod kinds;

const TINY: &str = r#"
recipe = "tiny"
seed = 3
[data]
source = "task"
task = { name = "arithmetic", digits = 1, shots = 1 }
[model]
kind = "llama"
layers = 2
d = 32
heads = 2
kv_heads = 1
ffn = 48
[optim]
lr = 3e-3
[schedule]
kind = "cosine"
warmup = 2
[train]
steps = 12
batch = 6
eval_items = 8
[profile.short]
train.steps = 4
"#;

fn recipe(overrides: &[&str]) -> Result<Recipe, TrainError> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    Recipe::parse(TINY, None, &overrides)
}

fn run(recipe: &Recipe, out: &Path, resume: bool, stop_after: Option<u64>) -> Result<Finish, TrainError> {
    let stop = AtomicBool::new(false);
    let mut progress = |p: Progress| {
        if Some(p.step) == stop_after {
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    };
    train(
        recipe,
        out,
        resume,
        &mut Watch {
            stop: &stop,
            progress: &mut progress,
        },
    )
}

fn bytes(finish: &Finish) -> [Vec<u8>; 2] {
    ["model.safetensors", "optim.safetensors"]
        .map(|f| std::fs::read(finish.checkpoint.folder.join(f)).unwrap())
}

#[test]
fn a_stopped_and_resumed_run_ends_with_the_same_bytes() {
    let policy = [
        "objective={name='grpo', group=3, max_tokens=4, iterations=2}",
        "train.steps=4",
        "train.batch=2",
    ];
    let files = tempfile::tempdir().unwrap();
    let kinds = kinds::all(files.path());
    let kinds = kinds
        .iter()
        .map(|kind| kind.iter().map(String::as_str).chain(["train.steps=4"]).collect());
    for overrides in [
        vec![],
        vec!["train.micro=4"],
        vec!["train.recompute='layers'"],
        policy.to_vec(),
    ]
    .into_iter()
    .chain(kinds)
    {
        let recipe = recipe(&overrides).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let whole = run(&recipe, &dir.path().join("whole"), false, None).unwrap();
        assert!(whole.complete && !whole.held_out.is_empty());
        let cut = dir.path().join("cut");
        let mut stop = 1;
        let mut last = run(&recipe, &cut, false, Some(stop)).unwrap();
        while !last.complete {
            assert_eq!(last.step, stop);
            stop += 2;
            last = run(&recipe, &cut, true, Some(stop)).unwrap();
        }
        assert!(bytes(&whole) == bytes(&last), "{overrides:?}");
        assert_eq!(whole.held_out, last.held_out);
        let steps = |dir: &Path| -> Vec<serde_json::Value> {
            let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
            let lines = text
                .lines()
                .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
            lines
                .filter(|l| l["t"] == "step")
                .map(|l| l["loss"].clone())
                .collect()
        };
        assert_eq!(
            steps(&dir.path().join("whole")),
            steps(&cut),
            "one line a step, the same losses"
        );
        assert!(cut.join("report.html").exists());
    }
}

#[test]
fn a_run_that_exists_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(&["train.steps=2"]).unwrap();
    run(&recipe, dir.path(), false, None).unwrap();
    let error = run(&recipe, dir.path(), false, None).unwrap_err().to_string();
    assert!(error.contains("--resume"), "{error}");
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    // With a large eps a step is the gradient times the rate; with a small one, Adam makes the noise of gradients near zero as large as any.
    let params = |micro: &str| {
        let dir = tempfile::tempdir().unwrap();
        let finish = run(
            &recipe(&["train.steps=2", "optim.eps=1.0", "optim.lr=1.0", micro]).unwrap(),
            dir.path(),
            false,
            None,
        )
        .unwrap();
        super::model::read_tensors(&finish.checkpoint.folder.join("model.safetensors")).unwrap()
    };
    for ((name, _, a), (_, _, b)) in params("train.micro=6").iter().zip(params("train.micro=2")) {
        let far = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5, "{name}: {far}");
    }
}

#[test]
fn a_run_learns() {
    let dir = tempfile::tempdir().unwrap();
    let text = "abcdefgh".repeat(400);
    let file = dir.path().join("text.txt");
    std::fs::write(&file, text).unwrap();
    let data = format!("data={{source='text', files=['{}'], seq=32}}", file.display());
    for model in [
        "model={kind='llama', layers=1, d=32, heads=2, kv_heads=2, ffn=64}",
        "model={kind='gpt', layers=1, d=32, heads=2, kv_heads=2, ffn=64, context=64}",
    ] {
        let recipe = recipe(&[&data, model, "train.steps=60", "optim.lr=1e-2"]).unwrap();
        let finish = run(
            &recipe,
            &dir.path().join(model.split('\'').nth(1).unwrap()),
            false,
            None,
        )
        .unwrap();
        let value = finish.held_out[0].1;
        assert!(
            value < 0.3,
            "{model}: {value} nats where everything can be foreseen"
        );
    }
}

/// Tokens drawn at random have nothing to learn: no model may get below their entropy on held-out data. Catches leaks.
#[test]
fn random_tokens_stay_at_their_entropy() {
    let dir = tempfile::tempdir().unwrap();
    let mut stream = Stream::of(5, "letters");
    let text: String = (0..20_000)
        .map(|_| char::from(b'a' + stream.below(16) as u8))
        .collect();
    let file = dir.path().join("text.txt");
    std::fs::write(&file, text).unwrap();
    let data = format!(
        "data={{source='text', files=['{}'], seq=64, val=0.3}}",
        file.display()
    );
    let recipe = recipe(&[&data, "train.steps=60", "optim.lr=1e-2"]).unwrap();
    let finish = run(&recipe, &dir.path().join("run"), false, None).unwrap();
    let entropy = 16f64.ln();
    let value = finish.held_out[0].1;
    assert!(
        value > entropy - 0.01 && value < entropy + 0.2,
        "{value}, entropy {entropy}"
    );
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(&["train.save_every=2", "train.loss_bound=1.0"]).unwrap();
    match run(&recipe, dir.path(), false, None) {
        Err(TrainError::Diverged { step: 0, loss }) => assert!(loss > 1.0),
        other => panic!("{other:?}"),
    }
    let fast = self::recipe(&[
        "train.save_every=1",
        "optim.lr=1e30",
        "optim.clip=0.0",
        "schedule.warmup=0",
    ])
    .unwrap();
    let error = run(&fast, &dir.path().join("fast"), false, None).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { .. }), "{error}");
    assert!(Checkpoint::latest(&dir.path().join("fast")).unwrap().is_some());
}

#[test]
fn broken_checkpoints_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(&["train.steps=2"]).unwrap();
    let finish = run(&recipe, dir.path(), false, None).unwrap();
    for file in ["model.safetensors", "optim.safetensors", "state.toml"] {
        let path = finish.checkpoint.folder.join(file);
        let good = std::fs::read(&path).unwrap();
        for bad in [Vec::new(), b"nonsense".to_vec(), good[..good.len() / 2].to_vec()] {
            std::fs::write(&path, bad).unwrap();
            let error = run(&recipe, dir.path(), true, None).unwrap_err().to_string();
            assert!(error.contains(file), "{error}");
        }
        std::fs::write(&path, good).unwrap();
    }
    std::fs::write(dir.path().join("latest"), "../../etc").unwrap();
    assert!(run(&recipe, dir.path(), true, None).is_err());
}

/// Must-show f: a recipe with any one field broken gets a clear error, never a panic.
#[test]
fn recipes_with_one_broken_field_are_refused() {
    let files = tempfile::tempdir().unwrap();
    fn walk(table: &toml::Table, at: &str, paths: &mut Vec<String>) {
        for (key, value) in table {
            let path = if at.is_empty() {
                key.clone()
            } else {
                format!("{at}.{key}")
            };
            match value {
                toml::Value::Table(inner) => walk(inner, &path, paths),
                _ => paths.push(path),
            }
        }
    }
    let bad = [
        "-1",
        "1e999",
        "nan",
        "inf",
        "\"\"",
        "\"no such thing\"",
        "[]",
        "[1, \"a\"]",
        "{}",
        "{a = 1}",
        "true",
        "-9223372036854775808",
        "9223372036854775807",
        "1979-05-27",
        "\"../..\"",
        "0.5",
    ];
    let (mut cases, mut refused) = (0, 0);
    let kinds = kinds::all(files.path());
    for kind in kinds.iter().map(Vec::as_slice).chain([[].as_slice()]) {
        let kind: Vec<&str> = kind.iter().map(String::as_str).collect();
        // With every default written out, so that every field is met.
        let base = recipe(&kind).unwrap().to_toml().unwrap();
        let mut paths = vec!["train.micro".to_string(), "model.init".to_string()];
        walk(&base.parse().unwrap(), "", &mut paths);
        assert!(paths.len() > 20, "{paths:?}");
        let [more, no] = broken(&base, &paths, &bad);
        cases += more;
        refused += no;
    }
    for cut in 0..TINY.len() {
        cases += 1;
        if TINY.is_char_boundary(cut) && Recipe::parse(&TINY[..cut], None, &[]).is_err() {
            refused += 1;
        }
    }
    assert!(cases >= 2000 && refused > cases * 3 / 4, "{refused} of {cases}");
    assert!(
        recipe(&["train.stepz=5"])
            .unwrap_err()
            .to_string()
            .contains("stepz")
    );
    assert!(
        Recipe::parse(TINY, Some("long"), &[])
            .unwrap_err()
            .to_string()
            .contains("short")
    );
    assert_eq!(Recipe::parse(TINY, Some("short"), &[]).unwrap().train.steps, 4);
}

/// Breaks each of the fields in each way; how many cases, and how many of them were refused as recipes.
fn broken(base: &str, paths: &[String], bad: &[&str]) -> [usize; 2] {
    let stop = AtomicBool::new(true);
    let (mut cases, mut refused) = (0, 0);
    for path in paths {
        let broken = bad.iter().map(|b| format!("{path}={b}")).chain([
            format!("{path}.deeper=1"),
            format!("{path}x=1"),
            path.clone(),
        ]);
        for assignment in broken {
            cases += 1;
            match Recipe::parse(base, None, std::slice::from_ref(&assignment)) {
                Err(error) => {
                    refused += 1;
                    assert!(!error.to_string().is_empty(), "{assignment}");
                }
                // What parses is a run: it starts, or says why not. (The flag ends it before its first step.)
                Ok(recipe) => {
                    let dir = tempfile::tempdir().unwrap();
                    let small = match &recipe.model {
                        RawModel::Llama(m) => m.d <= 64 && m.ffn <= 64 && m.layers <= 4,
                        RawModel::Gpt(m) => m.d <= 64 && m.ffn <= 64 && m.layers <= 4,
                        RawModel::Base { .. } => true,
                    };
                    if small {
                        let done = train(
                            &recipe,
                            dir.path(),
                            false,
                            &mut Watch {
                                stop: &stop,
                                progress: &mut |_| {},
                            },
                        );
                        assert!(
                            done.is_err_and(|e| !e.to_string().is_empty())
                                || dir.path().join("latest").exists()
                        );
                    }
                }
            }
        }
    }
    [cases, refused]
}

#[test]
fn what_is_exported_runs_in_the_engine() {
    use antefix_models::files::ModelFiles;
    use antefix_models::tokenizer::{Specials, Tokenizer};
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(&["train.steps=2"]).unwrap();
    let finish = run(&recipe, &dir.path().join("run"), false, None).unwrap();
    let to = dir.path().join("exported");
    export(&recipe, &finish.checkpoint.folder, &to).unwrap();
    let files = ModelFiles::open(&to).unwrap();
    assert_eq!(files.spec().layers, 2);
    let tokenizer = Tokenizer::open(&files).unwrap();
    let text = "1+2=3\n\u{e9}~ \t";
    let ids = tokenizer.encode(text, Specials::Plain);
    assert!(ids.iter().copied().eq(text.bytes().map(u32::from)), "{ids:?}");
    assert_eq!(tokenizer.decode(&ids), text);
}

/// What stands in `examples/train` is a recipe, with and without its profile.
#[test]
fn the_examples_are_recipes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/train");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let recipe = Recipe::read(&path, None, &[]).unwrap();
            assert_eq!(path.file_stem().unwrap(), recipe.recipe.as_str());
            names.push(recipe.recipe);
        }
    }
    assert!(names.len() >= 2, "{names:?}");
}

#[test]
fn a_model_beyond_the_memory_is_refused() {
    let recipe = recipe(&[
        "model.d=65536",
        "model.heads=64",
        "model.ffn=262144",
        "model.layers=256",
    ])
    .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = run(&recipe, dir.path(), false, None).unwrap_err().to_string();
    assert!(error.contains("GB"), "{error}");
}

/// An adapter, merged and written as GGUF, is the model that was trained; what was not trained is the file's, byte for byte.
#[test]
fn a_merged_adapter_goes_to_gguf_and_back() {
    use antefix_kernels::quant::Format;
    use antefix_models::gguf::Gguf;
    use antefix_models::spec::Arch;
    use antefix_models::testing::tiny_gguf;
    let dir = tempfile::tempdir().unwrap();
    for arch in [Arch::Llama, Arch::Qwen2] {
        let base = dir.path().join(format!("{}.gguf", arch.name()));
        std::fs::write(&base, tiny_gguf(arch, 3)).unwrap();
        let lora = "lora={rank=4, modules=['q_proj','k_proj','down_proj']}";
        let model = format!("model={{kind='base', path='{}', {lora}}}", base.display());
        let overrides = [
            model.as_str(),
            "data.tokenizer='model'",
            "train.steps=8",
            "optim.lr=2e-2",
        ];
        let recipe = recipe(&overrides).unwrap();
        let finish = run(&recipe, &dir.path().join(arch.name()), false, None).unwrap();
        let old = Gguf::open(&base).unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| (i * 29 + 3) % 200).collect();
        let want = logits_of(&recipe, &finish, &tokens);
        for (format, far) in [(Format::F32, 1e-3), (Format::Q8_0, 0.3)] {
            let to = dir.path().join("merged.gguf");
            export_gguf(&recipe, &finish.checkpoint.folder, &to, format).unwrap();
            let new = Gguf::open(&to).unwrap();
            let changed: Vec<&str> = old
                .tensors()
                .zip(new.tensors())
                .filter(|(a, b)| (a.ggml_type, a.bytes) != (b.ggml_type, b.bytes))
                .map(|(a, _)| a.name)
                .collect();
            let trained = ["attn_q.weight", "attn_k.weight", "ffn_down.weight"];
            assert!(
                changed.iter().all(|n| trained.iter().any(|t| n.ends_with(t))),
                "{changed:?}"
            );
            assert!(changed.len() >= 3);
            let got = engine_logits(&to, &tokens);
            let worst = want
                .iter()
                .zip(&got)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst <= far, "{arch:?} {format:?}: {worst}");
        }
        let before = engine_logits(&base, &tokens);
        let moved = want
            .iter()
            .zip(&before)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(moved > 0.02, "training changed the model: {moved}");
        assert!(
            export_gguf(
                &recipe,
                &finish.checkpoint.folder,
                &dir.path().join("x.gguf"),
                Format::Q4_K
            )
            .is_err()
        );
        export(&recipe, &finish.checkpoint.folder, &dir.path().join("peft")).unwrap();
        assert!(dir.path().join("peft/adapter_config.json").exists());
    }
}

fn engine_logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    use antefix_kernels::cpu::Cpu;
    use antefix_kernels::matmul::Precision;
    use antefix_kernels::team::Team;
    use antefix_models::decoder::Model;
    use std::sync::Arc;
    let files = antefix_models::files::ModelFiles::open(path).unwrap();
    let model = Model::load(files, Cpu::best(), Arc::new(Team::new(2)), Precision::F32).unwrap();
    let mut session = antefix_engine::Session::new(Arc::new(model), tokens.len(), 64);
    let mut out = Vec::new();
    session.feed(tokens, tokens.len(), &mut out).unwrap();
    out
}

fn logits_of(recipe: &Recipe, finish: &Finish, tokens: &[u32]) -> Vec<f32> {
    use crate::model::Batch;
    use crate::ops::{Packing, linear};
    use crate::prefix_grouper::LanguageModel;
    use std::sync::Arc;
    let (model, _) = super::model::build(recipe).unwrap();
    super::model::read_params(
        &finish.checkpoint.folder.join("model.safetensors"),
        model.params(),
    )
    .unwrap();
    let batch = Batch {
        tokens: Arc::new(tokens.to_vec()),
        packing: Arc::new(Packing::causal(&[tokens.len()]).unwrap()),
    };
    let hidden = model.hidden(&batch).unwrap();
    linear(&hidden, model.output(), None)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}
