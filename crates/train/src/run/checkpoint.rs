//! Checkpoints: `ckpt-000500/{model.safetensors, optim.safetensors, state.toml}`, whole or not there.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::model::{params_of, read_params, read_tensors, write_tensors};
use crate::error::TrainError;
use crate::model::Params;
use crate::optim::AdamW;

/// Format of the folder.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct StateFile {
    version: u32,
    step: u64,
    optimiser_steps: u64,
}

impl StateFile {
    /// That of a checkpoint's folder.
    fn read(folder: &Path) -> Result<Self, TrainError> {
        let file = folder.join("state.toml");
        let text = std::fs::read_to_string(&file).map_err(TrainError::io(&file))?;
        let found: Self = toml::from_str(&text).map_err(|e| TrainError::file(&file, e.to_string()))?;
        if found.version != VERSION {
            return Err(TrainError::file(
                &file,
                format!("version {} is not {VERSION}", found.version),
            ));
        }
        Ok(found)
    }
}

/// A finished checkpoint of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its folder.
    pub folder: PathBuf,
    /// Steps done.
    pub step: u64,
}

impl Checkpoint {
    /// The newest of a run, if it has one: what the file `latest` names.
    ///
    /// # Errors
    /// When `latest` names a folder that is not there or not whole.
    pub fn latest(run: &Path) -> Result<Option<Self>, TrainError> {
        let pointer = run.join("latest");
        let name = match std::fs::read_to_string(&pointer) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(TrainError::io(&pointer)(e)),
            Ok(name) => name,
        };
        let name = name.trim();
        if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(TrainError::file(
                &pointer,
                format!("`{name}` is not a checkpoint of this folder"),
            ));
        }
        let folder = run.join(name);
        let step = StateFile::read(&folder)?.step;
        Ok(Some(Self { folder, step }))
    }

    /// Writes one under a temporary name, then gives it its own, points `latest` at it and removes all but the newest two.
    pub(super) fn write(
        run: &Path,
        step: u64,
        params: &Params,
        optimiser: &AdamW,
    ) -> Result<Self, TrainError> {
        let name = format!("ckpt-{step:06}");
        let (folder, new) = (run.join(&name), run.join(format!(".new-{name}")));
        let _ = std::fs::remove_dir_all(&new);
        let done = Self::fill(&new, step, params, optimiser);
        if done.is_err() {
            // A full disk: what was written is of no use, and its room is needed.
            let _ = std::fs::remove_dir_all(&new);
        }
        done?;
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::rename(&new, &folder).map_err(TrainError::io(&folder))?;
        let pointer = run.join(".latest");
        std::fs::write(&pointer, &name).map_err(TrainError::io(&pointer))?;
        std::fs::rename(&pointer, run.join("latest")).map_err(TrainError::io(run))?;
        Self::prune(run);
        Ok(Self { folder, step })
    }

    fn fill(new: &Path, step: u64, params: &Params, optimiser: &AdamW) -> Result<(), TrainError> {
        std::fs::create_dir_all(new).map_err(TrainError::io(new))?;
        write_tensors(&new.join("model.safetensors"), params_of(params)?, &[])?;
        let moments = optimiser
            .state(params)
            .map(|(name, values)| (name, vec![values.len()], values.to_vec()))
            .collect();
        write_tensors(&new.join("optim.safetensors"), moments, &[])?;
        let state = StateFile {
            version: VERSION,
            step,
            optimiser_steps: optimiser.steps(),
        };
        let file = new.join("state.toml");
        let text = toml::to_string(&state).map_err(|e| TrainError::file(&file, e.to_string()))?;
        std::fs::write(&file, text).map_err(TrainError::io(&file))
    }

    fn prune(run: &Path) {
        let Ok(entries) = std::fs::read_dir(run) else {
            return;
        };
        let mut names: Vec<String> = entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|n| n.starts_with("ckpt-"))
            .collect();
        names.sort();
        let old = names.len().saturating_sub(2);
        for name in &names[..old] {
            let _ = std::fs::remove_dir_all(run.join(name));
        }
    }

    /// Sets parameters and moments to what was saved.
    pub(super) fn restore(&self, params: &Params, optimiser: &mut AdamW) -> Result<(), TrainError> {
        read_params(&self.folder.join("model.safetensors"), params)?;
        let found = StateFile::read(&self.folder)?;
        let file = self.folder.join("optim.safetensors");
        let mut moments: std::collections::HashMap<String, Vec<f32>> = read_tensors(&file)?
            .into_iter()
            .map(|(name, _, values)| (name, values))
            .collect();
        optimiser
            .restore(params, found.optimiser_steps, |name| moments.remove(name))
            .map_err(|name| TrainError::file(&file, format!("`{name}` is missing or of another size")))
    }
}
