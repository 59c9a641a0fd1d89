//! Likelihood by position: whether far tokens are as well predicted as near ones.

use std::sync::Arc;

use antefix_attention::method::{Answer, Ask, Host, HostError, Program, Prompt};
use antefix_engine::{Session, log_softmax_at};
use antefix_models::decoder::Model;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::repro::{Passages, Stretch};
use serde::{Deserialize, Serialize};

use crate::host::EngineHost;
use crate::perplexity::PerplexityError;
use crate::tasks::Prose;

/// Rows whose logits are held at once: a vocabulary of 262,144 makes 64 MiB of them.
const ROWS: usize = 64;

/// A text of exactly `length` tokens out of `prose`, behind the begin-of-text token where the model has one.
pub fn passage(tokenizer: &Tokenizer, prose: &Prose, length: usize, seed: u64) -> Vec<u32> {
    let start = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let mut tokens: Vec<u32> = Vec::new();
    // More than is needed: sentences do not end where a text does, and a table of somebody's text is one long sentence.
    for more in [256, 1024, 4096] {
        let mut rng = fastrand::Rng::with_seed(seed);
        let sentences = prose.sentences(tokenizer, length + more, &mut rng);
        tokens = start.into_iter().chain(sentences.into_iter().flatten()).collect();
        if tokens.len() >= length {
            break;
        }
    }
    tokens.truncate(length);
    tokens
}

/// Negative log-likelihoods of `text.texts` texts under `program`, in stretches of `text.step` positions.
///
/// The token at a position is predicted by all before it; the first is not scored. Texts may be longer than the model's window.
///
/// # Errors
/// When the texts are too short, the methods work on prompts and answers only, or the model fails.
pub fn by_position(
    (model, tokenizer): (&Arc<Model>, &Tokenizer),
    prose: &Prose,
    text: &Passages,
    program: Option<&Program>,
) -> Result<Vec<Stretch>, PerplexityError> {
    let (length, step) = (text.length, text.step.max(1));
    let vocab = model.spec().vocab;
    let mut stretches: Vec<Stretch> = (0..length)
        .step_by(step)
        .map(|from| Stretch {
            positions: from..(from + step).min(length),
            n: 0,
            nll: 0.0,
        })
        .collect();
    let mut session = Session::new(Arc::clone(model), length, 512);
    if let Some(program) = program {
        session.run_under(program, length)?;
    }
    let mut logits = Vec::new();
    for i in 0..text.texts as u64 {
        let tokens = passage(tokenizer, prose, length, text.seed + i);
        if tokens.len() < length.max(2) {
            return Err(PerplexityError::Short {
                tokens: tokens.len(),
                ctx: length.max(2),
            });
        }
        session.truncate(0);
        for from in (0..length - 1).step_by(ROWS) {
            let to = (from + ROWS).min(length - 1);
            logits.clear();
            session.feed(&tokens[from..to], to - from, &mut logits)?;
            for (row, at) in logits.chunks_exact(vocab).zip(from + 1..) {
                let stretch = &mut stretches[at / step];
                stretch.nll -= f64::from(log_softmax_at(row, tokens[at]));
                stretch.n += 1;
            }
        }
    }
    for s in &mut stretches {
        s.nll /= s.n.max(1) as f64;
    }
    Ok(stretches)
}

/// Tokens behind the document that a cache policy decides by.
const QUESTION: usize = 32;

/// The likelihood of the last `scored` tokens of each text as the answer to all before them: for methods that work on prompts and
/// answers. Also the mean kept share of the bytes of keys and values.
///
/// # Errors
/// When a text is too short, the methods refuse the prompt, or the model fails.
pub fn of_answers(
    host: &mut EngineHost,
    prose: &Prose,
    text: &Passages,
    scored: usize,
    program: Option<&Arc<Program>>,
) -> Result<(Stretch, f64), HostError> {
    let from = text.length.saturating_sub(scored);
    let mut stretch = Stretch {
        positions: from..text.length,
        n: 0,
        nll: 0.0,
    };
    let mut kept = 0.0;
    for i in 0..text.texts as u64 {
        let tokens = passage(host.engine().tokenizer(), prose, text.length, text.seed + i);
        if tokens.len() < text.length || from <= QUESTION + 1 {
            return Err(HostError(format!(
                "a text of {} tokens is too short for {scored} scored tokens and a prompt",
                tokens.len()
            )));
        }
        let told = host.ask(&Ask {
            prompt: Prompt {
                tokens: tokens[..from].to_vec(),
                documents: std::iter::once(1..from - QUESTION).collect(),
            },
            answer: Answer::Given(tokens[from..].to_vec()),
            program: program.cloned(),
            logits: true,
            fresh: true,
            ..Ask::default()
        })?;
        for (row, &token) in told.logits.iter().zip(&told.tokens) {
            stretch.nll -= f64::from(log_softmax_at(row, token));
            stretch.n += 1;
        }
        kept += told.kept / text.texts as f64;
    }
    stretch.nll /= stretch.n.max(1) as f64;
    Ok((stretch, kept))
}

