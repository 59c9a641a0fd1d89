//! The rig: methods hang their parts on the seams here, and what does not go together is refused by name.

use std::fmt;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::choice::Chosen;
use super::facts::Facts;
use super::hook::HookMaker;
use super::planner::{DecodePlanner, Planner};
use super::policy::CachePolicy;
use super::program::Program;
use super::prompt::PromptPass;
use super::rotation::Stretch;
use crate::chunk_use::ChunkUse;
use crate::hooks::{HookPlan, HookSpec, Sources};

/// Why methods cannot be installed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RigError {
    /// Two methods hang their parts on a seam that holds one.
    #[error("`{first}` and `{second}` do not go together: both {what}\nhint: choose one of them")]
    Conflict {
        /// Installed first.
        first: &'static str,
        /// Installed second.
        second: &'static str,
        /// What both do.
        what: String,
    },
    /// Two methods whose parts mean nothing together.
    #[error("`{first}` and `{second}` do not go together: {why}\nhint: choose one of them")]
    Apart {
        /// One.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// Why not.
        why: String,
    },
    /// The method does not fit the model.
    #[error("`{method}` cannot run on `{model}`: {why}")]
    Model {
        /// The method.
        method: &'static str,
        /// The model.
        model: String,
        /// What is missing.
        why: String,
    },
    /// A setting that only makes no sense together with others or with the model.
    #[error("`{method}`: {why}")]
    Setting {
        /// The method.
        method: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A profile that cannot be used.
    #[error("`{method}` needs a profile of kind `{kind}`: {why}\nhint: {hint}")]
    Profile {
        /// The method.
        method: &'static str,
        /// Such as `heads`.
        kind: &'static str,
        /// What is wrong.
        why: String,
        /// How to get one.
        hint: String,
    },
}

/// Where profiles are looked for: a path where that is allowed, then `FOLDER/KIND/NAME.json`, or another ending, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Profiles {
    /// Folders.
    pub folders: Vec<PathBuf>,
    /// Whether a name may be a path of this machine, too: for those who started the process, not for those at the other end of a wire.
    pub paths: bool,
}

impl Profiles {
    /// Names are looked for in `folders` only.
    pub fn named_in(folders: Vec<PathBuf>) -> Self {
        Self {
            folders,
            paths: false,
        }
    }

    /// Names may be paths, too.
    #[must_use]
    pub fn or_paths(self) -> Self {
        Self { paths: true, ..self }
    }

