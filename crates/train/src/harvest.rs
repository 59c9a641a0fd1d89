//! Activations of a running model on disk: rows of text go through it once, and the head outputs of several layers are kept in bf16, in
//! shards of bounded size (paper `attention_sae`, section 3.2).
//!
//! A folder holds `harvest.json` (what it was made of, and how far it came), and for each shard and layer `layer-10/00000.safetensors`
//! with `z [rows, Hq * D]`, bf16, beside `tokens/00000.safetensors` with `tokens [rows]`, u32. A harvest that was interrupted goes
//! on where its last whole shard ended.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use antefix_attention::hooks::{At, Hook, HookPlan, HookSpec, Observer, Site, Sources};
use antefix_engine::{EngineError, Session};
use antefix_kernels::attend::{bf16_to_f32, f32_to_bf16};
use antefix_models::decoder::Model;
use antefix_models::tokenizer::{Specials, Tokenizer};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

/// The first field of `harvest.json`.
const FORMAT: &str = "antefix harvest 1";

/// The longest text file that is read, bytes.
const LONGEST: u64 = 1 << 30;

/// Why there is no harvest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarvestError {
    /// A file cannot be read or written.
    #[error("{}: {source}", .file.display())]
    Io {
        /// Which.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A folder that is no harvest, or a broken one.
    #[error("{}: no harvest: {why}", .folder.display())]
    Broken {
        /// Which.
        folder: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A folder with another harvest in it.
    #[error("{} holds another harvest: {what}\nhint: another folder, or the settings it was begun with", .folder.display())]
    Other {
        /// Which.
        folder: PathBuf,
        /// What differs.
        what: String,
    },
    /// A layer that is not there.
    #[error("there is no layer {layer}\nhint: {hint}")]
    Layer {
        /// What was asked for.
        layer: usize,
        /// What there is.
        hint: String,
    },
    /// Settings that make no sense.
    #[error("{0}")]
    Setting(String),
    /// The model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Hooks that do not fit: our mistake.
    #[error(transparent)]
    Hooks(#[from] antefix_attention::hooks::HookError),
}

fn io(file: &Path) -> impl FnOnce(std::io::Error) -> HarvestError {
    let file = file.to_owned();
    |source| HarvestError::Io { file, source }
}

/// What a harvest is made of. The same one gives the same rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Which form the folder has.
    pub format: String,
    /// Name of the model.
    pub model: String,
    /// Identity of the model, as its facts give it.
    pub id: String,
    /// Layers, ascending.
    pub layers: Vec<usize>,
    /// Values of a row, `Hq * D`.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Tokens of a row of text, the begin token included.
    pub context: usize,
    /// The token that stands at the start of every row of text.
    pub bos: u32,
    /// Rows of text of a full shard.
    pub shard: usize,
    /// Text files, in the order in which they were read.
    pub files: Vec<String>,
    /// Rows of text that were left out at the start, of all.
    pub skipped: usize,
}

/// How far it came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    about: About,
    /// Rows of text in each shard that is whole.
    shards: Vec<usize>,
    /// Whether the texts are used up.
    done: bool,
}

/// Text files as rows of tokens: all documents one after the other, cut into rows, the first token of each replaced.
pub struct Texts {
    files: Vec<PathBuf>,
    next: usize,
    rest: Vec<u32>,
    context: usize,
    bos: u32,
}

impl Texts {
    /// Files under `paths` that end in one of `endings` (files that are named themselves always), in the order of their paths.
    ///
    /// # Errors
    /// When a path is not there, or nothing is found.
    pub fn new(
        paths: &[PathBuf],
        endings: &[String],
        context: usize,
        bos: u32,
    ) -> Result<Self, HarvestError> {
        if context < 2 {
            return Err(HarvestError::Setting("a row of text has 2 tokens or more".into()));
        }
        let mut files = Vec::new();
        for path in paths {
            collect(path, endings, true, &mut files)?;
        }
        if files.is_empty() {
            return Err(HarvestError::Setting(format!(
                "no file that ends in {} was found\nhint: --ext, or name files themselves",
                endings.join(", ")
            )));
        }
        Ok(Self {
            files,
            next: 0,
            rest: Vec::new(),
            context,
            bos,
        })
    }

