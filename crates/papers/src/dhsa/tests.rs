//! dhsa: golden figures of its reference, its predictor's files, and the fast part against the reference.

use std::collections::HashMap;

use antefix_attention::method::{Chosen, Facts, Profiles, RawChoice};
use antefix_conformance::method::{Profile, Rng};
use antefix_kernels::ops::{Rope, RopeStyle};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::predictor::PredictorError;
use super::reference::Boundaries;
use super::*;
use crate::plan_case::{Lcg, PlanCase, Shape, planner};
use crate::plan_laws;
use crate::sparse_baselines::reference as baselines;

/// A file to be written: metadata, and tensors with their shapes.
#[derive(Clone)]
struct Made {
    texts: HashMap<String, String>,
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl Made {
    fn new(texts: &[(&str, &str)], tensors: &[(&str, &[usize])], mut value: impl FnMut(&str) -> f32) -> Self {
        let own = |(key, text): &(&str, &str)| ((*key).to_owned(), (*text).to_owned());
        let filled = |(name, shape): &(&str, &[usize])| {
            let values = (0..shape.iter().product()).map(|_| value(name)).collect();
            ((*name).to_owned(), shape.to_vec(), values)
        };
        Self {
            texts: texts.iter().map(own).collect(),
            tensors: tensors.iter().map(filled).collect(),
        }
    }

    /// Random weights for keys of `channels` values.
    fn random(seed: u64, variant: &str, channels: usize) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (c, width, hidden) = (channels, if variant == "attention" { channels } else { 6 }, 5);
        let text = c.to_string();
        let mut texts = vec![
            ("format", predictor::FORMAT),
            ("variant", variant),
            ("channels", &text),
            ("window", "4"),
            ("rope", "post"),
        ];
        let mut tensors: Vec<(&str, Vec<usize>)> = match variant {
            "attention" => {
                texts.push(("heads", "2"));
                vec![
                    ("in.weight", vec![3 * c, c]),
                    ("in.bias", vec![3 * c]),
                    ("out.weight", vec![c, c]),
                    ("out.bias", vec![c]),
                    ("norm.weight", vec![c]),
                    ("norm.bias", vec![c]),
                ]
            }
            _ => vec![
                ("depth.weight", vec![c, 4]),
                ("depth.bias", vec![c]),
                ("point.weight", vec![width, c]),
                ("point.bias", vec![width]),
            ],
        };
        tensors.extend([
            ("hidden.weight", vec![hidden, 4 * width + 1]),
            ("hidden.bias", vec![hidden]),
            ("score.weight", vec![1, hidden]),
            ("score.bias", vec![1]),
        ]);
        let tensors: Vec<(&str, &[usize])> = tensors.iter().map(|(n, s)| (*n, &s[..])).collect();
        Self::new(&texts, &tensors, |_| rng.f32() * 2.0 - 1.0)
    }

    fn bytes(&self) -> Vec<u8> {
        let raw: Vec<Vec<u8>> = self
            .tensors
            .iter()
            .map(|(_, _, values)| values.iter().flat_map(|x| x.to_le_bytes()).collect())
            .collect();
        let views = self.tensors.iter().zip(&raw).map(|((name, shape, _), bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
            (name.clone(), view)
        });
        safetensors::serialize(views, Some(self.texts.clone())).unwrap()
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<usize>, Vec<f32>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }
}

#[test]
fn it_conforms() {
    antefix_conformance::method::check_profiled(
        &Dhsa,
        Some(Profile {
            kind: KIND,
            file: "default.safetensors",
            bytes: &|facts| Made::random(3, "convolution", facts.kv_heads * facts.dim).bytes(),
        }),
        &[
            "boundaries=fixed,block=32,least=64,share=0.1,sinks=4,local=16,length=8",
            "block=64,least=100,share=0.05,sinks=2,local=16,unit=layer,dense_tail=false",
            "boundaries=predictor,block=32,least=80,share=0.1,local=0,unit=query_head,theta=0.3",
            "rule=vs,block=32,chunk=2,least=100,share=0.1,unit=query_head",
        ],
    );
}

