//! Gradients of every operator: finite differences in f64, f32 against f64, and composed operators of candle for attention.

use std::sync::Arc;

use antefix_kernels::grad::Act;
use candle_core::{DType, Device, Result, Tensor, Var};

use super::*;

/// Numbers in [-1, 1) that depend on the seed alone.
pub(crate) fn numbers(n: usize, seed: u64) -> Vec<f64> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

pub(crate) fn var(dims: &[usize], seed: u64) -> Var {
    let n = dims.iter().product();
    Var::from_tensor(&Tensor::from_vec(numbers(n, seed), dims, &Device::Cpu).unwrap()).unwrap()
}

/// A weighted sum, so that every element has a gradient of its own.
pub(crate) fn weigh(y: &Tensor) -> Result<Tensor> {
    let w = Tensor::from_vec(numbers(y.elem_count(), 99), y.shape(), &Device::Cpu)?.to_dtype(y.dtype())?;
    (y * w)?.sum_all()
}

/// Compares the gradient of each variable with central differences in f64, and the f32 gradient with the f64 one.
pub(crate) fn check(vars: &[Var], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let tensors = |vars: &[Var]| vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>();
    let grads = f(&tensors(vars)).unwrap().backward().unwrap();
    let single: Vec<Var> = vars
        .iter()
        .map(|v| Var::from_tensor(&v.to_dtype(DType::F32).unwrap()).unwrap())
        .collect();
    let single_grads = f(&tensors(&single)).unwrap().backward().unwrap();
    for (which, (v, v32)) in vars.iter().zip(&single).enumerate() {
        let grad = grads
            .get(v)
            .unwrap_or_else(|| panic!("variable {which} has no gradient"));
        let grad = grad.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let at = v.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let size = grad.iter().fold(1e-3f64, |a, g| a.max(g.abs()));
        for i in 0..at.len() {
            let value = |h: f64| {
                let mut moved = at.clone();
                moved[i] += h;
                let mut args = tensors(vars);
                args[which] = Tensor::from_vec(moved, v.shape(), &Device::Cpu).unwrap();
                f(&args).unwrap().to_scalar::<f64>().unwrap()
            };
            let h = 1e-5;
            let slope = (value(h) - value(-h)) / (2.0 * h);
            assert!(
                (slope - grad[i]).abs() <= 1e-6 * size.max(1.0),
                "variable {which}, element {i}: {} for a slope of {slope}",
                grad[i]
            );
        }
        let grad32 = single_grads
            .get(v32)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        for (a, b) in grad32.iter().zip(&grad) {
            assert!((f64::from(*a) - b).abs() <= 1e-4 * size, "f32 {a}, f64 {b}");
        }
    }
}

#[test]
fn linear_with_and_without_bias() {
    check(&[var(&[5, 3], 1), var(&[4, 3], 2)], |t| {
        weigh(&linear(&t[0], &t[1], None)?)
    });
    check(&[var(&[2, 5, 3], 1), var(&[4, 3], 2), var(&[4], 3)], |t| {
        weigh(&linear(&t[0], &t[1], Some(&t[2]))?)
    });
}

#[test]
fn frozen_weights_pass_gradients_on_and_get_none() {
    let w = var(&[4, 3], 2).as_tensor().detach();
    check(&[var(&[5, 3], 1)], |t| {
        weigh(&linear(&t[0], &w.to_dtype(t[0].dtype())?, None)?)
    });
}

#[test]
fn lora_with_bias() {
    let (w, b) = (
        var(&[4, 3], 2).as_tensor().detach(),
        var(&[4], 5).as_tensor().detach(),
    );
    check(&[var(&[5, 3], 1), var(&[2, 3], 3), var(&[4, 2], 4)], |t| {
        let (w, b) = (w.to_dtype(t[0].dtype())?, b.to_dtype(t[0].dtype())?);
        weigh(&lora(&t[0], &w, Some(&b), &t[1], &t[2], 2.0)?)
    });
}

#[test]
fn norms() {
    check(&[var(&[70, 18], 1), var(&[18], 2)], |t| {
        weigh(&rms_norm(&t[0], &t[1], 1e-5)?)
    });
    check(&[var(&[3, 19], 1), var(&[19], 2), var(&[19], 3)], |t| {
        weigh(&layer_norm(&t[0], &t[1], &t[2], 1e-5)?)
    });
}

