//! Hooks out of a file, and what they captured into one.

use std::path::PathBuf;
use std::sync::Arc;

use antefix_attention::hooks::{HookPlan, HookSpec, Observer, Sources};
use antefix_models::captures;
use antefix_models::decoder::Model;
use anyhow::{Context, anyhow};
use serde_json::json;

use crate::failure::Failure;

/// What to read or change inside the model.
#[derive(clap::Args, Clone)]
#[group(id = "hook-files")]
pub(crate) struct HookArgs {
    /// JSON file of captures, probes and edits (docs/hooks.md)
    #[arg(long, value_name = "FILE")]
    hooks: Option<PathBuf>,
    /// Captures of another run that edits take values from; repeatable
    #[arg(long, value_name = "FILE", requires = "hooks")]
    hook_source: Vec<PathBuf>,
    /// Write captured activations to this safetensors file
    #[arg(long, value_name = "FILE", requires = "hooks")]
    capture_out: Option<PathBuf>,
    /// Write what probes read to this JSON file
    #[arg(long, value_name = "FILE", requires = "hooks")]
    probe_out: Option<PathBuf>,
    /// Captures and readings take this much memory at most, MiB
    #[arg(long, default_value_t = 1024)]
    capture_mb: usize,
}

impl HookArgs {
    /// Those of a file; what they capture is not written.
    pub(crate) fn of(file: PathBuf) -> Self {
        Self {
            hooks: Some(file),
            hook_source: Vec::new(),
            capture_out: None,
            probe_out: None,
            capture_mb: 1024,
        }
    }

    /// The hooks of a run over a prompt of `prompt` tokens, if any were asked for.
    pub(crate) fn observer(&self, model: &Model, prompt: usize) -> Result<Option<Arc<Observer>>, Failure> {
        let Some(file) = &self.hooks else {
            return Ok(None);
        };
        let text = String::from_utf8(crate::commands::read(file)?)
            .map_err(|_| Failure::Input(anyhow!("`{}` is not UTF-8", file.display())))?;
        let spec: HookSpec = serde_json::from_str(&text)
            .with_context(|| format!("`{}` is no file of hooks", file.display()))
            .map_err(Failure::Input)?;
        let mut sources = Sources::default();
        for file in &self.hook_source {
            sources.add(captures::read(file).map_err(Failure::input)?);
        }
        let plan = HookPlan::compile(&spec, model.hook_shape(), &sources).map_err(Failure::input)?;
        let cap = self.capture_mb.saturating_mul(1 << 20);
        plan.check_cap(prompt, cap).map_err(Failure::input)?;
        Ok(Some(Arc::new(Observer::new(Arc::new(plan), prompt, cap))))
    }

    /// Writes what `observer` has, where it was asked for.
    pub(crate) fn write(&self, observer: Option<&Observer>) -> Result<(), Failure> {
        let Some(observer) = observer else {
            return Ok(());
        };
        if let Some(file) = &self.capture_out {
            captures::write(file, &observer.take()).map_err(Failure::other)?;
        }
        if let Some(file) = &self.probe_out {
            let probes = observer.take_readings();
            let probes: Vec<_> = probes
                .iter()
                .map(|(id, heads)| json!({ "id": id, "heads": heads }))
                .collect();
            let text = serde_json::to_string(&json!({ "probes": probes })).map_err(Failure::other)?;
            std::fs::write(file, text + "\n")
                .with_context(|| format!("while writing `{}`", file.display()))
                .map_err(Failure::Other)?;
        }
        if observer.dropped() > 0 {
            eprintln!(
                "antefix: {} rows were not kept: the limit of {} MiB is reached\nhint: --capture-mb",
                observer.dropped(),
                self.capture_mb
            );
        }
        Ok(())
    }
}