fn close(got: &[f64], want: &[f64], within: f64) {
    let off = got
        .iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max);
    assert!(got.len() == want.len() && off < within, "{got:?} for {want:?}");
}

fn narrow(rows: &[Vec<f64>]) -> Vec<f32> {
    rows.iter().flatten().map(|&x| x as f32).collect()
}

const GOLDEN: [f64; 6] = [-2.29326, -2.38878, -2.3379, -2.1979, -2.21516, -2.13636];

#[test]
fn the_predictor_gives_the_golden_logits() {
    let mut lcg = Lcg(8);
    let x = lcg.rows(6, 4, 1.0);
    let (input, input_bias) = (lcg.rows(12, 4, 1.0), lcg.rows(1, 12, 1.0).remove(0));
    let (output, output_bias) = (lcg.rows(4, 4, 1.0), lcg.rows(1, 4, 1.0).remove(0));
    let norm = (lcg.rows(1, 4, 1.0).remove(0), lcg.rows(1, 4, 1.0).remove(0));
    let (hidden, hidden_bias) = (lcg.rows(3, 17, 1.0), lcg.rows(1, 3, 1.0).remove(0));
    let (score, score_bias) = (lcg.rows(1, 3, 1.0), lcg.rows(1, 1, 1.0).remove(0));
    let plain = reference::Predictor {
        window: 2,
        heads: 2,
        input: (input, input_bias),
        output: (output, output_bias),
        norm,
        hidden: (hidden, hidden_bias),
        score: (score, score_bias),
    };
    close(&plain.logits(&x), &GOLDEN, 6e-6);
    // The same out of a file.
    let texts = [
        ("format", predictor::FORMAT),
        ("variant", "attention"),
        ("channels", "4"),
        ("window", "2"),
        ("heads", "2"),
        ("rope", "post"),
    ];
    let mut file = Made::new(&texts, &[], |_| 0.0);
    for (name, (weight, bias)) in [
        ("in", &plain.input),
        ("out", &plain.output),
        ("hidden", &plain.hidden),
        ("score", &plain.score),
    ] {
        let shape = vec![weight.len(), weight[0].len()];
        file.tensors
            .push((format!("{name}.weight"), shape, narrow(weight)));
        file.tensors.push((
            format!("{name}.bias"),
            vec![bias.len()],
            narrow(std::slice::from_ref(bias)),
        ));
    }
    for (name, values) in [("norm.weight", &plain.norm.0), ("norm.bias", &plain.norm.1)] {
        file.tensors
            .push((name.into(), vec![4], narrow(std::slice::from_ref(values))));
    }
    let read = Predictor::read(&file.bytes()).unwrap();
    let logits = read.logits(&narrow(&x), 0..6);
    close(
        &logits.into_iter().map(f64::from).collect::<Vec<_>>(),
        &GOLDEN,
        2e-5,
    );
}

