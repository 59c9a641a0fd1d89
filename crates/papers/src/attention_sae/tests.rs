//! The dictionary against its reference, its files, and the laws of section 6.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use antefix_attention::Geometry;
use antefix_attention::hooks::{At, Site};
use antefix_attention::method::HookMaker;
use antefix_attention::readout::AttentionView;
use antefix_kernels::dense::Threads;
use antefix_kernels::{cpu::Cpu, team::Team};
use antefix_kv::{KvDtype, KvShape, Pool, SeqKv};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::attribute::{attribute, shares};
use super::format::{Origin, SaeError, Stored};
use super::live::{Change, Edit, Live, Maker, Rows, Wish};
use super::loaded::Loaded;
use super::reference;
use super::sae::{Architecture, Norm, Parts, Sae};

fn noise(seed: usize, i: usize) -> f32 {
    let x = (i as u64 + 1 + ((seed as u64) << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((x >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
}

fn values(seed: usize, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|i| noise(seed, i) * size).collect()
}

/// Every architecture with random weights.
fn architectures(features: usize) -> Vec<Architecture> {
    vec![
        Architecture::Standard,
        Architecture::TopK { k: 5, rescale: false },
        Architecture::TopK { k: 5, rescale: true },
        Architecture::JumpRelu {
            threshold: values(11, features, 0.7),
        },
        Architecture::Gated {
            r_mag: values(12, features, 0.5),
            b_mag: values(13, features, 0.5),
        },
    ]
}

fn parts(d_in: usize, features: usize, architecture: Architecture) -> Parts {
    Parts {
        d_in,
        features,
        architecture,
        norm: Norm::None,
        apply_b_dec: true,
        w_enc: values(1, d_in * features, 0.6),
        b_enc: values(2, features, 0.3),
        w_dec: values(3, d_in * features, 0.6),
        b_dec: values(4, d_in, 0.4),
    }
}

fn close(what: &str, got: &[f32], want: &[f64], within: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (f64::from(*g) - w).abs() <= within * (1.0 + w.abs()),
            "{what}[{i}]: {g} is not {w}"
        );
    }
}

/// The dense features of row `r`.
fn dense(sae: &Sae, codes: &super::sae::Codes, r: usize) -> Vec<f32> {
    let mut f = vec![0.0; sae.features()];
    let (ids, values) = codes.row(r);
    ids.iter().zip(values).for_each(|(&j, &x)| f[j as usize] = x);
    f
}

#[test]
fn every_architecture_and_norm_is_that_of_the_reference() {
    let (d_in, features, rows) = (12, 37, 300);
    let x = values(5, rows * d_in, 1.5);
    for architecture in architectures(features) {
        for norm in [Norm::None, Norm::ConstantRescale, Norm::LayerNorm] {
            for apply_b_dec in [true, false] {
                let mut p = parts(d_in, features, architecture.clone());
                (p.norm, p.apply_b_dec) = (norm, apply_b_dec);
                let sae = Sae::new(p.clone()).unwrap();
                let codes = sae.encode(&x, Threads::One);
                let out = sae.decode(&codes);
                assert_eq!(codes.rows(), rows);
                let mut active = 0;
                for r in 0..rows {
                    let row = &x[r * d_in..][..d_in];
                    let (f, y) = reference::run(&p, row);
                    let what = format!("{architecture:?} {norm:?} {apply_b_dec} row {r}");
                    close(&what, &dense(&sae, &codes, r), &f, 2e-6);
                    close(&what, &out[r * d_in..][..d_in], &y, 4e-6);
                    active += codes.row(r).0.len();
                }
                assert!(active > rows, "something is active");
                assert!((codes.l0() - active as f64 / rows as f64).abs() < 1e-9);
            }
        }
    }
}

#[test]
fn top_k_of_all_features_is_relu_and_a_threshold_of_zero_is_no_threshold() {
    let (d_in, features) = (8, 20);
    let x = values(6, 40 * d_in, 1.0);
    let codes = |a: Architecture| {
        Sae::new(parts(d_in, features, a))
            .unwrap()
            .encode(&x, Threads::One)
    };
    let standard = codes(Architecture::Standard);
    assert_eq!(
        standard,
        codes(Architecture::TopK {
            k: features,
            rescale: false
        })
    );
    assert_eq!(
        standard,
        codes(Architecture::JumpRelu {
            threshold: vec![0.0; features]
        })
    );
    // Fewer than all are fewer.
    let few = codes(Architecture::TopK { k: 3, rescale: false });
    assert!((0..few.rows()).all(|r| few.row(r).0.len() <= 3) && few.l0() < standard.l0());
}

#[test]
fn folding_the_decoders_norms_changes_no_output() {
    let (d_in, features) = (10, 24);
    let x = values(7, 50 * d_in, 1.2);
    for architecture in architectures(features) {
        let sae = Sae::new(parts(d_in, features, architecture.clone())).unwrap();
        let before = sae.decode(&sae.encode(&x, Threads::One));
        let folded = match sae.fold_decoder_norms() {
            Ok(folded) => folded,
            Err(e) => {
                assert_eq!(architecture, Architecture::TopK { k: 5, rescale: false }, "{e}");
                continue;
            }
        };
        assert!(folded.decoder_norms().iter().all(|n| (n - 1.0).abs() < 1e-6));
        let after = folded.decode(&folded.encode(&x, Threads::One));
        let want: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
        close(&format!("{architecture:?}"), &after, &want, 1e-5);
    }
}

#[test]
fn an_offset_and_a_scale_are_folded_as_if_the_inputs_had_them() {
    let (d_in, features) = (9, 21);
    let x = values(8, 30 * d_in, 1.0);
    let offset = values(9, d_in, 0.8);
    for apply_b_dec in [true, false] {
        let mut p = parts(d_in, features, Architecture::Standard);
        p.apply_b_dec = apply_b_dec;
        let sae = Sae::new(p).unwrap();
        let less: Vec<f32> = x.iter().enumerate().map(|(i, x)| x - offset[i % d_in]).collect();
        let want = sae.decode(&sae.encode(&less, Threads::One));
        let want: Vec<f64> = want
            .iter()
            .enumerate()
            .map(|(i, y)| f64::from(*y) + f64::from(offset[i % d_in]))
            .collect();
        let folded = sae.clone().fold_offset(&offset).unwrap();
        close(
            "offset",
            &folded.decode(&folded.encode(&x, Threads::One)),
            &want,
            1e-5,
        );
        let larger: Vec<f32> = x.iter().map(|x| x * 3.0).collect();
        let want = sae.decode(&sae.encode(&larger, Threads::One));
        let want: Vec<f64> = want.iter().map(|y| f64::from(*y) / 3.0).collect();
        // SAELens leaves `b_dec` of the input alone only where it is not applied; with it, x s - b = s (x - b / s).
        let scaled = sae.fold_input_scale(3.0).unwrap();
        close(
            "scale",
            &scaled.decode(&scaled.encode(&x, Threads::One)),
            &want,
            1e-5,
        );
    }
}

#[test]
fn an_edit_adds_the_decoders_row_and_no_edit_changes_no_bit() {
    let (d_in, features) = (12, 30);
    for architecture in architectures(features) {
        let mut p = parts(d_in, features, architecture);
        p.norm = Norm::LayerNorm;
        let sae = Sae::new(p).unwrap();
        let x = values(10, d_in, 1.0);
        let codes = sae.encode(&x, Threads::One);
        let (ids, f) = codes.row(0);
        let (j, was) = (ids[0], f[0]);
        let mut same = x.clone();
        sae.edit(&mut same, codes.frames[0], j, was, was);
        assert!(same.iter().zip(&x).all(|(a, b)| a.to_bits() == b.to_bits()));
        // x - decode(f) + decode(f') of section 3.5.
        let mut changed = codes.clone();
        changed.values[0] = was + 2.0;
        let (old, new) = (sae.decode(&codes), sae.decode(&changed));
        let want: Vec<f64> = (0..d_in)
            .map(|i| f64::from(x[i]) - f64::from(old[i]) + f64::from(new[i]))
            .collect();
        let mut got = x.clone();
        sae.edit(&mut got, codes.frames[0], j, was, was + 2.0);
        close("edited", &got, &want, 1e-5);
        assert_ne!(got, x);
    }
}

/// A file of tensors, each with its shape and its values in one of the types.
fn tensor_file(tensors: &[(&str, &[usize], &[f32])], dtype: Dtype) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|t| match dtype {
            Dtype::BF16 => {
                t.2.iter()
                    .flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes())
                    .collect()
            }
            _ => t.2.iter().flat_map(|x| x.to_le_bytes()).collect(),
        })
        .collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(t, b)| (t.0, TensorView::new(dtype, t.1.to_vec(), b).unwrap()));
    safetensors::serialize(views.collect::<Vec<_>>(), None::<HashMap<String, String>>).unwrap()
}

