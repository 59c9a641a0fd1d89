//! Sparse prefill beside dense prefill on the same text: time, what was read, and how far the predictions moved.

use std::sync::Arc;
use std::time::Instant;

use antefix_attention::method::{DENSE, Program};
use antefix_attention::sparse::Planning;
use antefix_engine::Session;
use antefix_models::decoder::Model;
use serde::Serialize;

use crate::panel::{Closeness, look};
use crate::plans::PlansError;
use crate::reuse::distance;

/// Last positions whose predictions are compared. Their logits are part of every time.
pub const COMPARED: usize = 256;

/// Stretches of a prompt whose recall is measured, at most.
const STRETCHES: usize = 32;

/// Rows of a step; stretches of a plan may make it longer.
const CHUNK: usize = 512;

/// A line of `antefix bench --sparse --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SparseRow {
    /// The method with its settings, or `dense`.
    pub method: String,
    /// Tokens of the prompt.
    pub length: usize,
    /// Seconds until the prompt was computed, with the logits of its last [`COMPARED`] positions.
    pub ttft_s: f64,
    /// Of those, attention with planning.
    pub attn_s: f64,
    /// Of those, planning.
    pub plan_s: f64,
    /// Kept pairs of query and key over all, in the layers that are planned.
    pub density: f64,
    /// Mean share of the dense weights that is kept, with the states of dense attention; if it was asked for.
    pub recall: Option<f64>,
    /// Mean divergence of the predictions from those of dense attention, nats.
    pub kl: f64,
    /// Share of positions with the same most likely token.
    pub top1: f64,
}

/// Dense attention and each of `methods` on `tokens`, dense first: rows as they come, through `row`.
///
/// `recall_rows`: recall is measured on so many rows of each of up to 32 stretches, in more dense passes before (one for all methods that plan
/// the same stretches); 0: not at all.
///
/// # Errors
/// When a method plans no prompts, or the model fails.
pub fn compare(
    model: &Arc<Model>,
    tokens: &[u32],
    methods: &[Arc<Program>],
    recall_rows: usize,
    mut row: impl FnMut(SparseRow),
) -> Result<(), PlansError> {
    let compared = COMPARED.min(tokens.len());
    let run = |planning: Option<Arc<Planning>>| computed(model, tokens, planning, compared);
    let (dense, ttft_s, attn_s) = run(None)?;
    row(SparseRow {
        method: DENSE.into(),
        length: tokens.len(),
        ttft_s,
        attn_s,
        plan_s: 0.0,
        density: 1.0,
        recall: Some(1.0),
        kl: 0.0,
        top1: 1.0,
    });
    let planner = |program: &Arc<Program>| {
        program.planner().cloned().ok_or_else(|| PlansError::None {
            method: program.name(),
        })
    };
    let planners: Vec<_> = methods.iter().map(planner).collect::<Result<_, _>>()?;
    let recalls = match recall_rows {
        0 => None,
        rows => Some(look(
            &planners,
            tokens.len(),
            Closeness {
                stretches: STRETCHES,
                rows,
                seed: 1,
            },
            |planning| computed(model, tokens, Some(Arc::new(planning)), 0).map(drop),
        )?),
    };
    for (i, (program, planner)) in methods.iter().zip(&planners).enumerate() {
        let planning = Arc::new(Planning::new(Some(Arc::clone(planner)), None, usize::MAX));
        let (logits, ttft_s, attn_s) = run(Some(Arc::clone(&planning)))?;
        let (kl, top1) = distance(&dense, &logits, model.spec().vocab);
        row(SparseRow {
            method: program.tag(),
            length: tokens.len(),
            ttft_s,
            attn_s,
            plan_s: planning.time().as_secs_f64(),
            density: planning.density().unwrap_or(1.0),
            recall: recalls.as_ref().map(|sums| sums[i].recall()),
            kl,
            top1,
        });
    }
    Ok(())
}

/// Computes `tokens` under `planning`: the logits of the last `wanted`, `[wanted, vocab]`, seconds, and those of them that attention took.
pub(crate) fn computed(
    model: &Arc<Model>,
    tokens: &[u32],
    planning: Option<Arc<Planning>>,
    wanted: usize,
) -> Result<(Vec<f32>, f64, f64), PlansError> {
    let mut session = Session::new(Arc::clone(model), tokens.len(), CHUNK);
    session.plan(planning);
    let mut logits = Vec::new();
    let started = Instant::now();
    session.feed(tokens, wanted, &mut logits)?;
    let times = (started.elapsed(), session.take_attention_time());
    Ok((logits, times.0.as_secs_f64(), times.1.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::program;

    #[test]
    fn equal_predictions_have_no_distance_and_others_that_of_the_formula() {
        let dense = [0.0, 0.0, 2.0, 1.0];
        assert_eq!(distance(&dense, &dense, 2), (0.0, 1.0));
        let (kl, top1) = distance(&dense, &[0.0, 0.0, 1.0, 2.0], 2);
        // Of the second row: p = (e, 1) / (1 + e) against (1, e) / (1 + e).
        let e = 1f64.exp();
        assert!((kl - 0.5 * (e - 1.0) / (e + 1.0)).abs() < 1e-6, "{kl}");
        assert_eq!(top1, 0.5);
    }

    #[test]
    fn planners_that_cut_keys_in_other_places_do_not_share_their_chunks() {
        let (model, _) = antefix_conformance::tiny(
            antefix_models::spec::Arch::Llama,
            antefix_kernels::cpu::Cpu::best(),
            2,
        );
        let methods = ["cosine", "fixed"].map(|rule| {
            program(
                &model,
                &format!("dhsa,boundaries={rule},least=64,local=16,sinks=0"),
            )
        });
        let tokens: Vec<u32> = (0..1280).map(|i| i * i % 199).collect();
        let recalls = |methods: &[Arc<Program>]| {
            let mut recalls = Vec::new();
            compare(&model, &tokens, methods, 2, |row| recalls.push(row.recall)).expect("it runs");
            recalls.split_off(1)
        };
        let alone = [recalls(&methods[..1]), recalls(&methods[1..])].concat();
        assert_ne!(alone[0], alone[1]);
        assert_eq!(recalls(&methods), alone);
    }

    #[test]
    fn a_method_that_keeps_everything_is_dense_and_one_that_does_not_is_measured() {
        let (model, _) = antefix_conformance::tiny(
            antefix_models::spec::Arch::Llama,
            antefix_kernels::cpu::Cpu::best(),
            2,
        );
        let methods = [
            program(&model, "a_shape,window=1048576"),
            program(&model, "a_shape,block=32,sinks=2,window=8"),
            program(&model, "block_topk,block=32,keep=3"),
        ];
        let tokens: Vec<u32> = (0..400).map(|i| i * 7 % 200).collect();
        let mut rows = Vec::new();
        compare(&model, &tokens, &methods, 2, |row| rows.push(row)).expect("it runs");
        assert_eq!(rows.len(), 4);
        let same = &rows[1];
        assert_eq!(
            (same.density, same.recall, same.kl, same.top1),
            (1.0, Some(1.0), 0.0, 1.0)
        );
        for few in &rows[2..] {
            assert!(
                few.density < 0.5 && few.recall.is_some_and(|r| r < 0.9) && few.kl > 0.0,
                "{few:?}"
            );
        }
        assert!(rows.iter().all(|r| r.ttft_s >= r.attn_s && r.attn_s >= r.plan_s));
        let decode = program(&model, "quest");
        let error = compare(&model, &tokens, &[decode], 0, |_| ()).expect_err("it plans no prompts");
        assert!(error.to_string().contains("`quest`"), "{error}");
    }
}