#[test]
fn the_convolution_is_that_of_its_definition() {
    let (c, w, width) = (3, 4, 6);
    let mut made = Made::random(5, "convolution", c);
    let mut rng = fastrand::Rng::with_seed(6);
    let x: Vec<f32> = (0..11 * c).map(|_| rng.f32() * 2.0 - 1.0).collect();
    let got = Predictor::read(&made.bytes()).unwrap().logits(&x, 0..11);
    let mut of = |name: &str| -> Vec<f64> { made.tensor(name).2.iter().map(|&x| x.into()).collect() };
    let (depth, depth_bias) = (of("depth.weight"), of("depth.bias"));
    let (point, point_bias) = (of("point.weight"), of("point.bias"));
    let (hidden, hidden_bias) = (of("hidden.weight"), of("hidden.bias"));
    let (score, score_bias) = (of("score.weight"), of("score.bias"));
    let key = |j: i64, ch: usize| match usize::try_from(j) {
        Ok(j) if j < 11 => f64::from(x[j * c + ch]),
        _ => 0.0,
    };
    let side = |from: i64| -> Vec<f64> {
        let one = |ch: usize| {
            let sum: f64 = (0..w).map(|t| depth[ch * w + t] * key(from + t as i64, ch)).sum();
            (sum + depth_bias[ch]).max(0.0)
        };
        let y: Vec<f64> = (0..c).map(one).collect();
        (0..width)
            .map(|o| ((0..c).map(|i| point[o * c + i] * y[i]).sum::<f64>() + point_bias[o]).max(0.0))
            .collect()
    };
    let want: Vec<f64> = (0..11i64)
        .map(|j| {
            let (l, r) = (side(j + 1 - w as i64), side(j + 1));
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let mut f = [l.clone(), r.clone()].concat();
            f.extend(l.iter().zip(&r).map(|(l, r)| (l - r).abs()));
            f.extend(l.iter().zip(&r).map(|(l, r)| l * r));
            f.push(dot(&l, &r) / (dot(&l, &l).sqrt().max(1e-6) * dot(&r, &r).sqrt().max(1e-6)));
            let h: Vec<f64> = (0..5)
                .map(|o| (dot(&hidden[o * f.len()..(o + 1) * f.len()], &f) + hidden_bias[o]).max(0.0))
                .collect();
            dot(&score, &h) + score_bias[0]
        })
        .collect();
    close(&got.into_iter().map(f64::from).collect::<Vec<_>>(), &want, 1e-4);
}

#[test]
fn files_that_do_not_fit_are_refused_with_the_reason() {
    let good = Made::random(1, "attention", 8);
    assert!(Predictor::read(&good.bytes()).is_ok());
    assert!(Predictor::read(&Made::random(1, "convolution", 8).bytes()).is_ok());
    let refused = |change: &dyn Fn(&mut Made), why: &str| {
        let mut made = good.clone();
        change(&mut made);
        let error = Predictor::read(&made.bytes()).unwrap_err().to_string();
        assert!(error.contains(why), "{error} for {why}");
    };
    let text = |key: &'static str, value: &'static str| {
        move |made: &mut Made| {
            made.texts.insert(key.into(), value.into());
        }
    };
    refused(
        &text("format", "dhsa 2"),
        "`format` in its metadata is `dhsa 2`, but must be antefix dhsa",
    );
    refused(
        &|m| drop(m.texts.remove("window")),
        "`window` in its metadata is missing",
    );
    refused(&text("window", "0"), "1 to 64");
    refused(&text("window", "65"), "1 to 64");
    refused(&text("channels", "-1"), "`channels`");
    refused(&text("heads", "3"), "a divisor of 8");
    refused(&text("heads", "0"), "a divisor of 8");
    refused(&text("rope", "pre"), "`post`");
    refused(&text("variant", "stack"), "`attention` or `convolution`");
    refused(
        &text("variant", "convolution"),
        "tensor `depth.weight` is missing",
    );
    refused(
        &text("channels", "4"),
        "tensor `in.weight` is [24, 8], but must be [12, 4]",
    );
    refused(
        &|m| m.tensors.retain(|t| t.0 != "score.bias"),
        "tensor `score.bias` is missing",
    );
    refused(
        &|m| m.tensor("norm.bias").0 = "norm.shift".into(),
        "tensor `norm.bias` is missing",
    );
    refused(
        &|m| m.tensors.push(("extra.weight".into(), vec![1], vec![0.0])),
        "tensor `extra.weight` is none",
    );
    refused(
        &|m| m.tensor("hidden.bias").1 = vec![5, 1],
        "tensor `hidden.bias` is [5, 1]",
    );
    refused(
        &|m| m.tensor("out.bias").2[3] = f32::NAN,
        "tensor `out.bias` holds values",
    );
    for bytes in [&b""[..], &[0; 7], &[255; 64], b"\x02\0\0\0\0\0\0\0{}"] {
        assert!(Predictor::read(bytes).is_err());
    }
    let huge = br#"{"in.bias":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,18446744073709551615]}}"#;
    let mut bytes = (huge.len() as u64).to_le_bytes().to_vec();
    bytes.extend(huge);
    assert!(matches!(Predictor::read(&bytes), Err(PredictorError::Broken(_))));
}

