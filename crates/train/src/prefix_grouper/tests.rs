//! What section 6 of the paper's spec asks for.
#![allow(clippy::manual_midpoint, reason = "means as the papers write them")]

use std::path::Path;
use std::sync::Arc;

use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::team::Team;
use antefix_models::decoder::Model;
use antefix_models::files::ModelFiles;
use antefix_models::gguf::Gguf;
use antefix_models::spec::Arch;
use antefix_models::testing::tiny_gguf;
use candle_core::{Device, Tensor, Var};

use super::objective::{PolicyRows, Seen};
use super::step::score;
use super::*;
use crate::model::{Decoder, Train};
use crate::ops::{self, RowLoss};
use crate::optim::Grads;
use crate::random::Stream;

pub(super) fn model(arch: Arch) -> Decoder {
    let gguf = Gguf::parse(tiny_gguf(arch, 3)).unwrap();
    let files = ModelFiles::from_gguf(gguf, Path::new("tiny.gguf")).unwrap();
    Decoder::load(&files, &Train::All, 0).unwrap()
}

fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut stream = Stream::of(seed, "tokens");
    (0..n).map(|_| stream.below(250) as u32).collect()
}

pub(super) fn prompted(prefix: usize, responses: &[usize], seed: u64) -> Prompted {
    Prompted {
        prefix: tokens(prefix, seed),
        responses: responses
            .iter()
            .enumerate()
            .map(|(j, &l)| tokens(l, seed * 100 + j as u64 + 1))
            .collect(),
    }
}

fn scores(model: &Decoder, items: &[Prompted], form: Form) -> Vec<f64> {
    score(model, &pack(items, form).unwrap(), 1.0).unwrap()
}

fn grads(model: &Decoder, items: &[Prompted], form: Form) -> (f64, Grads) {
    let scored = pack(items, form).unwrap();
    let h = ops::embed(&model.hidden(&scored.batch).unwrap(), &scored.rows, 1.0).unwrap();
    let n = scored.targets.len();
    let weights: Vec<f64> = (0..n).map(|i| 0.1 + (i % 7) as f64 / n as f64).collect();
    let loss = RowLoss::CrossEntropy(Arc::new(weights));
    let loss = ops::token_loss(&h, model.output(), &scored.targets, 1.0, loss).unwrap();
    let mut grads = Grads::default();
    grads.add(model.params(), &loss).unwrap();
    (f64::from(loss.to_scalar::<f32>().unwrap()), grads)
}

/// Tests 1, 2 and 6: log-probabilities, loss and the gradient of every parameter, over several prompts, unequal lengths, single tokens.
#[test]
fn grouped_and_repeated_prompts_give_the_same_losses_and_gradients() {
    for arch in [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Gemma3] {
        let model = model(arch);
        let cases = [
            vec![prompted(30, &[7, 1, 12, 3], 1)],
            vec![prompted(20, &[9], 2)],
            vec![prompted(1, &[5, 5], 3)],
            vec![prompted(17, &[1, 1, 1], 4)],
            vec![
                prompted(70, &[20, 3], 5),
                prompted(4, &[1, 66], 6),
                prompted(9, &[2], 7),
            ],
        ];
        for items in cases {
            let far = scores(&model, &items, Form::Grouped)
                .iter()
                .zip(scores(&model, &items, Form::Repeated))
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f64::max);
            assert!(far <= 2e-4, "{arch:?}: log-probabilities differ by {far}");
            let (loss, ours) = grads(&model, &items, Form::Grouped);
            let (loss_repeated, theirs) = grads(&model, &items, Form::Repeated);
            assert!((loss - loss_repeated).abs() <= 1e-5 * loss.abs());
            for (((name, _), a), b) in model.params().variables().zip(ours.sums()).zip(theirs.sums()) {
                let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let size = norm(&mut b.iter().map(|&x| f64::from(x)));
                let far = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
                assert!(far <= 1e-4 * size.max(1e-6), "{arch:?} {name}: {far} of {size}");
            }
        }
    }
}

#[test]
fn an_empty_prompt_or_response_is_refused() {
    assert!(pack(&[prompted(3, &[2, 0], 1)], Form::Grouped).is_err());
    assert!(pack(&[prompted(0, &[2], 1)], Form::Grouped).is_err());
    assert!(pack(&[prompted(0, &[2], 1)], Form::Repeated).is_err());
}