    /// The text of the profile `name` of this kind: a file of that path if paths are allowed and there is one, or one in the
    /// folders.
    ///
    /// # Errors
    /// When it is nowhere, or cannot be read; says where it was looked for.
    pub fn read(&self, kind: &str, name: &str) -> Result<String, String> {
        let path = self.find(kind, name, "json")?;
        std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// The bytes of the profile `name` of this kind: a file of that path, or `NAME.safetensors` in the folders.
    ///
    /// # Errors
    /// As [`Profiles::read`], or when it has more than `longest` bytes.
    pub fn read_bytes(&self, kind: &str, name: &str, longest: u64) -> Result<Vec<u8>, String> {
        let path = self.find(kind, name, "safetensors")?;
        let mut bytes = Vec::new();
        std::fs::File::open(&path)
            .and_then(|file| file.take(longest.saturating_add(1)).read_to_end(&mut bytes))
            .map_err(|e| format!("{}: {e}", path.display()))?;
        match bytes.len() as u64 > longest {
            true => Err(format!("{}: more than {longest} bytes", path.display())),
            false => Ok(bytes),
        }
    }

    /// The folder that is the profile `name` of this kind: a folder of that path if there is one, or `NAME/` in the folders.
    pub fn folder(&self, kind: &str, name: &str) -> Option<PathBuf> {
        let places = self.places(kind, name).map(|folder| folder.join(name));
        self.own(name).into_iter().chain(places).find(|p| p.is_dir())
    }

    /// Folders of this kind, for what is a plain name: a path could lead out of them.
    fn places(&self, kind: &str, name: &str) -> impl Iterator<Item = PathBuf> {
        let plain = Path::new(name).file_name() == Some(name.as_ref());
        self.folders
            .iter()
            .filter(move |_| plain)
            .map(move |f| f.join(kind))
    }

    /// `name` as a path, where that is allowed.
    fn own(&self, name: &str) -> Option<PathBuf> {
        self.paths.then(|| PathBuf::from(name))
    }

    fn find(&self, kind: &str, name: &str, ending: &str) -> Result<PathBuf, String> {
        let places = self
            .places(kind, name)
            .map(|folder| folder.join(format!("{name}.{ending}")));
        let found = self.own(name).into_iter().chain(places).find(|p| p.is_file());
        found.ok_or_else(|| {
            let looked: Vec<String> = self
                .folders
                .iter()
                .map(|f| f.join(kind).display().to_string())
                .collect();
            let no_file = if self.paths {
                "is no file, and not"
            } else {
                "is not"
            };
            format!("`{name}` {no_file} in {}", looked.join(", "))
        })
    }
}

/// A part on a seam, and whose it is.
struct Hung<T> {
    owner: &'static str,
    part: T,
}

/// What the methods of one request have installed so far.
pub struct Rig<'m> {
    facts: &'m Facts,
    profiles: &'m Profiles,
    installing: &'static str,
    prompt: Vec<Hung<Arc<dyn PromptPass>>>,
    stretch: Option<Hung<Stretch>>,
    planner: Option<Hung<Arc<dyn Planner>>>,
    decode_planner: Option<Hung<Arc<dyn DecodePlanner>>>,
    correct_every: Option<NonZeroUsize>,
    policy: Option<Hung<Arc<dyn CachePolicy>>>,
    chunks: Option<Hung<Arc<dyn ChunkUse>>>,
    plan: Option<Hung<Arc<HookPlan>>>,
    hooks: Vec<Hung<Arc<dyn HookMaker>>>,
    /// Sum of the files that planners were built from; 0: none.
    files: u64,
}

impl fmt::Debug for Rig<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owners = self
            .prompt
            .iter()
            .map(|h| h.owner)
            .chain(self.stretch.iter().map(|h| h.owner))
            .chain(self.planner.iter().map(|h| h.owner))
            .chain(self.decode_planner.iter().map(|h| h.owner))
            .chain(self.policy.iter().map(|h| h.owner))
            .chain(self.chunks.iter().map(|h| h.owner))
            .chain(self.plan.iter().map(|h| h.owner))
            .chain(self.hooks.iter().map(|h| h.owner));
        f.debug_list().entries(owners).finish()
    }
}

/// Hangs `part` on a seam that holds one.
fn hang<T>(seam: &mut Option<Hung<T>>, owner: &'static str, what: &str, part: T) -> Result<(), RigError> {
    match seam {
        Some(first) => Err(RigError::Conflict {
            first: first.owner,
            second: owner,
            what: what.to_string(),
        }),
        None => {
            *seam = Some(Hung { owner, part });
            Ok(())
        }
    }
}

impl<'m> Rig<'m> {
    /// Installs `chosen` on a model, in the order of their axes, and checks that the parts go together.
    ///
    /// # Errors
    /// When a method does not fit the model, or two do not go together.
    pub fn assemble(
        facts: &'m Facts,
        profiles: &'m Profiles,
        chosen: &[Chosen],
    ) -> Result<Program, RigError> {
        let mut rig = Self {
            facts,
            profiles,
            installing: "",
            prompt: Vec::new(),
            stretch: None,
            planner: None,
            decode_planner: None,
            correct_every: None,
            policy: None,
            chunks: None,
            plan: None,
            hooks: Vec::new(),
            files: 0,
        };
        let mut chosen = chosen.to_vec();
        chosen.sort_by_key(|c| c.card().axis);
        for pair in chosen.windows(2) {
            let [first, second] = [pair[0].card(), pair[1].card()];
            if first.axis == second.axis {
                return Err(RigError::Conflict {
                    first: first.name,
                    second: second.name,
                    what: format!("are methods of the axis `{}`", first.axis),
                });
            }
        }
        for c in &chosen {
            rig.installing = c.card().name;
            c.method.install(&c.knobs, &mut rig)?;
        }
        rig.check()?;
        rig.check_chunks()?;
        Ok(rig.finish(&chosen))
    }