#[test]
fn no_file_makes_the_reader_panic() {
    let mut rng = Rng(9);
    for variant in ["attention", "convolution"] {
        let good = Made::random(2, variant, 4).bytes();
        for _ in 0..3000 {
            let mut bytes = good.clone();
            for _ in 0..1 + rng.bits() % 4 {
                // Headers more often than weights.
                let n = if rng.bits().is_multiple_of(4) {
                    bytes.len()
                } else {
                    bytes.len().min(700)
                };
                let at = rng.bits() as usize % n.max(1);
                match rng.bits() % 3 {
                    0 if at < bytes.len() => bytes[at] = rng.bits() as u8,
                    1 => bytes.truncate(at),
                    _ => bytes.insert(
                        at.min(bytes.len()),
                        b"0123456789[]{},:\""[rng.bits() as usize % 17],
                    ),
                }
            }
            if let Ok(read) = Predictor::read(&bytes) {
                let x = vec![0.5; read.channels() * 20];
                assert_eq!(read.logits(&x, 0..20).len(), 20);
            }
        }
    }
}

/// A program with the predictor in this file.
fn with_file(bytes: &[u8]) -> Result<antefix_attention::method::Program, RigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let raw = RawChoice::parse(&format!("dhsa,boundaries=predictor,predictor={}", path.display())).unwrap();
    let knobs = Knobs::new(&CARD, &raw.knobs).unwrap();
    // The same name each time: what differs is in the file.
    Rig::assemble(
        &Facts::example(),
        &Profiles::default().or_paths(),
        &[Chosen { method: &Dhsa, knobs }],
    )
}

#[test]
fn a_predictor_fits_the_model_or_is_refused_with_a_hint() {
    assert!(with_file(&Made::random(1, "convolution", 32).bytes()).is_ok());
    let error = with_file(&Made::random(1, "convolution", 8).bytes())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("keys of 8 values, the model's have 32") && error.contains("hint"),
        "{error}"
    );
    let error = with_file(b"not a file").unwrap_err().to_string();
    assert!(error.contains("no whole safetensors file"), "{error}");
    let knobs = RawChoice::parse("dhsa,boundaries=predictor").unwrap();
    let knobs = Knobs::new(&CARD, &knobs.knobs).unwrap();
    let error = crate::plan_case::planner_with(&Dhsa, knobs)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`default`") && error.contains("boundaries=cosine"),
        "{error}"
    );
}

#[test]
fn pages_under_one_predictor_are_not_shared_with_those_under_another() {
    let folder = tempfile::tempdir().unwrap();
    let dhsa = folder.path().join("dhsa");
    std::fs::create_dir(&dhsa).unwrap();
    let salt = |bytes: &[u8]| {
        std::fs::write(dhsa.join("p.safetensors"), bytes).unwrap();
        let raw = RawChoice::parse("dhsa,boundaries=predictor,predictor=p").unwrap();
        let knobs = Knobs::new(&CARD, &raw.knobs).unwrap();
        let profiles = Profiles::named_in(vec![folder.path().to_owned()]);
        let program = Rig::assemble(&Facts::example(), &profiles, &[Chosen { method: &Dhsa, knobs }]);
        program.unwrap().salted(7)
    };
    let [one, other] = [1, 2].map(|seed| Made::random(seed, "convolution", 32).bytes());
    assert_eq!(salt(&one), salt(&one));
    assert_ne!(salt(&one), salt(&other));
}

