//! Safetensors folders: the same models as the GGUF ones, in one file or in parts, and broken ones.
#![allow(clippy::unwrap_used, reason = "tests may panic")]

use std::{fs, path::PathBuf};

use antefix_kernels::quant::Format;
use antefix_models::{
    error::LoadError,
    files::{ModelFiles, Role},
    safetensors::check_header,
    spec::{Arch, LayerKind, RopeScaling, RopeStyle},
    testing::{safetensors_bytes, tiny_config, tiny_spec, tiny_tensors},
};
use serde_json::{Value, json};

/// A folder that is gone at the end of the test.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("antefix-folders-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn with(name: &str, config: &Value) -> Self {
        let dir = Self::new(name);
        dir.write("config.json", config.to_string());
        dir
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        fs::write(self.0.join(name), bytes).unwrap();
        self
    }

    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        let message = ModelFiles::open(&self.0)
            .expect_err("this folder should be refused")
            .to_string();
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
        .collect()
}

#[test]
fn folders_describe_the_same_models_as_gguf_files() {
    for arch in [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3] {
        let dir = Dir::with(arch.name(), &tiny_config(arch));
        dir.write(
            "model.safetensors",
            safetensors_bytes(&tiny_tensors(arch, 1), true),
        );
        let files = ModelFiles::open(&dir.0).unwrap();
        let mut want = tiny_spec(arch);
        // Only GGUF files have llama weights permuted.
        want.ropes
            .iter_mut()
            .for_each(|rope| rope.style = RopeStyle::Neox);
        assert_eq!(*files.spec(), want);
        assert_eq!(files.dir(), dir.0);
        for role in Role::all(want.layers) {
            assert_eq!(
                files.tensor(role).unwrap().is_some(),
                role.shape(&want).is_some(),
                "{role:?}"
            );
        }
    }
}

#[test]
fn gemma_norms_become_one_plus_w_and_nothing_else_does() {
    let tensors = tiny_tensors(Arch::Gemma3, 5);
    let value = |name: &str| tensors.iter().find(|t| t.0 == name).unwrap().2[0];
    for narrow in [false, true] {
        let dir = Dir::with(&format!("norms-{narrow}"), &tiny_config(Arch::Gemma3));
        dir.write("model.safetensors", safetensors_bytes(&tensors, narrow));
        let files = ModelFiles::open(&dir.0).unwrap();
        let norms = [
            (Role::OutputNorm, "model.norm.weight"),
            (Role::AttnNorm(0), "model.layers.0.input_layernorm.weight"),
            (
                Role::AttnPostNorm(1),
                "model.layers.1.post_attention_layernorm.weight",
            ),
            (
                Role::FfnNorm(2),
                "model.layers.2.pre_feedforward_layernorm.weight",
            ),
            (
                Role::FfnPostNorm(3),
                "model.layers.3.post_feedforward_layernorm.weight",
            ),
            (Role::AttnQNorm(0), "model.layers.0.self_attn.q_norm.weight"),
            (Role::AttnKNorm(3), "model.layers.3.self_attn.k_norm.weight"),
        ];
        for (role, name) in norms {
            let tensor = files.tensor(role).unwrap().unwrap();
            assert_eq!(
                (tensor.format, f32s(&tensor.bytes)[0]),
                (Format::F32, 1.0 + value(name)),
                "{name}"
            );
        }
        let q = files.tensor(Role::AttnQ(0)).unwrap().unwrap();
        let want = value("model.layers.0.self_attn.q_proj.weight");
        if narrow {
            assert_eq!(
                (q.format, &q.bytes[..2]),
                (Format::BF16, &want.to_le_bytes()[2..])
            );
        } else {
            assert_eq!((q.format, &q.bytes[..4]), (Format::F32, &want.to_le_bytes()[..]));
        }
    }
    let dir = Dir::with("norms-llama", &tiny_config(Arch::Llama));
    let tensors = tiny_tensors(Arch::Llama, 5);
    dir.write("model.safetensors", safetensors_bytes(&tensors, false));
    let files = ModelFiles::open(&dir.0).unwrap();
    let norm = files.tensor(Role::FfnNorm(1)).unwrap().unwrap();
    let name = "model.layers.1.post_attention_layernorm.weight";
    assert_eq!(f32s(&norm.bytes), tensors.iter().find(|t| t.0 == name).unwrap().2);
}

