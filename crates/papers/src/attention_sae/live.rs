//! A dictionary at work on one sequence: which features are active at each token, and features that are changed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use antefix_attention::hooks::{At, Hook, Site, Told};
use antefix_attention::method::HookMaker;
use antefix_kernels::matmul::{Acts, Matrix, matmul};
use antefix_kernels::quant::QuantError;

use super::loaded::{Loaded, columns};
use super::sae::{Architecture, Sae};

/// Rows whose pre-activations are held at once.
const ROWS: usize = 64;

/// Rows that are told of at most.
const MOST_ROWS: usize = 1 << 16;

/// What becomes of a feature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Change {
    /// This value.
    Set(f32),
    /// So many times its value.
    Scale(f32),
    /// Its value and this.
    Add(f32),
}

/// A change of one feature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edit {
    /// Which.
    pub feature: u32,
    /// What becomes of it.
    pub change: Change,
}

impl Edit {
    /// Reads `17:zero+42:set:3.5+9:scale:2+3:add:-1`; nothing is no edit.
    ///
    /// # Errors
    /// When it has another form, or a feature stands there twice.
    pub fn parse(text: &str) -> Result<Vec<Self>, String> {
        let mut edits: Vec<Self> = Vec::new();
        for part in text.split('+').map(str::trim).filter(|p| !p.is_empty()) {
            let wrong = || {
                format!("`{part}` is no edit: FEATURE:zero, FEATURE:set:X, FEATURE:scale:X or FEATURE:add:X")
            };
            let words: Vec<&str> = part.split(':').collect();
            let feature = words[0].parse().map_err(|_| wrong())?;
            let number = |text: &str| {
                text.parse::<f32>()
                    .ok()
                    .filter(|x| x.is_finite())
                    .ok_or_else(wrong)
            };
            let change = match words[1..] {
                ["zero"] => Change::Set(0.0),
                ["set", x] => Change::Set(number(x)?),
                ["scale", x] => Change::Scale(number(x)?),
                ["add", x] => Change::Add(number(x)?),
                _ => return Err(wrong()),
            };
            if edits.iter().any(|e| e.feature == feature) {
                return Err(format!("feature {feature} is changed twice"));
            }
            edits.push(Self { feature, change });
        }
        Ok(edits)
    }

    fn apply(self, was: f32) -> f32 {
        match self.change {
            Change::Set(x) => x,
            Change::Scale(x) => was * x,
            Change::Add(x) => was + x,
        }
    }
}

/// Which rows are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// None.
    None,
    /// From the row on that draws the first token of the answer.
    Answer,
    /// All of them.
    All,
}

impl Rows {
    /// The first of `at`'s rows that is concerned; `at.rows` if none is.
    fn first(self, at: &At<'_>) -> usize {
        match self {
            Self::None => at.rows,
            Self::All => 0,
            Self::Answer => (at.prompt.saturating_sub(1).saturating_sub(at.pos0) as usize).min(at.rows),
        }
    }
}

/// What is done on every sequence.
pub struct Live {
    /// The layer.
    pub layer: usize,
    loaded: Arc<Loaded>,
    /// Which rows are told of.
    pub read: Rows,
    /// Features that are told of each row, the largest.
    pub top: usize,
    /// Changes.
    pub edits: Vec<Edit>,
    /// Which rows are changed.
    pub edit_rows: Rows,
    /// Differs between dictionaries and between changes.
    pub mark: u64,
    encoder: Encoder,
}

/// The encoder's columns that are needed, as rows for the kernels.
struct Encoder {
    matrix: Arc<Matrix>,
    /// Which features, if not all.
    columns: Option<Vec<u32>>,
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live")
            .field("layer", &self.layer)
            .field("read", &self.read)
            .field("edits", &self.edits)
            .finish_non_exhaustive()
    }
}

/// What is asked of a dictionary.
#[derive(Debug, Clone, PartialEq)]
pub struct Wish {
    /// The layer.
    pub layer: usize,
    /// Which rows are told of.
    pub read: Rows,
    /// Features that are told of each row.
    pub top: usize,
    /// Changes.
    pub edits: Vec<Edit>,
    /// Which rows are changed.
    pub edit_rows: Rows,
}

impl Live {
    /// Takes all of the encoder to read or where features compete, else the columns of the changed ones. `mark` differs between changes.
    ///
    /// # Errors
    /// When memory is short.
    pub fn new(loaded: Arc<Loaded>, wish: Wish, mark: u64) -> Result<Self, QuantError> {
        let p = loaded.stored.sae.parts();
        let some = wish.read == Rows::None && !matches!(p.architecture, Architecture::TopK { .. });
        let some: Option<Vec<u32>> = some.then(|| wish.edits.iter().map(|e| e.feature).collect());
        let encoder = Encoder {
            matrix: match &some {
                Some(features) => Arc::new(columns(p, features)?),
                None => loaded.encoder()?,
            },
            columns: some,
        };
        Ok(Self {
            layer: wish.layer,
            loaded,
            encoder,
            read: wish.read,
            top: wish.top,
            edits: wish.edits,
            edit_rows: wish.edit_rows,
            mark,
        })
    }

