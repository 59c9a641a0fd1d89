//! Decoding under planners beside dense decoding, at the same tokens: speed, what was read, and how far the predictions moved.

use std::sync::Arc;

use antefix_attention::method::{DENSE, Program};
use antefix_attention::sparse::Planning;
use antefix_engine::EngineError;
use antefix_kv::{KvError, SeqKv};
use antefix_models::decoder::Model;
use antefix_papers::repro::Drawn;
use antefix_state::PAGE_ROWS;

use crate::crowd::Crowd;
use crate::median;
use crate::plans::PlansError;
use crate::reuse::distance;

/// Steps before anything is timed. In the first a planner may sum up the keys of the prompt.
const WARM: usize = 2;

/// What is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Draws<'a> {
    /// Tokens that are timed.
    pub steps: usize,
    /// Numbers of sequences.
    pub batches: &'a [usize],
    /// Sequences read the same pages of the prompt, as behind one prompt in the server; otherwise each has a copy.
    pub shared: bool,
}

/// What a run of steps came to.
struct Steps {
    seconds: Vec<f64>,
    attn_s: f64,
    plan_s: f64,
    density: f64,
    /// Of the first sequence, `[steps, vocab]`.
    logits: Vec<f32>,
}

/// Decodes the last `draws.steps` of `tokens` behind the others, densely and under each of `methods`, for every number of sequences. Times are
/// of the median step, and means of all. The prompt is attended densely, and its end that fills no page is left out; tokens are given, so that
/// all methods see the same. Rows as they come, through `row`.
///
/// # Errors
/// When a method plans no drawn tokens, the prompt has no page, or the model fails.
pub fn decode(
    model: &Arc<Model>,
    tokens: &[u32],
    draws: Draws<'_>,
    methods: &[Arc<Program>],
    mut row: impl FnMut(Drawn),
) -> Result<(), PlansError> {
    let Draws {
        steps,
        batches,
        shared,
    } = draws;
    let drawn = WARM + steps;
    let length = tokens.len().saturating_sub(drawn) / PAGE_ROWS * PAGE_ROWS;
    if length == 0 || steps == 0 {
        return Err(PlansError::Empty);
    }
    if let Some(program) = methods.iter().find(|program| program.decode_planner().is_none()) {
        return Err(PlansError::None {
            method: program.name(),
        });
    }
    let most = batches.iter().copied().max().unwrap_or(1);
    let mut crowd = Crowd::new(model, length + drawn, most + 1);
    let prompt = crowd.prefix(&tokens[..length])?;
    let forced = &tokens[length..length + drawn];
    for &batch in batches {
        let own = |_| match shared {
            true => crowd.pool.fork(&prompt),
            false => crowd.copy(&prompt),
        };
        let seqs: Result<Vec<SeqKv>, KvError> = (0..batch).map(own).collect();
        let mut seqs = seqs.map_err(EngineError::from)?;
        let dense = run(&mut crowd, &mut seqs, forced, None)?;
        let figures = |method: String, run: &Steps| {
            let (kl, top1) = distance(&dense.logits, &run.logits, model.spec().vocab);
            Drawn {
                method,
                length,
                batch,
                shared,
                tok_s: batch as f64 / median(&run.seconds),
                attn_s: run.attn_s,
                plan_s: run.plan_s,
                density: run.density,
                kl,
                top1,
            }
        };
        row(figures(DENSE.into(), &dense));
        for program in methods {
            seqs.iter_mut().for_each(|kv| crowd.pool.truncate(kv, length));
            let run = run(&mut crowd, &mut seqs, forced, Some(program))?;
            row(figures(program.tag(), &run));
        }
        seqs.iter_mut().for_each(|kv| crowd.pool.truncate(kv, 0));
    }
    Ok(())
}