#[test]
fn boundaries_scores_and_choices_are_the_golden_ones() {
    let mut lcg = Lcg(7);
    let (q, k) = (lcg.rows(48, 16, 2.0), lcg.rows(48, 8, 2.0));
    let logits: Vec<f64> = lcg.rows(1, 48, 1.0).remove(0);
    let bounds = Boundaries {
        gaps: 1..46,
        forced: vec![40],
        theta: 0.3,
        nms: 2,
        max: 10,
    }
    .of(&logits, 48);
    assert_eq!(bounds, [0, 2, 6, 11, 14, 23, 27, 37, 41, 48]);
    let q: Vec<Vec<f64>> = q
        .iter()
        .map(|q| (0..8).map(|d| f64::midpoint(q[d], q[8 + d])).collect())
        .collect();
    let scores = |i: usize, sqrt_len| reference::chunk_scores(&q[i * 8..(i + 1) * 8], &k, &bounds, sqrt_len);
    close(
        &scores(4, true),
        &[
            -0.3105, 1.8308, 0.876, -0.1754, 6.2525, 2.079, 3.259, 1.6345, -2.4733,
        ],
        6e-5,
    );
    let tokens = |i: usize, sqrt_len| reference::token_scores(&scores(i, sqrt_len), &bounds, (i + 1) * 8);
    let list = |ranges: &[Range<usize>]| -> Vec<usize> { ranges.iter().cloned().flatten().collect() };
    let best = reference::best_tokens(&tokens(4, true), 16, 4);
    assert_eq!(best, list(&[14..23, 27..30, 36..40]));
    assert_eq!(reference::spliced(best, 2), list(&[0..2, 16..23, 27..30, 36..40]));
    let ours = |i, sqrt_len| reference::chosen(&tokens(i, sqrt_len), 16, 2, 4);
    assert_eq!(ours(4, true), list(&[0..2, 14..23, 27..28, 36..40]));
    assert_eq!(ours(4, false), list(&[0..2, 14..24, 36..40]));
    let best = reference::best_tokens(&tokens(3, true), 16, 4);
    assert_eq!(best, list(&[2..6, 14..18, 23..27, 28..32]));
    assert_eq!(
        reference::spliced(best, 2),
        list(&[0..2, 4..6, 14..18, 23..27, 28..32])
    );
    assert_eq!(ours(3, true), list(&[0..6, 14..16, 23..27, 28..32]));
}

#[test]
fn plain_choices_are_the_golden_ones() {
    let mut lcg = Lcg(51);
    let (q, k) = (lcg.rows(32, 8, 2.0), lcg.rows(32, 8, 2.0));
    let bounds = [0, 5, 8, 17, 20, 29, 32];
    let scores = |i: usize| reference::chunk_scores(&q[i * 8..(i + 1) * 8], &k, &bounds, true);
    close(
        &scores(2),
        &[4.8736, -4.2478, -2.3993, -8.3999, 9.2376, 5.0708],
        6e-5,
    );
    let kept = |i: usize| {
        let tokens = reference::token_scores(&scores(i), &bounds, (i + 1) * 8);
        reference::best_tokens(&tokens, 12, 4)
    };
    let list = |ranges: &[Range<usize>]| -> Vec<usize> { ranges.iter().cloned().flatten().collect() };
    assert_eq!(kept(0), (0..8).collect::<Vec<_>>());
    assert_eq!(kept(1), list(&[0..4, 8..16]));
    assert_eq!(kept(2), list(&[0..5, 8..11, 20..24]));
    assert_eq!(kept(3), (20..32).collect::<Vec<_>>());
}

#[test]
fn lines_and_blocks_of_the_second_version_are_the_golden_ones() {
    let mut lcg = Lcg(6);
    let (q, k) = (lcg.rows(64, 8, 2.0), lcg.rows(64, 8, 2.0));
    let weights = baselines::weights(&q[48..], &k, 8f64.powf(-0.5));
    let (columns, distances) = baselines::lines(&weights);
    let lines = reference::Lines::of(columns, distances, 24);
    assert_eq!(lines.chosen.0, [2, 12, 13, 19, 20, 21, 22, 26, 34, 47, 50, 55]);
    assert_eq!(lines.chosen.1, [3, 4, 5, 15, 28, 33, 35, 36, 37, 39, 43, 47]);
    let scores = lines.scores(32..48, 4);
    let want = [
        3.5889, 3.1079, 2.751, 2.0719, 1.1448, 1.6944, 1.1066, 1.8687, 2.2564, 1.5176, 1.5176, 0.9861,
    ];
    close(&scores, &want, 6e-5);
    // The published code forces the last block only, ours all of the block's own.
    assert_eq!(reference::best_blocks(&scores, 11, 6), [0, 1, 2, 3, 8, 11]);
    assert_eq!(reference::best_blocks(&scores, 8, 6), [0, 1, 8, 9, 10, 11]);
}

