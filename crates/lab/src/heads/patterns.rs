//! Heads by the pattern of what they read: induction, echo, sinks, neighbours.

use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::hooks::{At, Hook, HookPlan, HookSpec, Observer, Site, Sources};
use antefix_attention::readout::Weights;
use antefix_engine::Session;
use antefix_papers::heads::{HeadTest, spearman};
use serde::Serialize;

use super::{HeadsError, Subject};

/// Segments of a repeated text.
const REPEATS: usize = 4;
/// Positions that count as sinks.
const SINKS: u32 = 4;

/// A pattern of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// Weight on the token that followed earlier occurrences of the query's token (paper `razor_attention`, section 3.1).
    Induction,
    /// Weight on earlier occurrences of the query's token (same place).
    Echo,
    /// Weight on the first four tokens.
    Sink,
    /// Weight on the token before.
    Previous,
}

impl Pattern {
    /// Its name in profiles.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Induction => "induction",
            Pattern::Echo => "echo",
            Pattern::Sink => "sink",
            Pattern::Previous => "previous",
        }
    }

    /// The weight that counts, of a row whose text repeats after `segment` tokens from `start` on.
    fn weight(self, row: &Weights<'_>, start: u32, segment: u32) -> f32 {
        match self {
            Pattern::Sink => row.mass(0, SINKS),
            Pattern::Previous => row.pos.checked_sub(1).map_or(0.0, |p| row.at(p)),
            Pattern::Echo | Pattern::Induction => {
                let ahead = u32::from(self == Pattern::Induction);
                let earlier = (1..).map_while(|m| (row.pos - start).checked_sub(m * segment));
                earlier.map(|i| row.at(start + i + ahead)).sum()
            }
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [
            Pattern::Induction,
            Pattern::Echo,
            Pattern::Sink,
            Pattern::Previous,
        ];
        all.into_iter()
            .find(|p| p.name() == name)
            .ok_or_else(|| format!("`{name}` is no pattern"))
    }
}

/// Adds up a pattern over the rows from the second segment on. Reads, changes nothing.
struct Tally {
    layers: usize,
    pattern: Pattern,
    start: u32,
    segment: u32,
    /// `[L][Hq]`, and the rows that were added.
    sums: Arc<Mutex<(Vec<Vec<f64>>, usize)>>,
}

impl Hook for Tally {
    fn wants(&self, layer: usize) -> u32 {
        if layer < self.layers { Site::Z.bit() } else { 0 }
    }

    fn fingerprint(&self) -> Option<u64> {
        None
    }

    fn at(&mut self, at: &At<'_>, _: &mut [f32]) {
        let Some(view) = &at.attention else { return };
        let from = self.start + self.segment;
        let rows: Vec<usize> = (0..at.rows).filter(|&r| at.pos0 + r as u32 >= from).collect();
        let found = view.run.1.map(view.geometry.heads, |head| {
            let mut sum = 0.0;
            view.each_row(head, &rows, &mut |_, row| {
                sum += f64::from(self.pattern.weight(&row, self.start, self.segment));
            });
            sum
        });
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        for (sum, found) in sums.0[at.layer].iter_mut().zip(found) {
            *sum += found;
        }
        if at.layer == 0 {
            sums.1 += rows.len();
        }
    }
}

/// Measures `pattern` on a begin token and four times the same `segment` random ordinary tokens, for each of `seeds`; the score of a
/// head is its mean weight over the rows of the last three.
///
/// # Errors
/// When the model fails or the text does not fit its context.
pub fn pattern(
    subject: &Subject,
    pattern: Pattern,
    segment: usize,
    seeds: std::ops::Range<u64>,
) -> Result<HeadTest, HeadsError> {
    let spec = subject.model.spec();
    subject.check_length(segment * REPEATS)?;
    let mut tables: Vec<Vec<Vec<f32>>> = Vec::new();
    for seed in seeds.clone() {
        let start = subject.tokenizer.bos().or(subject.tokenizer.eos());
        let mut tokens: Vec<u32> = start.into_iter().collect();
        let first = tokens.len() as u32;
        let random = random_tokens(subject, segment, seed);
        (0..REPEATS).for_each(|_| tokens.extend(&random));
        let sums = Arc::new(Mutex::new((vec![vec![0.0; spec.heads]; spec.layers], 0)));
        let tally = Tally {
            layers: spec.layers,
            pattern,
            start: first,
            segment: segment as u32,
            sums: Arc::clone(&sums),
        };
        let plan = HookPlan::compile(
            &HookSpec::default(),
            subject.model.hook_shape(),
            &Sources::default(),
        )?;
        let observer = Observer::new(Arc::new(plan), tokens.len(), 0).with(Box::new(tally));
        let mut session = Session::new(Arc::clone(&subject.model), tokens.len(), 512);
        session.observe(Some(Arc::new(observer)));
        session.feed(&tokens, 0, &mut Vec::new())?;
        let sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
        let mean = |x: &f64| (x / sums.1.max(1) as f64) as f32;
        tables.push(sums.0.iter().map(|row| row.iter().map(mean).collect()).collect());
    }
    let n = tables.len().max(1) as f32;
    let cell = |l: usize, h: usize| tables.iter().map(|t| t[l][h]).sum::<f32>() / n;
    let score = (0..spec.layers)
        .map(|l| (0..spec.heads).map(|h| cell(l, h)).collect())
        .collect();
    let half_spearman = match &tables[..] {
        [first, second, ..] => Some(spearman(&first.concat(), &second.concat())),
        _ => None,
    };
    Ok(HeadTest {
        name: pattern.name().into(),
        what: format!(
            "{REPEATS} times the same {segment} random tokens; mean weight over the rows of the last three"
        ),
        runs: tables.len(),
        accepted: tables.len(),
        tokens: [segment * REPEATS + 1; 2],
        seed: seeds.start,
        score,
        active: None,
        half_spearman,
    })
}

/// Random tokens that are neither special nor ends, with replacement.
pub(super) fn random_tokens(subject: &Subject, n: usize, seed: u64) -> Vec<u32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let vocab = subject.model.spec().vocab.min(subject.tokenizer.vocab_size()) as u32;
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        let token = rng.u32(..vocab);
        let ordinary = !subject.tokenizer.is_special(token) && !subject.tokenizer.is_end(token);
        if ordinary && !subject.tokenizer.token_bytes(token).is_empty() {
            out.push(token);
        }
    }
    out
}