/// Test 3: responses do not see each other, and their order means nothing.
#[test]
fn responses_are_isolated() {
    let model = model(Arch::Llama);
    let mut item = prompted(25, &[6, 4, 70], 1);
    let before = scores(&model, std::slice::from_ref(&item), Form::Grouped);
    item.responses[1] = tokens(4, 77);
    let after = scores(&model, std::slice::from_ref(&item), Form::Grouped);
    assert_eq!(before[..6], after[..6]);
    assert_ne!(before[6..10], after[6..10]);
    for (a, b) in before[10..].iter().zip(&after[10..]) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    item.responses.swap(0, 1);
    let swapped = scores(&model, &[item], Form::Grouped);
    for (a, b) in after[..6].iter().zip(&swapped[4..10]) {
        assert!((a - b).abs() < 1e-5);
    }
}

/// Test 4: a response is what it would be alone behind its prompt, at the same positions.
#[test]
fn a_response_is_scored_as_if_it_stood_alone() {
    let model = model(Arch::Gemma3);
    let item = prompted(33, &[5, 40, 8], 9);
    let together = scores(&model, std::slice::from_ref(&item), Form::Grouped);
    let mut at = 0;
    for response in &item.responses {
        let mut whole = item.prefix.clone();
        whole.extend(response);
        let alone = score(&model, &pack_sequences(&[whole]).unwrap(), 1.0).unwrap();
        let alone = &alone[item.prefix.len() - 1..];
        for (a, b) in together[at..at + response.len()].iter().zip(alone) {
            assert!((a - b).abs() < 2e-4, "{a} {b}");
        }
        at += response.len();
    }
}

/// Test 5: without a loss on first tokens, the prompt's last row gets no gradient from the output matrix; with it, the sum over responses.
#[test]
fn the_boundary_row_gets_the_gradients_of_all_first_tokens() {
    let scored = pack(&[prompted(5, &[2, 3, 1], 1)], Form::Grouped).unwrap();
    let d = 8;
    let rows = scored.batch.packing.rows();
    let mut stream = Stream::of(1, "rows");
    let mut fresh = |n: usize| -> Vec<f64> { (0..n).map(|_| stream.normal()).collect() };
    let hidden =
        Var::from_tensor(&Tensor::from_vec(fresh(rows * d), (rows, d), &Device::Cpu).unwrap()).unwrap();
    let output = Tensor::from_vec(fresh(256 * d), (256, d), &Device::Cpu).unwrap();
    let grad = |weights: Vec<f64>| -> Vec<f64> {
        let h = ops::embed(&hidden, &scored.rows, 1.0).unwrap();
        let loss = RowLoss::CrossEntropy(Arc::new(weights));
        let loss = ops::token_loss(&h, &output, &scored.targets, 1.0, loss).unwrap();
        let grads = loss.backward().unwrap();
        grads
            .get(&hidden)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    };
    let first: Vec<bool> = (0..6).map(|i| [0, 2, 5].contains(&i)).collect();
    let only_later = grad(first.iter().map(|&f| f64::from(u8::from(!f))).collect());
    assert!(only_later[4 * d..5 * d].iter().all(|&g| g == 0.0));
    let all = grad(first.iter().map(|&f| f64::from(u8::from(f))).collect());
    let mut sum = vec![0.0; d];
    for i in [0, 2, 5] {
        let one = grad((0..6).map(|k| f64::from(u8::from(k == i))).collect());
        sum.iter_mut().zip(&one[4 * d..5 * d]).for_each(|(s, g)| *s += g);
    }
    for (a, b) in all[4 * d..5 * d].iter().zip(&sum) {
        assert!((a - b).abs() < 1e-12);
    }
}

fn outcomes() -> Vec<GroupOutcome> {
    let items = [prompted(12, &[3, 5, 1, 2], 1), prompted(8, &[4, 2, 2, 6], 2)];
    let rewards = [vec![1.0, 0.0, 0.5, 0.0], vec![0.0, 0.0, 1.0, 0.0]];
    items
        .into_iter()
        .zip(rewards)
        .map(|(item, rewards)| GroupOutcome {
            old: item.responses.iter().map(|r| vec![-5.5; r.len()]).collect(),
            masked: vec![false; item.responses.len()],
            item,
            rewards,
        })
        .collect()
}

/// Test 2: a group in which all rewards are equal teaches nothing.
#[test]
fn a_flat_group_has_no_gradient() {
    let model = model(Arch::Llama);
    let mut flat = outcomes();
    flat.iter_mut().for_each(|o| o.rewards.fill(0.3));
    for variant in [Variant::Dapo, Variant::DrGrpo, Variant::Gspo] {
        let mut grads = Grads::default();
        let report = policy_step(
            &model,
            None,
            &flat,
            variant.loss(8),
            1.0,
            Form::Grouped,
            &mut grads,
        )
        .unwrap();
        assert_eq!(report.flat_groups, 1.0);
        assert_eq!(grads.norm(), 0.0, "{variant:?}");
    }
}

