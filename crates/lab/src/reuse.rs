//! What reusing documents costs and loses: time to the first token, and distance from full prefill, for prompts of documents that were
//! computed before (papers `cacheblend`, `ape`).

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use antefix_attention::{ChunkUse, Extra};
use antefix_engine::{Library, Provenance, ReuseError, argmax};
use antefix_kv::{ChunkStore, Fingerprint, Policy, Pool, SeqState};
use antefix_models::decoder::{EncodeError, Input, Model, Scratch};
use antefix_models::tokenizer::{Specials, Tokenizer};
use serde::Serialize;

use crate::median;
use crate::tasks::Prose;

/// Last tokens of a prompt whose next-token distributions are compared.
const SCORED: usize = 32;

/// Rows of one step of ordinary prefill.
const STEP_ROWS: usize = 512;

/// A prompt of documents and a question behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Where the documents lie.
    pub places: Vec<Range<usize>>,
}

/// Sizes of the prompts of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Documents.
    pub documents: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Tokens of the question; 40 or more.
    pub question: usize,
    /// Tokens of the answer, drawn greedily once the first is timed.
    pub answer: usize,
}

impl Documents {
    /// Prose; the question repeats a stretch of one document, so that the answer depends on it.
    pub fn made(tokenizer: &Tokenizer, sizes: Sizes, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let plain = |text: &str| tokenizer.encode(text, Specials::Plain);
        let mut tokens: Vec<u32> = tokenizer
            .bos()
            .filter(|_| tokenizer.add_bos())
            .into_iter()
            .collect();
        tokens.extend(plain(
            "Read these reports carefully; you will be asked about them.\n",
        ));
        let mut places = Vec::new();
        for _ in 0..sizes.documents {
            let from = tokens.len();
            let sentences = Prose::Generated.sentences(tokenizer, sizes.tokens, &mut rng);
            tokens.extend(sentences.into_iter().flatten());
            // Sentences do not fill a document to the token.
            let short = from + sizes.tokens - tokens.len();
            tokens.extend(std::iter::repeat_n(plain("\n")[0], short));
            places.push(from..tokens.len());
        }
        let question = plain("\nQuestion: how does this passage go on?\nAnswer:");
        let copied = sizes.question.saturating_sub(question.len());
        tokens.extend(question);
        let source = places[rng.usize(..places.len())].clone();
        let at = source.start + rng.usize(..source.len().saturating_sub(copied).max(1));
        let copy = tokens[at..(at + copied).min(source.end)].to_vec();
        tokens.extend(copy);
        Self { tokens, places }
    }

    /// The same documents in another order.
    #[must_use]
    pub fn shuffled(&self, rng: &mut fastrand::Rng) -> Self {
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        rng.shuffle(&mut order);
        let (first, last) = (self.places[0].start, self.places[self.places.len() - 1].end);
        let mut tokens = self.tokens[..first].to_vec();
        let mut places = Vec::new();
        for i in order {
            let from = tokens.len();
            tokens.extend_from_slice(&self.tokens[self.places[i].clone()]);
            places.push(from..tokens.len());
        }
        tokens.extend_from_slice(&self.tokens[last..]);
        Self { tokens, places }
    }
}

/// One way to answer a prompt.
#[derive(Clone)]
pub enum Way {
    /// All of it is computed.
    Full,
    /// What stands before the documents and the first of them is cached, as a tree of prefixes would find it.
    Prefix,
    /// The documents are reused.
    Reuse {
        /// Its name in the results.
        name: String,
        /// How.
        how: Arc<dyn ChunkUse>,
    },
}

impl Way {
    fn name(&self) -> &str {
        match self {
            Way::Full => "full",
            Way::Prefix => "prefix",
            Way::Reuse { name, .. } => name,
        }
    }
}