fn folder(cfg: &serde_json::Value, file: &str, weights: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("cfg.json"), cfg.to_string()).unwrap();
    std::fs::write(folder.path().join(file), weights).unwrap();
    folder
}

const WEIGHTS: &str = "sae_weights.safetensors";

/// A hand-made file of each format gives the features of the reference.
#[test]
fn files_of_saelens_are_read_as_it_means_them() {
    let (d, f) = (6, 15);
    let x = values(14, d, 1.3);
    let p = parts(d, f, Architecture::Standard);
    let gated = values(15, f, 0.4);
    let both = [d, f];
    let back = [f, d];
    let base: Vec<(&str, &[usize], &[f32])> = vec![
        ("W_enc", &both, &p.w_enc),
        ("W_dec", &back, &p.w_dec),
        ("b_dec", &both[..1], &p.b_dec),
    ];
    let one = [f];
    let with = |more: &[(&'static str, &Vec<f32>)]| -> Vec<u8> {
        let mut all = base.clone();
        more.iter().for_each(|(name, v)| all.push((name, &one, v)));
        tensor_file(&all, Dtype::F32)
    };
    let metadata = json!({"model_name": "m", "hook_name": "blocks.7.attn.hook_z", "context_size": 128,
        "prepend_bos": true, "sae_lens_version": "6.1.0", "dataset_path": "d"});
    let cfg = |architecture: &str, more: serde_json::Value| {
        let mut cfg = json!({"d_in": d, "d_sae": f, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": false,
            "normalize_activations": "none", "reshape_activations": "hook_z", "architecture": architecture,
            "metadata": metadata.clone()});
        for (key, value) in more.as_object().unwrap() {
            cfg[key] = value.clone();
        }
        cfg
    };
    let check = |folder: &Path, want: &Parts| {
        let stored = Stored::read(folder).unwrap_or_else(|e| panic!("{e}"));
        let codes = stored.sae.encode(&x, Threads::One);
        let (features, out) = reference::run(want, &x);
        close("features", &dense(&stored.sae, &codes, 0), &features, 1e-6);
        close("output", &stored.sae.decode(&codes), &out, 2e-6);
        stored
    };
    let want = |architecture: Architecture| Parts {
        apply_b_dec: false,
        architecture,
        ..p.clone()
    };
    let at = folder(
        &cfg("standard", json!({})),
        WEIGHTS,
        &with(&[("b_enc", &p.b_enc)]),
    );
    let stored = check(at.path(), &want(Architecture::Standard));
    assert_eq!((stored.origin.layer(), stored.origin.is_z()), (Some(7), true));
    assert_eq!(
        (stored.origin.context, stored.origin.prepend_bos),
        (Some(128), Some(true))
    );
    assert_eq!(stored.origin.more["dataset_path"], "d");
    assert!(stored.warnings.is_empty() && stored.sparsity.is_none());
    // The firing rates lie in a file of their own.
    let rates = values(18, f, 3.0);
    std::fs::write(
        at.path().join("sparsity.safetensors"),
        tensor_file(&[("sparsity", &one, &rates)], Dtype::F32),
    )
    .unwrap();
    assert_eq!(Stored::read(at.path()).unwrap().sparsity, Some(rates));

    let at = folder(
        &cfg(
            "topk",
            json!({"k": 4, "rescale_acts_by_decoder_norm": true, "apply_b_dec_to_input": true}),
        ),
        WEIGHTS,
        &with(&[("b_enc", &p.b_enc)]),
    );
    let mut topk = want(Architecture::TopK { k: 4, rescale: true });
    topk.apply_b_dec = true;
    check(at.path(), &topk);
    let threshold: Vec<f32> = gated.iter().map(|x| x.abs()).collect();
    let at = folder(
        &cfg("jumprelu", json!({"normalize_activations": "layer_norm"})),
        WEIGHTS,
        &with(&[("b_enc", &p.b_enc), ("threshold", &threshold)]),
    );
    let mut jump = want(Architecture::JumpRelu { threshold });
    jump.norm = Norm::LayerNorm;
    check(at.path(), &jump);
    let magnitude = values(16, f, 0.2);
    let at = folder(
        &cfg("gated", json!({"normalize_activations": "constant_norm_rescale"})),
        WEIGHTS,
        &with(&[("b_gate", &p.b_enc), ("r_mag", &magnitude), ("b_mag", &gated)]),
    );
    let mut gate = want(Architecture::Gated {
        r_mag: magnitude,
        b_mag: gated,
    });
    gate.norm = Norm::ConstantRescale;
    check(at.path(), &gate);
}

#[test]
fn old_files_of_saelens_and_those_of_sparsify_are_read_too() {
    let (d, f) = (6, 15);
    let x = values(14, d, 1.3);
    let p = parts(d, f, Architecture::TopK { k: 3, rescale: false });
    let tensors: Vec<(&str, &[usize], &[f32])> = vec![
        ("W_enc", &[6, 15], &p.w_enc),
        ("b_enc", &[15], &p.b_enc),
        ("W_dec", &[15, 6], &p.w_dec),
        ("b_dec", &[6], &p.b_dec),
    ];
    let ones = vec![1.0; f];
    let mut scaled = tensors.clone();
    scaled.push(("scaling_factor", &[15], &ones));
    let old = json!({"d_in": d, "d_sae": f, "hook_point": "blocks.3.attn.hook_z", "hook_point_head_index": null,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "normalize_activations": true,
        "model_name": "gpt2-small", "context_size": 64, "model_from_pretrained_kwargs": {"center_writing_weights": false}});
    let at = folder(&old, WEIGHTS, &tensor_file(&scaled, Dtype::F32));
    let stored = Stored::read(at.path()).unwrap();
    let (features, _) = reference::run(&p, &x);
    close(
        "old",
        &dense(&stored.sae, &stored.sae.encode(&x, Threads::One), 0),
        &features,
        1e-6,
    );
    assert_eq!(stored.origin.layer(), Some(3));
    assert_eq!(stored.origin.model.as_deref(), Some("gpt2-small"));
    // One warning for the missing factor, one for the folded biases.
    assert_eq!(stored.warnings.len(), 2, "{:?}", stored.warnings);
    let twos = vec![2.0; f];
    scaled.pop();
    scaled.push(("scaling_factor", &[15], &twos));
    let at = folder(&old, WEIGHTS, &tensor_file(&scaled, Dtype::F32));
    let error = Stored::read(at.path()).unwrap_err().to_string();
    assert!(error.contains("finetuning_scaling_factor"), "{error}");

    // sparsify, with the decoder either way round, in bf16.
    let turned = |v: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..cols)
            .flat_map(|c| (0..rows).map(move |r| v[r * cols + c]))
            .collect()
    };
    let rounded = |v: &[f32]| -> Vec<f32> {
        v.iter()
            .map(|x| f32::from_bits(x.to_bits() & 0xffff_0000))
            .collect()
    };
    let encoder = turned(&p.w_enc, d, f);
    let (w_dec, w_dec_t) = (p.w_dec.clone(), turned(&p.w_dec, f, d));
    for (shape, decoder) in [([f, d], &w_dec), ([d, f], &w_dec_t)] {
        let tensors: Vec<(&str, &[usize], &[f32])> = vec![
            ("encoder.weight", &[15, 6], &encoder),
            ("encoder.bias", &[15], &p.b_enc),
            ("W_dec", &shape, decoder),
            ("b_dec", &[6], &p.b_dec),
        ];
        let cfg = json!({"d_in": d, "num_latents": f, "expansion_factor": 2, "k": 3});
        let at = folder(&cfg, "sae.safetensors", &tensor_file(&tensors, Dtype::BF16));
        let stored = Stored::read(at.path()).unwrap();
        let low = Parts {
            w_enc: rounded(&p.w_enc),
            b_enc: rounded(&p.b_enc),
            w_dec: rounded(&p.w_dec),
            b_dec: rounded(&p.b_dec),
            ..p.clone()
        };
        let (features, out) = reference::run(&low, &x);
        let codes = stored.sae.encode(&x, Threads::One);
        close("sparsify", &dense(&stored.sae, &codes, 0), &features, 1e-6);
        close("sparsify", &stored.sae.decode(&codes), &out, 2e-6);
    }
}