/// Test 7: losses of the variants against their definitions, written out, on log-probabilities made by hand.
#[test]
fn variants_are_their_definitions() {
    // Two responses of two and one tokens; (logp, old, ref).
    let tokens = [
        (-0.5f64, -1.0f64, -0.7f64),
        (-2.0, -1.5, -1.0),
        (-0.1, -0.9, -0.3),
    ];
    let owners = [[0, 0], [0, 0], [0, 1]];
    let rewards = vec![vec![1.0, 0.0]];
    // Unbiased deviation of (1, 0).
    let std = 0.5f64.sqrt();
    let clip = |r: f64, low: f64, high: f64, a: f64| (r * a).min(r.clamp(1.0 - low, 1.0 + high) * a);
    let reference = |variant: Variant| -> f64 {
        let ratio = |i: usize| (tokens[i].0 - tokens[i].1).exp();
        match variant {
            Variant::Grpo => {
                let a = [0.5 / (std + 1e-4), -0.5 / (std + 1e-4)];
                let kl = |i: usize| {
                    let d = tokens[i].2 - tokens[i].0;
                    d.exp() - d - 1.0
                };
                let loss = |i: usize, a: f64| -clip(ratio(i), 0.2, 0.2, a) + 0.04 * kl(i);
                ((loss(0, a[0]) + loss(1, a[0])) / 2.0 + loss(2, a[1])) / 2.0
            }
            Variant::Dapo => {
                let a = [0.5 / (std + 1e-4), -0.5 / (std + 1e-4)];
                let loss = |i: usize, a: f64| -clip(ratio(i), 0.2, 0.28, a);
                (loss(0, a[0]) + loss(1, a[0]) + loss(2, a[1])) / 3.0
            }
            Variant::DrGrpo => {
                let loss = |i: usize, a: f64| -clip(ratio(i), 0.2, 0.2, a);
                (loss(0, 0.5) + loss(1, 0.5) + loss(2, -0.5)) / (2.0 * 8.0)
            }
            Variant::Gspo => {
                let a = [0.5 / (std + 1e-4), -0.5 / (std + 1e-4)];
                let first = ((tokens[0].0 - tokens[0].1 + tokens[1].0 - tokens[1].1) / 2.0).exp();
                let loss = |r: f64, a: f64| -clip(r, 3e-4, 4e-4, a);
                (loss(first, a[0]) + loss(ratio(2), a[1])) / 2.0
            }
        }
    };
    for variant in [Variant::Grpo, Variant::Dapo, Variant::DrGrpo, Variant::Gspo] {
        let loss = variant.loss(8);
        let advantage = advantages(loss.advantage, &rewards);
        let of = |f: &dyn Fn(usize) -> f64| (0..3).map(f).collect::<Vec<_>>();
        let log_ratio = (loss.level == RatioLevel::Sequence).then(|| {
            let mean = (tokens[0].0 - tokens[0].1 + tokens[1].0 - tokens[1].1) / 2.0;
            vec![mean, mean, tokens[2].0 - tokens[2].1]
        });
        let rows = PolicyRows {
            weights: loss.weights(&owners, &[vec![false, false]]),
            advantages: of(&|i| advantage[owners[i][0]][owners[i][1]]),
            old: of(&|i| tokens[i].1),
            reference: Some(of(&|i| tokens[i].2)),
            log_ratio,
        };
        let RowLoss::Rule(rule) = loss.rule(Arc::new(rows), Seen::new(3)) else {
            unreachable!("a policy is a rule")
        };
        let total: f64 = (0..3).map(|i| rule(i, tokens[i].0).0).sum();
        let want = reference(variant);
        assert!(
            (total - want).abs() < 1e-12,
            "{variant:?}: {total}, by definition {want}"
        );
        // Slopes are those of the loss, where it is smooth.
        if loss.level == RatioLevel::Token {
            for (i, token) in tokens.iter().enumerate() {
                let h = 1e-6;
                let slope = (rule(i, token.0 + h).0 - rule(i, token.0 - h).0) / (2.0 * h);
                assert!((slope - rule(i, token.0).1).abs() < 1e-8, "{variant:?} token {i}");
            }
        }
    }
}

#[test]
fn masked_responses_count_for_nothing() {
    let loss = Variant::Dapo.loss(8);
    let owners = [[0, 0], [0, 0], [0, 1]];
    assert_eq!(loss.weights(&owners, &[vec![true, false]]), vec![0.0, 0.0, 1.0]);
}

