//! Many sequences behind one prompt, step by step in turns: with its keys shared, and with a copy of them for each sequence (paper
//! `hydragen`).

use std::sync::Arc;
use std::time::Instant;

use antefix_engine::{EngineError, argmax};
use antefix_kv::{KvError, Pool, SeqKv};
use antefix_models::decoder::{Extra, Input, Model, Scratch};
use antefix_papers::repro::Together;
use antefix_state::PAGE_ROWS;

use crate::bench::{BenchError, tokens};
use crate::median;

/// Rows of a prompt chunk.
const CHUNK: usize = 512;
/// Steps before anything is timed.
const WARM: usize = 2;

/// Sequences that are decoded together, greedily.
struct Crowd {
    seqs: Vec<SeqKv>,
    next: Vec<u32>,
    written: Vec<u32>,
}

struct Bench<'a> {
    model: &'a Model,
    pool: Pool,
    scratch: Scratch,
}

impl Bench<'_> {
    fn prefix(&mut self, tokens: &[u32]) -> Result<SeqKv, EngineError> {
        let mut kv = SeqKv::new(self.pool.shape());
        self.pool.reserve(&mut kv, tokens.len())?;
        for chunk in tokens.chunks(CHUNK) {
            let input = Input {
                tokens: chunk,
                kv: &kv,
                logits: 0,
                drawn: false,
                extra: Extra::default(),
            };
            self.model
                .forward(&mut self.pool, &[input], &mut self.scratch, &mut Vec::new())?;
            kv.commit(chunk.len());
        }
        Ok(kv)
    }

    /// The same rows on pages of their own.
    fn copy(&mut self, kv: &SeqKv) -> Result<SeqKv, KvError> {
        let mut copy = SeqKv::new(self.pool.shape());
        let mut bytes = Vec::new();
        for block in 0..kv.len() / PAGE_ROWS {
            self.pool.export_block(kv, block, &mut bytes);
            self.pool.import_block(&mut copy, &bytes)?;
        }
        Ok(copy)
    }

    /// One token for everybody; seconds.
    fn step(&mut self, crowd: &mut Crowd) -> Result<f64, EngineError> {
        let start = Instant::now();
        for kv in &mut crowd.seqs {
            self.pool.reserve(kv, 1)?;
        }
        let inputs: Vec<Input<'_>> = crowd
            .seqs
            .iter()
            .zip(&crowd.next)
            .map(|(kv, next)| Input {
                tokens: std::slice::from_ref(next),
                kv,
                logits: 1,
                drawn: true,
                extra: Extra::default(),
            })
            .collect();
        let mut logits = Vec::new();
        self.model
            .forward(&mut self.pool, &inputs, &mut self.scratch, &mut logits)?;
        crowd.next = logits.chunks_exact(self.model.spec().vocab).map(argmax).collect();
        crowd.written.extend(&crowd.next);
        crowd.seqs.iter_mut().for_each(|kv| kv.commit(1));
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Decodes `steps` tokens of `batch` sequences behind `prefix` tokens (rounded down to whole pages), in turns.
///
/// # Errors
/// When it does not fit the model's context, or the model fails.
pub fn together(
    model: &Arc<Model>,
    prefix: usize,
    batch: usize,
    steps: usize,
) -> Result<Together, BenchError> {
    let (prefix, context) = (prefix / PAGE_ROWS * PAGE_ROWS, model.spec().context);
    let need = prefix + steps + WARM;
    if need > context || prefix == 0 {
        return Err(BenchError::Context {
            what: "decoding together".into(),
            need,
            context,
        });
    }
    let shape = model.kv_shape();
    let one = Pool::new(shape, 0).bytes_for(need + PAGE_ROWS);
    let mut bench = Bench {
        model,
        pool: Pool::new(shape, one * (2 * batch + 1)),
        scratch: Scratch::default(),
    };
    let prompt = tokens(model, prefix + batch, 3);
    let kv = bench.prefix(&prompt[..prefix])?;
    let crowd = |seqs: Result<Vec<SeqKv>, KvError>| -> Result<Crowd, EngineError> {
        Ok(Crowd {
            seqs: seqs?,
            next: prompt[prefix..].to_vec(),
            written: Vec::new(),
        })
    };
    let mut shared = crowd((0..batch).map(|_| bench.pool.fork(&kv)).collect())?;
    let mut unshared = crowd((0..batch).map(|_| bench.copy(&kv)).collect())?;
    let (mut times, mut pairs) = ([Vec::new(), Vec::new()], Vec::new());
    for step in 0..WARM + steps {
        let pair = [bench.step(&mut shared)?, bench.step(&mut unshared)?];
        if step >= WARM {
            pairs.push(pair[1] / pair[0]);
            times[0].push(pair[0]);
            times[1].push(pair[1]);
        }
    }
    Ok(Together {
        prefix,
        batch,
        shared_tok_s: batch as f64 / median(&times[0]),
        unshared_tok_s: batch as f64 / median(&times[1]),
        ratio: median(&pairs),
        same_tokens: shared.written == unshared.written,
    })
}

#[cfg(test)]
mod tests {
    use antefix_conformance::tiny;
    use antefix_kernels::cpu::Cpu;
    use antefix_models::spec::Arch;

    use super::*;

    #[test]
    fn sharing_changes_no_token() {
        let (model, _) = tiny(Arch::Llama, Cpu::best(), 1);
        let found = together(&model, 70, 3, 5).unwrap();
        assert_eq!((found.prefix, found.batch), (64, 3));
        assert!(found.same_tokens && found.ratio > 0.0 && found.shared_tok_s > 0.0);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (model, _) = tiny(Arch::Llama, Cpu::best(), 1);
        for prefix in [0, model.spec().context] {
            assert!(matches!(
                together(&model, prefix, 2, 2),
                Err(BenchError::Context { .. })
            ));
        }
    }
}