    /// Refuses parts on different seams that mean nothing together.
    fn check(&self) -> Result<(), RigError> {
        let reader = self.hooks.iter().find(|h| h.part.sees_all());
        if let (Some(reader), Some(policy)) = (reader, &self.policy) {
            return Err(RigError::Apart {
                first: policy.owner,
                second: reader.owner,
                why: format!(
                    "`{}` must see every row of the sequence, and `{}` takes rows away",
                    reader.owner, policy.owner
                ),
            });
        }
        Ok(())
    }

    fn finish(self, chosen: &[Chosen]) -> Program {
        let exact = chosen.iter().all(|c| c.card().exact);
        Program {
            methods: chosen.iter().map(|c| (c.card().axis, c.knobs.clone())).collect(),
            exact,
            prompt: self.prompt.into_iter().map(|h| h.part).collect(),
            stretch: self.stretch.map(|h| h.part).unwrap_or_default(),
            planner: self.planner.map(|h| h.part),
            decode_planner: self.decode_planner.map(|h| h.part),
            correct_every: self.correct_every,
            policy: self.policy.map(|h| h.part),
            chunks: self.chunks.map(|h| h.part),
            // Code hangs on an empty plan where there is none.
            plan: self.plan.map(|h| h.part).or_else(|| {
                let code = !self.hooks.is_empty();
                let empty =
                    HookPlan::compile(&HookSpec::default(), self.facts.hook_shape(), &Sources::default());
                empty.ok().filter(|_| code).map(Arc::new)
            }),
            hooks: self.hooks.into_iter().map(|h| h.part).collect(),
            files: self.files,
        }
    }

