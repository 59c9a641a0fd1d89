//! Many sequences behind one prompt, step by step in turns: with its keys shared, and with a copy of them for each sequence (paper
//! `hydragen`).

use std::sync::Arc;

use antefix_engine::{EngineError, argmax};
use antefix_kv::{KvError, SeqKv};
use antefix_models::decoder::Model;
use antefix_papers::repro::Together;
use antefix_state::PAGE_ROWS;

use crate::bench::{BenchError, tokens};
use crate::crowd::Crowd;
use crate::median;

/// Steps before anything is timed.
const WARM: usize = 2;

/// Sequences that are decoded together, greedily.
struct Party {
    seqs: Vec<SeqKv>,
    next: Vec<u32>,
    written: Vec<u32>,
}

impl Party {
    /// One token for everybody; seconds.
    fn step(&mut self, crowd: &mut Crowd<'_>, vocab: usize) -> Result<f64, EngineError> {
        let (logits, seconds) = crowd.step(&mut self.seqs, &self.next, &[])?;
        self.next = logits.chunks_exact(vocab).map(argmax).collect();
        self.written.extend(&self.next);
        Ok(seconds)
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
    let (mut crowd, vocab) = (Crowd::new(model, need, 2 * batch + 1), model.spec().vocab);
    let prompt = tokens(model, prefix + batch, 3);
    let kv = crowd.prefix(&prompt[..prefix])?;
    let party = |seqs: Result<Vec<SeqKv>, KvError>| -> Result<Party, EngineError> {
        Ok(Party {
            seqs: seqs?,
            next: prompt[prefix..].to_vec(),
            written: Vec::new(),
        })
    };
    let mut shared = party((0..batch).map(|_| crowd.pool.fork(&kv)).collect())?;
    let mut unshared = party((0..batch).map(|_| crowd.copy(&kv)).collect())?;
    let (mut times, mut pairs) = ([Vec::new(), Vec::new()], Vec::new());
    for step in 0..WARM + steps {
        let pair = [shared.step(&mut crowd, vocab)?, unshared.step(&mut crowd, vocab)?];
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
