//! Which rows of a packed batch attend which: sequences one after the other, and groups of responses behind one prefix.

use std::ops::Range;

use super::node::Scalar;

/// Query rows of a tile of attention.
const TILE: usize = 64;

/// What a row of a [`Job`] sees of the job's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// All of them.
    All,
    /// The last row sees all, each row before it one key less: causal, with the ends aligned.
    Causal,
}

/// Rows that attend keys, both ranges of the packed rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Queries.
    pub rows: Range<usize>,
    /// Keys and values.
    pub keys: Range<usize>,
    /// Who sees what.
    pub mask: Mask,
}

/// A prompt and the responses to it (prefix_grouper.md section 2). Without responses it is a plain sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// `L`, tokens of the prefix.
    pub prefix: usize,
    /// `l_j`, tokens of each response.
    pub responses: Vec<usize>,
}

impl Group {
    /// `L + sum l_j`
    pub fn rows(&self) -> usize {
        self.prefix + self.responses.iter().sum::<usize>()
    }
}

/// Why a packing was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackingError {
    /// A prefix or a response has no token.
    #[error("group {group} has an empty {what}")]
    Empty {
        /// Which group.
        group: usize,
        /// Prefix or response.
        what: &'static str,
    },
    /// A range reaches beyond the rows.
    #[error("job {0} reaches beyond the packed rows, or has fewer keys than causal rows")]
    Range(usize),
    /// A row would see a key twice.
    #[error("row {0} would see a key twice, or none at all")]
    Overlap(usize),
}

/// Part of a job inside one tile: `keys` fill the columns from `col` on.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub(super) rows: Range<usize>,
    pub(super) keys: Range<usize>,
    pub(super) col: usize,
    pub(super) mask: Mask,
}

impl Block {
    /// How many of the keys row `r` sees.
    pub(super) fn seen(&self, row: usize) -> usize {
        match self.mask {
            Mask::All => self.keys.len(),
            Mask::Causal => self.keys.len() - (self.rows.end - 1 - row),
        }
    }
}

/// Rows whose scores are computed together, `[rows, cols]`.
#[derive(Debug, Clone)]
pub(super) struct Tile {
    pub(super) rows: Range<usize>,
    pub(super) cols: usize,
    pub(super) blocks: Vec<Block>,
}

/// Rows that share no key with other rows: a task of its own.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) rows: Range<usize>,
    pub(super) tiles: Vec<Tile>,
}

/// A packed batch: `R` rows, the position of each, and who attends whom. Having one proves that every row sees at least one key, none twice.
#[derive(Debug, Clone)]
pub struct Packing {
    positions: Vec<u32>,
    parts: Vec<Part>,
}

impl Packing {
    /// Sequences one after the other, each causal, positions from 0.
    ///
    /// # Errors
    /// [`PackingError::Empty`] for a sequence without tokens.
    pub fn causal(lengths: &[usize]) -> Result<Self, PackingError> {
        let groups: Vec<_> = lengths
            .iter()
            .map(|&prefix| Group {
                prefix,
                responses: Vec::new(),
            })
            .collect();
        Self::grouped(&groups)
    }

    /// Prompts, each followed by its responses; every response sees its prompt and itself, and restarts at position `L`.
    ///
    /// # Errors
    /// [`PackingError::Empty`] for a prefix or a response without tokens.
    pub fn grouped(groups: &[Group]) -> Result<Self, PackingError> {
        let (mut positions, mut jobs) = (Vec::new(), Vec::new());
        for (i, group) in groups.iter().enumerate() {
            let empty = |what| Err(PackingError::Empty { group: i, what });
            if group.prefix == 0 {
                return empty("prefix");
            }
            let prefix = positions.len()..positions.len() + group.prefix;
            positions.extend(0..group.prefix as u32);
            jobs.push(Job {
                rows: prefix.clone(),
                keys: prefix.clone(),
                mask: Mask::Causal,
            });
            let responses = prefix.end..prefix.start + group.rows();
            if !responses.is_empty() {
                jobs.push(Job {
                    rows: responses,
                    keys: prefix.clone(),
                    mask: Mask::All,
                });
            }
            for &len in &group.responses {
                if len == 0 {
                    return empty("response");
                }
                let own = positions.len()..positions.len() + len;
                positions.extend((group.prefix..group.prefix + len).map(|p| p as u32));
                jobs.push(Job {
                    rows: own.clone(),
                    keys: own,
                    mask: Mask::Causal,
                });
            }
        }
        Self::new(positions, &jobs)
    }