#[test]
fn what_is_saved_is_loaded_and_saved_again_as_the_same_bytes() {
    for architecture in architectures(14) {
        let origin = Origin {
            model: Some("m".into()),
            hook: Some("blocks.2.attn.hook_z".into()),
            context: Some(128),
            prepend_bos: Some(true),
            more: serde_json::Map::from_iter([("seed".to_string(), json!(3))]),
        };
        let mut p = parts(6, 14, architecture);
        (p.norm, p.apply_b_dec) = (Norm::ConstantRescale, false);
        let mut stored = Stored::new(Sae::new(p).unwrap(), origin);
        stored.sparsity = Some(values(19, 14, 2.0));
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        stored.write(one.path()).unwrap();
        let mut read = Stored::read(one.path()).unwrap();
        read.origin.more.remove("sae_lens_version");
        assert_eq!(read, stored);
        read.write(two.path()).unwrap();
        for file in ["sae_weights.safetensors", "sparsity.safetensors", "cfg.json"] {
            let bytes = |at: &tempfile::TempDir| std::fs::read(at.path().join(file)).unwrap();
            assert!(bytes(&one) == bytes(&two), "{file}");
        }
        // A single file says the same, without the rates.
        let mut single = Stored::from_bytes(&stored.to_bytes().unwrap()).unwrap();
        single.origin.more.remove("sae_lens_version");
        assert_eq!((single.sae, single.origin), (stored.sae, stored.origin));
    }
}

