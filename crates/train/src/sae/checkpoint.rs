//! Checkpoints: one safetensors file with everything that a later step depends on.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::config::{ConfigError, RawSae, SaeConfig};
use super::params::Params;
use super::trainer::{Place, Trainer};

const FORMAT: &str = "antefix sae training 1";

/// What a checkpoint says beside its tensors.
#[derive(serde::Serialize, serde::Deserialize)]
struct State {
    format: String,
    config: RawSae,
    place: Place,
}

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// It cannot be read or written.
    #[error("{}: {source}", .file.display())]
    Io {
        /// Which.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is none.
    #[error("{}: no checkpoint of a dictionary: {why}", .file.display())]
    Broken {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Its configuration cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl Trainer {
    /// Writes everything under a temporary name, then under `file`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, file: &Path) -> Result<(), CheckpointError> {
        let broken = |e: &dyn std::fmt::Display| CheckpointError::Broken {
            file: file.to_owned(),
            why: e.to_string(),
        };
        let mut tensors: Vec<(String, Dtype, usize, Vec<u8>)> = Vec::new();
        let groups = [
            ("param", &self.params),
            ("m", &self.moments[0]),
            ("v", &self.moments[1]),
        ];
        for (group, params) in groups {
            for (name, values) in params.named() {
                let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                tensors.push((format!("{group}.{name}"), Dtype::F32, values.len(), bytes));
            }
        }
        for (name, values) in [("fired", &self.fired), ("fires", &self.fires)] {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensors.push((name.into(), Dtype::U64, values.len(), bytes));
        }
        let views: Result<Vec<_>, _> = tensors
            .iter()
            .map(|(name, dtype, n, bytes)| TensorView::new(*dtype, vec![*n], bytes).map(|v| (name, v)))
            .collect();
        let text = |x: &dyn Fn() -> serde_json::Result<String>| x().map_err(|e| broken(&e));
        // One entry: several would be written in another order each time.
        let state = State {
            format: FORMAT.into(),
            config: self.cfg.raw().clone(),
            place: self.at,
        };
        let texts = HashMap::from([("state".to_string(), text(&|| serde_json::to_string(&state))?)]);
        let bytes =
            safetensors::serialize(views.map_err(|e| broken(&e))?, Some(texts)).map_err(|e| broken(&e))?;
        let io = |file: &Path| {
            let file = file.to_owned();
            |source| CheckpointError::Io { file, source }
        };
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder).map_err(io(folder))?;
        }
        let draft = file.with_extension("part");
        std::fs::write(&draft, bytes).map_err(io(&draft))?;
        std::fs::rename(&draft, file).map_err(io(file))
    }

    /// Reads what [`Trainer::save`] wrote: the next step gives the bits that it would have given there.
    ///
    /// # Errors
    /// When it cannot be read, or is no checkpoint.
    pub fn load(file: &Path) -> Result<Self, CheckpointError> {
        let broken = |why: String| CheckpointError::Broken {
            file: file.to_owned(),
            why,
        };
        let bytes = std::fs::read(file).map_err(|source| CheckpointError::Io {
            file: file.to_owned(),
            source,
        })?;
        let all = SafeTensors::deserialize(&bytes).map_err(|e| broken(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| broken(e.to_string()))?;
        let texts = header.metadata().clone().unwrap_or_default();
        let text = texts.get("state").map(String::as_str).unwrap_or_default();
        let state: State = serde_json::from_str(text).map_err(|e| broken(e.to_string()))?;
        if state.format != FORMAT {
            return Err(broken(format!(
                "its format is `{}`, `{FORMAT}` is read",
                state.format
            )));
        }
        let (cfg, at) = (SaeConfig::try_from(state.config)?, state.place);
        let data = |name: &str, dtype: Dtype, n: usize| {
            let view = all.tensor(name).map_err(|e| broken(e.to_string()))?;
            match view.dtype() == dtype && view.shape() == [n] {
                true => Ok(view.data().to_vec()),
                false => Err(broken(format!(
                    "`{name}` is {:?} {:?}, but must be {n} of {dtype:?}",
                    view.dtype(),
                    view.shape()
                ))),
            }
        };
        let group = |group: &str| -> Result<Params<f32>, CheckpointError> {
            let mut params = Params::zeros(&cfg);
            for (name, values) in params.named_mut() {
                let bytes = data(&format!("{group}.{name}"), Dtype::F32, values.len())?;
                let numbers = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                values.iter_mut().zip(numbers).for_each(|(to, x)| *to = x);
            }
            Ok(params)
        };
        let counts = |name: &str| -> Result<Vec<u64>, CheckpointError> {
            let bytes = data(name, Dtype::U64, cfg.features)?;
            Ok(bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| u64::from_le_bytes(*b))
                .collect())
        };
        Ok(Self {
            params: group("param")?,
            moments: [group("m")?, group("v")?],
            fired: counts("fired")?,
            fires: counts("fires")?,
            at,
            cfg,
        })
    }
}