#[test]
fn the_second_version_reads_the_blocks_of_its_reference() {
    for (seed, shape, unit) in [
        (1, Shape(4, 2, 16), "query_head"),
        (2, Shape(3, 1, 32), "kv_group"),
        (3, Shape(4, 2, 16), "layer"),
    ] {
        let case = PlanCase::random(seed, shape, 811);
        let text = format!("rule=vs,block=64,chunk=4,share=0.3,least=100,dense_tail=false,unit={unit}");
        let plans = case.plans(&planner(&Dhsa, &text));
        let group = shape.0 / shape.1;
        for head in [0, shape.0 - 1] {
            let heads = match unit {
                "query_head" => head..head + 1,
                "layer" => 0..shape.0,
                _ => head / group * group..(head / group + 1) * group,
            };
            let kept = case.kept(&plans, head);
            for from in (0..case.n).step_by(256) {
                let to = (from + 256).min(case.n);
                let mut weights = Vec::new();
                for h in heads.clone() {
                    let rows = to - 64.min(to - from)..to;
                    let (q, k) = (case.queries(h), case.keys(h / group));
                    weights.extend(baselines::weights(
                        &q[rows],
                        &k[..to],
                        f64::from(case.geometry.scale),
                    ));
                }
                weights.sort_by_key(Vec::len);
                let (columns, distances) = baselines::lines(&weights);
                let budget = 100.max((0.3 * to as f64).ceil() as usize);
                let lines = reference::Lines::of(columns, distances, budget / 32 * 32);
                for start in (from..to).step_by(64) {
                    let end = (start + 64).min(to);
                    let scores = lines.scores(start..start + 64, 32);
                    let scores = &scores[..end.div_ceil(32)];
                    let blocks = reference::best_blocks(scores, start / 32, budget / 32);
                    for (pos, kept) in (start..end).zip(&kept[start..end]) {
                        let read = |&k: &u32| budget >= to || blocks.contains(&(k as usize / 32));
                        let want: Vec<u32> = (0..=pos as u32).filter(read).collect();
                        assert_eq!(kept, &want, "seed {seed}, head {head}, row {pos}");
                    }
                }
            }
        }
    }
}

#[test]
fn chunks_of_one_key_are_the_true_best_ones() {
    let mut lcg = Lcg(3);
    let (q, k) = (lcg.rows(1, 8, 2.0), lcg.rows(40, 8, 2.0));
    let bounds: Vec<usize> = (0..=40).collect();
    let tokens = reference::token_scores(&reference::chunk_scores(&q, &k, &bounds, true), &bounds, 40);
    let products: Vec<f64> = k.iter().map(|k| baselines::dot(&q[0], k)).collect();
    let mut best = baselines::ranked(&products);
    best.truncate(9);
    best.sort_unstable();
    assert_eq!(reference::chosen(&tokens, 9, 0, 0), best);
}

/// Keys of all KV heads side by side, turned back by the angles of the test's layer: pairs `i`, `i + 4` of the first eight dimensions, one
/// radian a position.
fn turned_back(case: &PlanCase) -> Vec<Vec<f64>> {
    (0..case.n)
        .map(|pos| {
            let (sin, cos) = (-(pos as f64)).sin_cos();
            let head = |head: usize| {
                let mut k = case.keys(head).swap_remove(pos);
                for i in 0..4 {
                    (k[i], k[i + 4]) = (k[i] * cos - k[i + 4] * sin, k[i] * sin + k[i + 4] * cos);
                }
                k
            };
            (0..case.geometry.kv_heads).flat_map(head).collect()
        })
        .collect()
}