    /// The files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The next row of `context` tokens; `None` at the end. What is no text is skipped.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn row(&mut self, tokenizer: &Tokenizer) -> Result<Option<Vec<u32>>, HarvestError> {
        while self.rest.len() < self.context {
            let Some(file) = self.files.get(self.next) else {
                return Ok(None);
            };
            self.next += 1;
            let size = std::fs::metadata(file).map_err(io(file))?.len();
            let bytes = match size <= LONGEST {
                true => std::fs::read(file).map_err(io(file))?,
                false => continue,
            };
            if let Ok(text) = String::from_utf8(bytes) {
                self.rest.extend(tokenizer.encode(&text, Specials::Plain));
            }
        }
        let mut row: Vec<u32> = self.rest.drain(..self.context).collect();
        row[0] = self.bos;
        Ok(Some(row))
    }

    /// The next `n` rows of `context` tokens; fewer at the end.
    ///
    /// # Errors
    /// As [`Texts::row`].
    pub fn rows(&mut self, tokenizer: &Tokenizer, n: usize) -> Result<Vec<Vec<u32>>, HarvestError> {
        std::iter::from_fn(|| self.row(tokenizer).transpose())
            .take(n)
            .collect()
    }
}

fn collect(
    path: &Path,
    endings: &[String],
    named: bool,
    files: &mut Vec<PathBuf>,
) -> Result<(), HarvestError> {
    let about = std::fs::metadata(path).map_err(io(path));
    // A dangling link inside a folder is nobody's mistake.
    let about = if named {
        about?
    } else if let Ok(about) = about {
        about
    } else {
        return Ok(());
    };
    if about.is_file() {
        let ends = |e: &String| {
            path.extension()
                .is_some_and(|x| x.to_string_lossy() == e.as_str())
        };
        if named || endings.iter().any(ends) {
            files.push(path.to_owned());
        }
        return Ok(());
    }
    let entries: Result<Vec<_>, _> = std::fs::read_dir(path).map_err(io(path))?.collect();
    let mut inside: Vec<PathBuf> = entries
        .map_err(io(path))?
        .iter()
        .map(std::fs::DirEntry::path)
        .collect();
    inside.sort();
    for entry in inside {
        if !entry.is_symlink() {
            collect(&entry, endings, false, files)?;
        }
    }
    Ok(())
}

/// Keeps the rows of head outputs of some layers.
struct Keep {
    layers: Vec<usize>,
    to: Arc<Mutex<Vec<Vec<u16>>>>,
}

impl Hook for Keep {
    fn wants(&self, layer: usize) -> u32 {
        if self.layers.contains(&layer) {
            Site::Z.bit()
        } else {
            0
        }
    }

    fn fingerprint(&self) -> Option<u64> {
        None
    }

    fn at(&mut self, at: &At<'_>, rows: &mut [f32]) {
        let slot = self.layers.iter().position(|l| *l == at.layer);
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = slot.and_then(|i| to.get_mut(i)) {
            list.extend(rows.iter().map(|x| f32_to_bf16(*x)));
        }
    }
}

/// Where harvests go, and how much of it.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Rows that are taken at most, of tokens.
    pub tokens: usize,
    /// Bytes that the folder takes at most.
    pub bytes: u64,
}

/// What a harvest came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Gathered {
    /// Tokens in whole shards.
    pub tokens: usize,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Whether the texts are used up.
    pub done: bool,
}

/// Bytes of a row of text of `about`, its share of headers left out.
fn row_bytes(about: &About) -> u64 {
    (about.context * (2 * about.width * about.layers.len() + 4)) as u64
}

fn write(file: &Path, name: &str, dtype: Dtype, shape: Vec<usize>, bytes: &[u8]) -> Result<(), HarvestError> {
    let broken = |e: safetensors::SafeTensorError| HarvestError::Broken {
        folder: file.to_owned(),
        why: e.to_string(),
    };
    let view = TensorView::new(dtype, shape, bytes).map_err(broken)?;
    let bytes = safetensors::serialize([(name, view)], None::<HashMap<String, String>>).map_err(broken)?;
    put(file, &bytes)
}

fn put(file: &Path, bytes: &[u8]) -> Result<(), HarvestError> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).map_err(io(folder))?;
    }
    let draft = file.with_extension("part");
    std::fs::write(&draft, bytes).map_err(io(&draft))?;
    std::fs::rename(&draft, file).map_err(io(file))
}

fn shard_file(folder: &Path, part: &str, shard: usize) -> PathBuf {
    folder.join(part).join(format!("{shard:05}.safetensors"))
}

