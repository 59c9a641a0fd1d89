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
pub struct RemoteConfig {
    /// `fs:///folder`, `redis://host:6379`, `s3://bucket/prefix`.
    pub uri: String,
    /// `opendal`'s options for the service, such as `region` or `default_ttl`.
    #[serde(default, skip_serializing)]
    pub options: BTreeMap<String, String>,
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
    match crate::remote::Remote::open(&remote.uri, &remote.options, fingerprint) {
        Ok(tier) => Ok(Box::new(tier)),
        Err(error) => Err(ServerError::Remote(error.to_string())),
    }
}

#[cfg(not(feature = "remote-cache"))]
fn open_remote(remote: &RemoteConfig, _: Fingerprint) -> Result<Box<dyn Tier>, ServerError> {
    Err(ServerError::Remote(format!(
        "this build has no caches on other machines, and `{}` is one\nhint: build with --features remote-cache",
        remote.uri
    )))
}