#[test]
fn parts_are_joined_and_cannot_lead_out_of_the_folder() {
    let tensors = tiny_tensors(Arch::Qwen3, 2);
    let (a, b) = tensors.split_at(7);
    let index = |second: &str| {
        let entry = |(i, t): (usize, &(String, Vec<usize>, Vec<f32>))| {
            (
                t.0.clone(),
                json!(if i < 7 { "model-1-of-2.safetensors" } else { second }),
            )
        };
        let map: serde_json::Map<_, _> = tensors.iter().enumerate().map(entry).collect();
        json!({ "weight_map": map }).to_string()
    };
    let dir = Dir::with("parts", &tiny_config(Arch::Qwen3));
    dir.write("model-1-of-2.safetensors", safetensors_bytes(a, true));
    dir.write("model-2-of-2.safetensors", safetensors_bytes(b, true));
    dir.write("model.safetensors.index.json", index("model-2-of-2.safetensors"));
    let parts = ModelFiles::open(&dir.0).unwrap();
    let whole_dir = Dir::with("whole", &tiny_config(Arch::Qwen3));
    whole_dir.write("model.safetensors", safetensors_bytes(&tensors, true));
    assert_eq!(
        parts.fingerprint(),
        ModelFiles::open(&whole_dir.0).unwrap().fingerprint()
    );

    for outside in [
        "../model-2-of-2.safetensors",
        "/etc/x.safetensors",
        "..",
        "C:x.safetensors",
    ] {
        dir.write("model.safetensors.index.json", index(outside))
            .refused(&[outside, "not the name"]);
    }
    dir.write("model.safetensors.index.json", index("model-3-of-2.safetensors"))
        .refused(&["model-3-of-2"]);
    dir.write("model.safetensors.index.json", index("model-2-of-2.safetensors"));
    dir.write("model-2-of-2.safetensors", safetensors_bytes(&tensors, true))
        .refused(&["in another part"]);
    dir.write("model.safetensors.index.json", "[]")
        .refused(&["weight_map"]);
}

/// The specification of a llama folder whose configuration has these keys changed; `null` removes one.
fn llama_with(name: &str, changes: &Value) -> Result<antefix_models::spec::ModelSpec, LoadError> {
    spec_with(name, Arch::Llama, changes)
}

fn spec_with(name: &str, arch: Arch, changes: &Value) -> Result<antefix_models::spec::ModelSpec, LoadError> {
    let mut config = tiny_config(arch);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let dir = Dir::with(name, &config);
    dir.write(
        "model.safetensors",
        safetensors_bytes(&tiny_tensors(arch, 1), true),
    );
    ModelFiles::open(&dir.0).map(|files| files.spec().clone())
}

#[test]
fn rope_scalings() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let want = RopeScaling::Llama3 {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original: 8192.0,
    };
    let spec = llama_with("llama3", &json!({ "rope_scaling": llama3 })).unwrap();
    assert_eq!(spec.ropes[0].scaling, want);
    let mut v5 = llama3.clone();
    v5["rope_theta"] = json!(500_000.0);
    let spec = llama_with("llama3-v5", &json!({ "rope_parameters": v5, "rope_theta": null })).unwrap();
    assert_eq!((&spec.ropes[0].scaling, spec.ropes[0].base), (&want, 5e5));
    let linear = json!({"rope_scaling": {"type": "linear", "factor": 2}});
    assert_eq!(
        llama_with("linear", &linear).unwrap().ropes[0].scaling,
        RopeScaling::Linear(2.0)
    );
    for bad in [
        json!({"type": "yarn", "factor": 4}),
        json!({"type": "linear"}),
        json!({"type": "linear", "factor": 0}),
    ] {
        assert!(
            llama_with("rope-bad", &json!({ "rope_scaling": bad })).is_err(),
            "{bad}"
        );
    }
    let gemma = json!({"rope_theta": null, "rope_local_base_freq": null, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0}}});
    let ropes = spec_with("gemma-v5", Arch::Gemma3, &gemma).unwrap().ropes;
    assert_eq!(
        (ropes[0].base, &ropes[0].scaling),
        (1e6, &RopeScaling::Linear(8.0))
    );
    assert_eq!((ropes[1].base, &ropes[1].scaling), (2e4, &RopeScaling::None));
}

#[test]
fn llama3_frequencies_keep_the_fast_and_slow_down_the_slow() {
    let mut rope = tiny_spec(Arch::Llama).ropes[0].clone();
    (rope.base, rope.dims) = (5e5, 128);
    let plain = rope.frequencies();
    rope.scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original: 8192.0,
    };
    let scaled = rope.frequencies();
    assert_eq!((plain[0], scaled[0]), (1.0, 1.0));
    assert!((scaled[63] * 8.0 / plain[63] - 1.0).abs() < 1e-6);
    let ratios: Vec<f32> = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
    assert!(ratios.windows(2).all(|w| w[0] <= w[1] * 1.000_001), "{ratios:?}");
    assert!(
        ratios.iter().any(|&r| r > 1.01 && r < 7.9),
        "some are blended: {ratios:?}"
    );
}