#[test]
fn grouped_and_repeated_updates_are_the_same() {
    let model = model(Arch::Qwen2);
    let reference = self::model(Arch::Qwen2);
    for variant in [Variant::Grpo, Variant::Dapo, Variant::DrGrpo] {
        let mut sums = Vec::new();
        for form in [Form::Grouped, Form::Repeated] {
            let mut grads = Grads::default();
            let report = policy_step(
                &model,
                Some(&reference),
                &outcomes(),
                variant.loss(8),
                1.0,
                form,
                &mut grads,
            )
            .unwrap();
            sums.push((report, grads));
        }
        let (a, b) = (&sums[0], &sums[1]);
        assert!(
            (a.0.loss - b.0.loss).abs() <= 1e-5 * b.0.loss.abs().max(1e-3),
            "{variant:?}"
        );
        assert!(a.0.rows < b.0.rows);
        assert!(
            (a.1.norm() - b.1.norm()).abs() <= 1e-4 * b.1.norm(),
            "{variant:?}"
        );
    }
}

fn engine(decoder: &Decoder) -> Model {
    let files = ModelFiles::in_memory(decoder.spec().clone(), decoder.tensors().unwrap()).unwrap();
    Model::load(files, Cpu::best(), Arc::new(Team::new(2)), Precision::F32).unwrap()
}

/// Requirement 14 of the trainer: the first update after a rollout has importance ratios of 1.
#[test]
fn rollouts_and_trainer_agree_on_probabilities() {
    for arch in [Arch::Llama, Arch::Gemma3] {
        let decoder = model(arch);
        let prompts = vec![tokens(40, 1), tokens(70, 2)];
        let sampling = Sampling {
            group: 4,
            max_tokens: 12,
            temperature: 0.9,
            end: 7,
        };
        let engine = engine(&decoder);
        let drawn = rollout(&engine, &prompts, sampling, 3, 0).unwrap();
        let again = rollout(&engine, &prompts[..1], Sampling { group: 2, ..sampling }, 3, 0).unwrap();
        assert_eq!(
            drawn[0][..2],
            again[0][..],
            "a response does not depend on the others"
        );
        let outcomes: Vec<GroupOutcome> = prompts
            .iter()
            .zip(&drawn)
            .map(|(prompt, group)| GroupOutcome {
                item: Prompted {
                    prefix: prompt.clone(),
                    responses: group.iter().map(|r| r.tokens.clone()).collect(),
                },
                old: group.iter().map(|r| r.log_probs.clone()).collect(),
                rewards: (0..group.len()).map(|j| j as f64).collect(),
                masked: group.iter().map(|r| r.truncated).collect(),
            })
            .collect();
        let mut grads = Grads::default();
        let report = policy_step(
            &decoder,
            None,
            &outcomes,
            Variant::Dapo.loss(12),
            0.9,
            Form::Grouped,
            &mut grads,
        )
        .unwrap();
        assert!((report.ratio - 1.0).abs() < 1e-3, "{arch:?}: {}", report.ratio);
        assert_eq!(report.clipped, [0.0, 0.0]);
    }
}

#[test]
fn rewards_are_for_right_answers_only() {
    let tasks = [
        Task::Arithmetic { digits: 2, shots: 3 },
        Task::Copy { items: 5 },
        Task::Json { keys: 2 },
        Task::Function { examples: 3 },
        Task::Passkey { digits: 5, filler: 7 },
    ];
    for task in tasks {
        task.check().unwrap();
        let problem = task.prompt(&mut Stream::of(1, "problem"));
        assert_eq!(task.reward(&problem, &problem.answer), 1.0, "{task:?}");
        assert_eq!(task.reward(&problem, "no"), 0.0, "{task:?}");
        assert_ne!(problem, task.prompt(&mut Stream::of(2, "problem")));
    }
    let json = Task::Json { keys: 2 };
    let problem = json.prompt(&mut Stream::of(1, "problem"));
    assert_eq!(json.reward(&problem, "{\"other\": 1}"), 0.5);
    assert!(Task::Copy { items: 0 }.check().is_err());
    let passkey = Task::Passkey { digits: 6, filler: 9 };
    let mut places = std::collections::BTreeSet::new();
    for i in 0..50 {
        let problem = passkey.prompt(&mut Stream::at(1, "problem", i));
        let key = problem.answer.trim();
        assert!(key.len() == 6 && problem.answer.starts_with(' '));
        assert_eq!(problem.prompt.matches(key).count(), 2);
        places.insert(problem.prompt.find(key));
    }
    assert!(places.len() > 5, "the key stands anywhere");
}