#[test]
fn it_reads_what_its_reference_chooses() {
    for (seed, shape, settings, cosine, unit) in [
        (1, Shape(4, 2, 16), "boundaries=fixed,length=8", None, "kv_group"),
        (2, Shape(3, 1, 16), "window=4,nms=8", Some((4, 8)), "query_head"),
        (3, Shape(4, 2, 16), "window=3,nms=5", Some((3, 5)), "layer"),
        (
            4,
            Shape(7, 1, 16),
            "window=4,nms=8,norm=mean",
            Some((4, 8)),
            "kv_group",
        ),
    ] {
        let case = PlanCase::random(seed, shape, 1221);
        let (length, group) = (if cosine.is_some() { 16 } else { 8 }, shape.0 / shape.1);
        let text =
            format!("{settings},block=32,share=0.2,least=70,sinks=5,local=20,dense_tail=false,unit={unit}");
        let plans = case.plans(&planner(&Dhsa, &text));
        let plain = turned_back(&case);
        let mut borders: Vec<usize> = Vec::new();
        for start in (0..case.n / WINDOW).map(|w| w * WINDOW) {
            let end = start + WINDOW;
            match cosine {
                None => borders.extend((start..end).step_by(length)),
                Some((w, nms)) => {
                    let rule = Boundaries {
                        gaps: w..WINDOW - w,
                        forced: Vec::new(),
                        theta: f64::NEG_INFINITY,
                        nms,
                        max: WINDOW / length,
                    };
                    let bounds = rule.of(&reference::turns(&plain[start..end], w), WINDOW);
                    borders.extend(bounds[..bounds.len() - 1].iter().map(|b| start + b));
                }
            }
        }
        for head in [0, shape.0 - 1] {
            let heads = match unit {
                "query_head" => head..head + 1,
                "layer" => 0..shape.0,
                _ => head / group * group..(head / group + 1) * group,
            };
            let average = |of: Vec<Vec<Vec<f64>>>| -> Vec<Vec<f64>> {
                let row = |t: usize| {
                    let rows: Vec<Vec<f64>> = of.iter().map(|x| x[t].clone()).collect();
                    baselines::mean(&rows)
                };
                (0..case.n).map(row).collect()
            };
            let q = average(heads.clone().map(|h| case.queries(h)).collect());
            let kv = heads.start / group..(heads.end - 1) / group + 1;
            let k = average(kv.map(|h| case.keys(h)).collect());
            let kept = case.kept(&plans, head);
            for start in (0..case.n).step_by(32) {
                let end = (start + 32).min(case.n);
                let open = start / WINDOW * WINDOW;
                let mut bounds: Vec<usize> = borders.iter().copied().filter(|&b| b < open).collect();
                bounds.extend((open..start).step_by(length));
                bounds.extend([start, end]);
                bounds.dedup();
                let sqrt_len = !settings.contains("norm=mean");
                let scores = reference::chunk_scores(&q[start..end], &k, &bounds, sqrt_len);
                let tokens = reference::token_scores(&scores, &bounds, end);
                let budget = 70.max((0.2 * end as f64).ceil() as usize);
                let want = reference::chosen(&tokens, budget, 5, 20 + end - start);
                for (pos, kept) in (start..end).zip(&kept[start..end]) {
                    let want: Vec<u32> = want
                        .iter()
                        .map(|&k| k as u32)
                        .filter(|&k| k as usize <= pos)
                        .collect();
                    assert_eq!(kept, &want, "seed {seed}, head {head}, row {pos}");
                }
            }
        }
    }
}

#[test]
fn chunks_of_equal_length_are_ranked_alike_by_both_norms() {
    let case = PlanCase::random(5, Shape(4, 2, 16), 1100);
    let kept = |norm: &str| {
        let text = format!("boundaries=fixed,block=32,share=0.1,least=64,norm={norm}");
        case.kept(&case.plans(&planner(&Dhsa, &text)), 1)
    };
    assert_eq!(kept("sqrt_len"), kept("mean"));
}