#[test]
fn feed_forward_parts() {
    for act in [Act::Silu, Act::GeluTanh] {
        check(&[var(&[4, 3], 1), var(&[5, 3], 2), var(&[5, 3], 3)], |t| {
            weigh(&glu(act, &t[0], &t[1], &t[2])?)
        });
        check(&[var(&[4, 3], 1), var(&[5, 3], 2), var(&[3, 5], 3)], |t| {
            weigh(&mlp(act, &t[0], &t[1], &t[2])?)
        });
        check(&[var(&[4, 3], 1), var(&[4, 3], 2)], |t| {
            weigh(&gated_act(act, &t[0], &t[1])?)
        });
    }
}

#[test]
fn embeddings() {
    let tokens = Arc::new(vec![2, 0, 2, 3]);
    check(&[var(&[5, 3], 1)], |t| weigh(&embed(&t[0], &tokens, 1.5)?));
    assert!(embed(var(&[2, 3], 1).as_tensor(), &tokens, 1.0).is_err());
}

fn attention(packing: Packing, heads: usize, kv_heads: usize, window: Option<u32>, turn: bool) -> Attention {
    let angles = turn.then(|| Arc::new(Angles::new(&[1.0, 0.1], packing.positions())));
    Attention {
        heads,
        kv_heads,
        scale: 0.4,
        window,
        angles,
        packing: Arc::new(packing),
    }
}

fn groups() -> Vec<Group> {
    vec![
        Group {
            prefix: 3,
            responses: vec![2, 1, 3],
        },
        Group {
            prefix: 2,
            responses: vec![],
        },
        Group {
            prefix: 1,
            responses: vec![1],
        },
    ]
}

#[test]
fn attention_over_packed_groups() {
    for (heads, kv_heads, window, turn) in [(2, 1, None, true), (3, 3, None, false), (4, 2, Some(2), true)] {
        let a = attention(
            Packing::grouped(&groups()).unwrap(),
            heads,
            kv_heads,
            window,
            turn,
        );
        let rows = a.packing.rows();
        check(
            &[
                var(&[rows, heads * 5], 1),
                var(&[rows, kv_heads * 5], 2),
                var(&[rows, kv_heads * 5], 3),
            ],
            |t| weigh(&attend(a.clone(), &t[0], &t[1], &t[2])?),
        );
    }
}

#[test]
fn losses_over_the_vocabulary() {
    let targets = Arc::new(vec![0, 6, 3, 3]);
    let weights = Arc::new(vec![1.0, 0.0, 0.5, 2.0]);
    check(&[var(&[4, 3], 1), var(&[7, 3], 2)], |t| {
        token_loss(
            &t[0],
            &t[1],
            &targets,
            0.7,
            RowLoss::CrossEntropy(weights.clone()),
        )
    });
    check(&[var(&[4, 3], 1), var(&[7, 3], 2)], |t| {
        weigh(&log_probs(&t[0], &t[1], &targets, 0.7)?)
    });
    let rule = RowLoss::Rule(Arc::new(|row, logp| {
        (logp * logp * (row + 1) as f64, 2.0 * logp * (row + 1) as f64)
    }));
    check(&[var(&[4, 3], 1), var(&[7, 3], 2)], |t| {
        token_loss(&t[0], &t[1], &targets, 1.0, rule.clone())
    });
    let bad = Arc::new(vec![0, 7, 0, 0]);
    assert!(log_probs(&var(&[4, 3], 1), &var(&[7, 3], 2), &bad, 1.0).is_err());
}

/// Softmax attention out of candle's own operators, with a mask of who sees whom.
fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    scale: f64,
    sees: &[Vec<bool>],
) -> Result<Tensor> {
    let rows = q.dim(0)?;
    let split = |t: &Tensor| t.reshape((rows, heads, ()))?.transpose(0, 1)?.contiguous();
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let mask: Vec<f64> = sees
        .iter()
        .flatten()
        .map(|&s| if s { 0.0 } else { -1e30 })
        .collect();
    let mask = Tensor::from_vec(mask, (1, rows, rows), &Device::Cpu)?;
    let s = (q.matmul(&k.t()?)? * scale)?.broadcast_add(&mask)?;
    let p = s.broadcast_sub(&s.max_keepdim(2)?.detach())?.exp()?;
    let p = p.broadcast_div(&p.sum_keepdim(2)?)?;
    p.matmul(&v)?.transpose(0, 1)?.reshape((rows, ()))
}

