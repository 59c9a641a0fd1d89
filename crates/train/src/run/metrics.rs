//! `metrics.jsonl`: one object a line, with stable keys. Only `tok_s`, `rss_mb`, `peak_mb` and `seconds` depend on clock and machine.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::TrainError;

/// The file, open for lines.
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens it; lines of steps after `step` are dropped, since the run goes on from there.
    pub(super) fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let kept: Vec<String> = match std::fs::read_to_string(path) {
            Err(_) => Vec::new(),
            Ok(text) => text
                .lines()
                .filter(|line| {
                    serde_json::from_str::<Value>(line)
                        .is_ok_and(|v| v["step"].as_u64().is_none_or(|s| s <= step))
                })
                .map(str::to_string)
                .collect(),
        };
        let mut all = kept.join("\n");
        if !all.is_empty() {
            all.push('\n');
        }
        let new = path.with_extension("jsonl.new");
        std::fs::write(&new, all).map_err(TrainError::io(&new))?;
        std::fs::rename(&new, path).map_err(TrainError::io(path))?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(TrainError::io(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
        })
    }

    pub(super) fn line(&mut self, value: &Value) -> Result<(), TrainError> {
        writeln!(self.file, "{value}").map_err(TrainError::io(&self.path))
    }
}
