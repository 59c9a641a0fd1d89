//! What a dictionary's features are: how often they fire, on which texts, through which heads and source tokens, and which tokens they
//! speak for (paper `attention_sae`, section 3.11).

use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::hooks::{At, Hook, HookPlan, HookSpec, Observer, Site, Sources};
use antefix_engine::Session;
use antefix_kernels::dense::{Mat, MatMut, Sum, Threads, product};
use antefix_kernels::quant::dequantise;
use antefix_models::decoder::Model;
use antefix_models::files::Role;
use antefix_models::tokenizer::Tokenizer;
use antefix_papers::attention_sae::Sae;
use antefix_papers::attention_sae::attribute::{Attribution, attribute, shares};
use serde::Serialize;

use super::params::uniform;
use crate::harvest::{HarvestError, Rows};

/// Tokens on each side of an example.
const SIDE: usize = 5;
/// Examples of the largest activations.
const TOP: usize = 20;
/// Intervals of activation, and examples in each.
const INTERVALS: (usize, usize) = (10, 5);
/// Tokens that a feature speaks most for, and most against.
const LOGITS: usize = 10;

/// A token with its neighbours.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Example {
    /// Text of each token of the window.
    pub tokens: Vec<String>,
    /// The feature at each, 0 where it is silent.
    pub values: Vec<f32>,
    /// Which of them is meant.
    pub at: usize,
    /// Row of text in the harvest, and position in it.
    pub place: (usize, usize),
    /// What the source tokens gave to it: a window around the one that gave most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sources: Option<Sourced>,
}

/// Source tokens of an example.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sourced {
    /// Text of each token of the window.
    pub tokens: Vec<String>,
    /// What each gave to the pre-activation, through all heads.
    pub values: Vec<f32>,
    /// Tokens from the source that gave most to the example.
    pub distance: usize,
    /// The head through which most came.
    pub head: usize,
}

/// Activations between two bounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Interval {
    /// From, to.
    pub bounds: (f32, f32),
    /// Share of the feature's activations.
    pub share: f32,
    /// Some of them, drawn at random.
    pub examples: Vec<Example>,
}

/// One feature.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Card {
    /// Its number.
    pub feature: usize,
    /// Share of the tokens on which it fires.
    pub rate: f64,
    /// Largest activation.
    pub max: f32,
    /// Share of each head in its decoder row.
    pub heads: Vec<f32>,
    /// Tokens whose logits it raises most, with the size of that.
    pub raises: Vec<(String, f32)>,
    /// Tokens whose logits it lowers most.
    pub lowers: Vec<(String, f32)>,
    /// Largest activations, at most one a row of text.
    pub top: Vec<Example>,
    /// Activations by size, largest first.
    pub intervals: Vec<Interval>,
}

/// Firing rates of all features, and where each of them fired.
#[derive(Debug, Clone)]
pub struct Fired {
    /// Tokens that were looked at.
    pub tokens: Vec<u32>,
    /// Tokens of a row of text.
    pub context: usize,
    /// Of each feature: (token, value), ascending by token.
    pub lists: Vec<Vec<(u32, f32)>>,
}