/// Rows of more than one tile; results and gradients are those of the composed form.
#[test]
fn attention_is_the_composed_form_over_several_tiles() {
    let groups = [
        Group {
            prefix: 90,
            responses: vec![40, 7, 70],
        },
        Group {
            prefix: 130,
            responses: vec![],
        },
    ];
    let a = attention(Packing::grouped(&groups).unwrap(), 2, 2, None, false);
    let rows = a.packing.rows();
    let mut sees = vec![vec![false; rows]; rows];
    let mut start = 0;
    for group in &groups {
        for r in 0..group.prefix {
            sees[start + r][start..=start + r].fill(true);
        }
        let mut own = start + group.prefix;
        for &len in &group.responses {
            for r in 0..len {
                sees[own + r][start..start + group.prefix].fill(true);
                sees[own + r][own..=own + r].fill(true);
            }
            own += len;
        }
        start = own;
    }
    let vars = [var(&[rows, 8], 1), var(&[rows, 8], 2), var(&[rows, 8], 3)];
    let ours = attend(a, &vars[0], &vars[1], &vars[2]).unwrap();
    let theirs = composed(&vars[0], &vars[1], &vars[2], 2, 0.4, &sees).unwrap();
    let far = |a: &Tensor, b: &Tensor| {
        (a - b)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
    };
    assert!(far(&ours, &theirs) < 1e-12);
    let (ours, theirs) = (
        weigh(&ours).unwrap().backward().unwrap(),
        weigh(&theirs).unwrap().backward().unwrap(),
    );
    for v in &vars {
        assert!(far(ours.get(v).unwrap(), theirs.get(v).unwrap()) < 1e-11);
    }
}

#[test]
fn packings_that_mean_nothing_are_refused() {
    let job = |rows, keys, mask| Job { rows, keys, mask };
    assert_eq!(
        Packing::causal(&[3, 0]).unwrap_err(),
        PackingError::Empty {
            group: 1,
            what: "prefix"
        }
    );
    let twice = [job(0..2, 0..2, Mask::Causal), job(1..2, 0..1, Mask::All)];
    assert_eq!(
        Packing::new(vec![0, 1], &twice).unwrap_err(),
        PackingError::Overlap(1)
    );
    assert_eq!(
        Packing::new(vec![0, 1], &[job(0..1, 0..2, Mask::All)]).unwrap_err(),
        PackingError::Overlap(1)
    );
    assert_eq!(
        Packing::new(vec![0, 1], &[job(0..2, 0..1, Mask::Causal)]).unwrap_err(),
        PackingError::Range(0)
    );
}

/// One thread or many: the same bits, results and gradients.
#[test]
fn threads_change_no_bit() {
    let run = || {
        let a = attention(
            Packing::grouped(&[Group {
                prefix: 100,
                responses: vec![30, 50],
            }])
            .unwrap(),
            4,
            2,
            None,
            true,
        );
        let single =
            |dims: &[usize], seed| Var::from_tensor(&var(dims, seed).to_dtype(DType::F32).unwrap()).unwrap();
        let x = single(&[180, 24], 1);
        let vars = [
            single(&[24], 2),
            single(&[32, 24], 3),
            single(&[16, 24], 4),
            single(&[16, 24], 5),
            single(&[11, 32], 6),
        ];
        let h = rms_norm(&x, &vars[0], 1e-6).unwrap();
        let [q, k, v] = [1, 2, 3].map(|i| linear(&h, &vars[i], None).unwrap());
        let o = attend(a, &q, &k, &v).unwrap();
        let targets = Arc::new((0..180).map(|i| i % 11).collect());
        let loss = token_loss(
            &o,
            &vars[4],
            &targets,
            1.0,
            RowLoss::CrossEntropy(Arc::new(vec![1.0; 180])),
        )
        .unwrap();
        let grads = loss.backward().unwrap();
        let mut bits: Vec<u32> = vars
            .iter()
            .chain([&x])
            .flat_map(|v| {
                grads
                    .get(v)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
            })
            .map(f32::to_bits)
            .collect();
        bits.push(loss.to_scalar::<f32>().unwrap().to_bits());
        bits
    };
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let one = pool(1).install(run);
    assert!(one == pool(2).install(run) && one == pool(5).install(run));
}
