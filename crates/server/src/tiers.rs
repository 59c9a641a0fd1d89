//! What is cached, how long, and what is below the memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use antefix_engine::{CacheOptions, identity};
use antefix_kv::disk::{DiskTier, Limits};
use antefix_kv::tiers::{Tier, Tiers};
use antefix_kv::{Fingerprint, Identity};
use antefix_models::decoder::Model;
use serde::{Deserialize, Serialize};

use crate::ServerError;

/// How a server caches.
#[derive(Debug, Clone, Default)]
pub struct CacheConfig {
    /// Bytes of memory that cached prefixes may hold; `None` = whatever running requests leave of the KV pages.
    pub bytes: Option<usize>,
    /// How long an unused prefix is kept if its request says nothing; `None` = until the memory is needed.
    pub ttl: Option<Duration>,
    /// A folder for blocks that survive a restart.
    pub disk: Option<DiskConfig>,
    /// A store on another machine, asked after the folder. Needs the feature `remote-cache`.
    pub remote: Option<RemoteConfig>,
}

/// A store that `opendal` can talk to.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteConfig {
    /// `fs:///folder`, `redis://host:6379`, `s3://bucket/prefix`.
    #[serde(serialize_with = "without_password")]
    pub uri: String,
    /// An answer that takes longer than so many milliseconds is none, and the store is left alone for a while.
    #[serde(default = "timeout_ms")]
    pub timeout_ms: u64,
    /// `opendal`'s options for the service, such as `region` or `default_ttl`.
    #[serde(default, skip_serializing)]
    pub options: BTreeMap<String, String>,
}

fn timeout_ms() -> u64 {
    500
}

fn without_password<S: serde::Serializer>(uri: &str, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&hidden(uri))
}

/// An address without the name and password before its host.
fn hidden(uri: &str) -> String {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return uri.to_owned();
    };
    let host = rest.find('/').unwrap_or(rest.len());
    match rest[..host].rfind('@') {
        Some(at) => format!("{scheme}://***{}", &rest[at..]),
        None => uri.to_owned(),
    }
}

impl RemoteConfig {
    /// The store at this address, with defaults.
    pub fn at(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            timeout_ms: timeout_ms(),
            options: BTreeMap::new(),
        }
    }

    /// Its address as it may be shown.
    pub fn shown(&self) -> String {
        hidden(&self.uri)
    }

    /// `timeout_ms` as a span of time.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

/// The cache folder.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// The folder; made if need be. One server writes it; others may read.
    pub dir: PathBuf,
    /// Bytes of all files in it.
    pub bytes: u64,
    /// Age at which a block is forgotten; `None` = never.
    pub ttl: Option<Duration>,
}

/// Bytes of blocks that wait to be written.
const QUEUE_BYTES: usize = 64 << 20;

/// A folder that takes longer to be read than this is read on while the server serves.
const OPEN_PATIENCE: Duration = Duration::from_secs(1);

/// How long a closing server waits for what is cached to be stored.
pub(crate) const STORE_PATIENCE: Duration = Duration::from_secs(10);

/// The engine's cache, with the tiers opened on their own thread. A folder that cannot be used is told of in the log; the server
/// runs without it.
///
/// # Errors
/// When the model has no identity or there is no thread.
pub(crate) fn open(config: &CacheConfig, model: &Model) -> Result<CacheOptions, ServerError> {
    let mut options = CacheOptions {
        bytes: config.bytes,
        ttl: config.ttl,
        below: None,
    };
    if config.disk.is_none() && config.remote.is_none() {
        return Ok(options);
    }
    let identity = identity(model)?;
    let fingerprint = identity.fingerprint();
    let remote = config
        .remote
        .as_ref()
        .map(|r| open_remote(r, fingerprint))
        .transpose()?;
    let disk = config.disk.clone();
    let open = move || -> Vec<Box<dyn Tier>> {
        let disk = disk.and_then(|disk| open_disk(&disk, &identity));
        disk.into_iter().chain(remote).collect()
    };
    let tiers = Tiers::start(open, QUEUE_BYTES)?;
    tiers.wait_open(OPEN_PATIENCE);
    options.below = Some((fingerprint, Arc::new(tiers)));
    Ok(options)
}

fn open_disk(disk: &DiskConfig, identity: &Identity) -> Option<Box<dyn Tier>> {
    let limits = Limits {
        ttl: disk.ttl,
        ..Limits::new(disk.bytes)
    };
    match DiskTier::open(&disk.dir, identity, limits) {
        Ok(tier) => {
            let stats = tier.stats();
            let dir = disk.dir.display();
            tracing::info!(%dir, blocks = stats.blocks, bytes = stats.bytes, "cache folder opened");
            Some(Box::new(tier))
        }
        Err(error) => {
            let why = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(%error, why, "no cache on disk");
            None
        }
    }
}

#[cfg(feature = "remote-cache")]
fn open_remote(remote: &RemoteConfig, fingerprint: Fingerprint) -> Result<Box<dyn Tier>, ServerError> {
    match crate::remote::Remote::open(remote, fingerprint) {
        Ok(tier) => Ok(Box::new(tier)),
        Err(error) => Err(ServerError::Remote(error.to_string())),
    }
}

#[cfg(not(feature = "remote-cache"))]
fn open_remote(remote: &RemoteConfig, _: Fingerprint) -> Result<Box<dyn Tier>, ServerError> {
    Err(ServerError::Remote(format!(
        "this build has no caches on other machines, and `{}` is one\nhint: build with --features remote-cache",
        remote.shown()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_its_password() {
        for (uri, shown) in [
            ("redis://host:6379/0", "redis://host:6379/0"),
            ("redis://:pass@host:6379/0", "redis://***@host:6379/0"),
            ("redis://me:p@ss@host", "redis://***@host"),
            ("s3://bucket/a@b", "s3://bucket/a@b"),
            ("nonsense", "nonsense"),
        ] {
            assert_eq!(hidden(uri), shown);
        }
        let told = serde_json::to_string(&RemoteConfig::at("redis://:pass@host")).expect("plain data");
        assert!(!told.contains("pass"), "{told}");
    }
}