#[test]
fn broken_files_are_refused_with_words() {
    let stored = Stored::new(
        Sae::new(parts(4, 9, Architecture::Standard)).unwrap(),
        Origin::default(),
    );
    let bytes = stored.to_bytes().unwrap();
    for n in (0..bytes.len()).step_by(7) {
        assert!(Stored::from_bytes(&bytes[..n]).is_err(), "{n}");
        let mut bent = bytes.clone();
        bent[n] ^= 0x7f;
        // May be read, if it still is a dictionary; must not panic.
        let _ = Stored::from_bytes(&bent);
    }
    let write = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut cfg = stored.cfg();
        change(&mut cfg);
        folder(&cfg, WEIGHTS, &bytes)
    };
    for (change, why) in [
        (
            &(|c: &mut serde_json::Value| c["d_in"] = json!(-1)) as &dyn Fn(&mut serde_json::Value),
            "`d_in`",
        ),
        (&|c| c["d_sae"] = json!(8), "W_enc"),
        (&|c| c["architecture"] = json!("matryoshka"), "matryoshka"),
        (&|c| c["architecture"] = json!("topk"), "`k`"),
        (&|c| c["architecture"] = json!("gated"), "r_mag"),
        (
            &|c| c["normalize_activations"] = json!("other"),
            "normalize_activations",
        ),
        (&|c| *c = json!([1]), "no JSON object"),
    ] {
        let at = write(change);
        let error = Stored::read(at.path()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Stored::read(empty.path()), Err(SaeError::Nothing(_))));
    let mut p = parts(4, 9, Architecture::Standard);
    p.w_dec[3] = f32::NAN;
    assert!(Sae::new(p).unwrap_err().to_string().contains("W_dec"));
    let p = parts(
        4,
        9,
        Architecture::TopK {
            k: 10,
            rescale: false,
        },
    );
    assert!(Sae::new(p).unwrap_err().to_string().contains('9'));
}