/// Draws `forced` in every sequence.
fn run(
    crowd: &mut Crowd<'_>,
    seqs: &mut [SeqKv],
    forced: &[u32],
    program: Option<&Arc<Program>>,
) -> Result<Steps, EngineError> {
    let prompt = seqs.first().map_or(0, SeqKv::len);
    let planner = program.and_then(|program| program.decode_planner().cloned());
    let plannings: Vec<Arc<Planning>> = planner.map_or_else(Vec::new, |planner| {
        let planning = || Arc::new(Planning::new(None, Some(Arc::clone(&planner)), prompt));
        seqs.iter().map(|_| planning()).collect()
    });
    let planned = || plannings.iter().map(|p| p.time().as_secs_f64()).sum::<f64>();
    let steps = forced.len() - WARM;
    let (mut seconds, mut logits, mut before) = (Vec::new(), Vec::new(), 0.0);
    for (step, &token) in forced.iter().enumerate() {
        if step == WARM {
            crowd.scratch.take_attention_time();
            before = planned();
        }
        let (all, time) = crowd.step(seqs, &vec![token; seqs.len()], &plannings)?;
        if step >= WARM {
            seconds.push(time);
            logits.extend_from_slice(&all[..all.len() / seqs.len()]);
        }
    }
    Ok(Steps {
        seconds,
        attn_s: crowd.scratch.take_attention_time().as_secs_f64() / steps as f64,
        plan_s: (planned() - before) / steps as f64,
        density: plannings.first().and_then(|p| p.decode_density()).unwrap_or(1.0),
        logits,
    })
}

#[cfg(test)]
mod tests {
    use antefix_conformance::tiny;
    use antefix_kernels::cpu::Cpu;
    use antefix_models::spec::Arch;

    use super::*;
    use crate::testing::program;

    fn draws(steps: usize, batches: &[usize], shared: bool) -> Draws<'_> {
        Draws {
            steps,
            batches,
            shared,
        }
    }

    #[test]
    fn a_batch_reads_and_predicts_what_one_does_with_pages_of_its_own_and_with_shared_ones() {
        let (model, _) = tiny(Arch::Llama, Cpu::best(), 2);
        let methods = [
            program(&model, "a_shape_decode,least=1048576"),
            program(&model, "a_shape_decode,least=16,share=0.1,sinks=4,dense_layers=0"),
            program(&model, "a_shape_decode,least=16,share=0.1,sinks=4,dense_layers=1"),
        ];
        let tokens: Vec<u32> = (0..410).map(|i| i * 7 % 200).collect();
        let mut rows = Vec::new();
        for (batch, shared) in [(1, false), (3, false), (3, true)] {
            decode(&model, &tokens, draws(8, &[batch], shared), &methods, |row| {
                assert_eq!((row.length, row.batch, row.shared), (384, batch, shared));
                rows.push(row);
            })
            .expect("it runs");
        }
        let figures = |rows: &[Drawn]| -> Vec<_> { rows.iter().map(|r| (r.density, r.kl, r.top1)).collect() };
        let (one, many) = rows.split_at(4);
        let [_, all, few, half] = one else {
            panic!("{one:?}")
        };
        assert_eq!((all.density, all.kl, all.top1), (1.0, 0.0, 1.0));
        assert!(few.density < 0.5 && few.kl > 0.0, "{few:?}");
        // With a dense layer, in which sequences on the same pages read them together.
        assert!(half.density > few.density && half.kl > 0.0, "{half:?}");
        for three in many.chunks(4) {
            assert_eq!(figures(three), figures(one));
        }
        assert!(rows.iter().all(|r| r.tok_s > 0.0 && r.attn_s >= r.plan_s));
    }

    #[test]
    fn what_draws_nothing_or_plans_nothing_is_refused() {
        let (model, _) = tiny(Arch::Llama, Cpu::best(), 1);
        let refused = |tokens: usize, steps, text: &str| {
            let methods = [program(&model, text)];
            decode(
                &model,
                &vec![1; tokens],
                draws(steps, &[1], false),
                &methods,
                |_| (),
            )
            .expect_err("nothing to do")
            .to_string()
        };
        assert!(refused(100, 8, "block_topk").contains("`block_topk` plans no"));
        assert!(refused(12, 8, "quest").contains("no tokens"));
        assert!(refused(100, 0, "quest").contains("no tokens"));
    }
}
