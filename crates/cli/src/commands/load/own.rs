//! A server of our own, in a process of its own, that lives as long as the measurement.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use antefix_models::spec::Arch;
use antefix_models::testing::tiny_gguf;
use anyhow::{Context, anyhow};

use super::TINY;
use crate::failure::Failure;
use crate::model::{PrecisionArg, RunArgs};

/// Keys of servers that are asked by two tenants; nobody else reaches those servers.
pub(super) const KEYS: [&str; 2] = ["the-victim-of-the-probe", "the-prober-of-the-cache"];

/// A file that is removed in the end.
pub(super) struct Config(PathBuf);

impl Config {
    /// Writes `text` into a new file.
    pub(super) fn new(text: &str) -> Result<Self, Failure> {
        Self::write("toml", text.as_bytes())
    }

    fn write(kind: &str, bytes: &[u8]) -> Result<Self, Failure> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("antefix-bench-{}-{count}.{kind}", std::process::id()));
        std::fs::write(&path, bytes)
            .with_context(|| format!("cannot write {}", path.display()))
            .map_err(Failure::Other)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0); // a temporary file stays behind at worst
    }
}

/// The server; it ends with this value.
pub(super) struct Own {
    child: Child,
    url: String,
    _model: Option<Config>,
}

impl Own {
    /// Starts `antefix serve` on a free port and waits until it says where.
    pub(super) fn start(model: &str, run: &RunArgs, flags: &[String]) -> Result<Self, Failure> {
        let tiny = match model {
            TINY => Some(Config::write("gguf", &tiny_gguf(Arch::Llama, 11))?),
            _ => None,
        };
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.arg("serve").arg("--model");
        match &tiny {
            Some(file) => command.arg(file.path()),
            None => command.arg(model),
        };
        command.args(["--host", "127.0.0.1", "--port", "0"]);
        if let Some(threads) = run.threads {
            command.args(["--threads", &threads.to_string()]);
        }
        if matches!(run.precision, PrecisionArg::F32) {
            command.args(["--precision", "f32"]);
        }
        let mut child = command
            .args(flags)
            .env_remove("ANTEFIX_CONFIG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let Some(stderr) = child.stderr.take() else {
            return Err(Failure::Other(anyhow!("the server has no standard error")));
        };
        let mut own = Self {
            child,
            url: String::new(),
            _model: tiny,
        };
        let mut lines = BufReader::new(stderr).lines();
        let mut said = Vec::new();
        for line in lines.by_ref() {
            let line = line?;
            if let Some((_, rest)) = line.split_once(" on http://") {
                let address = rest.split_whitespace().next().unwrap_or_default();
                own.url = format!("http://{address}");
                break;
            }
            said.push(line);
        }
        if own.url.is_empty() {
            return Err(Failure::Input(anyhow!(
                "the server did not start: {}",
                said.join("\n")
            )));
        }
        // What it says later is passed on: a full pipe would stop it.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| eprintln!("{line}")));
        Ok(own)
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended already
        let _ = self.child.wait();
    }
}