    /// Any rows and jobs. `positions: [R]`.
    ///
    /// # Errors
    /// [`PackingError`] when a range does not fit, or a row would see a key twice or none.
    pub fn new(positions: Vec<u32>, jobs: &[Job]) -> Result<Self, PackingError> {
        let total = positions.len();
        for (i, job) in jobs.iter().enumerate() {
            let fits = job.rows.start <= job.rows.end
                && job.keys.start <= job.keys.end
                && job.rows.end.max(job.keys.end) <= total
                && (job.mask == Mask::All || job.keys.len() >= job.rows.len());
            if !fits {
                return Err(PackingError::Range(i));
            }
        }
        let jobs: Vec<&Job> = jobs
            .iter()
            .filter(|j| !j.rows.is_empty() && !j.keys.is_empty())
            .collect();
        for (i, a) in jobs.iter().enumerate() {
            for b in &jobs[i + 1..] {
                let row = a.rows.start.max(b.rows.start);
                let twice = row < a.rows.end.min(b.rows.end)
                    && a.keys.start.max(b.keys.start) < a.keys.end.min(b.keys.end);
                if twice {
                    return Err(PackingError::Overlap(row));
                }
            }
        }
        let mut seeing = vec![false; total];
        for job in &jobs {
            seeing[job.rows.clone()].fill(true);
        }
        if let Some(blind) = seeing.iter().position(|s| !s) {
            return Err(PackingError::Overlap(blind));
        }
        let parts = Self::components(total, &jobs)
            .into_iter()
            .map(|rows| Part {
                tiles: tiles(&rows, &jobs),
                rows,
            })
            .collect();
        Ok(Self { positions, parts })
    }

    /// Intervals of rows that no job crosses, in order.
    fn components(total: usize, jobs: &[&Job]) -> Vec<Range<usize>> {
        let mut spans: Vec<[usize; 2]> = jobs
            .iter()
            .map(|j| [j.rows.start.min(j.keys.start), j.rows.end.max(j.keys.end)])
            .collect();
        spans.sort_unstable();
        let mut parts: Vec<Range<usize>> = Vec::new();
        for [start, end] in spans {
            match parts.last_mut() {
                Some(last) if start < last.end => last.end = last.end.max(end),
                _ => parts.push(start..end),
            }
        }
        debug_assert!(parts.iter().map(ExactSizeIterator::len).sum::<usize>() == total);
        parts
    }

    /// `R`
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Position of each row in its own sequence, `[R]`.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Pairs of rows and keys that are computed, masked ones at the edges of tiles included: what time follows.
    pub fn pairs(&self) -> u64 {
        let blocks = self.parts.iter().flat_map(|p| &p.tiles).flat_map(|t| &t.blocks);
        blocks.map(|b| (b.rows.len() * b.keys.len()) as u64).sum()
    }
}

fn tiles(part: &Range<usize>, jobs: &[&Job]) -> Vec<Tile> {
    part.clone()
        .step_by(TILE)
        .map(|start| {
            let rows = start..part.end.min(start + TILE);
            let mut filled = vec![0usize; rows.len()];
            let mut blocks = Vec::new();
            for job in jobs {
                let own = rows.start.max(job.rows.start)..rows.end.min(job.rows.end);
                if own.is_empty() {
                    continue;
                }
                let keys = match job.mask {
                    Mask::All => job.keys.clone(),
                    Mask::Causal => job.keys.start..job.keys.end - (job.rows.end - own.end),
                };
                let local = own.start - rows.start..own.end - rows.start;
                let col = filled[local.clone()].iter().copied().max().unwrap_or(0);
                filled[local].fill(col + keys.len());
                blocks.push(Block {
                    rows: own,
                    keys,
                    col,
                    mask: job.mask,
                });
            }
            Tile {
                cols: filled.iter().copied().max().unwrap_or(0),
                rows,
                blocks,
            }
        })
        .collect()
}

/// Cosines and sines of a rotary embedding for each row of a packing, `[R, n]` each; pairs are `(i, i + n)`.
#[derive(Debug, Clone)]
pub struct Angles {
    cos: Vec<f64>,
    sin: Vec<f64>,
    pairs: usize,
}

impl Angles {
    /// `frequencies: [n]`, radians per position.
    pub fn new(frequencies: &[f32], positions: &[u32]) -> Self {
        let angles = positions
            .iter()
            .flat_map(|&p| frequencies.iter().map(move |&f| f64::from(p) * f64::from(f)));
        let (sin, cos) = angles.map(f64::sin_cos).unzip();
        Self {
            cos,
            sin,
            pairs: frequencies.len(),
        }
    }

    /// `n`
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    pub(super) fn tables<T: Scalar>(&self) -> [Vec<T>; 2] {
        [&self.cos, &self.sin].map(|t| t.iter().map(|&x| T::of(x)).collect())
    }

    pub(super) fn rows(&self) -> usize {
        self.cos.len().checked_div(self.pairs).unwrap_or(0)
    }
}