impl Fired {
    /// Runs the first `most` tokens of a harvest through `sae`.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn new(sae: &Sae, rows: &Rows, most: usize) -> Result<Self, HarvestError> {
        let mut out = Self {
            tokens: Vec::new(),
            context: rows.about().context,
            lists: vec![Vec::new(); sae.features()],
        };
        for shard in 0..rows.shards() {
            let left = most.saturating_sub(out.tokens.len()) / out.context * out.context;
            if left == 0 {
                break;
            }
            let mut tokens = rows.token_ids(shard)?;
            tokens.truncate(left);
            let z = rows.rows(shard)?;
            let codes = sae.encode(&z[..tokens.len() * sae.d_in()], Threads::Pool);
            for r in 0..codes.rows() {
                let (ids, values) = codes.row(r);
                let at = (out.tokens.len() + r) as u32;
                ids.iter()
                    .zip(values)
                    .for_each(|(&j, &x)| out.lists[j as usize].push((at, x)));
            }
            out.tokens.extend(tokens);
        }
        Ok(out)
    }

    /// Share of the tokens on which a feature fires.
    pub fn rate(&self, feature: usize) -> f64 {
        self.lists[feature].len() as f64 / self.tokens.len().max(1) as f64
    }

    /// How many features fire how often: shares of the features by the whole number below log10 of their rate, from -6 to 0, and those
    /// that never fired.
    pub fn densities(&self) -> (Vec<f64>, f64) {
        let n = self.lists.len().max(1) as f64;
        let mut bins = vec![0.0; 24];
        let mut never = 0.0;
        for j in 0..self.lists.len() {
            match self.rate(j) {
                0.0 => never += 1.0 / n,
                rate => {
                    let bin = ((rate.log10() + 6.0) * 4.0).clamp(0.0, 23.0) as usize;
                    bins[bin] += 1.0 / n;
                }
            }
        }
        (bins, never)
    }

    fn example(&self, list: &[(u32, f32)], at: u32, tokenizer: &Tokenizer) -> Example {
        let (at, row) = (at as usize, at as usize / self.context);
        let from = at.saturating_sub(SIDE).max(row * self.context);
        let to = (at + SIDE + 1).min((row + 1) * self.context);
        let value = |t: usize| {
            list.binary_search_by_key(&(t as u32), |e| e.0)
                .map_or(0.0, |i| list[i].1)
        };
        Example {
            tokens: self.tokens[from..to]
                .iter()
                .map(|&t| tokenizer.shown(t))
                .collect(),
            values: (from..to).map(value).collect(),
            at: at - from,
            place: (row, at % self.context),
            sources: None,
        }
    }

    /// The card of a feature, without logits and sources.
    pub fn card(&self, sae: &Sae, feature: usize, heads: usize, tokenizer: &Tokenizer) -> Card {
        let list = &self.lists[feature];
        let edge = |t: u32| {
            let pos = t as usize % self.context;
            pos < SIDE || pos + SIDE >= self.context
        };
        let mut order: Vec<(u32, f32)> = list.iter().copied().filter(|e| !edge(e.0)).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut rows = Vec::new();
        let mut top = Vec::new();
        for &(at, _) in &order {
            let row = at as usize / self.context;
            if top.len() < TOP && !rows.contains(&row) {
                rows.push(row);
                top.push(self.example(list, at, tokenizer));
            }
        }
        let max = list.iter().map(|e| e.1).fold(0.0, f32::max);
        let (n, some) = INTERVALS;
        // The first bound is the largest value itself: ten tenths of it may round to less.
        let bound = |i: usize| {
            if i == 0 {
                max
            } else {
                max * (n - i) as f32 / n as f32
            }
        };
        let intervals = (0..n).map(|i| {
            let (hi, lo) = (bound(i), bound(i + 1));
            let all = list.iter().filter(|e| e.1 > lo && e.1 <= hi).count();
            let mut inside: Vec<u32> = order
                .iter()
                .filter(|e| e.1 > lo && e.1 <= hi)
                .map(|e| e.0)
                .collect();
            inside.sort_by(|a, b| {
                let key = |t: u32| uniform(feature as u64, 70 + i as u64, u64::from(t));
                key(*a).total_cmp(&key(*b))
            });
            Interval {
                bounds: (lo, hi),
                share: all as f32 / list.len().max(1) as f32,
                examples: inside
                    .iter()
                    .take(some)
                    .map(|&t| self.example(list, t, tokenizer))
                    .collect(),
            }
        });
        Card {
            feature,
            rate: self.rate(feature),
            max,
            heads: shares(sae, feature, heads),
            raises: Vec::new(),
            lowers: Vec::new(),
            top,
            intervals: if max > 0.0 {
                intervals.collect()
            } else {
                Vec::new()
            },
        }
    }
}

/// Keeps head outputs and rotated queries of one layer.
struct Seen {
    layer: usize,
    to: Arc<Mutex<[Vec<f32>; 2]>>,
}

impl Hook for Seen {
    fn wants(&self, layer: usize) -> u32 {
        if layer == self.layer {
            Site::Z.bit() | Site::RotQ.bit()
        } else {
            0
        }
    }

    fn fingerprint(&self) -> Option<u64> {
        None
    }

    fn at(&mut self, at: &At<'_>, rows: &mut [f32]) {
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        to[usize::from(at.site == Site::RotQ)].extend_from_slice(rows);
    }
}

/// Attributes features at tokens of one text: `wanted` are positions with the features there. Every position of the answer is in the order
/// of `wanted`. With nothing wanted of a position, its most active features are taken, at most `most`.
///
/// # Errors
/// When the model fails.
pub fn attribute_text(
    model: &Arc<Model>,
    sae: &Sae,
    layer: usize,
    tokens: &[u32],
    wanted: &[(usize, Vec<usize>)],
    most: usize,
) -> Result<Vec<Vec<Attribution>>, HarvestError> {
    let seen = Arc::new(Mutex::new([Vec::new(), Vec::new()]));
    let mut session = Session::new(Arc::clone(model), tokens.len(), tokens.len());
    let plan = HookPlan::compile(&HookSpec::default(), model.hook_shape(), &Sources::default())?;
    let hook = Seen {
        layer,
        to: Arc::clone(&seen),
    };
    let observer = Observer::new(Arc::new(plan), tokens.len(), 0).with(Box::new(hook));
    session.observe(Some(Arc::new(observer)));
    session.feed(tokens, 0, &mut Vec::new())?;
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let [z, q] = &*seen;
    let view = session.attention(layer, q, 0);
    let d = sae.d_in();
    let each = wanted.iter().map(|(pos, features)| {
        let row = &z[pos * d..][..d];
        let mut features = features.clone();
        if features.is_empty() {
            let codes = sae.encode(row, Threads::One);
            let (ids, values) = codes.row(0);
            let mut active: Vec<(u32, f32)> = ids.iter().copied().zip(values.iter().copied()).collect();
            active.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            features = active.iter().take(most).map(|f| f.0 as usize).collect();
        }
        attribute(sae, &features, &view, *pos, row)
    });
    Ok(each.collect())
}