/// Runs `texts` through `model` and keeps the head outputs of `layers` under `folder`, until a limit is reached or the texts end; goes
/// on with what is there already. `skip` rows of text at the start are left out, for who keeps them for measurements. `progress`
/// hears the tokens so far.
///
/// # Errors
/// When a file cannot be read or written, the model fails, or the folder holds another harvest.
pub fn harvest(
    (model, tokenizer, name): (&Arc<Model>, &Tokenizer, &str),
    mut texts: Texts,
    (layers, skip, shard): (&[usize], usize, usize),
    folder: &Path,
    limits: &Limits,
    mut progress: impl FnMut(usize),
) -> Result<Gathered, HarvestError> {
    let spec = model.spec();
    if let Some(&layer) = layers.iter().find(|l| **l >= spec.layers) {
        let hint = format!("{name} has {}", spec.layers);
        return Err(HarvestError::Layer { layer, hint });
    }
    if layers.is_empty() || shard == 0 {
        return Err(HarvestError::Setting(
            "nothing to gather: name a layer, and shards of a row or more".into(),
        ));
    }
    if texts.context > spec.context {
        return Err(HarvestError::Setting(format!(
            "rows of {} tokens do not fit the model's {}",
            texts.context, spec.context
        )));
    }
    let mut layers = layers.to_vec();
    layers.sort_unstable();
    layers.dedup();
    let facts = model.facts();
    let about = About {
        format: FORMAT.into(),
        model: name.into(),
        id: facts.id,
        layers: layers.clone(),
        width: facts.heads * facts.dim,
        heads: facts.heads,
        context: texts.context,
        bos: texts.bos,
        shard,
        files: texts.files.iter().map(|f| f.display().to_string()).collect(),
        skipped: skip,
    };
    let place = folder.join("harvest.json");
    let mut index = match place.is_file() {
        true => {
            let index = read_index(folder)?;
            if index.about != about {
                return Err(HarvestError::Other {
                    folder: folder.to_owned(),
                    what: "model, layers, texts or sizes differ".into(),
                });
            }
            index
        }
        false => Index {
            about,
            shards: Vec::new(),
            done: false,
        },
    };
    let rows_of_text = |index: &Index| index.shards.iter().sum::<usize>();
    for _ in 0..skip + rows_of_text(&index) {
        texts.row(tokenizer)?;
    }
    let kept = Arc::new(Mutex::new(vec![Vec::new(); layers.len()]));
    let mut session = Session::new(Arc::clone(model), texts.context, texts.context);
    let plan = HookPlan::compile(&HookSpec::default(), model.hook_shape(), &Sources::default())?;
    let keep = Keep {
        layers: layers.clone(),
        to: Arc::clone(&kept),
    };
    let observer = Observer::new(Arc::new(plan), texts.context, 0).with(Box::new(keep));
    session.observe(Some(Arc::new(observer)));
    session.stop_after(layers.last().map(|l| l + 1));
    let context = texts.context;
    let row = row_bytes(&index.about);
    let fits = |rows: usize| rows as u64 * row <= limits.bytes;
    let (mut tokens, mut nothing) = (Vec::new(), Vec::new());
    while !index.done {
        let have = rows_of_text(&index);
        let room = (limits.tokens / context).saturating_sub(have).min(shard);
        let mut taken = 0;
        while taken < room && fits(have + taken + 1) {
            let Some(row) = texts.row(tokenizer)? else {
                index.done = true;
                break;
            };
            session.truncate(0);
            session.feed(&row, 0, &mut nothing)?;
            tokens.extend(row);
            taken += 1;
            progress((have + taken) * context);
        }
        if taken == 0 {
            break;
        }
        let number = index.shards.len();
        let mut all = kept.lock().unwrap_or_else(PoisonError::into_inner);
        for (layer, values) in layers.iter().zip(all.iter_mut()) {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let file = shard_file(folder, &format!("layer-{layer}"), number);
            write(
                &file,
                "z",
                Dtype::BF16,
                vec![taken * context, index.about.width],
                &bytes,
            )?;
            values.clear();
        }
        let bytes: Vec<u8> = tokens.iter().flat_map(|t: &u32| t.to_le_bytes()).collect();
        write(
            &shard_file(folder, "tokens", number),
            "tokens",
            Dtype::U32,
            vec![taken * context],
            &bytes,
        )?;
        tokens.clear();
        index.shards.push(taken);
        let text = serde_json::to_string_pretty(&index).map_err(|e| HarvestError::Broken {
            folder: folder.to_owned(),
            why: e.to_string(),
        })?;
        put(&place, text.as_bytes())?;
        if taken < shard {
            break;
        }
    }
    if index.shards.is_empty() {
        let row = index.about.context;
        return Err(HarvestError::Setting(match index.done {
            true => format!(
                "nothing to gather: the texts have no row of {row} tokens behind the {skip} that are left out\nhint: more text, or leave fewer out"
            ),
            false => format!("nothing to gather: the limits have no room for a row of {row} tokens"),
        }));
    }
    let rows = rows_of_text(&index);
    Ok(Gathered {
        tokens: rows * context,
        bytes: rows as u64 * row_bytes(&index.about),
        done: index.done,
    })
}

