//! From a model's name to a model that runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use antefix_engine::{Budget, Engine, Options};
use antefix_kernels::cpu::Cpu;
use antefix_kernels::matmul::Precision;
use antefix_kernels::team::Team;
use antefix_kv::Pool;
use antefix_lab::heads::Subject;
use antefix_models::decoder::Model;
use antefix_models::files::ModelFiles;
use antefix_models::store::{Progress, Store, sha256};
use antefix_models::template::ChatTemplate;
use antefix_models::tokenizer::Tokenizer;
use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;

/// Which model.
#[derive(Args, Clone)]
pub(crate) struct ModelArgs {
    /// An alias (see `antefix models`), a `.gguf` file, a folder, or hf:OWNER/REPO[/FILE]
    #[arg(short, long, default_value = antefix_models::store::DEFAULT)]
    pub(crate) model: String,
}

/// How it runs.
#[derive(Args, Clone)]
pub(crate) struct RunArgs {
    /// Threads; default: all cores
    #[arg(short = 't', long)]
    pub(crate) threads: Option<usize>,
    /// Weights as in the file with int8 activations, or everything in f32
    #[arg(long, value_enum, default_value = "fast")]
    pub(crate) precision: PrecisionArg,
}

/// The names of [`Precision`].
#[derive(ValueEnum, Clone, Copy)]
pub(crate) enum PrecisionArg {
    /// Quantised weights meet int8 activations.
    Fast,
    /// Dequantised weights, f32 products, f32 cache.
    F32,
}

impl From<PrecisionArg> for Precision {
    fn from(arg: PrecisionArg) -> Self {
        match arg {
            PrecisionArg::Fast => Precision::Fast,
            PrecisionArg::F32 => Precision::F32,
        }
    }
}

/// Progress of a pull on standard error; silent when that is no terminal.
pub(crate) fn progress() -> (ProgressBar, impl FnMut(Progress)) {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let shown = bar.clone();
    let report = move |p: Progress| {
        bar.enable_steady_tick(Duration::from_millis(200));
        if let Progress::Writing { done, total } = &p {
            bar.set_length(*total);
            bar.set_position(*done);
        }
        bar.set_message(p.to_string());
    };
    (shown, report)
}

/// The file or folder of a model, pulled if need be.
pub(crate) fn path(args: &ModelArgs) -> Result<PathBuf, Failure> {
    let store = Store::open().map_err(Failure::input)?;
    let installed = store
        .list()
        .into_iter()
        .find(|e| e.name == args.model)
        .is_none_or(|e| e.installed);
    let (bar, mut report) = progress();
    if !installed && let Ok(entry) = store.show(&args.model) {
        eprintln!(
            "pulling {} ({} MB, {})",
            entry.name,
            entry.bytes / 1_000_000,
            entry.licence
        );
    }
    let path = store
        .resolve(&args.model, true, &mut report)
        .map_err(Failure::input);
    bar.finish_and_clear();
    path
}

/// The model's files, checked.
pub(crate) fn files(path: &Path) -> Result<ModelFiles, Failure> {
    ModelFiles::open(path).map_err(Failure::input)
}

/// Where documents that were computed ahead lie: `chunks/` in antefix's home.
pub(crate) fn chunk_folder() -> Result<PathBuf, Failure> {
    Ok(Store::open().map_err(Failure::input)?.home().join("chunks"))
}

/// The path of kernels to use.
pub(crate) fn cpu() -> Result<Cpu, Failure> {
    Cpu::from_env().map_err(|e| Failure::Input(anyhow!(e)))
}

/// Threads to use.
pub(crate) fn threads(asked: Option<usize>) -> Result<usize, Failure> {
    match asked {
        Some(0) => Err(Failure::Input(anyhow!("`--threads` is 0\nhint: at least 1"))),
        Some(n) if n > 1024 => Err(Failure::Input(anyhow!("`--threads` is {n}\nhint: at most 1024"))),
        Some(n) => Ok(n),
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
    }
}