#[test]
fn shares_sum_to_one_and_are_those_of_the_reference() {
    let sae = Sae::new(parts(24, 9, Architecture::Standard)).unwrap();
    for j in 0..9 {
        let got = shares(&sae, j, 4);
        close("shares", &got, &reference::shares(sae.parts(), j, 4), 1e-6);
        assert!((got.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
}

const DIM: usize = 16;
const HEADS: usize = 4;

/// Attention over `n` keys whose outputs are exactly those of the weights that are read off again.
#[test]
fn what_heads_and_sources_give_sums_to_the_pre_activation() {
    let n = 75;
    let shape = KvShape {
        layers: 1,
        kv_heads: 2,
        dim: DIM,
        dtype: KvDtype::F32,
    };
    for window in [None, Some(40)] {
        let mut pool = Pool::new(shape, 1 << 22);
        let mut kv = SeqKv::new(shape);
        pool.reserve(&mut kv, n).expect("room");
        let (k, v) = (values(20, n * 2 * DIM, 1.0), values(21, n * 2 * DIM, 1.0));
        pool.write(&kv, 0, 0, &k, &v);
        kv.commit(n);
        let q = values(22, n * HEADS * DIM, 1.5);
        let team = Team::new(2);
        let view = AttentionView {
            run: (Cpu::best(), &team),
            pool: &pool,
            kv: &kv,
            base: 0,
            layer: 0,
            geometry: Geometry {
                heads: HEADS,
                kv_heads: 2,
                dim: DIM,
                scale: 0.25,
                softcap: None,
                window,
            },
            q: &q,
            pos0: 0,
            exact: true,
        };
        for (norm, apply_b_dec) in [(Norm::None, true), (Norm::None, false), (Norm::LayerNorm, true)] {
            let mut p = parts(HEADS * DIM, 40, Architecture::Standard);
            (p.norm, p.apply_b_dec) = (norm, apply_b_dec);
            let sae = Sae::new(p.clone()).unwrap();
            for row in [0, 31, 74] {
                let mut z = vec![0.0; HEADS * DIM];
                let mut weights = vec![vec![0.0; row + 1]; HEADS];
                for head in 0..HEADS {
                    view.each_row(head, &[row], &mut |_, w| {
                        for s in 0..=row {
                            let a = f64::from(w.at(s as u32));
                            weights[head][s] = a;
                            for d in 0..DIM {
                                z[head * DIM + d] += (a * f64::from(v[(s * 2 + head / 2) * DIM + d])) as f32;
                            }
                        }
                    });
                }
                let at: Vec<Vec<Vec<f64>>> = (0..=row)
                    .map(|s| {
                        (0..2)
                            .map(|h| (0..DIM).map(|d| f64::from(v[(s * 2 + h) * DIM + d])).collect())
                            .collect()
                    })
                    .collect();
                for a in attribute(&sae, &[0, 7, 39], &view, row, &z) {
                    assert!(a.rest_heads.abs() < 1e-5, "{norm:?} {a:?}");
                    assert!(a.rest_sources.abs() < 1e-4, "{norm:?} {a:?}");
                    assert_eq!((a.pos as usize, a.by_source().len()), (row, row + 1));
                    if norm == Norm::None {
                        let want = reference::attribution(&p, a.feature, &weights, &at);
                        for (got, want) in a.sources.iter().zip(&want) {
                            close("source", got, want, 1e-5);
                        }
                        for (got, want) in a.heads.iter().zip(&want) {
                            assert!((f64::from(*got) - want.iter().sum::<f64>()).abs() < 1e-4);
                        }
                        // `pre` is what the dictionary itself compares with 0.
                        let f = dense(&sae, &sae.encode(&z, Threads::One), 0)[a.feature];
                        assert!((a.pre.max(0.0) - f).abs() < 1e-5);
                    }
                }
            }
        }
    }
}

#[test]
fn it_conforms() {
    let profile = antefix_conformance::method::Profile {
        kind: super::KIND,
        file: "default.safetensors",
        bytes: &super::made_up,
    };
    antefix_conformance::method::check_profiled(
        &super::AttentionSae,
        Some(profile),
        &[
            "edit=3:scale:2+5:add:1.5,read=none",
            "edit=0:zero+7:set:3,read=all",
            "edit=2:set:-4,edit_at=answer",
        ],
    );
}

#[test]
fn edits_are_read_as_they_are_written() {
    let edits = Edit::parse(" 17:zero + 42:set:3.5+9:scale:-2+3:add:1e-1 ").unwrap();
    let changes: Vec<_> = edits.iter().map(|e| (e.feature, e.change)).collect();
    assert_eq!(
        changes,
        [
            (17, Change::Set(0.0)),
            (42, Change::Set(3.5)),
            (9, Change::Scale(-2.0)),
            (3, Change::Add(0.1))
        ]
    );
    assert_eq!(Edit::parse("").unwrap(), []);
    for bad in [
        "x:zero",
        "1",
        "1:set",
        "1:set:nan",
        "1:set:inf",
        "1:zero:2",
        "1:zero+1:add:2",
        "-1:zero",
        "1:mul:2",
    ] {
        assert!(Edit::parse(bad).is_err(), "{bad}");
    }
}

/// What a hook tells and changes, against the dictionary itself, whatever the steps are.
#[test]
fn live_features_are_those_of_the_dictionary_and_edits_follow_them() {
    let (d_in, features, n, prompt) = (HEADS * DIM, 30, 150usize, 100u32);
    let shape = KvShape {
        layers: 3,
        kv_heads: 2,
        dim: DIM,
        dtype: KvDtype::F32,
    };
    let (pool, kv) = (Pool::new(shape, 1 << 20), SeqKv::new(shape));
    let team = Team::new(2);
    let x = values(30, n * d_in, 1.0);
    for architecture in architectures(features) {
        let sae = Sae::new(parts(d_in, features, architecture.clone())).unwrap();
        let codes = sae.encode(&x, Threads::One);
        for (read, edit_rows) in [
            (Rows::All, Rows::Answer),
            (Rows::Answer, Rows::All),
            (Rows::None, Rows::All),
        ] {
            let wish = Wish {
                layer: 2,
                read,
                top: 4,
                edits: Edit::parse("4:set:2+9:scale:0.5+11:add:1").unwrap(),
                edit_rows,
            };
            let maker = Maker(Arc::new(
                Live::new(
                    Arc::new(Loaded::new(Stored::new(sae.clone(), Origin::default())).unwrap()),
                    wish,
                    5,
                )
                .unwrap(),
            ));
            let mut hook = maker.make(prompt as usize);
            assert_eq!((hook.wants(1), hook.wants(2)), (0, Site::Z.bit()));
            assert_eq!(
                (hook.fingerprint(), maker.sees_all()),
                (Some(5), read == Rows::All)
            );
            let mut got = x.clone();
            let mut from = 0;
            for to in [70, 71, 99, 100, 101, 150] {
                let at = At {
                    layer: 2,
                    site: Site::Z,
                    rows: to - from,
                    width: d_in,
                    pos0: from as u32,
                    prompt,
                    attention: Some(AttentionView {
                        run: (Cpu::best(), &team),
                        pool: &pool,
                        kv: &kv,
                        base: 0,
                        layer: 2,
                        geometry: Geometry {
                            heads: HEADS,
                            kv_heads: 2,
                            dim: DIM,
                            scale: 0.25,
                            softcap: None,
                            window: None,
                        },
                        q: &[],
                        pos0: from as u32,
                        exact: true,
                    }),
                };
                hook.at(&at, &mut got[from * d_in..to * d_in]);
                from = to;
            }
            let told = hook.told();
            assert_eq!(told.is_none(), read == Rows::None);
            let told: HashMap<u32, Vec<(u32, f32)>> =
                told.map(|t| t.rows.into_iter().collect()).unwrap_or_default();
            let concerned = |rows: Rows, r: usize| match rows {
                Rows::None => false,
                Rows::Answer => r >= 99,
                Rows::All => true,
            };
            for r in 0..n {
                let (row, f) = (&x[r * d_in..][..d_in], dense(&sae, &codes, r));
                assert_eq!(told.contains_key(&(r as u32)), concerned(read, r), "{r}");
                if let Some(list) = told.get(&(r as u32)) {
                    let mut want: Vec<f32> = f.iter().copied().filter(|x| *x > 0.0).collect();
                    want.sort_by(|a, b| b.total_cmp(a));
                    want.truncate(4);
                    let got: Vec<f32> = list.iter().map(|f| f.1).collect();
                    close(
                        "told",
                        &got,
                        &want.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
                        1e-5,
                    );
                }
                let mut want = row.to_vec();
                if concerned(edit_rows, r) {
                    for (j, is) in [(4, 2.0), (9, f[9] * 0.5), (11, f[11] + 1.0)] {
                        sae.edit(&mut want, codes.frames[r], j, f[j as usize], is);
                    }
                }
                close(
                    "edited",
                    &got[r * d_in..][..d_in],
                    &want.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
                    1e-5,
                );
            }
        }
    }
}