fn read_index(folder: &Path) -> Result<Index, HarvestError> {
    let broken = |why: String| HarvestError::Broken {
        folder: folder.to_owned(),
        why,
    };
    let file = folder.join("harvest.json");
    let text = std::fs::read_to_string(&file).map_err(io(&file))?;
    let index: Index = serde_json::from_str(&text).map_err(|e| broken(e.to_string()))?;
    let about = &index.about;
    let sane = about.format == FORMAT
        && (1..=1 << 20).contains(&about.width)
        && (1..=1 << 24).contains(&about.context)
        && !about.layers.is_empty()
        && index.shards.iter().all(|n| *n <= 1 << 24);
    match sane {
        true => Ok(index),
        false => Err(broken(format!(
            "sizes or format `{}` that are not read",
            about.format
        ))),
    }
}

/// The rows of one layer of a harvest.
#[derive(Debug, Clone)]
pub struct Rows {
    folder: PathBuf,
    layer: usize,
    index: Index,
}

impl Rows {
    /// Opens a harvest.
    ///
    /// # Errors
    /// When it is none, or does not have the layer.
    pub fn open(folder: &Path, layer: usize) -> Result<Self, HarvestError> {
        let index = read_index(folder)?;
        if !index.about.layers.contains(&layer) {
            let hint = format!("this harvest has {:?}", index.about.layers);
            return Err(HarvestError::Layer { layer, hint });
        }
        Ok(Self {
            folder: folder.to_owned(),
            layer,
            index,
        })
    }

    /// What it was made of.
    pub fn about(&self) -> &About {
        &self.index.about
    }

    /// Tokens in it.
    pub fn tokens(&self) -> usize {
        self.index.shards.iter().sum::<usize>() * self.index.about.context
    }

    /// Number of shards.
    pub fn shards(&self) -> usize {
        self.index.shards.len()
    }

    fn tensor(
        &self,
        part: &str,
        name: &str,
        shard: usize,
        dtype: Dtype,
        width: usize,
    ) -> Result<Vec<u8>, HarvestError> {
        let broken = |why: String| HarvestError::Broken {
            folder: self.folder.clone(),
            why,
        };
        let file = shard_file(&self.folder, part, shard);
        let bytes = std::fs::read(&file).map_err(io(&file))?;
        let all = SafeTensors::deserialize(&bytes).map_err(|e| broken(format!("{}: {e}", file.display())))?;
        let view = all
            .tensor(name)
            .map_err(|e| broken(format!("{}: {e}", file.display())))?;
        let rows = self.index.shards.get(shard).copied().unwrap_or(0) * self.index.about.context;
        match view.dtype() == dtype && view.shape().iter().product::<usize>() == rows * width {
            true => Ok(view.data().to_vec()),
            false => Err(broken(format!(
                "{}: `{name}` is not {rows} rows of {width}",
                file.display()
            ))),
        }
    }

    /// Bits of the rows of a shard, `[rows, width]`.
    ///
    /// # Errors
    /// When the shard cannot be read.
    pub fn bits(&self, shard: usize) -> Result<Vec<u16>, HarvestError> {
        let part = format!("layer-{}", self.layer);
        let bytes = self.tensor(&part, "z", shard, Dtype::BF16, self.index.about.width)?;
        Ok(bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| u16::from_le_bytes(*b))
            .collect())
    }

    /// Rows of a shard, `[rows, width]`.
    ///
    /// # Errors
    /// When the shard cannot be read.
    pub fn rows(&self, shard: usize) -> Result<Vec<f32>, HarvestError> {
        Ok(self.bits(shard)?.into_iter().map(bf16_to_f32).collect())
    }

    /// The first `n` rows, `[n, width]`; fewer if there are no more.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn first(&self, n: usize) -> Result<Vec<f32>, HarvestError> {
        let (mut values, most) = (Vec::new(), n * self.index.about.width);
        for shard in 0..self.shards() {
            if values.len() < most {
                values.extend(self.rows(shard)?);
            }
        }
        values.truncate(most);
        Ok(values)
    }

    /// Tokens of a shard.
    ///
    /// # Errors
    /// When the shard cannot be read.
    pub fn token_ids(&self, shard: usize) -> Result<Vec<u32>, HarvestError> {
        let bytes = self.tensor("tokens", "tokens", shard, Dtype::U32, 1)?;
        Ok(bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect())
    }
}