#[test]
fn the_budget_is_kept() {
    let case = PlanCase::random(6, Shape(4, 2, 16), 1300);
    let plans = case.plans(&planner(&Dhsa, "block=64,share=0.1,least=256,dense_tail=false"));
    for (pos, row) in case.kept(&plans, 3).iter().enumerate() {
        let end = (pos / 64 * 64 + 64).min(1300);
        let budget = 256.max((0.1 * end as f64).ceil() as usize);
        let own = pos % 64 + 1;
        assert_eq!(
            row.len(),
            (pos + 1).min(budget - (end - pos / 64 * 64) + own),
            "row {pos}"
        );
    }
}

#[test]
fn a_passage_is_taken_whole_where_chunks_follow_it() {
    const DIM: usize = 32;
    let n = 576;
    let passage = 203..223;
    let mut rng = fastrand::Rng::with_seed(4);
    let mut small = |n: usize| -> Vec<f32> { (0..n * DIM).map(|_| rng.f32() * 0.2 - 0.1).collect() };
    let (mut q, mut k) = (small(n), small(n));
    // Dimensions that do not turn with the position.
    for (t, k) in k.chunks_exact_mut(DIM).enumerate() {
        k[if passage.contains(&t) { 30 } else { 31 }] += 3.0;
    }
    q[544 * DIM..].chunks_exact_mut(DIM).for_each(|q| q[30] += 3.0);
    let case = PlanCase::new(Shape(1, 1, DIM), &q, &k);
    let read = |boundaries: &str| {
        // Room for 20 keys beside the block's own.
        let text = format!("boundaries={boundaries},block=32,share=0.001,least=52,sinks=0,local=0");
        let kept = case.kept(&case.plans(&planner(&Dhsa, &text)), 0);
        passage
            .clone()
            .filter(|&k| kept[575].contains(&(k as u32)))
            .count()
    };
    assert_eq!(read("cosine"), 20);
    assert_eq!(read("fixed"), 15);
}

#[test]
fn turning_back_gives_the_keys_before_rope() {
    // The angles that tests of planners turn by.
    let rope = Rope::new(&[1.0; 4], RopeStyle::Neox);
    let case = PlanCase::random(7, Shape(2, 2, 16), 40);
    let (before, mut after) = (turned_back(&case), case.keys(1));
    for (pos, key) in after.iter_mut().enumerate() {
        let mut row: Vec<f32> = before[pos][16..].iter().map(|&x| x as f32).collect();
        rope.apply(&mut row, 16, pos as u32);
        let row: Vec<f64> = row.into_iter().map(f64::from).collect();
        close(&row, key, 1e-5);
    }
}

#[test]
fn plans_of_a_predictor_keep_the_promises_of_planners() {
    let mut rng = Rng(11);
    let mut sparse = 0;
    for i in 0..plan_laws::cases() {
        let case = plan_laws::random_case(&mut rng, i);
        let channels = case.geometry.kv_heads * case.geometry.dim;
        let variant = ["attention", "convolution"][i % 2];
        let predictor = Predictor::read(&Made::random(rng.bits(), variant, channels).bytes()).unwrap();
        let planner: Arc<dyn Planner> = Arc::new(Chunks {
            cuts: Cuts {
                rule: Rule::Predictor(Arc::new(predictor), 0.0),
                layer: 0,
                length: 16,
                nms: 8,
            },
            block: 32,
            budget: Budget {
                share: 0.1,
                least: 64,
            },
            sinks: 4,
            local: 8,
            sqrt_len: true,
            heads: [Heads::Group, Heads::Each, Heads::Layer][i % 3],
            dense_tail: i % 2 == 0,
        });
        sparse += usize::from(plan_laws::check(&case, &planner, &mut rng));
    }
    assert!(sparse > 0);
}