    /// The model that the methods are installed on.
    pub fn facts(&self) -> &'m Facts {
        self.facts
    }

    /// The text of a profile of the model.
    ///
    /// # Errors
    /// When there is none of this name; `hint` says how to get one.
    pub fn profile(&self, kind: &'static str, name: &str, hint: &str) -> Result<String, RigError> {
        self.profiles
            .read(kind, name)
            .map_err(|why| self.unusable(kind, why, hint))
    }

    /// The bytes of a profile of the model that is no text, at most `longest`.
    ///
    /// # Errors
    /// As [`Rig::profile`].
    pub fn profile_bytes(
        &self,
        kind: &'static str,
        name: &str,
        longest: u64,
        hint: &str,
    ) -> Result<Vec<u8>, RigError> {
        self.profiles
            .read_bytes(kind, name, longest)
            .map_err(|why| self.unusable(kind, why, hint))
    }

    /// The file of a profile of the model, `NAME.ENDING` in the folders.
    ///
    /// # Errors
    /// As [`Rig::profile`].
    pub fn profile_file(
        &self,
        kind: &'static str,
        name: &str,
        ending: &str,
        hint: &str,
    ) -> Result<PathBuf, RigError> {
        self.profiles
            .find(kind, name, ending)
            .map_err(|why| self.unusable(kind, why, hint))
    }

    /// The folder of a profile of the model that has several files, if there is one of this name.
    pub fn profile_folder(&self, kind: &'static str, name: &str) -> Option<PathBuf> {
        self.profiles.folder(kind, name)
    }

    /// What a planner makes of a prompt depends on this file: pages are shared only with requests that depend on the same one.
    pub fn depends_on(&mut self, file: &[u8]) {
        self.files = XxHash3_64::oneshot_with_seed(self.files, file);
    }

    /// An error about a profile of this kind that is not there or cannot be used; `hint` says how to get one that can.
    pub fn unusable(&self, kind: &'static str, why: impl Into<String>, hint: impl Into<String>) -> RigError {
        RigError::Profile {
            method: self.installing,
            kind,
            why: why.into(),
            hint: hint.into(),
        }
    }

    /// An error that says why the method does not fit the model.
    pub fn misfit(&self, why: impl Into<String>) -> RigError {
        RigError::Model {
            method: self.installing,
            model: self.facts.name.clone(),
            why: why.into(),
        }
    }

    /// An error about settings that each are in range.
    pub fn senseless(&self, why: impl Into<String>) -> RigError {
        RigError::Setting {
            method: self.installing,
            why: why.into(),
        }
    }

    /// Rewrites prompts, after the passes that are there already.
    pub fn add_prompt_pass(&mut self, pass: Arc<dyn PromptPass>) {
        self.prompt.push(Hung {
            owner: self.installing,
            part: pass,
        });
    }

    /// Changes angles and scales.
    ///
    /// # Errors
    /// When another method does.
    pub fn set_stretch(&mut self, stretch: Stretch) -> Result<(), RigError> {
        hang(
            &mut self.stretch,
            self.installing,
            "set the angles of positions",
            stretch,
        )
    }

    /// Chooses the keys that the rows of a prompt read.
    ///
    /// # Errors
    /// When another method does.
    pub fn set_planner(&mut self, planner: Arc<dyn Planner>) -> Result<(), RigError> {
        hang(
            &mut self.planner,
            self.installing,
            "choose the keys that a prompt reads",
            planner,
        )
    }

    /// Chooses the keys that drawn tokens read.
    ///
    /// # Errors
    /// When another method does.
    pub fn set_decode_planner(&mut self, planner: Arc<dyn DecodePlanner>) -> Result<(), RigError> {
        hang(
            &mut self.decode_planner,
            self.installing,
            "choose the keys that drawn tokens read",
            planner,
        )
    }

    /// Has the rows of drawn tokens replaced, once there are `every` of them, by those of a dense prompt; the method is the one that chooses
    /// the keys that drawn tokens read.
    pub fn correct_drawn(&mut self, every: NonZeroUsize) {
        self.correct_every = Some(every);
    }

    /// Decides what the cache keeps.
    ///
    /// # Errors
    /// When another method does.
    pub fn set_cache_policy(&mut self, policy: Arc<dyn CachePolicy>) -> Result<(), RigError> {
        hang(
            &mut self.policy,
            self.installing,
            "decide what the cache keeps",
            policy,
        )
    }

    /// Makes the prompt out of documents that were computed before.
    ///
    /// # Errors
    /// When another method does.
    pub fn set_chunk_use(&mut self, chunks: Arc<dyn ChunkUse>) -> Result<(), RigError> {
        hang(
            &mut self.chunks,
            self.installing,
            "make the prompt out of documents",
            chunks,
        )
    }

    /// Documents were computed with the model's own angles, by nobody's hooks, and are no rows of the sequence that a policy could cut.
    fn check_chunks(&self) -> Result<(), RigError> {
        let Some(chunks) = &self.chunks else {
            return Ok(());
        };
        let prompt = self
            .prompt
            .iter()
            .map(|h| (h.owner, "change what the prompt is made of"));
        let angles = self.stretch.iter().map(|h| (h.owner, "decide where keys stand"));
        let planner = self
            .planner
            .iter()
            .map(|h| (h.owner, "decide which keys a prompt reads"));
        let policy = self
            .policy
            .iter()
            .map(|h| (h.owner, "decide which rows are attended"));
        let plan = self
            .plan
            .iter()
            .map(|h| (h.owner, "decide which rows are computed"));
        let code = self
            .hooks
            .iter()
            .map(|h| (h.owner, "decide which rows are computed"));
        let other = prompt
            .chain(angles)
            .chain(planner)
            .chain(policy)
            .chain(plan)
            .chain(code)
            .find(|o| o.0 != chunks.owner);
        other.map_or(Ok(()), |(second, what)| {
            Err(RigError::Conflict {
                first: chunks.owner,
                second,
                what: what.to_string(),
            })
        })
    }

    /// Reads or changes activations, as data.
    ///
    /// # Errors
    /// When the model has no such layer or head, or another method has a plan of its own.
    pub fn set_hooks(&mut self, spec: &HookSpec) -> Result<(), RigError> {
        let plan = HookPlan::compile(spec, self.facts.hook_shape(), &Sources::default());
        let plan = plan.map_err(|e| self.misfit(e.to_string()))?;
        hang(
            &mut self.plan,
            self.installing,
            "have a plan of hooks",
            Arc::new(plan),
        )
    }

    /// Reads or changes activations, by code; after the plan's edits, in the order of the axes.
    pub fn add_hook(&mut self, hook: Arc<dyn HookMaker>) {
        self.hooks.push(Hung {
            owner: self.installing,
            part: hook,
        });
    }
}