/// Batches of shuffled rows: every row once an epoch, in an order that follows from the seed alone.
///
/// Shards stand in an order drawn for the epoch; as many as fit into `pool` bytes are held at once, and their rows mixed.
pub struct Batches {
    rows: Rows,
    seed: u64,
    batch: usize,
    /// Shards held at once.
    group: usize,
    epoch: u64,
    /// Which group of the epoch is held.
    held: usize,
    pool: Vec<u16>,
    order: Vec<u32>,
    at: usize,
}

impl Batches {
    /// Batches of `batch` rows out of `rows`, with about `pool` bytes held.
    ///
    /// # Errors
    /// When there are no rows.
    pub fn new(rows: Rows, batch: usize, pool: u64, seed: u64) -> Result<Self, HarvestError> {
        if rows.tokens() == 0 || batch == 0 {
            return Err(HarvestError::Setting("there are no rows to train on".into()));
        }
        let about = &rows.index.about;
        let shard = (about.shard * about.context * about.width * 2).max(1) as u64;
        let group = (pool / shard).clamp(1, rows.shards() as u64) as usize;
        Ok(Self {
            rows,
            seed,
            batch,
            group,
            epoch: 0,
            held: usize::MAX,
            pool: Vec::new(),
            order: Vec::new(),
            at: 0,
        })
    }

    fn groups(&self) -> usize {
        self.rows.shards().div_ceil(self.group)
    }

    fn hold(&mut self, epoch: u64, group: usize) -> Result<(), HarvestError> {
        let mut shards: Vec<usize> = (0..self.rows.shards()).collect();
        let mut rng = fastrand::Rng::with_seed(self.seed ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        rng.shuffle(&mut shards);
        self.pool.clear();
        for &shard in shards.iter().skip(group * self.group).take(self.group) {
            self.pool.extend(self.rows.bits(shard)?);
        }
        let n = self.pool.len() / self.rows.index.about.width;
        self.order = (0..n as u32).collect();
        let mut rng =
            fastrand::Rng::with_seed(rng.u64(..) ^ (group as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03));
        rng.shuffle(&mut self.order);
        (self.epoch, self.held, self.at) = (epoch, group, 0);
        Ok(())
    }

    /// The next batch, `[n, width]`; `n` is smaller at the end of what is held.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn next_batch(&mut self) -> Result<Vec<f32>, HarvestError> {
        if self.held == usize::MAX {
            self.hold(0, 0)?;
        }
        if self.at == self.order.len() {
            match self.held + 1 < self.groups() {
                true => self.hold(self.epoch, self.held + 1)?,
                false => self.hold(self.epoch + 1, 0)?,
            }
        }
        let width = self.rows.index.about.width;
        let to = (self.at + self.batch).min(self.order.len());
        let mut out = Vec::with_capacity((to - self.at) * width);
        for &r in &self.order[self.at..to] {
            out.extend(
                self.pool[r as usize * width..][..width]
                    .iter()
                    .map(|x| bf16_to_f32(*x)),
            );
        }
        self.at = to;
        Ok(out)
    }

    /// Stands where it would after `batches` batches.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn seek(&mut self, batches: u64) -> Result<(), HarvestError> {
        let context = self.rows.index.about.context;
        let mut left = batches;
        let mut epoch = 0;
        loop {
            let mut shards: Vec<usize> = (0..self.rows.shards()).collect();
            let mut rng =
                fastrand::Rng::with_seed(self.seed ^ u64::wrapping_mul(epoch, 0x9e37_79b9_7f4a_7c15));
            rng.shuffle(&mut shards);
            for group in 0..self.groups() {
                let held = shards.iter().skip(group * self.group).take(self.group);
                let rows: usize = held.map(|s| self.rows.index.shards[*s] * context).sum();
                let here = rows.div_ceil(self.batch) as u64;
                if left < here {
                    self.hold(epoch, group)?;
                    self.at = left as usize * self.batch;
                    return Ok(());
                }
                left -= here;
            }
            epoch += 1;
        }
    }
}
