//! `--method` and `--document`: the methods of a run, from what the command line says to a checked program.

use std::path::PathBuf;
use std::sync::Arc;

use antefix_attention::method::{Profiles, Program, RawMethods, Rig, Trust};
use antefix_models::decoder::Model;
use antefix_models::store::Store;
use antefix_papers::ALL;
use clap::Args;

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
        let mut raw = RawMethods::default();
        for text in self.methods.iter().map(String::as_str).chain(more) {
            raw.add(ALL, text).map_err(Failure::input)?;
        }
        let chosen = raw.resolve(ALL, Trust::Local).map_err(Failure::input)?;
        if chosen.is_empty() {
            return Ok(None);
        }
        let program = Rig::assemble(&model.facts(), &profiles()?, &chosen).map_err(Failure::input)?;
        Ok(Some(Arc::new(program)))
    }
}

/// Where profiles lie: `profiles/` in antefix's home.
pub(crate) fn profiles() -> Result<Profiles, Failure> {
    let home = Store::open().map_err(Failure::input)?.home().to_path_buf();
    Ok(Profiles {
        folders: vec![home.join("profiles")],
    })
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
