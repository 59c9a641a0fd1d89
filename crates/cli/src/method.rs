//! `--method`, `--profile` and `--document`: the methods of a run, from what the command line says to a checked program.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use antefix_attention::method::{Band, Bands, Profiles, Program, RawMethods, Rig, Trust};
use antefix_models::decoder::Model;
use antefix_models::store::Store;
use antefix_papers::ALL;
use anyhow::{Context, anyhow};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// Which methods.
#[derive(Args, Clone, Default)]
pub(crate) struct MethodArgs {
    /// NAME[,knob=value...], repeatable, one per axis; or JSON by axis. `antefix methods` lists them
    #[arg(long = "method", value_name = "METHOD")]
    pub(crate) methods: Vec<String>,
}

impl MethodArgs {
    /// The program of these methods on `model`; `None` if there are none.
    ///
    /// # Errors
    /// When a name or a knob is wrong, the methods do not go together, or do not fit the model.
    pub(crate) fn program(&self, model: &Model) -> Result<Option<Arc<Program>>, Failure> {
        self.program_with(model, None)
    }

    /// The same with one more method, if there is one.
    ///
    /// # Errors
    /// As [`MethodArgs::program`].
    pub(crate) fn program_with(
        &self,
        model: &Model,
        more: Option<&str>,
    ) -> Result<Option<Arc<Program>>, Failure> {
        let program = assemble(&self.raw(more)?, model)?;
        Ok(Some(program).filter(|p| !p.is_dense()))
    }

    /// The program for a prompt of `tokens` tokens where `profile` holds for what these methods leave open; `None` if neither says
    /// anything.
    ///
    /// # Errors
    /// As [`MethodArgs::program`].
    pub(crate) fn program_by_length(
        &self,
        model: &Model,
        profile: &Profile,
        tokens: usize,
    ) -> Result<Option<Arc<Program>>, Failure> {
        match profile.bands.at(tokens) {
            None => self.program(model),
            Some(band) => Ok(Some(assemble(&self.raw(None)?.or(&band.methods), model)?)),
        }
    }

    fn raw(&self, more: Option<&str>) -> Result<RawMethods, Failure> {
        let mut raw = RawMethods::default();
        for text in self.methods.iter().map(String::as_str).chain(more) {
            raw.add(ALL, text).map_err(Failure::input)?;
        }
        Ok(raw)
    }
}

fn assemble(raw: &RawMethods, model: &Model) -> Result<Arc<Program>, Failure> {
    let chosen = raw.resolve(ALL, Trust::Local).map_err(Failure::input)?;
    let program = Rig::assemble(&model.facts(), &profiles()?, &chosen).map_err(Failure::input)?;
    Ok(Arc::new(program))
}

/// A file of methods by length of the prompt. Not to be mixed up with what the knob `profile` of some methods names, a table of heads.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Profile {
    /// The model that it was made for; `None`: any.
    pub(crate) model: Option<String>,
    /// The methods.
    pub(crate) bands: Bands,
}

/// Its text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileText {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(default)]
    band: Vec<Band>,
}

impl Profile {
    /// Reads `file`; methods and settings are checked, but not on a model.
    ///
    /// # Errors
    /// When it is no profile, bands overlap, or a method or a setting is wrong.
    pub(crate) fn read(file: &Path, trust: Trust) -> Result<Self, Failure> {
        let text = String::from_utf8_lossy(&crate::commands::read(file)?).into_owned();
        let wrong = || format!("`{}` is no profile of methods by length", file.display());
        if text.trim_start().starts_with('{') {
            return Err(Failure::Input(
                anyhow!(
                    "it is JSON\nhint: profiles by length are TOML; a table of heads is named by the knob of its method: \
                     razor_attention,profile={}",
                    file.display()
                )
                .context(wrong()),
            ));
        }
        let text: ProfileText = toml::from_str(&text)
            .with_context(wrong)
            .map_err(Failure::Input)?;
        let bands = Bands::new(text.band).and_then(|bands| bands.check(ALL, trust).map(|()| bands));
        Ok(Self {
            model: text.model,
            bands: bands.with_context(wrong).map_err(Failure::Input)?,
        })
    }

    /// The text of its file.
    ///
    /// # Errors
    /// Never, as long as bands can be written as TOML.
    pub(crate) fn text(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(&ProfileText {
            model: self.model.clone(),
            band: self.bands.all().to_vec(),
        })
    }