    /// The dictionary.
    pub fn sae(&self) -> &Sae {
        &self.loaded.stored.sae
    }
}

/// Makes a hook a sequence.
#[derive(Debug)]
pub struct Maker(pub Arc<Live>);

impl HookMaker for Maker {
    fn make(&self, _prompt: usize) -> Box<dyn Hook> {
        Box::new(Follower {
            live: Arc::clone(&self.0),
            rows: BTreeMap::new(),
            dropped: 0,
            acts: Acts::new(),
        })
    }

    fn sees_all(&self) -> bool {
        self.0.read == Rows::All
    }
}

/// Follows one sequence.
struct Follower {
    live: Arc<Live>,
    /// Active features by position; a row that is computed again replaces the old one.
    rows: BTreeMap<u32, Vec<(u32, f32)>>,
    dropped: usize,
    acts: Acts,
}

impl Hook for Follower {
    fn wants(&self, layer: usize) -> u32 {
        if layer == self.live.layer {
            Site::Z.bit()
        } else {
            0
        }
    }

    fn fingerprint(&self) -> Option<u64> {
        (!self.live.edits.is_empty()).then_some(self.live.mark)
    }

    fn at(&mut self, at: &At<'_>, rows: &mut [f32]) {
        let Some(view) = &at.attention else { return };
        let live = Arc::clone(&self.live);
        let (read, edit) = (
            live.read.first(at),
            match live.edits.is_empty() {
                true => at.rows,
                false => live.edit_rows.first(at),
            },
        );
        let width = at.width;
        let n = live.encoder.matrix.n();
        let mut input = vec![0.0; ROWS.min(at.rows) * width];
        let mut h = vec![0.0; ROWS.min(at.rows) * n];
        let mut codes = Vec::new();
        let mut from = read.min(edit);
        while from < at.rows {
            let to = (from + ROWS).min(at.rows);
            let block = &mut rows[from * width..to * width];
            let frames: Vec<_> = block
                .chunks_exact(width)
                .zip(input.chunks_exact_mut(width))
                .map(|(x, to)| live.sae().input(x, to))
                .collect();
            self.acts.load(&input[..(to - from) * width], to - from, width);
            let h = &mut h[..(to - from) * n];
            matmul(view.run.0, view.run.1, &mut self.acts, &live.encoder.matrix, h);
            for (i, (h, frame)) in h.chunks_exact(n).zip(frames).enumerate() {
                live.codes(h, &mut codes);
                if from + i >= edit {
                    let x = &mut block[i * width..(i + 1) * width];
                    for e in &live.edits {
                        let found = codes.binary_search_by_key(&e.feature, |f| f.0);
                        let was = found.map_or(0.0, |at| codes[at].1);
                        live.sae().edit(x, frame, e.feature, was, e.apply(was));
                    }
                }
                if from + i >= read {
                    self.keep(at.pos0 + (from + i) as u32, &codes);
                }
            }
            from = to;
        }
    }

    fn told(&mut self) -> Option<Told> {
        if self.live.read == Rows::None {
            return None;
        }
        Some(Told {
            name: "features".into(),
            site: Site::Z,
            layer: self.live.layer,
            rows: std::mem::take(&mut self.rows).into_iter().collect(),
            dropped: std::mem::take(&mut self.dropped),
        })
    }
}

impl Live {
    /// Features out of the encoder's products of one row; ascending.
    fn codes(&self, h: &[f32], out: &mut Vec<(u32, f32)>) {
        match &self.encoder.columns {
            None => self.sae().activate(h, out),
            Some(columns) => {
                out.clear();
                let each = columns
                    .iter()
                    .zip(h)
                    .filter_map(|(&j, &h)| Some((j, self.sae().one(j as usize, h)?)));
                out.extend(each);
                out.sort_unstable_by_key(|f| f.0);
            }
        }
    }
}

impl Follower {
    fn keep(&mut self, pos: u32, codes: &[(u32, f32)]) {
        if self.rows.len() >= MOST_ROWS && !self.rows.contains_key(&pos) {
            self.dropped += 1;
            return;
        }
        let mut row = codes.to_vec();
        row.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        row.truncate(self.live.top);
        self.rows.insert(pos, row);
    }
}