/// What one way took and lost.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The way.
    pub way: String,
    /// Tokens of the prompts.
    pub tokens: usize,
    /// Seconds to the logits of the first token, median.
    pub ttft_s: f64,
    /// How many times faster than full prefill: median of pairs that ran one after the other.
    pub speedup: f64,
    /// Seconds to the last token of the answer, median.
    pub end_s: f64,
    /// How many times faster than full prefill and the same answer, likewise.
    pub end_speedup: f64,
    /// Rows computed, of those that full prefill computes behind the prefix, summed over the layers.
    pub fresh: f64,
    /// Document tokens whose rows were found, of all.
    pub hits: f64,
    /// Mean KL divergence from full prefill over the last tokens of the prompts, in nats.
    pub kl: f64,
    /// Fraction of those tokens whose most likely next token is the same.
    pub top1: f64,
}

/// A model with a pool and a store of chunks, for measurements.
pub struct Bench {
    model: Arc<Model>,
    pool: Pool,
    chunks: ChunkStore,
    scratch: Scratch,
}

/// Times and logits of one prompt.
struct Answer {
    seconds: f64,
    /// Seconds to the last token that was drawn.
    end: f64,
    /// `[scored, vocab]`.
    logits: Vec<f32>,
    provenance: Provenance,
}

impl Bench {
    /// A pool of `kv_bytes`; chunks are also kept in `folder`, if there is one, under `fingerprint`.
    pub fn new(
        model: Arc<Model>,
        kv_bytes: usize,
        fingerprint: Fingerprint,
        folder: Option<PathBuf>,
    ) -> Self {
        Self {
            pool: Pool::new(model.kv_shape(), kv_bytes),
            chunks: ChunkStore::new(fingerprint, folder),
            scratch: Scratch::default(),
            model,
        }
    }

    /// Forgets the chunks in memory; those in the folder stay.
    pub fn forget(&mut self) {
        self.chunks.clear(&mut self.pool);
    }