/// A line of `antefix eval ppl --json`: perplexity of a stretch of positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PplRow {
    /// Always `ppl`.
    pub task: String,
    /// The method with its settings.
    pub method: String,
    /// Tokens of a text.
    pub length: usize,
    /// First position of the stretch.
    pub from: usize,
    /// The position behind its last.
    pub to: usize,
    /// Tokens scored.
    pub n: usize,
    /// `exp(nll)`.
    pub ppl: f64,
    /// Mean negative log-likelihood, nats.
    pub nll: f64,
    /// Mean kept fraction.
    pub kept: f64,
}

impl PplRow {
    /// The row of a stretch.
    pub fn new(method: &str, length: usize, stretch: &Stretch, kept: f64) -> Self {
        Self {
            task: "ppl".into(),
            method: method.into(),
            length,
            from: stretch.positions.start,
            to: stretch.positions.end,
            n: stretch.n,
            ppl: stretch.nll.exp(),
            nll: stretch.nll,
            kept,
        }
    }
}

#[cfg(test)]
mod tests {
    use antefix_attention::method::Profiles;
    use antefix_conformance::tiny;
    use antefix_kernels::cpu::Cpu;
    use antefix_models::spec::Arch;

    use super::*;

    #[test]
    fn stretches_add_up_to_the_whole() {
        let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
        let of = |step| {
            let text = Passages {
                texts: 2,
                length: 150,
                step,
                seed: 3,
            };
            by_position((&model, &tokenizer), &Prose::Generated, &text, None).unwrap()
        };
        let (parts, whole) = (of(64), of(150));
        let counts: Vec<usize> = parts.iter().map(|s| s.n).collect();
        assert_eq!(counts, [2 * 63, 2 * 64, 2 * 22]);
        assert_eq!((whole.len(), whole[0].n), (1, 2 * 149));
        let sum: f64 = parts.iter().map(|s| s.nll * s.n as f64).sum();
        assert!((sum - whole[0].nll * whole[0].n as f64).abs() < 1e-6 * sum);
    }

    #[test]
    fn long_sentences_leave_no_passage_short() {
        let (_, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
        let long = "so and ".repeat(300) + "on. ";
        let prose = Prose::Text(long.clone() + "It is short. " + &long);
        for length in [40, 100, 700] {
            assert_eq!(passage(&tokenizer, &prose, length, 1).len(), length);
        }
    }

    #[test]
    fn a_text_that_is_too_short_is_refused() {
        let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
        let text = Passages {
            texts: 1,
            length: 90,
            step: 10,
            seed: 3,
        };
        let found = by_position((&model, &tokenizer), &Prose::Text(String::new()), &text, None);
        assert!(matches!(found, Err(PerplexityError::Short { .. })));
    }

    #[test]
    fn answers_are_as_likely_as_the_end_of_the_text() {
        let (model, tokenizer) = tiny(Arch::Llama, Cpu::best(), 1);
        let text = Passages {
            texts: 2,
            length: 160,
            step: 32,
            seed: 3,
        };
        let whole = by_position((&model, &tokenizer), &Prose::Generated, &text, None).unwrap();
        let mut host = EngineHost::with_room(
            &model,
            &tokenizer,
            400,
            (antefix_papers::ALL, Profiles::default()),
        );
        let (dense, kept) = of_answers(&mut host, &Prose::Generated, &text, 32, None).unwrap();
        assert_eq!(
            (&dense.positions, dense.n, kept),
            (&whole[4].positions, whole[4].n, 1.0)
        );
        match model.tells_drawn_apart() {
            true => assert!(
                (dense.nll - whole[4].nll).abs() < 0.01,
                "{dense:?} {:?}",
                whole[4]
            ),
            false => assert_eq!(dense, whole[4]),
        }
        let cut = host.install(&["streaming_llm,sinks=4,budget=36"]).unwrap();
        let (cut, kept) = of_answers(&mut host, &Prose::Generated, &text, 32, Some(&cut)).unwrap();
        assert!(kept < 0.9 && cut.nll != dense.nll, "{kept} {cut:?}");
    }
}