    /// Checks that `model`, asked for as `name`, is the one that it was made for, and that its methods fit.
    ///
    /// # Errors
    /// When it is another, or methods do not go together or do not fit it.
    pub(crate) fn fit(&self, model: &Model, name: &str, trust: Trust) -> Result<(), Failure> {
        let facts = model.facts();
        if let Some(own) = self
            .model
            .as_ref()
            .filter(|own| *own != name && **own != facts.name)
        {
            return Err(Failure::Input(anyhow!(
                "the profile is one of the model `{own}`, this is `{name}`\nhint: tune one for it, or take `model` out of the file"
            )));
        }
        self.bands
            .fit((ALL, trust), (&facts, &profiles()?), &RawMethods::default())
            .map_err(Failure::input)
    }
}

/// Methods by length.
#[derive(Args, Clone, Default)]
pub(crate) struct ProfileArgs {
    /// Methods by length of the prompt: a TOML file such as `antefix tune` writes; `--method` wins where both choose
    #[arg(long = "profile", value_name = "FILE")]
    file: Option<PathBuf>,
}

impl ProfileArgs {
    /// The profile, if there is one.
    ///
    /// # Errors
    /// As [`Profile::read`].
    pub(crate) fn read(&self) -> Result<Option<Profile>, Failure> {
        let read = |file: &PathBuf| Profile::read(file, Trust::Local);
        self.file.as_ref().map(read).transpose()
    }
}

/// Where profiles lie: `profiles/` in antefix's home.
pub(crate) fn profiles() -> Result<Profiles, Failure> {
    let home = Store::open().map_err(Failure::input)?.home().to_path_buf();
    Ok(Profiles::named_in(vec![home.join("profiles")]).or_paths())
}

/// Files that stand before the question.
#[derive(Args, Clone, Default)]
pub(crate) struct DocumentArgs {
    /// A text file that the question is about; repeatable. It stands in front of the prompt
    #[arg(long = "document", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

impl DocumentArgs {
    /// Their texts.
    pub(crate) fn read(&self) -> Result<Vec<String>, Failure> {
        self.files
            .iter()
            .map(|file| {
                let bytes = crate::commands::read(file)?;
                String::from_utf8(bytes)
                    .map_err(|_| Failure::Input(anyhow::anyhow!("`{}` is not UTF-8", file.display())))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<Profile, Failure> {
        let path = std::env::temp_dir().join(format!("antefix-profile-{}-{name}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        let read = Profile::read(&path, Trust::Local);
        std::fs::remove_file(&path).unwrap();
        read
    }

    #[test]
    fn a_profile_is_read_and_each_fault_is_named() {
        let good = "model = \"m\"\n[[band]]\nbelow = 4096\nprefill = \"dense\"\n[[band]]\nfrom = 4096\n\
                    prefill = \"flexprefill,gamma=0.95\"\ndecode = {name = \"tidaldecode\", share = 0.1}\n";
        let profile = read("good", good).unwrap();
        assert_eq!(profile.model.as_deref(), Some("m"));
        let said: Vec<String> = profile.bands.all().iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "prompts from 0 to below 4096: prefill = dense",
                "prompts from 4096: prefill = flexprefill,gamma=0.95; decode = tidaldecode,share=0.1"
            ]
        );
        for (bad, why) in [
            ("", "no band"),
            ("bands = 3\n", "unknown field `bands`"),
            ("[[band]]\nto = 3\n", "`to`, expected one of `prefill`"),
            ("[[band]]\nfrom = -1\n", "from"),
            ("[[band]]\nprefill = \"flexprefil\"\n", "choose from"),
            (
                "[[band]]\nfrom = 9\nprefill = \"flexprefill,gamma=2\"\n",
                "in the band from 9",
            ),
            ("[[band]]\ndecode = \"flexprefill\"\n", "write it under `prefill`"),
            ("[[band]]\nbelow = 9\n[[band]]\nfrom = 8\n", "overlap"),
            (
                "{\"format\": \"antefix-heads-1\"}",
                "a table of heads is named by the knob",
            ),
            ("[[band]\n", "no profile of methods by length"),
        ] {
            let failure = read("bad", bad).unwrap_err();
            assert!(
                failure.code() == 2 && failure.to_string().contains(why),
                "{bad}: {failure}"
            );
        }
    }
}