    /// Compares the ways on prompts made from seeds `seed..seed + prompts`. Documents are computed before anything is timed; each prompt
    /// then meets them in an order of its own, and the ways take turns.
    ///
    /// # Errors
    /// When the model fails or there is no room.
    pub fn compare(
        &mut self,
        tokenizer: &Tokenizer,
        sizes: Sizes,
        ways: &[Way],
        (prompts, seed): (usize, u64),
    ) -> Result<Vec<Row>, ReuseError> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut answers: Vec<Vec<(Answer, f64, f64)>> = ways.iter().map(|_| Vec::new()).collect();
        let mut full_times = Vec::new();
        let mut tokens = 0;
        for i in 0..prompts {
            let made = Documents::made(tokenizer, sizes, seed + i as u64);
            self.ingest(&made)?;
            let prompt = made.shuffled(&mut rng);
            tokens = prompt.tokens.len();
            let full = self.answer(&Way::Full, &prompt, 1, sizes.answer)?;
            full_times.push([full.seconds, full.end]);
            let dense = self.logits(&Way::Full, &prompt)?;
            for (way, answers) in ways.iter().zip(&mut answers) {
                let timed = self.answer(way, &prompt, 1, sizes.answer)?;
                let scored = self.logits(way, &prompt)?;
                let (kl, top1) = distance(&dense, &scored, self.model.spec().vocab);
                answers.push((timed, kl, top1));
            }
            self.forget();
        }
        Ok(ways
            .iter()
            .zip(answers)
            .map(|(way, answers)| row(way.name(), tokens, &answers, &full_times))
            .collect())
    }

    /// Mean KL divergence of each way from full prefill over the last tokens of `prompt`, nats.
    ///
    /// # Errors
    /// When the model fails or there is no room.
    pub fn divergences(&mut self, prompt: &Documents, ways: &[Way]) -> Result<Vec<f64>, ReuseError> {
        self.ingest(prompt)?;
        let vocab = self.model.spec().vocab;
        let dense = self.logits(&Way::Full, prompt)?;
        let found = ways
            .iter()
            .map(|way| Ok(distance(&dense, &self.logits(way, prompt)?, vocab).0))
            .collect();
        self.forget();
        found
    }

    /// Logits of the last tokens of `prompt`, at most those of its question, `[tokens, vocab]`.
    ///
    /// # Errors
    /// When the model fails or there is no room.
    pub fn logits(&mut self, way: &Way, prompt: &Documents) -> Result<Vec<f32>, ReuseError> {
        let question = prompt.tokens.len() - prompt.places.last().map_or(0, |p| p.end);
        Ok(self.answer(way, prompt, SCORED.min(question), 0)?.logits)
    }

    /// Seconds to the first token of the same documents in `orders` random orders, one after the other, and the fraction of document
    /// tokens found each time.
    ///
    /// # Errors
    /// When the model fails or there is no room.
    pub fn orders(
        &mut self,
        tokenizer: &Tokenizer,
        sizes: Sizes,
        way: &Way,
        (orders, seed): (usize, u64),
    ) -> Result<Vec<(f64, f64)>, ReuseError> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let made = Documents::made(tokenizer, sizes, seed);
        self.ingest(&made)?;
        let times = (0..orders)
            .map(|_| {
                let answer = self.answer(way, &made.shuffled(&mut rng), 1, 0)?;
                Ok((answer.seconds, hits(&answer.provenance)))
            })
            .collect();
        self.forget();
        times
    }

    /// Seconds to the first token when the chunks are in memory, and when they are in the folder alone; medians of `repeats` pairs.
    ///
    /// # Errors
    /// When the model fails or there is no room.
    pub fn from_disk(
        &mut self,
        tokenizer: &Tokenizer,
        sizes: Sizes,
        way: &Way,
        (repeats, seed): (usize, u64),
    ) -> Result<(f64, f64), ReuseError> {
        let made = Documents::made(tokenizer, sizes, seed);
        self.ingest(&made)?;
        let (mut memory, mut disk) = (Vec::new(), Vec::new());
        for _ in 0..repeats {
            memory.push(self.answer(way, &made, 1, 0)?.seconds);
            self.forget();
            disk.push(self.answer(way, &made, 1, 0)?.seconds);
        }
        Ok((median(&memory), median(&disk)))
    }

    fn library(&mut self) -> Library<'_> {
        Library {
            model: &self.model,
            pool: &mut self.pool,
            chunks: &mut self.chunks,
            scratch: &mut self.scratch,
        }
    }

    fn ingest(&mut self, made: &Documents) -> Result<(), ReuseError> {
        let prefix = &made.tokens[..made.places[0].start];
        let documents: Vec<&[u32]> = made.places.iter().map(|p| &made.tokens[p.clone()]).collect();
        self.library().ingest(prefix, &documents, 0).map(drop)
    }

    /// Answers a prompt with `drawn` greedy tokens; with the logits of the prompt's last `scored` tokens.
    fn answer(
        &mut self,
        way: &Way,
        prompt: &Documents,
        scored: usize,
        drawn: usize,
    ) -> Result<Answer, ReuseError> {
        let tokens = &prompt.tokens;
        let last = tokens.len() - scored;
        let mut logits = Vec::new();
        let (start, mut state, provenance);
        match way {
            Way::Reuse { how, name } => {
                start = Instant::now();
                let policy = Policy::new(name);
                (state, provenance) =
                    self.library()
                        .start(tokens, &prompt.places, (how.as_ref(), &policy), 0, scored)?;
            }
            Way::Full | Way::Prefix => {
                state = SeqState::new(self.pool.shape());
                let cached = match way {
                    Way::Prefix => prompt.places[0].end,
                    _ => 0,
                };
                self.feed(&mut state, &tokens[..cached], false, None)?;
                start = Instant::now();
                self.feed(&mut state, &tokens[cached..last], false, None)?;
                let rows = tokens.len() - prompt.places[0].start;
                let fresh = tokens.len() - cached.max(prompt.places[0].start);
                provenance = Provenance {
                    fresh_rows: fresh,
                    all_rows: rows,
                    ..Provenance::default()
                };
            }
        }
        self.feed(&mut state, &tokens[last..], false, Some(&mut logits))?;
        let seconds = start.elapsed().as_secs_f64();
        let vocab = self.model.spec().vocab;
        let mut next = argmax(&logits[logits.len() - vocab..]);
        let mut row = Vec::new();
        // The first token came with the prompt.
        for _ in 1..drawn {
            row.clear();
            self.feed(&mut state, &[next], true, Some(&mut row))?;
            next = argmax(&row);
        }
        let end = start.elapsed().as_secs_f64();
        state.release(&mut self.pool);
        Ok(Answer {
            seconds,
            end,
            logits,
            provenance,
        })
    }

    /// Computes `tokens` at the end of `state`, with their logits if they are wanted. `drawn`: the model drew them.
    fn feed(
        &mut self,
        state: &mut SeqState,
        tokens: &[u32],
        drawn: bool,
        mut logits: Option<&mut Vec<f32>>,
    ) -> Result<(), ReuseError> {
        self.pool.reserve(&mut state.tail, tokens.len())?;
        for step in tokens.chunks(STEP_ROWS) {
            let input = Input {
                tokens: step,
                kv: &state.tail,
                logits: if logits.is_some() { step.len() } else { 0 },
                drawn,
                extra: Extra::of(state),
            };
            let mut nothing = Vec::new();
            let out = logits.as_deref_mut().unwrap_or(&mut nothing);
            self.model
                .forward(&mut self.pool, &[input], &mut self.scratch, out)
                .map_err(EncodeError::from)?;
            state.tail.commit(step.len());
        }
        Ok(())
    }
}