/// A loaded model with its name and what identifies its file, for examinations.
pub(crate) fn subject(args: &ModelArgs, run: &RunArgs) -> Result<Subject, Failure> {
    let path = path(args)?;
    let Loaded { model, tokenizer } = Loaded::new(args, run)?;
    let sha256 = match path.is_file() {
        true => sha256(&path).map_err(Failure::other)?,
        false => String::new(),
    };
    Ok(Subject {
        model,
        tokenizer,
        name: args.model.clone(),
        sha256,
    })
}

/// A loaded model with its tokenizer.
pub(crate) struct Loaded {
    pub(crate) model: Arc<Model>,
    pub(crate) tokenizer: Arc<Tokenizer>,
}

impl Loaded {
    /// Pulls, opens, checks and packs.
    pub(crate) fn new(model: &ModelArgs, run: &RunArgs) -> Result<Self, Failure> {
        let cpu = cpu()?;
        let team = Arc::new(Team::new(threads(run.threads)?));
        let files = files(&path(model)?)?;
        let tokenizer = Arc::new(Tokenizer::open(&files).map_err(Failure::input)?);
        let model = Model::load(files, cpu, team, run.precision.into()).map_err(Failure::input)?;
        Ok(Self {
            model: Arc::new(model),
            tokenizer,
        })
    }

    /// The texts of the begin and end tokens, as templates want them.
    fn marks(&self) -> (String, String) {
        let text = |id: Option<u32>| id.map(|id| self.tokenizer.decode(&[id])).unwrap_or_default();
        (text(self.tokenizer.bos()), text(self.tokenizer.eos()))
    }

    /// The model's chat template, if it has one.
    pub(crate) fn template(&self) -> Result<Option<ChatTemplate>, Failure> {
        let (bos, eos) = self.marks();
        ChatTemplate::open(self.model.files(), &bos, &eos).map_err(Failure::input)
    }

    /// A chat template out of a file of its own.
    pub(crate) fn template_from(&self, path: &Path) -> Result<ChatTemplate, Failure> {
        let source = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))
            .map_err(Failure::Input)?;
        let (bos, eos) = self.marks();
        ChatTemplate::new(&source, &bos, &eos).map_err(Failure::input)
    }

    /// An engine for one conversation of at most `context` tokens; default: what the model was trained for, up to 8,192.
    pub(crate) fn engine(&self, context: Option<usize>) -> Result<Engine, Failure> {
        self.engine_with_room(context, 0)
    }

    /// An engine for one prompt of `tokens` tokens whose documents are reused: there may be more of them than fit into the context. Those
    /// that were computed ahead are found.
    pub(crate) fn engine_for_documents(
        &self,
        context: Option<usize>,
        tokens: usize,
    ) -> Result<Engine, Failure> {
        // The stored rows, those that are computed again, and pages that are not full.
        let engine = self.engine_with_room(context, tokens * 2)?;
        let folder = chunk_folder()?;
        if !folder.is_dir() {
            return Ok(engine);
        }
        let identity = antefix_engine::identity(&self.model).map_err(Failure::other)?;
        Ok(engine.with_chunks(identity.fingerprint(), folder))
    }

    /// Memory for the context, or for `room` tokens if that is more.
    fn engine_with_room(&self, context: Option<usize>, room: usize) -> Result<Engine, Failure> {
        let trained = self.model.spec().context;
        let context = context.unwrap_or(trained.min(8192));
        if context == 0 || context > antefix_kernels::ops::MAX_POSITIONS {
            return Err(Failure::Input(anyhow!(
                "`--ctx` is {context}\nhint: from 1 to {}",
                antefix_kernels::ops::MAX_POSITIONS
            )));
        }
        let sizes = Pool::new(self.model.kv_shape(), 0);
        // One sequence, and as much again for prefixes that stay cached; a quarter holds what planners keep of keys.
        let kv_bytes = sizes.bytes_for(context.min(trained).max(room) + 64) * 9 / 4;
        let options = Options {
            kv_bytes,
            context,
            budget: Budget::default(),
        };
        Ok(Engine::new(
            Arc::clone(&self.model),
            Arc::clone(&self.tokenizer),
            options,
        ))
    }
}