#[test]
fn windows() {
    let all = |window| vec![LayerKind { rope: 0, window }; 2];
    let mistral = json!({"model_type": "mistral", "sliding_window": 64});
    assert_eq!(
        llama_with("mistral", &mistral).unwrap().layer_kinds,
        all(Some(64))
    );
    let none = json!({"model_type": "mistral", "sliding_window": null});
    assert_eq!(llama_with("mistral-none", &none).unwrap().layer_kinds, all(None));
    let off = json!({"sliding_window": 64, "use_sliding_window": false});
    assert_eq!(
        spec_with("qwen-off", Arch::Qwen3, &off).unwrap().layer_kinds,
        all(None)
    );
    let upper = json!({"sliding_window": 64, "use_sliding_window": true, "max_window_layers": 1});
    let kinds = spec_with("qwen-upper", Arch::Qwen3, &upper).unwrap().layer_kinds;
    assert_eq!(
        kinds,
        [
            LayerKind {
                rope: 0,
                window: None
            },
            LayerKind {
                rope: 0,
                window: Some(64)
            }
        ]
    );
    let types = [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ];
    let kinds = spec_with("gemma-types", Arch::Gemma3, &json!({ "layer_types": types }))
        .unwrap()
        .layer_kinds;
    assert_eq!(
        kinds.iter().map(|k| k.window.is_some()).collect::<Vec<_>>(),
        [false, true, true, false]
    );
    assert!(
        spec_with(
            "gemma-short",
            Arch::Gemma3,
            &json!({ "layer_types": ["full_attention"] })
        )
        .is_err()
    );
}

#[test]
fn wrong_configurations_are_refused_by_name() {
    let cases = [
        (json!({"model_type": "mamba"}), "`mamba`"),
        (json!({"quantization_config": {"quant_method": "awq"}}), "`awq`"),
        (json!({"num_local_experts": 8}), "mixture of experts"),
        (json!({"attention_bias": true}), "attention_bias"),
        (json!({"hidden_act": "relu"}), "`relu`"),
        (json!({"num_hidden_layers": u64::MAX}), "num_hidden_layers"),
        (json!({"num_hidden_layers": -1}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 3}), "layers.2"),
        (json!({"num_hidden_layers": 1}), "layers.1"),
        (json!({"hidden_size": null}), "hidden_size"),
        (json!({"hidden_size": 96}), "model.embed_tokens.weight"),
        (json!({"num_attention_heads": 0}), "heads"),
        (json!({"head_dim": 12}), "multiple of 16"),
        (json!({"vocab_size": 1_000_000}), "vocab_size"),
        (json!({"rms_norm_eps": "small"}), "rms_norm_eps"),
    ];
    for (changes, part) in cases {
        let message = llama_with("wrong", &changes)
            .expect_err("should be refused")
            .to_string();
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    let error = ModelFiles::open(&PathBuf::from("/nowhere/model.gguf")).unwrap_err();
    assert!(matches!(error, LoadError::Io { .. }), "{error}");
    Dir::new("empty").refused(&["no model", "hint:"]);
    Dir::with("no-tensors", &tiny_config(Arch::Llama)).refused(&["no model"]);
    Dir::new("not-json")
        .write("config.json", "{")
        .refused(&["config.json", "not JSON"]);
    Dir::new("deep")
        .write("config.json", "[".repeat(100_000))
        .refused(&["config.json", "not JSON"]);
}

#[test]
fn broken_headers_are_errors() {
    let bytes = safetensors_bytes(
        &[
            ("x".into(), vec![2, 3], vec![1.0; 6]),
            ("y".into(), vec![1], vec![0.0]),
        ],
        false,
    );
    assert_eq!(check_header(&bytes), Ok(2));
    for len in 0..bytes.len() {
        check_header(&bytes[..len]).expect_err("truncated");
    }
    for at in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut broken = bytes.clone();
            broken[at] ^= flip;
            let _ = check_header(&broken);
        }
    }
    let file = |header: &str| {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.extend([0; 64]);
        out
    };
    let max = usize::MAX;
    let half = 1usize << 63;
    for header in [
        format!(r#"{{"x":{{"dtype":"U8","shape":[{max}],"data_offsets":[0,{max}]}}}}"#),
        format!(r#"{{"x":{{"dtype":"F32","shape":[{half},2],"data_offsets":[0,0]}}}}"#),
        format!(r#"{{"x":{{"dtype":"F32","shape":[{half}],"data_offsets":[0,0]}}}}"#),
        r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#.into(),
        r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#.into(),
        r#"{"x":{"dtype":"Q4","shape":[2],"data_offsets":[0,4]}}"#.into(),
        "[".repeat(100_000),
    ] {
        check_header(&file(&header)).expect_err(&header[..60.min(header.len())]);
    }
    check_header(&[0xff; 16]).expect_err("a header longer than memory");
}