/// Adds to the first `some` top examples of each card what their source tokens gave. Texts that stand in several cards run once.
///
/// # Errors
/// When the model fails.
pub fn add_sources(
    model: &Arc<Model>,
    tokenizer: &Tokenizer,
    sae: &Sae,
    (layer, fired, some): (usize, &Fired, usize),
    cards: &mut [Card],
    mut progress: impl FnMut(usize, usize),
) -> Result<(), HarvestError> {
    let mut by_row: std::collections::BTreeMap<usize, Vec<(usize, usize)>> =
        std::collections::BTreeMap::new();
    for (c, card) in cards.iter().enumerate() {
        for (e, example) in card.top.iter().take(some).enumerate() {
            by_row.entry(example.place.0).or_default().push((c, e));
        }
    }
    let all = by_row.len();
    for (n, (row, places)) in by_row.into_iter().enumerate() {
        let tokens = &fired.tokens[row * fired.context..][..fired.context];
        let wanted: Vec<(usize, Vec<usize>)> = places
            .iter()
            .map(|&(c, e)| (cards[c].top[e].place.1, vec![cards[c].feature]))
            .collect();
        let given = attribute_text(model, sae, layer, tokens, &wanted, 1)?;
        for ((c, e), attribution) in places.into_iter().zip(given) {
            let Some(a) = attribution.first() else { continue };
            let sums = a.by_source();
            let best = (0..sums.len())
                .max_by(|x, y| sums[*x].total_cmp(&sums[*y]))
                .unwrap_or(0);
            let (from, to) = (best.saturating_sub(SIDE), (best + SIDE + 1).min(sums.len()));
            let head = (0..a.heads.len())
                .max_by(|x, y| a.heads[*x].total_cmp(&a.heads[*y]))
                .unwrap_or(0);
            cards[c].top[e].sources = Some(Sourced {
                tokens: tokens[from..to].iter().map(|&t| tokenizer.shown(t)).collect(),
                values: sums[from..to].to_vec(),
                distance: a.pos as usize - best,
                head,
            });
        }
        progress(n + 1, all);
    }
    Ok(())
}

/// A tensor of the model's file in f32, if it has this shape.
fn tensor(model: &Model, role: Role, rows: usize, cols: usize) -> Option<Vec<f32>> {
    let tensor = model.files().tensor(role).ok().flatten()?;
    if (tensor.rows, tensor.cols) != (rows, cols) {
        return None;
    }
    let mut values = vec![0.0; rows * cols];
    dequantise(tensor.format, &tensor.bytes, &mut values).ok()?;
    Some(values)
}

/// What each of `rows` (decoder rows, `[n, d_in]`) adds to the logits of every token by the direct path: through `W_o`, the weight of the final
/// norm (its division left out), and the output matrix; `[n, vocab]`. `None` where the model's file does not have them as matrices.
pub fn direct_logits(model: &Model, layer: usize, rows: &[f32], d_in: usize) -> Option<Vec<f32>> {
    let spec = model.spec();
    let (n, d) = (rows.len() / d_in, spec.d_model);
    let w_o = tensor(model, Role::AttnOut(layer), d, d_in)?;
    let norm = tensor(model, Role::OutputNorm, 1, d)?;
    let output = tensor(model, Role::Output, spec.vocab, d)
        .or_else(|| tensor(model, Role::TokenEmbd, spec.vocab, d))?;
    let mut stream = vec![0.0; n * d];
    product(
        MatMut::new(&mut stream, n, d),
        Sum::Replace,
        1.0,
        Mat::new(rows, n, d_in),
        Mat::new(&w_o, d, d_in).t(),
        Threads::Pool,
    );
    stream
        .chunks_exact_mut(d)
        .for_each(|row| row.iter_mut().zip(&norm).for_each(|(x, g)| *x *= g));
    let mut logits = vec![0.0; n * spec.vocab];
    product(
        MatMut::new(&mut logits, n, spec.vocab),
        Sum::Replace,
        1.0,
        Mat::new(&stream, n, d),
        Mat::new(&output, spec.vocab, d).t(),
        Threads::Pool,
    );
    Some(logits)
}

/// Adds to each card the tokens that its feature speaks for and against.
pub fn add_logits(model: &Model, tokenizer: &Tokenizer, sae: &Sae, layer: usize, cards: &mut [Card]) {
    for some in cards.chunks_mut(64) {
        let rows: Vec<f32> = some
            .iter()
            .flat_map(|c| sae.direction(c.feature).iter().copied())
            .collect();
        let Some(logits) = direct_logits(model, layer, &rows, sae.d_in()) else {
            return;
        };
        for (card, row) in some.iter_mut().zip(logits.chunks_exact(model.spec().vocab)) {
            let mut order: Vec<u32> = (0..row.len() as u32).collect();
            order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
            let text = |&t: &u32| (tokenizer.shown(t), row[t as usize]);
            card.raises = order.iter().take(LOGITS).map(text).collect();
            card.lowers = order.iter().rev().take(LOGITS).map(text).collect();
        }
    }
}