fn hits(p: &Provenance) -> f64 {
    p.found as f64 / (p.found + p.encoded).max(1) as f64
}

fn row(way: &str, tokens: usize, answers: &[(Answer, f64, f64)], full: &[[f64; 2]]) -> Row {
    let all = |f: &dyn Fn(&(Answer, f64, f64)) -> f64| answers.iter().map(f).collect::<Vec<f64>>();
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let faster = |which: usize, of: fn(&Answer) -> f64| {
        let pairs = answers.iter().zip(full);
        median(&pairs.map(|(a, full)| full[which] / of(&a.0)).collect::<Vec<_>>())
    };
    Row {
        way: way.to_string(),
        tokens,
        ttft_s: median(&all(&|a| a.0.seconds)),
        speedup: faster(0, |a| a.seconds),
        end_s: median(&all(&|a| a.0.end)),
        end_speedup: faster(1, |a| a.end),
        fresh: mean(all(&|a| {
            a.0.provenance.fresh_rows as f64 / a.0.provenance.all_rows.max(1) as f64
        })),
        hits: mean(all(&|a| hits(&a.0.provenance))),
        kl: mean(all(&|a| a.1)),
        top1: mean(all(&|a| a.2)),
    }
}

/// Mean `KL(p || q)` of the rows' softmaxes in nats, and the fraction of rows with the same maximum. `[rows, vocab]` each.
pub fn distance(p: &[f32], q: &[f32], vocab: usize) -> (f64, f64) {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let m = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let l: f64 = row.iter().map(|x| f64::from(x - m).exp()).sum();
        row.iter().map(|x| f64::from(x - m) - l.ln()).collect()
    };
    let top = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    let (mut kl, mut same, mut rows) = (0.0, 0usize, 0usize);
    for (p, q) in p.chunks_exact(vocab).zip(q.chunks_exact(vocab)) {
        let (lp, lq) = (log_softmax(p), log_softmax(q));
        kl += lp.iter().zip(&lq).map(|(a, b)| a.exp() * (a - b)).sum::<f64>();
        same += usize::from(top(p) == top(q));
        rows += 1;
    }
    (kl / rows.max(1) as f64, same as f64 / rows.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_is_zero_for_equal_logits_and_the_formula_otherwise() {
        let p = [1.0f32, 2.0, 3.0, 0.0, 0.0, 9.0];
        assert_eq!(distance(&p, &p, 3), (0.0, 1.0));
        // KL of (1/2, 1/2) from (1/4, 3/4): ln 2 - ln 3 / 2 ... written out.
        let (kl, top1) = distance(&[0.0, 0.0], &[0.0, 3f32.ln()], 2);
        let want = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((kl - want).abs() < 1e-6 && (0.0..=1.0).contains(&top1));
    }
}
